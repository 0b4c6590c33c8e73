"""Segmentation quality: confusion matrix, intersection over union, their mean. NumPy integers, no framework."""

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
