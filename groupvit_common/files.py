"""Files on disk, for every part of the package: one bounded reader of texts and JSON, one writer of whole sets of files.

What lies on a disk may be anything: a device, a pipe, a gigabyte of brackets, a number of five thousand digits. What is read
here is a regular file of bounded size, and JSON of bounded depth whose numbers are finite and whose texts can be written again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from groupvit_common.errors import CheckpointError, InputError

TEXT_BYTES = 64 << 20
"""Bound of a text file: a tokenizer of a quarter of a million entries takes 17 MB."""

# Levels of arrays and objects within one another; a tokenizer's file has six.
_JSON_DEPTH = 64
# Of a number without a fraction: "no bound" is 10**30 in the files of transformers' tokenizers, and has 31 digits.
_DIGITS = 40
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _DIGITS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name (without its folders) is one that programs put beside those of users.

    One rule for folders, archives, data sets and checkpoints: names that begin with a dot (`.DS_Store`, macOS's `._photo.jpg`,
    `.ipynb_checkpoints`), `__MACOSX`, and the leavings of Windows (`Thumbs.db`, `desktop.ini`).
    """
    return name.startswith(".") or name.casefold() in ("__macosx", "thumbs.db", "desktop.ini")


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes; links are followed.

    Raises:
        CheckpointError: the file is missing, no regular file, too large, or cannot be read; names the file and the cause.
    """
    try:
        # A pipe would wait for its writer: looked at before it is opened, and once more after that.
        _check_regular(path, path.stat().st_mode)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(path, status.st_mode)
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB, the most that such a file may have")
    return content


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is a device or a pipe, expected a regular file")


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark, line ends as `\\n`. Raises as `read_bytes`."""
    content = read_bytes(path, limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {content[error.start]:#04x} at {error.start}"
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            found = "it is UTF-16"
        raise CheckpointError(f"{path} is not UTF-8 text: {found}; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        CheckpointError: as `read_bytes` and `parse_json`; names the file.
    """
    return parse_json(read_bytes(path, limit), path)


def parse_json(text: bytes | str, source: object, *, has_names: bool = False) -> dict[str, Any]:
    """Returns the JSON object that a text is.

    Args:
        text: UTF-8, with or without a byte order mark.
        source: the file, for messages.
        has_names: names of files may be in it, which need not be Unicode (`unicode_json`).

    Raises:
        CheckpointError: no JSON, no object, nested too deeply, a number that is not finite or too long, a text that is no Unicode.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        # Looked at one by one only where there is a long run of digits: a vocabulary has fifty thousand numbers.
        whole = _bounded if _LONG_NUMBER.search(raw) else None
        content = json.loads(
            raw.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite, parse_int=whole
        )
        _check_depth(content)
        if not has_names and _SURROGATE.search(raw):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source} cannot be used: a text in it has half of a surrogate pair") from error
    except RecursionError as error:
        raise CheckpointError(f"{source} cannot be used: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be read as JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} must hold a JSON object, found {_KINDS.get(type(content), 'null')}")
    return content


_KINDS = {list: "an array", str: "a text", int: "a number", float: "a number", bool: "a truth value"}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _bounded(digits: str) -> int:
    if len(digits.lstrip("-")) >= _DIGITS:
        raise ValueError(f"it has a number of {_DIGITS} digits or more")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


# -- writing --------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text: a writer for `write_files`."""
    path.write_text(text, encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Returns a JSON object as text, indented and with sorted keys, as transformers writes it."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_files(
    directory: Path, writers: Mapping[str, Callable[[Path], None]], *, obsolete: Callable[[str], bool] | None = None
) -> None:
    """Puts files into a directory, all or none.

    Each writer gets a temporary path beside its final one. When all have succeeded and the bytes are on the disk, the files are
    renamed, in the order of `writers`; until then what was there before is untouched. Links are replaced, not written through.

    Args:
        writers: file name -> what writes the file at the path that it is given.
        obsolete: which other files, by name, an earlier save left that this one takes the place of; they are removed afterwards.

    Raises:
        CheckpointError: the directory or a file cannot be written.
        InputError: `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; expected the path of a directory")
    temporary: dict[str, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            # A hidden name that no reader takes for a part of the checkpoint.
            temporary[name] = directory / f".{name}.{secrets.token_hex(4)}.tmp"
            # Made here for the usual permissions: some writers, safetensors among them, make files that nobody else may read.
            temporary[name].touch(exist_ok=False)
            mode = temporary[name].stat().st_mode
            write(temporary[name])
            temporary[name].chmod(mode)
            flush(temporary[name])
        for name, path in temporary.items():
            path.replace(directory / name)
        if obsolete is not None:
            for name in list_files(directory):
                if name not in writers and obsolete(name):
                    (directory / name).unlink()
        flush(directory)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def unicode_json(content: Any, **how: Any) -> str:
    """Returns JSON in readable Unicode; in ASCII if a text in it is no Unicode, as file names that are not UTF-8 are none."""
    text = json.dumps(content, ensure_ascii=False, **how)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, **how)
    return text


def fit_name(name: str, ends: Iterable[str], folder: Path) -> str:
    """Returns a name for files in `folder` that gets one of these ends: itself, or where that would be too long for the file system its
    beginning with a hash of the whole."""
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        limit = 255
    # While it is written, a file has a longer name.
    room = limit - max(len(os.fsencode(end)) for end in ends) - len(f"..{secrets.token_hex(4)}.tmp")
    if len(os.fsencode(name)) <= room:
        return name
    digest = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    while len(os.fsencode(name + digest)) > room:
        name = name[:-1]
    return name + digest


def name_key(name: str) -> str:
    """Returns what is equal for names that some file system takes for the same: in upper and lower case, composed and decomposed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def list_files(directory: Path, folders: bool = False) -> list[str]:
    """Returns the names of the files in `directory`, sorted, `folders`: and in its folders; none if it cannot be listed."""
    try:
        paths = directory.rglob("*") if folders else directory.iterdir()
        return sorted(path.relative_to(directory).as_posix() for path in paths if path.is_file())
    except OSError:
        return []


def flush(path: Path) -> None:
    """Makes sure that a file's bytes, or a directory's entries, survive a power failure, where the system can tell."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
