"""Tensor work of segmentation, on the device: the grouping map, and group similarities -> label map.

`groupvit_common.postprocess` says what each step means and holds the same functions for NumPy arrays.

Shapes: B images, P = h*w patches, G groups, L labels, E embedding (legend in docs/architecture.md).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from groupvit_common.postprocess import (
    MAX_LOGIT_SCALE,
    Assignment,
    Indices,
    PixelLabels,
    index_dtype,
    label_values,
    linear_taps,
    strips,
)


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = assignment @ product
    return product.unflatten(-1, grid)


def image_probabilities(image_embeds: Tensor, label_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """`[B, E]`, `[L, E]` -> `[B, L]`: softmax over labels of the scaled cosine similarity."""
    similarity = F.normalize(image_embeds, dim=-1) @ F.normalize(label_embeds, dim=-1).T
    return (logit_scale.clamp(max=MAX_LOGIT_SCALE) * similarity).softmax(-1)


def label_affinity(
    group_embeds: Tensor,
    label_embeds: Tensor,
    logit_scale: Tensor,
    image_embeds: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Affinity of groups to labels: `[B, G, E]`, `[L, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all.
    """
    labels = F.normalize(label_embeds, dim=-1)
    scaled = logit_scale.clamp(max=MAX_LOGIT_SCALE) * (F.normalize(group_embeds, dim=-1) @ labels.T)
    among_all = scaled.softmax(-1)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    similarity = F.normalize(image_embeds, dim=-1) @ labels.T
    best = similarity.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    left_out = torch.ones_like(similarity, dtype=torch.bool).scatter(-1, best, False)
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

    score, best = affinity.max(-1)
    group_values = values[best]
    if limit is not None:
        group_values = group_values.masked_fill(score < limit, 0)
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


def _taps(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, fraction = linear_taps(n_in, n_out)
    return (
        torch.from_numpy(first).to(like.device),
        torch.from_numpy(second).to(like.device),
        torch.from_numpy(fraction).to(like.dtype).to(like.device),
    )
