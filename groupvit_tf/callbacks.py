"""Callbacks of `fit`: those of scripts, which `groupvit_tf.train.train` uses too, and the two that know its run.

`fit` owns the loop here; in `groupvit_torch.train` the loop itself does these things, so that backend has no such file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import CheckpointError
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.training.checkpoints import RESTORE_VALUES, Arrays, Checkpoints, RunState, load, restoring
from groupvit_common.training.grouping_health import IMAGES_WATCHED, watch_grouping
from groupvit_common.training.initial_model import MULTI_LABEL_SCALE
from groupvit_common.training.log import RunLog
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.run import Run
from groupvit_common.training.schedule import assigns_hard, learning_rate_at
from groupvit_common.training.validation import Evaluate
from groupvit_tf.data import Feed, inputs
from groupvit_tf.distributed import ProcessInfo, process_of
from groupvit_tf.model import GroupViTModel
from groupvit_tf.objective import Objective, Trained, model_of
from groupvit_tf.optimizer import EMA, LossScale, has_overflowed
from groupvit_tf.predictor import Segmenter
from groupvit_tf.train_state import TrainState

Due = int | Callable[[int], bool]
"""A number of steps, 0 being never, or whether something is due after a step."""

_AGREE_EVERY = 10  # steps after which several processes ask each other whether to stop


def _is_due(every: Due, step: int) -> bool:
    return every(step) if callable(every) else every > 0 and step % every == 0


def _steps(module: Any) -> int:
    return int(np.asarray(module.optimizer.iterations))


def _process_of(module: Any) -> ProcessInfo:
    return ProcessInfo(0, 1) if keras.backend.backend() != "tensorflow" else process_of(module.distribute_strategy)


class HardAssignment(keras.callbacks.Callback):
    """Switches a `Trainer` from soft to hard assignment at the recipe's step; the graph is traced once more then."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        hard = assigns_hard(self.recipe, _steps(self.model))
        if hard != self.model.assign_hard:
            self.model.assign_hard = hard
            self.model.make_train_function(force=True)


class GroupingMeasures(keras.callbacks.Callback):
    """Adds measures of the grouping of some images to the logs (`groupvit_common.training.grouping_health`).

    They are there for the callbacks that follow, such as Keras's `TensorBoard`. A collapsed grouping is reported.

    Args:
        pixel_values: `[B, 3, H, W]`, some 32 images.
        every: steps.
    """

    def __init__(self, pixel_values: Any, *, every: Due = 100, log: Callable[[str], None] = print) -> None:
        super().__init__()
        self.pixel_values, self.every, self.log = pixel_values, every, log

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = _steps(self.model)
        if _is_due(self.every, step):
            measures, warnings = measure_grouping(model_of(self.model), self.pixel_values)
            for warning in warnings:
                self.log(f"step {step}: {warning}")
            if logs is not None:
                logs.update(measures)


def measure_grouping(model: GroupViTModel, pixel_values: Any) -> tuple[dict[str, float], list[str]]:
    """Measures every grouping block on some images: the measures, and warnings (`watch_grouping`)."""
    seen = model.vision_model(ops.convert_to_tensor(pixel_values), output_attentions=True, return_dict=True).attentions
    return watch_grouping(np.asarray(ops.cast(assignment, "float32")) for assignment in seen)


class StopOnBadSteps(keras.callbacks.Callback):
    """Ends `fit` after so many steps whose loss or gradient is not finite; `bad_steps` counts them."""

    def __init__(self, most: int = 10, *, log: Callable[[str], None] = print) -> None:
        super().__init__()
        self.most, self.log = most, log
        self.bad_steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        logs = logs or {}
        # The mean loss of several steps stays NaN from the first such step on; `skipped` is of this step.
        loss = float(logs.get("loss", 0.0))
        bad = logs["skipped"] if "skipped" in logs else not math.isfinite(loss)
        if bad and not has_overflowed(self.model.optimizer, loss):
            self.bad_steps += 1
            self.log(f"a loss or gradient is not finite ({self.bad_steps} of at most {self.most} steps)")
            if self.bad_steps >= self.most:
                self.model.stop_training = True


