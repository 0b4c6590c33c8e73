"""Tensor work of segmentation, on the device: the grouping map, and group similarities -> label map.

`groupvit_common.segmentation.scores` and `label_maps` say what each step means; `label_maps` holds the same functions
for NumPy arrays.

Shapes: B images, P = h*w patches, G groups, L labels, E embedding (legend in docs/architecture.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from groupvit_common.segmentation import label_maps
from groupvit_common.segmentation.label_maps import (
    Indices,
    PixelLabels,
    View,
    channel_count,
    groups_are_fewer,
    index_dtype,
    label_values,
)
from groupvit_common.segmentation.options import DILATIONS, SegmentationOptions
from groupvit_common.segmentation.refinement import (
    LABELS_AT_ONCE,
    SMALLEST,
    TIMES,
    WIDTH,
    refinement_reach,
    refinement_strips,
)
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE, Floats
from groupvit_common.segmentation.windows import Integers, Taps, Windows, linear_taps, strips


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = assignment @ product
    return product.unflatten(-1, grid)


def similarity(embeds: Tensor, label_embeds: Tensor) -> Tensor:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words
    `[L, K, E]`: `[..., L]`."""
    if label_embeds.ndim == 2:
        return F.normalize(embeds, dim=-1) @ F.normalize(label_embeds, dim=-1).T
    return similarity(embeds, label_embeds.flatten(0, 1)).unflatten(-1, label_embeds.shape[:2]).amax(-1)


