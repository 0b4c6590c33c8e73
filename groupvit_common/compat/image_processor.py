"""Habits of transformers' image processors: single steps on arrays, JSON, attributes of any name, sizes."""

import base64
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
from PIL import Image

from groupvit_common.checkpoints.hub import push
from groupvit_common.compat.keywords import Harmless, plain
from groupvit_common.errors import InputError, short
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import write_file, write_text

_Array = np.ndarray[Any, Any]

CALL_KEYWORDS: Harmless = {
    "backend": (None, "pil"),  # others give other numbers
    "default_to_square": (None, False),
    "device": (None, "cpu"),  # tensors are moved by `to`
    "disable_grouping": None,
    "do_pad": (None, False),
    "image_seq_length": (None,),
    "pad_size": (None,),
}
"""Keywords of a call of transformers' image processors without effect here."""

FILE_KEYWORDS: Harmless = {
    "_from_auto": None,
    "_from_pipeline": None,
    "attn_implementation": None,  # of a model, which programs pass to both
    "backend": (None, "pil", "torchvision"),  # there is one implementation
    "device_map": None,
    "dtype": None,
    "low_cpu_mem_usage": None,
    "torch_dtype": None,
    "variant": (None,),
}
"""Keywords of `from_pretrained` of transformers' processors without effect here, besides those of `encoding`."""

# The order in which `preprocess` of transformers 4 takes arguments without names, after the images.
_POSITIONAL = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb", "return_tensors", "data_format", "input_data_format",
)  # fmt: skip


class Size(dict[str, int]):
    """A size in pixels: a dictionary, as of transformers 4, whose keys are attributes too, as of transformers 5."""

    def __getattr__(self, name: str) -> int | None:
        if name in ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"):
            return self.get(name)
        raise AttributeError(name)


def size_mapping(size: Any) -> Any:
    """Returns a size given as a record, such as transformers 5 has, as a dictionary; anything else as it is."""
    if dataclasses.is_dataclass(size) and not isinstance(size, type):
        return {field.name: getattr(size, field.name) for field in dataclasses.fields(size)}
    return size


