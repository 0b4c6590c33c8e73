"""The base of the three PyTorch models."""

from typing import Any, ClassVar

from groupvit_common.model.config import GroupViTConfig
from groupvit_torch.checkpoint import PreTrainedModel
from groupvit_torch.init import initialise


class GroupViTPreTrainedModel(PreTrainedModel):
    """Base of the three models: loading, saving, initial values."""

    config_class: ClassVar[type[Any]] = GroupViTConfig
    base_model_prefix: ClassVar[str] = "groupvit"

    def init_weights(self) -> None:
        """Draws new initial values for every parameter (see `groupvit_torch.init`)."""
        initialise(self)

    def _flag(self, name: str, value: bool | None) -> bool:
        """Returns a flag of `forward`: as given, else the configuration's."""
        return bool(getattr(self.config, name) if value is None else value)
