"""Image -> pixel values: CLIP's preprocessing, with the settings, files and numbers of transformers'
CLIPImageProcessor.

An image of any kind becomes RGB, is resized, cropped, rescaled to 0-1 and normalised by channel. Resizing is Pillow's,
on 8-bit images, as in transformers' own (slow) processor: that is what makes the numbers equal.

Values of an array: integers are 0-255. Floating-point arrays may hold 0-1 or 0-255, and `do_rescale` multiplies by
`rescale_factor` (1/255) all the same, as with transformers: pass `do_rescale=False` with 0-1 (a warning reminds of it).
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
from PIL import Image

from groupvit_common.checkpoints.hub import HubLocation, bundled, resolve
from groupvit_common.compat.auto import AutoClass
from groupvit_common.compat.features import BatchFeature
from groupvit_common.compat.image_processor import (
    CALL_KEYWORDS,
    FILE_KEYWORDS,
    ImageProcessorHabits,
    center_crop,
    json_values,
    named,
)
from groupvit_common.compat.keywords import check_unknown, drop_harmless, nearest, plain
from groupvit_common.compat.post_process import PostProcessing
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.encoding import HARMLESS_KEYWORDS, SECRETS, check_return_tensors, to_tensors
from groupvit_common.preprocessing.image_settings import CHECKS, DEFAULTS
from groupvit_common.preprocessing.image_settings import CLIP_MEAN as CLIP_MEAN
from groupvit_common.preprocessing.image_settings import CLIP_STD as CLIP_STD
from groupvit_common.preprocessing.images import (
    MAX_PIXELS,
    as_array,
    decode,
    is_array,
    level_image,
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

_Array = np.ndarray[Any, Any]
_Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


class CLIPImageProcessor(PostProcessing, ImageProcessorHabits):
    """Converts images to pixel values; also exported as `GroupViTImageProcessor`, `AutoImageProcessor` and others.

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

    Every setting is an attribute, which is checked when it is set, and may be given in a call for that call alone. None
    means the default. Keys of a file and keywords that are not settings are kept in `extra` and written back.
    """

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
        **others: Any,
    ) -> None:
        _check_names(others, strict=False)
        self.extra = {**(extra or {}), **others}
        given = (
            do_resize, size, resample, do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize, image_mean,
            image_std, do_convert_rgb, size_divisor, max_pixels,
        )  # fmt: skip
        for (name, default), value in zip(DEFAULTS.items(), given, strict=True):
            setattr(self, name, default if value is None else value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS:
            value = CHECKS[name](value)
        elif name != "extra" and not name.startswith("_") and not hasattr(type(self), name):
            self.extra[name] = value
            return
        object.__setattr__(self, name, value)

    # -- settings and files --

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """Returns the image processor of a preprocessor_config.json's content, of any CLIP-family processor; keywords
        override it.

        With `return_unused_kwargs=True` the pair of it and the keywords that are neither settings nor in the content.
        """
        settings = {name: value for name, value in image_processor_dict.items() if name not in _NOT_KEPT}
        return_unused = overrides.pop("return_unused_kwargs", False)
        unused = {name: value for name, value in overrides.items() if name not in (*_KEYWORDS, *settings)}
        if not return_unused:
            check_unknown("image processor", unused, _KEYWORDS)
        known = {name: settings.pop(name) for name in _SETTINGS if name in settings}
        for name, value in overrides.items():
            if name not in unused:
                (known if name in _KEYWORDS else settings)[name] = value
        processor = cls(**known, extra=settings)
        return cast(Self, (processor, unused)) if return_unused else processor

    @classmethod
    def of_settings(cls, settings: Any, source: object) -> Self:
        """Returns the image processor of a file's content. Raises `CheckpointError`, which names the file `source`."""
        try:
            if not isinstance(settings, Mapping):
                raise InputError(f"image_processor must be an object, got {settings!r:.80}")
            processor = cls.from_dict(settings)
        except InputError as error:
            raise CheckpointError(f"{source} holds a setting that cannot be used: {error}") from error
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **overrides: Any) -> Self:
        """Returns the image processor of a directory, a JSON file or a hub repository: `preprocessor_config.json`, or
        the part of `processor_config.json` that transformers 5 writes.

        Keywords override settings; `use_fast`, `trust_remote_code` and their like are accepted for code written for
        transformers and change nothing; a name that is nearly a setting's is refused, others are warned of, or returned
        with `return_unused_kwargs=True`. Keywords besides are those of `groupvit_common.checkpoints.hub.HubLocation`.
        Raises `CheckpointError` when the file is missing or unusable.
        """
        settings, path, keywords = _located(pretrained_model_name_or_path, overrides)
        processor = cls.of_settings(settings, path)
        return processor._overridden(keywords) if keywords else processor

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | Path, **keywords: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the content of an image processor's file, and the keywords that do not say where it is.

        Arguments and errors as of `from_pretrained`.
        """
        settings, _, keywords = _located(pretrained_model_name_or_path, keywords)
        return settings, keywords

    @classmethod
    def of_directory(cls, directory: Path, overrides: Mapping[str, Any]) -> Self:
        """Returns the image processor of a local directory; see `from_pretrained`."""
        processor = cls.of_settings(*_directory_settings(directory))
        return processor._overridden(overrides) if overrides else processor

    def _overridden(self, keywords: Mapping[str, Any]) -> Self:
        """Returns the image processor with these settings; None keeps a setting. As `from_dict` otherwise."""
        given = {name: value for name, value in keywords.items() if value is not None or name not in _KEYWORDS}
        return self.from_dict({**self.extra, **{name: getattr(self, name) for name in _SETTINGS}}, **given)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, and other keys of the file, as JSON values."""
        settings = {name: getattr(self, name) for name in _SETTINGS if name != "size_divisor" or self.size_divisor}
        return json_values(self.extra | settings | {"image_processor_type": "CLIPImageProcessor"})

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, *, repo_id: str | None = None, **push_options: Any
    ) -> list[str]:
        """Writes preprocessor_config.json, which transformers 4 and 5 read too; returns its path in a list.

        `push_to_hub`: also send it to the repository `repo_id` (the directory's name if None); `push_options` as of
        `push_to_hub`.
        """
        directory = Path(save_directory)
        options = push_keywords(push_to_hub, repo_id, directory, push_options)
        write_texts(directory, self.file_texts(directory))
        if options is not None:
            self.push_to_hub(**options)
        return [str(directory / IMAGE_PROCESSOR_FILE)]

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

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Returns the image of an address or path, or the images of a list of these, as upright RGB PIL images."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(each) for each in image_url_or_urls]
        return load_image(image_url_or_urls, max_pixels=self.max_pixels)

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

    def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> BatchFeature:
        """`preprocess`, which a subclass may replace."""
        return self.preprocess(images, *arguments, **keywords)

    def preprocess(
        self,
        images: Any,
        *arguments: Any,
        return_tensors: str | None = None,
        data_format: str | None = "channels_first",
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Returns pixel values of one image or a batch.

        Args:
            images: a path or http(s) address, bytes of an image file, an open binary file, a PIL image of any mode, or
                an array or tensor `[H, W, C]`, `[C, H, W]` or `[H, W]` with 1, 3 or 4 channels; or a list or tuple of
                these or of lists of these, or an array `[B, ...]`.
            arguments: the rest without names, in transformers' order: settings, then the three below.
            return_tensors: None (a list of NumPy arrays), "np", "pt" or "tf".
            data_format: of the result, "channels_first" (also None) or "channels_last".
            input_data_format: the same, of arrays; None: inferred (channels first where both are possible).
            overrides: any setting, for this call.

        Returns:
            `pixel_values`, float32, `[B, 3, H, W]` (a batch also for a single image), or a list of `[3, H, W]`. uint8
            or float32, as the images are, if they are neither rescaled nor normalized.
        """
        if arguments:
            given = named(arguments, overrides)
            layouts = {"data_format": data_format, "input_data_format": input_data_format}
            return self.preprocess(images, **{"return_tensors": return_tensors, **layouts, **given})
        if overrides:
            settings = drop_harmless("image processor", overrides, CALL_KEYWORDS)
            check_unknown("image processor", settings.keys() - set(_KEYWORDS), _KEYWORDS)
            processor = self.replace(**{name: value for name, value in settings.items() if name in _KEYWORDS})
        else:
            processor = self
        return_tensors = plain(return_tensors)
        check_return_tensors(return_tensors)
        output_layout, layout = plain(data_format) or "channels_first", plain(input_data_format)
        _check_layout("data_format", output_layout)
        if layout is not None:
            _check_layout("input_data_format", layout)
        # Dictionaries, into which anybody may have written.
        _check_sizes(tuple(processor.size.items()), tuple(processor.crop_size.items()))
        pixels = [processor._pixels(image, index, layout) for index, image in enumerate(_as_batch(images))]
        if output_layout == "channels_last":
            pixels = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in pixels]
        if return_tensors is None:
            return BatchFeature({"pixel_values": pixels})
        shapes = sorted({image.shape for image in pixels})
        if len(shapes) > 1:
            raise InputError(
                f"images of shapes {shapes[0]} and {shapes[-1]} cannot share one tensor; give them one size "
                "(do_center_crop=True, "
                "or size={'height': ..., 'width': ...}), pass one at a time, or leave return_tensors out"
            )
        return BatchFeature(
            {"pixel_values": to_tensors(pixels[0][None] if len(pixels) == 1 else np.stack(pixels), return_tensors)}
        )

    def _pixels(self, image: Any, index: int, layout: str | None) -> _Array:
        """Returns `[3, H, W]` of one image; `index` names it in errors."""
        if is_array(image):
            bounded = self.do_resize or self.do_rescale
            array = rgb_array(image, layout, f"image {index}", convert=self.do_convert_rgb, bounded=bounded)
            if self.do_rescale and array.dtype != np.uint8 and 0 < array.max() <= 1:
                warnings.warn(
                    f"image {index} has values 0-1 and is rescaled by {self.rescale_factor:g} once more: "
                    "pass do_rescale=False for images that are 0-1 already",
                    stacklevel=2,
                )
            if self.do_resize:
                levels, scale = to_levels(array)
                array = np.asarray(self._resize(level_image(levels), f"image {index}"))
                array = array if scale == 1 else array.astype(np.float32) / np.float32(scale)
        else:
            name = name_of(image, f"image {index}")
            opened = decode(image, name, max_pixels=self.max_pixels, shrink=True)
            if opened.mode != "RGB" and not self.do_convert_rgb:
                raise InputError(f"image {index} has mode {opened.mode} and do_convert_rgb is off; expected RGB")
            opened = to_rgb(opened, name)
            array = np.asarray(self._resize(opened, name) if self.do_resize else opened)
        if self.do_center_crop:
            array = center_crop(array, self.crop_size["height"], self.crop_size["width"])
        return self._scaled(array)

    def _scaled(self, array: _Array) -> _Array:
        """Returns an image `[H, W, 3]` rescaled and normalized, as a new `[3, H, W]`."""
        if not (self.do_rescale or self.do_normalize):
            return np.array(array.transpose(2, 0, 1), order="C")
        # Always a copy: nothing is written into the caller's array. transformers multiplies in float64; of bytes, a
        # float32 quotient by a whole number (255) is the same to the bit, in two thirds of the time.
        inverse = np.float32(1 / self.rescale_factor if self.rescale_factor else np.inf)
        exact = array.dtype == np.uint8 and 1 / float(inverse) == self.rescale_factor
        wide = self.do_rescale and not exact
        pixels: _Floats = np.array(array.transpose(2, 0, 1), dtype=np.float64 if wide else np.float32, order="C")
        if wide:
            pixels = (pixels * self.rescale_factor).astype(np.float32)
        elif self.do_rescale:
            pixels /= inverse
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


# Settings of the model; `max_pixels` besides is one of the process.
_KEYWORDS = tuple(DEFAULTS)
_SETTINGS = tuple(name for name in DEFAULTS if name != "max_pixels")
# Keys of a file that are set anew when it is written, or are nobody's business.
_NOT_KEPT = (*SECRETS, "feature_extractor_type", "image_processor_type", "_processor_class")
GroupViTImageProcessor = CLIPImageProcessor
# Older and newer names of transformers: there is one implementation.
CLIPFeatureExtractor = CLIPImageProcessor
CLIPImageProcessorFast = CLIPImageProcessor
CLIPImageProcessorPil = CLIPImageProcessor


class AutoImageProcessor(AutoClass):
    """CLIP's image processor, if that is the one that a file asks for."""

    key: ClassVar[str] = "image_processor_type"
    classes: ClassVar[dict[str, type[Any]]] = dict.fromkeys(
        ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"), CLIPImageProcessor
    )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **overrides: Any) -> Any:
        """`CLIPImageProcessor.from_pretrained`; `CheckpointError` for another kind of image processor."""
        settings, path, keywords = _located(pretrained_model_name_or_path, overrides)
        # Files of the first versions have neither key.
        kind = settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIPImageProcessor"))
        processor = cls._chosen(kind, path).of_settings(settings, path)
        return processor._overridden(keywords) if keywords else processor

    @classmethod
    def register(cls, config_class: Any, image_processor_class: type[Any], exist_ok: bool = False) -> None:
        """Has a class of yours made for files that name it. `config_class` is not needed to know them."""
        cls._register(image_processor_class.__name__, image_processor_class, exist_ok)


