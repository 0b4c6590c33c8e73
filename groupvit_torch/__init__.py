"""GroupViT in PyTorch, under the names of transformers' GroupViT."""

from groupvit_common.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.model import GroupViTModel, GroupViTPreTrainedModel, GroupViTTextModel, GroupViTVisionModel

__all__ = [
    "GroupViTConfig",
    "GroupViTModel",
    "GroupViTPreTrainedModel",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
]
