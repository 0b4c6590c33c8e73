"""Shards, tables and folders: which samples there are, and where their bytes lie. Nothing is decoded here.

A source falls into units, a shard or a block of rows, and a unit into entries. Listing a shard reads its headers only, so that
a place in the middle of a run is found again without decoding, or even reading, what comes before.
"""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from groupvit_common.data.settings import SourceSettings
from groupvit_common.errors import InputError
from groupvit_common.image_files import IMAGE_SUFFIXES

ROWS_PER_UNIT = 64
"""Rows of a table, or files of a folder, that keep together when units are shuffled."""


class Place(NamedTuple):
    """Bytes of a file: all of it where `size` is None."""

    path: str
    offset: int = 0
    size: int | None = None


class Entry(NamedTuple):
    """One sample that is not read yet. where: the shard, table or folder, for messages; what is missing is None."""

    key: str
    where: str
    image: Place | None
    caption: Place | bytes | None


class Unit(NamedTuple):
    """What listing one unit found. fault: why the rest of a shard cannot be read, None for a sound one."""

    entries: list[Entry]
    where: str
    fault: str | None = None


class Source(Protocol):
    """A source of captioned pictures."""

    @property
    def weight(self) -> float:
        """How often its samples occur in an epoch."""

    @property
    def names(self) -> tuple[str, ...]:
        """What tells this source from another, for recognising it when a run is resumed."""

    def __len__(self) -> int:
        """Number of units."""

    def unit(self, number: int) -> Unit:
        """The entries of one unit, always in the same order."""


def open_source(settings: SourceSettings) -> Source:
    """The source that settings describe. InputError for what is missing, empty or cannot be read."""
    kinds: dict[str, type[Shards] | type[Table] | type[Folder]] = {
        "webdataset": Shards,
        "table": Table,
        "folder": Folder,
    }
    return kinds[settings.kind](settings)


