"""The model's classes and functions, under the module's name and theirs in transformers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from groupvit_common.compat.model import patch_grid
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.base import GroupViTPreTrainedModel
from groupvit_torch.grouping import AssignAttention as GroupViTAssignAttention
from groupvit_torch.grouping import CrossAttentionLayer as GroupViTCrossAttentionLayer
from groupvit_torch.grouping import TokenAssign as GroupViTTokenAssign
from groupvit_torch.grouping import gumbel_noise_like
from groupvit_torch.label_maps import grouping_map
from groupvit_torch.layers import MLP as GroupViTMLP
from groupvit_torch.layers import Attention as GroupViTAttention
from groupvit_torch.layers import EncoderLayer as GroupViTEncoderLayer
from groupvit_torch.layers import MixerMLP as GroupViTMixerMLP
from groupvit_torch.loss import symmetric_cross_entropy
from groupvit_torch.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_torch.text import TextEmbeddings as GroupViTTextEmbeddings
from groupvit_torch.text import TextEncoder as GroupViTTextEncoder
from groupvit_torch.text import TextTower as GroupViTTextTransformer
from groupvit_torch.vision import PatchEmbeddings as GroupViTPatchEmbeddings
from groupvit_torch.vision import Stage as GroupViTStage
from groupvit_torch.vision import VisionEmbeddings as GroupViTVisionEmbeddings
from groupvit_torch.vision import VisionEncoder as GroupViTVisionEncoder
from groupvit_torch.vision import VisionTower as GroupViTVisionTransformer

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "GroupViTAssignAttention",
    "GroupViTAttention",
    "GroupViTConfig",
    "GroupViTCrossAttentionLayer",
    "GroupViTEncoderLayer",
    "GroupViTMLP",
    "GroupViTMixerMLP",
    "GroupViTModel",
    "GroupViTModelOutput",
    "GroupViTPatchEmbeddings",
    "GroupViTPreTrainedModel",
    "GroupViTStage",
    "GroupViTTextConfig",
    "GroupViTTextEmbeddings",
    "GroupViTTextEncoder",
    "GroupViTTextModel",
    "GroupViTTextTransformer",
    "GroupViTTokenAssign",
    "GroupViTVisionConfig",
    "GroupViTVisionEmbeddings",
    "GroupViTVisionEncoder",
    "GroupViTVisionModel",
    "GroupViTVisionTransformer",
    "contrastive_loss",
    "get_grouping_from_attentions",
    "groupvit_loss",
    "gumbel_softmax",
    "hard_softmax",
    "resize_attention_map",
]


def contrastive_loss(logits: Tensor) -> Tensor:
    """Returns the mean cross entropy of the rows of `[B, B]`, whose i-th answer is column i."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def groupvit_loss(similarity: Tensor) -> Tensor:
    """Returns the mean of `contrastive_loss` over texts and over images of `[N, N]` similarities."""
    return symmetric_cross_entropy(similarity.t())


def hard_softmax(logits: Tensor, dim: int) -> Tensor:
    """Returns 1 at the largest entry along `dim` and 0 elsewhere, with the gradient of the softmax."""
    return _straight_through(logits.softmax(dim), dim)


def gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
    """Returns the softmax along `dim` of logits with Gumbel noise, divided by `tau`; `hard`: as `hard_softmax`."""
    soft = ((logits + gumbel_noise_like(logits)) / tau).softmax(dim)
    return _straight_through(soft, dim) if hard else soft


def resize_attention_map(attentions: Tensor, height: int, width: int, align_corners: bool = False) -> Tensor:
    """Returns maps `[B, G, P]` of an image's patches in the shape `[B, G, height, width]`, bilinear.

    The grid of the patches is the one with the proportions of `height` and `width`.
    """
    maps = attentions.unflatten(2, patch_grid(attentions.shape[2], height, width))
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=align_corners)


@torch.no_grad()
def get_grouping_from_attentions(attentions: Sequence[Tensor], hw_shape: tuple[int, int]) -> Tensor:
    """Returns the groups of the last grouping block spread over the pixels, `[B, G, H, W]`, without a gradient.

    Args:
        attentions: of a vision tower's record.
        hw_shape: (H, W), of the proportions of the image.
    """
    return resize_attention_map(grouping_map(attentions, (1, attentions[0].shape[2])).squeeze(2), *hw_shape)


def _straight_through(soft: Tensor, dim: int) -> Tensor:
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft
