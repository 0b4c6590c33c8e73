"""What tests of training share: recipes of seconds, captioned batches without any data, a run as a process of its
own."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupvit_common.data.captions.stream import CaptionBatch
from groupvit_common.data.scenes import make_scene
from groupvit_common.training import checkpoints as run_state
from groupvit_common.training.checkpoints import Checkpoints
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import TrainResult
from groupvit_common.training.scene_batches import TrainingScenes
from groupvit_common.training.settings import changed

# One level, a model of some thousand parameters, no noise: half a second from start to end.
TINY: Mapping[str, Any] = {
    "steps": 6, "batch_size": 8, "warmup_steps": 1, "levels": (1,), "turns": (1,), "scenes_per_level": 16,
    "held_out_scenes": 1,
    "size": 0, "image_size": 48, "patch_size": 16, "width": 8, "heads": 1, "depths": (1, 0), "groups": (4,),
    "text_width": 8, "text_heads": 1,
    "embedding": 8, "projection_width": 8, "vocab_size": 530, "precision": "float32", "evaluate_every": 0,
    "save_every": 0,
}  # fmt: skip
PAPER: Mapping[str, Any] = {"kind": "paper", "paper_weight": 0.0, "position_amplitude": 0.0, "hard_from": 0.0}


BEYOND_FLOAT32 = 1e39
"""A weight with which a loss is not finite."""
END = 529  # the token that ends a text, of `tiny` recipes too


def tiny(**changes: Any) -> Recipe:
    return changed(get_recipe("scenes-demo"), {**TINY, **changes})


def scenes_of(level: int = 1, count: int = 16, side: int = 48, seed: int = 0) -> TrainingScenes:
    """Training scenes, plain ones."""
    return TrainingScenes(lambda number: make_scene(seed, number, level, (side, side)), count, level, side)


def quiet(line: str) -> None:
    pass


ON_CPU: Mapping[str, Mapping[str, Any]] = {"torch": {"device": "cpu"}, "tf": {}}
"""Options of a backend's `train`, for the CPU, whatever else there is: bits are promised there."""


@contextmanager
def untraced(backend: str) -> Iterator[None]:
    """Within, Keras computes step by step: to trace a graph takes longer than two or three steps do."""
    if backend == "torch":
        yield
        return
    import keras

    # Not `tf.config.run_functions_eagerly`: the arithmetic of a variable's step, one small graph for all, is faster.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "run_eagerly", property(lambda model: True, lambda model, value: None))
        for waits in ("groupvit_tf.predictor._CALLS_BEFORE_TRACING", "groupvit_tf.programs.CALLS_BEFORE_TRACING"):
            patch.setattr(waits, 10**9)
        yield


def train(recipe: Recipe, directory: Path, **options: Any) -> TrainResult:
    """A run of the PyTorch loop on the CPU, whatever else there is: bits are promised there."""
    from groupvit_torch.train import train

    return train(recipe, directory, device="cpu", **options)


class Captions:
    """A stream of random captioned pictures: the whole batch is drawn on every rank, each has its part.

    T = 12 tokens of 530, of which the last ends a text; M = 3 prompts.
    """

    def __init__(self, batch: int, *, side: int = 48, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.batch, self.side = batch, side
        self.mine = slice(rank * batch // world, (rank + 1) * batch // world)

    def __iter__(self) -> Iterator[CaptionBatch]:
        while True:
            pixels = self.rng.standard_normal((self.batch, 3, self.side, self.side)).astype(np.float32)
            pixels += 2 * self.rng.standard_normal((self.batch, 3, 1, 1)).astype(np.float32)
            ids, mask = self._texts(4)
            mine = self.mine
            yield CaptionBatch(
                pixels[mine], ids[mine, 0], mask[mine, 0], ids[mine, 1:], mask[mine, 1:], [""] * len(pixels[mine])
            )

    def _texts(self, each: int) -> tuple[Any, Any]:
        length = self.rng.integers(3, 10, (self.batch, each, 1))
        place = np.arange(12)
        ids = self.rng.integers(0, END, (self.batch, each, 12))
        ids = np.where(place < length - 1, ids, END)
        return ids, (place < length).astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]


def ends_alike(one: Path, other: Path) -> None:
    """The last checkpoints of two runs, bit for bit: weights, moments, random states, place in the data."""
    names = [Checkpoints(directory).all()[-1] for directory in (one, other)]
    assert names[0].name == names[1].name
    for file in ("model/model.safetensors", "state.safetensors"):
        assert (names[0] / file).read_bytes() == (names[1] / file).read_bytes(), file
    first, second = (dict(run_state.load(name).values) for name in names)
    for told in ("minutes", "recipe"):
        del first[told], second[told]
    assert first == second


def stopping_at(step: int, number: int = signal.SIGTERM) -> Any:
    """A log that sends a signal to this process when a step's line comes."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            signal.raise_signal(number)

    return log
