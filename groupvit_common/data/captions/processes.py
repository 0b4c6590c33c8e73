"""A function in a process of its own, at the other end of two pipes.

The process is a plain interpreter: nothing of the calling process is forked, its script is not run again, and when the caller is
gone, however it went, the process reads the end of its input and goes too.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import groupvit_common
from groupvit_common.errors import GroupViTError

_LENGTH = struct.Struct("<q")
_PIPE_BYTES = 1 << 20


class Bulky(NamedTuple):
    """An answer with bytes that are not pickled but written as they are: the asker reads them where it wants them."""

    answer: Any
    bulk: list[memoryview]


class Process:
    """Answers each question put to it, in order. Several may be put ahead.

    Args:
        function: what answers; it and the questions are pickled.
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
        self._questions, self._answers = self._process.stdin, self._process.stdout
        # Room for a picture or two, where the system has it to give, halves the time that goes to passing them on.
        with suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.ask(function)

    def ask(self, question: Any) -> None:
        """Puts a question."""
        rest = memoryview(pickle.dumps(question, pickle.HIGHEST_PROTOCOL))
        try:
            while rest:
                rest = rest[self._questions.write(rest) :]
        except BrokenPipeError as error:
            raise self._ended() from error

    def answer(self) -> Any:
        """The answer to the oldest question that has none yet; what the function raised is raised here."""
        length = bytearray(_LENGTH.size)
        self.read_into(memoryview(length))
        content = bytearray(_LENGTH.unpack(length)[0])
        self.read_into(memoryview(content))
        answer = pickle.loads(content)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def read_into(self, buffer: memoryview) -> None:
        """Fills a buffer of bytes with what comes next of an answer's bulk."""
        while buffer:
            count = self._answers.readinto(buffer)  # type: ignore[attr-defined]  # unbuffered: a FileIO
            if not count:
                raise self._ended()
            buffer = buffer[count:]

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._questions.close()
        self._process.wait()
        self._answers.close()

    def _ended(self) -> GroupViTError:
        code = self._process.wait()
        reason = f"exit code {code}" if code >= 0 else f"signal {-code}"
        if code == -9:
            reason = "killed, as the system does when memory is short"
        return GroupViTError(f"a worker process of the data pipeline ended unexpectedly ({reason})")


def serve() -> None:
    """The process: a function and then questions on standard input, answers on standard output, until the input ends."""
    # Ctrl-C, and a scheduler's signal to the whole group, are the caller's to answer; the end of input is the sign to stop.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed goes to the error stream
    warnings.simplefilter("ignore")  # Pillow's, of odd metadata: among millions of pictures there are many
    function = pickle.load(source)
    questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: queue.Queue[Any] = queue.Queue(maxsize=1)

    def read() -> None:
        # At once: the asker never waits for room in the pipe, since it may be waiting for an answer.
        try:
            while True:
                questions.put(pickle.load(source))
        except BaseException:
            os._exit(0)

    def write() -> None:
        try:
            while True:
                _write(sink, answers.get())
        except BaseException:
            os._exit(0)

    for part in (read, write):
        threading.Thread(target=part, daemon=True).start()
    while True:
        question = questions.get()
        try:
            answers.put(function(question))
        except GroupViTError as error:
            answers.put(error)
        except Exception as error:
            answers.put(RuntimeError(f"{type(error).__name__} in a worker process of the data pipeline: {error}"))


def _write(sink: IO[bytes], answer: Any) -> None:
    bulk: list[memoryview] = answer.bulk if isinstance(answer, Bulky) else []
    content = pickle.dumps(answer.answer if isinstance(answer, Bulky) else answer, pickle.HIGHEST_PROTOCOL)
    for rest in (memoryview(_LENGTH.pack(len(content))), memoryview(content), *bulk):
        while rest:
            rest = rest[sink.write(rest) :]
