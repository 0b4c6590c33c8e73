"""The state of a training: what a checkpoint of a run holds, in the layout that both backends read and write."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.training.checkpoints import MODEL, Arrays, RunState, check_weights
from groupvit_common.training.initial_model import MULTI_LABEL_SCALE
from groupvit_torch.chunks import random_state, set_random_state
from groupvit_torch.objective import Objective
from groupvit_torch.optimizer import EMA
from groupvit_torch.predictor import Segmenter


class TrainState:
    """The weights, the optimizer, float16's loss scale and the EMA of one process."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: EMA | None = None,
    ) -> None:
        self.objective, self.optimizer, self.scaler, self.ema = objective, optimizer, scaler, ema

    def best(self) -> Objective:
        """Returns the weights that are measured and saved: the EMA if there is one."""
        return self.objective if self.ema is None else self.ema.objective

    def save_pretrained(self, directory: Path) -> None:
        """Saves the best weights, with the multi-label temperature beside them; loading ignores it."""
        best = self.best()
        best.model.save_pretrained(directory, state_dict=best.named_variables())

    def segmenter(self, processor: GroupViTProcessor) -> Segmenter:
        """Returns a segmenter of the best weights."""
        return Segmenter(self.best().model, processor, batch_size=50)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns a checkpoint's arrays and values beside the model: moments, loss scale, weights if there is an
        EMA."""
        arrays = {f"optimizer.{key}.{name}": value for name, key, value in self._moments()}
        if self.ema is not None:
            arrays |= {f"weights.{n}": tensor.cpu().numpy() for n, tensor in self.objective.named_variables().items()}
        return arrays, {"scaler": self.scaler.state_dict()}

    def random_state(self) -> dict[str, Any]:
        """Returns the random state of this process as JSON values."""
        states = random_state(self.objective.model.device)
        return {"random": [base64.b64encode(state.numpy().tobytes()).decode() for state in states]}

    def restore(self, state: RunState, directory: Path, own: Mapping[str, Any]) -> None:
        """Restores everything as it was at a checkpoint.

        Args:
            directory: of the checkpoint.
            own: what it holds of this process; a run of another number of processes, or of Keras, has no random state
                for it.
        """
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in state.arrays.items()}
        saved = load_weights(directory / MODEL)
        weights = {n.removeprefix("weights."): t for n, t in arrays.items() if n.startswith("weights.")} or saved
        assign_weights(self.objective.named_variables(), weights)
        if self.ema is not None:
            assign_weights(self.ema.objective.named_variables(), saved)
        for name, parameter in self.objective.named_trainable().items():
            moments = {key: arrays.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(moment is not None for moment in moments.values()):
                on_host = not self.optimizer.defaults.get("fused")
                self.optimizer.state[parameter] = {
                    key: cast(Tensor, moment).to("cpu" if key == "step" and on_host else parameter.device)
                    for key, moment in moments.items()
                }
        if self.scaler.is_enabled() and state.values["scaler"]:
            self.scaler.load_state_dict(dict(state.values["scaler"]))
        if "random" in own:
            texts = (bytearray(base64.b64decode(text)) for text in own["random"])
            states = [torch.frombuffer(text, dtype=torch.uint8) for text in texts]
            set_random_state(states, self.objective.model.device)

    def _moments(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Yields the optimizer's state: name of a parameter, "exp_avg", "exp_avg_sq" or "step", value."""
        for name, parameter in self.objective.named_trainable().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield name, key, value.detach().cpu().numpy()


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of a model directory by name."""
    return {
        name: torch.from_numpy(np.array(array))
        for path, names in find_weights(directory).files.items()
        for name, array in read_arrays(path, names)
    }


@torch.no_grad()
def assign_weights(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Sets tensors to the weights of a checkpoint, by name. CheckpointError if one is missing or has another shape."""
    expected, found = ({name: t.shape for name, t in each.items()} for each in (tensors, weights))
    check_weights(expected, found, optional=MULTI_LABEL_SCALE)
    for name, tensor in tensors.items():
        if name in weights:
            tensor.copy_(weights[name])
