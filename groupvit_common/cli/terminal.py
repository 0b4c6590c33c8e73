"""The output of the commands: results to stdout, everything else to stderr, on any console.

A console shows some characters and not others, it may be closed, full or gone, and a library may write to it as well.
What it cannot show is escaped, and what it cannot take is lost without the work being lost: `print_lines` never raises,
the command goes on, and its exit code shows it. Everything that a command prints comes through here.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from groupvit_common.errors import GroupViTError, printable
from groupvit_common.storage.json_text import finite

OK, SOME_FAILED, BAD_INPUT, NO_MODEL, BUG, SIGNALLED, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 70, 128, 130, 141

# With this variable set, an error within this program comes with its traceback.
_TRACEBACK = "GROUPVIT_TRACEBACK"
# Packages that are installed under another name than they are imported by.
_DISTRIBUTIONS = {"PIL": "pillow"}

# Why stdout takes no more, once it does not.
_lost: Exception | None = None


class Ended(BaseException):
    """The system ends this process. Not an `Exception`, so that handlers of those let it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def run(command: Callable[[], int | None]) -> int:
    """Returns the exit code of a command: its own, None being none, or that of what went wrong, which is printed as one
    line.

    `SystemExit` passes, with the code of lost output where it had none, and is raised when the system asks the process
    to end.
    """
    ended: SystemExit | None = None
    code = OK
    with console(), _ended_by_signals():
        try:
            code = command() or OK
        except SystemExit as stop:
            ended = stop
        except KeyboardInterrupt:
            error("interrupted")
            code = INTERRUPTED
        except Ended as stop:
            error(stop)
            # The process is to end, whoever called.
            ended = SystemExit(SIGNALLED + stop.number)
        except Exception as failure:
            code = _report(failure)
    if ended is not None:
        number = ended.code if isinstance(ended.code, int) else OK if ended.code is None else SOME_FAILED
        raise SystemExit(_exit_code(number))
    return _exit_code(code)


def _report(failure: Exception) -> int:
    """Prints an error; returns its exit code."""
    if is_out_of_memory(failure):
        error("out of memory: try a smaller --shorter-side or --batch-size, or --device cpu")
        return NO_MODEL
    if isinstance(failure, GroupViTError):
        error(failure)
        return failure.exit_code
    if isinstance(failure, ModuleNotFoundError) and failure.name:
        package = failure.name.partition(".")[0]
        error(f"the Python package {package} is missing: pip install {_DISTRIBUTIONS.get(package, package)}")
        return NO_MODEL
    if isinstance(failure, OSError):
        error(reason(failure) + (f": {failure.filename}" if failure.filename else ""))
        return BAD_INPUT
    if os.environ.get(_TRACEBACK):
        with suppress(OSError, ValueError):
            traceback.print_exception(failure)
    where = traceback.extract_tb(failure.__traceback__)[-1]
    error(
        f"this is a fault of the program, please report it: {type(failure).__name__}: {failure} "
        f"({Path(where.filename).name}, line {where.lineno}; all of it with {_TRACEBACK}=1)"
    )
    return BUG


def is_out_of_memory(failure: BaseException) -> bool:
    """Returns whether memory ran out, of the machine or a device, by the errors of Python and the frameworks."""
    # By name, without importing any of them.
    if isinstance(failure, MemoryError) or type(failure).__name__ in ("OutOfMemoryError", "ResourceExhaustedError"):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "RESOURCE_EXHAUSTED", "bad_alloc")
    return isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in signs)


def reason(failure: BaseException) -> str:
    """Returns the cause that an error of the system names, without its number and file."""
    return getattr(failure, "strerror", None) or str(failure) or type(failure).__name__


# -- the console -------------------------------------------------------------------------------------------------------


@contextmanager
def console() -> Iterator[None]:
    """Prepares stdout, stderr, warnings and logs for whatever is printed within, and puts them back afterwards."""
    global _lost
    _lost = None
    _fill_closed_descriptors()
    streams, showwarning = (sys.stdout, sys.stderr), warnings.showwarning
    if sys.stdout is None:
        # What is written to it fails, as it should: its descriptor is one for reading.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    errors = [_escape_unencodable(stream) for stream in (sys.stdout, sys.stderr)]
    logs = _Logs(logging.WARNING)
    logging.getLogger().addHandler(logs)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        warnings.showwarning = showwarning
        logging.getLogger().removeHandler(logs)
        _finish(sys.stdout)
        _finish(sys.stderr)
        for stream, before in zip((sys.stdout, sys.stderr), errors, strict=True):
            _reconfigure(stream, before)
        sys.stdout, sys.stderr = streams


