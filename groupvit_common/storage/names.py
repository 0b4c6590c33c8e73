"""Names of files and folders: hidden ones, equal ones, ones that fit a file system."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name (without its folders) is one that programs put beside those of
    users.

    One rule for folders, archives, data sets and checkpoints: names that begin with a dot (`.DS_Store`, macOS's
        `._photo.jpg`,
    `.ipynb_checkpoints`), `__MACOSX`, and the leavings of Windows (`Thumbs.db`, `desktop.ini`).
    """
    return name.startswith(".") or name.casefold() in ("__macosx", "thumbs.db", "desktop.ini")


def list_files(directory: Path, folders: bool = False) -> list[str]:
    """Returns the names of the files in `directory`, sorted, `folders`: and in its folders; none if it cannot be
    listed."""
    try:
        paths = directory.rglob("*") if folders else directory.iterdir()
        return sorted(path.relative_to(directory).as_posix() for path in paths if path.is_file())
    except OSError:
        return []


def fit_name(name: str, ends: Iterable[str], folder: Path) -> str:
    """Returns a name for files in `folder` that gets one of these ends: itself, or where that would be too long for the
    file system its beginning with a hash of the whole."""
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        limit = 255
    room = limit - max(len(os.fsencode(end)) for end in ends)
    if len(os.fsencode(name)) <= room:
        return name
    digest = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    while len(os.fsencode(name + digest)) > room:
        name = name[:-1]
    return name + digest


def name_key(name: str) -> str:
    """Returns what is equal for names that some file system takes for the same: in upper and lower case, composed and
    decomposed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
