"""`AutoConfig`: the configuration class by the `model_type` of a file."""

from typing import Any, ClassVar

from groupvit_common.compat.auto import AutoConfigClass
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig


class AutoConfig(AutoConfigClass):
    """Configurations of GroupViT and its towers."""

    classes: ClassVar[dict[str, type[Any]]] = {
        config.model_type: config for config in (GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig)
    }
