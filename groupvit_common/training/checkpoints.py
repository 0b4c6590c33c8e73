"""Checkpoints of a training run: each is complete or absent, and the newest valid one is resumed.

    DIR/checkpoints/step-00002500/
        model/               a model directory: what `from_pretrained` of either backend loads, with its processor
        state.safetensors    other arrays: the optimizer's moments, random states, ...
        state.json           everything else, with the size and checksum of each file

A checkpoint is written under a hidden name and renamed when all of it is on the disk. A process killed at any moment
leaves at most a hidden folder, which the next one removes. A checkpoint that was changed since, by a faulty disk or by
hand, is found by its checksums and skipped for the one before. No file is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from groupvit_common.checkpoints.safetensors_file import array_info, read_arrays, read_header, write_arrays
from groupvit_common.errors import CheckpointError, GroupViTError, InputError
from groupvit_common.storage.json_text import finite, parse_json
from groupvit_common.storage.reading import read_bytes
from groupvit_common.storage.saving import flush

Arrays = dict[str, NDArray[Any]]

FOLDER = "checkpoints"
MODEL = "model"
STATE_NAME = "state.json"
ARRAYS_NAME = "state.safetensors"
VERSION = 1

_STEP = re.compile(r"step-(\d{8,18})")

RUN_VALUES = ("recipe", "finished", "bad_steps", "minutes", "untrained", "measured", "scaler", "ranks")
"""Values that `train` needs to resume."""
RESTORE_VALUES = ("scaler", "ranks")
"""Values that Keras's callback `Checkpoint` needs to restore."""


@dataclass(frozen=True)
class RunState:
    """The state of a run besides the weights in the model directory.

    step: number of steps taken; values: of JSON; arrays: by name; measure: of the model, if it was measured (higher is
    better).
    """

    step: int
    values: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    measure: float | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: of the run.
        keep: number of the newest that stay.
        keep_best: the one with the highest measure stays too.
        log: receives a line about each damaged checkpoint.
        required: values without which a checkpoint counts as damaged.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        keep_best: bool = True,
        log: Callable[[str], None] = print,
        required: Collection[str] = (),
    ) -> None:
        self.folder = directory / FOLDER
        self.keep = keep
        self.keep_best = keep_best
        self.log = log
        self.required = required

    def all(self) -> list[Path]:
        """Returns the checkpoints, valid or not, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _STEP.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        """Returns the newest valid checkpoint; reports those that are skipped, and why."""
        for path in reversed(self.all()):
            try:
                check(path, self.required)
            except CheckpointError as error:
                self.log(f"skipping a damaged checkpoint: {error}")
                continue
            return path
        return None

    def newest_of_any(self) -> Path | None:
        """Returns the newest valid checkpoint; None only where there is no checkpoint at all.

        Raises:
            CheckpointError: there are some, and none is valid.
        """
        path, damaged = self.newest(), self.all()
        if path is None and damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be resumed, and none was removed: "
                "restore one from a copy, or remove that folder to begin anew"
            )
        return path

    def clean(self) -> None:
        """Removes what a killed process left of a checkpoint. One process alone may write a run."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state: RunState, write_model: Callable[[Path], None]) -> Path:
        """Writes a checkpoint, then removes those that need not stay, and later ones; a failure changes nothing.

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
                "measure": finite(state.measure),
                "values": finite(state.values),
                "files": {name: _fingerprint(hidden / name) for name in _files(hidden)},
            }
            text = json.dumps(content)
            (hidden / STATE_NAME).write_text(f"{zlib.crc32(text.encode()):08x} {text}\n", encoding="utf-8")
            for place in (*(hidden / name for name in _files(hidden)), hidden / MODEL, hidden):
                flush(place)
            self._remove(path)  # a damaged one that was skipped, else there is none
            hidden.rename(path)
            flush(self.folder)
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            reason = error if isinstance(error, CheckpointError) else error.strerror or error
            raise CheckpointError(f"the checkpoint {path} cannot be written: {reason}") from error
        self._rotate(path)
        return path

    def _rotate(self, saved: Path) -> None:
        """Removes checkpoints that need not stay after `saved`. A damaged one never displaces a valid one."""
        there = self.all()
        measures = {path: self._glance(path) for path in there[: there.index(saved) + 1]}
        valid = [path for path, (sound, _) in measures.items() if sound or path == saved]
        stay = set(valid[-self.keep :])
        if self.keep_best:
            measured = [(measure, path) for path in valid if (measure := measures[path][1]) is not None]
            stay |= {max(measured)[1]} if measured else set()
        for path in there:
            if path not in stay:
                self._remove(path)

    def _glance(self, path: Path) -> tuple[bool, float | None]:
        """Returns whether a checkpoint looks valid, and its measure."""
        try:
            return True, check(path, self.required, thorough=False)["measure"]
        except CheckpointError:
            return False, None

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint: at once by renaming, then its files."""
        if not path.exists():
            return
        gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):  # it stays, which is no reason to stop
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load(path: Path) -> RunState:
    """Checks a checkpoint and returns its state.

    Raises:
        CheckpointError: it is missing, incomplete, or of a later version of this package.
    """
    content = check(path)
    arrays = path / ARRAYS_NAME
    names = read_header(arrays).tensors if arrays.exists() else {}
    read = dict(read_arrays(arrays, names)) if names else {}
    return RunState(content["step"], content["values"], read, content["measure"])


