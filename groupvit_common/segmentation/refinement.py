"""Pixel-adaptive refinement (PAMR; Araslanov and Roth 2020, section 3.3): scores of labels that follow the edges of an
image.

Pixel i of an image x has the neighbours j that lie d pixels away in rows, columns or both, eight for each d of
`dilations`; beyond the border the pixel nearest to them stands. With s_ic the standard deviation of channel c over
pixel i and its neighbours,

    k_ij = mean over c of -|x_ic - x_jc| / (1e-8 + 0.1 s_ic)
    a_ij = softmax over j of k_ij

and the scores of pixel i become the sum of a_ij times those of j, `times` times over. So scores spread where colours
are alike and stop where they change; what is measured in units of s_i is the same at any contrast.

As in the authors' code the pixel itself is no neighbour, and counts in s_i once for each dilation (divisor n - 1). A
factor and a summand for each channel change nothing (but for the 1e-8), so normalised pixels serve as well as colours.

`groupvit_torch.label_maps` holds the same functions for tensors. Letters: C channels, L labels, K = 8 for each
dilation, h w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from groupvit_common.segmentation.options import DILATIONS

Floats = npt.NDArray[np.floating[Any]]

TIMES = 10
"""The authors refine so many times."""

WIDTH = 0.1
"""Of the kernel, in standard deviations."""

SMALLEST = 1e-8
"""Where all neighbours are alike their standard deviation is zero."""

LABELS_AT_ONCE = 32
"""Labels are refined one by one, so many of them in memory besides the scores."""

# Scores computed at once (1 MiB in float32): with the kernel's rows they stay in a core's cache.
_STRIP_VALUES = 1 << 18


def refinement_reach(dilations: Sequence[int], size: tuple[int, int]) -> tuple[int, list[tuple[int, int]]]:
    """The largest distance of a neighbour, and the rows and columns to each of the K neighbours of a pixel."""
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    # From a side's length on, all neighbours are the border's pixels.
    near = [min(d, max(size)) for d in dilations]
    return max(near), [(d * y, d * x) for d in near for y, x in around]


def refine(scores: Floats, image: Floats, times: int = TIMES, dilations: Sequence[int] = DILATIONS) -> Floats:
    """Scores `[L, h, w]` of the labels, refined by the image `[C, h, w]`, in the scores' dtype."""
    kernel, result = pixel_affinity(image.astype(scores.dtype, copy=False), dilations), np.empty_like(scores)
    for start in range(0, len(scores), LABELS_AT_ONCE):
        some = slice(start, start + LABELS_AT_ONCE)
        result[some] = _refined(scores[some], kernel, times, dilations)
    return result


def _refined(scores: Floats, kernel: Floats, times: int, dilations: Sequence[int]) -> Floats:
    height, width = scores.shape[1:]
    reach, neighbours = refinement_reach(dilations, (height, width))
    for _ in range(times):
        padded, refined = _padded(scores, reach), np.zeros_like(scores)
        for top, bottom in refinement_strips(len(scores), (height, width)):
            total = refined[:, top:bottom]
            product = np.empty_like(total)
            for k, (y, x) in zip(kernel[:, top:bottom], neighbours, strict=True):
                neighbour = padded[:, reach + y + top : reach + y + bottom, reach + x : reach + x + width]
                total += np.multiply(k, neighbour, out=product)
        scores = refined
    return scores


def pixel_affinity(image: Floats, dilations: Sequence[int] = DILATIONS) -> Floats:
    """The a_ij of an image `[C, h, w]`: `[K, h, w]`, for each pixel a sum of 1."""
    neighbours, count = _neighbours(image, dilations), 9 * len(dilations)
    # The pixel itself counts once for each dilation.
    mean = len(dilations) * image
    for neighbour in neighbours:
        mean += neighbour
    mean /= count
    square = len(dilations) * np.square(image - mean)
    for neighbour in neighbours:
        square += np.square(neighbour - mean)
    scale = SMALLEST + WIDTH * np.sqrt(square / (count - 1))
    kernel = np.stack([(np.abs(image - neighbour) / -scale).mean(axis=0) for neighbour in neighbours])
    np.exp(kernel - kernel.max(axis=0), out=kernel)
    kernel /= kernel.sum(axis=0)
    return kernel


def _padded(maps: Floats, reach: int) -> Floats:
    return np.pad(maps, ((0, 0), (reach, reach), (reach, reach)), mode="edge")


def _neighbours(image: Floats, dilations: Sequence[int]) -> list[Floats]:
    """The image `[C, h, w]` shifted to each of the K neighbours."""
    height, width = image.shape[1:]
    reach, neighbours = refinement_reach(dilations, (height, width))
    padded = _padded(image, reach)
    return [padded[:, reach + y : reach + y + height, reach + x : reach + x + width] for y, x in neighbours]


def refinement_strips(labels: int, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First and last row but one of pieces of `size` = (h, w) that are computed together."""
    height, width = size
    rows = max(1, _STRIP_VALUES // (labels * width))
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
