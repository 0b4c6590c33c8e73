"""Windows over an image, and bilinear interpolation in strips of rows, with half-pixel centres.

No more than a row or a strip of rows is held at full resolution. Letters: C scores, G groups, N windows, h w rows and
columns of patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError
from groupvit_common.segmentation.scores import Floats

Integers = npt.NDArray[np.int64]
Taps = tuple[Integers, Integers, Floats]
"""The result of `linear_taps`: first, second, t."""

# Interpolated values held at once (8 MiB in float32): small enough for the cache, large enough to keep loops rare.
STRIP_VALUES = 1 << 21


def linear_taps(n_in: int, n_out: int) -> Taps:
    """Bilinear interpolation along one axis: output i is `(1 - t[i]) * x[first[i]] + t[i] * x[second[i]]`.

    The same numbers as `resample.resize_matrix(n_in, n_out)` without its zeros.
    """
    return _taps_at((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, n_in)


def _taps_at(centre: Floats, n_in: int) -> Taps:
    centre = np.clip(centre, 0, n_in - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, n_in - 1), centre - first


def strips(channels: int, size: tuple[int, int]) -> Iterator[slice]:
    """Rows of `size` = (H, W) in pieces of at most `STRIP_VALUES` values (but one row at least)."""
    height, width = size
    rows = max(1, STRIP_VALUES // (channels * width))
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def interpolated_rows(maps: Floats, size: tuple[int, int]) -> Iterator[Floats]:
    """`[C, h, w]` resized to `size` = (H, W), row by row: H times `[C, W]`."""
    height, width = size
    left, right, fraction = linear_taps(maps.shape[2], width)
    across = fraction.astype(maps.dtype)

    def wide(row: int) -> Floats:
        values = maps[:, row]
        return values[:, left] * (1 - across) + values[:, right] * across

    # Two rows of the maps at a time: of many labels at full size, the whole would be there four times.
    between, start, end = (-1, -1), maps[:, 0], maps[:, 0]
    first, second, fraction = linear_taps(maps.shape[1], height)
    for above, below, down in zip(first.tolist(), second.tolist(), fraction.astype(maps.dtype), strict=True):
        if (above, below) != between:
            start = end if above == between[1] else wide(above)
            end = start if below == above else wide(below)
            between, step = (above, below), end - start
        yield start if above == below else start + down * step


def interpolated(maps: Floats, axis: int, taps: Taps) -> Floats:
    first, second, fraction = taps
    t = np.expand_dims(fraction.astype(maps.dtype), tuple(range(1, maps.ndim - axis)))
    start = maps.take(first, axis)
    return start + t * (maps.take(second, axis) - start)


@dataclass(frozen=True)
class Windows:
    """Windows of one size that cover an image: every one of `tops` with every one of `lefts`, row by row.

    In pixels of the image as the model sees it; `image` and `size` are (height, width).
    """

    image: tuple[int, int]
    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, image: tuple[int, int], window: int, stride: int) -> Windows:
        """Square windows every `stride` pixels; the last ones are moved back to end where the image ends.

        Where the image is smaller than a window, the windows are as small as the image.
        InputError for a stride that would leave pixels out.
        """
        if not 1 <= stride <= window:
            raise InputError(f"windows of {window} pixels need a stride of 1 to {window} pixels, got {stride}")
        tops, lefts = (
            tuple(min(i * stride, side - window) for i in range(1 + -(-(side - window) // stride)))
            if side > window
            else (0,)
            for side in image
        )
        return cls(image, (min(window, image[0]), min(window, image[1])), tops, lefts)

    @classmethod
    def whole(cls, image: tuple[int, int]) -> Windows:
        """One window, the image."""
        return cls(image, image, (0,), (0,))

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each window."""
        height, width = self.size
        return ((slice(y, y + height), slice(x, x + width)) for y in self.tops for x in self.lefts)

    def counts(self) -> tuple[Integers, Integers]:
        """Numbers of the windows that hold a row `[H]` and a column `[W]`; of a pixel it is the product of the two."""
        rows, columns = (
            sum(((np.arange(side) >= start) & (np.arange(side) < start + length)).astype(np.int64) for start in starts)
            for side, length, starts in zip(self.image, self.size, (self.tops, self.lefts), strict=True)
        )
        return np.asarray(rows), np.asarray(columns)

    def resized_strips(self, channels: int, size: tuple[int, int]) -> Iterator[tuple[slice, Integers, Taps]]:
        """The image resized to `size` in strips of rows: (rows, rows of the image that they need, taps among these)."""
        above, below, down = linear_taps(self.image[0], size[0])
        for rows in strips(channels, (size[0], max(size[1], self.image[1]))):
            needed = np.unique(np.concatenate([above[rows], below[rows]]))
            yield rows, needed, (np.searchsorted(needed, above[rows]), np.searchsorted(needed, below[rows]), down[rows])

    def tiles(
        self, channels: int, grid: tuple[int, int], size: tuple[int, int]
    ) -> Iterator[tuple[int, slice, slice, Taps, Taps]]:
        """For each window the pixels, of the image resized to `size`, that are nearer to its centre than to another's.

        In strips: (index of the window, rows, columns, row and column taps in a map of the window of `grid` = (h, w)).
        """
        down, across = (
            list(_nearest(*axis))
            for axis in zip(self.image, self.size, (self.tops, self.lefts), grid, size, strict=True)
        )
        for index, ((top, bottom, y), (left, right, x)) in enumerate((i, j) for i in down for j in across):
            if left < right:
                for part in strips(channels, (bottom - top, right - left)):
                    rows = slice(top + part.start, top + part.stop)
                    yield index, rows, slice(left, right), (y[0][part], y[1][part], y[2][part]), x


def _nearest(side: int, length: int, starts: Sequence[int], n_in: int, n_out: int) -> Iterator[tuple[int, int, Taps]]:
    """One axis of `Windows.tiles`: first and last but one of the pixels of each window, and their taps."""
    position = (np.arange(n_out) + 0.5) * (side / n_out)
    nearest = np.abs(position[:, None] - (np.asarray(starts) + length / 2)).argmin(axis=1)
    for index, start in enumerate(starts):
        first, end = np.searchsorted(nearest, (index, index + 1)).tolist()
        yield first, end, _taps_at((position[first:end] - start) * (n_in / length) - 0.5, n_in)
