"""Sources of captioned images: shards, tables and folders -> entries, which tell where a sample's bytes are.

A source consists of units (a shard or a block of rows), a unit of entries. Nothing is decoded. Listing a shard reads
its headers only, so that a run resumes without decoding, or even reading, what came before.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from groupvit_common.data.captions.settings import SourceSettings
from groupvit_common.data.captions.tables import FAULTS, read_table
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.image_files import matching_files
from groupvit_common.preprocessing.images import image_suffixes
from groupvit_common.storage.names import is_hidden

_MOST_FILES = 1_000_000

ROWS_PER_UNIT = 64
"""Rows of a table, or files of a folder, that stay together when units are shuffled."""


class ByteRange(NamedTuple):
    """Bytes of a file: the whole of it where `size` is None."""

    path: str
    offset: int = 0
    size: int | None = None


class Entry(NamedTuple):
    """One sample that is not read yet; a missing part is None.

    where: the shard, table or folder, for messages. fault: the reason why it is unusable, whichever parts there are.
    """

    key: str
    where: str
    image: ByteRange | None
    caption: ByteRange | bytes | None
    fault: str | None = None

    @property
    def complete(self) -> bool:
        """True if it is usable as far as listing shows."""
        return self.fault is None and self.image is not None and self.caption is not None


class Unit(NamedTuple):
    """The result of listing one unit. fault: the reason why the rest of a shard is unreadable; None for a sound one."""

    entries: list[Entry]
    where: str
    fault: str | None = None


class Source(Protocol):
    """A source of captioned images."""

    @property
    def weight(self) -> float:
        """Times that its samples occur in an epoch."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that identify this source when a run is resumed."""

    def __len__(self) -> int:
        """Number of units."""

    def unit(self, number: int) -> Unit:
        """Returns the entries of one unit, always in the same order."""


def open_source(settings: SourceSettings) -> Source:
    """Opens the source that settings describe. InputError if it is missing, empty or unreadable."""
    kinds: dict[str, type[Shards] | type[Table] | type[Folder]] = {
        "webdataset": Shards,
        "table": Table,
        "folder": Folder,
    }
    return kinds[settings.kind](settings)


