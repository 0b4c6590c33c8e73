"""Pictures for training: decoded, cropped at random, varied. Pillow does the work on pixels.

Everything random is drawn from the generator given, so that a picture's variation is a function of its seed alone. The
distributions are timm's, which the paper's recipe names: `RandomResizedCrop`, "rand-m9-mstd0.5-inc1", random erasing by noise.
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
    """A sample that cannot be used; the text is one of a few causes, to be counted."""


def vary(content: bytes, settings: DataSettings, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """An image file's bytes -> an RGB picture of `settings.image_size` a side, cropped, mirrored and recoloured at random.

    Args:
        fill: what turning and moving uncovers gets this colour.

    Raises BadSample.
    """
    picture = cropped(content, settings, rng)
    if rng.random() < settings.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.rand_augment:
        return rand_augment(picture, settings, fill, rng)
    if settings.color_jitter:
        return color_jitter(picture, settings.color_jitter, rng)
    return picture


def cropped(content: bytes, settings: DataSettings, rng: np.random.Generator) -> Image.Image:
    """An image file's bytes -> RGB, S x S: a random part of the upright image, or the middle. Decodes no finer than the part needs.

    Raises BadSample.
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
    across, down = upright.width / size[0], upright.height / size[1]
    left, upper, right, lower = box
    # Cut out before it is resized: nothing of what lies around it seeps in.
    part = upright.crop((round(left * across), round(upper * down), round(right * across), round(lower * down)))
    return part.resize((side, side), _FILTERS[settings.interpolation])


def middle(width: int, height: int) -> Box:
    """The largest square in the middle."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A part of a random area and aspect, anywhere; the middle where none of ten fits."""
    low, high = (math.log(aspect) for aspect in _CROP_ASPECT)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, upper = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, upper, left + across, upper + down
    least, most = _CROP_ASPECT
    across, down = min(width, max(round(height * most), 1)), min(height, max(round(width / least), 1))
    left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


# ---- colours and shapes ----


def color_jitter(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times 1 - amount to 1 + amount."""
    for number in rng.permutation(3):
        image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number](image).enhance(
            rng.uniform(max(1 - amount, 0), 1 + amount)
        )
    return image


Operation = Callable[[Image.Image, float, Image.Resampling, Fill], Image.Image]
"""A picture, a strength of -1 to 1 (0 to 1 where a sign means nothing), how to resample, the colour of what is uncovered."""


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
"""RandAugment's fifteen, each stronger with its strength (timm's "inc")."""


def rand_augment(image: Image.Image, settings: DataSettings, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al. 2019) as timm does it: operations drawn with replacement, each carried out half of the time."""
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=settings.rand_augment):
        carried_out = rng.random() < 0.5
        magnitude = rng.normal(settings.rand_augment_magnitude, settings.rand_augment_std)
        sign = -1 if rng.random() < 0.5 else 1
        if carried_out:
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
        down, across = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < down < height and 0 < across < width:
            upper, left = int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1))
            pixels[:, upper : upper + down, left : left + across] = rng.standard_normal((3, down, across), np.float32)
            return
