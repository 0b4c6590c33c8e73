"""Encoded images that a server keeps for a while, and the memory of requests."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Self

from groupvit_common.segmentation.encoded import EncodedImage
from groupvit_common.serving.problems import Problem, busy


@dataclass
class Kept:
    """An image of one client. `encoded`: by backend and by the options that change what the model sees. `nbytes`:
    memory that is held."""

    encoded: OrderedDict[Hashable, EncodedImage]
    used: float
    nbytes: int = 0

    def weigh(self) -> int:
        """Counts the memory anew; returns by how much it is more. The image itself is the same in all."""
        every, before = list(self.encoded.values()), self.nbytes
        image = 4 * every[0].image.width * every[0].image.height
        self.nbytes = image + sum(each.nbytes - image for each in every)
        return self.nbytes - before


# Views of one image that are kept: a slider that changes what the model sees must not fill the memory.
_MOST_VIEWS = 4


class ImageStore:
    """Encoded images by ids that nobody guesses, within a bound of memory and age.

    Args:
        most_bytes, seconds: the bounds; an image's age begins anew when it is used.
        clock: the time in seconds.
    """

    def __init__(self, most_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._seconds, self._clock = most_bytes, seconds, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, key: Hashable, image: EncodedImage) -> str:
        """Keeps an image; returns its id. Raises `Problem` for one that is larger than the bound."""
        if image.nbytes > self._most_bytes:
            raise Problem(413, "too_large", "the image needs more memory than this server keeps images in")
        # 192 random bits, as many as nobody guesses.
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[name] = kept = Kept(OrderedDict({key: image}), self._clock())
            self.nbytes += kept.weigh()
            self._tidy()
        return name

    def find(self, name: str, key: Hashable) -> tuple[EncodedImage | None, EncodedImage]:
        """Returns an image as encoded under a key, None if it was not, and as encoded in any way.

        Raises:
            Problem: there is no such image, or it is gone.
        """
        with self._lock:
            self._tidy()
            kept = self._kept.get(name)
            if kept is None:
                self.misses += 1
                raise Problem(404, "image_gone", "the image is not kept any more: send it again")
            kept.used = self._clock()
            self._kept.move_to_end(name)
            found = kept.encoded.get(key)
            self.hits += found is not None
            return found, next(iter(kept.encoded.values()))

    def extend(self, name: str, key: Hashable, image: EncodedImage) -> None:
        """Keeps a further way in which an image was encoded, unless it is gone."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
            kept.encoded[key] = image
            while len(kept.encoded) > _MOST_VIEWS:
                kept.encoded.popitem(last=False)
            self.nbytes += kept.weigh()
            self._tidy()

    def remove(self, name: str) -> bool:
        """Forgets an image; returns whether it was there."""
        with self._lock:
            kept = self._kept.pop(name, None)
            self.nbytes -= 0 if kept is None else kept.nbytes
            self._tidy()
            return kept is not None

    def clear(self) -> None:
        """Forgets all images."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0

    def _tidy(self) -> None:
        now = self._clock()
        # In the order of use: the oldest come first.
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if now - oldest.used <= self._seconds and self.nbytes <= self._most_bytes:
                return
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


class Memory:
    """A bound of the bytes that all requests hold."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._lock = most_bytes, threading.Lock()
        self.nbytes = 0

    def take(self, count: int) -> bool:
        """Takes so many bytes if there is room; returns whether there was."""
        with self._lock:
            # One request alone is bounded by what an image may have.
            if self.nbytes and self.nbytes + count > self._most_bytes:
                return False
            self.nbytes += count
            return True

    def give(self, count: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self.nbytes -= count


class Held:
    """The bytes that one request holds; a context manager that gives them back."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._count, self._is_over, self._lock = memory, 0, False, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        with self._lock:
            self._is_over = True
            self._memory.give(self._count)

    def take(self, count: int) -> None:
        """Takes more bytes. Raises `Problem` if there is no room, or the request is over: a thread may still decode the
        image of a client that has gone."""
        with self._lock:
            if self._is_over or not self._memory.take(count):
                raise busy(2, "the server holds as much of other requests as it may")
            self._count += count