def _fill_closed_descriptors() -> None:
    """Opens what stands for stdin, stdout and stderr where they are closed: the next file opened would take their
    place, and what libraries print would go into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                # The lowest that is free: this one.
                os.open(os.devnull, os.O_RDWR if descriptor == 2 else os.O_RDONLY)


def _escape_unencodable(stream: TextIO) -> str | None:
    """Makes a stream escape what its encoding lacks; returns its former treatment."""
    before = getattr(stream, "errors", None)
    _reconfigure(stream, "backslashreplace")
    return before


def _reconfigure(stream: TextIO, errors: str | None) -> None:
    # Streams of tests and notebooks are of other classes, and may lack it.
    with suppress(AttributeError, OSError, ValueError):
        if errors is not None:
            stream.reconfigure(errors=errors)  # type: ignore[attr-defined]


def _finish(stream: TextIO) -> None:
    """Flushes a stream. One that fails is redirected: Python flushes it again at exit, and would print an error."""
    try:
        stream.flush()
    except (OSError, ValueError) as failure:
        if stream is sys.stdout:
            _lose(failure)
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Logs(logging.Handler):
    """Prints what libraries log as warnings of this program."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.parent is not None:
            if logger.handlers:
                return  # shown already
            logger = logger.parent if logger.propagate else None
        try:
            message = record.getMessage()
        except Exception:
            message = str(record.msg)
        warn(message)


def _show_warning(message: Warning | str, *unused: object, **also_unused: object) -> None:
    warn(message)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns signals that end the process into `Ended`, so that it clears up as after Ctrl-C."""

    def end(number: int, _: object) -> None:
        raise Ended(number)

    numbers: list[int] = []
    if threading.current_thread() is threading.main_thread():
        wanted = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        # One that nohup ignores stays ignored.
        numbers = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


# -- lines -------------------------------------------------------------------------------------------------------------


def print_lines(*lines: str) -> None:
    """Prints lines of results. What stdout does not take is lost, with one error about it."""
    if _lost is None:
        try:
            _write("".join(f"{printable(line)}\n" for line in lines), sys.stdout)
        except (OSError, ValueError) as failure:
            _lose(failure)


def print_json(record: Mapping[str, Any]) -> None:
    """Prints a JSON object as one line; in ASCII where the console could not show it otherwise."""
    record = finite(record)
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        text = json.dumps(record)
    print_lines(text if text == printable(text) else json.dumps(record))


def error(message: object) -> None:
    """Prints an error as one line."""
    _print_message("error", str(message))


def warn(message: object) -> None:
    """Prints a warning as one line; line breaks, which libraries are fond of, become spaces."""
    _print_message("warning", " ".join(str(message).split()))


def note(message: object) -> None:
    """Prints a remark as one line."""
    _print_message("note", str(message))


def is_lost() -> bool:
    """Returns whether stdout takes nothing more."""
    return _lost is not None


def _print_message(kind: str, message: str) -> None:
    # Nowhere is left to say that stderr is closed or full.
    with suppress(OSError, ValueError):
        _write(f"groupvit: {kind}: {printable(message)}\n", sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    if Bar.shown:
        from tqdm import tqdm

        tqdm.write(text, file=stream, end="")
    else:
        stream.write(text)
    stream.flush()


def _lose(failure: Exception) -> None:
    global _lost
    if _lost is None:
        _lost = failure
        if not _is_closed_pipe(failure):
            cause = "it is closed" if getattr(failure, "errno", None) == errno.EBADF else reason(failure)
            error(f"stdout cannot be written ({cause}): what this command prints is lost")


def _is_closed_pipe(failure: Exception | None) -> bool:
    """Returns whether the reader of stdout went away, as `head` does when it has enough."""
    number = getattr(failure, "errno", None)
    return isinstance(failure, BrokenPipeError) or (os.name == "nt" and number == errno.EINVAL)


def _exit_code(code: int) -> int:
    if _is_closed_pipe(_lost):
        return CLOSED_PIPE
    return SOME_FAILED if _lost is not None and code == OK else code


class Bar:
    """A progress bar on a terminal; nothing is shown elsewhere.

    Args:
        total: number of units of all work, None if it is not known; unit: their name. `scale`: shown in thousands and
            millions.
        done: number of units done already.
        title: shown before the bar.
        shows: False: nothing is shown anywhere.
    """

    shown = 0

    def __init__(
        self,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        title: str = "",
        scale: bool = False,
        shows: bool = True,
    ) -> None:
        self._bar: Any = None
        with suppress(OSError, ValueError):
            if shows and sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total, initial=done, desc=printable(title) or None, unit=unit, unit_scale=scale,
                    file=sys.stderr, leave=False,
                )  # fmt: skip
                Bar.shown += 1

    def advance(self, count: int = 1) -> None:
        """Shows that so much more is done, but never more than there is."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                rest = count if self._bar.total is None else self._bar.total - self._bar.n
                self._bar.update(min(count, rest))

    def name(self, title: str) -> None:
        """Changes the title."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.set_description(printable(title))

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None
            Bar.shown -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
