"""Executors: samples are made and shards listed in this process, or in worker processes.

A worker is a plain interpreter at the other end of two pipes: nothing of the calling process is forked, its script is
not run again, and when the caller is gone, however it went, the worker reads the end of its input and exits.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import groupvit_common
from groupvit_common.data.captions.samples import SampleMaker, Samples
from groupvit_common.data.captions.sources import Entry, Shards, Source, Unit, list_shard
from groupvit_common.errors import GroupViTError

Work = Sequence[tuple[Entry, tuple[int, ...]]]
"""Entries with the seeds of their samples."""

_LENGTH = struct.Struct("<q")
_PIPE_BYTES = 1 << 20


class InlineExecutor:
    """Makes samples in this process, when their result is taken."""

    ahead = 1
    """Pieces of work to submit before a result is taken."""

    def __init__(self, maker: SampleMaker) -> None:
        self._maker = maker
        self._work: deque[Work] = deque()

    def submit(self, work: Work) -> None:
        """Takes a piece of work."""
        self._work.append(work)

    def result(self) -> Samples:
        """Returns the result of the oldest piece of work not yet taken."""
        return self._maker(self._work.popleft())

    def list_unit(self, source: Source, number: int) -> Unit:
        """Returns `source.unit(number)`. May be called from another thread than the rest."""
        return source.unit(number)

    def close(self) -> None:
        """Closes what is open."""
        self._maker.close()


class WorkerExecutor:
    """Makes samples in processes that take turns; one more lists shards: a thread would wait for the loop."""

    def __init__(self, maker: SampleMaker, count: int) -> None:
        self.ahead = 3 * count  # each has one in work, one done before, one waiting
        self._submitted = self._taken = 0
        self._processes: list[Process] = []
        try:
            self._processes += (Process(maker) for _ in range(count))
            self._lister = Process(list_shard)
            self._processes.append(self._lister)
        except BaseException:
            self.close()
            raise
        self._makers = self._processes[:count]

    def submit(self, work: Work) -> None:
        """As `InlineExecutor.submit`."""
        self._makers[self._submitted % len(self._makers)].send(work)
        self._submitted += 1

    def result(self) -> Samples:
        """As `InlineExecutor.result`. Its arrays hold until the next result of the same worker is taken."""
        samples: Samples = self._makers[self._taken % len(self._makers)].receive()
        self._taken += 1
        return samples

    def list_unit(self, source: Source, number: int) -> Unit:
        """As `InlineExecutor.list_unit`."""
        if not isinstance(source, Shards):
            return source.unit(number)
        self._lister.send(source.shard(number))
        unit: Unit = self._lister.receive()
        return unit

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.close()


class Process:
    """A function in a process of its own: answers each request, in order. Several may be sent ahead.

    Args:
        function: pickled, as requests and replies are; arrays of a reply are not copied on their way.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        path = (str(Path(groupvit_common.__file__).parents[1]), os.environ.get("PYTHONPATH"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                # There are as many processes as cores: threads within would only get in each other's way.
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._buffers: list[bytearray] = []
        # Room for an image or two, where the system grants it, halves the time of passing them on.
        with suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.send(function)

    def send(self, request: Any) -> None:
        """Sends a request."""
        try:
            _write(self._requests, pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError as error:
            raise self._ended() from error

    def receive(self) -> Any:
        """Returns the reply to the oldest request without one; raises what the function raised.

        Its arrays are overwritten by the next reply: memory that is used again is faster than fresh one.
        """
        (count,) = _LENGTH.unpack(self._read(bytearray(_LENGTH.size)))
        lengths = struct.unpack(f"<{count}q", self._read(bytearray(count * _LENGTH.size)))
        self._buffers += (bytearray() for _ in range(count - len(self._buffers)))
        content, *arrays = (self._read(self._buffer(number, length)) for number, length in enumerate(lengths))
        reply = pickle.loads(content, buffers=arrays)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _buffer(self, number: int, length: int) -> memoryview:
        if len(self._buffers[number]) < length:
            self._buffers[number] = bytearray(length)
        return memoryview(self._buffers[number])[:length]

    def _read(self, buffer: bytearray | memoryview) -> memoryview:
        """Fills a buffer."""
        rest = whole = memoryview(buffer)
        while rest:
            count = self._replies.readinto(rest)  # type: ignore[attr-defined]  # unbuffered: a FileIO
            if not count:
                raise self._ended()
            rest = rest[count:]
        return whole

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._requests.close()
        self._process.wait()
        self._replies.close()

    def _ended(self) -> GroupViTError:
        code = self._process.wait()
        reason = f"exit code {code}" if code >= 0 else f"signal {-code}"
        if code == -9:
            reason = "killed, as the system does when memory is short"
        return GroupViTError(f"a worker process of the data pipeline ended unexpectedly ({reason})")


def serve() -> None:
    """Runs a worker: reads a function and then requests from standard input, writes replies to standard output."""
    # Ctrl-C, and a scheduler's signal to the whole group, are the caller's to handle; the end of input ends the worker.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed goes to the error stream
    warnings.simplefilter("ignore")  # Pillow's, of unusual metadata: among millions of images there are many
    function = pickle.load(source)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    replies: queue.Queue[Any] = queue.Queue(maxsize=1)

    def read() -> None:
        # At once: the caller never waits for room in the pipe, since it may be waiting for a reply.
        try:
            while True:
                requests.put(pickle.load(source))
        except BaseException:
            os._exit(0)

    def write() -> None:
        try:
            while True:
                _reply(sink, replies.get())
        except BaseException:
            os._exit(0)

    for part in (read, write):
        threading.Thread(target=part, daemon=True).start()
    while True:
        request = requests.get()
        try:
            replies.put(function(request))
        except GroupViTError as error:
            replies.put(error)
        except Exception as error:
            replies.put(RuntimeError(f"{type(error).__name__} in a worker process of the data pipeline: {error}"))


def _reply(sink: IO[bytes], reply: Any) -> None:
    """Writes the number of parts, their lengths, the pickle, and the arrays as they are."""
    arrays: list[pickle.PickleBuffer] = []
    content = pickle.dumps(reply, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    parts = [memoryview(content), *(array.raw() for array in arrays)]
    _write(sink, struct.pack(f"<{1 + len(parts)}q", len(parts), *map(len, parts)))
    for part in parts:
        _write(sink, part)


def _write(sink: IO[bytes], content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[sink.write(rest) :]
