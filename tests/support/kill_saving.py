"""Run by test_saving.py in a process of its own, without a framework: saves that are killed at each of their steps.

    python -m tests.support.kill_saving DIRECTORY

A save is a fork of this process that ends at its n-th call of the system, as if by SIGKILL: nothing is cleaned. Prints
one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from groupvit_common.storage import saving

SHARDED = ("model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json")
MARKED = tuple(name.replace("model-", "model-0123abcd-") for name in SHARDED)
SINGLE = ("model.safetensors", "config.json")
STEPS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "chmod")


def save(directory: Path, names: tuple[str, ...], content: str) -> None:
    writers = {name: partial(saving.write_text, text=content) for name in names}
    saving.write_files(directory, writers, family="weights")


def found(directory: Path) -> dict[str, str]:
    with saving.read_lock(directory) as held:
        return {path.name: path.read_text() for path in held.iterdir() if not path.name.startswith(".")}


def killed_at(step: int, directory: Path, names: tuple[str, ...]) -> bool:
    """Returns whether a save was killed at that step; it may have fewer."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = step

    def counted(real, *args, **options):
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*args, **options)

    try:
        for name in STEPS:
            setattr(os, name, partial(counted, getattr(os, name)))
        save(directory, names, "new")
        os._exit(0)
    finally:
        os._exit(1)


def main(directory: Path) -> None:
    wrong, outcomes = [], set()
    for before, after in ((SHARDED, MARKED), (SHARDED, SINGLE), (SINGLE, SHARDED)):
        old, new = dict.fromkeys(before, "old"), dict.fromkeys(after, "new")
        step = 0
        while True:
            place = directory / f"{len(before)}-{len(after)}-{after[0]}-{step}"
            place.mkdir()
            save(place, before, "old")
            if not killed_at(step, place, after):
                break
            now = found(place)
            outcomes.add("old" if now == old else "new" if now == new else "mixed")
            if now not in (old, new):
                wrong.append([place.name, now])
            # The next save leaves nothing of it.
            save(place, SINGLE, "last")
            if {path.name: path.read_text() for path in place.iterdir()} != dict.fromkeys(SINGLE, "last"):
                wrong.append([place.name, sorted(path.name for path in place.iterdir())])
            step += 1
        if found(place) != new:
            wrong.append([place.name, found(place)])
    print(json.dumps({"wrong": wrong, "outcomes": sorted(outcomes)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
