"""From scores to a label for every pixel, in NumPy.

The paper's inference, continued from `groupvit_common.segmentation.scores`:

3. *Assignment* "hard": the grouping map is interpolated to the image's pixels, a pixel goes to its largest group and
   takes that group's best label. "soft": a pixel's score of a label is the affinity averaged by its grouping weights.
   Both are linear before the maximum, so labels are combined at patch resolution and only then interpolated.
4. *Background*: pixels whose best score is below `min(threshold, the image's largest affinity)`, and pixels of labels
   that the user calls background.
5. *Windows*: instead of the whole image, the model may see overlapping windows of it, each an image of its own in
   points 1 to 4. A pixel's scores are then the mean over the windows that hold it, a background by threshold being one
   label more (score 1 where a window has background, else 0); they are resized to the original size before the largest
   is taken.
6. *Views* (test-time augmentation): the model may see an image several times, in several sizes and mirrored, each view
   as in points 1 to 5. The scores of a view are resized to the size of the first one (and mirrored back), and a pixel's
   are the mean over all views.
7. *Refinement*: those scores may be made to follow the image's edges (`groupvit_common.segmentation.refinement`), at
   the size of the first view.
8. *Foreground*: of the scores of 6 and 7, resized to the original size, the largest counts. With a `foreground`
   fraction a pixel gets the best label that is not background where such labels have at least this fraction of the sum
   of all scores, and is background elsewhere.

`groupvit_torch.label_maps` holds the same functions for tensors.
Letters: L labels, C = L or L + 1 scores, G groups, N windows, E embedding, h w rows and columns of patches, H W pixels
of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.refinement import refine
from groupvit_common.segmentation.scores import Floats, similarity
from groupvit_common.segmentation.windows import Integers, Windows, interpolated, interpolated_rows, linear_taps, strips

Indices = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class View:
    """An image as the model saw it once.

    `affinity`: `[N, G, L]` of its windows, `grouping`: their maps `[N, G, h, w]`, arrays or a backend's tensors. In the
    place of scores of labels, a view without an affinity has those of all its groups to be there, N * G of them.
    `windows`: None for the image as a whole, N = 1. `mirrored`: left is right.
    """

    affinity: Any
    grouping: Any
    windows: Windows | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class PixelLabels:
    """Maps of one image: `label_map` and `group_map` `[H, W]`, and the label map's value of each group `[G]`."""

    label_map: Indices
    group_map: Indices
    group_values: Integers


Smooth = Callable[..., Sequence[Floats]]
"""Scores of an image, as arrays of fixed shapes -> smoothed ones: `groupvit_common.segmentation.smoothing`."""


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


def pixel_labels(
    views: Sequence[View],
    pixels: Floats,
    size: tuple[int, int],
    options: SegmentationOptions,
    is_background: Sequence[bool],
    smooth: Smooth | None = None,
) -> PixelLabels:
    """Views of one image, `pixels` `[3, h, w]` as in the first, -> maps at `size` = (H, W).

    Groups are those of the first view, numbered window by window. `smooth` takes the place of the scores, averaged over
    views, and is for frames of a video: hard assignments are then made at the size of the first view.
    """
    first, side = views[0], (pixels.shape[1], pixels.shape[2])
    values, hidden = label_values(is_background, options.background)[0], np.asarray(is_background, dtype=bool)
    several = len(views) > 1 or options.needs_scores
    if first.windows is None and not several and (smooth is None or options.assignment == "soft"):
        return _whole_labels(first.affinity[0], first.grouping[0], size, options, values, smooth)

    # Labels that no group may have need no pixels; the first stays for where all scores are zero. Another frame's may.
    used = np.any([view.affinity.any(axis=(0, 1)) for view in views], axis=0) | (smooth is not None)
    used[0] = True
    foreground = None if options.foreground is None else (~hidden, options.foreground)
    if foreground is not None:
        used |= ~hidden
    channel_values, shown = values[used], ~hidden[used]
    if options.background is not None:
        channel_values, shown = np.insert(channel_values, 0, 0), np.insert(shown, 0, False)
    some = [replace(view, affinity=view.affinity[..., used]) for view in views]
    table: Floats | None = None
    if smooth is None and groups_are_fewer(some, options):
        # Scores of labels are sums of what the groups have of them: only groups are resized and refined.
        table = np.concatenate([_group_scores(a, options).T for view in some for a in view.affinity])
        some = [replace(view, affinity=None) for view in some]
    parts: Iterable[tuple[Any, Floats]]
    if several or smooth is not None:
        scores = mean_scores(some, side, options)
        if smooth is not None:
            (scores,) = smooth(scores)
        if options.refine:
            scores = refine(scores, pixels, options.refine, options.refine_dilations)
        parts = enumerate(interpolated_rows(scores, size))
    else:
        parts = view_scores(some[0], size, options)
    label_map: Indices = np.empty(size, dtype=index_dtype(len(hidden) + 1))
    for rows, strip in parts:
        among = None if foreground is None else (shown, foreground[1])
        label_map[rows] = (
            _chosen(strip, channel_values, among)
            if table is None
            else _chosen_of_groups(strip, table, channel_values, among)
        )

    group_values = np.concatenate([_group_values(a, values, options.background, foreground) for a in first.affinity])
    return PixelLabels(
        label_map, group_windows(first.grouping, first.windows or Windows.whole(side), size), group_values
    )


