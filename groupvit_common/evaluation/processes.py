"""The processes that evaluate together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from groupvit_common.errors import InputError


class ProcessInfo(Protocol):
    """This process among those that evaluate together; those of both backends' `distributed` are of this kind."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all(self, value: Any) -> list[Any]:
        """Returns the values of all processes, on each of them."""


@dataclass(frozen=True)
class SingleProcess:
    """The only process."""

    rank: int = 0
    world: int = 1

    def all(self, value: Any) -> list[Any]:
        return [value]


@contextmanager
def raised_by_all(process: ProcessInfo) -> Iterator[None]:
    """Raises the `InputError` of one process on all of them, where the others would wait for its results."""
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    failures = [text for text in process.all("" if own is None else str(own)) if text]
    if failures:
        raise own or InputError(failures[0])
