"""Operations of several replicas (`tf.distribute.Strategy`). Alone, everything here is the identity.

The model knows one device; only its loss, metrics, batch norm and seeds cover all replicas, through these functions.
All carry gradients. They have an effect inside a strategy's replica context, that is in `fit`, `evaluate` and `predict`
under `strategy.scope()`.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.tensorflow_logging import tensorflow_advice

Tensor = Any


def num_replicas() -> int:
    """Returns the number of replicas; 1 outside a strategy, and on other backends than TensorFlow."""
    context = _replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def gather(x: Tensor) -> Tensor:
    """Gathers `[B, ...]` of every replica, in order: `[replicas * B, ...]`, the same on each of them."""
    context = _replica_context()
    return x if context is None else context.all_gather(x, axis=0)


def replica_sum(x: Tensor) -> Tensor:
    """Returns the sum over the replicas, the same on each of them."""
    context = _replica_context()
    if context is None:
        return x
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.SUM, x)


def replica_number() -> Tensor | int:
    """Returns the number of this replica."""
    context = _replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


class Seeds(keras.random.SeedGenerator):
    """Random seeds that differ from replica to replica: each sees other images, and needs noise of its own."""

    def next(self, ordered: bool = True) -> Tensor:
        seed = super().next(ordered)
        if num_replicas() == 1:
            return seed
        # The first number stays as it was drawn, the second one counts calls.
        step = ops.convert_to_tensor(np.array([1_000_003, 0]), dtype=seed.dtype)
        return seed + step * ops.cast(replica_number(), seed.dtype)


class Model(keras.Model):
    """A Keras model whose weights exist from the start, with what its `fit` and `evaluate` need under a strategy."""

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras takes a batch from the data to build what is built, and fails on batches that are distributed already.
        if self._compile_metrics is not None or self._compile_loss is not None:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        elif self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """As `keras.Model.compute_metrics`."""
        return as_logs(super().compute_metrics(x, y, y_pred, sample_weight))


def as_logs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a step's logs for Keras, which averages those of several workers along an axis that scalars lack."""
    if not _several_workers():
        return dict(values)
    return {name: ops.reshape(value, (1,)) for name, value in values.items()}


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a training: its number, their number, and the strategy of all their devices (None: one device)."""

    rank: int
    world: int
    strategy: Any = None

    @property
    def replicas(self) -> int:
        """Replicas of all processes."""
        return 1 if self.strategy is None else int(self.strategy.num_replicas_in_sync)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which models and optimizers are made."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def all(self, value: Any) -> list[Any]:
        """Returns the JSON values of every process, in their order, on every process."""
        if self.world == 1:
            return [value]
        import tensorflow as tf

        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        # As integers that collectives know. Every replica of a process has the same ones; one of each counts.
        with tensorflow_advice():
            lengths, numbers = (
                self.strategy.gather(self.strategy.run(lambda a=array: tf.constant(a, tf.int32)), axis=0).numpy()
                for array in (np.array([len(text)]), text)
            )
        pieces = np.split(numbers.astype(np.uint8), np.cumsum(lengths)[:-1])
        return [json.loads(piece.tobytes()) for piece in pieces[:: self.replicas // self.world]]

    def any(self, value: bool) -> bool:
        """Returns True if it is true of any process."""
        return any(self.all(value))


def here() -> ProcessInfo:
    """Returns this process: of the strategy in scope, else of the workers of `TF_CONFIG`, else alone with all GPUs."""
    if keras.backend.backend() != "tensorflow":
        return ProcessInfo(0, 1)
    import tensorflow as tf

    if tf.distribute.has_strategy():
        strategy = tf.distribute.get_strategy()
    elif tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec().jobs:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    elif len(tf.config.list_logical_devices("GPU")) > 1:
        strategy = tf.distribute.MirroredStrategy()
    else:
        return ProcessInfo(0, 1)
    return process_of(strategy)


def process_of(strategy: Any) -> ProcessInfo:
    """Returns this process among those of a TensorFlow strategy."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec().jobs:
        return ProcessInfo(0, 1, strategy if strategy.num_replicas_in_sync > 1 else None)
    spec = resolver.cluster_spec()
    chiefs = spec.num_tasks("chief") if "chief" in spec.jobs else 0
    workers = spec.num_tasks("worker") if "worker" in spec.jobs else 0
    return ProcessInfo(resolver.task_id + chiefs * (resolver.task_type != "chief"), chiefs + workers, strategy)


def refuse_strategy() -> None:
    """Raises InputError inside a TensorFlow strategy's scope if Keras runs on another backend, which ignores it."""
    tf = sys.modules.get("tensorflow")  # without TensorFlow there is no strategy
    if keras.backend.backend() != "tensorflow" and tf is not None and tf.distribute.has_strategy():
        raise InputError(
            f"tf.distribute has no effect on Keras's {keras.backend.backend()} backend: "
            "use keras.distribution.DataParallel"
        )


def _several_workers() -> bool:
    """True if the strategy in use has replicas in other processes."""
    context = _replica_context()
    if context is None:
        return False
    import tensorflow as tf

    strategy = context.strategy
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and bool(
        strategy.cluster_resolver.cluster_spec().jobs
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
