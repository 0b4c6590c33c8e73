"""Errors that a client gets: a status, a code for programs, one sentence for people."""

from __future__ import annotations

from groupvit_common.errors import InputError, printable
from groupvit_common.preprocessing.images import NotAnImageError, TooLargeError


class Problem(Exception):
    """A request that is refused.

    Args:
        status: of HTTP. code: a word for programs. message: one sentence.
        retry_after: seconds after which the same request may be answered; None: it need not be tried again.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


def problem_of(error: InputError) -> Problem:
    """Returns what a client gets for an input that cannot be used."""
    message = printable(str(error))
    message = message if len(message) <= 500 else f"{message[:497]}..."
    if isinstance(error, TooLargeError):
        return Problem(413, "too_many_pixels", message)
    if isinstance(error, NotAnImageError):
        return Problem(415, "not_an_image", message)
    return Problem(422, "unusable", message)


def stopping() -> Problem:
    """Returns the refusal of a server that is about to end."""
    return Problem(503, "stopping", "the server is stopping: try another one, or this one later", 5)


def loading() -> Problem:
    """Returns the refusal of a server whose model is not there yet."""
    return Problem(503, "loading", "the server loads its model: try again in some seconds", 2)


def fault() -> Problem:
    """Returns what a client gets for a fault of the server."""
    return Problem(500, "fault", "a fault of the server, which its log names")


def busy(seconds: int, what: str) -> Problem:
    """Returns the refusal of a request for which there is no room now."""
    return Problem(429, "busy", f"{what}: try again in {seconds} s", seconds)
