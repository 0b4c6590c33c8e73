"""A training run apart from its framework: its data, its steps, its files.

A backend's `train` begins with `start_run`, feeds the model with the run's batches, reports each step's loss to it and
hands it the model to measure and save.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import CheckpointError, GroupViTError
from groupvit_common.evaluation.processes import ProcessInfo
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.storage.json_text import finite
from groupvit_common.storage.locks import FolderLock
from groupvit_common.storage.saving import write_files, write_text
from groupvit_common.training.checkpoints import RUN_VALUES, Checkpoints, RunState, restoring
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.scene_batches import SceneBatches, TrainingScenes
from groupvit_common.training.settings import to_table
from groupvit_common.training.validation import Validation

MEASURES_NAME = "training.json"
BAD_BATCH_NAME = "bad_batch.npz"


class Interrupted(GroupViTError):
    """A signal stopped a run, which has saved its state. `rank`: of the process, 0 for the first."""

    def __init__(self, message: str, number: int, rank: int = 0) -> None:
        super().__init__(message)
        self.signal, self.rank = number, rank


class Stream(Protocol):
    """Batches without end that can be resumed: `SceneBatches`, `groupvit_common.data.captions.stream.CaptionStream`."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    mean_iou: level -> mean IoU of the validation scenes in percent, beside that of the untrained model and of the most
    frequent class everywhere. losses: of each step of this process. bad_steps: skipped steps, whose loss or gradient
    was not finite. rank: of this process, 0 for the first.
    """

    directory: Path
    mean_iou: dict[int, float]
    untrained_mean_iou: dict[int, float]
    majority_mean_iou: dict[int, float]
    losses: tuple[float, ...]
    minutes: float
    bad_steps: int = 0
    rank: int = 0


@dataclass
class Run:
    """One process of a training run. Made by `groupvit_common.training.start.start_run`.

    scenes: level -> the synthetic scenes to train on; empty for a run on other data. backend, threads: for the record.
    rank,
    world: of this process, among how many; the first one alone writes and reports. resumed, resumed_from: the
    checkpoint that it continues.
    """

    recipe: Recipe
    directory: Path
    processor: GroupViTProcessor
    validation: Validation
    log: Callable[[str], None]
    started: float
    scenes: Mapping[int, TrainingScenes] = field(default_factory=dict)
    backend: str = ""
    threads: int = 0
    rank: int = 0
    world: int = 1
    lock: FolderLock | None = None
    resumed: RunState | None = None
    resumed_from: Path | None = None
    step: int = 0
    bad_steps: int = 0
    losses: list[float] = field(default_factory=list)
    stop_signal: int = 0

    def close(self) -> None:
        """Lets other trainings write into the folder."""
        if self.lock is not None:
            self.lock.release()

    @property
    def checkpoints(self) -> Checkpoints:
        settings = self.recipe.run
        return Checkpoints(
            self.directory, keep=settings.keep, keep_best=settings.keep_best, log=self.log, required=RUN_VALUES
        )

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.schedule.total_steps

    # Data

    def stream(self) -> Stream:
        """Returns the batches of this process, from the run's position on."""
        recipe = self.recipe
        stream: Stream
        if recipe.data is None:
            stream = SceneBatches(recipe, self.scenes, self.processor, rank=self.rank, world=self.world)
        else:
            from groupvit_common.data.captions.stream import CaptionStream

            stream = CaptionStream(
                recipe.data,
                self.processor,
                batch_size=recipe.schedule.batch_size // self.world,
                seed=recipe.run.seed,
                rank=self.rank,
                world=self.world,
                workers=recipe.run.workers,
            )
        if self.resumed is not None:
            with restoring(self.resumed_from):
                stream.load_state_dict(self._data_state(self.resumed.values["ranks"]))
        return stream

    def _data_state(self, ranks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns this process's position in the data, from those of all processes that the checkpoint has."""
        if len(ranks) == self.world or self.recipe.data is None:
            # On scenes all processes draw the same.
            state: Mapping[str, Any] = ranks[self.rank if len(ranks) == self.world else 0]["data"]
            return state
        epoch = min(rank["data"]["epoch"] for rank in ranks)
        self.log(
            f"the run had {len(ranks)} processes and now has {self.world}: "
            f"data continues from the beginning of epoch {epoch}"
        )
        return {"epoch": epoch}

    # Steps

    def record_step(self, loss: float) -> None:
        """Counts a step."""
        self.losses.append(loss)
        self.step += 1

    def record_skipped_step(self, loss: float, norm: float, batch: Mapping[str, NDArray[Any]]) -> None:
        """Counts a step that changed no weights, since its loss or the norm of its gradient is not finite.

        Args:
            batch: its arrays, saved for inspection when the run ends here.

        Raises:
            GroupViTError: as many steps were skipped as the recipe allows.
        """
        self.record_step(loss)
        self.bad_steps += 1
        cause = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        allowed = self.recipe.run.max_bad_steps
        if self.bad_steps < allowed:
            self.log(f"step {self.step} skipped: {cause} ({self.bad_steps} of at most {allowed})")
            return
        path = self.directory / (BAD_BATCH_NAME if self.world == 1 else f"{self.rank}-{BAD_BATCH_NAME}")
        np.savez(path, allow_pickle=False, **dict(batch))
        raise GroupViTError(
            f"{cause} at step {self.step} ({self.bad_steps} such steps); its batch is in {path}: try a lower "
            f"learning_rate than {self.recipe.optimizer.learning_rate:g} or precision float32; "
            f"what {self.directory} holds is from before"
        )

    def evaluates_now(self) -> bool:
        """Returns whether the model is measured after this step."""
        return self._every(self.recipe.run.evaluate_every) or self.finished

    def saves_now(self, minutes_since: float) -> bool:
        """Returns whether a checkpoint is written after this step. minutes_since: the last one."""
        settings = self.recipe.run
        by_time = bool(settings.save_minutes) and minutes_since >= settings.save_minutes
        return self._every(settings.save_every) or by_time or self.finished

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    # Signals

    @contextmanager
    def signal_handlers(self) -> Iterator[None]:
        """Within, SIGTERM and Ctrl-C set `stop_signal`, so that the run can save and end; a second Ctrl-C ends it at
        once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            self.stop_signal = number
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self, number: int, saved: bool) -> Interrupted:
        """Returns the exception that ends a run which a signal stopped."""
        name = signal.Signals(number).name
        how = "saved; continue with --resume auto" if saved else "not saved"
        return Interrupted(f"stopped by {name} at step {self.step}, {how}", number, self.rank)

    # Measures and files

    def measure_untrained(self, segmenter: BaseSegmenter, parameters: int) -> None:
        """Measures the model before the first step. parameters: its number of trainable values."""
        found = self.validation.measure_untrained(segmenter)
        self.log(f"{parameters / 1e6:.2f} million parameters{found and f'; {found}'}")

    @property
    def measures_here(self) -> bool:
        """True if `measure_and_save` is for this process too: each segments a part of the sets, the rest is the first
        one's."""
        return self.rank == 0 or bool(self.validation.opened)

    def measure_and_save(
        self, write_model: Callable[[Path], None], segmenter: BaseSegmenter, process: ProcessInfo | None = None
    ) -> None:
        """Measures a model through a segmenter that holds it, and writes it with its processor and its measures.

        Args:
            write_model: writes the model into a directory.
            process: this one among those that measure the same model together; None: alone.
        """
        self.validation.measure_sets(segmenter, process, self.step)
        if self.rank:
            return
        self.validation.measure_scenes(segmenter, self.step, self.minutes)
        record = {
            "recipe": to_table(self.recipe),
            "steps": self.step,
            "bad_steps": self.bad_steps,
            "minutes": round(self.minutes, 1),
            "backend": self.backend,
            "threads": self.threads,
            **self.validation.record(),
        }
        text = json.dumps(finite(record), indent=2) + "\n"
        try:
            write_model(self.directory)
            self.processor.save_pretrained(self.directory)
            write_files(self.directory, {MEASURES_NAME: lambda path: write_text(path, text)})
        except CheckpointError as error:
            if self.finished:
                raise
            self.log(f"step {self.step}: the model is not saved, training continues: {error}")

    def save_checkpoint(
        self,
        write_model: Callable[[Path], None],
        arrays: Mapping[str, NDArray[Any]],
        values: Mapping[str, Any],
        ranks: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Writes a checkpoint; returns whether it could. A full disk is reported and ends no run before its last step.

        Args:
            write_model: writes the model into a directory.
            arrays, values: the framework's.
            ranks: of each process, its position in the data under "data", and its other state.
        """

        def write(directory: Path) -> None:
            write_model(directory)
            self.processor.save_pretrained(directory)

        own = {
            "recipe": to_table(self.recipe),
            "finished": self.finished,
            "bad_steps": self.bad_steps,
            "minutes": self.minutes,
            "untrained": self.validation.untrained,
            "measured": self.validation.scenes,
            "ranks": list(ranks),
        }
        score = self.validation.score() if self.evaluates_now() else None  # of this very step
        try:
            path = self.checkpoints.save(RunState(self.step, {**values, **own}, arrays, score), write)
        except CheckpointError as error:
            if self.finished:
                raise
            self.log(f"{error}; training continues")
            return False
        self.log(f"step {self.step}: saved {path}")
        return True

    def result(self) -> TrainResult:
        validation = self.validation
        return TrainResult(
            self.directory,
            validation.scenes,
            validation.untrained,
            validation.majority,
            tuple(self.losses),
            self.minutes,
            self.bad_steps,
            self.rank,
        )
