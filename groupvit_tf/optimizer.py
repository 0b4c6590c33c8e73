"""A recipe's optimizer, its schedule, float16's loss scale, and the exponential moving average (EMA) of the weights.

`groupvit_torch.optimizer` has the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.training.checkpoints import Arrays
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.schedule import has_weight_decay, learning_rate_at
from groupvit_tf.checkpoint import kind, to_canonical
from groupvit_tf.distributed import replica_sum
from groupvit_tf.layers import Tensor, wide_dtype
from groupvit_tf.model import GroupViTModel
from groupvit_tf.objective import Objective, Trained, model_of, variables_of
from groupvit_tf.variables import quick_variables


@keras.saving.register_keras_serializable(package="groupvit")
class AdamW(keras.optimizers.AdamW):
    """AdamW with PyTorch's arithmetic, so that a run may change frameworks midway.

    Five things differ from Keras's own:
    - `epsilon` is added to the unbiased root of the second moment (in Keras to the biased one, 7 times smaller in the
      first step with `beta_2=0.98`); the global norm that clips has 1e-6 added.
    - Gradients of embeddings are made dense first. Keras squares the parts of the gradient of a token that occurs
      several times, where the square of their sum is meant, in the norm and in the second moment.
    - Under a strategy, gradients are added up over the replicas before they are clipped; Keras clips each replica's
      own.
    - A step whose loss or gradient is not finite is skipped: weights and moments stay as they are.
    - Skipped steps do not count in the bias correction, but do in the learning rate's schedule.

    Variables `taken`: steps that were not skipped; `gradient_norm`: of the last step's gradient before clipping.
    """

    adds_replicas = True
    """False: the gradients are sums over the replicas already."""

    def build(self, variables: Any) -> None:
        if self.built:
            return
        with quick_variables():
            super().build(variables)
            self.taken = self.add_variable((), dtype="int", aggregation="only_first_replica", name="taken")
            self.gradient_norm = self.add_variable((), aggregation="only_first_replica", name="gradient_norm")

    def scale_loss(self, loss: Tensor) -> Tensor:
        return super().scale_loss(_or_nan(loss))

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply(sum_replicas(grads) if self.adds_replicas else grads, trainable_variables)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        # Done in `apply`, before clipping. Keras calls this after it.
        return grads_and_vars

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        norm = ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(grad)) for grad in grads])))
        taken = ops.isfinite(norm)
        self.taken.assign_add(ops.cast(taken, self.taken.dtype))
        self.gradient_norm.assign(ops.cast(norm, self.gradient_norm.dtype))
        factor = ops.ones_like(norm)
        if self.global_clipnorm:
            factor = ops.minimum(self.global_clipnorm / (norm + 1e-6), factor)
        else:
            grads = super()._clip_gradients(grads)
        # So that each tells by itself whether this step is taken (`_backend_update_step`).
        factor = ops.where(taken, factor, ops.full_like(factor, math.nan))
        return [grad * ops.cast(factor, grad.dtype) for grad in grads]

    def _apply_weight_decay(self, variables: Any) -> None:
        """Done in `update_step`."""

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Tensor) -> None:
        # What all variables share, once a step: a graph that has it for each takes twice as long to trace.
        taken = ops.all(ops.isfinite(grads[0]))  # `_clip_gradients` makes all of them NaN or none

        def scalars(dtype: str) -> tuple[Tensor, ...]:
            # Not `cast` for the betas, which would round a Python number to float32 first.
            betas = [ops.convert_to_tensor(beta, dtype) for beta in (self.beta_1, self.beta_2)]
            corrections = (1 - ops.power(beta, ops.cast(self.taken, dtype)) for beta in betas)
            return taken, ops.zeros((), dtype), ops.cast(learning_rate, dtype), *corrections

        dtypes = {keras.backend.standardize_dtype(variable.dtype) for variable in trainable_variables}
        found = {dtype: scalars(dtype) for dtype in sorted(dtypes)}
        self._scalars = found.__getitem__  # Keras would track a dictionary
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        decay = float(self.weight_decay or 0.0) if self._use_weight_decay(variable) else 0.0
        constants = (float(self.beta_1), float(self.beta_2), float(self.epsilon), decay)
        values = (ops.cast(gradient, dtype), *map(ops.convert_to_tensor, (first, second, variable)))
        changes = _changes_of(dtype, constants)(*values, *self._scalars(dtype))
        for target, change in zip((first, second, variable), changes, strict=True):
            if keras.backend.backend() == "tensorflow":
                change.set_shape(target.shape)
            self.assign_add(target, change)


def _changes(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    value: Tensor,
    taken: Tensor,
    zero: Tensor,
    rate: Tensor,
    first_correction: Tensor,
    second_correction: Tensor,
    *,
    constants: tuple[float, float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """A step's changes of the moments and value of a variable. constants: the betas, epsilon, the weight decay."""
    beta_1, beta_2, epsilon, decay = constants
    to_first, to_second = (gradient - first) * (1 - beta_1), (ops.square(gradient) - second) * (1 - beta_2)
    to_first, to_second = ops.where(taken, to_first, zero), ops.where(taken, to_second, zero)
    update = (first + to_first) / first_correction / (ops.sqrt((second + to_second) / second_correction) + epsilon)
    if decay:
        update = update + value * decay
    return to_first, to_second, ops.where(taken, -(rate * update), zero)


