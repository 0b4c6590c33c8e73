"""Results as `supervision.Detections`."""

from __future__ import annotations

from typing import Any

import numpy as np

from groupvit_common.segmentation.adapters.common import box_of, class_names, library
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.segments import By, segments


def to_supervision(result: Segmentation, *, by: By = "label") -> Any:
    """Returns the segments of a result as `supervision.Detections`, for its annotators, trackers and metrics.

    Args:
        by: as for `groupvit_common.segmentation.segments.segments`.

    Returns:
        `xyxy` float32 `[n, 4]`, `mask` bool `[n, H, W]`, `confidence` float32 `[n]` (None if the result has no scores),
        `class_id` int `[n]` into the labels without the background, and `data["class_name"]`.

    Raises:
        InputError: supervision is not installed.
    """
    detections = library("supervision", "'groupvit[adapters]'").Detections
    found = list(segments(result, by=by))
    if not found:
        return detections.empty()
    boxes = [box_of(segment.mask) for segment in found]
    names = class_names(result)
    scores = [segment.score for segment in found]
    return detections(
        xyxy=np.array([(x, y, x + width, y + height) for x, y, width, height in boxes], np.float32),
        mask=np.stack([segment.mask for segment in found]),
        confidence=None if None in scores else np.array(scores, np.float32),
        class_id=np.array([names.index(segment.label) for segment in found]),
        data={"class_name": np.array([segment.label for segment in found])},
    )
