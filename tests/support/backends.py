"""The backends' interface for tests, in NumPy, so that a test is written once for all of them.

A test takes the fixture `backend` (see conftest.py). Adding a backend is adding a class here.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.outputs import ModelOutput

Arrays = dict[str, np.ndarray]


class Backend(Protocol):
    name: str

    def build(self, config: GroupViTConfig, weights: Arrays | None = None, dtype: str = "float32") -> Any: ...

    def load(self, directory: Path, dtype: str = "float32") -> Any: ...

    def weights(self, model: Any) -> Arrays: ...

    def call(self, model: Any, **inputs: Any) -> ModelOutput: ...

    def features(self, model: Any, kind: str, **inputs: Any) -> np.ndarray: ...

    def loss_and_gradients(self, model: Any, **inputs: Any) -> tuple[float, Arrays]: ...

    def assign(self, logits: np.ndarray, **options: Any) -> np.ndarray: ...


class Torch:
    name = "torch"

    def build(self, config: GroupViTConfig, weights: Arrays | None = None, dtype: str = "float32") -> Any:
        import torch

        from groupvit_torch import GroupViTModel

        model = GroupViTModel(config).eval().to(getattr(torch, dtype))
        if weights is not None:
            model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        return model

    def load(self, directory: Path, dtype: str = "float32") -> Any:
        from groupvit_torch import GroupViTModel

        return GroupViTModel.from_pretrained(directory, dtype=dtype)

    def weights(self, model: Any) -> Arrays:
        return {name: _numpy(value) for name, value in model.state_dict().items()}

    def call(self, model: Any, **inputs: Any) -> ModelOutput:
        import torch

        with torch.no_grad():
            return _numpy(model(**self._tensors(model, inputs)))

    def features(self, model: Any, kind: str, **inputs: Any) -> np.ndarray:
        import torch

        with torch.no_grad():
            return _numpy(getattr(model, f"get_{kind}_features")(**self._tensors(model, inputs)))

    def loss_and_gradients(self, model: Any, **inputs: Any) -> tuple[float, Arrays]:
        model.zero_grad()
        loss = model(**self._tensors(model, inputs), return_loss=True).loss
        loss.backward()
        return loss.item(), {n: _numpy(p.grad) for n, p in model.named_parameters() if p.grad is not None}

    def assign(self, logits: np.ndarray, **options: Any) -> np.ndarray:
        import torch

        from groupvit_torch.grouping import assign

        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return _numpy(assign(torch.from_numpy(logits), **tensors))

    def _tensors(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        def tensor(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                made = torch.from_numpy(value)
                return made.to(model.dtype) if made.is_floating_point() else made
            return [tensor(v) for v in value] if isinstance(value, list) else value

        return {name: tensor(value) for name, value in inputs.items()}


class TF:
    """Keras, on TensorFlow or whatever KERAS_BACKEND names."""

    name = "tf"

    def __init__(self) -> None:
        if os.environ.get("KERAS_BACKEND") == "jax":
            import jax

            # Without it JAX has no float64. A program's own decision, so the package does not take it.
            jax.config.update("jax_enable_x64", True)

    def build(self, config: GroupViTConfig, weights: Arrays | None = None, dtype: str = "float32") -> Any:
        from groupvit_common.model.parameters import manifest
        from groupvit_tf import GroupViTModel
        from groupvit_tf.checkpoint import canonical_variables, from_canonical

        model = GroupViTModel(config, dtype=dtype)
        if weights is not None:
            variables, kinds = canonical_variables(model), manifest(config)
            assert set(variables) == set(weights)
            for name, variable in variables.items():
                variable.assign(from_canonical(kinds[name].kind, weights[name]))
        return model

    def load(self, directory: Path, dtype: str = "float32") -> Any:
        from groupvit_tf import GroupViTModel

        return GroupViTModel.from_pretrained(directory, dtype=dtype)

    def weights(self, model: Any) -> Arrays:
        return self._canonical(model, {})

    def call(self, model: Any, **inputs: Any) -> ModelOutput:
        return _numpy(model(**inputs))

    def features(self, model: Any, kind: str, **inputs: Any) -> np.ndarray:
        return _numpy(getattr(model, f"get_{kind}_features")(**inputs))

    def loss_and_gradients(self, model: Any, **inputs: Any) -> tuple[float, Arrays]:
        import keras

        compute = self._jax_gradients if keras.backend.backend() == "jax" else self._tf_gradients
        loss, gradients = compute(model, inputs)
        paths = [variable.path for variable in model.trainable_variables]
        return loss, self._canonical(model, dict(zip(paths, gradients, strict=True)))

    def _tf_gradients(self, model: Any, inputs: dict[str, Any]) -> tuple[float, list[Any]]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model(**inputs, return_loss=True).loss
        # A lookup's gradient is sparse.
        return float(loss), [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)]

    def _jax_gradients(self, model: Any, inputs: dict[str, Any]) -> tuple[float, list[Any]]:
        import jax

        state = [variable.value for variable in model.non_trainable_variables]

        def loss(parameters: list[Any]) -> Any:
            return model.stateless_call(parameters, state, **inputs, return_loss=True)[0].loss

        parameters = [variable.value for variable in model.trainable_variables]
        value, gradients = jax.jit(jax.value_and_grad(loss))(parameters)
        return float(value), gradients

    def assign(self, logits: np.ndarray, **options: Any) -> np.ndarray:
        from groupvit_tf.grouping import assign

        return np.asarray(assign(logits, **options))

    def _canonical(self, model: Any, values: dict[str, Any]) -> Arrays:
        """The model's variables, or `values` by variable path, under the files' names and in their layout."""
        from groupvit_common.model.parameters import manifest
        from groupvit_tf.checkpoint import canonical_variables, to_canonical

        kinds = manifest(model.config)
        return {
            name: to_canonical(kinds[name].kind, _numpy(values.get(variable.path, variable)))
            for name, variable in canonical_variables(model).items()
            if not values or variable.path in values
        }


def _numpy(value: Any) -> Any:
    """A backend's tensors as NumPy arrays (half precision as float32), records and tuples walked through."""
    if isinstance(value, ModelOutput):
        return type(value)({name: _numpy(field) for name, field in value.items()})
    if isinstance(value, tuple):
        return tuple(_numpy(part) for part in value)
    if not hasattr(value, "detach"):
        array = np.asarray(value)
        # NumPy has no bfloat16 of its own; the frameworks' is a type of kind "V".
        return array.astype(np.float32) if array.dtype.itemsize < 4 and array.dtype.kind in "fV" else array
    value = value.detach().cpu()
    return (value.float() if value.element_size() < 4 and value.is_floating_point() else value).numpy()


BACKENDS: dict[str, type[Backend]] = {"torch": Torch, "tf": TF}