def groups_are_fewer(views: Sequence[View], options: SegmentationOptions) -> bool:
    """Returns whether scores of labels come from scores of groups, because all windows have fewer groups than there are
    labels.

    A background by threshold depends on the labels of each pixel, unless each pixel is one group's.
    """
    is_linear = options.assignment != "soft" or options.background is None
    labels = views[0].affinity.shape[2] + (options.background is not None)
    return is_linear and sum(view.grouping.shape[0] * view.grouping.shape[1] for view in views) < labels


def channel_count(view: View, options: SegmentationOptions) -> int:
    """Returns the number of scores of a view: of labels, and of a background by threshold, or of groups."""
    if view.affinity is None:
        return int(view.grouping.shape[0] * view.grouping.shape[1])
    return int(view.affinity.shape[2] + (options.background is not None))


def _whole_labels(
    affinity: Floats,
    grouping: Floats,
    size: tuple[int, int],
    options: SegmentationOptions,
    values: Integers,
    smooth: Smooth | None = None,
) -> PixelLabels:
    """One view of the image as a whole, straight to `size` = (H, W): affinity `[G, L]`, grouping map `[G, h, w]`,
    values `[L]`."""
    threshold, (groups, labels) = options.background, affinity.shape
    group_values = _group_values(affinity, values, threshold)
    group_map = np.empty(size, dtype=index_dtype(groups))
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    is_soft = options.assignment == "soft"
    for y, row in enumerate(interpolated_rows(grouping, size)):
        group_map[y] = largest = row.argmax(axis=0)
        if not is_soft:
            label_map[y] = group_values[largest]
    if is_soft:
        scores, largest = np.einsum("gl,ghw->lhw", affinity, grouping), affinity.max()
        if smooth is not None:
            # What is linear may be interpolated afterwards.
            scores, largest = smooth(scores, largest)
        for y, row in enumerate(interpolated_rows(scores, size)):
            row_values = values[row.argmax(axis=0)]
            if threshold is not None:
                row_values[row.max(axis=0) < min(threshold, largest)] = 0
            label_map[y] = row_values
    return PixelLabels(label_map, group_map, group_values)


def view_scores(view: View, size: tuple[int, int], options: SegmentationOptions) -> Iterator[tuple[slice, Floats]]:
    """Scores of one view (point 5), not mirrored back, resized to `size` = (H, W), in strips: (rows, `[C, rows, W]`),
    each in 0..1.

    With a threshold C is L + 1 and the background comes first. A whole image is assigned at `size`: its largest scores
    make the label map. C is N * G for a view without an affinity.
    """
    windows, grouping = view.windows or Windows.whole(size), view.grouping
    channels, (count, groups) = channel_count(view, options), grouping.shape[:2]
    affinity = [None] * count if view.affinity is None else view.affinity
    window_rows = [_window_rows(a, g, windows.size, options) for a, g in zip(affinity, grouping, strict=True)]
    own = [slice(None) if view.affinity is not None else slice(n * groups, (n + 1) * groups) for n in range(count)]
    count_down, count_across = windows.counts()
    across = linear_taps(windows.image[1], size[1])
    for rows, needed, down in windows.resized_strips(channels, size):
        total = np.zeros((channels, len(needed), windows.image[1]), grouping.dtype)
        for scores_at, part, (window, columns) in zip(window_rows, own, windows, strict=True):
            inside = slice(*np.searchsorted(needed, (window.start, window.stop)).tolist())
            if inside.start < inside.stop:
                total[part, inside, columns] += scores_at(needed[inside] - window.start)
        total /= np.outer(count_down[needed], count_across).astype(grouping.dtype)
        yield rows, interpolated(interpolated(total, 2, across), 1, down)


def _window_rows(
    affinity: Floats | None, grouping: Floats, size: tuple[int, int], options: SegmentationOptions
) -> Callable[[Integers], Floats]:
    """Scores of one window of `size`: a function from r row numbers to `[C, r, W]`."""
    height, width = size
    is_soft = options.assignment == "soft"
    maps = np.einsum("gl,ghw->lhw", affinity, grouping) if is_soft and affinity is not None else grouping
    wide = interpolated(maps, 2, linear_taps(maps.shape[2], width))
    above, below, down = linear_taps(maps.shape[1], height)
    table = np.eye(len(grouping), dtype=grouping.dtype) if affinity is None else _group_scores(affinity, options)

    def rows(numbers: Integers) -> Floats:
        resized = interpolated(wide, 1, (above[numbers], below[numbers], down[numbers]))
        if not is_soft:
            return table[:, resized.argmax(axis=0)]
        return resized if affinity is None else _with_background(resized, affinity, options)

    return rows


