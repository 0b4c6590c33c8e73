"""Image files: folders and patterns -> paths."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import escape, glob, has_magic
from pathlib import Path
from typing import IO

from groupvit_common.drawing.canvas import SOFTWARE
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.images import image_suffixes
from groupvit_common.storage.names import is_hidden

# Images of formats that are not supported: documents, drawings, formats of editors, phones and cameras.
_OTHER_IMAGES = frozenset([
    ".ai", ".arw", ".cr2", ".cr3", ".dds", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif",
    ".icns", ".jxl", ".jxr", ".nef", ".orf", ".pdf", ".pef", ".ps", ".psb", ".psd", ".raf", ".raw", ".rw2",
    ".srw", ".svg", ".svgz", ".wdp", ".wmf", ".xcf", ".xbm", ".xpm",
])  # fmt: skip

# The mark of results: in a PNG's texts before the pixels; in the Exif tags of JPEG (beginning) and WebP (end).
_PNG_MARK, _EXIF_MARK = f"Software\0{SOFTWARE}".encode(), f"{SOFTWARE}\0".encode()
_EXIF_BYTES = 256
_MP4_MARK, _MP4_BYTES = (
    b"cmt" + bytes(3) + bytes([16 + len(SOFTWARE)]) + b"data\0\0\0\1\0\0\0\0" + SOFTWARE.encode(),
    1024,
)


def images_in(folder: str | Path) -> list[Path]:
    """Returns the images of a folder, not of those inside it, by name.

    Warns of files that are left out: those that people take for images, such as `.heic`, and results of an earlier run
        (`is_result`).
    InputError if there are no images.
    """
    try:
        files = sorted(path for path in Path(folder).iterdir() if path.is_file() and not is_hidden(path.name))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    suffixes = image_suffixes()
    found = [path for path in files if path.suffix.lower() in suffixes]
    left_out = [path for path in files if path.suffix.lower() not in suffixes]
    if not found:
        there = f"it has {_kinds(left_out)}; " if left_out else ""
        raise InputError(f"no images in the folder {folder}: {there}supported are {', '.join(sorted(suffixes))}")
    found = _without_results(found, f"in the folder {folder}")
    left_out = [path for path in left_out if path.suffix.lower() in _OTHER_IMAGES]
    if left_out:
        warnings.warn(
            f"left out in the folder {folder}: {_kinds(left_out)}, which are not opened here; convert them to JPEG or "
            "PNG",
            stacklevel=2,
        )
    return found


def is_result(path: Path) -> bool:
    """Returns whether this package wrote a file as a result, such as an overlay or a label map."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
                head = file.read(_EXIF_BYTES)
                file.seek(-min(_EXIF_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
                exif = head if b"Exif\0" in head else file.read()
                return _EXIF_MARK in exif
            if path.suffix.lower() == ".mp4":
                return _is_marked_video(file)
            if path.suffix.lower() != ".png":
                return False
            file.seek(8)
            # The texts before the pixels.
            while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
                length = int.from_bytes(head[:4], "big")
                if head[4:] == b"tEXt" and file.read(len(_PNG_MARK)) == _PNG_MARK:
                    return True
                file.seek(length + 4 - (len(_PNG_MARK) if head[4:] == b"tEXt" else 0), os.SEEK_CUR)
    except OSError:  # reported when it is opened
        pass
    return False


def _is_marked_video(file: IO[bytes]) -> bool:
    """Returns whether an MP4 has the mark of results: a comment, at the end of its index."""
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"moov":
            file.seek(max(0, length - 8 - _MP4_BYTES), os.SEEK_CUR)
            return _MP4_MARK in file.read(_MP4_BYTES)
        if length < 8:  # 64 bits, or up to the end: not written here
            return False
        file.seek(length - 8, os.SEEK_CUR)
    return False


def _without_results(found: list[Path], where: str) -> list[Path]:
    images = [path for path in found if not is_result(path)]
    if results := len(found) - len(images):
        summary = (
            f"{results} result{'s' if results > 1 else ''} of an earlier run; name such a file itself if it is meant"
        )
        if not images:
            raise InputError(f"no images {where} but {summary}")
        warnings.warn(f"left out {where}: {summary}", stacklevel=3)
    return images


def _kinds(paths: Iterable[Path]) -> str:
    """Returns the numbers of files by suffix, in words."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
    named = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    return named + (" and others" if len(counts) > 5 else "")


def expand(names: Iterable[str]) -> list[Path]:
    """Returns file names as they are, folders as their images, patterns (`*`, `?`, `[...]`, `**`) as what they match.

    A file that is not there is kept; opening it reports it. A file named in two ways (`a.png`, `./a.png`) counts once,
    and of a pattern's matches each real file, whatever links lead to it. Of folders and patterns results of an earlier
    run are left out.

    Raises:
        InputError: a folder without images, a pattern without matches.
    """
    paths: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            paths += images_in(name)
        elif has_magic(name) and not os.path.lexists(name):
            paths += _without_results(matching_files(name), f"for the pattern {name}")
        else:
            paths.append(Path(name))
    return distinct(paths)


def distinct(paths: Iterable[Path]) -> list[Path]:
    """Returns each path once, under the first of its names: paths are one that name one entry of one real folder."""
    entries: dict[Path, Path] = {}
    for path in paths:
        entries.setdefault(_entry(path), path)
    return list(entries.values())


def _entry(path: Path) -> Path:
    return Path(os.path.realpath(path.parent), path.name)


def matching_files(pattern: str) -> list[Path]:
    """Returns the files that a pattern matches, by name, each real file once: under its own name where that is among
    them.

    Raises:
        InputError: there are none.
    """
    files: dict[str, Path] = {}
    for path in sorted(path for path in _glob(Path(pattern)) if path.is_file()):
        real = os.path.realpath(path)
        if real not in files or str(_entry(path)) == real != str(_entry(files[real])):
            files[real] = path
    if not files:
        raise InputError(f"no file matches {pattern}")
    return sorted(files.values())


def _glob(pattern: Path) -> Iterator[Path]:
    """Yields as `glob` with `**`, but enters no real folder twice: links in folders may form circles."""
    if "**" not in pattern.parts:
        yield from map(Path, glob(str(pattern)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return
    at = pattern.parts.index("**")
    start, rest = Path(*pattern.parts[:at]), Path(*(pattern.parts[at + 1 :] or ("*",)))
    seen: set[str] = set()
    for base in _glob(start) if start.parts else [start]:
        for folder, inside, _ in os.walk(base, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                inside.clear()
                continue
            seen.add(real)
            inside[:] = sorted(name for name in inside if not is_hidden(name))
            yield from _glob(Path(escape(folder)) / rest)
