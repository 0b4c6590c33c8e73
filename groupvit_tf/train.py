"""Training with `fit`: a recipe -> captioned images -> checkpoints, on one device or as many as a strategy has.

    groupvit train scenes-demo --out DIR --backend tf

The same batches, schedule, rules and files as `groupvit_torch.train`, and either resumes the other's run. Its parts
serve scripts: `Trainer` (what `fit` trains), `make_optimizer`, `Schedule`, the callbacks, `groupvit_tf.data.dataset`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.training.checkpoints import restoring
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import Run, TrainResult
from groupvit_common.training.schedule import assigns_hard, ema_decay_at
from groupvit_common.training.start import start_run
from groupvit_common.training.validation import Evaluate
from groupvit_tf.callbacks import (
    Checkpoint,
    Evaluation,
    GroupingMeasures,
    HardAssignment,
    RunCheckpoint,
    RunProgress,
    StopOnBadSteps,
)
from groupvit_tf.checkpoint import canonical_variables, is_parameter
from groupvit_tf.chunks import cached_backward, check_chunks
from groupvit_tf.data import Feed, dataset
from groupvit_tf.distributed import ProcessInfo, as_logs, here, num_replicas
from groupvit_tf.layers import Tensor
from groupvit_tf.model import GroupViTModel
from groupvit_tf.objective import Objective, new_model, start_model
from groupvit_tf.optimizer import EMA, AdamW, LossScale, Schedule, adamw_of, make_optimizer
from groupvit_tf.train_state import TrainState

__all__ = [
    "EMA", "AdamW", "Checkpoint", "Evaluation", "GroupingMeasures", "HardAssignment", "LossScale", "MeanWeights",
    "Objective", "Schedule", "StopOnBadSteps", "Trainer", "make_optimiser", "make_optimizer", "new_model",
    "start_model", "train",
]  # fmt: skip

# Earlier spellings.
MeanWeights = EMA
make_optimiser = make_optimizer


def train(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    resume: str | Path = "never",
    evaluate: Evaluate | None = None,
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes it to `out_dir`: a model directory, `training.json`, `metrics.jsonl`, `checkpoints/`.

    On all GPUs of the machine, or those of all workers that `TF_CONFIG` names, or in the scope of a strategy on its
    devices.

    Args:
        recipe: settings, or what `groupvit_common.training.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        resume: "never"; "auto": from the newest valid checkpoint in `out_dir` if there is one; or a checkpoint's path.
        evaluate: measures a `Segmenter` of the model now and then; the validation scenes are measured anyway in a run
            on scenes.
        log: receives one line at a time, on the first process.

    Raises:
        InputError: an unknown name, a directory that cannot be made, a setting that Keras has no way to follow, an
            unfinished run in `out_dir`.
        CheckpointError: a checkpoint that cannot be resumed or started from, or no room for the last one.
        Interrupted: SIGTERM or Ctrl-C; the state of the run is saved.
        GroupViTError: losses or gradients are no longer finite.
    """
    process = here()
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    _check(recipe, process)
    run = start_run(
        recipe,
        out_dir,
        seed=seed,
        log=log,
        backend=f"Keras {keras.__version__} on {keras.backend.backend()}",
        threads=os.cpu_count() or 1,
        rank=process.rank,
        world=process.world,
        resume=resume,
        evaluate=evaluate,
    )
    try:
        return _fit(run, process)
    finally:
        run.close()


def _check(recipe: Recipe, process: ProcessInfo) -> None:
    """Raises InputError for what this backend has no way to do."""
    batch_size, replicas = recipe.schedule.batch_size, process.replicas
    if batch_size % replicas:
        raise InputError(
            f"schedule.batch_size must be a multiple of the number of devices, got {batch_size} for {replicas}"
        )
    if recipe.run.compile and replicas > 1:
        raise InputError(
            "run.compile needs a single device with Keras: XLA does not compile a strategy's collectives; "
            "set it to false"
        )
    check_chunks(recipe)