def expand_files(pattern: str, what: str) -> list[str]:
    """Files that a pattern with braces (`{00..12}`, `{a,b}`) and wild cards means, in its order. InputError if one is missing."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(f"{what} must be files of this machine, got {pattern}: copy them here, or mount their storage")
    names = [os.path.expanduser(name) for name in _braces(pattern)]  # noqa: PTH111 (patterns are no paths)
    files: list[str] = []
    missing: list[str] = []
    for name in names:
        if has_magic(name) and not Path(name).exists():
            found = sorted(match for match in glob(name, recursive=True) if Path(match).is_file())  # noqa: PTH207 (absolute)
            if not found:
                raise InputError(f"no file matches {name}")
            files += found
        elif Path(name).is_file():
            files.append(name)
        else:
            missing.append(name)
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(names)} {what} of {pattern} are not there, the first is {missing[0]}"
        )
    return files


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise _missing("braceexpand", "patterns with braces need") from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"the braces in {pattern} do not match") from error


def _missing(package: str, need: str) -> InputError:
    return InputError(f"{need} the package {package}: pip install 'groupvit[data]'")


# ---- tar shards ----


class Shards:
    """Tar files in webdataset's layout: members with the same name up to the first dot are one sample."""

    def __init__(self, settings: SourceSettings) -> None:
        self.weight = settings.weight
        self._caption = settings.caption_suffix.lower()
        self._files = expand_files(settings.path, "shards")
        self.names = tuple(Path(name).name for name in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shard(self, number: int) -> tuple[str, str]:
        """What `list_shard` needs to know."""
        return self._files[number], self._caption

    def unit(self, number: int) -> Unit:
        return list_shard(self.shard(number))


def list_shard(shard: tuple[str, str]) -> Unit:
    """The entries of a tar file, by its headers. shard: its path and what captions end in."""
    path, wanted = shard
    entries: list[Entry] = []
    members = _Members(path)
    key, image, caption = "", None, None
    for name, place in members:
        stem, suffix = _split(name)
        if stem != key:
            if key:
                entries.append(Entry(key, path, image, caption))
            key, image, caption = stem, None, None
        if suffix == wanted:
            caption = place
        elif f".{suffix}" in IMAGE_SUFFIXES:
            image = place
    # The sample in which a shard breaks off has lost a part; the break itself is what is reported.
    if key and (members.fault is None or (image is not None and caption is not None)):
        entries.append(Entry(key, path, image, caption))
    return Unit(entries, path, members.fault)


class _Members:
    """Names and places of a tar's regular files; after the loop, `fault` says what kept it from the end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fault: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Place]]:
        try:
            with open(self.path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:  # noqa: PTH123 (str)
                length = os.fstat(file.fileno()).st_size
                for member in tar:
                    # tarfile would keep every member for later questions.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.offset_data + member.size > length:
                        self.fault = "the shard is truncated"
                        return
                    if member.isreg():
                        yield member.name, Place(self.path, member.offset_data, member.size)
                # A damaged header ends tarfile's loop as the end of the archive does.
                file.seek(tar.offset)
                rest = file.read(tarfile.BLOCKSIZE)
                if rest.strip(b"\0") or 0 < len(rest) < tarfile.BLOCKSIZE:
                    self.fault = "the shard is damaged"
        except OSError as error:
            self.fault = f"the shard cannot be read ({error.strerror or error})"
        except tarfile.TarError:
            self.fault = "the shard is truncated or not a tar file"


def _split(name: str) -> tuple[str, str]:
    """`"a/000012.seg.PNG"` -> `("a/000012", "seg.png")`; no key for hidden files and files without a suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return "", ""
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


# ---- tables ----


class Table:
    """CSV, TSV or Parquet files with a column of picture files and one of captions, read as a whole."""

    def __init__(self, settings: SourceSettings) -> None:
        self.weight = settings.weight
        files = expand_files(settings.path, "tables")
        self.names = tuple(Path(name).name for name in files)
        self._tables = [_read_table(Path(name), settings) for name in files]
        self._roots = [str(settings.root or Path(name).parent) for name in files]
        self._files = files
        # Units do not reach across tables.
        self._blocks = [
            (number, start)
            for number, table in enumerate(self._tables)
            for start in range(0, table.num_rows, ROWS_PER_UNIT)
        ]
        if not self._blocks:
            raise InputError(f"there are no rows in {settings.path}")

    def __len__(self) -> int:
        return len(self._blocks)

    def unit(self, number: int) -> Unit:
        which, start = self._blocks[number]
        rows = self._tables[which].slice(start, ROWS_PER_UNIT)
        where, root = self._files[which], self._roots[which]
        images, captions = (rows.column(column).to_pylist() for column in (0, 1))
        entries = []
        for row, (image, caption) in enumerate(zip(images, captions, strict=True), start):
            name = os.fsdecode(image) if image else None
            place = None if name is None else Place(os.path.join(root, name))  # noqa: PTH118 (millions of them)
            entries.append(Entry(name or f"row {row}", where, place, caption))
        return Unit(entries, where)


def _read_table(path: Path, settings: SourceSettings) -> Any:
    """The two columns of a table as bytes, in this order: whether a row is text is not decided for the whole file."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise _missing("pyarrow", "tables need") from error
    columns = [settings.image_column, settings.caption_column]
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            names = pyarrow.parquet.read_schema(path).names
            _check_columns(path, columns, names)
            table = pyarrow.parquet.read_table(path, columns=columns).select(columns)
            return table.cast(pyarrow.schema([(column, pyarrow.large_binary()) for column in columns]))
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                names = next(csv.reader(file, delimiter=delimiter), [])
            _check_columns(path, columns, names)
            return pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=columns, column_types=dict.fromkeys(columns, pyarrow.large_binary())
                ),
            )
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"the table {path} cannot be read: {str(error).splitlines()[0]}") from error
    raise InputError(f"a table must be a .csv, .tsv or .parquet file, got {path}")


def _check_columns(path: Path, wanted: list[str], names: list[str]) -> None:
    absent = [column for column in wanted if column not in names]
    if absent:
        raise InputError(
            f"{path} has no column {absent[0]!r}, it has {', '.join(map(repr, names))}: "
            "name them with image_column and caption_column"
        )


# ---- folders ----


class Folder:
    """Pictures with captions beside them, in a folder and those inside it."""

    def __init__(self, settings: SourceSettings) -> None:
        self.weight = settings.weight
        self._root = Path(settings.path).expanduser()
        if not self._root.is_dir():
            raise InputError(f"there is no folder {settings.path}")
        self._suffix = f".{settings.caption_suffix}"
        self._images: list[str] = []
        for folder, folders, names in os.walk(self._root):
            folders.sort()  # in place: os.walk goes on in this order
            pictures = (name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)  # noqa: PTH122
            self._images += [os.path.join(folder, name) for name in pictures]  # noqa: PTH118 (millions of them)
        if not self._images:
            raise InputError(
                f"no pictures in the folder {settings.path}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self.names = (self._root.name, str(len(self._images)))

    def __len__(self) -> int:
        return -(-len(self._images) // ROWS_PER_UNIT)

    def unit(self, number: int) -> Unit:
        where = str(self._root)
        entries = []
        for image in self._images[number * ROWS_PER_UNIT : (number + 1) * ROWS_PER_UNIT]:
            caption = os.path.splitext(image)[0] + self._suffix  # noqa: PTH122
            key = os.path.relpath(image, self._root)
            entries.append(
                Entry(key, where, Place(image), Place(caption) if os.path.exists(caption) else None)  # noqa: PTH110
            )
        return Unit(entries, where)
