"""Zero-shot classification of a set: the class that each image is most similar to."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.journal import Record
from groupvit_common.evaluation.processes import ProcessInfo
from groupvit_common.evaluation.run import EvaluationResult, RunOptions, read_ahead, run_evaluation
from groupvit_common.preprocessing.prompts import Label, parse_labels
from groupvit_common.segmentation.predictor import BaseSegmenter

_BEST = 5  # likeliest classes that a record names


class ClassificationResult(EvaluationResult):
    """Counts of the images of each class, `[classes]`.

    Attributes:
        totals: all images.
        first: images whose class is the likeliest.
        among: images whose class is among the five likeliest.
    """

    COUNTS = ("totals", "first", "among")
    data: ClassificationSet

    def __init__(self, data: ClassificationSet) -> None:
        super().__init__(data)
        self.totals, self.first, self.among = np.zeros((3, len(data.words)), np.int64)
        self._truths = {image.name: image.truth for image in data}

    @property
    def images(self) -> int:
        return int(self.totals.sum())

    def fault_in(self, record: Record) -> str:
        if record.keys() != {"name", "truth", "best"} or not isinstance(record["name"], str):
            return "it is not a record of an image's class"
        best, classes = record["best"], len(self.data.words)
        count = min(_BEST, classes)
        if not isinstance(best, list) or len(best) != count or len(set(map(str, best))) < count:
            return f"best are not {count} classes"
        for number in (record["truth"], *best):
            if type(number) is not int or not 0 <= number < classes:
                return f"it names class {number!r}, there are 0 to {classes - 1}"
        truth = self._truths.get(record["name"], record["truth"])
        return "" if truth == record["truth"] else f"{record['name']} is of class {truth}"

    def add(self, record: Record) -> None:
        truth, best = record["truth"], record["best"]
        self.totals[truth] += 1
        self.first[truth] += best[0] == truth
        self.among[truth] += truth in best

    def scores(self) -> dict[str, float]:
        return {
            "top1": _fraction(int(self.first.sum()), self.images),
            "top5": _fraction(int(self.among.sum()), self.images),
        }

    def by_class(self) -> list[dict[str, Any]]:
        counts = zip(self.data.words, self.first.tolist(), self.among.tolist(), self.totals.tolist(), strict=True)
        return [
            {
                "index": i,
                "name": name,
                "top1": _fraction(first, total),
                "top5": _fraction(among, total),
                "images": total,
            }
            for i, (name, first, among, total) in enumerate(counts)
        ]


def _fraction(count: int, total: int) -> float:
    return count / total if total else math.nan


def evaluate_classification(
    segmenter: BaseSegmenter,
    data: ClassificationSet,
    options: RunOptions | None = None,
    process: ProcessInfo | None = None,
) -> ClassificationResult | None:
    """Classifies every image of a set. Returns and raises as `evaluate_segmentation`."""
    # Classes that share a word share its probability; among them the first counts as likelier.
    spelled = {word.casefold(): word for word in data.words}
    labels = list(dict.fromkeys(word.casefold() for word in data.words))
    label_of_class = np.array([labels.index(word.casefold()) for word in data.words])
    segmenter.set_labels(parse_labels([Label(spelled[label]) for label in labels]))

    def measure(indices: list[int]) -> Iterator[Record]:
        samples = [data[index] for index in indices]
        images = read_ahead(samples, lambda sample: sample.image(), 2 * segmenter.batch_size)
        for start in range(0, len(samples), segmenter.batch_size):
            batch = samples[start : start + segmenter.batch_size]
            probabilities = segmenter.probabilities(list(islice(images, len(batch))))[:, label_of_class]
            best = np.argsort(-probabilities, axis=1, kind="stable")[:, :_BEST]
            for sample, ranked in zip(batch, best.tolist(), strict=True):
                yield {"name": sample.name, "truth": sample.truth, "best": ranked}

    return run_evaluation(ClassificationResult(data), measure, segmenter, options, process)
