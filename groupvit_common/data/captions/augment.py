"""Decodes and augments images with Pillow: random crops, flips, RandAugment, colour jitter, erasing.

Everything random is drawn from the given generator, so that an image's augmentation is a function of its seed alone.
The distributions are timm's, which the paper's recipe names: `RandomResizedCrop`, "rand-m9-mstd0.5-inc1", random
erasing by noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from groupvit_common.data.captions.settings import DataSettings
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.images import ImageHeader, NotAnImageError, TooLargeError, to_rgb

_CROP_ASPECT = (3 / 4, 4 / 3)
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_TRIES = 10

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Box = tuple[int, int, int, int]
"""left, upper, right, lower, in pixels"""

Fill = tuple[int, ...]
"""red, green, blue, 0 to 255"""


class BadSample(Exception):
    """An unusable sample; the text is one of a few causes, to be counted."""


def augment(content: bytes, settings: DataSettings, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """Returns an image file's content as a square RGB image, cropped, mirrored and recoloured at random.

    Args:
        fill: colour of what turning and moving uncovers.

    Raises:
        BadSample: the file is not an image, damaged or too large.
    """
    image = cropped(content, settings, rng)
    if rng.random() < settings.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.rand_augment:
        return rand_augment(image, settings, fill, rng)
    if settings.color_jitter:
        return color_jitter(image, settings.color_jitter, rng)
    return image


def cropped(content: bytes, settings: DataSettings, rng: np.random.Generator) -> Image.Image:
    """Returns a random part of an image file's upright content, or its middle, as RGB. Decodes no finer than it needs.

    Raises:
        BadSample: as for `augment`.
    """
    side = settings.image_size

    def box_in(width: int, height: int) -> Box:
        if settings.crop_scale is None:
            return middle(width, height)
        return random_box(width, height, settings.crop_scale, rng)

    try:
        with ImageHeader(content, "the image", settings.max_pixels) as header:
            size = header.upright_size
            if size is None:
                upright = to_rgb(header.decode())
                size = upright.size
                box = box_in(*size)
            else:
                box = box_in(*size)
                # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time.
                shrink = min(box[2] - box[0], box[3] - box[1]) / side
                if shrink >= 2:
                    width, height = header.stored_size
                    header.draft((math.ceil(width / shrink), math.ceil(height / shrink)))
                upright = to_rgb(header.decode())
    except TooLargeError as error:
        raise BadSample("the image is too large") from error
    except NotAnImageError as error:
        raise BadSample("not an image") from error
    except InputError as error:
        raise BadSample("the image is damaged") from error
    scale_x, scale_y = upright.width / size[0], upright.height / size[1]
    left, upper, right, lower = box
    # Cut out before it is resized: surrounding pixels do not seep in.
    part = upright.crop((round(left * scale_x), round(upper * scale_y), round(right * scale_x), round(lower * scale_y)))
    return part.resize((side, side), _FILTERS[settings.interpolation])


def middle(width: int, height: int) -> Box:
    """Returns the largest square in the middle."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Returns a part of random area, aspect and position; the middle where none of ten fits."""
    low, high = (math.log(aspect) for aspect in _CROP_ASPECT)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left, upper = int(rng.integers(width - part_width + 1)), int(rng.integers(height - part_height + 1))
            return left, upper, left + part_width, upper + part_height
    least, most = _CROP_ASPECT
    part_width, part_height = min(width, max(round(height * most), 1)), min(height, max(round(width / least), 1))
    left, upper = (width - part_width) // 2, (height - part_height) // 2
    return left, upper, left + part_width, upper + part_height


# ---- colours and shapes ----


def color_jitter(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Scales brightness, contrast and saturation, in random order, each by 1 - amount to 1 + amount."""
    for number in rng.permutation(3):
        image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number](image).enhance(
            rng.uniform(max(1 - amount, 0), 1 + amount)
        )
    return image


Operation = Callable[[Image.Image, float, Image.Resampling, Fill], Image.Image]
"""Image, strength from -1 to 1 (the sign may mean nothing), resampling filter, fill colour -> image."""


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, resample, fill: kind(image).enhance(max(1 + 0.9 * strength, 0.1))


def _affine(matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Operation:
    return lambda image, strength, resample, fill: image.transform(
        image.size, Image.Transform.AFFINE, matrix(strength, image.size), resample, fillcolor=fill
    )


def _solarize_add(image: Image.Image, strength: float, resample: Image.Resampling, fill: Fill) -> Image.Image:
    added = min(int(abs(strength) * 110), 128)
    return image.point([min(level + added, 255) if level < 128 else level for level in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, strength, resample, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength, resample, fill: ImageOps.equalize(image),
    "Invert": lambda image, strength, resample, fill: ImageOps.invert(image),
    "Rotate": lambda image, strength, resample, fill: image.rotate(30 * strength, resample, fillcolor=fill),
    "Posterize": lambda image, strength, resample, fill: (
        ImageOps.posterize(image, 4 - int(4 * abs(strength))) if abs(strength) < 1 else Image.new("RGB", image.size)
    ),
    "Solarize": lambda image, strength, resample, fill: ImageOps.solarize(image, 256 - int(256 * abs(strength))),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda strength, size: (1, 0.3 * strength, 0, 0, 1, 0)),
    "ShearY": _affine(lambda strength, size: (1, 0, 0, 0.3 * strength, 1, 0)),
    "TranslateX": _affine(lambda strength, size: (1, 0, 0.45 * strength * size[0], 0, 1, 0)),
    "TranslateY": _affine(lambda strength, size: (1, 0, 0, 0, 1, 0.45 * strength * size[1])),
}
"""RandAugment's fifteen operations, each stronger with its strength (timm's "inc")."""


def rand_augment(image: Image.Image, settings: DataSettings, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """Applies RandAugment (Cubuk et al. 2019) as timm does: draws with replacement, each applied half of the time."""
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=settings.rand_augment):
        applied = rng.random() < 0.5
        magnitude = rng.normal(settings.rand_augment_magnitude, settings.rand_augment_std)
        sign = -1 if rng.random() < 0.5 else 1
        if applied:
            strength = sign * min(max(magnitude, 0.0), 10.0) / 10
            image = OPERATIONS[names[number]](image, strength, _FILTERS[settings.interpolation], fill)
    return image


def erase(pixels: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Puts normal noise into a random rectangle of `[3, H, W]` (Zhong et al. 2017)."""
    _, height, width = pixels.shape
    low, high = (math.log(aspect) for aspect in _ERASED_ASPECT)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(low, high))
        part_height, part_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_height < height and 0 < part_width < width:
            upper, left = int(rng.integers(height - part_height + 1)), int(rng.integers(width - part_width + 1))
            pixels[:, upper : upper + part_height, left : left + part_width] = rng.standard_normal(
                (3, part_height, part_width), np.float32
            )
            return
