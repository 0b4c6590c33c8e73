"""Where a training run stands, on disk: checkpoints that are whole or not there, of which the newest valid one is continued.

    DIR/checkpoints/step-00002500/
        model/               a model directory: what `from_pretrained` of either backend loads, with its processor
        state.safetensors    what else consists of numbers: the optimizer's moments, random states, ...
        state.json           everything else, and size and checksum of each file

A checkpoint is written under a hidden name and renamed when all of it is on the disk, so that a process killed at any moment leaves
at most a hidden folder, which the next one removes. A checkpoint that a faulty disk or a careless hand has changed is found by its
checksums and passed over for the one before. No file is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from groupvit_common.checkpoint import array_info, read_arrays, read_header, write_arrays
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.files import flush

FOLDER = "checkpoints"
MODEL = "model"
STATE_NAME = "state.json"
ARRAYS_NAME = "state.safetensors"
VERSION = 1

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on as if it had never stopped, besides the weights in the model directory.

    step: how many were taken; values: of JSON; arrays: by name; measure: how good the model was found, if it was (more is better).
    """

    step: int
    values: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    measure: float | None = None


class Checkpoints:
    """Those of one run.

    Args:
        directory: of the run. keep: how many of the newest stay. keep_best: the one with the highest measure stays too.
        log: is told what was found damaged.
    """

    def __init__(
        self, directory: Path, *, keep: int = 3, keep_best: bool = True, log: Callable[[str], None] = print
    ) -> None:
        self.folder = directory / FOLDER
        self.keep = keep
        self.keep_best = keep_best
        self.log = log

    def all(self) -> list[Path]:
        """The checkpoints there are, valid or not, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _STEP.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        """The newest valid checkpoint. Says which are passed over, and why."""
        for path in reversed(self.all()):
            try:
                check(path)
            except CheckpointError as error:
                self.log(f"passing over a damaged checkpoint: {error}")
                continue
            return path
        return None

    def clean(self) -> None:
        """Removes what a killed process left of a checkpoint that it was writing or removing. Only one process may write a run."""
        if self.folder.is_dir():
            for path in self.folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state: RunState, write_model: Callable[[Path], None]) -> Path:
        """Writes a checkpoint and removes those that need not stay; on failure nothing has changed.

        Args:
            write_model: writes the model and its processor into a directory.

        Raises:
            CheckpointError: it cannot be written: a full disk, a folder that is read-only.
        """
        path = self.folder / f"step-{state.step:08d}"
        hidden = self.folder / f".{path.name}.{secrets.token_hex(4)}"
        try:
            (hidden / MODEL).mkdir(parents=True)
            write_model(hidden / MODEL)
            if state.arrays:
                infos = {name: array_info(array.shape, array.dtype.name) for name, array in state.arrays.items()}
                write_arrays(hidden / ARRAYS_NAME, infos, lambda name: state.arrays[name])
            content = {
                "version": VERSION,
                "step": state.step,
                "measure": state.measure,
                "values": state.values,
                "files": {name: _fingerprint(hidden / name) for name in _files(hidden)},
            }
            text = json.dumps(content)
            (hidden / STATE_NAME).write_text(f"{zlib.crc32(text.encode()):08x} {text}\n", encoding="utf-8")
            for place in (*(hidden / name for name in _files(hidden)), hidden / MODEL, hidden):
                flush(place)
            self._remove(path)  # a damaged one that was passed over, else there is none
            hidden.rename(path)
            flush(self.folder)
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            reason = error if isinstance(error, CheckpointError) else error.strerror or error
            raise CheckpointError(f"the checkpoint {path} cannot be written: {reason}") from error
        self._rotate()
        return path

    def _rotate(self) -> None:
        there = self.all()
        best = max(((measure, path) for path in there if (measure := _measure(path)) is not None), default=None)
        for path in there[: -self.keep]:
            if not (self.keep_best and best is not None and path == best[1]):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """A checkpoint disappears at once; its files after that."""
        if not path.exists():
            return
        gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):  # it stays: a pity, no reason to stop
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load(path: Path) -> RunState:
    """The state of a checkpoint, which is checked first.

    Raises:
        CheckpointError: it is not there, not whole, or of a later version of this package.
    """
    content = check(path)
    arrays = path / ARRAYS_NAME
    names = read_header(arrays).tensors if arrays.exists() else {}
    read = dict(read_arrays(arrays, names)) if names else {}
    return RunState(content["step"], content["values"], read, content["measure"])


def check(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, if all its files are as they were written."""
    content = _content(path)
    if content["version"] > VERSION:
        raise CheckpointError(f"{path} was written by a later version of this package; continue the run with that one")
    for name, fingerprint in content["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        size = file.stat().st_size
        if size != fingerprint[0]:
            raise CheckpointError(f"{file} has {size} bytes, expected {fingerprint[0]}")
        if _fingerprint(file) != fingerprint:
            raise CheckpointError(f"{file} is not what was written: its checksum differs")
    return content


def find(directory: Path, resume: str | Path, *, log: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to continue from.

    Args:
        directory: of the run. resume: "never"; "auto", the newest valid one if there is any; or a checkpoint's path.

    Raises:
        CheckpointError: the path is no valid checkpoint. InputError: "never", but an unfinished run is in the folder.
    """
    checkpoints = Checkpoints(directory, log=log)
    if str(resume) == "auto":
        return checkpoints.newest()
    if str(resume) != "never":
        if not Path(resume).is_dir():
            raise CheckpointError(f"there is no checkpoint {resume} to continue: give never, auto or the folder of one")
        check(Path(resume))
        return Path(resume)
    newest = checkpoints.newest()
    if newest is not None and not _content(newest)["values"].get("finished"):
        raise InputError(
            f"{directory} holds an unfinished run at step {_content(newest)['step']}: continue it with --resume auto "
            '(resume="auto"), or choose another folder'
        )
    return None


def _content(path: Path) -> dict[str, Any]:
    file = path / STATE_NAME
    try:
        checksum, _, text = file.read_text(encoding="utf-8").rstrip("\n").partition(" ")
        if checksum != f"{zlib.crc32(text.encode()):08x}":
            raise CheckpointError(f"{file} is not what was written: its checksum differs")
        content: dict[str, Any] = json.loads(text)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return content


def _measure(path: Path) -> float | None:
    try:
        measure = _content(path)["measure"]
    except CheckpointError:
        return None
    return measure if measure is not None and math.isfinite(measure) else None


def _files(directory: Path) -> Iterator[str]:
    """The files below a directory, as paths within it."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix()


def _fingerprint(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
