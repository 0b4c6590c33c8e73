"""Run by groupvit_tf/test_model.py and test_train.py in processes of their own: training on two replicas against
training on one device.

    python -m tests.support.replicas DIRECTORY plain,captions,groups one mirrored      # one after another, the second
    on two logical CPUs python -m tests.support.replicas DIRECTORY plain workers                           # one of the
    workers that TF_CONFIG names

Writes losses and weights of each task under each strategy to DIRECTORY/STRATEGY-RANK-TASK.npz.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import groupvit_tf  # first, for a quiet start  # noqa: F401  # isort: skip

import keras
import numpy as np
import pytest
import tensorflow as tf

from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.errors import InputError
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.scene_batches import SceneBatches
from groupvit_common.training.settings import changed
from groupvit_common.training.start import first_captions, make_processor
from groupvit_tf import TFGroupViTModel
from groupvit_tf.checkpoint import canonical_variables
from groupvit_tf.data import dataset
from groupvit_tf.distributed import ProcessInfo, Seeds, here
from groupvit_tf.train import Trainer, make_optimizer
from tests.support.models import smallest_config, smallest_inputs
from tests.support.training import END, PAPER, Captions, scenes_of, tiny

STEPS, BATCH = 5, 8

# A learning rate that float32 can hold, in which Keras keeps it; an epsilon that AdamW does not divide rounding by.
SETTINGS = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 2.0**-8, "epsilon": 1e-6, "gumbel": False}


class Losses(keras.callbacks.Callback):
    """Of each step; Keras reports their mean so far."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.values.append(float(logs["loss"]))


def small_config() -> Any:
    """For the batches of `tests.support.training`."""
    config = smallest_config()
    config.text_config.vocab_size, config.text_config.eos_token_id = END + 1, END
    config.text_config.max_position_embeddings = 32
    config.vision_config.image_size, config.vision_config.patch_size = 48, 16
    config.vision_config.initializer_range = 0.3  # so narrow a tower would make gradients of 1e4 of the paper's 0.02
    return config


def captions_recipe(**changes: Any) -> Recipe:
    """The paper's objective on pictures with captions and prompts of their own."""
    data = DataSettings(sources=(SourceSettings(kind="folder", path="nowhere"),), image_size=48, prompts=3)
    return changed(tiny(**PAPER), {**SETTINGS, "data": data, **changes})


def captions(process: ProcessInfo) -> tuple[Recipe, Any]:
    return captions_recipe(), Captions(BATCH, rank=process.rank, world=process.world)


def chunks(process: ProcessInfo) -> tuple[Recipe, Any]:
    """Those captions with cached features on several replicas: the same numbers as one device's plain batch."""
    recipe, stream = captions(process)
    return changed(recipe, {"chunk_size": 3 if process.replicas > 1 else 0}), stream


def groups(process: ProcessInfo) -> tuple[Recipe, Any]:
    """Scenes, whose prompts all replicas share."""
    recipe = tiny(**SETTINGS)
    pictures = {1: scenes_of()}
    processor = make_processor(recipe, first_captions(pictures, 16))
    return recipe, SceneBatches(recipe, pictures, processor, rank=process.rank, world=process.world)


def by_recipe(task: Callable[[ProcessInfo], tuple[Recipe, Any]], process: ProcessInfo) -> tuple[list[float], Any]:
    recipe, stream = task(process)
    losses = Losses()
    with process.scope():
        keras.utils.set_random_seed(3)
        model = TFGroupViTModel(small_config(), dtype="float64")
        trainer = Trainer(model, recipe)
        trainer.compile(make_optimizer(trainer), jit_compile=False)
        data = dataset(lambda: stream, recipe)
        trainer.fit(data, steps_per_epoch=STEPS, shuffle=False, verbose=0, callbacks=[losses])
    return losses.values, trainer.named_variables()


def plain(process: ProcessInfo) -> tuple[list[float], Any]:
    """The model itself in `fit`, on a data set that Keras divides, the last batch unevenly; losses, validation's, and
    two metrics of each epoch. Then a single pair, of which one replica has all.

    Embeddings, grouping, projections and loss: a transformer layer asks no other replica for anything, and makes the
    graph of two replicas half as large again.
    """
    config = smallest_config()
    config.text_config.num_hidden_layers, config.vision_config.depths = 0, [0, 0]
    inputs = {name: np.concatenate([array, array[:3]]) for name, array in smallest_inputs().items()}
    noise = np.random.default_rng(5).gumbel(size=(7, 4, 4))
    with process.scope():
        keras.utils.set_random_seed(3)
        model = TFGroupViTModel(config, dtype="float64")
        # Eagerly on one device, so that the graph of two replicas is compared with both.
        model.compile(keras.optimizers.SGD(2.0**-6), jit_compile=False, run_eagerly=process.replicas == 1)
    pairs = tf.data.Dataset.from_tensor_slices({**inputs, "gumbel_noise": (noise,)})
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data, one = (part.batch(4).with_options(options) for part in (pairs, pairs.take(1)))
    history = model.fit(data.repeat(2), verbose=0, validation_data=data).history
    variables = {name: np.array(variable) for name, variable in canonical_variables(model).items()}
    alone = model.evaluate(one, verbose=0, return_dict=True)
    with pytest.raises(InputError, match="at least 2 images and 2 texts in a batch, got 1"):
        model.fit(one, verbose=0)
    assert all(np.isfinite(np.asarray(variable)).all() for variable in model.variables)
    return [value for name in sorted(history) for value in history[name]] + [
        alone[name] for name in sorted(alone)
    ], variables


def first_seeds(process: ProcessInfo) -> list[int]:
    """What each replica draws first from one generator."""
    with process.scope():
        generator = Seeds(7)
    drawn = process.strategy.run(tf.function(generator.next))
    own = [int(seed[0]) for seed in process.strategy.experimental_local_results(drawn)]
    return [seed for seeds in process.all(own) for seed in seeds]


TASKS: dict[str, Callable[[ProcessInfo], tuple[list[float], Any]]] = {
    "plain": plain,
    "captions": lambda process: by_recipe(captions, process),
    "chunks": lambda process: by_recipe(chunks, process),
    "groups": lambda process: by_recipe(groups, process),
}


def main() -> None:
    directory, tasks, *strategies = sys.argv[1:]
    # Graphs run as they are traced: to rewrite one of many devices for speed takes longer than these few steps.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    places = {"one": lambda: ProcessInfo(0, 1)}
    if "mirrored" in strategies:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        places["mirrored"] = lambda: ProcessInfo(0, 1, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    if "workers" in strategies:
        # Before anything else: collectives want it so.
        there = here()
        assert there.replicas == there.world == 2
        assert there.all({"rank": there.rank, "text": "é" * (1 + there.rank)}) == [
            {"rank": 0, "text": "é"},
            {"rank": 1, "text": "éé"},
        ]
        places["workers"] = lambda: there
    for strategy in strategies:
        process = places[strategy]()
        if process.strategy is not None:
            assert len(set(first_seeds(process))) == 2
        for task in tasks.split(","):
            losses, variables = TASKS[task](process)
            weights = {name: np.asarray(variable) for name, variable in variables.items()}
            np.savez(Path(directory) / f"{strategy}-{process.rank}-{task}.npz", losses=losses, **weights)


if __name__ == "__main__":
    main()
