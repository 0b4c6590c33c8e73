"""Interpolation along one axis as a matrix, so that both backends resample with the same numbers.

A two-dimensional resize is one matrix per axis: `out = rows @ image @ columns.T`. The conventions are PyTorch's
(`torch.nn.functional.interpolate`, align_corners=False, no antialiasing): output sample i lies at (i + 0.5) * n_in /
n_out - 0.5, samples beyond the edge repeat it, and bicubic uses the kernel with a = -0.75. TensorFlow's own bicubic (a
= -0.5) differs by 0.1.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import InputError

Values = NDArray[np.floating[Any]]
Mode = Literal["bilinear", "bicubic", "nearest"]

CUBIC_A = -0.75
"""The parameter a of the bicubic kernel."""


@lru_cache(maxsize=256)
def resize_matrix(n_in: int, n_out: int, mode: Mode = "bilinear") -> NDArray[np.float64]:
    """Returns the matrix `[n_out, n_in]` (float64, read-only) that resamples `n_in` values to `n_out` along one axis.

    Raises:
        InputError: a size below 1 or an unknown mode.
    """
    if n_in < 1 or n_out < 1:
        raise InputError(f"cannot resample {n_in} values to {n_out}: both counts must be at least 1")
    centre = (np.arange(n_out, dtype=np.float64) + 0.5) * (n_in / n_out) - 0.5
    if mode == "bilinear":
        taps, weights = _linear(np.maximum(centre, 0.0))
    elif mode == "bicubic":
        taps, weights = _cubic(centre)
    elif mode == "nearest":
        # PyTorch's "nearest-exact", which is TensorFlow's "nearest": the sample whose area holds the output's centre.
        # In whole numbers, because a centre on the border between two samples must not depend on rounding.
        first = (2 * np.arange(n_out) + 1) * n_in // (2 * n_out)
        taps, weights = first[:, None].astype(np.float64), np.ones((n_out, 1))
    else:
        raise InputError(f"unknown interpolation {mode!r}: use 'bilinear', 'bicubic' or 'nearest'")
    matrix = np.zeros((n_out, n_in))
    index = np.clip(taps.astype(np.int64), 0, n_in - 1)
    np.add.at(matrix, (np.arange(n_out)[:, None], index), weights)
    matrix.setflags(write=False)
    return matrix


def _linear(centre: Values) -> tuple[Values, Values]:
    first = np.floor(centre)
    fraction = centre - first
    return first[:, None] + np.arange(2.0), np.stack([1 - fraction, fraction], axis=1)


def _cubic(centre: Values) -> tuple[Values, Values]:
    """Returns taps and weights of cubic convolution (Keys 1981, eq. 4 in its general form with parameter a)."""
    first = np.floor(centre)
    taps: Values = first[:, None] + np.arange(-1.0, 3.0)
    distance = np.abs(centre[:, None] - taps)
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
    return taps, np.where(distance <= 1, near, far)
