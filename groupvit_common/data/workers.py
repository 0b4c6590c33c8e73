"""Processes that make samples, and the pipes to them.

They are plain interpreters at the other end of two pipes: nothing of the calling process is forked, its script is not run
again, and a worker whose caller is gone, however it went, reads the end of its input and goes too.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

import groupvit_common
from groupvit_common.data.samples import Made, SampleMaker
from groupvit_common.data.sources import Entry
from groupvit_common.errors import GroupViTError

Work = Sequence[tuple[Entry, tuple[int, ...]]]

_LENGTH = struct.Struct("<q")


class Result(Protocol):
    """What became of a piece of work: `Made` but for the pixels, which are taken one picture at a time, in order."""

    causes: list[str | None]
    tokens: NDArray[np.int64]
    mask: NDArray[np.int64]

    def next_picture(self, out: NDArray[np.float32]) -> None:
        """Writes the next picture into `out`, float32 `[3, S, S]`."""


class Makers(Protocol):
    """Where work is done: results come in the order in which work was given."""

    ahead: int
    """Pieces of work that keep it busy."""

    def give(self, work: Work) -> None:
        """Takes a piece of work."""

    def take(self) -> Result:
        """The result of the oldest piece of work not yet taken; the pictures of the one before must have been taken."""

    def close(self) -> None:
        """Ends it."""


class Here:
    """Does the work in this process, when its result is asked for."""

    ahead = 1

    def __init__(self, maker: SampleMaker) -> None:
        self._maker = maker
        self._work: deque[Work] = deque()

    def give(self, work: Work) -> None:
        self._work.append(work)

    def take(self) -> Result:
        return _Made(self._maker(self._work.popleft()))

    def close(self) -> None:
        self._maker.close()


class _Made:
    def __init__(self, made: Made) -> None:
        self.causes, self.tokens, self.mask = made.causes, made.tokens, made.mask
        self._pictures = iter(made.pictures)

    def next_picture(self, out: NDArray[np.float32]) -> None:
        out[...] = next(self._pictures)


class Workers:
    """Processes that take turns."""

    _EACH = 3
    """Pieces of work that a worker is given ahead: one it does, one done before, one to go on with."""

    def __init__(self, maker: SampleMaker, count: int) -> None:
        self.ahead = self._EACH * count
        self._given = self._taken = 0
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(Path(groupvit_common.__file__).parents[1]), os.environ.get("PYTHONPATH")))
            ),
            # As many processes as cores: threads within would only get in each other's way.
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-P", "-c", f"from {__name__} import work; work()"]
        self._workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)
            for _ in range(count)
        ]
        try:
            for worker in self._workers:
                _widen(worker)
                _send(worker, maker)
        except BaseException:
            self.close()
            raise

    def give(self, work: Work) -> None:
        _send(self._workers[self._given % len(self._workers)], list(work))
        self._given += 1

    def take(self) -> Result:
        worker = self._workers[self._taken % len(self._workers)]
        self._taken += 1
        length = bytearray(_LENGTH.size)
        _receive(worker, memoryview(length))
        content = bytearray(_LENGTH.unpack(length)[0])
        _receive(worker, memoryview(content))
        answer = pickle.loads(content)
        if isinstance(answer, Exception):
            raise answer
        return _Piped(worker, *answer)

    def close(self) -> None:
        for worker in self._workers:
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None
                pipe.close()
        for worker in self._workers:
            worker.wait()


class _Piped:
    """A result whose pixels still lie in the pipe."""

    def __init__(
        self,
        worker: subprocess.Popen[bytes],
        causes: list[str | None],
        tokens: NDArray[np.int64],
        mask: NDArray[np.int64],
    ) -> None:
        self._worker, self.causes, self.tokens, self.mask = worker, causes, tokens, mask

    def next_picture(self, out: NDArray[np.float32]) -> None:
        _receive(self._worker, out.data.cast("B"))


def _widen(worker: subprocess.Popen[bytes]) -> None:
    """Lets a picture or two lie in the pipe of results, where the system has that to give: half of the time goes to fewer waits."""
    assert worker.stdout is not None
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(worker.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)


def _send(worker: subprocess.Popen[bytes], content: Any) -> None:
    assert worker.stdin is not None
    rest = memoryview(pickle.dumps(content, pickle.HIGHEST_PROTOCOL))
    try:
        while rest:
            rest = rest[worker.stdin.write(rest) :]
    except BrokenPipeError as error:
        raise _ended(worker) from error


def _receive(worker: subprocess.Popen[bytes], into: memoryview) -> None:
    assert worker.stdout is not None
    while into:
        count = worker.stdout.readinto(into)  # type: ignore[attr-defined]  # unbuffered: a FileIO
        if not count:
            raise _ended(worker)
        into = into[count:]


def _ended(worker: subprocess.Popen[bytes]) -> GroupViTError:
    code = worker.wait()
    reason = (
        f"signal {signal.Signals(-code).name}, which the system sends when memory is short" if code == -9 else
        f"signal {-code}" if code < 0 else f"exit code {code}"
    )  # fmt: skip
    return GroupViTError(f"a worker process of the data pipeline ended unexpectedly ({reason})")


def work() -> None:
    """The worker: a maker and then pieces of work on standard input, results on standard output, until the input ends."""
    # Ctrl-C, and a scheduler's signal to the whole group, are the caller's to answer; the end of input is the sign to stop.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed goes to the error stream
    warnings.simplefilter("ignore")  # Pillow's, of odd metadata: among millions of pictures there are many
    todo: queue.SimpleQueue[Work] = queue.SimpleQueue()
    done: queue.Queue[Made | Exception] = queue.Queue(maxsize=1)
    maker: SampleMaker = pickle.load(source)

    def read() -> None:
        # The caller never waits for room in the pipe: it may be waiting for a result.
        try:
            while True:
                todo.put(pickle.load(source))
        except BaseException:
            os._exit(0)

    def write() -> None:
        try:
            while True:
                _write(sink, done.get())
        except BaseException:
            os._exit(0)

    for part in (read, write):
        threading.Thread(target=part, daemon=True).start()
    while True:
        piece = todo.get()
        try:
            done.put(maker(piece))
        except GroupViTError as error:
            done.put(error)
        except Exception as error:
            done.put(RuntimeError(f"{type(error).__name__} in a worker process of the data pipeline: {error}"))


def _write(sink: IO[bytes], answer: Made | Exception) -> None:
    small: Any = answer if isinstance(answer, Exception) else (answer.causes, answer.tokens, answer.mask)
    content = pickle.dumps(small, pickle.HIGHEST_PROTOCOL)
    parts: list[bytes | memoryview] = [_LENGTH.pack(len(content)), content]
    if not isinstance(answer, Exception):
        parts += [picture.data.cast("B") for picture in answer.pictures]
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[sink.write(rest) :]
