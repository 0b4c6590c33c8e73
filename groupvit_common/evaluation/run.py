"""An evaluation run: the images of a set, shared by processes, read ahead, noted in a journal and counted.

A killed run can be resumed: what the journal has is not done again. All counts are integers, and sums of fractions are
rounded once, so that the result does not depend on which process did what in which order.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
from groupvit_common.evaluation.journal import Journal, Record
from groupvit_common.evaluation.processes import ProcessInfo, SingleProcess, raised_by_all
from groupvit_common.segmentation.predictor import BaseSegmenter

_READERS = 4


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run.

    Attributes:
        folder: for the journal; None: nothing is kept.
        restart: forget an earlier run in the folder.
        predictions: also save label maps in the folder.
        about: what must be the same for a run to be resumed, such as the model's name.
        begin: called once with the number of images that are done and of all.
        progress: called after each image with 1.
    """

    folder: Path | None = None
    restart: bool = False
    predictions: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    begin: Callable[[int, int], None] = lambda done, total: None
    progress: Callable[[int], None] = lambda count: None


class EvaluationResult(ABC):
    """Counts over the images of a set.

    Attributes:
        data: the set.
        seconds: the time of this run, without images of an earlier one.
        timed: the number of images in this time.
    """

    COUNTS: ClassVar[tuple[str, ...]]
    """The attributes that add up over processes."""

    def __init__(self, data: SegmentationSet | ClassificationSet) -> None:
        self.data = data
        self.seconds = 0.0
        self.timed = 0

    @property
    @abstractmethod
    def images(self) -> int:
        """The number of images."""

    @abstractmethod
    def fault_in(self, record: Record) -> str:
        """Returns the fault of an image's record in a journal, "" for one that can be added."""

    @abstractmethod
    def add(self, record: Record) -> None:
        """Adds the record of an image."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """Returns all measures of the set as a whole, fractions from 0 to 1, NaN where there is nothing to measure."""

    @abstractmethod
    def by_class(self) -> list[dict[str, Any]]:
        """Returns the index, name and measures of each class."""

    def numbers(self) -> list[Any]:
        """Returns the counts as JSON values, for another process to `merge`."""
        counts = (getattr(self, name) for name in self.COUNTS)
        return [*(count.tolist() if hasattr(count, "tolist") else count for count in counts), self.timed, self.seconds]

    def merge(self, numbers: Sequence[Any]) -> None:
        """Adds the counts of another process."""
        *counts, timed, seconds = numbers
        for name, count in zip(self.COUNTS, counts, strict=True):
            setattr(self, name, getattr(self, name) + count)
        self.timed += timed
        self.seconds = max(self.seconds, seconds)


Result = TypeVar("Result", bound=EvaluationResult)


def run_evaluation(
    result: Result,
    measure: Callable[[list[int]], Iterator[Record]],
    segmenter: BaseSegmenter,
    options: RunOptions | None,
    process: ProcessInfo | None,
    is_done: Callable[[str], bool] = lambda name: True,
) -> Result | None:
    """Measures all images of a set that an earlier run did not.

    Args:
        result: the empty result of the set.
        measure: yields the records of images, given their indices, in this order.
        segmenter: its labels and options are part of the journal's head.
        is_done: tells whether an image that is in the journal need not be done again.

    Returns:
        The result on the first process, None on the others.

    Raises:
        InputError: a file that cannot be read or written, by whichever process; a folder with another run's journal.
    """
    options, process, data = options or RunOptions(), process or SingleProcess(), result.data
    head = {**options.about, "set": data.kind, "split": data.split, **_fingerprint(segmenter)}
    names = [sample.name for sample in data]
    with Journal(options.folder, data, head, result.fault_in, process, options.restart) as journal:
        known = set(names)
        earlier = [each for each in journal.before if each["name"] in known and is_done(each["name"])]
        if process.rank == 0:
            for each in earlier:
                result.add(each)
        done = {each["name"] for each in earlier}
        options.begin(len(done), len(names))
        todo = [index for index, name in enumerate(names) if name not in done][process.rank :: process.world]
        started = time.perf_counter()
        with raised_by_all(process):
            for record in measure(todo):
                journal.add(record)
                result.add(record)
                result.timed += 1
                options.progress(1)
        result.seconds = time.perf_counter() - started
    gathered = process.all(result.numbers())
    if process.rank:
        return None
    for numbers in gathered[1:]:
        result.merge(numbers)
    return result


Given = TypeVar("Given")
Read = TypeVar("Read")


def read_ahead(given: Iterable[Given], read: Callable[[Given], Read], count: int) -> Iterator[Read]:
    """Yields `read(each)` in order, with up to `count` of them read ahead by threads."""
    with ThreadPoolExecutor(_READERS) as pool:
        coming: deque[Future[Read]] = deque()
        try:
            for each in given:
                coming.append(pool.submit(read, each))
                if len(coming) > count:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _fingerprint(segmenter: BaseSegmenter) -> dict[str, Any]:
    """Returns the labels and options of a segmenter: besides its model all that decides its results."""
    labels = [[*label.words, *(f'"{text}"' for text in label.definitions)] for label in segmenter.labels]
    return {"labels": labels, **segmenter.options.to_dict()}
