"""Zero-shot evaluation: protocols, the run over a set that can be killed and continued, calibration. No framework.

A run notes each picture in a journal, a line of JSON with the cells of its confusion matrix, so that what was done before a kill
is not done again, and several processes can share the pictures. All counts are integers and sums of shares are rounded once: the
result does not depend on who did what in which order.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation import journal as journals
from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.datasets.registry import DATASETS
from groupvit_common.evaluation.datasets.segmentation import Mask, Names, Sample, SegmentationSet
from groupvit_common.evaluation.journal import BEST, JOURNAL, line_of
from groupvit_common.evaluation.metrics import (
    best_overlaps,
    class_accuracy,
    class_iou,
    confusion_matrix,
    group_counts,
    mean_accuracy,
    mean_iou,
    oracle_confusion,
    pixel_accuracy,
)
from groupvit_common.preprocessing.prompts import Label, parse_labels
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.storage.locks import FolderLock

Counts = NDArray[np.int64]
ProtocolName = Literal["paper", "tcl", "native"]
PROTOCOLS: tuple[ProtocolName, ...] = ("paper", "tcl", "native")

LOCK_NAME = ".evaluation.lock"
PREDICTIONS = "predictions"
CALIBRATION_THRESHOLDS = (*(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.99)


@dataclass(frozen=True, kw_only=True)
class Settings(SegmentationOptions):
    """Settings of a set's evaluation: `names` of the classes (`segmentation_sets.open_sets`), and the options of segmentation."""

    names: Names = "authors"

    def segmenter(self, base: BaseSegmenter, batch_size: int) -> BaseSegmenter:
        """Returns a segmenter of the same model with these settings."""
        options = self.to_dict()
        del options["names"]
        return type(base)(base.model, base.processor, batch_size=batch_size, **options)

    def to_dict(self) -> dict[str, Any]:
        return {"names": self.names, **super().to_dict()}


def default_protocol(kind: str) -> ProtocolName:
    """The paper's, but for scenes: their pictures are of the size that a model for them was trained at."""
    spec = DATASETS.get(kind.partition(":")[0])
    return "native" if spec is not None and spec.protocol == "native" else "paper"


def protocol_settings(protocol: ProtocolName, kind: str) -> Settings:
    """What a protocol says of a kind of set.

    "paper": the authors' evaluation. "tcl": the same with the classes called as mmsegmentation has them, as in the unified protocol of
    TCL. "native": what `Segmenter` does unless told otherwise, with the authors' words and thresholds.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if kind == "imagenet":
        return Settings() if protocol == "native" else Settings(templates="seven", normalize_prompts=False)
    spec = DATASETS.get(kind.partition(":")[0])
    threshold = None if spec is None else spec.threshold
    if protocol == "native":
        return Settings(background=threshold)
    return Settings(
        names="set" if protocol == "tcl" else "authors",
        normalize_prompts=False,
        background=threshold,
        assignment="hard",
        top_k=5,
        shorter_side=448,
        window=448,
        stride=224,
    )


class Place(Protocol):
    """This process among those that evaluate together; `groupvit_torch.distributed.Place` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all(self, value: Any) -> list[Any]:
        """The values of every process, on every one."""


@dataclass(frozen=True)
class Alone:
    rank: int = 0
    world: int = 1

    def all(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a run. folder: for the journal, None: nothing is kept; restart: forget what it has; predictions: also save label maps there.
    about: what must be the same for a run to be continued, such as the model's name. progress: called after each picture."""

    folder: Path | None = None
    restart: bool = False
    predictions: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[int], None] = lambda count: None
    begin: Callable[[int, int], None] = lambda done, all_of_them: None


# ---- segmentation ----


