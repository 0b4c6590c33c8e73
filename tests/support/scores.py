"""Similarities of groups and images to labels, and the grouping map, in NumPy: what the backends' functions are
compared with.

`groupvit_common.segmentation.scores` says what each step means.
"""

from collections.abc import Sequence

import numpy as np

from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE, Floats, similarity


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


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
    """Affinity of groups to labels (point 1): `[B, G, E]`, `[L, E]` or `[L, K, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all. A higher `temperature` makes labels
    more alike.
    """
    scaled = min(logit_scale, MAX_LOGIT_SCALE) / temperature * similarity(group_embeds, label_embeds)
    among_all = softmax(scaled)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    image_scores = similarity(image_embeds, label_embeds)
    best = np.argsort(-image_scores, axis=-1, kind="stable")[:, :top_k]
    kept = np.zeros(image_scores.shape, dtype=bool)
    np.put_along_axis(kept, best, True, axis=-1)
    return among_all * softmax(np.where(kept[:, None], scaled, -np.inf))
