"""`logging` as programs import it from transformers: how much is reported, and progress bars of downloads.

Levels are those of Python's `logging`. What this project has to say about a call it raises or warns of; these levels
count for its loggers, below "groupvit".
"""

import logging as _logging

CRITICAL = FATAL = _logging.CRITICAL
ERROR = _logging.ERROR
WARNING = WARN = _logging.WARNING
INFO = _logging.INFO
DEBUG = _logging.DEBUG
NOTSET = _logging.NOTSET

_ROOT = "groupvit"

__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "NOTSET",
    "WARN",
    "WARNING",
    "disable_progress_bar",
    "enable_progress_bar",
    "get_logger",
    "get_verbosity",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]


def get_logger(name: str | None = None) -> _logging.Logger:
    """Returns the logger of a name; this project's if None."""
    return _logging.getLogger(name or _ROOT)


def get_verbosity() -> int:
    """Returns the level from which this project's loggers report."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Sets the level from which this project's loggers report."""
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Reports everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Reports from `INFO`."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Reports from `WARNING`."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Reports errors only."""
    set_verbosity(ERROR)


def disable_progress_bar() -> None:
    """Shows no progress of downloads."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


def enable_progress_bar() -> None:
    """Shows the progress of downloads."""
    from huggingface_hub.utils.tqdm import enable_progress_bars

    enable_progress_bars()