@dataclass(eq=False)
class SegmentationResult:
    """Counts of a set's pictures so far.

    confusion: rows the true classes, columns what the model said; oracle: the same had each group its best label; overlaps: of every
    true mask the Jaccard index of the group that fits it best. images: how many pictures; seconds, timed: of this run, and how many
    it did itself.
    """

    data: SegmentationSet
    confusion: Counts
    oracle: Counts
    overlaps: list[float] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    timed: int = 0

    @classmethod
    def of(cls, data: SegmentationSet) -> SegmentationResult:
        square = (len(data.classes),) * 2
        return cls(data, np.zeros(square, np.int64), np.zeros(square, np.int64))

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts one picture's record."""
        for total, cells in ((self.confusion, record["confusion"]), (self.oracle, record["oracle"])):
            for row, column, count in cells:
                total[row, column] += count
        self.overlaps += record["overlaps"]
        self.images += 1

    def numbers(self) -> tuple[Any, ...]:
        """What another process needs to `merge`: values that JSON knows."""
        return self.confusion.tolist(), self.oracle.tolist(), self.overlaps, self.images, self.timed, self.seconds

    def merge(self, numbers: tuple[Any, ...]) -> None:
        """Counts another process's pictures."""
        confusion, oracle, overlaps, images, timed, seconds = numbers
        self.confusion += np.asarray(confusion)
        self.oracle += np.asarray(oracle)
        self.overlaps += overlaps
        self.images += images
        self.timed += timed
        self.seconds = max(self.seconds, seconds)

    @property
    def left_out(self) -> int | None:
        """The class that does not count in means."""
        return 0 if self.data.has_background and not self.data.background_in_mean else None

    @property
    def mean_iou(self) -> float:
        return mean_iou(self.confusion, self.left_out)

    def scores(self) -> dict[str, float]:
        """All measures of the set as a whole, shares 0 to 1, NaN where there is nothing to measure."""
        return {
            "mean_iou": self.mean_iou,
            "pixel_accuracy": pixel_accuracy(self.confusion),
            "mean_accuracy": mean_accuracy(self.confusion, self.left_out),
            "oracle_mean_iou": mean_iou(self.oracle, self.left_out),
            "mask_jaccard": math.fsum(self.overlaps) / len(self.overlaps) if self.overlaps else math.nan,
        }

    def by_class(self) -> list[dict[str, Any]]:
        """For each class its name, IoU, accuracy, IoU with the oracle's labels and number of true pixels."""
        columns = (class_iou(self.confusion), class_accuracy(self.confusion), class_iou(self.oracle))
        pixels = self.confusion.sum(axis=1)
        return [
            {
                "index": i,
                "name": name,
                **dict(zip(("iou", "accuracy", "oracle_iou"), (column[i].item() for column in columns), strict=True)),
                "pixels": int(pixels[i]),
            }
            for i, name in enumerate(self.data.classes)
        ]


def evaluate_segmentation(
    segmenter: BaseSegmenter,
    data: SegmentationSet,
    options: Options | None = None,
    place: Place | None = None,
    *,
    background_labels: Sequence[Label] = (),
) -> SegmentationResult | None:
    """Segments every picture of a set and counts. The result is the first process's; the others get None.

    Args:
        background_labels: words whose pixels are background, besides the set's own.

    Raises:
        InputError: a set with a background needs a threshold or words for it, one without must have neither; a file that cannot be
            read, by whichever process; a folder with the journal of a run with other settings.
    """
    options, place = options or Options(), place or Alone()
    _look_for(segmenter, data, background_labels)
    predictions = None if options.folder is None or not options.predictions else options.folder / PREDICTIONS

    def is_done(name: str) -> bool:
        return predictions is None or _prediction_path(predictions, name).is_file()

    result = SegmentationResult.of(data)
    with _Journal(options, place, data, segmenter) as journal:
        names = [sample.name for sample in data]
        known = set(names)
        done = {record["name"] for record in journal.before if record["name"] in known and is_done(record["name"])}
        if place.rank == 0:
            for record in journal.before:
                if record["name"] in done:
                    result.add(record)
        todo = [index for index, name in enumerate(names) if name not in done][place.rank :: place.world]
        options.begin(len(done), len(names))
        started = time.perf_counter()
        with _told_to_all(place):
            for sample, mask, found in _segmented(segmenter, data, todo):
                if predictions is not None:
                    _save(data.prediction_image(found.label_map), _prediction_path(predictions, sample.name))
                record = _record(sample.name, mask, found, data)
                journal.add(record)
                result.add(record)
                result.timed += 1
                options.progress(1)
        result.seconds = time.perf_counter() - started
    every = place.all(result.numbers())
    if place.rank:
        return None
    for numbers in every[1:]:
        result.merge(numbers)
    return result