def expand_files(pattern: str, what: str) -> list[str]:
    """Returns the files of a pattern with braces (`{00..12}`, `{a,b}`) and wild cards. InputError if one is missing."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(f"{what} must be files of this machine, got {pattern}: copy them here, or mount their storage")
    names = [os.path.expanduser(name) for name in _braces(pattern)]  # noqa: PTH111 (patterns are no paths)
    files: list[str] = []
    missing: list[str] = []
    for name in names:
        if has_magic(name) and not Path(name).exists():
            found = _matching(name)
            if not found:
                raise InputError(f"no file matches {name}, but for hidden ones")
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


def _matching(pattern: str) -> list[str]:
    """Returns the files of a pattern with wild cards, sorted, each once; hidden ones only where it spells them."""
    spelled = Path(pattern).parts
    return sorted(
        str(path)
        for path in matching_files(pattern)
        if not any(is_hidden(part) for part in path.parts if part not in spelled)
    )


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise InputError("patterns with braces need the package braceexpand: pip install 'groupvit[data]'") from error
    try:
        names = list(islice(braceexpand(pattern), _MOST_FILES + 1))
    except ValueError as error:
        raise InputError(f"the braces in {pattern} do not match") from error
    if len(names) > _MOST_FILES:
        raise InputError(f"{pattern} means more than {_MOST_FILES} files")
    return names


# ---- tar shards ----

_TWICE = "two members of the shard have one name"
_APART = "its parts are not together in the shard, which has more than one of its key"
_LINK = "a member is a link to what the shard does not hold before it"
_SPECIAL = "a member is no regular file"
_DOTS = "neither an image nor a caption under its key, which ends at the first dot of a member's name"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
"""First bytes of files that often have the name of a tar file."""


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
        """Returns the argument of `list_shard`."""
        return self._files[number], self._caption

    def unit(self, number: int) -> Unit:
        return list_shard(self.shard(number))


class _Sample:
    """Members of one key that stand together in a shard."""

    def __init__(self, key: str) -> None:
        self.key, self.fault = key, ""
        self.suffixes: set[str] = set()
        self.image: ByteRange | None = None
        self.caption: ByteRange | None = None

    def add(self, suffix: str, place: ByteRange | None, fault: str, wanted: str) -> None:
        """Adds a member. wanted: the suffix of captions."""
        is_image = f".{suffix}" in image_suffixes()
        if suffix in self.suffixes:
            self.fault = self.fault or _TWICE
        self.suffixes.add(suffix)
        if suffix == wanted or is_image:
            self.fault = self.fault or fault
        if suffix == wanted:
            self.caption = place
        elif is_image and self.image is None:
            self.image = place

    def entry(self, path: str) -> Entry:
        fault = self.fault or (_DOTS if self.image is None and self.caption is None else None)
        return Entry(self.key, path, self.image, self.caption, fault)


def list_shard(shard: tuple[str, str]) -> Unit:
    """Returns the entries of a tar file, from its headers. shard: its path and the suffix of captions.

    Of several images under one key the first counts. Members of one key that stand apart are one sample, unless the key
    occurs more than once: then it is open which belong together.
    """
    path, wanted = shard
    members = _Members(path)
    samples: list[_Sample] = []
    for name, place, fault in members:
        key, suffix = _split(name)
        if not key:
            continue
        if not samples or samples[-1].key != key:
            samples.append(_Sample(key))
        samples[-1].add(suffix, place, fault, wanted)
    # The sample in which a shard breaks off has lost a part; the break itself is reported.
    if members.fault is not None and samples and not samples[-1].entry(path).complete:
        samples.pop()
    return Unit([sample.entry(path) for sample in _joined(samples)], path, members.fault)


def _joined(samples: list[_Sample]) -> list[_Sample]:
    """Joins samples whose members stand apart, at the position of the first."""
    of_key: dict[str, list[_Sample]] = {}
    for sample in samples:
        of_key.setdefault(sample.key, []).append(sample)
    if len(of_key) == len(samples):
        return samples
    for parts in of_key.values():
        whole = [part.image is not None and part.caption is not None for part in parts]
        if len(parts) == 1 or all(whole):
            continue
        first, *others = parts
        if sum(len(part.suffixes) for part in parts) > len(set().union(*(part.suffixes for part in parts))):
            first.fault = first.fault or _APART
        for part in others:
            first.fault = first.fault or part.fault
            first.suffixes |= part.suffixes
            first.image, first.caption = first.image or part.image, first.caption or part.caption
            part.key = ""
    return [sample for sample in samples if sample.key]


class _Members:
    """Iterates over names, byte ranges and faults of a tar's files; `fault` then tells why the end was not reached."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fault: str | None = None

    def __iter__(self) -> Iterator[tuple[str, ByteRange | None, str]]:
        places: dict[str, ByteRange] = {}
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 (str)
                start = file.read(6)
                packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
                if packed is not None:
                    self.fault = (
                        f"the shard is compressed ({packed}); unpack it, since shards are read at random places"
                    )
                    return
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    length, after = os.fstat(file.fileno()).st_size, 0
                    for member in tar:
                        # tarfile would keep every member for later questions.
                        tar.members = []  # type: ignore[attr-defined]
                        if member.offset_data <= after:
                            self.fault = "the shard is damaged"
                            return
                        after = member.offset_data
                        if member.offset_data + member.size > length:
                            self.fault = "the shard is truncated"
                            return
                        if not member.isdir():
                            place, fault = self._placed(member, places)
                            name = _plain(member.name)
                            if place is not None:
                                places[name] = place
                            yield name, place, fault
                    self.fault = self._end(file, tar.offset, bool(after))
        except OSError as error:
            self.fault = f"the shard cannot be read ({error.strerror or error})"
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            self.fault = "the shard is truncated or not a tar file"

    def _placed(self, member: tarfile.TarInfo, places: dict[str, ByteRange]) -> tuple[ByteRange | None, str]:
        """Returns a member's bytes, or its fault. places: of the members before it, to which it may be a link."""
        if member.islnk() or member.issym():
            folder = "" if member.islnk() else posixpath.dirname(member.name)
            place = places.get(_plain(posixpath.join(folder, member.linkname)))
            return place, "" if place is not None else _LINK
        if not member.isreg() or member.issparse():
            return None, _SPECIAL
        return ByteRange(self.path, member.offset_data, member.size), ""

    @staticmethod
    def _end(file: IO[bytes], offset: int, any_member: bool) -> str | None:
        """Returns the fault of an archive's end: tarfile's loop ends at a damaged header as it does at zeros."""
        file.seek(offset)
        rest = file.read(tarfile.BLOCKSIZE)
        if rest.strip(b"\0") or 0 < len(rest) < tarfile.BLOCKSIZE:
            return "the shard is damaged"
        if not any_member:
            return "the shard has no members"
        while rest:
            rest = file.read(1 << 20)
            if rest.strip(b"\0"):
                return "more follows the end of the shard: archives put together, or a hole; the rest is skipped"
        return None