class Evaluation(keras.callbacks.Callback):
    """Measures the model every so many steps, through a `Segmenter` that holds it.

    `measured` has the last measures by name; they are also added to the step's logs, for the callbacks that follow.

    Args:
        measure: more being better, so that the mean can tell which checkpoint is the best.
        every: steps.
        average: the EMA that is measured instead of the weights.
    """

    def __init__(
        self,
        measure: Evaluate,
        processor: GroupViTProcessor,
        *,
        every: Due = 1000,
        average: EMA | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.measure, self.processor, self.every, self.average, self.log = measure, processor, every, average, log
        self.measured: dict[str, float] = {}
        self.step = -1
        self._state: TrainState | None = None

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if self._state is None or self._state.objective is not model:
            self._state = TrainState(model, self.average)

    def segmenter(self) -> Segmenter:
        """Returns a segmenter of the weights that are measured, until the next call gives its model newer ones."""
        assert self._state is not None
        return self._state.segmenter(self.processor)

    def on_train_end(self, logs: Any = None) -> None:
        self._state = None  # and with it the memory of the model that was measured

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = _steps(self.model)
        if _is_due(self.every, step):
            self.measured = dict(self.measure(self.segmenter()))
            self.step = step
            self.log(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in self.measured.items())}")
            if logs is not None:
                logs.update(self.measured)


