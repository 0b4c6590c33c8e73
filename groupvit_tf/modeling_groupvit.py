"""The model's classes and functions, under the module's name and theirs in transformers."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from groupvit_common.compat.model import patch_grid
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_tf.base import GroupViTPreTrainedModel
from groupvit_tf.grouping import AssignAttention as GroupViTAssignAttention
from groupvit_tf.grouping import CrossAttentionLayer as GroupViTCrossAttentionLayer
from groupvit_tf.grouping import TokenAssign as GroupViTTokenAssign
from groupvit_tf.grouping import gumbel_noise_like
from groupvit_tf.label_maps import grouping_map, resize_bilinear
from groupvit_tf.layers import MLP as GroupViTMLP
from groupvit_tf.layers import Attention as GroupViTAttention
from groupvit_tf.layers import EncoderLayer as GroupViTEncoderLayer
from groupvit_tf.layers import MixerMLP as GroupViTMixerMLP
from groupvit_tf.layers import Tensor, softmax
from groupvit_tf.loss import symmetric_cross_entropy
from groupvit_tf.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_tf.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_tf.text import TextEmbeddings as GroupViTTextEmbeddings
from groupvit_tf.text import TextEncoder as GroupViTTextEncoder
from groupvit_tf.text import TextTower as GroupViTTextTransformer
from groupvit_tf.vision import PatchEmbeddings as GroupViTPatchEmbeddings
from groupvit_tf.vision import Stage as GroupViTStage
from groupvit_tf.vision import VisionEmbeddings as GroupViTVisionEmbeddings
from groupvit_tf.vision import VisionEncoder as GroupViTVisionEncoder
from groupvit_tf.vision import VisionTower as GroupViTVisionTransformer

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
    target = ops.arange(ops.shape(logits)[0])
    return ops.mean(ops.sparse_categorical_crossentropy(target, logits, from_logits=True))


def groupvit_loss(similarity: Tensor) -> Tensor:
    """Returns the mean of `contrastive_loss` over texts and over images of `[N, N]` similarities."""
    return symmetric_cross_entropy(ops.transpose(similarity))


def hard_softmax(logits: Tensor, dim: int) -> Tensor:
    """Returns 1 at the largest entry along `dim` and 0 elsewhere, with the gradient of the softmax."""
    return _straight_through(softmax(logits, dim), dim)


def gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
    """Returns the softmax along `dim` of logits with Gumbel noise, divided by `tau`; `hard`: as `hard_softmax`."""
    soft = softmax((logits + gumbel_noise_like(logits)) / tau, dim)
    return _straight_through(soft, dim) if hard else soft


def resize_attention_map(attentions: Tensor, height: int, width: int, align_corners: bool = False) -> Tensor:
    """Returns maps `[B, G, P]` of an image's patches in the shape `[B, G, height, width]`, bilinear.

    The grid of the patches is the one with the proportions of `height` and `width`.
    """
    attentions = ops.convert_to_tensor(attentions)
    rows, columns = patch_grid(attentions.shape[2], height, width)
    maps = ops.reshape(attentions, (-1, attentions.shape[1], rows, columns))
    if not align_corners:
        return resize_bilinear(maps, (height, width))
    down, across = (ops.convert_to_tensor(_aligned(*sides), maps.dtype) for sides in ((rows, height), (columns, width)))
    return ops.matmul(ops.matmul(down, maps), ops.transpose(across))


def get_grouping_from_attentions(attentions: Sequence[Tensor], hw_shape: tuple[int, int]) -> Tensor:
    """Returns the groups of the last grouping block spread over the pixels, `[B, G, H, W]`.

    Args:
        attentions: of a vision tower's record.
        hw_shape: (H, W), of the proportions of the image.
    """
    attentions = [ops.convert_to_tensor(attention) for attention in attentions]
    grouping = grouping_map(attentions, (1, attentions[0].shape[2]))
    return resize_attention_map(ops.squeeze(grouping, axis=2), *hw_shape)


def _aligned(old: int, new: int) -> np.ndarray:
    """Returns the bilinear weights `[new, old]` of a resize that keeps the outermost samples where they are."""
    place = np.linspace(0.0, old - 1, new)
    return np.maximum(1.0 - np.abs(place[:, None] - np.arange(old)), 0.0)


def _straight_through(soft: Tensor, dim: int) -> Tensor:
    axis = dim % len(soft.shape)
    one_hot = ops.one_hot(ops.argmax(soft, axis=axis), soft.shape[axis], axis=axis, dtype=soft.dtype)
    return one_hot - ops.stop_gradient(soft) + soft