def _plain(name: str) -> str:
    """Returns a member's name without the `./` and the like that tar programs put in front."""
    return posixpath.normpath(name).lstrip("/")


def _split(name: str) -> tuple[str, str]:
    """`"a/000012.seg.PNG"` -> `("a/000012", "seg.png")`; no key for hidden files and files without a suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or any(is_hidden(part) for part in name.split("/") if part != ".."):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


# ---- tables ----


class Table:
    """CSV, TSV, JSON lines or Parquet files with a column of image files and one of captions, held in memory."""

    def __init__(self, settings: SourceSettings) -> None:
        self.weight = settings.weight
        files = expand_files(settings.path, "tables")
        self.names = tuple(Path(name).name for name in files)
        self._tables = [read_table(Path(name), settings.image_column, settings.caption_column) for name in files]
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
        columns = (rows.column(name).to_pylist() for name in ("image", "caption", "line", "fault"))
        entries = []
        for image, caption, line, fault in zip(*columns, strict=True):
            name = os.fsdecode(image) if image else None
            place = None if name is None else ByteRange(os.path.join(root, name))  # noqa: PTH118 (millions of them)
            entries.append(Entry(name or f"line {line}", where, place, caption, FAULTS[fault] or None))
        return Unit(entries, where)


# ---- folders ----


class Folder:
    """Images with captions beside them, in a folder and those inside it."""

    def __init__(self, settings: SourceSettings) -> None:
        self.weight = settings.weight
        self._root = Path(os.path.expanduser(settings.path))  # noqa: PTH111 (`~user` of nobody stays)
        if not self._root.is_dir():
            raise InputError(f"there is no folder {settings.path}")
        # Image and caption; the latter's suffix in whatever case.
        self._files: list[tuple[str, str | None]] = []
        suffix = f".{settings.caption_suffix}".lower()
        for folder, names in self._folders():
            captions = {name[: -len(suffix)]: name for name in names if name.lower().endswith(suffix)}
            for name in names:
                stem, ending = os.path.splitext(name)  # noqa: PTH122
                if ending.lower() in image_suffixes() and ending.lower() != suffix:
                    caption = captions.get(stem)
                    self._files.append(
                        (os.path.join(folder, name), caption and os.path.join(folder, caption))  # noqa: PTH118 (millions of them)
                    )
        if not self._files:
            raise InputError(
                f"no images in the folder {settings.path}: looked for {', '.join(sorted(image_suffixes()))}"
            )
        self.names = (self._root.name, str(len(self._files)))

    def _folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yields the folder and those inside it, also by links, each once, with their files; no hidden ones."""

        def refuse(error: OSError) -> None:
            raise InputError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error

        seen: set[str] = set()
        for folder, folders, names in os.walk(self._root, onerror=refuse, followlinks=True):
            # In place: os.walk continues in this order.
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            yield folder, sorted(name for name in names if not is_hidden(name))

    def __len__(self) -> int:
        return -(-len(self._files) // ROWS_PER_UNIT)

    def unit(self, number: int) -> Unit:
        where = str(self._root)
        entries = []
        for image, caption in self._files[number * ROWS_PER_UNIT : (number + 1) * ROWS_PER_UNIT]:
            key = os.path.relpath(image, self._root)
            entries.append(Entry(key, where, ByteRange(image), None if caption is None else ByteRange(caption)))
        return Unit(entries, where)
