"""From what the model says about groups to a label for every pixel, in NumPy, and the record that the user gets.

The paper's inference (Xu et al. 2022, section 4.2, and the authors' evaluation):

1. *Affinity* of group g to label l: `softmax_l(s * cos(g, l))`, s the logit scale (at most 100). A label may have several embeddings
   `[K, E]`, for words that mean it; its cosine is then the largest of theirs, here and for the image as a whole. With `top_k`, only the labels
   most similar to the whole image stay. Exactly as the authors evaluate, the affinity is the product of two softmaxes, one
   over the labels that stay and one over all, so that a threshold from the paper (0.95 for VOC and COCO, 0.35 for Context)
   means the same here. Without `top_k` both are equal, and the affinity is the squared probability.
2. *Grouping map*: the soft assignments of all stages multiplied, so that each patch holds a distribution over the last
   stage's groups.
3. *Assignment* "hard": the grouping map is interpolated to the image's pixels, a pixel goes to its largest group and takes
   that group's best label. "soft": a pixel's score of a label is the affinity averaged by its grouping weights. Both are
   linear before the maximum, so labels are combined at patch resolution and only then interpolated.
4. *Background*: pixels whose best score is below `min(threshold, the image's largest affinity)`, and pixels of labels that
   the user calls background.
5. *Windows*: instead of the whole picture, the model may see overlapping windows of it, each an image of its own in points 1
   to 4. A pixel's scores are then the mean over the windows that hold it, a background by threshold being one label more
   (score 1 where a window says background, else 0); they are resized to the original size before the largest is taken.
6. *Looks*: a picture may be looked at several times, in several sizes and mirrored, each look as in points 1 to 5. The scores of a
   look are resized to the size of the first one (and mirrored back), and a pixel's are the mean over all looks.
7. *Refinement*: those scores may be made to follow the picture's edges (`groupvit_common.segmentation.refinement`), at the size of the first look.
8. *Foreground*: of the scores of 6 and 7, resized to the original size, the largest counts. With a `foreground` share a pixel gets the
   best label that is no background where such labels have at least this share of the sum of all scores, and is background elsewhere.

Interpolation is bilinear with half-pixel centres and never holds more than a row or a strip of rows at full resolution.
Letters: B images, L labels, C = L or L + 1 scores, G groups, N windows, E embedding, h w patches down and across, P = h*w,
H W pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.segmentation import figures as visualize
from groupvit_common.segmentation.options import DILATIONS, Assignment
from groupvit_common.segmentation.refinement import refine
from groupvit_common.storage.json_text import unicode_json
from groupvit_common.storage.names import fit_name
from groupvit_common.storage.saving import write_files, write_text

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.unsignedinteger[Any]]
Integers = npt.NDArray[np.int64]
Taps = tuple[Integers, Integers, Floats]
"""What `linear_taps` gives: first, second, t."""

MAX_LOGIT_SCALE = 100.0
"""The authors' bound on the logit scale (CLIP's too), in training and inference."""

RESULT_ENDS = ("_overlay.png", "_labels.png", "_groups.png", "_segmentation.json")
"""What the names of a segmentation's files end with."""

BACKGROUND = "background"
"""Name of value 0 in a label map that has a background."""