@lru_cache(maxsize=32)
def _changes_of(dtype: str, constants: tuple[float, float, float, float]) -> Callable[..., Any]:
    """`_changes`, which TensorFlow traces once instead of once for each variable: half of the time before a first
    step."""
    changes = partial(_changes, constants=constants)
    if keras.backend.backend() != "tensorflow":
        return changes
    import tensorflow as tf

    arrays = [tf.TensorSpec(None, dtype)] * 4
    scalars = [tf.TensorSpec((), "bool"), *[tf.TensorSpec((), dtype)] * 4]
    return tf.function(changes, input_signature=[*arrays, *scalars], autograph=False)


@keras.saving.register_keras_serializable(package="groupvit")
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's scaling of float16's loss around `AdamW`, for strategies too.

    The scale follows from the gradients' sum over the replicas, not from each one's own: it is the same on all.
    """

    def __init__(self, inner_optimizer: AdamW, initial_scale: float = 2.0**16, **options: Any) -> None:
        super().__init__(inner_optimizer, initial_scale=initial_scale, **options)
        inner_optimizer.adds_replicas = False

    def scale_loss(self, loss: Tensor) -> Tensor:
        return super().scale_loss(_or_nan(loss))

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply(sum_replicas(grads), trainable_variables)


def _or_nan(loss: Tensor) -> Tensor:
    """Returns the loss to take gradients of: a finite gradient of a loss that is not must not lead to a step."""
    return loss * ops.where(ops.isfinite(loss), ops.ones_like(loss), ops.full_like(loss, math.nan))


def sum_replicas(gradients: Any) -> list[Any]:
    """Sums gradients over the replicas, as plain tensors: TensorFlow has an embedding's as slices."""
    if keras.backend.backend() != "tensorflow":
        return list(gradients)
    import tensorflow as tf

    return [None if gradient is None else replica_sum(tf.convert_to_tensor(gradient)) for gradient in gradients]


@keras.saving.register_keras_serializable(package="groupvit")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A recipe's learning rate: a table of `learning_rate_at`, since a graph could not compute the very same numbers.

    Args:
        rates: of each step in order; the last one stays.
    """

    def __init__(self, rates: Any) -> None:
        self.rates = np.asarray(rates, np.float64)

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        return cls([learning_rate_at(recipe, step) for step in range(recipe.schedule.total_steps)])

    def __call__(self, step: Tensor) -> Tensor:
        table = ops.convert_to_tensor(self.rates.astype(keras.config.floatx()))
        return ops.take(table, ops.minimum(ops.cast(step, "int32"), len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        return {"rates": self.rates.tolist()}


def make_optimizer(objective: Objective) -> AdamW | LossScale:
    """Returns AdamW with the recipe's schedule, clipping and weight decay, and a loss scale for float16."""
    settings = objective.recipe.optimizer
    optimizer = AdamW(
        Schedule.of(objective.recipe),
        weight_decay=settings.weight_decay,
        beta_1=settings.betas[0],
        beta_2=settings.betas[1],
        epsilon=settings.epsilon,
        global_clipnorm=settings.clip_norm or None,
    )
    named = objective.named_variables()
    free = [v for name, v in named.items() if v.trainable and not has_weight_decay(name, len(v.shape))]
    optimizer.exclude_from_weight_decay(free)
    whole = LossScale(optimizer) if objective.compute_dtype == "float16" else optimizer
    # Now, since `fit` would trace its graph a second time for variables made in the first.
    whole.build(objective.trainable_variables)
    return whole