def image_probabilities(image_embeds: Tensor, label_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """`[B, E]`, `[L, E]` or `[L, K, E]` -> `[B, L]`: softmax over labels of the scaled cosine similarity."""
    return (logit_scale.clamp(max=MAX_LOGIT_SCALE) * similarity(image_embeds, label_embeds)).softmax(-1)


def label_affinity(
    group_embeds: Tensor,
    label_embeds: Tensor,
    logit_scale: Tensor,
    image_embeds: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Affinity of groups to labels: `[B, G, E]`, `[L, E]` or `[L, K, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all. A higher `temperature` makes labels
    more alike.
    """
    scaled = logit_scale.clamp(max=MAX_LOGIT_SCALE) / temperature * similarity(group_embeds, label_embeds)
    among_all = scaled.softmax(-1)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    image_scores = similarity(image_embeds, label_embeds)
    best = image_scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    left_out = torch.ones_like(image_scores, dtype=torch.bool).scatter(-1, best, False)
    return among_all * scaled.masked_fill(left_out[:, None], -torch.inf).softmax(-1)


def interpolated_strips(maps: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """`[C, h, w]` resized to `size` = (H, W), as strips of whole rows: (rows, `[C, rows, W]`)."""
    left, right, across = _taps(maps.shape[2], size[1], maps)
    wide = torch.lerp(maps.index_select(2, left), maps.index_select(2, right), across)
    above, below, down = _taps(maps.shape[1], size[0], maps)
    for rows in strips(len(maps), size):
        yield rows, torch.lerp(wide.index_select(1, above[rows]), wide.index_select(1, below[rows]), down[rows, None])


def pixel_labels(
    views: Sequence[View],
    pixels: Floats,
    size: tuple[int, int],
    options: SegmentationOptions,
    is_background: Sequence[bool],
) -> PixelLabels:
    """Views of one image, `pixels` `[3, h, w]` as in the first, -> NumPy maps at `size` = (H, W).

    Groups are those of the first view, numbered window by window.
    """
    first, side = views[0], (pixels.shape[1], pixels.shape[2])
    several = len(views) > 1 or options.needs_scores
    if _suits_numpy(first, options):
        arrays = [replace(view, affinity=view.affinity.numpy(), grouping=view.grouping.numpy()) for view in views]
        return label_maps.pixel_labels(arrays, pixels, size, options, is_background)
    hidden = torch.tensor(is_background, device=first.affinity.device)
    values = torch.from_numpy(label_values(is_background, options.background)[0]).to(hidden.device)
    if first.windows is None and not several:
        return _whole_labels(first.affinity[0], first.grouping[0], size, options, values)

    # Labels that no group may have need no pixels; the first stays for where all scores are zero.
    used = torch.stack([(view.affinity != 0).flatten(0, 1).any(0) for view in views]).any(0)
    used[0] = True
    foreground = None if options.foreground is None else (~hidden, options.foreground)
    if foreground is not None:
        used |= ~hidden
    channel_values, shown = values[used], ~hidden[used]
    if options.background is not None:
        channel_values, shown = F.pad(channel_values, (1, 0)), F.pad(shown, (1, 0))
    some = [replace(view, affinity=view.affinity[..., used]) for view in views]
    table: Tensor | None = None
    if groups_are_fewer(some, options):
        # Scores of labels are sums of what the groups have of them: only groups are resized and refined.
        table = torch.cat([_group_scores(a, options).T for view in some for a in view.affinity])
        some = [replace(view, affinity=None) for view in some]
    if several:
        scores = mean_scores(some, side, options)
        if options.refine:
            # The dtype and device of the scores.
            scores = refine(scores, torch.from_numpy(pixels).to(scores), options.refine, options.refine_dilations)
        parts = interpolated_strips(scores, size)
    else:
        parts = view_scores(some[0], size, options)
    label_map: Indices = np.empty(size, dtype=index_dtype(len(hidden) + 1))
    for rows, strip in parts:
        among = None if foreground is None else (shown, foreground[1])
        if table is None:
            chosen = _chosen(strip, channel_values, among)
        else:
            chosen = _chosen_of_groups(strip, table, channel_values, among)
        label_map[rows] = chosen.cpu().numpy()

    group_values = torch.cat([_group_values(a, values, options.background, foreground) for a in first.affinity])
    group_map = _group_windows(first.grouping, first.windows or Windows.whole(side), size)
    return PixelLabels(label_map, group_map, group_values.cpu().numpy())


def _suits_numpy(view: View, options: SegmentationOptions) -> bool:
    """Returns whether NumPy makes the maps: on a CPU it takes at most PyTorch's time, for whole images half of it, but
    more to refine scores."""
    return view.affinity.device.type == "cpu" and not options.refine


def _whole_labels(
    affinity: Tensor, grouping: Tensor, size: tuple[int, int], options: SegmentationOptions, values: Tensor
) -> PixelLabels:
    """One view of the image as a whole, straight to `size` = (H, W): affinity `[G, L]`, grouping map `[G, h, w]`,
    values `[L]`."""
    threshold, (groups, labels) = options.background, affinity.shape
    group_values = _group_values(affinity, values, threshold).cpu().numpy()
    group_map = np.empty(size, dtype=index_dtype(groups))
    for rows, strip in interpolated_strips(grouping, size):
        # Several times faster than argmax over the first axis on a CPU.
        group_map[rows] = strip.max(0).indices.cpu().numpy()
    if options.assignment != "soft":
        table: Indices = group_values.astype(index_dtype(labels + 1))
        return PixelLabels(table[group_map], group_map, group_values)
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    limit = None if threshold is None else min(threshold, float(affinity.max()))
    for rows, strip in interpolated_strips(torch.einsum("gl,ghw->lhw", affinity, grouping), size):
        score, best = strip.max(0)
        strip_values = values[best]
        if limit is not None:
            strip_values = strip_values.masked_fill(score < limit, 0)
        label_map[rows] = strip_values.cpu().numpy()
    return PixelLabels(label_map, group_map, group_values)


def view_scores(view: View, size: tuple[int, int], options: SegmentationOptions) -> Iterator[tuple[slice, Tensor]]:
    """Scores of one view, not mirrored back, resized to `size` = (H, W), in strips: (rows, `[C, rows, W]`), each in
    0..1.

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
        total = grouping.new_zeros(channels, len(needed), windows.image[1])
        for scores_at, part, (window, columns) in zip(window_rows, own, windows, strict=True):
            inside = slice(*np.searchsorted(needed, (window.start, window.stop)).tolist())
            if inside.start < inside.stop:
                total[part, inside, columns] += scores_at(needed[inside] - window.start)
        total /= torch.from_numpy(np.outer(count_down[needed], count_across)).to(grouping)
        yield rows, _interpolated(_interpolated(total, 2, across), 1, down)


def _window_rows(
    affinity: Tensor | None, grouping: Tensor, size: tuple[int, int], options: SegmentationOptions
) -> Callable[[Integers], Tensor]:
    """Scores of one window of `size`: a function from r row numbers to `[C, r, W]`."""
    height, width = size
    is_soft = options.assignment == "soft"
    maps = torch.einsum("gl,ghw->lhw", affinity, grouping) if is_soft and affinity is not None else grouping
    wide = _interpolated(maps, 2, linear_taps(maps.shape[2], width))
    above, below, down = linear_taps(maps.shape[1], height)
    table = torch.eye(len(grouping)).to(grouping) if affinity is None else _group_scores(affinity, options)

    def rows(numbers: Integers) -> Tensor:
        resized = _interpolated(wide, 1, (above[numbers], below[numbers], down[numbers]))
        if not is_soft:
            return table[:, resized.max(0).indices]
        return resized if affinity is None else _with_background(resized, affinity, options)

    return rows


def _group_scores(affinity: Tensor, options: SegmentationOptions) -> Tensor:
    """The scores `[C, G]` of one window's groups, of their affinity `[G, L]`."""
    return _with_background(affinity.T, affinity, options)


def _with_background(scores: Tensor, affinity: Tensor, options: SegmentationOptions) -> Tensor:
    """Scores `[L, ...]` of places in a window of this affinity, after that of a background by threshold, if any."""
    if options.background is None:
        return scores
    hidden = scores.max(0).values < min(options.background, float(affinity.max()))
    return torch.cat([hidden.to(scores)[None], scores])


def mean_scores(views: Sequence[View], size: tuple[int, int], options: SegmentationOptions) -> Tensor:
    """Scores of one image, the mean over views: `[C, H, W]` at `size` = (H, W); without affinities those of the groups,
    view by view."""
    counts, start = [channel_count(view, options) for view in views], 0
    by_group = views[0].affinity is None
    total: Tensor = views[0].grouping.new_zeros(sum(counts) if by_group else counts[0], *size)
    for view, count in zip(views, counts, strict=True):
        own = total[start : start + count]
        for rows, scores in view_scores(view, size, options):
            own[:, rows] += scores.flip(2) if view.mirrored else scores
        start += count if by_group else 0
    return total.div_(len(views))


Foreground = tuple[Tensor, float]
"""The channels `[C]` that are not background, and the fraction of the scores that they need."""


def _chosen(scores: Tensor, values: Tensor, foreground: Foreground | None = None) -> Tensor:
    """The label map's value for each of many places, of scores `[C, ...]` and the channels' values `[C]`."""
    if foreground is None:
        return values[scores.max(0).indices]
    channels, fraction = foreground
    wanted = scores[channels]
    enough = wanted.sum(0) >= fraction * scores.sum(0)
    return values[channels][wanted.max(0).indices].masked_fill(~enough, 0)


def _chosen_of_groups(scores: Tensor, table: Tensor, values: Tensor, foreground: Foreground | None = None) -> Tensor:
    """The same from scores of groups `[K, ...]` and the groups' scores of the channels `[K, C]`."""
    places = scores.flatten(1)
    chosen = [
        _chosen(table.T @ places[:, part], values, foreground) for part in strips(table.shape[1], (places.shape[1], 1))
    ]
    return torch.cat(chosen).view(scores.shape[1:])


def _group_values(
    affinity: Tensor, values: Tensor, threshold: float | None, foreground: Foreground | None = None
) -> Tensor:
    """The label map's value of each group `[G]`, from its affinity `[G, L]` and the values of the labels `[L]`."""
    group_values = _chosen(affinity.T, values, foreground)
    if threshold is None:
        return group_values
    return group_values.masked_fill(affinity.max(-1).values < min(threshold, float(affinity.max())), 0)


def _group_windows(grouping: Tensor, windows: Windows, size: tuple[int, int]) -> Indices:
    count, groups, *grid = grouping.shape
    group_map: Indices = np.empty(size, dtype=index_dtype(count * groups))
    for index, rows, columns, down, across in windows.tiles(groups, (grid[0], grid[1]), size):
        tile = _interpolated(_interpolated(grouping[index], 2, across), 1, down)
        group_map[rows, columns] = tile.max(0).indices.cpu().numpy() + index * groups
    return group_map


def _interpolated(maps: Tensor, axis: int, taps: Taps) -> Tensor:
    first, second, t = _on_device(taps, maps)
    shape = (-1, *(1 for _ in range(maps.ndim - 1 - axis)))
    return torch.lerp(maps.index_select(axis, first), maps.index_select(axis, second), t.view(shape))


def _on_device(taps: Taps, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, t = (torch.from_numpy(np.asarray(part)) for part in taps)
    return first.to(like.device), second.to(like.device), t.to(like.dtype).to(like.device)


def _taps(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _on_device(linear_taps(n_in, n_out), like)


def refine(scores: Tensor, image: Tensor, times: int = TIMES, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Scores `[L, h, w]` of the labels, refined by the image `[C, h, w]` (`groupvit_common.segmentation.refinement`),
    in the scores' dtype."""
    kernel, result = pixel_affinity(image.to(scores.dtype), dilations), torch.empty_like(scores)
    for start in range(0, len(scores), LABELS_AT_ONCE):
        some = slice(start, start + LABELS_AT_ONCE)
        result[some] = _refined(scores[some], kernel, times, dilations)
    return result


def _refined(scores: Tensor, kernel: Tensor, times: int, dilations: Sequence[int]) -> Tensor:
    height, width = scores.shape[1:]
    reach, neighbours = refinement_reach(dilations, (height, width))
    whole = scores.device.type != "cpu"
    for _ in range(times):
        padded, refined = _padded(scores, reach), torch.zeros_like(scores)
        for top, bottom in [(0, height)] if whole else refinement_strips(len(scores), (height, width)):
            for k, (y, x) in zip(kernel[:, top:bottom], neighbours, strict=True):
                neighbour = padded[:, reach + y + top : reach + y + bottom, reach + x : reach + x + width]
                refined[:, top:bottom].addcmul_(k, neighbour)
        scores = refined
    return scores


def pixel_affinity(image: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Weights of the neighbours of each pixel of an image `[C, h, w]`: `[K, h, w]`, for each pixel a sum of 1."""
    neighbours, count = _neighbours(image, dilations), 9 * len(dilations)
    mean = len(dilations) * image
    for neighbour in neighbours:
        mean += neighbour
    mean /= count
    square = len(dilations) * (image - mean).square()
    for neighbour in neighbours:
        square += (neighbour - mean).square()
    scale = SMALLEST + WIDTH * (square / (count - 1)).sqrt()
    return torch.stack([((image - neighbour).abs() / -scale).mean(0) for neighbour in neighbours]).softmax(0)


def _padded(maps: Tensor, reach: int) -> Tensor:
    return F.pad(maps[None], (reach, reach, reach, reach), mode="replicate")[0]


def _neighbours(image: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    height, width = image.shape[1:]
    reach, neighbours = refinement_reach(dilations, (height, width))
    padded = _padded(image, reach)
    return [padded[:, reach + y : reach + y + height, reach + x : reach + x + width] for y, x in neighbours]
