"""The two ways in which a user's request can fail.

Both derive from the built-in exception that code written for transformers already catches, so `except OSError` around
`from_pretrained` and `except ValueError` around a call keep working. The command line prints either as one line.
"""


class GroupViTError(Exception):
    """Base of the errors below: what came, what was expected, what to do."""


class InputError(GroupViTError, ValueError):
    """An argument, image, text or setting that cannot be used."""

    # TensorFlow raises an error of a traced function anew, and keeps its class only where the constructor is this one.
    __init__ = Exception.__init__


class CheckpointError(GroupViTError, OSError):
    """A checkpoint that cannot be found, reached, read or loaded."""


def printable(text: str) -> str:
    """A text without what a terminal would take for commands or could not show: escaped, as in a Python string."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
