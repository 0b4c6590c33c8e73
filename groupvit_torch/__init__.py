"""GroupViT in PyTorch, under the names of transformers' GroupViT."""

from groupvit_common.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.model import GroupViTModel, GroupViTPreTrainedModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "GroupViTConfig",
    "GroupViTModel",
    "GroupViTModelOutput",
    "GroupViTPreTrainedModel",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
]
