"""Segments of a result: a mask with a label and a score for each label, or for each group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError
from groupvit_common.segmentation.result import Segmentation

By = Literal["label", "group"]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Segment:
    """Pixels of one label, or of one group.

    `label`: its name; `index`: into the result's `labels`. `mask`: `[H, W]` bool.
    `score`: 0 to 1, the probability of the label for the groups that hold the segment's pixels, their mean over the
    pixels. A group's is the softmax over the labels; with `top_k` the geometric mean of the softmax over those that
    stay and that over all. None for a background that no label names, and where a result has no `group_scores`.
    `group`: the group's number; None for the pixels of a label.
    """

    label: str
    index: int
    mask: Mask
    score: float | None
    group: int | None = None


def check_result(result: object) -> None:
    """Raises `InputError` for anything but the result of a `Segmenter`."""
    if not isinstance(result, Segmentation):
        raise InputError(
            f"this takes what a Segmenter returns for an image, a Segmentation, got {type(result).__name__}"
        )


def segments(result: Segmentation, *, by: By = "label", background: bool = False) -> Iterator[Segment]:
    """Yields the segments of a result that have pixels, in the order of `result.labels` or of the groups.

    Args:
        by: "label": all pixels of a label are one segment. "group": all pixels of a group, which has one label; with
            options by which a pixel may get another label than its group's (windows, views, soft assignment, ...) the
            two differ.
        background: also the segments of the background.

    Raises:
        InputError: another `by`, or no result of a `Segmenter`.
    """
    check_result(result)
    if by not in get_args(By):
        raise InputError(f"by must be one of {', '.join(get_args(By))}, got {by!r}")
    index_map = result.label_map if by == "label" else result.group_map
    # A square root makes the authors' score, which is a product of two probabilities, one.
    scores = None if result.group_scores is None else np.sqrt(result.group_scores)
    unnamed = result.has_background and result.scores[0].probability is None
    for number in np.unique(index_map).tolist():
        index = number if by == "label" else result.group_labels[number]
        if index == result.background and not background:
            continue
        mask = np.asarray(index_map == number)
        score = None
        if scores is not None and not (unnamed and index == 0):
            counts = np.bincount(result.group_map[mask], minlength=len(scores))
            score = float(counts @ scores[:, index] / counts.sum())
        yield Segment(result.labels[index], index, mask, score, number if by == "group" else None)