def named(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of `preprocess` by name. Raises `InputError` for too many, or one given twice."""
    given = dict(zip(_POSITIONAL, arguments, strict=False))
    twice = given.keys() & keywords.keys()
    if len(arguments) > len(_POSITIONAL) or twice:
        raise InputError(
            f"preprocess takes {len(_POSITIONAL)} arguments after the images, each once; got {len(arguments)}"
            + (f" and {min(twice)} again by name" if twice else "")
        )
    return {**given, **keywords}


class ImageProcessorHabits:
    """Methods and attributes that programs written for transformers use of an image processor.

    An attribute that is no setting is kept in `extra`, is read as an attribute again, and is saved.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    backend: ClassVar[str] = "pil"
    is_fast: ClassVar[bool] = False

    extra: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # -- JSON and files --

    def to_json_string(self) -> str:
        """Returns the text of the file that `save_pretrained` writes."""
        return json_text(cast(Any, self).to_dict())

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes the text of `to_json_string` to a file."""
        text = self.to_json_string()
        write_file(Path(json_file_path), lambda path: write_text(path, text=text))

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Returns the image processor in one JSON file. Raises `CheckpointError` for one that cannot be used."""
        return cast(Self, cast(Any, cls).of_settings(read_json(Path(json_file)), json_file))

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload image processor", **options: Any) -> str:
        """Sends the file to a model repository; `options` and errors as `groupvit_common.checkpoints.hub.push`."""
        with tempfile.TemporaryDirectory() as directory:
            cast(Any, self).save_pretrained(directory)
            return push(directory, repo_id, commit_message=commit_message, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    # -- single steps: an array in, an array out --

    def resize(
        self,
        image: Any,
        size: Any,
        resample: Any = Image.Resampling.BICUBIC,
        data_format: Any = None,
        input_data_format: Any = None,
        *,
        reducing_gap: float | None = None,
    ) -> _Array:
        """Returns an image resized by Pillow.

        Args:
            image: an array `[H, W, C]` or `[C, H, W]`: 0-255, or floating-point numbers 0-1.
            size: as the setting; pixels.
            resample: Pillow's filter code.
            data_format: of the result, "channels_first" or "channels_last"; None: as the image's.
            input_data_format: the same, of the image; None: inferred.
            reducing_gap: of `PIL.Image.Image.resize`.
        """
        array, layout = _channels_last(image, input_data_format)
        settings = cast(Any, self).replace(do_resize=True, size=size, resample=resample)
        height, width = settings.resized_size(*array.shape[:2])
        levels, scale = _levels(array)
        filter_ = Image.Resampling(settings.resample)
        resized = _pillow(levels).resize((width, height), filter_, reducing_gap=reducing_gap)
        values = np.array(resized).reshape(height, width, -1)
        if scale != 1:
            values = (values.astype(np.float64) / scale).astype(np.float32)
        return _laid_out(values, data_format or layout)

    def center_crop(self, image: Any, size: Any, data_format: Any = None, input_data_format: Any = None) -> _Array:
        """Returns the middle of an image, of `size` as the setting `crop_size`; a smaller one is padded with zeros.

        Other arguments as of `resize`.
        """
        array, layout = _channels_last(image, input_data_format)
        crop = cast(Any, self).replace(crop_size=size).crop_size
        return _laid_out(center_crop(array, crop["height"], crop["width"]), data_format or layout)

    def rescale(
        self,
        image: Any,
        scale: float,
        data_format: Any = None,
        input_data_format: Any = None,
        *,
        dtype: Any = np.float32,
    ) -> _Array:
        """Returns an image multiplied by `scale`, computed in float64, as `dtype`. Other arguments as of `resize`."""
        array = _as_numpy(image).astype(np.float64) * scale
        if data_format is not None:
            array, _ = _channels_last(array, input_data_format)
            array = _laid_out(array, data_format)
        return array.astype(dtype)

    def normalize(
        self, image: Any, mean: Any, std: Any, data_format: Any = None, input_data_format: Any = None
    ) -> _Array:
        """Returns `(image - mean) / std`, in the floating-point type of the image, else float32.

        Args:
            mean, std: a number for each channel, or one for all.
            image, data_format, input_data_format: as of `resize`; any numbers.
        """
        array, layout = _channels_last(image, input_data_format)
        array = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)
        numbers = []
        for name, value in (("mean", mean), ("std", std)):
            values = np.atleast_1d(np.asarray(value, dtype=array.dtype))
            if values.shape not in ((array.shape[2],), (1,)):
                raise InputError(f"{name} must have {array.shape[2]} numbers, one for each channel, got {short(value)}")
            numbers.append(values)
        return _laid_out((array - numbers[0]) / numbers[1], data_format or layout)


BaseImageProcessor = ImageProcessingMixin = ImageProcessorHabits


def base64_bytes(source: Any) -> bytes | None:
    """Returns what base64 text holds, with or without "data:image/...;base64," in front; None for other sources.

    Text without it may as well be a path: it is taken for an image if it begins as one of the usual formats does. Text
    with it is never a path: damaged, it holds nothing.
    """
    if not isinstance(source, str):
        return None
    marked = source.startswith("data:image/")
    if not marked and not source.startswith(_BASE64_BEGINNINGS):
        return None
    content = source.partition("base64,")[2] if marked else source
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError:
        return b"" if marked else None


def center_crop(array: _Array, height: int, width: int) -> _Array:
    """Returns the middle `[height, width, C]` of an image, padded with black; odd pixels as in transformers."""
    for axis, wanted in ((0, height), (1, width)):
        spare = array.shape[axis] - wanted
        if spare >= 0:
            start = spare // 2
            array = array[start : start + wanted] if axis == 0 else array[:, start : start + wanted]
        else:
            before = -(spare // 2)
            around = [(0, 0)] * 3
            around[axis] = (before, -spare - before)
            array = np.pad(array, around)
    return array


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as a JSON file holds them: arrays as lists. Raises `InputError` for what it cannot hold."""
    plain_values: dict[str, Any] = {}
    for name, value in values.items():
        try:
            plain_values[name] = json.loads(json.dumps(value, default=_json_value))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the attribute {name!r} cannot be saved as JSON: it is a {type(value).__name__}; delete it, or give "
                f"it a name that begins with an underscore"
            ) from error
    return plain_values


def _json_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _as_numpy(image: Any) -> _Array:
    if hasattr(image, "detach"):
        image = image.detach().cpu()
    array = np.asarray(image)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise InputError(f"this takes an image as an array of numbers, got {type(image).__name__}; use load_image")
    return array


def _channels_last(image: Any, layout: Any) -> tuple[_Array, str]:
    """Returns an image as `[H, W, C]`, and the layout that it had."""
    array, layout = _as_numpy(image), plain(layout)
    if array.ndim == 2:
        array, layout = array[:, :, None], "channels_last"
    if array.ndim != 3:
        raise InputError(f"the image has shape {array.shape}; expected [H, W, C] or [C, H, W]")
    if layout is None:
        first, last = (array.shape[axis] in (1, 3) for axis in (0, 2))
        if not first and not last:
            raise InputError(
                f"the image has shape {array.shape}: where its channels are is unclear; pass input_data_format"
            )
        layout = "channels_first" if first else "channels_last"
    if layout not in tuple(map(str, _LAYOUTS)):
        raise InputError(f"input_data_format must be 'channels_first' or 'channels_last', got {layout!r}")
    return (array.transpose(1, 2, 0) if layout == "channels_first" else array), layout


_LAYOUTS = ("channels_first", "channels_last")
# JPEG, PNG, GIF, WebP, TIFF in both orders of bytes.
_BASE64_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")


def _laid_out(array: _Array, layout: Any) -> _Array:
    """Returns an image `[H, W, C]` in the requested layout."""
    layout = plain(layout)
    if layout not in _LAYOUTS:
        raise InputError(f"data_format must be 'channels_first' or 'channels_last', got {layout!r}")
    return array.transpose(2, 0, 1) if layout == "channels_first" else array


def _levels(array: _Array) -> tuple[_Array, int]:
    """Returns values as uint8 levels, and what they were multiplied by."""
    if array.dtype == np.uint8:
        return array, 1
    low, high = array.min(), array.max()
    whole = np.allclose(array, np.rint(array))
    if not (low >= 0 and (high <= 1 or (whole and high <= 255))):
        raise InputError(f"the image has values from {low:g} to {high:g}; expected whole numbers 0-255, or 0-1")
    scale = 1 if whole else 255
    return np.rint(array * scale).astype(np.uint8), scale


def _pillow(levels: _Array) -> Image.Image:
    if levels.shape[2] not in (1, 3, 4):
        raise InputError(f"the image has {levels.shape[2]} channels; expected 1, 3 or 4")
    return Image.fromarray(np.ascontiguousarray(levels[:, :, 0] if levels.shape[2] == 1 else levels))
