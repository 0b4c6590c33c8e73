"""Quality of segmentations and classifications: confusion matrix, intersection over union, accuracy, groups. NumPy, no framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import InputError

Labels = NDArray[np.integer[Any]]


def confusion_matrix(
    truth: Labels, predicted: Labels, classes: int, ignore_index: int | None = 255
) -> NDArray[np.int64]:
    """Counts `[classes, classes]`, int64: row the true class, column the predicted one. Matrices of several images add up.

    `truth` and `predicted` have one shape; both count classes from 0. Pixels whose truth is `ignore_index` do not count.
    Raises `InputError` for unequal shapes and for labels outside 0 .. classes - 1.
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


def class_iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union per class, `[classes]` in [0, 1]; NaN for a class that is neither there nor predicted."""
    hit = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def mean_iou(confusion: NDArray[np.int64], background: int | None = None) -> float:
    """Mean of `class_iou` over the classes that occur, in [0, 1]; NaN when none does.

    `background` is left out of the mean. Its pixels still count: predicted as another class they are that class's errors.
    """
    iou = class_iou(confusion)
    if background is not None:
        iou = np.delete(iou, background)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


def class_accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each true class's pixels that got its label, `[classes]` in [0, 1]; NaN for a class that is not there."""
    hit, there = np.diagonal(confusion).astype(np.float64), confusion.sum(axis=1)
    return np.divide(hit, there, out=np.full_like(hit, np.nan), where=there > 0)


def mean_accuracy(confusion: NDArray[np.int64], background: int | None = None) -> float:
    """Mean of `class_accuracy` over the classes that are there, in [0, 1]; NaN when none is. `background` as in `mean_iou`."""
    accuracy = class_accuracy(confusion)
    if background is not None:
        accuracy = np.delete(accuracy, background)
    return float(np.nanmean(accuracy)) if np.isfinite(accuracy).any() else float("nan")


def pixel_accuracy(confusion: NDArray[np.int64]) -> float:
    """Share of all pixels with the right label, in [0, 1]; NaN without pixels."""
    pixels = int(confusion.sum())
    return float(np.trace(confusion) / pixels) if pixels else float("nan")


# How good groups are, whatever they are called.


def group_counts(
    truth: Labels, group_map: Labels, classes: int, groups: int, ignore_index: int | None = 255
) -> NDArray[np.int64]:
    """Pixels of each group that belong to each true class, `[groups, classes]`, of one image.

    Raises `InputError` as `confusion_matrix`.
    """
    # The larger of the two square matrices holds the other.
    size = max(classes, groups)
    counts = confusion_matrix(truth, group_map, size, ignore_index)
    if counts[classes:].any():
        raise InputError(
            f"the truth holds label {int(counts.sum(axis=1).nonzero()[0][-1])}, but {classes} classes are numbered 0 to {classes - 1}"
        )
    return counts[:classes, :groups].T


def oracle_confusion(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Confusion matrix `[classes, classes]` of one image if every group had its best label: the class that most of its pixels have.

    Args:
        counts: `group_counts` of the image.

    What is then still wrong is what grouping got wrong; the rest of a model's errors are names.
    """
    classes = counts.shape[1]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion.T, counts.argmax(axis=1), counts)
    return confusion


def best_overlaps(counts: NDArray[np.int64], background: int | None = None) -> NDArray[np.float64]:
    """For each class that is in the image, but for the background, the Jaccard index of its mask with the group that fits it best.

    Args:
        counts: `group_counts` of the image.

    The mean over all masks of a set is the average best overlap (Uijlings et al. 2013, "Selective search for object
    recognition"), with which the masks of self-supervised transformers are judged too. A mask that several groups share
    cannot be had whole: unlike the oracle's score this one falls when objects come apart.
    """
    truth = counts.sum(axis=0)
    union = counts.sum(axis=1)[:, None] + truth - counts
    best = (counts / np.maximum(union, 1)).max(axis=0)
    there = truth > 0
    if background is not None:
        there[background] = False
    return np.asarray(best[there])


def hits(probabilities: NDArray[np.floating[Any]], truth: int, best: int) -> bool:
    """Whether the class `truth` is among the `best` likeliest of `probabilities` `[classes]`; among equals the first counts as likelier."""
    ranked = np.argsort(-probabilities, kind="stable")[:best]
    return bool((ranked == truth).any())
