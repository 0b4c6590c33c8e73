"""Temporal smoothing: scores of a video's pixels as an exponential moving average over its frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_number
from groupvit_common.preprocessing.images import as_array
from groupvit_common.segmentation.label_maps import PixelLabels, View, pixel_labels
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.scores import Floats

# A frame starts a new scene if it differs from the last one by so much, 0 to 1, on average over the cells of a grid.
# Photographs that follow each other differ by 0.14 at least, most by 0.26; a pan by a twentieth of the width by 0.06.
_CUT = 0.125
_GRID = 16


class Smoother:
    """Labels the pixels of a video's frames, one after the other, by scores that are averaged over time.

    A pixel's scores become `amount` times those of the frame before, smoothed as well, plus `1 - amount` times its own.
    They start anew at a cut, where most of the image changes from one frame to the next, and where the size of the
    frames or the number of labels changes. Groups stay those of the frame.

    Args:
        amount: 0, no smoothing, to less than 1.
        deviation: the standard deviation that pixels were divided by, of each channel or of all.

    Raises:
        InputError: an amount outside of this range.
    """

    def __init__(self, amount: float, deviation: Any = 1.0) -> None:
        if not (is_number(amount) and 0 <= amount < 1):
            raise InputError(f"smoothing must be a number of at least 0 and less than 1, got {amount!r}")
        self._amount = float(amount)
        self._deviation = np.asarray(deviation, np.float32).reshape(-1, 1, 1)
        self._scores: list[Floats] = []
        self._last: Floats | None = None
        self.cuts = 0

    def pixel_labels(
        self,
        views: Sequence[View],
        pixels: Floats,
        size: tuple[int, int],
        options: SegmentationOptions,
        is_background: Sequence[bool],
    ) -> PixelLabels:
        """`label_maps.pixel_labels` of the next frame, by smoothed scores."""
        small = _cells(pixels) * self._deviation
        if self._last is not None and self._is_cut(small):
            self._scores, self.cuts = [], self.cuts + 1
        self._last = small
        arrays = [replace(view, affinity=as_array(view.affinity), grouping=as_array(view.grouping)) for view in views]
        return pixel_labels(arrays, pixels, size, options, is_background, self._smoothed)

    def _is_cut(self, small: Floats) -> bool:
        last = self._last
        return last is None or last.shape != small.shape or float(np.abs(small - last).mean()) > _CUT

    def _smoothed(self, *scores: Floats) -> list[Floats]:
        if [each.shape for each in scores] != [each.shape for each in self._scores]:
            self._scores = [np.array(each) for each in scores]
        else:
            for smooth, own in zip(self._scores, scores, strict=True):
                # Of equal scores these stay what they are, to the bit.
                smooth += (1 - self._amount) * (own - smooth)
        return self._scores


def _cells(pixels: Floats) -> Floats:
    """The mean colours of the cells of a grid over an image `[3, h, w]`."""
    rows, columns = (np.linspace(0, side, min(_GRID, side), endpoint=False).astype(int) for side in pixels.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, axis=1), columns, axis=2)
    counts = np.outer(np.diff(rows, append=pixels.shape[1]), np.diff(columns, append=pixels.shape[2]))
    return np.asarray(sums / counts.astype(pixels.dtype))
