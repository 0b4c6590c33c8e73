"""Run by test_resume.py in a process of its own: training runs whose disk is full or that are killed.

    python -m tests.support.kill_training DIRECTORY KILLS

A run is a fork of this process, which has loaded everything already. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import groupvit_torch.train  # before anything is forked  # noqa: F401
from groupvit_common.training.checkpoints import Checkpoints
from tests.support.training import quiet, tiny, train

RUN = {"gumbel": True, "hard_from": 0.0, "drop_path": 0.3, "ema_decay": 0.9, "evaluate_every": 8}


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return child


def finish(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def full_disk(directory: Path) -> dict[str, Any]:
    """The limit holds for the first steps."""
    path, lines = directory / "full", directory / "lines"
    recipe = tiny(**{**RUN, "evaluate_every": 0}, save_every=1, log_every=1)
    finish(fork(lambda: train(recipe, directory / "not full", log=quiet)))

    def log(line: str) -> None:
        with lines.open("a") as file:
            file.write(line + "\n")
        if line.startswith("step 4/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        train(recipe, path, log=log)

    finish(fork(work))
    failed = [line for line in lines.read_text().splitlines() if "cannot be written" in line]
    assert all("; training continues" in line for line in failed)
    return {"failed": failed, "left": [hidden.name for hidden in Checkpoints(path).folder.glob(".*")]}


def newest(path: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    there = Checkpoints(path).all()
    return int(there[-1].name.removeprefix("step-")) if there else 0


def kills(directory: Path, wanted: int) -> dict[str, Any]:
    recipe = tiny(**RUN, steps=wanted * 8, save_every=1, keep=3)
    started = time.monotonic()
    finish(fork(lambda: train(recipe, directory / "whole", log=quiet)))
    step = (time.monotonic() - started) / recipe.schedule.total_steps
    path, rng = directory / "killed", random.Random(0)
    folder = Checkpoints(path).folder
    count = {"kills": 0, "while_writing": 0, "truncated": 0}
    while count["kills"] < wanted:
        begun = newest(path)
        child = fork(lambda: train(recipe, path, resume="auto", log=quiet))
        # Every second one when a checkpoint is being written; the others at any moment of a few steps, or before the
        # first one.
        at_any_moment = count["kills"] % 2
        goal = begun + rng.randrange(5)
        while newest(path) < goal:
            time.sleep(0.01)
        if at_any_moment:
            time.sleep(rng.uniform(0.0, step))
        else:
            while not any(folder.glob(".*")):
                time.sleep(0.003)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == -signal.SIGKILL, f"ended with {code} before it was killed"
        count["kills"] += 1
        count["while_writing"] += any(folder.glob(".*"))
        there = Checkpoints(path).all()
        if at_any_moment and len(there) > 1:
            file = rng.choice([there[-1] / "state.safetensors", there[-1] / "model" / "model.safetensors"])
            os.truncate(file, rng.randrange(file.stat().st_size))
            count["truncated"] += 1
    finish(fork(lambda: train(recipe, path, resume="auto", log=quiet)))
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({"full_disk": full_disk(place), "kills": kills(place, number)}))
