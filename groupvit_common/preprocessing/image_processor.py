"""Image -> pixel values: CLIP's preprocessing, with the settings, files and numbers of transformers'
CLIPImageProcessor.

An image of any kind becomes RGB, is resized, cropped, rescaled to 0-1 and normalised by channel. Resizing is Pillow's,
on 8-bit images, as in transformers' own (slow) processor: that is what makes the numbers equal.

Values of an array: integers are 0-255. Floating-point arrays may hold 0-1 or 0-255, and `do_rescale` multiplies by
`rescale_factor` (1/255) all the same, as with transformers: pass `do_rescale=False` with 0-1 (a warning reminds of it).
"""

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, resolve
from groupvit_common.compat.post_process import PostProcessing
from groupvit_common.errors import CheckpointError, InputError, short
from groupvit_common.preprocessing.encoding import (
    HARMLESS_KEYWORDS,
    SECRETS,
    BatchEncoding,
    check_keywords,
    check_return_tensors,
    to_tensors,
)
from groupvit_common.preprocessing.images import (
    MAX_PIXELS,
    as_array,
    decode,
    is_array,
    name_of,
    rgb_array,
    to_levels,
    to_rgb,
)
from groupvit_common.preprocessing.images import load_image as load_image
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import read_lock, write_texts

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# transformers 5 keeps the image processor's settings here, under "image_processor"; they take precedence.
PROCESSOR_FILE = "processor_config.json"

# CLIP's statistics of its training images (Radford et al. 2021), red, green, blue, of values 0-1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of a side of the image that the model sees: more is no use to any, and a mistake costs gigabytes.
_MOST_PIXELS = 1 << 14

_Array = np.ndarray[Any, Any]