AutoFeatureExtractor = AutoImageProcessor


def push_keywords(
    push_to_hub: bool, repo_id: str | None, directory: Path, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the arguments of a `push_to_hub` method that `save_pretrained` is to call; None: it is not to."""
    if push_to_hub:
        rest = {name: value for name, value in options.items() if value is not None}
        return {"repo_id": directory.resolve().name if repo_id is None else repo_id, **rest}
    asked = [name for name, value in options.items() if value is not None and value is not False]
    if asked:
        raise InputError(f"{asked[0]!r} has a meaning with push_to_hub=True only")
    return None


def _located(name: str | Path, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """Returns the settings of an image processor, their file, and the keywords that do not say where it is."""
    rest = drop_harmless("image processor", keywords, {**HARMLESS_KEYWORDS, **FILE_KEYWORDS})
    location = HubLocation.take(rest)
    if isinstance(name, str | os.PathLike) and bundled(name) is None and os.path.isfile(name):  # noqa: PTH113
        return _settings_of(read_json(Path(name)), Path(name)), Path(name), rest
    patterns = [IMAGE_PROCESSOR_FILE, PROCESSOR_FILE]
    with read_lock(resolve(name, patterns=patterns, location=location)) as held:
        return *_directory_settings(held), rest


def _directory_settings(directory: Path) -> tuple[dict[str, Any], Path]:
    """Returns the settings of the image processor in a directory, and their file."""
    path = directory / PROCESSOR_FILE
    if path.is_file() and "image_processor" in (content := read_json(path)):
        return _settings_of(content, path), path
    path = directory / IMAGE_PROCESSOR_FILE
    if not path.is_file():
        raise CheckpointError(f"no image processor in {directory}: it has no {IMAGE_PROCESSOR_FILE}")
    return read_json(path), path


def _settings_of(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the settings of an image processor in a file of its own, or within a processor's."""
    settings = content.get("image_processor", content)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: image_processor must be an object, got {settings!r:.80}")
    return settings


def _as_batch(images: Any) -> list[Any]:
    """Returns one image, several, or lists of them as one list."""
    batch = _listed(images)
    if batch is None:
        return [images]
    if any(isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4 for image in batch):
        nested = [_listed(image) for image in batch]
        batch = [each for image, inner in zip(batch, nested, strict=True) for each in (inner or [image])]
    if not batch:
        raise InputError("the batch of images is empty; expected an image or a list of images")
    return batch


def _listed(images: Any) -> list[Any] | None:
    """Returns the items of a batch; None for what is one image."""
    if is_array(images):
        if images.ndim == 4:
            return list(as_array(images))
        return list(images) if images.ndim == 1 and images.dtype == object else None
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return list(images)
    return None


def _to_multiple(length: float, divisor: int, longest: int | None) -> int:
    """Returns the nearest multiple of the divisor, at least one, and not beyond `longest` unless one divisor is."""
    count = int(length / divisor + 0.5)
    if longest is not None:
        count = min(count, longest // divisor)
    return max(count, 1) * divisor


def _check_names(names: Iterable[str], *, strict: bool = True) -> None:
    """Raises `InputError` for names that are no settings; unless `strict`, for those that are nearly one."""
    unknown = [name for name in names if name not in _KEYWORDS]
    wrong = unknown if strict else [name for name in unknown if nearest(name, _KEYWORDS)]
    if wrong:
        raise InputError(f"{wrong[0]!r} is not a setting of the image processor; these are: {', '.join(_KEYWORDS)}")


@lru_cache(maxsize=64)
def _check_sizes(size: tuple[Any, ...], crop_size: tuple[Any, ...]) -> None:
    """Raises `InputError` for the items of a size or a crop's that cannot be used; remembers those that can."""
    CHECKS["size"](dict(size))
    CHECKS["crop_size"](dict(crop_size))


def _check_layout(name: str, value: Any) -> None:
    if value not in ("channels_first", "channels_last"):
        raise InputError(f"{name} must be 'channels_first' or 'channels_last', got {value!r}")
