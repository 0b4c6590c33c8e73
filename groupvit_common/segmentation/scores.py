"""Scores: the similarities of groups and images to labels, and the grouping map, in NumPy.

The paper's inference (Xu et al. 2022, section 4.2, and the authors' evaluation):

1. *Affinity* of group g to label l: `softmax_l(s * cos(g, l))`, s the logit scale (at most 100). A label may have
   several embeddings `[K, E]`, of words that mean it; its cosine is then the largest of theirs, here and for the image
   as a whole. With `top_k`, only the labels most similar to the whole image stay. As in the authors' evaluation, the
   affinity is the product of two softmaxes, one over the labels that stay and one over all, so that a threshold from
   the paper (0.95 for VOC and COCO, 0.35 for Context) means the same here. Without `top_k` both are equal, and the
   affinity is the squared probability.
2. *Grouping map*: the soft assignments of all stages multiplied, so that each patch holds a distribution over the last
   stage's groups.

`groupvit_common.segmentation.label_maps` continues. `label_maps` of a backend holds the same functions for its tensors.
Letters: B images, L labels, G groups, E embedding, h w rows and columns of patches, P = h*w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

MAX_LOGIT_SCALE = 100.0
"""The authors' bound on the logit scale (CLIP's too), in training and inference."""


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _unit(x: Floats) -> Floats:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def similarity(embeds: Floats, label_embeds: Floats) -> Floats:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words
    `[L, K, E]`: `[..., L]`."""
    if label_embeds.ndim == 2:
        return _unit(embeds) @ _unit(label_embeds).T
    labels, words, width = label_embeds.shape
    word_scores = similarity(embeds, label_embeds.reshape(-1, width))
    return word_scores.reshape(*embeds.shape[:-1], labels, words).max(axis=-1)


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
