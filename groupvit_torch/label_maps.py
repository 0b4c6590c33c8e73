"""Tensor work of segmentation, on the device: the grouping map, and group similarities -> label map.

`groupvit_common.segmentation.postprocess` says what each step means and holds the same functions for NumPy arrays.

Shapes: B images, P = h*w patches, G groups, L labels, E embedding (legend in docs/architecture.md).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from groupvit_common.segmentation.options import DILATIONS, Assignment
from groupvit_common.segmentation.postprocess import (
    MAX_LOGIT_SCALE,
    Indices,
    Integers,
    Look,
    PixelLabels,
    Taps,
    Windows,
    index_dtype,
    label_values,
    linear_taps,
    strips,
)
from groupvit_common.segmentation.refinement import (
    LABELS_AT_ONCE,
    SMALLEST,
    TIMES,
    WIDTH,
    refinement_reach,
    refinement_strips,
)


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = assignment @ product
    return product.unflatten(-1, grid)


def similarity(embeds: Tensor, label_embeds: Tensor) -> Tensor:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words `[L, K, E]`: `[..., L]`."""
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

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all. A higher `temperature` makes labels more alike.
    """
    scaled = logit_scale.clamp(max=MAX_LOGIT_SCALE) / temperature * similarity(group_embeds, label_embeds)
    among_all = scaled.softmax(-1)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    of_images = similarity(image_embeds, label_embeds)
    best = of_images.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    left_out = torch.ones_like(of_images, dtype=torch.bool).scatter(-1, best, False)
    return among_all * scaled.masked_fill(left_out[:, None], -torch.inf).softmax(-1)


def interpolated_strips(maps: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """`[C, h, w]` resized to `size` = (H, W), as strips of whole rows: (rows, `[C, rows, W]`)."""
    left, right, across = _taps(maps.shape[2], size[1], maps)
    wide = torch.lerp(maps.index_select(2, left), maps.index_select(2, right), across)
    above, below, down = _taps(maps.shape[1], size[0], maps)
    for rows in strips(len(maps), size):
        yield rows, torch.lerp(wide.index_select(1, above[rows]), wide.index_select(1, below[rows]), down[rows, None])


def label_pixels(
    affinity: Tensor,
    grouping: Tensor,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
) -> PixelLabels:
    """One image: affinity `[G, L]`, grouping map `[G, h, w]` -> NumPy maps at `size` = (H, W)."""
    groups, labels = affinity.shape
    values_of, _ = label_values([False] * labels if is_background is None else is_background, threshold)
    values = torch.from_numpy(values_of).to(affinity.device)
    limit = None if threshold is None else min(threshold, float(affinity.max()))

    group_values = _group_values(affinity, values, threshold)
    group_map = np.empty(size, dtype=index_dtype(groups))
    for rows, strip in interpolated_strips(grouping, size):
        # Several times faster than argmax over the first axis on a CPU.
        group_map[rows] = strip.max(0).indices.cpu().numpy()

    dtype = index_dtype(labels + 1)
    of_groups = np.asarray(group_values.cpu().numpy(), dtype=np.int64)
    if assignment == "hard":
        table: Indices = of_groups.astype(dtype)
        return PixelLabels(table[group_map], group_map, of_groups)
    label_map: Indices = np.empty(size, dtype=dtype)
    for rows, strip in interpolated_strips(torch.einsum("gl,ghw->lhw", affinity, grouping), size):
        score, best = strip.max(0)
        strip_values = values[best]
        if limit is not None:
            strip_values = strip_values.masked_fill(score < limit, 0)
        label_map[rows] = strip_values.cpu().numpy()
    return PixelLabels(label_map, group_map, of_groups)


def window_scores(
    affinity: Tensor,
    grouping: Tensor,
    windows: Windows,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Scores of one picture that was seen in windows, resized to `size` = (H, W), in strips of rows.

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
        total = affinity.new_zeros(channels, len(needed), windows.picture[1])
        for window_rows, (window, columns) in zip(of_windows, windows, strict=True):
            inside = slice(*np.searchsorted(needed, (window.start, window.stop)).tolist())
            if inside.start < inside.stop:
                total[:, inside, columns] += window_rows(needed[inside] - window.start)
        total /= torch.from_numpy(np.outer(count_down[needed], count_across)).to(affinity)
        yield rows, _interpolated(_interpolated(total, 2, across), 1, down)


def pixel_scores(
    affinity: Tensor,
    grouping: Tensor,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
) -> Tensor:
    """`window_scores` of a picture seen as a whole: `[G, L]`, `[G, h, w]` -> `[C, H, W]` at `size` = (H, W)."""
    parts = window_scores(
        affinity[None], grouping[None], Windows.whole(size), size, assignment=assignment, threshold=threshold
    )
    return torch.cat([scores for _, scores in parts], dim=1)


def label_windows(
    affinity: Tensor,
    grouping: Tensor,
    windows: Windows,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
) -> PixelLabels:
    """One picture seen in windows: affinity `[N, G, L]`, grouping maps `[N, G, h, w]` -> NumPy maps at `size` = (H, W).

    Groups are numbered window by window; a pixel's is that of the window to whose centre it is nearest.
    """
    labels = affinity.shape[2]
    values_of, _ = label_values([False] * labels if is_background is None else is_background, threshold)
    values = torch.from_numpy(values_of).to(affinity.device)
    group_values = torch.cat([_group_values(a, values, threshold) for a in affinity])

    # Labels that no group may have need no pixels; the first stays for where all scores are zero.
    used = (affinity != 0).flatten(0, 1).any(0)
    used[0] = True
    channel_values = values[used] if threshold is None else F.pad(values[used], (1, 0))
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    parts = window_scores(affinity[..., used], grouping, windows, size, assignment=assignment, threshold=threshold)
    for rows, scores in parts:
        label_map[rows] = channel_values[scores.max(0).indices].cpu().numpy()

    return PixelLabels(label_map, _group_windows(grouping, windows, size), group_values.cpu().numpy())


def _group_windows(grouping: Tensor, windows: Windows, size: tuple[int, int]) -> Indices:
    count, groups, *grid = grouping.shape
    group_map: Indices = np.empty(size, dtype=index_dtype(count * groups))
    for index, rows, columns, down, across in windows.tiles(groups, (grid[0], grid[1]), size):
        tile = _interpolated(_interpolated(grouping[index], 2, across), 1, down)
        group_map[rows, columns] = tile.max(0).indices.cpu().numpy() + index * groups
    return group_map


def mean_scores(
    looks: Sequence[Look], size: tuple[int, int], *, assignment: Assignment = "hard", threshold: float | None = None
) -> Tensor:
    """Scores of one picture, the mean over looks of tensors: `[C, H, W]` at `size` = (H, W)."""
    affinity: Tensor = looks[0].affinity
    total = affinity.new_zeros(affinity.shape[2] + (threshold is not None), *size)
    for look in looks:
        parts = window_scores(
            look.affinity, look.grouping, look.windows, size, assignment=assignment, threshold=threshold
        )
        for rows, scores in parts:
            total[:, rows] += scores.flip(2) if look.mirrored else scores
    return total.div_(len(looks))


def label_looks(
    looks: Sequence[Look],
    pixels: Tensor,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
    foreground: float | None = None,
    times: int = 0,
    dilations: Sequence[int] = DILATIONS,
) -> PixelLabels:
    """One picture, `pixels` `[3, h, w]` as the first look saw it -> NumPy maps at `size` = (H, W).

    Groups are those of the first look, numbered window by window. `times`: of refinement, 0 for none.
    """
    first, (_, _, labels) = looks[0], looks[0].affinity.shape
    is_background = [False] * labels if is_background is None else is_background
    hidden = torch.tensor(is_background, device=pixels.device)
    values_of, _ = label_values(is_background, threshold)
    values = torch.from_numpy(values_of).to(pixels.device)
    used = torch.stack([(look.affinity != 0).flatten(0, 1).any(0) for look in looks]).any(0)
    used[0] = True
    if foreground is not None:
        used |= ~hidden
    some = [Look(look.affinity[..., used], look.grouping, look.windows, look.mirrored) for look in looks]
    scores = mean_scores(some, (pixels.shape[1], pixels.shape[2]), assignment=assignment, threshold=threshold)
    if times:
        scores = refine(scores, pixels, times, dilations)

    channel_values = values[used] if threshold is None else F.pad(values[used], (1, 0))
    wanted = of_groups = None
    if foreground is not None:
        of_groups = (~hidden, foreground)
        wanted = (~hidden[used] if threshold is None else F.pad(~hidden[used], (1, 0)), foreground)
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    for rows, strip in interpolated_strips(scores, size):
        label_map[rows] = _chosen(strip, channel_values, wanted).cpu().numpy()
    group_values = torch.cat([_group_values(a, values, threshold, of_groups) for a in first.affinity])
    return PixelLabels(label_map, _group_windows(first.grouping, first.windows, size), group_values.cpu().numpy())


def refine(scores: Tensor, picture: Tensor, times: int = TIMES, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Scores `[L, h, w]` of the labels, refined by the picture `[C, h, w]` (`groupvit_common.segmentation.refinement`), in the scores' dtype."""
    kernel, result = pixel_affinity(picture.to(scores.dtype), dilations), torch.empty_like(scores)
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


