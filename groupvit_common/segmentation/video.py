"""Videos through a model: frames are decoded, and their pixels labelled, beside it, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_whole_number
from groupvit_common.segmentation.clips import Clip, Frame, open_clip
from groupvit_common.segmentation.preparation import Loaded, Prepared
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.stream import Steps, label_executor

# Memory of the frames of a batch. Three batches are there at once: one is decoded, one is in the model, and one is
# given back.
_BATCH_BYTES = 64_000_000


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """A segmented frame of a clip.

    Attributes:
        segmentation: its result, as of an image.
        number: its place in the clip, from 0 on.
        pts, time_base: its time stamp, `pts * time_base` seconds, as the clip has it.
        duration: until the clip's next frame in units of `time_base`, as the clip says it; 0 if it does not.
    """

    segmentation: Segmentation
    number: int
    pts: int
    time_base: Fraction
    duration: int

    @property
    def time(self) -> float:
        """The time stamp in seconds."""
        return float(self.pts * self.time_base)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A frame on its way into the model."""

    frame: Frame
    prepared: Prepared


def segmented_frames(
    source: Any, steps: Steps, max_pixels: int, every: int = 1, max_frames: int | None = None
) -> Iterator[VideoFrame]:
    """Returns an iterator of the results of a clip's frames, in order; memory does not grow with their number.

    Args:
        source: an open `Clip`, or what `open_clip` takes.
        steps: `load` is not used; what `segment` returns is called frame by frame, in their order.
        max_pixels: bound of a frame.
        every: every N-th frame alone, the first one first.
        max_frames: at most so many results.

    Raises:
        InputError: as `open_clip` and `Clip`, and for numbers that cannot be used.
    """
    for name, number in (("every", every), ("max_frames", 1 if max_frames is None else max_frames)):
        if not is_whole_number(number) or number < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {number!r}")
    if isinstance(source, Clip):
        return _results(source, steps, every, max_frames)
    # At once, so that what is no clip is known before the first result is asked for.
    return _results_of_own(open_clip(source, max_pixels=max_pixels), steps, every, max_frames)


def _results_of_own(clip: Clip, steps: Steps, every: int, max_frames: int | None) -> Iterator[VideoFrame]:
    with clip:
        yield from _results(clip, steps, every, max_frames)


def _results(clip: Clip, steps: Steps, every: int, max_frames: int | None) -> Iterator[VideoFrame]:
    batches = _batches(clip, steps, every, max_frames)
    labelled: deque[tuple[Frame, Future[Segmentation]]] = deque()
    failure: Exception | None = None
    with ThreadPoolExecutor(1, "groupvit-decode") as decoder, label_executor(steps.threaded) as submit:
        coming = decoder.submit(next, batches, None)
        while failure is None:
            given = len(labelled)
            try:
                batch = coming.result()
                if batch is None:
                    break
                # One batch is decoded while the model has this one.
                coming = decoder.submit(next, batches, None)
                labels = steps.segment([each.prepared for each in batch])
            except Exception as error:
                failure = error
            else:
                labelled.extend((each.frame, submit(label)) for each, label in zip(batch, labels, strict=True))
                # While the pixels of these are labelled, those of the last batch are given back.
                del batch, labels
            for _ in range(given):
                yield _result(*labelled.popleft())
        while labelled:
            yield _result(*labelled.popleft())
    if failure is not None:
        raise failure


def _result(frame: Frame, segmentation: Future[Segmentation]) -> VideoFrame:
    return VideoFrame(segmentation.result(), frame.number, frame.pts, frame.time_base, frame.duration)


def _batches(clip: Clip, steps: Steps, every: int, max_frames: int | None) -> Iterator[list[_Waiting]]:
    """Yields frames that follow each other and have one size, as many as the model takes and memory allows."""
    batch: list[_Waiting] = []
    held = 0
    frames = islice(clip, 0, None if max_frames is None else every * (max_frames - 1) + 1, every)
    while True:
        failure: Exception | None = None
        try:
            frame = next(frames, None)
            waiting = None if frame is None else _Waiting(frame, steps.prepare(Loaded(frame.image, clip.source)))
        except Exception as error:
            waiting, failure = None, error
        own = 0 if waiting is None else waiting.prepared.nbytes
        is_other = bool(batch) and waiting is not None and waiting.prepared.part != batch[0].prepared.part
        if batch and (waiting is None or is_other or len(batch) == steps.batch_size or held + own > _BATCH_BYTES):
            yield batch
            batch, held = [], 0
        if failure is not None:
            raise failure
        if waiting is None:
            return
        batch.append(waiting)
        held += own