@contextmanager
def _told_to_all(place: Place) -> Iterator[None]:
    """What one process cannot do, none can: all end with its error, where the others would wait for it."""
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    failures = [text for text in place.all("" if own is None else str(own)) if text]
    if failures:
        raise own or InputError(failures[0])


def _look_for(segmenter: BaseSegmenter, data: SegmentationSet, background_labels: Sequence[Label]) -> None:
    words = (*data.background_labels, *background_labels)
    if data.has_background and segmenter.options.background is None and not words:
        raise InputError(
            f"{data.kind} has a background class: give a threshold for it, such as --background 0.95, or --background-labels"
        )
    if not data.has_background and (segmenter.options.background is not None or words):
        raise InputError(
            f"{data.kind} has no background class: leave the background threshold and background labels out"
        )
    names = {label.name.casefold() for label in data.labels}
    both = [label.name for label in words if label.name.casefold() in names]
    if both:
        raise InputError(f"{both[0]!r} is a class of {data.kind}: it cannot be a background label")
    segmenter.set_labels(data.labels, words)


def _record(name: str, mask: Mask, found: Any, data: SegmentationSet) -> dict[str, Any]:
    classes = len(data.classes)
    # Only groups that have a pixel: in windows there are many more.
    _, group_map = np.unique(found.group_map, return_inverse=True)
    counts = group_counts(mask, group_map.reshape(mask.shape), classes, int(group_map.max()) + 1)
    return {
        "name": name,
        "confusion": _cells(confusion_matrix(mask, found.label_map, classes)),
        "oracle": _cells(oracle_confusion(counts)),
        "overlaps": best_overlaps(counts, 0 if data.has_background else None).tolist(),
    }


def _cells(matrix: Counts) -> list[list[int]]:
    rows, columns = np.nonzero(matrix)
    return np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist()


def _segmented(
    segmenter: BaseSegmenter, data: SegmentationSet, indices: Sequence[int]
) -> Iterator[tuple[Sample, Mask, Any]]:
    """Pictures in order, each with its mask and what the model makes of it; files are read ahead in other threads."""
    waiting: deque[tuple[Sample, Mask]] = deque()

    def pictures() -> Iterator[Image.Image]:
        for sample, image, mask in _ahead([data[index] for index in indices], _read, 2 * segmenter.batch_size):
            waiting.append((sample, mask))
            yield image

    for found in segmenter.iter(pictures()):
        sample, mask = waiting.popleft()
        yield sample, mask, found


def _read(sample: Sample) -> tuple[Sample, Image.Image, Mask]:
    image, mask = sample.image(), sample.mask()
    sample.check_size(mask, image)
    return sample, image, mask


Given = TypeVar("Given")
Made = TypeVar("Made")
_READERS = 4


