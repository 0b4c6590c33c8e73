"""A stream of images through a model: files are read, and pixels labelled, beside the model, in threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from groupvit_common.errors import InputError
from groupvit_common.segmentation.preparation import Loaded, Prepared
from groupvit_common.segmentation.result import Segmentation

# Images among which those of one size are found, and images that are taken from the caller but not yet given back, at
# most: times the batch size.
_GROUPED, _TAKEN = 3, 4
# Memory of images at which no more are read ahead (a photo of 12 megapixels takes some 50 MB); at half of it images
# wait no longer for others of their size.
_BYTES_AHEAD = 256_000_000

LabelPixels = Callable[[], Segmentation]
"""Labels the pixels of an image that the model has seen."""

OnError = Callable[[Any, InputError], object]
"""Is called with an input that cannot be read, and the error."""


@dataclass(frozen=True)
class Steps:
    """The steps of an image. All but `segment` must suit any thread.

    `load`: a source of any kind -> the decoded image. `prepare`: -> its views. `segment`: up to `batch_size` images of
    one `part` -> what labels the pixels of each. `threaded`: pixels may be labelled in another thread.
    """

    load: Callable[[Any], Loaded]
    prepare: Callable[[Loaded], Prepared]
    segment: Callable[[list[Prepared]], list[LabelPixels]]
    batch_size: int
    threaded: bool


def segmented(sources: Iterable[Any], steps: Steps, on_error: OnError | None = None) -> Iterator[Segmentation]:
    """Yields the result of each source, in order; images of one size go through the model together.

    Which ones depends on their order and sizes alone, not on how fast they are read. Sources are taken in the caller's
    thread, up to four times `batch_size` before their results are. Paths, addresses and bytes are decoded in another
    thread; what may be changed or closed, as an array or an open file may, before the next is taken.

    Args:
        sources: images of any kind.
        on_error: is called in order with a source that cannot be read. None: the error is raised, after the results of
            earlier sources.
    """
    with _ReadAhead(steps) as ahead, label_executor(steps.threaded) as submit:
        yield from _Stream(iter(sources), steps, ahead, submit, on_error).results()


class _Stream:
    """The images of one call. They are numbered in their order: those before `given` have been given back, those before
    `opened` have been read, those before `given + len(taken)` have been taken from the caller."""

    def __init__(
        self,
        sources: Iterator[Any],
        steps: Steps,
        ahead: _ReadAhead,
        submit: Callable[[LabelPixels], Future[Segmentation]],
        on_error: OnError | None,
    ) -> None:
        self._sources, self._steps, self._ahead, self._submit, self._on_error = sources, steps, ahead, submit, on_error
        self._taken: deque[Any] = deque()
        self._given = self._opened = 0
        self._bytes: dict[int, int] = {}
        self._waiting: dict[int, Prepared] = {}  # for the model
        self._done: dict[int, Future[Segmentation] | Exception] = {}
        self._has_ended = False
        self._last_error: Exception | None = None

    def results(self) -> Iterator[Segmentation]:
        while True:
            self._take_sources()
            if self._is_time_to_run():
                self._run(self._waiting[min(self._waiting)].part)
            elif self._is_more_to_open():
                self._open()
            elif not self._taken:
                if self._last_error is not None:
                    raise self._last_error
                return
            yield from self._ready()

    def _take_sources(self) -> None:
        while not self._has_ended and len(self._taken) < _TAKEN * self._steps.batch_size:
            try:
                source = next(self._sources)
            except StopIteration:
                self._has_ended = True
            except Exception as error:
                self._has_ended, self._last_error = True, error
            else:
                self._taken.append(source)
                self._ahead.add(source)

    def _is_more_to_open(self) -> bool:
        return self._opened < self._given + len(self._taken)

    def _is_time_to_run(self) -> bool:
        """Returns whether the oldest image waits no longer for others of its size. Not a matter of time."""
        if not self._waiting:
            return False
        oldest, batch_size = min(self._waiting), self._steps.batch_size
        # The first result soon.
        grouped = _GROUPED * batch_size if oldest else batch_size
        held = sum(size for number, size in self._bytes.items() if number >= oldest)
        is_last = self._has_ended and not self._is_more_to_open()
        return is_last or self._opened - oldest >= grouped or held >= _BYTES_AHEAD // 2

    def _open(self) -> None:
        number, image = self._opened, self._ahead.take()
        self._opened += 1
        if isinstance(image, Prepared):
            self._waiting[number], self._bytes[number] = image, image.nbytes
            if sum(other.part == image.part for other in self._waiting.values()) == self._steps.batch_size:
                self._run(image.part)
        elif self._on_error is not None and isinstance(image, InputError):
            self._done[number] = image
        else:
            self._fail(number, image)

    def _run(self, part: tuple[int, int]) -> None:
        numbers = [number for number, image in self._waiting.items() if image.part == part]
        images = [self._waiting.pop(number) for number in numbers]
        try:
            labels = self._steps.segment(images)
        except Exception as error:
            self._fail(numbers[0], error)
        else:
            self._done.update(zip(numbers, map(self._submit, labels), strict=True))

    def _fail(self, number: int, error: Exception) -> None:
        """Ends the stream at an image, whose error is raised when the results before it have been given."""
        self._has_ended, self._last_error = True, error
        self._opened = number
        while len(self._taken) > number - self._given:
            self._taken.pop()
        for images in (self._waiting, self._done):
            for later in [other for other in images if other >= number]:
                del images[later]

    def _ready(self) -> Iterator[Segmentation]:
        """Yields results as far as they are there; waits for the first, and where there is nothing else to do."""
        while self._given in self._done:
            outcome = self._done[self._given]
            if isinstance(outcome, Future):
                can_open = self._is_more_to_open() and not self._ahead.is_stuck()
                if self._given and not outcome.done() and (can_open or self._is_time_to_run()):
                    return
                yield outcome.result()
            else:
                assert self._on_error is not None
                assert isinstance(outcome, InputError)
                self._on_error(self._taken[0], outcome)
            del self._done[self._given], outcome
            self._ahead.release(self._bytes.pop(self._given, 0))
            self._taken.popleft()
            self._given += 1


@contextmanager
def label_executor(threaded: bool) -> Iterator[Callable[[LabelPixels], Future[Segmentation]]]:
    """A function that has a result made: in a thread, or at once."""
    if not threaded:
        yield _at_once
        return
    executor = ThreadPoolExecutor(1, "groupvit-label")
    try:
        yield executor.submit
    finally:
        executor.shutdown(cancel_futures=True)


def _at_once(label: LabelPixels) -> Future[Segmentation]:
    future: Future[Segmentation] = Future()
    try:
        future.set_result(label())
    except Exception as error:
        future.set_exception(error)
    return future


class _ReadAhead:
    """A thread that prepares images in the order in which they are added, within a bound of memory."""

    def __init__(self, steps: Steps) -> None:
        self._load, self._prepare = steps.load, steps.prepare
        self._changed = threading.Condition()
        self._sources: deque[Any] = deque()
        self._outcomes: deque[Prepared | Exception] = deque()
        self._bytes = 0
        self._closed = False
        # A daemon: an iterator that nobody finishes must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="groupvit-read", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A download may take longer; the thread ends by itself then.
        self._thread.join(timeout=1)

    def add(self, source: Any) -> None:
        if not isinstance(source, str | Path | bytes):
            try:
                source = self._load(source)
            except Exception as error:
                source = error
        with self._changed:
            self._sources.append(source)
            self._changed.notify_all()

    def take(self) -> Prepared | Exception:
        """Returns the next image or its error; waits for it. The caller releases its bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._outcomes)
            return self._outcomes.popleft()

    def release(self, count: int) -> None:
        with self._changed:
            self._bytes -= count
            self._changed.notify_all()

    def is_stuck(self) -> bool:
        """Returns whether nothing more is read until bytes are released."""
        with self._changed:
            return not self._outcomes and self._bytes >= _BYTES_AHEAD

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._sources and self._bytes < _BYTES_AHEAD))
                if self._closed:
                    return
                source = self._sources.popleft()
            outcome = self._outcome(source)
            with self._changed:
                self._bytes += outcome.nbytes if isinstance(outcome, Prepared) else 0
                self._outcomes.append(outcome)
                self._changed.notify_all()
            # Nothing is kept while the next is waited for.
            del source, outcome

    def _outcome(self, source: Any) -> Prepared | Exception:
        if isinstance(source, Exception):
            return source
        try:
            return self._prepare(source if isinstance(source, Loaded) else self._load(source))
        except Exception as error:
            return error
