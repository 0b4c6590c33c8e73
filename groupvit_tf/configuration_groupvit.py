"""The configurations, under the module's name in transformers."""

from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig

__all__ = ["GroupViTConfig", "GroupViTTextConfig", "GroupViTVisionConfig"]
