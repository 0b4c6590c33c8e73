"""Files read within bounds.

A path may lead to anything: a device, a pipe, a file of any size. What is read here is a regular file of bounded size.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from groupvit_common.errors import CheckpointError

TEXT_BYTES = 64 << 20
"""Bound of a text file: a tokenizer of a quarter of a million entries takes 17 MB."""


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes; links are followed.

    Raises:
        CheckpointError: the file is missing, no regular file, too large, or cannot be read; names the file and the
            cause.
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
