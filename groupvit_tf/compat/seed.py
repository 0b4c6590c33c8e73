"""`set_seed`: one seed for Python, NumPy and Keras."""

import keras

from groupvit_common.compat.seed import seed_python


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds the global random numbers of Python, NumPy, Keras and its backend.

    `deterministic`: also have operations computed in a way that gives the same bits each time, where there is one.
    """
    keras.utils.set_random_seed(seed_python(seed))
    if deterministic and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
