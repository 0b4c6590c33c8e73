"""Losses. They take features that were gathered from all ranks already; the model and the loop know one device."""

import torch
from torch import Tensor
from torch.nn import functional as F


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """The contrastive loss of matching pairs (paper, equations 7 to 9), a float32 (or float64) scalar.

    Args:
        logits: `[B, B]` similarities times temperature, row i and column i belonging together. Half precision is widened:
            the sum of exponentials needs it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
