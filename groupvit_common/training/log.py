"""The log of a training run: lines, a file of records, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.json_text import parse_json
from groupvit_common.storage.saving import write_files, write_text
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.settings import to_table

RECORDS_NAME = "metrics.jsonl"


class RunLog:
    """The log of one run, in its folder.

    Args:
        step: at which the run begins; records of later steps, from before it was killed, are removed.
        log: receives one line at a time.

    Raises:
        InputError: the recipe wants TensorBoard or Weights & Biases, which is not installed.
    """

    def __init__(self, recipe: Recipe, directory: Path, *, step: int, log: Callable[[str], None] = print) -> None:
        self.recipe = recipe
        self.log = log
        self.path = directory / RECORDS_NAME
        _remove_later_records(self.path, step)
        self.writers: list[Any] = []
        if recipe.run.tensorboard:
            self.writers.append(_TensorBoard(directory / "tensorboard"))
        if recipe.run.wandb:
            self.writers.append(_WandB(recipe, directory))
        self.start(step)

    def start(self, step: int) -> None:
        """Starts the clock: time between steps, such as that of an evaluation, does not count."""
        self.since, self.since_step = time.monotonic(), step

    def progress(self, step: int, values: Mapping[str, float], *, flops: float, peak: float) -> None:
        """Writes a line and a record of the steps since the last ones.

        Args:
            values: "loss", "learning_rate", ...
            flops: floating-point operations of a step; 0: unknown.
            peak: floating-point operations a second of all devices together; 0: unknown.
        """
        schedule = self.recipe.schedule
        seconds = (time.monotonic() - self.since) / max(step - self.since_step, 1)
        values = {**values, "images_per_second": schedule.batch_size / seconds if seconds > 0 else math.nan}
        if flops and peak and seconds > 0:
            values["utilisation"] = flops / seconds / peak
        left = seconds * (schedule.total_steps - step)
        line = [f"step {step}/{schedule.total_steps}", f"loss {values['loss']:.3f}"]
        if "learning_rate" in values:
            line.append(f"lr {values['learning_rate']:.2g}")
        line.append(f"{values['images_per_second']:.4g} images/s")
        if "utilisation" in values:
            line.append(f"{values['utilisation']:.0%} of peak")
        if "groups_in_use" in values:
            line.append(f"{values['groups_in_use']:.3g} groups in use")
        line.append(f"{duration(left)} left")
        self.log("  ".join(line))
        self.record(step, values)
        self.start(step)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step to the file, TensorBoard and Weights & Biases."""
        text = json.dumps({"step": step, **{name: _plain(value) for name, value in values.items()}})
        # A full disk is reported with the next checkpoint, and is no reason to end training.
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def duration(seconds: float) -> str:
    """Returns "5 s", "12 min", "3:05 h", "2 d 3 h"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60}:{minutes % 60:02d} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _remove_later_records(path: Path, step: int) -> None:
    """Keeps the records of a file up to a step; drops other lines, such as what a killed process left unfinished."""
    if not path.exists():
        return
    kept = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if step and line.endswith("\n") and 0 <= _step_of(line, path) <= step:
                    kept.append(line)
        write_files(path.parent, {path.name: lambda place: write_text(place, "".join(kept))})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be resumed: {error.strerror or error}") from error


def _step_of(line: str, path: Path) -> int:
    """Returns the step of a record; -1 if the line is no record."""
    try:
        step = parse_json(line, path).get("step")
    except CheckpointError:
        return -1
    return step if isinstance(step, int) and not isinstance(step, bool) else -1


def _plain(value: float) -> float | str:
    """Returns a JSON value: that format has no infinities."""
    return float(value) if math.isfinite(value) else str(float(value))


class _TensorBoard:
    def __init__(self, directory: Path) -> None:
        if "tensorflow" not in sys.modules:
            # TensorBoard's own switch: with this module it does without TensorFlow, which takes seconds and GPU memory.
            sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise InputError('run.tensorboard needs TensorBoard: pip install "groupvit[train]"') from error
        self.writer = Writer(str(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, recipe: Recipe, directory: Path) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise InputError("run.wandb needs Weights & Biases: pip install wandb") from error
        # One run there for one folder here, also after an interruption.
        place = f"{directory.name}-{zlib.crc32(str(directory.resolve()).encode()):08x}"
        self.run = wandb.init(
            project=recipe.run.wandb, name=directory.name, id=place, resume="allow", dir=str(directory),
            config=to_table(recipe),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
