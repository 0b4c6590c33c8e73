"""The journal of an evaluation: a line of JSON for each image, with a checksum.

Only what was written is counted. Journals that were begun before lines had checksums are read as well; each line must
then be well-formed.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
from groupvit_common.evaluation.processes import ProcessInfo
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.storage.json_text import parse_json, unicode_json
from groupvit_common.storage.locks import FolderLock
from groupvit_common.storage.reading import read_bytes

JOURNAL = "journal-{}.jsonl"
PREDICTIONS = "predictions"
LOCK_NAME = ".evaluation.lock"

_MAX_BYTES = 1 << 30
_NAME = re.compile(r"journal-\d+\.jsonl")
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')

Record = Mapping[str, Any]
Fault = Callable[[Record], str]
"""Returns the fault of a record, "" for a right one."""


class Journal:
    """Notes the records of images in `journal-RANK.jsonl`, whose first line says what run it is.

    Args:
        folder: for the journals of all processes; None: nothing is kept.
        data: the set, in whose folders no results may lie.
        head: what must be the same for a run to be resumed.
        fault_in: checks records of an earlier run.
        restart: forget an earlier run.

    Attributes:
        before: the records of an earlier run, on every process.

    Raises:
        InputError: the folder has the journal of another run or a line that no run wrote, is in use, holds
            the set, or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        data: SegmentationSet | ClassificationSet,
        head: Record,
        fault_in: Fault,
        process: ProcessInfo,
        restart: bool = False,
    ) -> None:
        self.before: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        self._lock: FolderLock | None = None
        if folder is None:
            return
        # The first process brings all of an earlier run into one file; the others then begin theirs.
        error: InputError | None = None
        if process.rank == 0:
            try:
                check_output(folder, data)
                self._take_over(folder, head, fault_in, restart)
            except InputError as found:
                error = found
            except OSError as found:
                error = InputError(f"cannot write into the folder {folder}: {found.strerror or found}")
        failure, self.before = process.all((error, self.before))[0]
        if failure is not None:
            self._release()
            raise failure
        path = folder / JOURNAL.format(process.rank)
        self._file = path.open("w" if process.rank else "a", encoding="utf-8")
        if process.rank:
            self.add({"run": head})

    def _take_over(self, folder: Path, head: Record, fault_in: Fault, restart: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder, LOCK_NAME, "evaluation")
        if not restart:
            self.before = read_journals(folder, fault_in, lambda old: _check_same(folder, head, old))
        unfinished, first = folder / f".{JOURNAL.format(0)}.tmp", folder / JOURNAL.format(0)
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(f"{line_of(record)}\n" for record in ({"run": head}, *self.before))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(first)
        for path in _journals_in(folder):
            if path != first:
                path.unlink()

    def add(self, record: Record) -> None:
        """Writes a record."""
        if self._file is not None:
            try:
                self._file.write(f"{line_of(record)}\n")
                self._file.flush()
            except OSError as error:
                raise InputError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def check_output(folder: Path, data: SegmentationSet | ClassificationSet) -> None:
    """Raises `InputError` if results in a folder would lie among the files of the set and be taken for them."""
    for place in (folder, folder / PREDICTIONS):
        real = Path(os.path.realpath(place))
        for read_from in data.folders:
            if real.is_relative_to(os.path.realpath(read_from)):
                raise InputError(
                    f"the results cannot go into {folder}: {data.kind} reads its files from {read_from}, where they "
                    "would be taken for its own; give --out another folder"
                )


def line_of(record: Record) -> str:
    """Returns a record as a line, its checksum last."""
    text = unicode_json(record, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'


def read_journals(
    folder: Path, fault_in: Fault, check_head: Callable[[Record], None] | None = None
) -> list[dict[str, Any]]:
    """Returns the records of all journals in a folder, each image once.

    An incomplete last line, left by a kill, is skipped.

    Args:
        fault_in: checks a record.
        check_head: gets the head of a journal before its records are checked.

    Raises:
        InputError: a line that no run wrote; names the file and the line.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in _journals_in(folder):
        try:
            lines = read_bytes(path, _MAX_BYTES).split(b"\n")[:-1]
        except CheckpointError as error:
            raise InputError(str(error)) from error
        if not lines:
            continue
        has_checksums = _CHECKSUM.search(lines[0]) is not None
        head = _parse(path, 1, lines[0], has_checksums, lambda r: "" if isinstance(r.get("run"), dict) else "no head")
        if check_head is not None:
            check_head(head["run"])
        for number, line in enumerate(lines[1:], 2):
            record = _parse(path, number, line, has_checksums, fault_in)
            records[record["name"]] = record
    return list(records.values())


def _journals_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(JOURNAL.format("*")) if _NAME.fullmatch(path.name))


def _parse(path: Path, number: int, line: bytes, has_checksums: bool, fault_in: Fault) -> dict[str, Any]:
    """Returns the record in a line. has_checksums: lines of this journal have them."""
    found = _CHECKSUM.search(line)
    try:
        text = line if found is None else line[: found.start()] + b"}"
        if has_checksums and found is None:
            fault = "it lacks its checksum"
        elif found is not None and found[1] != f"{zlib.crc32(text):08x}".encode():
            fault = "its checksum differs"
        else:
            record = parse_json(text, "it", has_names=True)
            fault = fault_in(record)
            if not fault:
                return record
    except CheckpointError as error:
        fault = str(error)
    raise InputError(
        f"{path}, line {number}, is not what an evaluation writes ({fault}): remove the line to have its image "
        "measured again, or --restart to begin anew"
    )


def _check_same(folder: Path, head: Record, old: Record) -> None:
    """Raises `InputError` if a journal's head is another run's.

    An option of segmentation that was added since the journal was begun had its default then.
    """
    new = json.loads(json.dumps(head))
    old = {**{key: default for key, default in SegmentationOptions().to_dict().items() if key in new}, **old}
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        key = different[0]
        change = f"{key} was {old.get(key)!r} and is {new.get(key)!r}" if key != "labels" else "other labels"
        raise InputError(
            f"{folder} holds another evaluation ({change}): choose another folder with --out, or "
            "--restart to replace it"
        )
