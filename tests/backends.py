"""What the tests ask of a backend, in NumPy, so that a test is written once for all of them.

A test takes the fixture `backend` (see conftest.py). Adding a backend is adding a class here.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from groupvit_common.config import GroupViTConfig
from groupvit_common.outputs import ModelOutput

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


def _numpy(value: Any) -> Any:
    """A backend's tensors as NumPy arrays (half precision as float32), records and tuples walked through."""
    if isinstance(value, ModelOutput):
        return type(value)({name: _numpy(field) for name, field in value.items()})
    if isinstance(value, tuple):
        return tuple(_numpy(part) for part in value)
    value = value.detach().cpu()
    return (value.float() if value.element_size() < 4 and value.is_floating_point() else value).numpy()


BACKENDS: dict[str, type[Backend]] = {"torch": Torch}