def pixel_affinity(picture: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """How alike each pixel of a picture `[C, h, w]` and its neighbours are: `[K, h, w]`, for each pixel a sum of 1."""
    neighbours, count = _neighbours(picture, dilations), 9 * len(dilations)
    mean = len(dilations) * picture
    for neighbour in neighbours:
        mean += neighbour
    mean /= count
    square = len(dilations) * (picture - mean).square()
    for neighbour in neighbours:
        square += (neighbour - mean).square()
    scale = SMALLEST + WIDTH * (square / (count - 1)).sqrt()
    return torch.stack([((picture - neighbour).abs() / -scale).mean(0) for neighbour in neighbours]).softmax(0)


def _padded(maps: Tensor, reach: int) -> Tensor:
    return F.pad(maps[None], (reach, reach, reach, reach), mode="replicate")[0]


def _neighbours(picture: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    height, width = picture.shape[1:]
    reach, neighbours = refinement_reach(dilations, (height, width))
    padded = _padded(picture, reach)
    return [padded[:, reach + y : reach + y + height, reach + x : reach + x + width] for y, x in neighbours]


def _window_rows(
    affinity: Tensor, grouping: Tensor, size: tuple[int, int], assignment: Assignment, threshold: float | None
) -> Callable[[Integers], Tensor]:
    """Scores of one window of `size`: a function from r row numbers to `[C, r, W]`."""
    height, width = size
    limit = None if threshold is None else min(threshold, float(affinity.max()))
    maps = grouping if assignment == "hard" else torch.einsum("gl,ghw->lhw", affinity, grouping)
    wide = _interpolated(maps, 2, linear_taps(maps.shape[2], width))
    above, below, down = linear_taps(maps.shape[1], height)

    def with_background(scores: Tensor) -> Tensor:
        if limit is None:
            return scores
        return torch.cat([(scores.max(0).values < limit).to(scores)[None], scores])

    table = with_background(affinity.T)

    def rows(numbers: Integers) -> Tensor:
        interpolated = _interpolated(wide, 1, (above[numbers], below[numbers], down[numbers]))
        return table[:, interpolated.max(0).indices] if assignment == "hard" else with_background(interpolated)

    return rows


Foreground = tuple[Tensor, float]  # which channels `[C]`, and the share of the scores that they need


def _chosen(scores: Tensor, values: Tensor, foreground: Foreground | None = None) -> Tensor:
    """The label map's value for each of many places, of scores `[C, ...]` and the channels' values `[C]`."""
    if foreground is None:
        return values[scores.max(0).indices]
    channels, share = foreground
    wanted = scores[channels]
    enough = wanted.sum(0) >= share * scores.sum(0)
    return values[channels][wanted.max(0).indices].masked_fill(~enough, 0)


def _group_values(
    affinity: Tensor, values: Tensor, threshold: float | None, foreground: Foreground | None = None
) -> Tensor:
    """The label map's value of each group `[G]`, from its affinity `[G, L]` and the values of the labels `[L]`."""
    of_groups = _chosen(affinity.T, values, foreground)
    if threshold is None:
        return of_groups
    return of_groups.masked_fill(affinity.max(-1).values < min(threshold, float(affinity.max())), 0)


def _interpolated(maps: Tensor, axis: int, taps: Taps) -> Tensor:
    first, second, t = _on_device(taps, maps)
    shape = (-1, *(1 for _ in range(maps.ndim - 1 - axis)))
    return torch.lerp(maps.index_select(axis, first), maps.index_select(axis, second), t.view(shape))


def _on_device(taps: Taps, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, t = (torch.from_numpy(np.asarray(part)) for part in taps)
    return first.to(like.device), second.to(like.device), t.to(like.dtype).to(like.device)


def _taps(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _on_device(linear_taps(n_in, n_out), like)
