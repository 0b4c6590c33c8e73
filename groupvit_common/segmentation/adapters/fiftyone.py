"""Results as labels of FiftyOne: `Segmentation` with a mask of all labels, `Detections` with a mask of each."""

from __future__ import annotations

from typing import Any

import numpy as np

from groupvit_common.segmentation.adapters.common import box_of, library
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.segments import By, check_result, segments


def to_fiftyone(result: Segmentation) -> tuple[Any, dict[int, str]]:
    """Returns the label map of a result as a `fiftyone.Segmentation`, and its mask targets: value -> label.

    FiftyOne takes 0 for background. Without a background labels begin at 1, with one they keep their numbers, and 0 is
    not among the targets. The same labels have the same targets, which belong to the data set
    (`dataset.mask_targets[field]`).

    Raises:
        InputError: FiftyOne is not installed.
    """
    check_result(result)
    offset = 0 if result.has_background else 1
    # Of 8 bits are the indices of up to 255 labels: one more fits.
    mask = np.add(result.label_map, offset, dtype=result.label_map.dtype)
    targets = {number + offset: name for number, name in enumerate(result.labels) if number != result.background}
    return library("fiftyone", "fiftyone").Segmentation(mask=mask), targets


def to_fiftyone_detections(result: Segmentation, *, by: By = "label") -> Any:
    """Returns the segments of a result as `fiftyone.Detections`: label, confidence, box as fractions of the image, and
    the mask within the box.

    Args:
        by: as for `groupvit_common.segmentation.segments.segments`.

    Raises:
        InputError: FiftyOne is not installed.
    """
    check_result(result)
    fiftyone = library("fiftyone", "fiftyone")
    full_width, full_height = result.image.size
    detections = []
    for segment in segments(result, by=by):
        x, y, width, height = box_of(segment.mask)
        detections.append(
            fiftyone.Detection(
                label=segment.label,
                bounding_box=[x / full_width, y / full_height, width / full_width, height / full_height],
                mask=segment.mask[y : y + height, x : x + width],
                confidence=segment.score,
            )
        )
    return fiftyone.Detections(detections=detections)
