"""Settings of the image processor: their defaults, and the check that each value passes."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from groupvit_common.compat.image_processor import Size, size_mapping
from groupvit_common.compat.keywords import plain
from groupvit_common.errors import InputError, short
from groupvit_common.preprocessing.images import MAX_PIXELS

# CLIP's statistics of its training images (Radford et al. 2021), red, green, blue, of values 0-1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of a side of the image that the model sees: more is no use to any, and a mistake costs gigabytes.
_MOST_PIXELS = 1 << 14

DEFAULTS: Mapping[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_convert_rgb": True,
    "size_divisor": None,
    "max_pixels": MAX_PIXELS,
}
"""Every setting, in the order of the constructor, and its value where none is given."""


def _flag(name: str, value: Any) -> bool:
    """Returns True or False; every switch is on unless turned off."""
    if value is None:
        return True
    if not isinstance(value, bool | np.bool_) and not (type(value) is int and value in (0, 1)):
        raise InputError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def _positive(name: str, value: Any, most: int = _MOST_PIXELS) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {short(value)}")
    if value > most:
        raise InputError(f"{name} must be at most {most} pixels, got {short(value)}")
    return int(value)


def _numbers(name: str, value: Any, count: int) -> list[float]:
    """Returns `count` finite numbers from as many, or from one for all."""
    items = np.atleast_1d(np.asarray(value, dtype=object)).ravel().tolist()
    try:
        if any(isinstance(item, str | bool) for item in items):
            raise TypeError
        numbers = [float(item) for item in items]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{name} must be {'a number' if count == 1 else f'{count} numbers'}, got {short(value)}"
        ) from error
    if len(numbers) == 1:
        numbers *= count
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"{name} must be {'a number' if count == 1 else f'{count} numbers or one'}, got {short(value)}"
        )
    return numbers


def _positive_numbers(name: str, value: Any, count: int) -> list[float]:
    numbers = _numbers(name, value, count)
    if min(numbers) <= 0:
        raise InputError(f"{name} must be positive, got {short(value)}")
    return numbers


def _resample(value: Any) -> int:
    """Returns Pillow's code of a filter: itself, or of a name such as torchvision's modes have."""
    names = {filter_.name.lower(): int(filter_) for filter_ in Image.Resampling}
    value = plain(value)
    try:
        return int(Image.Resampling(names.get(value, -1) if isinstance(value, str) else value))
    except ValueError as error:
        raise InputError(f"resample must be one of Pillow's filters 0 to 5, got {short(value)}") from error


def _size(size: Any) -> Size:
    size = size_mapping(size)
    if isinstance(size, Mapping):
        # transformers 5 writes the keys without a meaning as null.
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) not in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}):
            raise InputError(
                "size must be {'shortest_edge': n}, {'shortest_edge': n, 'longest_edge': m} or "
                "{'height': h, 'width': w}, "
                f"got {short(dict(size))}"
            )
        return Size({key: _positive(f"size[{key!r}]", value) for key, value in given.items()})
    if isinstance(size, list | tuple):
        return _height_and_width("size", size)
    return Size(shortest_edge=_positive("size", size))


def _crop_size(size: Any) -> Size:
    size = size_mapping(size)
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) != {"height", "width"}:
            raise InputError(f"crop_size must be {{'height': h, 'width': w}}, got {short(dict(size))}")
        return Size({key: _positive(f"crop_size[{key!r}]", value) for key, value in given.items()})
    if isinstance(size, list | tuple):
        return _height_and_width("crop_size", size)
    return Size(dict.fromkeys(("height", "width"), _positive("crop_size", size)))


def _height_and_width(name: str, size: list[Any] | tuple[Any, ...]) -> Size:
    if len(size) != 2:
        raise InputError(f"{name} must be a height and a width, got {short(size)}")
    return Size(height=_positive(name, size[0]), width=_positive(name, size[1]))


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    **{
        name: partial(_flag, name)
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    },
    "size": _size,
    "resample": _resample,
    "crop_size": _crop_size,
    "rescale_factor": lambda value: _numbers("rescale_factor", value, 1)[0],
    "image_mean": lambda value: _numbers("image_mean", value, 3),
    "image_std": lambda value: _positive_numbers("image_std", value, 3),
    "size_divisor": lambda value: None if value is None else _positive("size_divisor", value),
    "max_pixels": lambda value: MAX_PIXELS if value is None else _positive("max_pixels", value, 1 << 40),
}
"""What a setting becomes: the value in its full form. Raises `InputError` for one that cannot be used."""
