"""The two kinds of errors that a user can cause.

Both derive from the built-in exception that code written for transformers already catches, so `except OSError` around
`from_pretrained` and `except ValueError` around a call keep working. The command line prints either as one line.
"""

import unicodedata
from collections.abc import Sequence


class GroupViTError(Exception):
    """Base of the errors below: what came, what was expected, what to do. `exit_code`: of a command."""

    exit_code = 2


class InputError(GroupViTError, ValueError):
    """An argument, image, text or setting that cannot be used."""

    # TensorFlow raises an error of a traced function anew, and keeps its class only where the constructor is this one.
    __init__ = Exception.__init__


class CheckpointError(GroupViTError, OSError):
    """A checkpoint that cannot be found, reached, read or loaded."""

    exit_code = 3


# Characters that join letters in a terminal, though Python calls them unprintable.
_HARMLESS = frozenset("\u200c\u200d")


def short(value: object) -> str:
    """Returns a value as it is written in Python, for a message: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


def some(names: Sequence[str], limit: int = 5) -> str:
    """Returns the first few of some names, and how many there are besides, for a message."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """Returns a text as one line that any terminal shows and none obeys: line breaks, control and direction marks
    escaped as in Python.

    So are the bytes of a file name that is not UTF-8, which Python holds as halves of surrogate pairs.
    """
    return "".join(
        sign if sign.isprintable() or sign in _HARMLESS or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1]
        for sign in text
    )
