"""The state of a training: what a checkpoint of a run holds, in the layout that both backends read and write."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.training.checkpoints import MODEL, Arrays, RunState, check_weights
from groupvit_common.training.initial_model import MULTI_LABEL_SCALE
from groupvit_tf.checkpoint import from_canonical, kind, to_canonical
from groupvit_tf.chunks import random_state, set_random_state
from groupvit_tf.model import GroupViTModel
from groupvit_tf.objective import Trained, model_of, variables_of
from groupvit_tf.optimizer import EMA, LossScale, adamw_of, to_arrays
from groupvit_tf.predictor import Segmenter


class TrainState:
    """The weights, the optimizer, float16's loss scale and the EMA of what `fit` trains, compiled."""

    def __init__(self, objective: Trained, ema: EMA | None = None) -> None:
        self.objective, self.ema = objective, ema
        self._segmenter: Segmenter | None = None

    def best(self) -> Arrays:
        """Returns the weights that are measured and saved: the EMA if there is one."""
        return to_arrays(variables_of(self.objective)) if self.ema is None else self.ema.arrays()

    def save_pretrained(self, directory: Path) -> None:
        """Saves the best weights, with the multi-label temperature beside them; loading ignores it."""
        model_of(self.objective).save_pretrained(directory, state_dict=self.best())

    def segmenter(self, processor: GroupViTProcessor) -> Segmenter:
        """Returns a segmenter of the best weights, until the next call gives its model newer ones."""
        found = self._segmenter
        if found is None or found.processor is not processor:
            model = GroupViTModel.from_arrays(model_of(self.objective).config, self.best(), dtype="float32")
            self._segmenter = found = Segmenter(model, processor, batch_size=50)
        else:
            found.model._set_arrays(self.best())
            found.model.check_finite()
        # A copy has the graphs that were traced, and labels and options of its own.
        return copy.copy(found)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns a checkpoint's arrays and values beside the model: moments, loss scale, weights if there is an
        EMA."""
        adamw, variables = adamw_of(self.objective.optimizer), variables_of(self.objective)
        if adamw is None:
            raise InputError(
                "a checkpoint that can be continued needs groupvit_tf.train.AdamW as the optimizer, got "
                f"{type(self.objective.optimizer).__name__}"
            )
        arrays: Arrays = {}
        for name, variable, moments in self._moments():
            for key, moment in moments.items():
                arrays[f"optimizer.{key}.{name}"] = to_canonical(kind(variable), np.asarray(moment))
            arrays[f"optimizer.step.{name}"] = np.asarray(adamw.taken).astype(np.float32)
        if self.ema is not None:
            arrays |= {f"weights.{name}": array for name, array in to_arrays(variables).items()}
        return arrays, {"scaler": _scaler_state(self.objective.optimizer)}

    def random_state(self) -> dict[str, Any]:
        """Returns the random state of this process as JSON values."""
        return {"seeds": [np.asarray(seed).tolist() for seed in random_state(self.objective)]}

    def restore(self, state: RunState, directory: Path, own: Mapping[str, Any]) -> None:
        """Restores everything as it was at a checkpoint.

        Args:
            directory: of the checkpoint.
            own: what it holds of this process; a run of another number of processes, or of PyTorch, has no seeds for
                it.
        """
        saved = {
            name: np.array(array)
            for path, names in find_weights(directory / MODEL).files.items()
            for name, array in read_arrays(path, names)
        }
        weights = {n.removeprefix("weights."): a for n, a in state.arrays.items() if n.startswith("weights.")} or saved
        variables, optimizer = variables_of(self.objective), self.objective.optimizer
        assign_weights(variables, variables, weights)
        if self.ema is not None:
            assign_weights(self.ema.averages, variables, saved)
        adamw = adamw_of(optimizer)
        assert adamw is not None
        for name, variable, moments in self._moments():
            for key, moment in moments.items():
                array = state.arrays.get(f"optimizer.{key}.{name}")
                if array is not None:
                    moment.assign(from_canonical(kind(variable), np.array(array)))
        taken = [int(array) for name, array in state.arrays.items() if name.startswith("optimizer.step.")]
        adamw.taken.assign(max(taken, default=0))
        adamw.iterations.assign(state.step)
        scaler = state.values["scaler"]
        if isinstance(optimizer, LossScale) and scaler:
            optimizer.dynamic_scale.assign(scaler["scale"])
            optimizer.step_counter.assign(scaler["_growth_tracker"])
        set_random_state([np.array(seed, np.int64) for seed in own.get("seeds", ())], self.objective)

    def _moments(self) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Yields, for each trainable variable, name, variable, and its moments under PyTorch's names."""
        adamw: Any = adamw_of(self.objective.optimizer)
        names = {id(variable): name for name, variable in variables_of(self.objective).items()}
        for variable in adamw._trainable_variables:
            index = adamw._get_variable_index(variable)
            moments = {"exp_avg": adamw._momentums[index], "exp_avg_sq": adamw._velocities[index]}
            yield names[id(variable)], variable, moments


def assign_weights(variables: Mapping[str, Any], like: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Sets variables to the weights of a checkpoint, by name. CheckpointError if one is missing or has another shape.

    Args:
        like: the model's variables, whose kinds say how weights are laid out.
    """
    found = {name: from_canonical(kind(like[name]), np.array(weights[name])) for name in variables if name in weights}
    expected, shapes = ({name: value.shape for name, value in each.items()} for each in (variables, found))
    check_weights(expected, shapes, optional=MULTI_LABEL_SCALE)
    for name, array in found.items():
        variables[name].assign(array.astype(variables[name].dtype))


def _scaler_state(optimizer: Any) -> dict[str, Any]:
    """Returns what PyTorch's `GradScaler` keeps."""
    if not isinstance(optimizer, LossScale):
        return {}
    return {
        "scale": np.asarray(optimizer.dynamic_scale).item(),
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": optimizer.dynamic_growth_steps,
        "_growth_tracker": np.asarray(optimizer.step_counter).item(),
    }
