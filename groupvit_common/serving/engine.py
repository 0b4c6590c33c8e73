"""The model's thread: requests of several clients wait in line, images go through the model together.

Short work (labels of an encoded image) goes before long work (an image through the encoder), but after so many short
ones a long one has its turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from groupvit_common.segmentation.encoded import PREPARATION_OPTIONS, EncodedImage
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.serving.metrics import Metrics
from groupvit_common.serving.problems import stopping

T = TypeVar("T")

# Short ones in a row while a long one waits.
_SHORT_IN_A_ROW = 8


@dataclass(eq=False)
class _Encoding:
    """An image that waits for the model. `key`: images of one go together."""

    segmenter: BaseSegmenter
    image: Image.Image
    key: Hashable
    future: Future[tuple[EncodedImage, float]] = field(default_factory=Future)


@dataclass(eq=False)
class _Call:
    """Work of any kind that waits for the thread."""

    call: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Engine:
    """A backend's segmenter in a thread of its own.

    Args:
        name: of the backend.
        segmenter: never changed here; requests have their own over the same model.
        batch_size, batch_seconds: images that go through the model together, and how long one waits for others.
    """

    def __init__(
        self, name: str, segmenter: BaseSegmenter, *, batch_size: int, batch_seconds: float, metrics: Metrics
    ) -> None:
        self.name, self.segmenter = name, segmenter
        self._batch_size, self._batch_seconds, self._metrics = batch_size, batch_seconds, metrics
        self._short: deque[_Call] = deque()
        self._long: deque[_Encoding | _Call] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"groupvit-{name}", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """The number of requests that wait."""
        return len(self._short) + len(self._long)

    def encode(self, segmenter: BaseSegmenter, image: Image.Image) -> Future[tuple[EncodedImage, float]]:
        """Returns, in time, an image as this segmenter's model sees it, and the seconds in the model."""
        work = _Encoding(segmenter, image, view_key(segmenter))
        self._add(self._long, work)
        return work.future

    def run(self, call: Callable[[], T], *, long: bool = False) -> Future[T]:
        """Returns, in time, the result of a call in the model's thread. `long`: it goes through the image encoder."""
        work = _Call(call)
        self._add(self._long if long else self._short, work)
        return work.future

    def stop(self) -> None:
        """Ends the thread when it has done what it does; what waits is refused."""
        with self._changed:
            self._stopping = True
            waiting = [*self._short, *self._long]
            self._short.clear()
            self._long.clear()
            self._changed.notify_all()
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(stopping())
        self._thread.join()

    def _add(self, line: deque[Any], work: _Call | _Encoding) -> None:
        with self._changed:
            if self._stopping:
                raise stopping()
            line.append(work)
            self._changed.notify_all()
        work.future.add_done_callback(lambda future: self._drop(line, work) if future.cancelled() else None)

    def _drop(self, line: deque[Any], work: _Call | _Encoding) -> None:
        """Forgets work whose client has gone at once: its image is no request's any more, and must not pile up."""
        with self._changed, suppress(ValueError):
            line.remove(work)

    def _work(self) -> None:
        in_a_row = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._short or self._long)
                if self._stopping:
                    return
                is_short = bool(self._short) and not (self._long and in_a_row >= _SHORT_IN_A_ROW)
                work: _Call | _Encoding = self._short.popleft() if is_short else self._long.popleft()
                in_a_row = in_a_row + 1 if is_short else 0
            # Its client may have gone just now.
            if not work.future.set_running_or_notify_cancel():
                continue
            if isinstance(work, _Call):
                self._run(work)
            else:
                self._encode(self._batch(work))
            del work

    def _run(self, work: _Call) -> None:
        start = time.perf_counter()
        try:
            result = work.call()
        except BaseException as error:
            work.future.set_exception(error)
        else:
            work.future.set_result(result)
        self._metrics.count("groupvit_model_seconds_total", time.perf_counter() - start, backend=self.name)

    def _batch(self, first: _Encoding) -> list[_Encoding]:
        """Returns an image and others that came or come within a few milliseconds."""
        batch, end = [first], time.monotonic() + self._batch_seconds
        with self._changed:
            while len(batch) < self._batch_size and not self._stopping:
                found = next((w for w in self._long if isinstance(w, _Encoding) and w.key == first.key), None)
                if found is not None:
                    self._long.remove(found)
                    if found.future.set_running_or_notify_cancel():
                        batch.append(found)
                elif self._short or not self._changed.wait(max(0.0, end - time.monotonic())):
                    break
        return batch

    def _encode(self, batch: list[_Encoding]) -> None:
        start = time.perf_counter()
        try:
            encoded = batch[0].segmenter.encode([work.image for work in batch])
        except BaseException as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                # One by one: only one of them may be at fault.
                for work in batch:
                    self._encode([work])
            return
        seconds = time.perf_counter() - start
        self._metrics.count("groupvit_model_seconds_total", seconds, backend=self.name)
        self._metrics.observe("groupvit_batch_images", len(batch), of_counts=True, backend=self.name)
        for work, each in zip(batch, encoded, strict=True):
            work.future.set_result((each, seconds))


def view_key(segmenter: BaseSegmenter) -> Hashable:
    """Returns what tells apart the ways in which a model sees an image."""
    return tuple(getattr(segmenter.options, name) for name in PREPARATION_OPTIONS)
