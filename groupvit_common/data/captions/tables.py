"""Tables of image paths and captions -> two columns of bytes: CSV, TSV, JSON lines, Parquet.

Rows of a TSV are its lines, without quoting. The quoting rules of CSV, with which a value may hold delimiters and line
ends, are for CSV alone. An unusable row is kept with its fault, to be counted with the samples; a file whose rows
cannot be separated is refused.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.json_text import parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

FAULTS = (
    "",
    "the row has more fields than the table has columns",
    "the row has too few fields",
    "the line is not a JSON object of texts",
)
"""Reasons why a row is unusable, by the number in its column `fault`."""
_TOO_MANY, _TOO_FEW, _NO_OBJECT = 1, 2, 3

_DELIMITERS = (",", ";", "\t", "|")
_ROWS_AT_ONCE = 1 << 16
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "null")  # of a Parquet column


class _Row(NamedTuple):
    image: bytes | None
    caption: bytes | None
    line: int
    fault: int = 0


def read_table(path: Path, image_column: str, caption_column: str) -> Any:
    """Returns a `pyarrow.Table` of the columns image, caption (bytes or null), line (of the file, from 1) and fault.

    Bytes that are not UTF-8 stay as they are: one such row does not spoil the file.

    Raises:
        InputError: pyarrow is missing, another kind of file, a column that is missing or there twice, rows that cannot
            be separated; names the file and the line.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"a table must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path}")
    try:
        import pyarrow
    except ImportError as error:
        raise InputError("tables need the package pyarrow: pip install 'groupvit[data]'") from error
    columns = (image_column, caption_column)
    try:
        if suffix == ".parquet":
            return _parquet(path, columns)
        read = {".csv": _csv_rows, ".tsv": _tsv_rows}.get(suffix, _json_rows)
        return _collected(read(path, columns))
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the table {path} cannot be read: {reason}") from error


def _collected(rows: Iterator[_Row]) -> Any:
    import pyarrow

    schema = pyarrow.schema(
        [
            ("image", pyarrow.large_binary()),
            ("caption", pyarrow.large_binary()),
            ("line", pyarrow.int64()),
            ("fault", pyarrow.int8()),
        ]
    )
    batches: list[Any] = []

    while part := list(islice(rows, _ROWS_AT_ONCE)):
        columns = zip(zip(*part, strict=True), schema.types, strict=True)
        batches.append(pyarrow.record_batch([pyarrow.array(column, kind) for column, kind in columns], schema=schema))
    return pyarrow.Table.from_batches(batches, schema)


def _encoding(path: Path) -> str:
    """Returns UTF-16 for a file with its byte order mark ("Unicode text" of Excel and Notepad), else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _bytes(text: str) -> bytes:
    """Returns the bytes that the file had, also where they are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _errors(encoding: str) -> str:
    return "replace" if encoding == "utf-16" else "surrogateescape"


def _csv_rows(path: Path, columns: tuple[str, str]) -> Iterator[_Row]:
    encoding = _encoding(path)
    with path.open(encoding=encoding, errors=_errors(encoding), newline="") as file:
        delimiter = _delimiter(file.readline(csv.field_size_limit()), columns)
        file.seek(0)
        # Strict, so that a quote which is not closed is an error, where rows would become one.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            yield from _rows(path, columns, ((reader.line_num, row) for row in reader))
        except csv.Error as error:
            raise InputError(
                f"the table {path} cannot be read: line {reader.line_num}: {error}; a value that begins with a "
                'quotation mark must stand in quotation marks, with "" for each within, up to its end'
            ) from error


def _delimiter(header: str, columns: tuple[str, str]) -> str:
    """Returns the delimiter that the header uses: spreadsheets of many countries write semicolons or tabs."""
    for delimiter in _DELIMITERS:
        names = {name.strip().strip('"').strip().casefold() for name in header.split(delimiter)}
        if {column.casefold() for column in columns} <= names:
            return delimiter
    return ","


def _tsv_rows(path: Path, columns: tuple[str, str]) -> Iterator[_Row]:
    encoding = _encoding(path)
    with path.open(encoding=encoding, errors=_errors(encoding), newline="\n") as file:
        lines = (line.removesuffix("\n").removesuffix("\r") for line in file)
        yield from _rows(
            path, columns, ((number, line.split("\t") if line else []) for number, line in enumerate(lines, 1))
        )


def _rows(path: Path, columns: tuple[str, str], fields: Iterator[tuple[int, list[str]]]) -> Iterator[_Row]:
    """Yields rows from the fields of lines; the first line that is not empty names the columns."""
    _, names = next((each for each in fields if each[1]), (0, []))
    image, caption = (_column(path, column, names) for column in columns)
    for line, row in fields:
        if not row:
            continue
        # A trailing delimiter adds empty fields.
        if len(row) > len(names) and any(row[len(names) :]):
            yield _Row(None, None, line, _TOO_MANY)
        elif len(row) <= max(image, caption):
            yield _Row(None, None, line, _TOO_FEW)
        else:
            yield _Row(_bytes(row[image].strip()) or None, _bytes(row[caption]), line)


def _column(path: Path, wanted: str, names: Sequence[str]) -> int:
    """Returns the number of a column: of exactly this name, else the only one but for case and surrounding blanks."""
    found = [number for number, name in enumerate(names) if name == wanted]
    if not found:
        found = [number for number, name in enumerate(names) if name.strip().casefold() == wanted.strip().casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path} has {len(found)} columns {wanted!r}: rename all but one")
    shown = [repr(name[:60]) for name in names[:20]]
    raise InputError(
        f"{path} has no column {wanted!r}, it has {', '.join(shown) or 'none'}: name them with image_column and "
        "caption_column"
    )


def _json_rows(path: Path, columns: tuple[str, str]) -> Iterator[_Row]:
    checked = False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line, path)
            except CheckpointError:
                yield _Row(None, None, number, _NO_OBJECT)
                continue
            if not checked:
                # A column that the first row lacks is misspelt.
                for column in columns:
                    _column(path, column, list(record))
                checked = True
            values = [record.get(name) for name in columns]
            if not all(value is None or isinstance(value, str) for value in values):
                yield _Row(None, None, number, _NO_OBJECT)
                continue
            image, caption = (None if value is None else str(value).encode() for value in values)
            yield _Row(image or None, caption, number)


def _parquet(path: Path, columns: tuple[str, str]) -> Any:
    import pyarrow
    import pyarrow.parquet

    # The file itself: in a data set, names of folders could become columns.
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        found = [names[_column(path, column, names)] for column in columns]
        table = file.read(columns=list(dict.fromkeys(found)))
    arrays = []
    for name in found:
        array = table.column(name)
        kind = array.type
        if pyarrow.types.is_dictionary(kind):
            array, kind = array.cast(kind.value_type), kind.value_type
        if not any(getattr(pyarrow.types, f"is_{text}")(kind) for text in _TEXT_TYPES):
            raise InputError(f"{path}: the column {name!r} is of type {str(kind)[:80]}, expected texts")
        arrays.append(array.cast(pyarrow.large_binary()))
    count = table.num_rows
    arrays += [pyarrow.array(range(1, count + 1), pyarrow.int64()), pyarrow.array(bytes(count), pyarrow.int8())]
    return pyarrow.table(arrays, names=["image", "caption", "line", "fault"])
