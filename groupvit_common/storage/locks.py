"""One writer at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from groupvit_common.errors import InputError

_TRIES = 100
_HOW = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
# Of a file system that cannot lock: some network folders.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO)


class FolderLock:
    """A lock on a hidden file in a folder. Released, it takes the file away; what a killed process leaves of it locks
    nothing.

    Args:
        name: of the file; one for each purpose.
        purpose: what must not be done twice at a time, for the message: "training".
        log: is told where the file system has no locks; the lock is then no lock.

    Raises:
        InputError: another process, or another part of this one, has the lock.
    """

    def __init__(self, folder: Path, name: str, purpose: str, log: Callable[[str], None] = print) -> None:
        self._path, self._file, self._owner = folder / name, -1, os.getpid()
        for _ in range(_TRIES):
            try:
                file = os.open(self._path, _HOW, 0o666)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    return  # a folder that cannot be written in is reported by who writes
                # A link: what it leads to is not ours.
                with suppress(OSError):
                    self._path.unlink()
                continue
            try:
                _lock(file)
            except OSError as error:
                holder = _content(file)
                os.close(file)
                if error.errno in _NO_LOCKS:
                    log(f"{folder} is on a file system without locks: make sure that no other {purpose} writes there")
                    return
                raise InputError(
                    f"another {purpose} writes into {folder}{f' ({holder})' if holder else ''}: wait for its end, or "
                    "choose another folder"
                ) from error
            # The one who had it may have taken the file away in between.
            if self._is_there(file):
                break
            os.close(file)
        else:
            raise InputError(f"another {purpose} begins and ends in {folder} all the time: choose another folder")
        self._file = file
        with suppress(OSError, AttributeError):  # Windows has no pwrite
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _is_there(self, file: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), self._path.stat())
        return False

    def release(self) -> None:
        """Lets others in. Nothing happens the second time."""
        if self._file < 0 or os.getpid() != self._owner:  # a fork's copy
            return
        with suppress(OSError):  # Windows takes no open file away
            self._path.unlink()
        with suppress(OSError):
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        self.release()


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        # Of one byte that nobody writes.
        os.lseek(file, 1 << 20, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _content(file: int) -> str:
    with suppress(OSError, AttributeError):
        return os.pread(file, 200, 0).decode("utf-8", "replace").strip()
    return ""
