"""Zero-shot segmentation of a set: confusion matrices of labels, and the quality of groups whatever they are called."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.segmentation import Mask, Sample, SegmentationSet
from groupvit_common.evaluation.journal import PREDICTIONS, Record
from groupvit_common.evaluation.metrics import (
    Confusion,
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
from groupvit_common.evaluation.processes import ProcessInfo
from groupvit_common.evaluation.run import EvaluationResult, RunOptions, read_ahead, run_evaluation
from groupvit_common.model.checks import is_number
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.segmentation.result import Segmentation

_MAX_PIXELS = 1 << 40  # of an image; sums of millions of them fit into 64 bits


class SegmentationResult(EvaluationResult):
    """Counts of the pixels of a set's images.

    Attributes:
        confusion: rows are the true classes, columns the predicted ones.
        oracle: the same if each group had its best label.
        overlaps: of every true mask the Jaccard index of the group that fits it best.
    """

    COUNTS = ("confusion", "oracle", "overlaps", "images")
    data: SegmentationSet
    images = 0

    def __init__(self, data: SegmentationSet) -> None:
        super().__init__(data)
        square = (len(data.classes),) * 2
        self.confusion: Confusion = np.zeros(square, np.int64)
        self.oracle: Confusion = np.zeros(square, np.int64)
        self.overlaps: list[float] = []

    def fault_in(self, record: Record) -> str:
        if record.keys() != {"name", "confusion", "oracle", "overlaps"} or not isinstance(record["name"], str):
            return "it is not a record of an image's pixels"
        classes = len(self.data.classes)
        row_sums: list[dict[int, int]] = []
        for key in ("confusion", "oracle"):
            cells, sums = record[key], dict[int, int]()
            if not isinstance(cells, list):
                return f"{key} is no list"
            for cell in cells:
                if not (isinstance(cell, list) and len(cell) == 3 and all(type(number) is int for number in cell)):
                    return f"{key} has a cell that is not three whole numbers"
                row, column, count = cell
                if not (0 <= row < classes and 0 <= column < classes):
                    wrong = row if not 0 <= row < classes else column
                    return f"{key} names class {wrong}, there are 0 to {classes - 1}"
                if not 0 < count < _MAX_PIXELS:
                    return f"{key} counts {count} pixels"
                sums[row] = sums.get(row, 0) + count
            if len({(cell[0], cell[1]) for cell in cells}) < len(cells):
                return f"{key} has a cell twice"
            row_sums.append(sums)
        if row_sums[0] != row_sums[1]:
            return "confusion and oracle are not of the same pixels"
        overlaps = record["overlaps"]
        if not isinstance(overlaps, list) or not all(is_number(each) and 0 <= each <= 1 for each in overlaps):
            return "overlaps are not numbers from 0 to 1"
        if len(overlaps) != len(row_sums[0].keys() - {self._background}):
            return "overlaps are not one for each class of the image"
        return ""

    def add(self, record: Record) -> None:
        self.confusion += confusion_of(record["confusion"], len(self.data.classes))
        self.oracle += confusion_of(record["oracle"], len(self.data.classes))
        self.overlaps += record["overlaps"]
        self.images += 1

    @property
    def _background(self) -> int | None:
        return 0 if self.data.has_background else None

    @property
    def class_outside_mean(self) -> int | None:
        """The class that does not count in means."""
        return None if self.data.background_in_mean else self._background

    @property
    def mean_iou(self) -> float:
        return mean_iou(self.confusion, self.class_outside_mean)

    def scores(self) -> dict[str, float]:
        return {
            "mean_iou": self.mean_iou,
            "pixel_accuracy": pixel_accuracy(self.confusion),
            "mean_accuracy": mean_accuracy(self.confusion, self.class_outside_mean),
            "oracle_mean_iou": mean_iou(self.oracle, self.class_outside_mean),
            "mask_jaccard": math.fsum(self.overlaps) / len(self.overlaps) if self.overlaps else math.nan,
        }

    def by_class(self) -> list[dict[str, Any]]:
        columns = {
            "iou": class_iou(self.confusion),
            "accuracy": class_accuracy(self.confusion),
            "oracle_iou": class_iou(self.oracle),
            "pixels": self.confusion.sum(axis=1),
        }
        return [
            {"index": i, "name": name, **{key: column[i].item() for key, column in columns.items()}}
            for i, name in enumerate(self.data.classes)
        ]


def evaluate_segmentation(
    segmenter: BaseSegmenter,
    data: SegmentationSet,
    options: RunOptions | None = None,
    process: ProcessInfo | None = None,
    *,
    background_labels: Sequence[Label] = (),
) -> SegmentationResult | None:
    """Segments every image of a set and counts its pixels.

    Args:
        background_labels: labels whose pixels are background, besides the set's own.

    Returns:
        The result on the first process, None on the others.

    Raises:
        InputError: a set with a background needs a threshold or labels for it, one without must have neither; a file
            that cannot be read or written, by whichever process; a folder with the journal of another run.
    """
    _set_labels(segmenter, data, background_labels)
    predictions = None
    if options is not None and options.folder is not None and options.predictions:
        predictions = options.folder / PREDICTIONS

    def is_done(name: str) -> bool:
        return predictions is None or _prediction_path(predictions, name).is_file()

    def measure(indices: list[int]) -> Iterator[Record]:
        for sample, mask, found in _segment(segmenter, data, indices):
            if predictions is not None:
                _save(data.prediction_image(found.label_map), _prediction_path(predictions, sample.name))
            yield _record(sample.name, mask, found, data)

    return run_evaluation(SegmentationResult(data), measure, segmenter, options, process, is_done)


def _set_labels(segmenter: BaseSegmenter, data: SegmentationSet, background_labels: Sequence[Label]) -> None:
    backgrounds = (*data.background_labels, *background_labels)
    threshold = segmenter.options.background
    if data.has_background and threshold is None and not backgrounds:
        raise InputError(
            f"{data.kind} has a background class: give a threshold for it, such as --background 0.95, "
            "or --background-labels"
        )
    if not data.has_background and (threshold is not None or backgrounds):
        raise InputError(
            f"{data.kind} has no background class: leave the background threshold and background labels out"
        )
    names = {label.name.casefold() for label in data.labels}
    for label in backgrounds:
        if label.name.casefold() in names:
            raise InputError(f"{label.name!r} is a class of {data.kind}: it cannot be a background label")
    segmenter.set_labels(data.labels, backgrounds)


def _segment(
    segmenter: BaseSegmenter, data: SegmentationSet, indices: Sequence[int]
) -> Iterator[tuple[Sample, Mask, Segmentation]]:
    """Yields images in order, each with its mask and its segmentation; files are read ahead in threads."""
    waiting: deque[tuple[Sample, Mask]] = deque()

    def images() -> Iterator[Image.Image]:
        samples = [data[index] for index in indices]
        for sample, image, mask in read_ahead(samples, read_sample, 2 * segmenter.batch_size):
            waiting.append((sample, mask))
            yield image

    for found in segmenter.iter(images()):
        yield *waiting.popleft(), found


def read_sample(sample: Sample) -> tuple[Sample, Image.Image, Mask]:
    """Reads an image and its mask, and checks that they are of one size."""
    image, mask = sample.image(), sample.mask()
    sample.check_size(mask, image)
    return sample, image, mask


def _record(name: str, mask: Mask, found: Segmentation, data: SegmentationSet) -> Record:
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


def _cells(matrix: Confusion) -> list[list[int]]:
    rows, columns = np.nonzero(matrix)
    return np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist()


def confusion_of(cells: Sequence[tuple[int, int, int]], classes: int) -> Confusion:
    """Returns a record's cells as a matrix."""
    matrix = np.zeros((classes, classes), np.int64)
    for row, column, count in cells:
        matrix[row, column] = count
    return matrix


def _prediction_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _save(image: Image.Image, path: Path) -> None:
    """Saves all or nothing: a killed run leaves no half a file."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(unfinished, format="PNG")
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