class GroupViTImageProcessor(PostProcessing):
    """Converts images to pixel values; also exported as `AutoImageProcessor` and `CLIPImageProcessor`.

    Args:
        do_resize: resize to `size`.
        size: {"shortest_edge": n} (the other side in proportion), {"shortest_edge": n, "longest_edge": m} (in
            proportion, neither beyond its bound), {"height": h, "width": w}, (h, w), or n, which means
            {"shortest_edge": n}. Pixels.
        resample: Pillow's filter code: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        do_center_crop: cut the middle of `crop_size`; a smaller image is padded with black.
        crop_size: {"height": h, "width": w}, (h, w) or n for a square.
        do_rescale: multiply by `rescale_factor`.
        do_normalize: subtract `image_mean` and divide by `image_std`, each three numbers or one for all channels.
        do_convert_rgb: convert to RGB (transparency is dropped, grey repeated). False: images must be RGB already.
        size_divisor: round the resized height and width to multiples of it. None: as they come. See `for_segmentation`.
        max_pixels: larger images are refused (`groupvit_common.preprocessing.images.load_image`). A bound of this
            process, not a setting of the model: it is neither saved nor read from a file. None: 128 million.

    Every setting is an attribute, and may be given in a call for that call alone. None means the default. Keys of a
    file that are not settings are kept in `extra` and written back.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        do_resize: bool | None = None,
        size: Any = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Any = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Any = None,
        image_std: Any = None,
        do_convert_rgb: bool | None = None,
        size_divisor: int | None = None,
        *,
        max_pixels: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.do_resize = _flag("do_resize", do_resize)
        self.size = _size(224 if size is None else size)
        self.resample = _resample(Image.Resampling.BICUBIC if resample is None else resample)
        self.do_center_crop = _flag("do_center_crop", do_center_crop)
        self.crop_size = _crop_size(224 if crop_size is None else crop_size)
        self.do_rescale = _flag("do_rescale", do_rescale)
        self.rescale_factor = _numbers("rescale_factor", 1 / 255 if rescale_factor is None else rescale_factor, 1)[0]
        self.do_normalize = _flag("do_normalize", do_normalize)
        self.image_mean = _numbers("image_mean", CLIP_MEAN if image_mean is None else image_mean, 3)
        self.image_std = _numbers("image_std", CLIP_STD if image_std is None else image_std, 3)
        if min(self.image_std) <= 0:
            raise InputError(f"image_std must be positive, got {image_std!r}")
        self.do_convert_rgb = _flag("do_convert_rgb", do_convert_rgb)
        self.size_divisor = None if size_divisor is None else _positive("size_divisor", size_divisor)
        self.max_pixels = MAX_PIXELS if max_pixels is None else _positive("max_pixels", max_pixels, 1 << 40)
        self.extra = dict(extra or {})

    # -- settings and files --

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> Self:
        """Returns the image processor of a preprocessor_config.json's content, of any CLIP-family processor; keywords
        override it."""
        _check_names(overrides)
        known = {name: settings[name] for name in _SETTINGS if name in settings}
        extra = {name: value for name, value in settings.items() if name not in (*_SETTINGS, *SECRETS)}
        return cls(**(known | overrides), extra=extra)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **overrides: Any) -> Self:
        """Returns the image processor of a directory or hub repository: `preprocessor_config.json`, or the part of
        `processor_config.json` that transformers 5 writes. Keywords override settings, and unknown ones are refused;
        `use_fast`, `trust_remote_code` and their like are accepted for code written for transformers and change
        nothing. Others are those of `groupvit_common.checkpoints.hub.HubLocation`. Raises `CheckpointError` when the
        file is missing or unusable.
        """
        check_keywords("image processor", overrides, (*_KEYWORDS, *HUB_KEYWORDS), HARMLESS_KEYWORDS)
        location = HubLocation.take(overrides)
        overrides = {name: value for name, value in overrides.items() if name in _KEYWORDS}
        patterns = [IMAGE_PROCESSOR_FILE, PROCESSOR_FILE]
        with read_lock(resolve(name_or_path, patterns=patterns, location=location)) as held:
            return cls.of_directory(held, overrides)

    @classmethod
    def of_directory(cls, directory: Path, overrides: Mapping[str, Any]) -> Self:
        """Returns the image processor of a local directory; see `from_pretrained`."""
        path = directory / PROCESSOR_FILE
        settings = read_json(path).get("image_processor") if path.is_file() else None
        if settings is None:
            path = directory / IMAGE_PROCESSOR_FILE
            if not path.is_file():
                raise CheckpointError(f"no image processor in {directory}: it has no {IMAGE_PROCESSOR_FILE}")
            settings = read_json(path)
        try:
            if not isinstance(settings, Mapping):
                raise InputError(f"image_processor must be an object, got {settings!r:.80}")
            processor = cls.from_dict(settings)
        except InputError as error:
            raise CheckpointError(f"{path} holds a setting that cannot be used: {error}") from error
        return processor.replace(**overrides) if overrides else processor

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, and other keys of the file, as JSON values."""
        settings = {name: getattr(self, name) for name in _SETTINGS if name != "size_divisor" or self.size_divisor}
        names = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
        copied: dict[str, Any] = json.loads(json.dumps(self.extra | settings | names))
        return copied

    def save_pretrained(self, save_directory: str | Path) -> list[Path]:
        """Writes preprocessor_config.json, which transformers 4 and 5 read too; returns its path in a list."""
        directory = Path(save_directory)
        write_texts(directory, self.file_texts(directory))
        return [directory / IMAGE_PROCESSOR_FILE]

    def file_texts(self, directory: Path) -> dict[str, str]:
        """Returns the texts of the files that `save_pretrained` writes into `directory`, by name."""
        texts = {IMAGE_PROCESSOR_FILE: json_text(self.to_dict())}
        combined = directory / PROCESSOR_FILE
        if combined.is_file() and "image_processor" in (content := read_json(combined)):
            # It would go first when the directory is read.
            texts[PROCESSOR_FILE] = json_text(content | {"image_processor": self.to_dict()})
        return texts

    def replace(self, **settings: Any) -> Self:
        """Returns a new image processor in which these settings differ; None keeps a setting."""
        _check_names(settings)
        merged = {name: getattr(self, name) for name in _KEYWORDS}
        merged |= {name: value for name, value in settings.items() if value is not None}
        return type(self)(**merged, extra=self.extra)

    def for_segmentation(
        self, shorter_side: int = 448, patch_size: int = 16, longer_side: int | None = None
    ) -> "GroupViTImageProcessor":
        """Returns an image processor for images of any aspect ratio: nothing is cropped, and the model's patches fit
        exactly.

        The shorter side becomes about `shorter_side` and the other follows in proportion, but not beyond `longer_side`
        (None: no bound; the shorter side is then shorter); both are rounded to the nearest multiple of `patch_size`, at
        least one patch, which changes the aspect ratio by half a patch at most.
        """
        size = {"shortest_edge": shorter_side} | ({} if longer_side is None else {"longest_edge": longer_side})
        return self.replace(do_resize=True, size=size, do_center_crop=False, size_divisor=patch_size)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width (pixels) after the resize, before any crop, of an image of this height and width."""
        if not self.do_resize:
            return height, width
        longest = self.size.get("longest_edge")
        if "height" in self.size:
            new_height, new_width = float(self.size["height"]), float(self.size["width"])
        else:
            short, long = min(height, width), max(height, width)
            new_short = float(self.size["shortest_edge"])
            # Multiplied first: a ratio in floating point could put a whole number just below itself.
            new_long = self.size["shortest_edge"] * long / short
            if longest is not None and new_long > longest:
                new_short, new_long = longest * short / long, float(longest)
            if self.size_divisor is None:
                # transformers rounds the shorter side (a fraction only where bounded) and truncates the longer one.
                new_short, new_long = float(max(round(new_short), 1)), float(int(new_long))
            new_height, new_width = (new_short, new_long) if height <= width else (new_long, new_short)
        if self.size_divisor is None:
            return int(new_height), int(new_width)
        return _to_multiple(new_height, self.size_divisor, longest), _to_multiple(new_width, self.size_divisor, longest)

    # -- images to pixels --

    def __call__(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchEncoding:
        """Returns pixel values of one image or a batch.

        Args:
            images: a path or http(s) address, bytes of an image file, an open binary file, a PIL image of any mode, or
                an array or tensor `[H, W, C]`, `[C, H, W]` or `[H, W]` with 1, 3 or 4 channels; or a list or tuple of
                these, or an array `[B, ...]`.
            return_tensors: None (a list of NumPy arrays), "np", "pt" or "tf".
            data_format: of the result, "channels_first" or "channels_last".
            input_data_format: the same, of arrays; None: inferred (channels first where both are possible).
            overrides: any setting, for this call.

        Returns:
            `pixel_values`, float32, `[B, 3, H, W]` (a batch also for a single image), or a list of `[3, H, W]`.
        """
        if overrides:
            return self.replace(**overrides)(
                images, return_tensors=return_tensors, data_format=data_format, input_data_format=input_data_format
            )
        check_return_tensors(return_tensors)
        _check_layout("data_format", data_format)
        if input_data_format is not None:
            _check_layout("input_data_format", input_data_format)
        batch = _as_batch(images)
        pixels = [self._pixels(image, index, input_data_format) for index, image in enumerate(batch)]
        if data_format == "channels_last":
            pixels = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in pixels]
        if return_tensors is None:
            return BatchEncoding(pixel_values=pixels)
        shapes = sorted({image.shape for image in pixels})
        if len(shapes) > 1:
            raise InputError(
                f"images of shapes {shapes[0]} and {shapes[-1]} cannot share one tensor; give them one size "
                "(do_center_crop=True, "
                "or size={'height': ..., 'width': ...}), pass one at a time, or leave return_tensors out"
            )
        return BatchEncoding(pixel_values=to_tensors(np.stack(pixels), return_tensors))

    preprocess = __call__

    def _pixels(self, image: Any, index: int, layout: str | None) -> _Array:
        """Returns float32 `[3, H, W]` of one image; `index` names it in errors."""
        if is_array(image):
            array = rgb_array(image, layout, f"image {index}", convert=self.do_convert_rgb)
            if self.do_rescale and array.dtype != np.uint8 and 0 < array.max() <= 1:
                warnings.warn(
                    f"image {index} has values 0-1 and is rescaled by {self.rescale_factor:g} once more: "
                    "pass do_rescale=False for images that are 0-1 already",
                    stacklevel=2,
                )
            if self.do_resize:
                levels, scale = to_levels(array)
                array = np.asarray(self._resize(Image.fromarray(levels), f"image {index}"))
                array = array if scale == 1 else array.astype(np.float32) / np.float32(scale)
        else:
            name = name_of(image, f"image {index}")
            opened = decode(image, name, max_pixels=self.max_pixels, shrink=True)
            if opened.mode != "RGB" and not self.do_convert_rgb:
                raise InputError(f"image {index} has mode {opened.mode} and do_convert_rgb is off; expected RGB")
            opened = to_rgb(opened, name)
            array = np.asarray(self._resize(opened, name) if self.do_resize else opened)
        if self.do_center_crop:
            array = _center_crop(array, self.crop_size["height"], self.crop_size["width"])
        # Always a copy: nothing is written into the caller's array.
        pixels = np.array(array.transpose(2, 0, 1), dtype=np.float32, order="C")
        if self.do_rescale:
            pixels *= np.float32(self.rescale_factor)
        if self.do_normalize:
            pixels -= np.asarray(self.image_mean, np.float32)[:, None, None]
            pixels /= np.asarray(self.image_std, np.float32)[:, None, None]
        return pixels

    def _resize(self, image: Image.Image, name: str) -> Image.Image:
        height, width = self.resized_size(image.height, image.width)
        if height * width > max(self.max_pixels, MAX_PIXELS):
            raise InputError(
                f"{name}, {image.width}x{image.height} pixels, would be resized to {width}x{height}, which is too "
                "large; "
                "crop it, or set size with a longest_edge"
            )
        return image.resize((width, height), Image.Resampling(self.resample))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in _SETTINGS)})"


# Settings of the model; `max_pixels` besides is one of the process.
_SETTINGS = tuple(inspect.signature(GroupViTImageProcessor).parameters)[: -len(("max_pixels", "extra"))]
_KEYWORDS = (*_SETTINGS, "max_pixels")
AutoImageProcessor = GroupViTImageProcessor
CLIPImageProcessor = GroupViTImageProcessor


def _as_batch(images: Any) -> list[Any]:
    """Returns one image or several as a list."""
    if is_array(images) and images.ndim == 4:
        batch = list(as_array(images))
    elif isinstance(images, list | tuple):
        batch = list(images)
    else:
        return [images]
    if not batch:
        raise InputError("the batch of images is empty; expected an image or a list of images")
    return batch


def _center_crop(array: _Array, height: int, width: int) -> _Array:
    """Returns the middle `[height, width, 3]`, padded with black; odd pixels as in transformers."""
    for axis, wanted in ((0, height), (1, width)):
        spare = array.shape[axis] - wanted
        if spare >= 0:
            start = spare // 2
            array = array[start : start + wanted] if axis == 0 else array[:, start : start + wanted]
        else:
            before = math.ceil(-spare / 2)
            around = [(0, 0)] * 3
            around[axis] = (before, -spare - before)
            array = np.pad(array, around)
    return array


def _to_multiple(length: float, divisor: int, longest: int | None) -> int:
    """Returns the nearest multiple of the divisor, at least one, and not beyond `longest` unless one divisor is."""
    count = int(length / divisor + 0.5)
    if longest is not None:
        count = min(count, longest // divisor)
    return max(count, 1) * divisor


# -- settings, checked --


def _check_names(settings: Mapping[str, Any]) -> None:
    unknown = [name for name in settings if name not in _KEYWORDS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a setting of the image processor; these are: {', '.join(_KEYWORDS)}")


def _check_layout(name: str, value: Any) -> None:
    if value not in ("channels_first", "channels_last"):
        raise InputError(f"{name} must be 'channels_first' or 'channels_last', got {value!r}")


def _flag(name: str, value: Any) -> bool:
    """Returns True or False; every switch is on unless turned off."""
    if value is None:
        return True
    if not isinstance(value, bool | np.bool_):
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


def _resample(value: Any) -> int:
    try:
        return int(Image.Resampling(value))
    except ValueError as error:
        raise InputError(f"resample must be one of Pillow's filters 0 to 5, got {short(value)}") from error


def _size(size: Any) -> dict[str, int]:
    if isinstance(size, Mapping):
        # transformers 5 writes the keys without a meaning as null.
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) not in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}):
            raise InputError(
                "size must be {'shortest_edge': n}, {'shortest_edge': n, 'longest_edge': m} or "
                "{'height': h, 'width': w}, "
                f"got {short(dict(size))}"
            )
        return {key: _positive(f"size[{key!r}]", value) for key, value in given.items()}
    if isinstance(size, list | tuple):
        return _height_and_width("size", size)
    return {"shortest_edge": _positive("size", size)}


def _crop_size(size: Any) -> dict[str, int]:
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) != {"height", "width"}:
            raise InputError(f"crop_size must be {{'height': h, 'width': w}}, got {short(dict(size))}")
        return {key: _positive(f"crop_size[{key!r}]", value) for key, value in given.items()}
    if isinstance(size, list | tuple):
        return _height_and_width("crop_size", size)
    return dict.fromkeys(("height", "width"), _positive("crop_size", size))


def _height_and_width(name: str, size: list[Any] | tuple[Any, ...]) -> dict[str, int]:
    if len(size) != 2:
        raise InputError(f"{name} must be a height and a width, got {short(size)}")
    return {"height": _positive(name, size[0]), "width": _positive(name, size[1])}
