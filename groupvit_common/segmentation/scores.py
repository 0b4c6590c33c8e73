"""Scores: the similarities of groups and images to labels, and the grouping map. A backend computes them on its device.

The paper's inference (Xu et al. 2022, section 4.2, and the authors' evaluation):

1. *Affinity* of group g to label l: `softmax_l(s * cos(g, l))`, s the logit scale (at most 100). A label may have
   several embeddings `[K, E]`, of words that mean it; its cosine is then the largest of theirs, here and for the image
   as a whole. With `top_k`, only the labels most similar to the whole image stay. As in the authors' evaluation, the
   affinity is the product of two softmaxes, one over the labels that stay and one over all, so that a threshold from
   the paper (0.95 for VOC and COCO, 0.35 for Context) means the same here. Without `top_k` both are equal, and the
   affinity is the squared probability.
2. *Grouping map*: the soft assignments of all stages multiplied, so that each patch holds a distribution over the last
   stage's groups.

`label_maps` of a backend holds the functions of both, `groupvit_common.segmentation.label_maps` continues.
Letters: B images, L labels, G groups, E embedding, h w rows and columns of patches, P = h*w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

MAX_LOGIT_SCALE = 100.0
"""The authors' bound on the logit scale (CLIP's too), in training and inference."""


def unit(x: Floats) -> Floats:
    """`[..., D]` at length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def similarity(embeds: Floats, label_embeds: Floats) -> Floats:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words
    `[L, K, E]`: `[..., L]`."""
    if label_embeds.ndim == 2:
        return unit(embeds) @ unit(label_embeds).T
    labels, words, width = label_embeds.shape
    word_scores = similarity(embeds, label_embeds.reshape(-1, width))
    return word_scores.reshape(*embeds.shape[:-1], labels, words).max(axis=-1)
