"""Run by test_tf_model.py in a process of its own: training on two replicas against training on one device.

Prints one JSON line: the largest relative differences, and how far training moved the weights at all.
"""

import json
import sys

import groupvit_tf  # first, for a quiet start  # noqa: F401  # isort: skip

import keras
import numpy as np
import tensorflow as tf

from groupvit_tf import TFGroupViTModel
from groupvit_tf.checkpoint import canonical_variables
from tests.conftest import smallest_config, smallest_inputs


def train(strategy: tf.distribute.Strategy) -> tuple[dict[str, list[float]], dict[str, np.ndarray], float]:
    inputs = smallest_inputs()
    noise = np.random.default_rng(5).gumbel(size=(4, 4, 4))
    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = TFGroupViTModel(smallest_config(), dtype="float64")
        model.compile(keras.optimizers.SGD(2.0**-6, momentum=0.5), jit_compile=False)
    start = {name: variable.numpy() for name, variable in canonical_variables(model).items()}
    data = tf.data.Dataset.from_tensor_slices({**inputs, "gumbel_noise": (noise,)}).batch(4, drop_remainder=True)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    history = model.fit(data.repeat(3).with_options(options), verbose=0, validation_data=data.with_options(options))
    weights = {name: variable.numpy() for name, variable in canonical_variables(model).items()}
    moved = max(float(np.abs(weights[name] - start[name]).max()) for name in weights if "num_batches" not in name)
    return history.history, weights, moved


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one, one_weights, moved = train(tf.distribute.get_strategy())
    two, two_weights, _ = train(strategy)
    losses = [name for name in one if name.endswith("loss")]
    json.dump(
        {
            "replicas": strategy.num_replicas_in_sync,
            "loss": max(abs(a - b) / abs(a) for name in losses for a, b in zip(one[name], two[name], strict=True)),
            "metrics": max(abs(a - b) for n in one if n not in losses for a, b in zip(one[n], two[n], strict=True)),
            "weights": max(
                float(np.abs(one_weights[name] - two_weights[name]).max())
                / max(float(np.abs(one_weights[name]).max()), 1.0)
                for name in one_weights
            ),
            "moved": moved,
        },
        sys.stdout,
    )
    print()


if __name__ == "__main__":
    main()
