"""What several replicas of a model (`tf.distribute.Strategy`) do together. Alone, everything here is the identity.

The model knows one device; only its loss, its metrics and its batch norm look across replicas, through these functions. All carry
gradients. They have an effect inside a strategy's replica context, that is in `fit`, `evaluate` and `predict` under `strategy.scope()`.
"""

import sys
from typing import Any

import keras

from groupvit_common.errors import InputError

Tensor = Any


def num_replicas() -> int:
    """How many replicas compute together; 1 outside a strategy, and on other backends than TensorFlow."""
    context = _replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def gather(x: Tensor) -> Tensor:
    """`[B, ...]` of every replica, one after the other: `[replicas * B, ...]`, the same on each of them."""
    context = _replica_context()
    return x if context is None else context.all_gather(x, axis=0)


def replica_sum(x: Tensor) -> Tensor:
    """The sum over the replicas, the same on each of them."""
    context = _replica_context()
    if context is None:
        return x
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.SUM, x)


def refuse_strategy() -> None:
    """InputError inside the scope of a TensorFlow strategy if Keras runs on another backend, which would not know of it."""
    tf = sys.modules.get("tensorflow")  # without TensorFlow there is no strategy
    if keras.backend.backend() != "tensorflow" and tf is not None and tf.distribute.has_strategy():
        raise InputError(
            f"tf.distribute has no effect on Keras's {keras.backend.backend()} backend: use keras.distribution.DataParallel"
        )


def _replica_context() -> Any:
    """TensorFlow's replica context if there is company in it."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    if not tf.distribute.in_cross_replica_context():
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context
    return None
