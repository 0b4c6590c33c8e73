"""The journal of an evaluation: a line of JSON for each image, with a checksum, so that only what was written is counted.

Journals that were begun before lines had checksums are read as well; each line must then be well-formed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
from groupvit_common.storage.json_text import parse_json, unicode_json
from groupvit_common.storage.reading import read_bytes

JOURNAL = "journal-{}.jsonl"
BEST = 5
"""Likeliest classes of an image that a classification's record names."""

_MOST_BYTES = 1 << 30
_MOST_PIXELS = 1 << 40  # of an image; sums of millions of them fit into 64 bits
_NAME = re.compile(r"journal-\d+\.jsonl")
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')

Fault = Callable[[Mapping[str, Any]], str]
"""What is wrong with a record, "" for a right one."""


def line_of(record: Mapping[str, Any]) -> str:
    """Returns a record as a line, its checksum last."""
    text = unicode_json(record, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'


def paths(folder: Path) -> list[Path]:
    """Returns the journals in a folder: one of each process."""
    return sorted(path for path in folder.glob(JOURNAL.format("*")) if _NAME.fullmatch(path.name))


def read(
    folder: Path, fault: Fault, check_head: Callable[[Mapping[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Returns the records of all journals in a folder, each image once. What follows the last line's end was cut off by a kill.

    Args:
        fault: of a record. check_head: is given what run a journal is of, before its records are looked at.

    Raises:
        InputError: a line that an evaluation did not write; names the file and the line.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths(folder):
        try:
            lines = read_bytes(path, _MOST_BYTES).split(b"\n")[:-1]
        except CheckpointError as error:
            raise InputError(str(error)) from error
        if not lines:
            continue
        checked = _CHECKSUM.search(lines[0]) is not None
        head = _record(
            path, 1, lines[0], checked, lambda record: "" if isinstance(record.get("run"), dict) else "no head"
        )
        if check_head is not None:
            check_head(head["run"])
        for number, line in enumerate(lines[1:], 2):
            record = _record(path, number, line, checked, fault)
            records[record["name"]] = record
    return list(records.values())


def _record(path: Path, number: int, line: bytes, checked: bool, fault: Fault) -> dict[str, Any]:
    """checked: whether lines of this journal have checksums."""
    found = _CHECKSUM.search(line)
    try:
        text = line if found is None else line[: found.start()] + b"}"
        if checked and found is None:
            wrong = "it lacks its checksum"
        elif found is not None and found[1] != f"{zlib.crc32(text):08x}".encode():
            wrong = "its checksum differs"
        else:
            record = parse_json(text, "it", has_names=True)
            wrong = fault(record)
            if not wrong:
                return record
    except CheckpointError as error:
        wrong = str(error)
    raise InputError(
        f"{path}, line {number}, is not what an evaluation writes ({wrong}): remove the line to have its image measured again, or "
        "--restart to begin anew"
    )


def fault_of(data: SegmentationSet | ClassificationSet) -> Fault:
    """Returns what tells whether a record can be of a set."""
    if isinstance(data, SegmentationSet):
        return lambda record: _segmentation_fault(record, len(data.classes), 0 if data.has_background else None)
    truths = {image.name: image.truth for image in data}
    return lambda record: _classification_fault(record, len(data.words), truths)


def _segmentation_fault(record: Mapping[str, Any], classes: int, background: int | None) -> str:
    if record.keys() != {"name", "confusion", "oracle", "overlaps"} or not isinstance(record["name"], str):
        return "it is not a record of an image's pixels"
    pixels: list[dict[int, int]] = []
    for key in ("confusion", "oracle"):
        cells, of_row = record[key], dict[int, int]()
        if not isinstance(cells, list):
            return f"{key} is no list"
        for cell in cells:
            if not (isinstance(cell, list) and len(cell) == 3 and all(type(number) is int for number in cell)):
                return f"{key} has a cell that is not three whole numbers"
            row, column, count = cell
            if not (0 <= row < classes and 0 <= column < classes):
                return f"{key} names class {row if not 0 <= row < classes else column}, there are 0 to {classes - 1}"
            if not 0 < count < _MOST_PIXELS:
                return f"{key} counts {count} pixels"
            of_row[row] = of_row.get(row, 0) + count
        if len({(cell[0], cell[1]) for cell in cells}) < len(cells):
            return f"{key} has a cell twice"
        pixels.append(of_row)
    if pixels[0] != pixels[1]:
        return "confusion and oracle are not of the same pixels"
    overlaps = record["overlaps"]
    if not isinstance(overlaps, list) or not all(_is_fraction(overlap) for overlap in overlaps):
        return "overlaps are not numbers from 0 to 1"
    if len(overlaps) != len(pixels[0].keys() - {background}):
        return "overlaps are not one for each class of the image"
    return ""


def _classification_fault(record: Mapping[str, Any], classes: int, truths: Mapping[str, int]) -> str:
    if record.keys() != {"name", "truth", "best"} or not isinstance(record["name"], str):
        return "it is not a record of an image's class"
    best = record["best"]
    if not isinstance(best, list) or len(best) != min(BEST, classes) or len(set(map(str, best))) < len(best):
        return f"best are not {min(BEST, classes)} classes"
    for number in (record["truth"], *best):
        if type(number) is not int or not 0 <= number < classes:
            return f"it names class {number!r}, there are 0 to {classes - 1}"
    if truths.get(record["name"], record["truth"]) != record["truth"]:
        return f"{record['name']} is of class {truths[record['name']]}"
    return ""


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
