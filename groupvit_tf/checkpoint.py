"""Loading and saving Keras models: the base class of the three models.

A checkpoint's names and shapes are compared with the model's before any tensor is read, so a model is loaded whole or not at
all. Files are those of `groupvit_torch`: PyTorch's names and layout in safetensors.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import keras

from groupvit_common.errors import InputError
from groupvit_common.layout import canonical_name, from_canonical, to_canonical

__all__ = ["PreTrainedModel", "canonical_variables", "from_canonical", "kind", "to_canonical"]

# State of a batch norm that PyTorch keeps as buffers: saved with the parameters, but none of them.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def canonical_variables(model: keras.layers.Layer) -> dict[str, keras.Variable]:
    """The variables of a built model or layer by canonical name, which is relative to it; no seeds, no metrics."""
    root = f"{model.path or model.name}/"
    return {canonical_name(variable.path.removeprefix(root)): variable for variable in model.weights}


def kind(variable: keras.Variable) -> str:
    """What `to_canonical` wants to know: the kind of `groupvit_common.parameters` as far as the layout depends on it."""
    return "dense" if variable.name == "kernel" else "other"


class PreTrainedModel(keras.Model):
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub.

    Subclasses take `config` as their constructor's first argument, hand `dtype`, `name` and other keywords of `keras.Model`
    through, and name their layers as the files do. They are known to `keras.models.load_model`.
    """

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "pixel_values"

    def __init__(self, config: Any, *, dtype: Any = None, name: str | None = None, **keras_options: Any) -> None:
        """Args: config: of the class `config_class`; dtype: a dtype or Keras policy, the global policy if None."""
        if not isinstance(config, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}; "
                "use from_pretrained for a name or a directory"
            )
        super().__init__(dtype=dtype, name=name, **keras_options)
        self.config = config

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keras.saving.register_keras_serializable(package="groupvit")(cls)

    # -- Keras's own files ------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        options = {**config, "dtype": keras.dtype_policies.deserialize(config["dtype"], custom_objects)}
        return cls(cls.config_class.from_dict(options.pop("config")), **options)

    # -- the rest of transformers' base class that code relies on ---------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold."""
        return sum(
            math.prod(variable.shape)
            for name, variable in canonical_variables(self).items()
            if not name.endswith(_BUFFERS) and (variable.trainable or not only_trainable)
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trades time for memory in training: layers are computed again on the way back. Keywords are accepted, not used."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(
            getattr(layer, "gradient_checkpointing", False) for layer in self._flatten_layers(include_self=False)
        )

    def _set_gradient_checkpointing(self, on: bool) -> None:
        for layer in self._flatten_layers(include_self=False):
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = on
        # A step that `fit` has traced would keep the old choice.
        self.train_function = None
