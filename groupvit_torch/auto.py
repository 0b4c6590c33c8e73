"""`AutoModel` and its like: the model class by the `model_type` of a configuration."""

from typing import Any, ClassVar

from groupvit_common.compat.auto import AutoModelClass
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel


class AutoModel(AutoModelClass):
    """Models of GroupViT and its towers."""

    classes: ClassVar[dict[str, type[Any]]] = {
        GroupViTConfig.model_type: GroupViTModel,
        GroupViTTextConfig.model_type: GroupViTTextModel,
        GroupViTVisionConfig.model_type: GroupViTVisionModel,
    }


class AutoModelForZeroShotImageClassification(AutoModelClass):
    """Models that compare images with texts."""

    classes: ClassVar[dict[str, type[Any]]] = {GroupViTConfig.model_type: GroupViTModel}
