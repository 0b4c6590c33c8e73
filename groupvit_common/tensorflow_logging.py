"""Keeps a library's chatter off the terminal, without hiding what matters."""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Lines of TensorFlow's import and search for GPUs, before any setting can reach its logger: information, and that there
# is no CUDA on a machine without it.
_TENSORFLOW_NOISE = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog|I0000 |W0000 .*(cuda|TensorRT|register)|E0000 .*cuda"
    rb"|To enable the following instructions|\s*$)",
    re.IGNORECASE,
)
_LITERT_NOISE = re.compile(rb"INFO: ")


def set_environment() -> None:
    """Makes TensorFlow log errors alone, and take GPU memory as needed, unless the user chose; before its import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


@contextmanager
def tensorflow_advice() -> Iterator[None]:
    """Hides TensorFlow's warnings that a small collective outside of any graph is slow; errors are shown."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def tensorflow_start_up() -> Iterator[None]:
    """Passes on what the first import of TensorFlow writes to the standard error stream, without the noise.

    Does nothing if the user enabled messages (TF_CPP_MIN_LOG_LEVEL 0 or 1) or TensorFlow is there already. C++ code
    bypasses Python, so the descriptor itself is redirected; errors are written out even if the import fails.
    """
    if "tensorflow" in sys.modules or os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") in ("0", "1"):
        yield
        return
    with _without(_TENSORFLOW_NOISE):
        yield


@contextmanager
def litert_start_up() -> Iterator[None]:
    """Passes on what LiteRT writes to the standard error stream when a model first runs, without the information."""
    with _without(_LITERT_NOISE):
        yield


@contextmanager
def _without(noise: re.Pattern[bytes]) -> Iterator[None]:
    """Passes on what is written to the standard error stream, by C++ too, without lines that begin so."""
    try:
        kept, aside = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    except OSError:  # no standard error stream at all, or no room for a file
        yield
        return
    with aside:
        _flush_stderr()
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            _flush_stderr()
            os.dup2(kept, 2)
            os.close(kept)
            aside.seek(0)
            for line in aside:
                if not noise.match(line):
                    with suppress(OSError):  # closed or full
                        os.write(2, line)


def _flush_stderr() -> None:
    with suppress(AttributeError, OSError, ValueError):  # there may be none
        sys.stderr.flush()