def _ahead(given: Iterable[Given], make: Callable[[Given], Made], count: int) -> Iterator[Made]:
    """`map(make, given)`, with up to `count` of them made ahead by threads."""
    with ThreadPoolExecutor(_READERS) as pool:
        coming: deque[Future[Made]] = deque()
        try:
            for one in given:
                coming.append(pool.submit(make, one))
                if len(coming) > count:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _prediction_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _save(image: Image.Image, path: Path) -> None:
    """All or nothing: a run that was killed leaves no half a file."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(unfinished, format="PNG")
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


# ---- the journal ----


class _Journal:
    """Records of pictures in `journal-RANK.jsonl`; the first line says what run it is. `before`: those of an earlier run."""

    def __init__(
        self, options: Options, place: Place, data: SegmentationSet | ClassificationSet, segmenter: BaseSegmenter
    ) -> None:
        self.before: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        self._lock: FolderLock | None = None
        head = {"run": {**options.about, "set": data.kind, "split": data.split, **_settings_of(segmenter)}}
        if options.folder is not None:
            self._open(options.folder, head, options.restart, place, data)

    def _open(
        self,
        folder: Path,
        head: Mapping[str, Any],
        restart: bool,
        place: Place,
        data: SegmentationSet | ClassificationSet,
    ) -> None:
        # The first process brings what all of an earlier run wrote into one file; the others begin theirs when it has.
        error: InputError | None = None
        if place.rank == 0:
            try:
                check_output(folder, data)
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(folder, LOCK_NAME, "evaluation")
                self.before = (
                    [] if restart else journals.read(folder, journals.fault_of(data), partial(_same, folder, head))
                )
                self._begin(folder, [head, *self.before])
            except InputError as found:
                error = found
            except OSError as found:
                error = InputError(f"cannot write into the folder {folder}: {found.strerror or found}")
        failure, self.before = place.all((error, self.before))[0]
        if failure is not None:
            self._release()
            raise failure
        self._file = (folder / JOURNAL.format(place.rank)).open("a" if place.rank == 0 else "w", encoding="utf-8")
        if place.rank:
            self.add(head)

    @staticmethod
    def _begin(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        unfinished = folder / f".{JOURNAL.format(0)}.tmp"
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(f"{line_of(record)}\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / JOURNAL.format(0))
        for path in journals.paths(folder):
            if path.name != JOURNAL.format(0):
                path.unlink()

    def add(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(f"{line_of(record)}\n")
                self._file.flush()
            except OSError as error:
                raise InputError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _settings_of(segmenter: BaseSegmenter) -> dict[str, Any]:
    """All that changes what a segmenter says, but for its model."""
    labels = [[*label.words, *(f'"{text}"' for text in label.definitions)] for label in segmenter.labels]
    return {"labels": labels, **segmenter.options.to_dict()}


def _same(folder: Path, head: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """InputError if the run that a journal is of was one of another kind."""
    new = json.loads(json.dumps(head))["run"]
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        key = different[0]
        change = f"{key} was {old.get(key)!r} and is {new.get(key)!r}" if key != "labels" else "other labels"
        raise InputError(
            f"{folder} holds another evaluation ({change}): choose another folder with --out, or --restart to replace it"
        )


def check_output(folder: Path, data: SegmentationSet | ClassificationSet) -> None:
    """InputError if results in a folder would lie among the files of the set, and be taken for them the next time."""
    for place in (folder, folder / PREDICTIONS):
        real = Path(os.path.realpath(place))
        for read_from in data.folders:
            if real.is_relative_to(os.path.realpath(read_from)):
                raise InputError(
                    f"the results cannot go into {folder}: {data.kind} reads its files from {read_from}, where they would be taken for "
                    "its own; give --out another folder"
                )


# ---- calibration ----


@dataclass(frozen=True)
class Point:
    """Of a calibration curve: `mean_iou`, 0 to 1, with this background threshold and temperature."""

    temperature: float
    threshold: float
    mean_iou: float


def calibrate(
    segmenter: BaseSegmenter,
    data: SegmentationSet,
    thresholds: Sequence[float] = CALIBRATION_THRESHOLDS,
    temperatures: Sequence[float] = (1.0,),
    progress: Callable[[int], None] = lambda count: None,
    place: Place | None = None,
) -> list[Point] | None:
    """The mean IoU of a set for every threshold with every temperature, in this order; of several processes the first gets it.

    The model sees each picture once for each temperature, and its labels are made for each threshold.
    InputError for a set without background, and for files that cannot be read.
    """
    place = place or Alone()
    if not data.has_background:
        raise InputError(f"{data.kind} has no background class: there is no threshold to find")
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise InputError(f"thresholds must lie between 0 and 1, got {list(thresholds)}")
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise InputError(f"temperatures must be numbers above 0, got {list(temperatures)}")
    classes = len(data.classes)
    counts = np.zeros((len(temperatures), len(thresholds), classes, classes), np.int64)
    own = segmenter.options
    samples = [data[index] for index in range(place.rank, len(data), place.world)]
    try:
        # Labels are weighed against a background that any of the thresholds is.
        segmenter.options = replace(own, background=thresholds[0])
        segmenter.set_labels(data.labels, data.background_labels)
        with _told_to_all(place):
            for _, image, mask in _ahead(samples, _read, 2):
                for i, temperature in enumerate(temperatures):
                    segmenter.options = replace(segmenter.options, temperature=temperature)
                    for j, label_map in enumerate(segmenter.threshold_maps(image, thresholds)):
                        counts[i, j] += confusion_matrix(mask, label_map, classes)
                progress(1)
    finally:
        segmenter.options = own
    every = place.all(counts)
    if place.rank:
        return None
    total = sum(every)
    left_out = None if data.background_in_mean else 0
    return [
        Point(temperature, threshold, mean_iou(total[i, j], left_out))
        for i, temperature in enumerate(temperatures)
        for j, threshold in enumerate(thresholds)
    ]


def best_point(curve: Sequence[Point]) -> Point:
    """The highest of a curve, the first of equals."""
    return max(curve, key=lambda point: -1.0 if math.isnan(point.mean_iou) else point.mean_iou)


# ---- classification ----


@dataclass(eq=False)
class ClassificationResult:
    """Pictures of each class: `[classes]` how many there are, and how many have it as the likeliest and among the `BEST` likeliest."""

    data: ClassificationSet
    there: Counts
    first: Counts
    among: Counts
    seconds: float = 0.0
    timed: int = 0

    @classmethod
    def of(cls, data: ClassificationSet) -> ClassificationResult:
        there, first, among = np.zeros((3, len(data.words)), np.int64)
        return cls(data, there, first, among)

    def add(self, record: Mapping[str, Any]) -> None:
        truth, best = record["truth"], record["best"]
        self.there[truth] += 1
        self.first[truth] += best[0] == truth
        self.among[truth] += truth in best

    def numbers(self) -> tuple[Any, ...]:
        """What another process needs to `merge`."""
        return self.there, self.first, self.among, self.timed, self.seconds

    def merge(self, numbers: tuple[Any, ...]) -> None:
        """Counts another process's pictures."""
        there, first, among, timed, seconds = numbers
        self.there += there
        self.first += first
        self.among += among
        self.timed += timed
        self.seconds = max(self.seconds, seconds)

    @property
    def images(self) -> int:
        return int(self.there.sum())

    def scores(self) -> dict[str, float]:
        """Shares 0 to 1 of the pictures; NaN without pictures."""
        images = self.images
        return {
            "top1": int(self.first.sum()) / images if images else math.nan,
            f"top{BEST}": int(self.among.sum()) / images if images else math.nan,
        }

    def by_class(self) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "name": name,
                "top1": int(self.first[i]) / there if there else math.nan,
                f"top{BEST}": int(self.among[i]) / there if there else math.nan,
                "images": there,
            }
            for i, (name, there) in enumerate(zip(self.data.words, self.there.tolist(), strict=True))
        ]


