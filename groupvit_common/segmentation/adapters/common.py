"""Parts that adapters share: their libraries, the numbers of classes, boxes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from groupvit_common.errors import InputError
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.segments import Mask, check_result

Box = tuple[int, int, int, int]


def library(name: str, install: str) -> Any:
    """Returns an optional library. `InputError` with the line that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"this needs {package}, which is not installed: pip install {install}") from error


def class_names(result: Segmentation) -> tuple[str, ...]:
    """Returns the labels without the background."""
    check_result(result)
    return result.labels[1:] if result.has_background else result.labels


def category_of(label: str, category_ids: Mapping[str, int]) -> int:
    """Returns the number of a label. `InputError` if there is none."""
    if label not in category_ids:
        raise InputError(f"category_ids has no number for {label!r}: it has those of {', '.join(category_ids)}")
    return category_ids[label]


def box_of(mask: Mask) -> Box:
    """Returns left, top, width and height of a mask's pixels, of which there is one at least."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top