def _fit(run: Run, process: ProcessInfo) -> TrainResult:
    """One process of a run, from the first step to the last."""
    recipe = run.recipe
    keras.utils.set_random_seed(recipe.run.seed)
    with process.scope():
        trainer = new_trainer(run)
    ema = EMA(trainer, partial(ema_decay_at, recipe)) if recipe.optimizer.ema_decay else None
    state = TrainState(trainer, ema)
    if run.resumed is not None:
        assert run.resumed_from is not None
        with restoring(run.resumed_from):
            ranks = run.resumed.values["ranks"]
            own = ranks[run.rank] if len(ranks) == run.world else {}
            state.restore(run.resumed, run.resumed_from, own)
        trainer.assign_hard = assigns_hard(recipe, run.step)

    def measure(segmenter: Any) -> Mapping[str, float]:
        run.measure_and_save(state.save_pretrained, segmenter, process)
        progress.measured()
        return run.validation.latest()

    def measures_now(step: int) -> bool:
        return run.evaluates_now() and run.measures_here

    evaluation = Evaluation(measure, run.processor, every=measures_now, average=ema, log=lambda line: None)
    if run.resumed is None and run.rank == 0:
        evaluation.set_model(trainer)
        run.measure_untrained(evaluation.segmenter(), trainer.model.num_parameters())
    feed = Feed(run.stream())
    progress = RunProgress(run, feed)
    own_callbacks = [HardAssignment(recipe), evaluation, RunCheckpoint(run, feed, progress, ema)]
    callbacks = [progress, *([] if ema is None else [ema]), *own_callbacks]
    try:
        if not run.finished:
            with process.scope():
                batches = dataset(lambda: feed, recipe)
            steps = recipe.schedule.total_steps - run.step
            # Outside the scope: the model that is measured is no business of the other processes.
            with run.signal_handlers():
                trainer.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=callbacks)
    finally:
        feed.close()
        progress.close()
    return run.result()


def new_trainer(run: Run) -> Trainer:
    """Returns the compiled trainer of a run at its start."""
    model, scale = start_model(run.recipe, run.processor)
    trainer = Trainer(model, run.recipe, scale)
    compiled = run.recipe.run.compile or keras.backend.backend() == "jax"
    trainer.compile(make_optimizer(trainer), jit_compile=compiled)
    return trainer


class Trainer(Objective):
    """An objective for `fit` on batches of `groupvit_tf.data.dataset`: `compile` it without a loss.

    It trains `model` itself, which is used and saved as ever. A step reports, beside `loss`, `gradient_norm` before
    clipping and `skipped`: 1 if the loss or the gradient was not finite, in which case nothing has changed, batch
    norm's statistics included. With the recipe's `run.chunk_size`, the towers have so many images of a replica in
    memory at a time (TensorFlow only).

    Args:
        multi_label_scale: logarithm of the multi-label loss's own temperature factor at the start; None: that of the
            model.

    Raises:
        InputError: a `run.chunk_size` on another backend of Keras.
    """

    def __init__(self, model: GroupViTModel, recipe: Recipe, multi_label_scale: float | None = None) -> None:
        check_chunks(recipe)
        super().__init__(model, recipe, multi_label_scale)

    def train_step(self, *arguments: Any) -> Any:
        """Takes a step, or leaves everything as it is. Keras calls this."""
        if keras.backend.backend() == "jax":
            return self._pure_step(*arguments)
        adamw = adamw_of(self.optimizer)
        if adamw is None:
            return self._step(*arguments)
        statistics = [(variable, ops.copy(variable)) for variable in self._statistics()]
        before = ops.copy(adamw.taken)
        logs = self._step(*arguments)
        taken = ops.greater(adamw.taken, before)
        for variable, value in statistics:
            variable.assign(ops.where(taken, variable, value))
        return logs | as_logs(_verdict(taken, adamw.gradient_norm))

    def _step(self, data: Any) -> dict[str, Any]:
        """The step of TensorFlow: Keras's own, or one with cached features."""
        inputs, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        chunk, images = self.recipe.run.chunk_size, inputs["pixel_values"]
        # A strategy's data sets leave sizes open.
        count = images.shape[0] or self.recipe.schedule.batch_size // num_replicas()
        if not 0 < chunk < count:
            logs: dict[str, Any] = super().train_step(data)
            return logs
        embeddings, loss, gradients = cached_backward(self, inputs, chunk)
        self._loss_tracker.update_state(loss * num_replicas(), sample_weight=ops.shape(images)[0])
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(inputs, y, embeddings, sample_weight)

    def _pure_step(self, state: Any, data: Any) -> Any:
        """The step of JAX, which is given all variables' values and returns the new ones."""
        logs, after = super().train_step(state, data)
        adamw = adamw_of(self.optimizer)
        if adamw is None:
            return logs, after
        at = {id(variable): place for place, variable in enumerate(self.optimizer.variables)}
        count = at[id(adamw.taken)]
        taken = after[2][count] > state[2][count]
        changed = {id(variable) for variable in self._statistics()}
        fixed = [
            ops.where(taken, new, old) if id(variable) in changed else new
            for variable, new, old in zip(self.non_trainable_variables, after[1], state[1], strict=True)
        ]
        norm = after[2][at[id(adamw.gradient_norm)]]
        return logs | _verdict(taken, norm), (after[0], fixed, *after[2:])

    def _statistics(self) -> list[Any]:
        """Statistics of batch norms."""
        return [v for name, v in canonical_variables(self.model).items() if not is_parameter(name)]


def _verdict(taken: Tensor, norm: Tensor) -> dict[str, Tensor]:
    norm = ops.where(taken, norm, ops.full_like(norm, math.nan))
    return {"gradient_norm": norm, "skipped": 1.0 - ops.cast(taken, "float32")}