class Checkpoint(keras.callbacks.Callback):
    """Saves checkpoints of `fit` in a directory's folder `checkpoints/`; `restore` resumes from the newest valid one.

    A checkpoint is whole or absent, and verified when it is read. Its `model/` loads in either backend. What `fit`
    trains is a `Trainer` or a `GroupViTModel`, compiled with `AdamW`. Last of the callbacks.

    Args:
        every: steps.
        minutes: since the last one; 0: never.
        keep: how many of the newest stay.
        processor: saved with the model.
        feed: the data, whose position is saved.
        average: the EMA, which is then the model that is saved.
        evaluation: whose measures decide which is the best, which also stays.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: Due = 1000,
        minutes: float = 0.0,
        keep: int = 3,
        processor: GroupViTProcessor | None = None,
        feed: Feed | None = None,
        average: EMA | None = None,
        evaluation: Evaluation | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.checkpoints = Checkpoints(Path(directory), keep=keep, log=log, required=RESTORE_VALUES)
        self.every, self.minutes, self.log = every, minutes, log
        self.processor, self.feed, self.average, self.evaluation = processor, feed, average, evaluation
        self.last = time.monotonic()
        self.saved = -1

    def restore(self, module: Trained) -> int:
        """Brings what `fit` trains, compiled, to the newest valid checkpoint, and the data if the feed has not begun.

        Returns:
            The steps it had taken; 0 if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints and none is valid.
        """
        self.checkpoints.clean()
        path = self.checkpoints.newest_of_any()
        if path is None:
            return 0
        state = load(path)
        if not module.optimizer.built:
            module.optimizer.build(module.trainable_variables)
        process, ranks = _process_of(module), state.values["ranks"]
        own = ranks[process.rank] if len(ranks) == process.world else {"seeds": [], "data": None}
        with restoring(path):
            TrainState(module, self.average).restore(state, path, own)
            if self.feed is not None and own["data"] is not None:
                self.feed.load_state_dict(own["data"])
        self.log(f"resuming from {path} at step {state.step}")
        return state.step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.feed is not None:
            self.feed.done()
        step = _steps(self.model)
        late = bool(self.minutes) and _process_of(self.model).any((time.monotonic() - self.last) / 60 >= self.minutes)
        if late or _is_due(self.every, step):
            try:
                self._save(step)
            except CheckpointError as error:
                self.log(f"{error}; the run continues")

    def on_train_end(self, logs: Any = None) -> None:
        step = _steps(self.model)
        if step != self.saved:
            self._save(step)

    def _save(self, step: int) -> bool:
        process, state = _process_of(self.model), TrainState(self.model, self.average)
        data = None if self.feed is None else self.feed.state_dict()
        ranks = process.all({"data": data, **state.random_state()})
        self.last = time.monotonic()
        saved = self._write(step, state, ranks) if process.rank == 0 else True
        self.saved = step
        return saved

    def _write(self, step: int, state: TrainState, ranks: Sequence[Mapping[str, Any]]) -> bool:
        evaluation, measure = self.evaluation, None
        if evaluation is not None and evaluation.step == step:
            measure = float(np.mean(list(evaluation.measured.values())))

        def write(directory: Path) -> None:
            state.save_pretrained(directory)
            if self.processor is not None:
                self.processor.save_pretrained(directory)

        arrays, values = state.state()
        path = self.checkpoints.save(RunState(step, {**values, "ranks": ranks}, arrays, measure), write)
        self.log(f"step {step}: saved {path}")
        return True


# Of a run


class RunProgress(keras.callbacks.Callback):
    """Keeps count of a run's steps and writes its lines and records (`metrics.jsonl`, TensorBoard, Weights & Biases).

    The first of a run's callbacks. Raises GroupViTError after as many bad steps as the recipe allows, their last batch
    saved.
    """

    def __init__(self, run: Run, feed: Feed) -> None:
        super().__init__()
        self.run, self.feed = run, feed
        self.records = RunLog(run.recipe, run.directory, step=run.step, log=run.log) if run.rank == 0 else None
        self.recent: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        run, trainer = self.run, self.model
        arrays = inputs(self.feed.done(), run.recipe)
        loss, norm, skipped = (float(logs[name]) for name in ("loss", "gradient_norm", "skipped"))
        trainer.reset_metrics()  # else Keras reports the mean of the steps so far
        if not skipped:
            self.recent.append(loss)
        if not skipped or has_overflowed(trainer.optimizer, loss):
            run.record_step(loss)
        else:
            run.record_skipped_step(loss, norm, _flat(arrays))
        if isinstance(trainer.optimizer, LossScale):
            # Keras does not count a step that overflows.
            trainer.optimizer.inner_optimizer.iterations.assign(run.step)
        if run.step % run.recipe.run.log_every == 0 or run.finished:
            self._report(trainer, arrays, norm)

    def _report(self, trainer: Objective, arrays: dict[str, Any], norm: float) -> None:
        if self.records is None:
            return
        run = self.run
        values = {
            "loss": float(np.mean(self.recent)) if self.recent else math.nan,
            "learning_rate": learning_rate_at(run.recipe, run.step - 1),
            "gradient_norm": norm,
            "logit_scale": math.exp(np.asarray(trainer.model.logit_scale).item()),
            "bad_steps": run.bad_steps,
        }
        if trainer.multi_label_logit_scale is not None:
            values[MULTI_LABEL_SCALE] = math.exp(np.asarray(trainer.multi_label_logit_scale).item())
        if isinstance(trainer.optimizer, LossScale):
            values["gradient_scale"] = np.asarray(trainer.optimizer.dynamic_scale).item()
        measures, warnings = measure_grouping(trainer.model, arrays["pixel_values"][:IMAGES_WATCHED])
        self.records.progress(run.step, values | measures, flops=0.0, peak=0.0)
        for warning in warnings:
            run.log(f"step {run.step}: {warning}")
        self.recent.clear()

    def measured(self) -> None:
        """Records what the run has just measured."""
        if self.records is not None:
            self.records.record(self.run.step, self.run.validation.latest())
        self.restart_clock()

    def restart_clock(self) -> None:
        """Counts time from here: what is done between steps, such as measuring, is not theirs."""
        if self.records is not None:
            self.records.start(self.run.step)

    def close(self) -> None:
        """Closes the records."""
        if self.records is not None:
            self.records.close()


def _flat(arrays: Mapping[str, Any], before: str = "") -> Arrays:
    """Nested arrays under names such as "captions.input_ids"."""
    found: Arrays = {}
    for name, value in arrays.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


class RunCheckpoint(Checkpoint):
    """Saves a run's checkpoints as its recipe has it, at its end, and at a signal, which then ends the run."""

    def __init__(self, run: Run, feed: Feed, progress: RunProgress, average: EMA | None) -> None:
        super().__init__(run.directory, feed=feed, average=average, log=run.log)
        self.run, self.progress = run, progress

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        run = self.run
        stop, late = self._agree(run.stop_signal, (time.monotonic() - self.last) / 60)
        saved = self._save(run.step) if stop or run.saves_now(late) else False
        if stop and not run.finished:
            raise run.interrupted(stop, saved)

    def on_train_end(self, logs: Any = None) -> None:
        """Does nothing: the last step has saved."""

    def _agree(self, stop: int, minutes: float) -> tuple[int, float]:
        """Returns any process's signal, and the first one's minutes since the last checkpoint: alike on all."""
        process = _process_of(self.model)
        if process.world == 1:
            return stop, minutes
        if self.run.step % _AGREE_EVERY and not self.run.finished:
            return 0, 0.0
        answers = process.all([stop, minutes])
        return max(answer[0] for answer in answers), answers[0][1]

    def _write(self, step: int, state: TrainState, ranks: Sequence[Mapping[str, Any]]) -> bool:
        saved = self.run.save_checkpoint(state.save_pretrained, *state.state(), ranks)
        self.progress.restart_clock()
        return saved