# Interpolated values held at once (8 MiB in float32): small enough for the cache, large enough to keep loops rare.
STRIP_VALUES = 1 << 21


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _unit(x: Floats) -> Floats:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def similarity(embeds: Floats, label_embeds: Floats) -> Floats:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words `[L, K, E]`: `[..., L]`."""
    if label_embeds.ndim == 2:
        return _unit(embeds) @ _unit(label_embeds).T
    labels, words, width = label_embeds.shape
    of_words = similarity(embeds, label_embeds.reshape(-1, width))
    return of_words.reshape(*embeds.shape[:-1], labels, words).max(axis=-1)


def grouping_map(assignments: Sequence[Floats], grid: tuple[int, int]) -> Floats:
    """Stages' soft assignments `[B, G_out, G_in]`, first stage first (its G_in = P = h*w), -> `[B, G, h, w]`.

    Every patch holds a distribution over the last stage's groups, because the columns of each stage sum to one.
    """
    product = assignments[0]
    for stage in assignments[1:]:
        product = stage @ product
    return product.reshape(*product.shape[:2], *grid)


def image_probabilities(image_embeds: Floats, label_embeds: Floats, logit_scale: float) -> Floats:
    """`[B, E]`, `[L, E]` or `[L, K, E]` -> `[B, L]`: softmax over labels of the scaled cosine similarity."""
    return softmax(min(logit_scale, MAX_LOGIT_SCALE) * similarity(image_embeds, label_embeds))


def label_affinity(
    group_embeds: Floats,
    label_embeds: Floats,
    logit_scale: float,
    image_embeds: Floats | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Floats:
    """Affinity of groups to labels (point 1 above): `[B, G, E]`, `[L, E]` or `[L, K, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all. A higher `temperature` makes labels more alike.
    """
    scaled = min(logit_scale, MAX_LOGIT_SCALE) / temperature * similarity(group_embeds, label_embeds)
    among_all = softmax(scaled)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    of_images = similarity(image_embeds, label_embeds)
    best = np.argsort(-of_images, axis=-1, kind="stable")[:, :top_k]
    kept = np.zeros(of_images.shape, dtype=bool)
    np.put_along_axis(kept, best, True, axis=-1)
    return among_all * softmax(np.where(kept[:, None], scaled, -np.inf))


def label_values(is_background: Sequence[bool], threshold: float | None) -> tuple[Integers, bool]:
    """The label map's value of each label, and whether 0 is background.

    Labels are numbered in their order, background ones are 0. Without a background of either kind they begin at 0.
    """
    background = np.asarray(is_background, dtype=bool)
    has_background = threshold is not None or bool(background.any())
    values = np.cumsum(~background) - (0 if has_background else 1)
    return np.where(background, 0, values), has_background


def index_dtype(count: int) -> type[np.uint8 | np.uint16]:
    """The smaller of uint8 and uint16 that counts to `count` values."""
    if count > 1 << 16:
        raise InputError(f"{count} labels do not fit a label map of 16 bits: give at most {1 << 16}")
    return np.uint8 if count <= 1 << 8 else np.uint16


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


@dataclass(frozen=True)
class PixelLabels:
    """Maps of one image: `label_map` and `group_map` `[H, W]`, and the label map's value of each group `[G]`."""

    label_map: Indices
    group_map: Indices
    group_values: Integers


def label_pixels(
    affinity: Floats,
    grouping: Floats,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
) -> PixelLabels:
    """One image (points 3 and 4 above): affinity `[G, L]`, grouping map `[G, h, w]` -> maps at `size` = (H, W)."""
    groups, labels = affinity.shape
    values, _ = label_values([False] * labels if is_background is None else is_background, threshold)
    limit = None if threshold is None else min(threshold, float(affinity.max()))

    group_values = _group_values(affinity, values, threshold)
    group_map = np.empty(size, dtype=index_dtype(groups))
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    for y, row in enumerate(interpolated_rows(grouping, size)):
        group_map[y] = largest = row.argmax(axis=0)
        if assignment == "hard":
            label_map[y] = group_values[largest]
    if assignment == "hard":
        return PixelLabels(label_map, group_map, group_values)

    for y, row in enumerate(interpolated_rows(np.einsum("gl,ghw->lhw", affinity, grouping), size)):
        row_values = values[row.argmax(axis=0)]
        if limit is not None:
            row_values[row.max(axis=0) < limit] = 0
        label_map[y] = row_values
    return PixelLabels(label_map, group_map, group_values)


@dataclass(frozen=True)
class Windows:
    """Windows of one size that cover a picture: every one of `tops` with every one of `lefts`, row by row.

    In pixels of the picture as the model sees it; `picture` and `size` are (height, width).
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, picture: tuple[int, int], window: int, stride: int) -> Windows:
        """Square windows every `stride` pixels; the last ones are moved back to end where the picture ends.

        Where the picture is smaller than a window, the windows are as small as the picture.
        InputError for a stride that would leave pixels out.
        """
        if not 1 <= stride <= window:
            raise InputError(f"windows of {window} pixels need a stride of 1 to {window} pixels, got {stride}")
        tops, lefts = (
            tuple(min(i * stride, side - window) for i in range(1 + -(-(side - window) // stride)))
            if side > window
            else (0,)
            for side in picture
        )
        return cls(picture, (min(window, picture[0]), min(window, picture[1])), tops, lefts)

    @classmethod
    def whole(cls, picture: tuple[int, int]) -> Windows:
        """One window, the picture."""
        return cls(picture, picture, (0,), (0,))

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each window."""
        height, width = self.size
        return ((slice(y, y + height), slice(x, x + width)) for y in self.tops for x in self.lefts)

    def counts(self) -> tuple[Integers, Integers]:
        """How many windows hold a row `[H]`, and a column `[W]`; a pixel is in the product of the two."""
        rows, columns = (
            sum(((np.arange(side) >= start) & (np.arange(side) < start + length)).astype(np.int64) for start in starts)
            for side, length, starts in zip(self.picture, self.size, (self.tops, self.lefts), strict=True)
        )
        return np.asarray(rows), np.asarray(columns)

    def resized_strips(self, channels: int, size: tuple[int, int]) -> Iterator[tuple[slice, Integers, Taps]]:
        """The picture resized to `size` in strips of rows: (rows, rows of the picture that they need, taps among these)."""
        above, below, down = linear_taps(self.picture[0], size[0])
        for rows in strips(channels, (size[0], max(size[1], self.picture[1]))):
            needed = np.unique(np.concatenate([above[rows], below[rows]]))
            yield rows, needed, (np.searchsorted(needed, above[rows]), np.searchsorted(needed, below[rows]), down[rows])

    def tiles(
        self, channels: int, grid: tuple[int, int], size: tuple[int, int]
    ) -> Iterator[tuple[int, slice, slice, Taps, Taps]]:
        """For each window the pixels, of the picture resized to `size`, that are nearer to its centre than to another's.

        In strips: (index of the window, rows, columns, taps down and across in a map of the window of `grid` = (h, w)).
        """
        down, across = (
            list(_nearest(*axis))
            for axis in zip(self.picture, self.size, (self.tops, self.lefts), grid, size, strict=True)
        )
        for index, ((top, bottom, y), (left, right, x)) in enumerate((i, j) for i in down for j in across):
            if left < right:
                for part in strips(channels, (bottom - top, right - left)):
                    rows = slice(top + part.start, top + part.stop)
                    yield index, rows, slice(left, right), (y[0][part], y[1][part], y[2][part]), x


def _nearest(side: int, length: int, starts: Sequence[int], n_in: int, n_out: int) -> Iterator[tuple[int, int, Taps]]:
    """One axis of `Windows.tiles`: where the pixels of each window begin and end, and their taps."""
    position = (np.arange(n_out) + 0.5) * (side / n_out)
    nearest = np.abs(position[:, None] - (np.asarray(starts) + length / 2)).argmin(axis=1)
    for index, start in enumerate(starts):
        first, end = np.searchsorted(nearest, (index, index + 1)).tolist()
        yield first, end, _taps_at((position[first:end] - start) * (n_in / length) - 0.5, n_in)


def _interpolated(maps: Floats, axis: int, taps: Taps) -> Floats:
    first, second, fraction = taps
    t = np.expand_dims(fraction.astype(maps.dtype), tuple(range(1, maps.ndim - axis)))
    start = maps.take(first, axis)
    return start + t * (maps.take(second, axis) - start)


def _window_rows(
    affinity: Floats, grouping: Floats, size: tuple[int, int], assignment: Assignment, threshold: float | None
) -> Callable[[Integers], Floats]:
    """Scores of one window of `size`: a function from r row numbers to `[C, r, W]`."""
    height, width = size
    limit = None if threshold is None else min(threshold, affinity.max())
    maps = grouping if assignment == "hard" else np.einsum("gl,ghw->lhw", affinity, grouping)
    wide = _interpolated(maps, 2, linear_taps(maps.shape[2], width))
    above, below, down = linear_taps(maps.shape[1], height)

    def with_background(scores: Floats) -> Floats:
        if limit is None:
            return scores
        return np.concatenate([(scores.max(axis=0) < limit).astype(scores.dtype)[None], scores])

    table = with_background(affinity.T)

    def rows(numbers: Integers) -> Floats:
        interpolated = _interpolated(wide, 1, (above[numbers], below[numbers], down[numbers]))
        return table[:, interpolated.argmax(axis=0)] if assignment == "hard" else with_background(interpolated)

    return rows


def window_scores(
    affinity: Floats,
    grouping: Floats,
    windows: Windows,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
) -> Iterator[tuple[slice, Floats]]:
    """Scores of one picture that was seen in windows (point 5 above), resized to `size` = (H, W), in strips of rows.

    Affinity `[N, G, L]` and grouping maps `[N, G, h, w]` of the windows, in their order -> (rows, `[C, rows, W]`), scores in
    0..1. With a `threshold` C is L + 1 and the background comes first.
    """
    channels = affinity.shape[2] + (threshold is not None)
    of_windows = [
        _window_rows(a, g, windows.size, assignment, threshold) for a, g in zip(affinity, grouping, strict=True)
    ]
    count_down, count_across = windows.counts()
    across = linear_taps(windows.picture[1], size[1])
    for rows, needed, down in windows.resized_strips(channels, size):
        total = np.zeros((channels, len(needed), windows.picture[1]), affinity.dtype)
        for window_rows, (window, columns) in zip(of_windows, windows, strict=True):
            inside = slice(*np.searchsorted(needed, (window.start, window.stop)).tolist())
            if inside.start < inside.stop:
                total[:, inside, columns] += window_rows(needed[inside] - window.start)
        total /= np.outer(count_down[needed], count_across).astype(affinity.dtype)
        yield rows, _interpolated(_interpolated(total, 2, across), 1, down)


def pixel_scores(
    affinity: Floats,
    grouping: Floats,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
) -> Floats:
    """`window_scores` of a picture seen as a whole: `[G, L]`, `[G, h, w]` -> `[C, H, W]` at `size` = (H, W).

    The authors' scores, where `size` is what the model saw: their largest is what `label_pixels` says.
    """
    parts = window_scores(
        affinity[None], grouping[None], Windows.whole(size), size, assignment=assignment, threshold=threshold
    )
    return np.concatenate([scores for _, scores in parts], axis=1)


def label_windows(
    affinity: Floats,
    grouping: Floats,
    windows: Windows,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
) -> PixelLabels:
    """One picture seen in windows (point 5 above): affinity `[N, G, L]`, grouping maps `[N, G, h, w]` -> maps at `size`.

    Groups are numbered window by window; a pixel's is that of the window to whose centre it is nearest.
    """
    labels = affinity.shape[2]
    values, _ = label_values([False] * labels if is_background is None else is_background, threshold)
    group_values = np.concatenate([_group_values(a, values, threshold) for a in affinity])

    # Labels that no group may have need no pixels; the first stays for where all scores are zero.
    used = np.asarray(affinity.any(axis=(0, 1)))
    used[0] = True
    channel_values = values[used] if threshold is None else np.concatenate([[0], values[used]])
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    parts = window_scores(affinity[..., used], grouping, windows, size, assignment=assignment, threshold=threshold)
    for rows, scores in parts:
        label_map[rows] = channel_values[scores.argmax(axis=0)]

    return PixelLabels(label_map, group_windows(grouping, windows, size), group_values)


@dataclass(frozen=True, eq=False)
class Look:
    """What the model says of a picture that it saw in windows, one or several: affinity `[N, G, L]`, grouping maps `[N, G, h, w]`."""

    affinity: Any
    grouping: Any
    windows: Windows
    mirrored: bool


def mean_scores(
    looks: Sequence[Look], size: tuple[int, int], *, assignment: Assignment = "hard", threshold: float | None = None
) -> Floats:
    """Scores of one picture, the mean over looks (point 6 above): `[C, H, W]` at `size` = (H, W)."""
    labels, dtype = looks[0].affinity.shape[2], looks[0].affinity.dtype
    total = np.zeros((labels + (threshold is not None), *size), dtype)
    for look in looks:
        parts = window_scores(
            look.affinity, look.grouping, look.windows, size, assignment=assignment, threshold=threshold
        )
        for rows, scores in parts:
            total[:, rows] += scores[:, :, ::-1] if look.mirrored else scores
    total /= len(looks)
    return total


def label_looks(
    looks: Sequence[Look],
    pixels: Floats,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
    foreground: float | None = None,
    times: int = 0,
    dilations: Sequence[int] = DILATIONS,
) -> PixelLabels:
    """One picture (points 6 to 8 above), `pixels` `[3, h, w]` as the first look saw it -> maps at `size` = (H, W).

    Groups are those of the first look, numbered window by window. `times`: of refinement, 0 for none.
    """
    first, labels = looks[0], looks[0].affinity.shape[2]
    hidden = np.asarray([False] * labels if is_background is None else is_background, dtype=bool)
    values, _ = label_values(hidden.tolist(), threshold)
    used = np.any([look.affinity.any(axis=(0, 1)) for look in looks], axis=0)
    used[0] = True
    if foreground is not None:
        used |= ~hidden
    some = [Look(look.affinity[..., used], look.grouping, look.windows, look.mirrored) for look in looks]
    scores = mean_scores(some, pixels.shape[1:], assignment=assignment, threshold=threshold)
    if times:
        scores = refine(scores, pixels, times, dilations)

    extra = threshold is not None
    channel_values = np.concatenate([[0], values[used]]) if extra else values[used]
    wanted = of_groups = None
    if foreground is not None:
        of_groups = (~hidden, foreground)
        wanted = (np.concatenate([[False], ~hidden[used]]) if extra else ~hidden[used], foreground)
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    for y, row in enumerate(interpolated_rows(scores, size)):
        label_map[y] = _chosen(row, channel_values, wanted)
    group_values = np.concatenate([_group_values(a, values, threshold, of_groups) for a in first.affinity])
    return PixelLabels(label_map, group_windows(first.grouping, first.windows, size), group_values)


Foreground = tuple[npt.NDArray[np.bool_], float]  # which channels `[C]`, and the share of the scores that they need


def _chosen(scores: Floats, values: Integers, foreground: Foreground | None = None) -> Integers:
    """The label map's value for each of n places, of scores `[C, n]` and the channels' values `[C]` (point 8 above)."""
    if foreground is None:
        return values[scores.argmax(axis=0)]
    channels, share = foreground
    wanted = scores[channels]
    enough = wanted.sum(axis=0) >= share * scores.sum(axis=0)
    return np.where(enough, values[channels][wanted.argmax(axis=0)], 0)


def group_windows(grouping: Floats, windows: Windows, size: tuple[int, int]) -> Indices:
    """The largest group of each pixel of a picture seen in windows: grouping maps `[N, G, h, w]` -> `[H, W]`, `size` = (H, W).

    Groups are numbered window by window; a pixel's is that of the window to whose centre it is nearest.
    """
    count, groups = grouping.shape[:2]
    group_map: Indices = np.empty(size, dtype=index_dtype(count * groups))
    for index, rows, columns, down, across in windows.tiles(groups, grouping.shape[2:], size):
        tile = _interpolated(_interpolated(grouping[index], 2, across), 1, down)
        group_map[rows, columns] = tile.argmax(axis=0) + index * groups
    return group_map


def label_similarity(
    group_embeds: Floats, grouping: Floats, label_embeds: Floats, windows: Windows, size: tuple[int, int]
) -> Floats:
    """How alike each place of a picture and each label are, -1 to 1: the cosine similarities of the groups, by their shares in a patch.

    Windows' group embeddings `[N, G, E]` and grouping maps `[N, G, h, w]`, labels `[L, E]` or `[L, K, E]` -> `[L, H, W]` at `size` = (H, W). A
    pixel's is the mean over the windows that hold it.
    """
    maps = np.einsum("ngl,nghw->nlhw", similarity(group_embeds, label_embeds), grouping)
    total = np.zeros((len(label_embeds), *windows.picture), maps.dtype)
    across, down = (linear_taps(n, side) for n, side in zip(maps.shape[:1:-1], windows.size[::-1], strict=True))
    for of_window, (rows, columns) in zip(maps, windows, strict=True):
        total[:, rows, columns] += _interpolated(_interpolated(of_window, 2, across), 1, down)
    total /= np.outer(*windows.counts()).astype(maps.dtype)
    across, down = (linear_taps(n, side) for n, side in zip(windows.picture[::-1], size[::-1], strict=True))
    return _interpolated(_interpolated(total, 2, across), 1, down)


def _group_values(
    affinity: Floats, values: Integers, threshold: float | None, foreground: Foreground | None = None
) -> Integers:
    """The label map's value of each group `[G]`, from its affinity `[G, L]` and the values of the labels `[L]`."""
    of_groups = _chosen(affinity.T, values, foreground)
    if threshold is not None:
        of_groups[affinity.max(axis=1) < min(threshold, affinity.max())] = 0
    return of_groups


@dataclass(frozen=True, eq=False)
class Details:
    """What a model sees in one picture besides the labels of its pixels.

    `group_maps`: for each grouping block, the first one first, the largest group of each pixel, uint8 or uint16 `[H, W]` like the
    picture; the last is a `Segmentation`'s `group_map`. In windows groups are numbered window by window.
    `similarity`: `[L, h, w]`, -1 to 1, how alike each place and each of `labels` are, at the size at which the model sees the picture.
    It is what labels are chosen by, before a softmax makes it a score.
    """

    group_maps: tuple[Indices, ...]
    labels: tuple[str, ...]
    similarity: Floats


@dataclass(frozen=True)
class LabelScore:
    """How much of one label is in an image.

    `probability`: of the whole image, softmax over all labels asked for; None for a background that no label names.
    `pixel_share`: part of the pixels, 0..1.
    """

    name: str
    probability: float | None
    pixel_share: float


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented image.

    `image`: the picture, upright, RGB, at its original size H x W.
    `label_map`: uint8 (uint16 beyond 255 labels) `[H, W]`, index into `labels`.
    `labels`: names; the first is "background" where `has_background`.
    `scores`: one record for each of `labels`.
    `group_map`: uint8 or uint16 `[H, W]`, the group of each pixel.
    `group_labels`: for each group, its label as an index into `labels`.
    `source`: the file that the picture came from, where it came from one.
    """

    image: Image.Image
    label_map: Indices
    labels: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    group_map: Indices
    group_labels: tuple[int, ...]
    has_background: bool
    source: str | None = None

    def mask(self, label: str) -> npt.NDArray[np.bool_]:
        """`[H, W]` bool: the pixels of one label."""
        if label not in self.labels:
            raise InputError(f"no label {label!r} here: there are {', '.join(self.labels)}")
        return np.asarray(self.label_map == self.labels.index(label))

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The picture with its labels in colour (`alpha` 0: none, 1: opaque), the background left as it is.

        The legend stands beside or below the picture, which keeps its size.
        """
        colours = self.colours()
        drawn = visualize.overlay(self.image, self.label_map, colours, alpha, skip=0 if self.has_background else None)
        if not legend:
            return drawn
        present = [i for i, score in enumerate(self.scores) if score.pixel_share > 0]
        present.sort(key=lambda i: (self.has_background and i == 0, -self.scores[i].pixel_share))
        entries = [
            visualize.Entry(
                None if self.has_background and i == 0 else colours[i],
                self.labels[i],
                f"label {i}",
                visualize.percent(self.scores[i].pixel_share),
            )
            for i in present
        ]
        return visualize.with_legend(drawn, entries)

    def group_overlay(self, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture with one colour for each group, and what each group was called."""
        groups = len(self.group_labels)
        colours = visualize.palette(groups)
        drawn = visualize.overlay(self.image, self.group_map, colours, alpha)
        if not legend:
            return drawn
        counts = np.bincount(self.group_map.ravel(), minlength=groups)
        entries = [
            visualize.Entry(
                colours[g], self.labels[self.group_labels[g]], f"label {self.group_labels[g]}", f"group {g}"
            )
            for g in np.flatnonzero(counts).tolist()
        ]
        return visualize.with_legend(drawn, entries)

    def colours(self) -> npt.NDArray[np.uint8]:
        """`[len(labels), 3]`: the colour of each label in pictures; the background is black."""
        if not self.has_background:
            return visualize.label_colours(self.labels)
        return np.concatenate([np.zeros((1, 3), np.uint8), visualize.label_colours(self.labels[1:])])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps and the picture, ready for JSON."""
        return {
            "source": self.source,
            "size": {"width": self.image.width, "height": self.image.height},
            "has_background": self.has_background,
            "labels": [
                {"index": i, "name": s.name, "probability": s.probability, "pixel_share": s.pixel_share}
                for i, s in enumerate(self.scores)
            ],
            "groups": [self.labels[i] for i in self.group_labels],
        }

    def save(self, path: str | Path, *, groups: bool = False) -> dict[str, Path]:
        """Write the overlay, the label map and a JSON record, all or none; returns the paths by kind. Files there are replaced.

        `path`: a folder (made if missing), where the files are called after `source` or "image": `NAME_overlay.png`,
        `NAME_labels.png`, `NAME_segmentation.json`; or the file for the overlay (`.png`, `.jpg` or `.webp`), beside which
        the other two are called after its stem. `groups` adds `NAME_groups.png`.
        The label map is a palette PNG whose pixel values are the indices (16-bit grey beyond 256 labels).
        InputError if they cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"} and not path.is_dir():
            folder, name, overlay = path.parent, path.stem, path
        else:
            folder, name = path, Path(self.source).stem if self.source else "image"
            name = fit_name(name, RESULT_ENDS, folder)
            overlay = folder / f"{name}_overlay.png"
        return self.save_as(folder, name, overlay=overlay, groups=groups)

    def save_as(
        self, folder: str | Path, name: str, *, overlay: str | Path | None = None, groups: bool = False
    ) -> dict[str, Path]:
        """`save` into a folder under a name of the caller's choice."""
        folder = Path(folder)
        paths = {
            "overlay": Path(overlay) if overlay else folder / f"{name}_overlay.png",
            "labels": folder / f"{name}_labels.png",
            "record": folder / f"{name}_segmentation.json",
        }
        record = unicode_json(self.to_dict(), indent=2) + "\n"
        writers: dict[str, Callable[[Path], None]] = {
            "overlay": visualize.image_writer(self.overlay, paths["overlay"].name),
            "labels": visualize.image_writer(
                lambda: visualize.index_image(self.label_map, self.colours()), paths["labels"].name
            ),
            "record": lambda path: write_text(path, record),
        }
        if groups:
            paths["groups"] = folder / f"{name}_groups.png"
            writers["groups"] = visualize.image_writer(self.group_overlay, paths["groups"].name)
        try:
            for parent in dict.fromkeys(path.parent for path in paths.values()):
                kinds = [kind for kind, path in paths.items() if path.parent == parent]
                write_files(parent, {paths[kind].name: writers[kind] for kind in kinds})
        except CheckpointError as error:
            raise InputError(str(error)) from error
        return paths


def segmentation(
    image: Image.Image,
    pixels: PixelLabels,
    label_names: Sequence[str],
    probabilities: Sequence[float],
    *,
    is_background: Sequence[bool],
    threshold: float | None,
    source: str | None = None,
) -> Segmentation:
    """Put the record together: `probabilities` `[L]` of all labels asked for, `pixels` from `label_pixels`."""
    _, has_background = label_values(is_background, threshold)
    names = [name for name, hidden in zip(label_names, is_background, strict=True) if not hidden]
    likely: list[float | None] = [p for p, hidden in zip(probabilities, is_background, strict=True) if not hidden]
    if has_background:
        hidden_likely = [p for p, hidden in zip(probabilities, is_background, strict=True) if hidden]
        names.insert(0, BACKGROUND)
        likely.insert(0, sum(hidden_likely) if hidden_likely else None)
    share = np.bincount(pixels.label_map.ravel(), minlength=len(names)) / pixels.label_map.size
    return Segmentation(
        image=image,
        label_map=pixels.label_map,
        labels=tuple(names),
        scores=tuple(LabelScore(n, p, s) for n, p, s in zip(names, likely, share.tolist(), strict=True)),
        group_map=pixels.group_map,
        group_labels=tuple(pixels.group_values.tolist()),
        has_background=has_background,
        source=source,
    )
