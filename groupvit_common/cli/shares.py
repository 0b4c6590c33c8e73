"""The share of one process in a command's inputs, and results that are there already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from groupvit_common.cli import terminal
from groupvit_common.cli.terminal import OK, SOME_FAILED
from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import write_texts

T = TypeVar("T")

# What torchrun sets for each process that it starts.
_TORCHRUN = "TORCHELASTIC_RUN_ID"
# What a process leaves beside its results until all have ended.
_REPORT = ".groupvit-segment-{}-of-{}.json"


@dataclass(frozen=True)
class Share:
    """This process among those that divide the inputs, by number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """Returns the share that `torchrun`, or whoever sets RANK and WORLD_SIZE, gives this process.

        Raises:
            InputError: they are no such numbers.
        """
        values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        if not values["WORLD_SIZE"] or values["WORLD_SIZE"] == "1":
            return cls()
        try:
            rank, world = int(values["RANK"]), int(values["WORLD_SIZE"])
        except ValueError:
            rank, world = -1, 0
        if not 0 <= rank < world:
            given = " and ".join(f"{name}={value!r}" for name, value in values.items())
            raise InputError(
                f"the environment has {given}: to divide the work, set RANK to 0, 1, ... and WORLD_SIZE to their "
                "number; else neither"
            )
        return cls(rank, world)

    def of(self, inputs: Sequence[T]) -> list[T]:
        """Returns the inputs of this process, every `world`-th."""
        return list(inputs[self.rank :: self.world])

    @property
    def name(self) -> str:
        """The process's name for people."""
        return f"rank {self.rank} of {self.world}"

    def begin(self, out: Path | None) -> None:
        """Removes what this process left of an earlier run."""
        if self.world > 1 and out is not None:
            (out / _REPORT.format(self.rank, self.world)).unlink(missing_ok=True)

    def end(self, out: Path | None, counts: Mapping[str, int], code: int) -> int:
        """Prints the counts of this process; the last of all to end prints their sums as well.

        No process waits for another: they need not run at the same time, nor know each other, but share `out`.

        Returns:
            The exit code of the process: its own. But `torchrun` ends all processes when one fails, and a damaged image
            of one is no reason to: there the last one alone fails, for all of them.
        """
        if self.world == 1:
            return code
        terminal.note(f"{self.name}: {_in_words(counts)}")
        sums = None if out is None else self._sums(out, counts)
        if sums is not None:
            terminal.note(f"all {self.world} ranks: {_in_words(sums)}")
        if _TORCHRUN not in os.environ:
            return code
        return OK if sums is None or not sums["failed"] else SOME_FAILED

    def _sums(self, out: Path, counts: Mapping[str, int]) -> dict[str, int] | None:
        """Leaves the counts of this process; returns the sums if all others have left theirs."""
        reports = [out / _REPORT.format(rank, self.world) for rank in range(self.world)]
        try:
            write_texts(out, {reports[self.rank].name: json_text(dict(counts))})
            if not all(report.is_file() for report in reports):
                return None
            every = [read_json(report) for report in reports]
            for report in reports:
                report.unlink()
        except (GroupViTError, OSError):
            # A full disk, or another process that prints the sums.
            return None
        return {name: sum(int(each.get(name, 0)) for each in every) for name in counts}


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def is_done(source: Path, files: Iterable[Path], record: Path, labels: Iterable[str]) -> bool:
    """Returns whether the files of an input are there whole: all of them, and a record of this source, with these
    labels, without a fault.

    Files of an input are written together, so that those of a killed run are all there or none.
    """
    if not all(os.path.exists(path) for path in (*files, record)):  # noqa: PTH110
        return False
    try:
        content: Any = json.loads(record.read_bytes())
        names = {each["name"] for each in content["labels"]}
        return (
            content["source"] == str(source)
            and content.get("fault") is None
            and names - {"background"} == set(labels) - {"background"}
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False
