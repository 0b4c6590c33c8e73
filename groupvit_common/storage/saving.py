"""Sets of files that are saved whole.

What is saved is the old set of files or the new one, whole, whenever its writer is killed and whoever reads meanwhile:

    DIR/.groupvit-1b2c3d4e.tmp/   the new files while they are written; its writer holds a lock on it (`flock`)
    DIR/.groupvit-commit/         the same folder, renamed when all of it is on the disk: from here on the new set is
    the valid one DIR/config.json, ...          the files are moved to their places, and the folder disappears

Whoever reads or writes next finishes the moves of a writer that was killed among them (`settle`), or, without the right
to write, reads through them (`read_lock`). Readers hold a shared lock on DIR, moves an exclusive one. Folders of dead
writers are removed by the next save. Without locks (Windows, some network drives) a killed save is still whole, but a
reader may meet a save in progress.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.json_text import json_text, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def weights_pattern(name: str) -> str:
    """Returns the pattern of the files that hold weights called `name`: that file, or an index and its shards."""
    stem, _, ending = map(re.escape, name.partition("."))
    return rf"{stem}\.{ending}(\.index\.json)?|{stem}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.{ending}"


WEIGHTS_FILE = re.compile(weights_pattern("model.safetensors"))
"""Names of the files that a model's weights are saved in, here and by transformers."""

# Files of which a save leaves its own only. A folder that waits to be settled says which by name.
_FAMILIES = {"weights": WEIGHTS_FILE}

