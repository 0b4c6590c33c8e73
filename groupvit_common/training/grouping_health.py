"""Measures of whether a grouping means anything, for the log of a training run and its warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES_WATCHED = 32  # of a batch, whose grouping is measured
# A collapsed grouping: (nearly) one group for all patches, or the same map for every image.
FEW_GROUPS = 1.5
LIKE_MAPS = 0.98


def watch_grouping(assignments: Iterable[NDArray[Any]]) -> tuple[dict[str, float], list[str]]:
    """Measures every grouping block of a model.

    Args:
        assignments: soft assignments `[B, G, S]` of some 32 images, the first block's first.

    Returns:
        The measures by name, those of the second and later blocks with a number, and warnings of blocks that have
        collapsed.
    """
    named: dict[str, float] = {}
    warnings = []
    for number, assignment in enumerate(assignments):
        measures = grouping_measures(assignment, of_patches=number == 0)
        named |= {f"{name}.{number}" if number else name: value for name, value in measures.items()}
        warnings.append(collapse_warning(measures))
    return named, [warning for warning in warnings if warning]


def grouping_measures(assignment: NDArray[Any], *, of_patches: bool = True) -> dict[str, float]:
    """Measures a grouping block from the soft assignment `[B, G, S]` of some images.

    Args:
        of_patches: whether the segments are patches; a later block's are groups, which have no place in the image.

    Returns:
        "groups_in_use": groups that hold a segment, averaged over images: 1 where one group holds all;
        "assignment_entropy": of the groups' fractions of an image's segments, 1 where all are equal, 0 where one group
        holds all; "map_likeness", of patches: the fraction in the same group as the patch at the same place of another
        image, 1 for equal maps.
    """
    images, groups, _ = assignment.shape
    chosen = assignment.argmax(axis=1)  # [B, S]
    fractions = np.stack([(chosen == group).mean(axis=1) for group in range(groups)], axis=1)
    logarithm = np.log(np.where(fractions > 0, fractions, 1.0))
    measures = {
        "groups_in_use": float((fractions > 0).sum(axis=1).mean()),
        "assignment_entropy": float(-(fractions * logarithm).sum(axis=1).mean() / max(math.log(groups), 1e-9)),
    }
    if images > 1 and of_patches:
        measures["map_likeness"] = float((chosen == np.roll(chosen, 1, axis=0)).mean())
    return measures


def collapse_warning(measures: Mapping[str, float]) -> str:
    """Returns a sentence about a collapsed grouping, from its measures; empty for a healthy one."""
    if measures["groups_in_use"] < FEW_GROUPS:
        return f"the grouping has collapsed: {measures['groups_in_use']:.2g} groups hold all patches of an image"
    if measures.get("map_likeness", 0.0) > LIKE_MAPS:
        return (
            "the grouping has collapsed: maps of different images are alike in "
            f"{measures['map_likeness']:.0%} of the patches"
        )
    return ""