def _group_scores(affinity: Floats, options: SegmentationOptions) -> Floats:
    """The scores `[C, G]` of one window's groups, of their affinity `[G, L]`."""
    return _with_background(affinity.T, affinity, options)


def _with_background(scores: Floats, affinity: Floats, options: SegmentationOptions) -> Floats:
    """Scores `[L, ...]` of places in a window of this affinity, after that of a background by threshold, if any."""
    if options.background is None:
        return scores
    hidden = scores.max(axis=0) < min(options.background, affinity.max())
    return np.concatenate([hidden.astype(scores.dtype)[None], scores])


def mean_scores(views: Sequence[View], size: tuple[int, int], options: SegmentationOptions) -> Floats:
    """Scores of one image, the mean over views (point 6): `[C, H, W]` at `size` = (H, W); without affinities those of
    the groups, view by view."""
    counts, start = [channel_count(view, options) for view in views], 0
    by_group = views[0].affinity is None
    total = np.zeros((sum(counts) if by_group else counts[0], *size), views[0].grouping.dtype)
    for view, count in zip(views, counts, strict=True):
        own = total[start : start + count]
        for rows, scores in view_scores(view, size, options):
            own[:, rows] += scores[:, :, ::-1] if view.mirrored else scores
        start += count if by_group else 0
    total /= len(views)
    return total


Foreground = tuple[npt.NDArray[np.bool_], float]
"""The channels `[C]` that are not background, and the fraction of the scores that they need."""


def _chosen(scores: Floats, values: Integers, foreground: Foreground | None = None) -> Integers:
    """Scores `[C, ...]` and the channels' values `[C]` -> the label map's values `[...]` (point 8)."""
    if foreground is None:
        return values[scores.argmax(axis=0)]
    channels, fraction = foreground
    wanted = scores[channels]
    enough = wanted.sum(axis=0) >= fraction * scores.sum(axis=0)
    return np.where(enough, values[channels][wanted.argmax(axis=0)], 0)


def _chosen_of_groups(
    scores: Floats, table: Floats, values: Integers, foreground: Foreground | None = None
) -> Integers:
    """The same from scores of groups `[K, ...]` and the groups' scores of the channels `[K, C]`."""
    places = scores.reshape(len(scores), -1)
    chosen = np.empty(places.shape[1], values.dtype)
    for part in strips(table.shape[1], (places.shape[1], 1)):
        chosen[part] = _chosen(table.T @ places[:, part], values, foreground)
    return chosen.reshape(scores.shape[1:])


def _group_values(
    affinity: Floats, values: Integers, threshold: float | None, foreground: Foreground | None = None
) -> Integers:
    """The label map's value of each group `[G]`, from its affinity `[G, L]` and the values of the labels `[L]`."""
    group_values = _chosen(affinity.T, values, foreground)
    if threshold is not None:
        group_values[affinity.max(axis=1) < min(threshold, affinity.max())] = 0
    return group_values


def group_windows(grouping: Floats, windows: Windows, size: tuple[int, int]) -> Indices:
    """The largest group of each pixel of an image seen in windows: grouping maps `[N, G, h, w]` -> `[H, W]`, `size` =
    (H, W).

    Groups are numbered window by window; a pixel's is that of the window to whose centre it is nearest.
    """
    count, groups = grouping.shape[:2]
    group_map: Indices = np.empty(size, dtype=index_dtype(count * groups))
    for index, rows, columns, down, across in windows.tiles(groups, grouping.shape[2:], size):
        tile = interpolated(interpolated(grouping[index], 2, across), 1, down)
        group_map[rows, columns] = tile.argmax(axis=0) + index * groups
    return group_map


def label_similarity(
    group_embeds: Floats, grouping: Floats, label_embeds: Floats, windows: Windows, size: tuple[int, int]
) -> Floats:
    """Cosine similarity of each place of an image to each label, -1 to 1: that of the groups, weighted by their parts
    of a patch.

    Windows' group embeddings `[N, G, E]` and grouping maps `[N, G, h, w]`, labels `[L, E]` or `[L, K, E]` ->
    `[L, H, W]` at `size` = (H, W). A pixel's is the mean over the windows that hold it.
    """
    maps = np.einsum("ngl,nghw->nlhw", similarity(group_embeds, label_embeds), grouping)
    total = np.zeros((len(label_embeds), *windows.image), maps.dtype)
    across, down = (linear_taps(n, side) for n, side in zip(maps.shape[:1:-1], windows.size[::-1], strict=True))
    for window_map, (rows, columns) in zip(maps, windows, strict=True):
        total[:, rows, columns] += interpolated(interpolated(window_map, 2, across), 1, down)
    total /= np.outer(*windows.counts()).astype(maps.dtype)
    across, down = (linear_taps(n, side) for n, side in zip(windows.image[::-1], size[::-1], strict=True))
    return interpolated(interpolated(total, 2, across), 1, down)