_COMMIT = ".groupvit-commit"
_MANIFEST = ".manifest.json"
_STAGING = re.compile(r"\.groupvit-[0-9a-f]{8}\.tmp")
# Longer than any model takes to be read: a reader that holds its lock longer was stopped, and nobody waits for it.
_PATIENCE_SECONDS = 300.0


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text: a writer for `write_files`."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_files(
    directory: Path, writers: Mapping[str, Callable[[Path], None]], *, family: str | None = None
) -> list[Path]:
    """Puts files into a directory, all or none, whenever the process is killed.

    Each writer gets a path of the final name in a hidden folder. When all have succeeded and the bytes are on the disk,
    that folder becomes the valid set at once, and its files are moved to their places, in the order of `writers`; until
    then what was there before is untouched. Links are replaced, not written through. Of two that save at the same time
    the last wins, whole.

    Args:
        directory: made if need be. It must not be held by `read_lock` of the same thread.
        writers: file name -> what writes the file at the path that it is given.
        family: "weights": other weights files, which an earlier save left, are removed.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: the directory or a file cannot be written.
        InputError: `directory` is a file, or there is a folder where a file is to be.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file; expected the path of a directory")
        directory.mkdir(parents=True, exist_ok=True)
        for name in writers:
            if _is_folder(directory / name):
                raise InputError(f"{directory / name} is a folder; a file of this name is to be saved there")
        _remove_dead(directory)
        with _staging(directory) as folder:
            for name, write in writers.items():
                # Made here for the usual permissions: safetensors and others make files for their owner alone.
                (folder / name).touch(exist_ok=False)
                mode = (folder / name).stat().st_mode
                write(folder / name)
                # Only where it differs: some network drives refuse every change.
                if (folder / name).stat().st_mode != mode:
                    (folder / name).chmod(mode)
                flush(folder / name)
            # A file's name may be any bytes.
            names = [os.fsencode(name).decode("latin-1") for name in writers]
            write_text(folder / _MANIFEST, json_text({"files": names, "family": family}))
            flush(folder / _MANIFEST)
            flush(folder)
            _commit(folder, directory)
            settle(directory)
    except (CheckpointError, InputError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a text that is no Unicode, a name with a null character
        raise CheckpointError(f"{directory} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return [directory / name for name in writers]


def write_file(path: Path, write: Callable[[Path], None]) -> Path:
    """Puts one file into its place as `write_files` does; returns its path."""
    return write_files(path.parent, {path.name: write})[0]


def write_texts(directory: Path, texts: Mapping[str, str]) -> list[Path]:
    """Puts text files into a directory as `write_files` does; returns their paths."""
    return write_files(directory, {name: partial(write_text, text=text) for name, text in texts.items()})


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Yields a new hidden folder in `directory`, locked while its writer lives; removed in the end unless renamed."""
    while True:
        folder = _staging_path(directory)
        folder.mkdir()
        with _locked(folder, exclusive=True, seconds=0) as held:
            # Whoever removes dead folders may have seen this one before it was locked.
            if held is False or not _is_folder(folder):
                continue
            try:
                yield folder
            finally:
                if _is_folder(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            return


def _staging_path(directory: Path) -> Path:
    return directory / f".groupvit-{secrets.token_hex(4)}.tmp"


def _remove_dead(directory: Path) -> None:
    """Removes what killed writers left. Without locks nobody can tell, and it stays."""
    # Names, not paths: beside it there may be the results of a hundred thousand images.
    for path in [directory / name for name in os.listdir(directory) if _STAGING.fullmatch(name)]:  # noqa: PTH208
        if _is_folder(path):
            with contextlib.suppress(OSError), _locked(path, exclusive=True, seconds=0) as held:
                if held:
                    shutil.rmtree(path, ignore_errors=True)


def _commit(folder: Path, directory: Path) -> None:
    """Makes the files in `folder` the valid ones."""
    while True:
        settle(directory)
        try:
            folder.rename(directory / _COMMIT)
        except OSError as error:
            # Another's, between the two lines.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not _is_folder(directory / _COMMIT):
                raise
        else:
            flush(directory)
            return


def settle(directory: Path) -> None:
    """Finishes a save whose writer was killed while it moved the files to their places. Almost always there is none.

    Raises:
        OSError: it cannot be finished here: no right to write.
        CheckpointError: what lies there is not of this package.
    """
    if _is_folder(directory / _COMMIT):
        with _locked(directory, exclusive=True):
            # Another process may have been faster.
            if _is_folder(directory / _COMMIT):
                _move(directory)


def _move(directory: Path) -> None:
    commit = directory / _COMMIT
    if (commit / _MANIFEST).is_file():
        files, family = _pending(directory)
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # moved before the writer was killed
                (commit / name).replace(directory / name)
        for name in _superseded(directory, files, family):
            (directory / name).unlink(missing_ok=True)
        flush(directory)
    # Renamed first: the next save would replace an empty folder of this name, and be removed instead.
    dead = _staging_path(directory)
    with contextlib.suppress(FileNotFoundError):  # without locks: another was faster
        commit.rename(dead)
    shutil.rmtree(dead, ignore_errors=True)


def _pending(directory: Path) -> tuple[list[str], str | None]:
    """Returns the files of a save that is to be finished, and the family that they replace."""
    content = read_json(directory / _COMMIT / _MANIFEST)
    files, family = content.get("files"), content.get("family")
    if isinstance(files, list) and (family is None or (isinstance(family, str) and family in _FAMILIES)):
        with contextlib.suppress(AttributeError, UnicodeError):
            names = [os.fsdecode(name.encode("latin-1")) for name in files]
            if all(
                name and name == Path(name).name and name not in ("..", _COMMIT) and "\0" not in name for name in names
            ):
                return names, family
    raise CheckpointError(
        f"{directory / _COMMIT} is not what a save of this package leaves: remove it, or fetch all again"
    )


def _superseded(directory: Path, files: list[str], family: str | None) -> list[str]:
    if family is None:
        return []
    names = (path.name for path in directory.iterdir() if not _is_folder(path))
    return [name for name in names if name not in files and _FAMILIES[family].fullmatch(name)]


def _is_folder(path: Path) -> bool:
    """Returns whether there is a folder, not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114


@contextlib.contextmanager
def read_lock(directory: Path) -> Iterator[Path]:
    """Keeps the files of a directory as they are while several are read, so that they belong together.

    Yields:
        The directory to read from: this one, or where a killed save in it cannot be finished here (no right to write),
            a temporary
        one of links to the files as they would be.
    """
    while True:
        can_settle = True
        try:
            settle(directory)
        except CheckpointError:
            raise
        except OSError:
            can_settle = False
        with _locked(directory, exclusive=False):
            # A save may have ended since then: its moves wait for this lock, and the next reader makes them first.
            if not _is_folder(directory / _COMMIT):
                yield directory
                return
            if not can_settle:
                with tempfile.TemporaryDirectory() as view:
                    _link(directory, Path(view))
                    yield Path(view)
                return


def _link(directory: Path, view: Path) -> None:
    files, family = _pending(directory)
    superseded = _superseded(directory, files, family)
    for path in directory.resolve().iterdir():
        if path.name not in (*files, *superseded) and not path.name.startswith(_COMMIT):
            (view / path.name).symlink_to(path)
    for name in files:
        moved = directory.resolve() / name
        waiting = directory.resolve() / _COMMIT / name
        (view / name).symlink_to(waiting if waiting.exists() else moved)


def has_file(directory: Path, name: str) -> bool:
    """Returns whether a directory has a file, be it in a save that is still to be finished."""
    # `os.path` takes a name that is too long, or in a folder that may not be entered, for missing.
    return any(os.path.exists(folder / name) for folder in (directory, directory / _COMMIT))  # noqa: PTH110


@contextlib.contextmanager
def _locked(directory: Path, *, exclusive: bool, seconds: float = _PATIENCE_SECONDS) -> Iterator[bool | None]:
    """Holds a lock on a directory, among processes and threads, if it can be had in `seconds`.

    Yields:
        Whether it is held; None where there are no locks, or the directory has just gone.
    """
    try:
        descriptor = None if fcntl is None else os.open(directory, os.O_RDONLY)
    except OSError:
        descriptor = None
    if fcntl is None or descriptor is None:
        yield None
        return
    try:
        yield _lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, seconds)
    finally:
        # Said aloud: a process that was forked meanwhile has the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, kind: int, seconds: float) -> bool | None:
    end, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        except OSError:  # a file system without locks
            return None
        else:
            return True
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def flush(path: Path) -> None:
    """Makes sure that a file's bytes, or a directory's entries, survive a power failure, where the system can tell."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network drives do not know it, of folders above all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
