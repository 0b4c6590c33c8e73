"""The base of the three PyTorch models."""

from typing import Any, ClassVar

from torch import nn

from groupvit_common.model.config import GroupViTConfig
from groupvit_torch.checkpoint import PreTrainedModel
from groupvit_torch.init import initialise
from groupvit_torch.layers import Projection
from groupvit_torch.text import TextTower
from groupvit_torch.vision import VisionTower


class GroupViTPreTrainedModel(PreTrainedModel):
    """Base of the three models: loading, saving, initial values."""

    config_class: ClassVar[type[Any]] = GroupViTConfig
    base_model_prefix: ClassVar[str] = "groupvit"

    def _init_weights(self, module: nn.Module) -> None:
        """Draws new initial values for a tower or projection; `init_weights` calls this for every part of the model."""
        if isinstance(module, TextTower | VisionTower | Projection) and not next(module.parameters()).is_meta:
            initialise(module, self.config.initializer_factor)

    def _flag(self, name: str, value: bool | None) -> bool:
        """Returns a flag of `forward`: as given, else the configuration's."""
        if value is None:
            value = getattr(self.config, "use_return_dict" if name == "return_dict" else name)
        return bool(value)
