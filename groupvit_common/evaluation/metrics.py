"""Quality of segmentations: confusion matrix, intersection over union, accuracy, groups."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import InputError

Labels = NDArray[np.integer[Any]]
Confusion = NDArray[np.int64]
"""Pixels `[classes, classes]`: rows the true classes, columns the predicted ones."""


def confusion_matrix(truth: Labels, predicted: Labels, classes: int, ignore_index: int | None = 255) -> Confusion:
    """Returns the confusion matrix of an image, int64. Those of several images add up.

    Args:
        truth, predicted: class indices, of one shape.
        ignore_index: the truth of pixels that do not count.

    Raises:
        InputError: unequal shapes, or indices outside 0 .. classes - 1.
    """
    if truth.shape != predicted.shape:
        raise InputError(f"truth and prediction must have one shape, got {truth.shape} and {predicted.shape}")
    kept = np.ones(truth.shape, bool) if ignore_index is None else truth != ignore_index
    rows, columns = truth[kept].astype(np.int64), predicted[kept].astype(np.int64)
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.size and (values.min() < 0 or values.max() >= classes):
            raise InputError(
                f"the {name} holds label {int(values.min() if values.min() < 0 else values.max())}, "
                f"but {classes} classes are numbered 0 to {classes - 1}"
            )
    return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def class_iou(confusion: Confusion) -> NDArray[np.float64]:
    """Returns the intersection over union of each class, in [0, 1]; NaN for one that is neither true nor predicted."""
    hit = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def mean_iou(confusion: Confusion, background: int | None = None) -> float:
    """Returns the mean of `class_iou` over the classes that occur, in [0, 1]; NaN when none does.

    `background` is left out of the mean. Its pixels still count: predicted as another class they are
    its errors.
    """
    return _mean(class_iou(confusion), background)


def class_accuracy(confusion: Confusion) -> NDArray[np.float64]:
    """Returns the fraction of each class's pixels that got its label, in [0, 1]; NaN for an absent class."""
    hit, there = np.diagonal(confusion).astype(np.float64), confusion.sum(axis=1)
    return np.divide(hit, there, out=np.full_like(hit, np.nan), where=there > 0)


def mean_accuracy(confusion: Confusion, background: int | None = None) -> float:
    """Returns the mean of `class_accuracy` over the present classes, in [0, 1]; NaN when none is.

    `background` is left out of the mean.
    """
    return _mean(class_accuracy(confusion), background)


def _mean(values: NDArray[np.float64], background: int | None) -> float:
    kept = values if background is None else np.delete(values, background)
    return float(np.nanmean(kept)) if np.isfinite(kept).any() else float("nan")


def pixel_accuracy(confusion: Confusion) -> float:
    """Returns the fraction of all pixels with the right label, in [0, 1]; NaN without pixels."""
    pixels = int(confusion.sum())
    return float(np.trace(confusion) / pixels) if pixels else float("nan")


def group_counts(
    truth: Labels, group_map: Labels, classes: int, groups: int, ignore_index: int | None = 255
) -> Confusion:
    """Returns the pixels of each group that belong to each true class, `[groups, classes]`, of one image.

    Raises:
        InputError: as `confusion_matrix`.
    """
    # The larger of the two square matrices holds the other.
    size = max(classes, groups)
    counts = confusion_matrix(truth, group_map, size, ignore_index)
    if counts[classes:].any():
        raise InputError(
            f"the truth holds label {int(counts.sum(axis=1).nonzero()[0][-1])}, "
            f"but {classes} classes are numbered 0 to {classes - 1}"
        )
    return counts[:classes, :groups].T


def oracle_confusion(counts: Confusion) -> Confusion:
    """Returns the confusion matrix of one image if every group had its best label, the class of most of its pixels.

    Its errors are those of grouping; the rest of a model's errors are those of naming.

    Args:
        counts: `group_counts` of the image.
    """
    classes = counts.shape[1]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion.T, counts.argmax(axis=1), counts)
    return confusion


def best_overlaps(counts: Confusion, background: int | None = None) -> NDArray[np.float64]:
    """Returns the Jaccard index of each present class's mask, but the background's, and the group that fits it best.

    The mean over all masks of a set is the average best overlap (Uijlings et al. 2013, "Selective search for object
    recognition"), by which the masks of self-supervised transformers are judged too. Unlike the oracle's score it falls
    when an object is split into several groups.

    Args:
        counts: `group_counts` of the image.
    """
    truth = counts.sum(axis=0)
    union = counts.sum(axis=1)[:, None] + truth - counts
    best = (counts / np.maximum(union, 1)).max(axis=0)
    there = truth > 0
    if background is not None:
        there[background] = False
    return np.asarray(best[there])