def check(path: Path, required: Collection[str] = (), *, thorough: bool = True) -> dict[str, Any]:
    """Returns the content of a checkpoint's `state.json`, if all its files are as they were written.

    Args:
        required: values that it must have.
        thorough: whether checksums are compared, or only sizes.

    Raises:
        CheckpointError: it is incomplete, damaged, or of a later version of this package.
    """
    content = _content(path)
    for name in required:
        if name not in content["values"]:
            raise CheckpointError(f"{path / STATE_NAME} lacks {name!r} among its values")
    for name, fingerprint in content["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        size = file.stat().st_size
        if size != fingerprint[0]:
            raise CheckpointError(f"{file} has {size} bytes, expected {fingerprint[0]}")
        if thorough and _fingerprint(file) != fingerprint:
            raise CheckpointError(f"{file} is not what was written: its checksum differs")
    if thorough and ARRAYS_NAME in content["files"]:
        read_header(path / ARRAYS_NAME)
    return content


def find(directory: Path, resume: str | Path, *, log: Callable[[str], None] = print) -> Path | None:
    """Returns the checkpoint to resume from, None to begin anew.

    Args:
        directory: of the run.
        resume: "never"; "auto", the newest valid one if there is any; or a checkpoint's path.

    Raises:
        CheckpointError: the path is no valid checkpoint, or there are checkpoints of which none is valid.
        InputError: "never", but an unfinished run is in the folder.
    """
    checkpoints = Checkpoints(directory, log=log, required=RUN_VALUES)
    if str(resume) not in ("auto", "never"):
        if not Path(resume).is_dir():
            raise CheckpointError(f"there is no checkpoint {resume} to resume: give never, auto or the folder of one")
        check(Path(resume), RUN_VALUES)
        return Path(resume)
    newest = checkpoints.newest_of_any()
    if newest is None or str(resume) == "auto":
        return newest
    content = _content(newest)
    if not content["values"]["finished"]:
        raise InputError(
            f"{directory} holds an unfinished run at step {content['step']}: resume it with --resume auto "
            '(resume="auto"), or choose another folder'
        )
    return None


@contextlib.contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """Within, errors from a state of unexpected content become a CheckpointError that names the checkpoint."""
    try:
        yield
    except GroupViTError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed: its state is not what training writes "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


def check_weights(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], optional: str) -> None:
    """Compares the shapes of a model's tensors with those of a checkpoint, by name.

    Args:
        optional: name of a tensor that the checkpoint may lack.

    Raises:
        CheckpointError: another tensor is missing, or one has another shape.
    """
    missing = [name for name in expected if name not in found and name != optional]
    shapes = [name for name, shape in expected.items() if name in found and tuple(shape) != tuple(found[name])]
    if missing or shapes:
        raise CheckpointError(
            f"the checkpoint is of another model than the recipe's: {(missing or shapes)[0]} "
            f"{'is missing' if missing else 'has another shape'}"
        )


def _content(path: Path) -> dict[str, Any]:
    file = path / STATE_NAME
    checksum, _, text = read_bytes(file).rstrip(b"\n").partition(b" ")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        raise CheckpointError(f"{file} is not what was written: its checksum differs")
    content = parse_json(text, file)
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path} was written by a later version of this package; resume the run with that one")
    wrong = next((name for name, fits in _CONTENT.items() if name not in content or not fits(content[name])), None)
    if wrong is None:
        wrong = next(
            (f"values.{n}" for n, value in content["values"].items() if n in _VALUES and not _VALUES[n](value)), None
        )
    if wrong is not None:
        raise CheckpointError(f"{file} cannot be used: {wrong} is not what training writes")
    named = _STEP.fullmatch(path.name)
    if named and int(named[1]) != content["step"]:
        raise CheckpointError(f"{file} is of step {content['step']}, not of that of its folder")
    if (path / ARRAYS_NAME).exists() and ARRAYS_NAME not in content["files"]:
        raise CheckpointError(f"{file} does not account for {ARRAYS_NAME}")
    return content


# The content of `state.json`, by name.


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_measures(value: Any) -> bool:
    return isinstance(value, dict) and all(
        level.isdecimal() and (number is None or _is_number(number)) for level, number in value.items()
    )


def _are_files(value: Any) -> bool:
    def inside(name: str) -> bool:
        parts = PurePosixPath(name).parts
        return bool(parts) and parts[0] != "/" and ".." not in parts

    return isinstance(value, dict) and all(
        inside(name) and isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair))
        for name, pair in value.items()
    )


def _are_ranks(value: Any) -> bool:
    def fits(rank: Any) -> bool:
        return isinstance(rank, dict) and (rank.get("data") is None or isinstance(rank["data"], dict))

    return isinstance(value, list) and bool(value) and all(map(fits, value))


_CONTENT: Mapping[str, Callable[[Any], bool]] = {
    "version": _is_count,
    "step": _is_count,
    "measure": lambda value: value is None or _is_number(value),
    "values": lambda value: isinstance(value, dict),
    "files": lambda value: _are_files(value) and any(name.startswith(f"{MODEL}/") for name in value),
}
_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "recipe": lambda value: isinstance(value, dict),
    "finished": lambda value: isinstance(value, bool),
    "bad_steps": _is_count,
    "minutes": _is_number,
    "untrained": _are_measures,
    "measured": _are_measures,
    "scaler": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "ranks": _are_ranks,
}


def _files(directory: Path) -> Iterator[str]:
    """Yields the files below a directory, as paths within it."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix()


def _fingerprint(path: Path) -> list[int]:
    """Returns size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
