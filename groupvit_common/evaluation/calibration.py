"""The search for a background threshold: the mean IoU of a set for many thresholds and temperatures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.processes import ProcessInfo, SingleProcess, raised_by_all
from groupvit_common.evaluation.run import read_ahead
from groupvit_common.evaluation.segmentation import read_sample
from groupvit_common.segmentation.predictor import BaseSegmenter

CALIBRATION_THRESHOLDS = (*(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.99)


@dataclass(frozen=True)
class Point:
    """A point of a calibration curve: the mean IoU, 0 to 1, with a background threshold and a temperature."""

    temperature: float
    threshold: float
    mean_iou: float


def calibrate(
    segmenter: BaseSegmenter,
    data: SegmentationSet,
    thresholds: Sequence[float] = CALIBRATION_THRESHOLDS,
    temperatures: Sequence[float] = (1.0,),
    progress: Callable[[int], None] = lambda count: None,
    process: ProcessInfo | None = None,
) -> list[Point] | None:
    """Returns the mean IoU for every threshold with every temperature, in this order; None on processes but the first.

    The model sees each image once for each temperature, and its labels are made for each threshold.

    Raises:
        InputError: a set without background, a value that cannot be tried, or a file that cannot be read.
    """
    process = process or SingleProcess()
    if not data.has_background:
        raise InputError(f"{data.kind} has no background class: there is no threshold to find")
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise InputError(f"thresholds must lie between 0 and 1, got {list(thresholds)}")
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise InputError(f"temperatures must be numbers above 0, got {list(temperatures)}")
    classes = len(data.classes)
    counts = np.zeros((len(temperatures), len(thresholds), classes, classes), np.int64)
    own = segmenter.options
    samples = [data[index] for index in range(process.rank, len(data), process.world)]
    try:
        # Any threshold makes a background that labels are weighed against.
        segmenter.options = replace(own, background=thresholds[0])
        segmenter.set_labels(data.labels, data.background_labels)
        with raised_by_all(process):
            for _, image, mask in read_ahead(samples, read_sample, 2):
                for i, temperature in enumerate(temperatures):
                    segmenter.options = replace(segmenter.options, temperature=temperature)
                    for j, label_map in enumerate(segmenter.threshold_maps(image, thresholds)):
                        counts[i, j] += confusion_matrix(mask, label_map, classes)
                progress(1)
    finally:
        segmenter.options = own
    gathered = process.all(counts)
    if process.rank:
        return None
    total = sum(gathered)
    background = None if data.background_in_mean else 0
    return [
        Point(temperature, threshold, mean_iou(total[i, j], background))
        for i, temperature in enumerate(temperatures)
        for j, threshold in enumerate(thresholds)
    ]


def best_point(curve: Sequence[Point]) -> Point:
    """Returns the highest point of a curve, the first of equals."""
    return max(curve, key=lambda point: -1.0 if math.isnan(point.mean_iou) else point.mean_iou)