def evaluate_classification(
    segmenter: BaseSegmenter, data: ClassificationSet, options: Options | None = None, place: Place | None = None
) -> ClassificationResult | None:
    """Which class each picture is most like. As `evaluate_segmentation`."""
    options, place = options or Options(), place or Alone()
    # Classes that share a word share its probability; among them the first counts as likelier.
    unique = list(dict.fromkeys(word.casefold() for word in data.words))
    spelled = {word.casefold(): word for word in data.words}
    place_of = np.array([unique.index(word.casefold()) for word in data.words])
    segmenter.set_labels(parse_labels([Label(spelled[word]) for word in unique]))
    result = ClassificationResult.of(data)
    with _Journal(options, place, data, segmenter) as journal:
        names = [picture.name for picture in data]
        known = set(names)
        done = {record["name"] for record in journal.before if record["name"] in known}
        if place.rank == 0:
            for record in journal.before:
                if record["name"] in done:
                    result.add(record)
        todo = [picture for picture in data if picture.name not in done][place.rank :: place.world]
        options.begin(len(done), len(names))
        started = time.perf_counter()
        images = _ahead(todo, lambda picture: picture.image(), 2 * segmenter.batch_size)
        with _told_to_all(place):
            for start in range(0, len(todo), segmenter.batch_size):
                some = todo[start : start + segmenter.batch_size]
                likely = segmenter.probabilities([next(images) for _ in some])[:, place_of]
                best = np.argsort(-likely, axis=1, kind="stable")[:, :BEST]
                for picture, ranked in zip(some, best.tolist(), strict=True):
                    record = {"name": picture.name, "truth": picture.truth, "best": ranked}
                    journal.add(record)
                    result.add(record)
                result.timed += len(some)
                options.progress(len(some))
        result.seconds = time.perf_counter() - started
    every = place.all(result.numbers())
    if place.rank:
        return None
    for numbers in every[1:]:
        result.merge(numbers)
    return result