def adamw_of(optimizer: Any) -> AdamW | None:
    """Returns the `AdamW` in an optimizer, None if it is another one."""
    found = getattr(optimizer, "inner_optimizer", optimizer)
    return found if isinstance(found, AdamW) else None


def has_overflowed(optimizer: Any, loss: float) -> bool:
    """True if a step was skipped since float16 could not hold the gradient at its scale: no fault of the batch."""
    return isinstance(optimizer, LossScale) and math.isfinite(loss) and np.asarray(optimizer.dynamic_scale).item() > 1.0


# Tracing all variables takes as long as some hundred updates without.
_UPDATES_BEFORE_TRACING = 20


class EMA(keras.callbacks.Callback):
    """An exponential moving average of a model's weights and batch-norm statistics over the steps of `fit`.

    Args:
        model: whose weights: a `GroupViTModel`, which may be a part of what `fit` trains, or an `Objective`.
        decay_at: step 0, 1, ... -> the fraction that the average keeps of itself, such as `partial(ema_decay_at,
            recipe)`.
    """

    def __init__(self, model: Trained, decay_at: Callable[[int], float]) -> None:
        super().__init__()
        self.source = model_of(model)
        self.decay_at = decay_at
        named = variables_of(model)
        self.variables = {name: v for name, v in named.items() if keras.backend.is_float_dtype(v.dtype)}
        self.counters = {name: v for name, v in named.items() if name not in self.variables}
        with quick_variables():
            self.averages = {name: _average_of(variable) for name, variable in self.variables.items()}
        self._updates = 0
        self._move = self._moved

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not (logs or {}).get("skipped"):
            self.update(np.asarray(self.model.optimizer.iterations).item() - 1)

    def update(self, step: int) -> None:
        """Moves the average towards the weights after a step."""
        self._updates += 1
        if self._updates == _UPDATES_BEFORE_TRACING and keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._move = tf.function(self._moved, autograph=False)
        self._move(np.float64(1.0 - self.decay_at(step)))

    def _moved(self, fraction: Any) -> None:
        fractions = {dtype: ops.cast(fraction, dtype) for dtype in {each.dtype for each in self.averages.values()}}
        for name, average in self.averages.items():
            old, value = ops.convert_to_tensor(average), ops.cast(self.variables[name], average.dtype)
            average.assign(old + (value - old) * fractions[average.dtype])

    def arrays(self) -> Arrays:
        """Returns everything by canonical name, as files have it."""
        return to_arrays({**self.averages, **self.counters}, self.variables)

    def new_model(self) -> GroupViTModel:
        """Returns a float32 model with the averaged weights."""
        return GroupViTModel.from_arrays(self.source.config, self.arrays(), dtype="float32")


def _average_of(variable: Any) -> Any:
    dtype = wide_dtype(variable.dtype)
    return keras.Variable(np.asarray(variable).astype(dtype), trainable=False, dtype=dtype)


def to_arrays(variables: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> Arrays:
    """Returns values as files have them. like: the variables whose kinds say how they are laid out."""
    found = {}
    for name, variable in variables.items():
        array = np.asarray(variable)
        array = array.astype(np.int64) if array.dtype.kind == "i" else array
        found[name] = to_canonical(kind((like or {}).get(name, variable)), array)
    return found
