"""Image loading: every image is opened, checked, decoded, turned upright and converted to RGB here.

A decoded image carries no orientation any more: a second pass over it changes nothing.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import ExifTags, IcoImagePlugin, Image, ImageCms, ImageFile, PngImagePlugin

from groupvit_common.compat.image_processor import base64_bytes
from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_whole_number
from groupvit_common.preprocessing.download import download, is_address

MAX_PIXELS = 128_000_000
"""Bound of an image's pixels where none is given: cameras and phones of 100 megapixels are below it, bombs are
above."""

FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "SGI", "QOI",
    # With a plug-in that the user has registered with Pillow, such as pillow-heif.
    "HEIF", "JXL",
    # Last: it has no mark to be known by.
    "TGA",
)  # fmt: skip
"""Pillow's names of the formats that are opened: those of pixels, decoded in this process. Never EPS, which starts
Ghostscript, nor other documents, whatever a file is called. MPO, the JPEG of some phones, is one of JPEG."""

# Formats that a few first bytes of something else may seem to be.
_WEAKLY_MARKED = ("BMP", "DIB", "PPM", "ICO", "PCX", "SGI", "TGA")
# First bytes of files that people take for images, and their formats.
_NOT_OPENED = (
    (0, b"%!PS", "PostScript"), (0, b"\xc5\xd0\xd3\xc6", "PostScript"), (0, b"%PDF", "PDF"), (0, b"8BPS", "Photoshop"),
    (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypmsf1", "HEIF"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "XML or SVG"), (0, b"<!DOCTYPE", "HTML"), (0, b"<html", "HTML"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"\xd7\xcd\xc6\x9a", "WMF"),
)  # fmt: skip

# EXIF orientation -> what turns the stored image upright (EXIF 2.32, tag 0x0112), and what turns it back.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STORED = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_SIDEWAYS = (5, 6, 7, 8)
# Where an image's metadata may have an orientation.
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# Pillow spreads grey levels of 2 and 4 bits over those of 8.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
GREY_STEP = "grey_step"
"""In the `info` of a decoded PNG of few grey levels: the difference between two of them."""

# The key of an image's largest value in its `info`, where that is not the largest of 16 bits: a TIFF may have 12.
_WHITE = "groupvit_white"

_Array = np.ndarray[Any, Any]


class NotAnImageError(InputError):
    """The input is no image in one of `FORMATS`."""


class TooLargeError(InputError):
    """An image has more pixels than were allowed."""


def load_image(image: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns any image that the processor takes as an upright RGB PIL image; one that is so already comes back as it
    is.

    EXIF orientation is applied, transparency dropped, an animation's first image taken. Grey values of more than 8
    bits: 16-bit files mean 0-65535, floating-point ones 0-1 if none is larger, else 0-255; others are refused, in files
        as in arrays.

    Args:
        image: a path or http(s) address, bytes of an image file, an open binary file, a PIL image of any mode, or an
            array or tensor `[H, W, C]`, `[C, H, W]` or `[H, W]` with 1, 3 or 4 channels.
        max_pixels: a larger file is refused by its header, before it is decoded. But a JPEG of up to four times as many
            is decoded at half its height and width, with a warning: results then have that size.

    Raises:
        InputError: with the file's name, for what is missing, truncated, too large or no image in one of `FORMATS`.
    """
    if is_array(image):
        return level_image(to_levels(rgb_array(image, None, "the image", convert=True))[0])
    name = name_of(image, "the image")
    return to_rgb(decode(image, name, max_pixels=max_pixels, shrink=True), name)


def stored_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns an image file as its pixels are stored, in its own mode: not turned, as masks and the images that they
    belong to.

    Raises InputError as `load_image`.
    """
    return decode(path, str(path), max_pixels=max_pixels, upright=False)


def decode(
    source: Any, name: str, *, max_pixels: int = MAX_PIXELS, upright: bool = True, shrink: bool = False
) -> Image.Image:
    """Returns a source other than an array as a loaded PIL image of whatever mode, which carries no orientation.

    `name` stands for it in errors. `upright`: turned as its metadata says. `shrink`: see `load_image`. Raises as
    `load_image`.
    """
    with ImageHeader(source, name, max_pixels) as header:
        width, height = header.stored_size
        if shrink and max_pixels < width * height <= 4 * max_pixels and header.draft((width // 2, height // 2)):
            warnings.warn(
                f"{name} has {width}x{height} pixels, more than max_pixels={max_pixels}: it is read at half its height "
                "and width",
                stacklevel=3,
            )
        return header.decode(upright=upright)


def name_of(source: Any, otherwise: str) -> str:
    """Returns what a source is called in errors: its path or address, else `otherwise`."""
    named = isinstance(source, str | Path) and base64_bytes(source) is None
    return str(source) if named else otherwise


def orientation(image: Image.Image) -> int:
    """Returns an image's EXIF orientation, 1 to 8; 1 where there is none, or none that makes sense."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _UPRIGHT else 1
    except Exception:  # damaged metadata, in as many ways: the pixels are good without it
        return 1


class ImageHeader:
    """An image of which only the header has been read. A context manager, which closes the file that it opened.

    Args:
        source: a path or http(s) address, bytes, an open binary file, or a PIL image.
        name: stands for it in errors.
        max_pixels: more are not decoded.

    `stored_size` is its width and height before any turn.

    Raises:
        InputError: the source is missing, or no image in one of `FORMATS`.
    """

    def __init__(self, source: Any, name: str, max_pixels: int = MAX_PIXELS) -> None:
        if not is_whole_number(max_pixels) or max_pixels < 1:
            raise InputError(f"max_pixels must be a whole number of at least 1, got {max_pixels!r}")
        self._name, self._max_pixels = name, max_pixels
        self._users = isinstance(source, Image.Image)
        self._opened: IO[bytes] | None = None
        try:
            self._file = self._of_user(source) if self._users else self._identified(self._stream_of(source))
        except BaseException:
            self.__exit__()
            raise
        self.stored_size: tuple[int, int] = self._file.size
        tags = getattr(self._file, "tag_v2", {})
        if {ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength} <= set(tags):
            # Pillow turns a TIFF's size here, and its pixels when it loads them.
            self.stored_size = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def upright_size(self) -> tuple[int, int] | None:
        """Returns width and height once turned; None where decoding alone can tell, unlike of a JPEG."""
        if self._file.format not in ("JPEG", "MPO"):
            return None
        width, height = self.stored_size
        return (height, width) if orientation(self._file) in _SIDEWAYS else (width, height)

    def draft(self, size: tuple[int, int]) -> bool:
        """Has a JPEG decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time, but no smaller than `size`.

        `size`: width and height before any turn. Returns whether it will be smaller. A caller's own PIL image stays as
            it is.
        """
        before = self._file.size
        if not self._users:
            with self._faults():
                self._file.draft(None, (max(size[0], 1), max(size[1], 1)))
        return self._file.size != before

    def decode(self, *, upright: bool = True) -> Image.Image:
        """Returns the image, turned as its metadata says or as its pixels are stored.

        Raises `InputError` if it is damaged or too large.
        """
        width, height = self._file.size
        if isinstance(self._file, ImageFile.ImageFile):
            self._check_pixels((width, height))
        with self._faults():
            # Pillow turns a TIFF when it loads it, and forgets. (Of a PNG it would load all only to answer this.)
            before = orientation(self._file) if self._file.format == "TIFF" else 1
            tile = next(iter(getattr(self._file, "tile", ())), None)
            if self._file.format == "PNG" and tile is not None and tile[3] in _GREY_STEPS:
                self._file.info[GREY_STEP] = _GREY_STEPS[tile[3]]
            with _pillows_limit_lifted(width * height):
                self._load()
            after = orientation(self._file)
            image: Image.Image = self._file
            if image.mode == "I;16" and getattr(self._file, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,):
                image.info[_WHITE] = 4095
            if upright and after != 1:
                image = image.transpose(_UPRIGHT[after])
            elif not upright and before != 1 and after == 1:
                image = image.transpose(_STORED[before])
            elif after != 1:
                image = image.copy()
            else:
                return image
            for key in _ORIENTATION_KEYS:
                image.info.pop(key, None)
            return image

    def _of_user(self, image: Image.Image) -> Image.Image:
        if image.format == "EPS" and getattr(image, "tile", None):
            raise InputError(f"{self._name} is PostScript, which is not opened here; convert it to PNG or JPEG")
        return image

    def _stream_of(self, source: Any) -> IO[bytes]:
        if is_address(source):
            return io.BytesIO(download(source))
        if isinstance(source, str | Path):
            if not os.path.isfile(source):  # noqa: PTH113 (Path's raises for some names)
                if (content := base64_bytes(source)) is not None:
                    return io.BytesIO(content)
                folder = ": it is a directory" if os.path.isdir(source) else ""  # noqa: PTH112
                raise InputError(f"there is no image file {source}{folder}")
            try:
                self._opened = Path(source).open("rb")  # noqa: SIM115 (closed by __exit__)
            except OSError as error:
                raise InputError(f"{source} cannot be read: {error.strerror or error}") from error
            return self._opened
        if isinstance(source, bytes | bytearray | memoryview):
            return io.BytesIO(source)
        if isinstance(source, io.TextIOBase):
            raise InputError(f'{self._name} is a file opened as text; open it with mode "rb"')
        if not hasattr(source, "read"):
            raise InputError(
                f"{self._name} is a {type(source).__name__}; expected a path, bytes, a PIL image, an array or a tensor"
            )
        with self._faults():
            try:
                source.seek(0)
            except (AttributeError, OSError):
                return io.BytesIO(source.read())
        stream: IO[bytes] = source
        return stream

    def _identified(self, stream: IO[bytes]) -> ImageFile.ImageFile:
        """Returns the image in a stream, opened by the first of `FORMATS` that knows it."""
        fault = ""
        with self._faults():
            start = stream.read(32)
            for name, (factory, accept) in readers().items():
                try:
                    accepted = accept is None or accept(start[:16])
                    if isinstance(accepted, str):  # Pillow was built without the decoder
                        fault = fault or accepted
                    elif accepted:
                        return self._open(name, factory, stream, start)
                except (SyntaxError, IndexError, TypeError, struct.error) as error:
                    if name not in _WEAKLY_MARKED:
                        fault = fault or f"the {name} is damaged, or of a kind that Pillow does not read ({error})"
        if fault:
            raise InputError(f"{self._name} cannot be read: {fault}")
        known = [what for at, mark, what in _NOT_OPENED if start[at:].startswith(mark)]
        what = f"it is {known[0]}; convert it to JPEG or PNG" if known else f"expected {', '.join(readers())}"
        what = what if start else "it is empty"
        raise NotAnImageError(f"{self._name} is in no supported image format: {what}")

    def _open(self, name: str, factory: Any, stream: IO[bytes], start: bytes) -> ImageFile.ImageFile:
        stream.seek(0)
        if name == "WEBP":
            # Its decoder takes the memory when it is made.
            size = _webp_size(start)
            self._check_pixels(size)
            with _pillows_limit_lifted(size[0] * size[1]):
                webp: ImageFile.ImageFile = factory(stream, "")
                return webp
        if name == "ICO":
            # Decoded when it is opened; and the images within have headers of their own.
            for size in _icon_sizes(stream):
                self._check_pixels(size)
            stream.seek(0)
        try:
            image: ImageFile.ImageFile = factory(stream, "")
        except ValueError:
            if name != "PNG":
                raise
            image = factory(_without_long_texts(stream), "")
        return image

    def _load(self) -> None:
        try:
            self._file.load()
        except ValueError:
            stream = getattr(self._file, "fp", None)
            if self._file.format != "PNG" or stream is None:
                raise
            self._file = readers()["PNG"][0](_without_long_texts(stream), "")
            self._file.load()

    def _check_pixels(self, size: tuple[int, int]) -> None:
        if size[0] * size[1] > self._max_pixels:
            raise TooLargeError(
                f"{self._name} has {size[0]}x{size[1]} pixels, more than max_pixels={self._max_pixels}: "
                "make it smaller, or raise max_pixels if you trust it"
            )

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
            raise InputError(f"{self._name} cannot be read: the image is truncated or damaged ({error})") from error


def readers() -> dict[str, tuple[Any, Any]]:
    """Returns those of `FORMATS` that this Pillow knows: name -> its opener, and its test of the first bytes."""
    Image.init()
    return {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}


def image_suffixes() -> frozenset[str]:
    """Returns how the files of these formats are called: `.jpg` and so on, in lower case."""
    Image.init()
    return _suffixes(len(Image.OPEN), len(Image.EXTENSION))


@cache
def _suffixes(*_: int) -> frozenset[str]:
    """Returns the suffixes; the arguments count the formats registered with Pillow, which may grow."""
    known = {*readers(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Returns a loaded PIL image of any mode as RGB. Raises `InputError` for values that mean no colour."""
    if image.width == 0 or image.height == 0:
        raise InputError(f"an image of {image.width}x{image.height} pixels is empty")
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey_levels(image, name)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "RGBa":
        image = image.convert("RGBA")
    try:
        if image.mode == "LAB":
            profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
            assert converted is not None
            return converted
        return image.convert("RGB")
    except (ValueError, ImportError, ImageCms.PyCMSError) as error:
        raise InputError(f"{name}, an image of mode {image.mode}, cannot be converted to RGB") from error


def _grey_levels(image: Image.Image, name: str) -> _Array:
    """Returns levels `[H, W]`, uint8, of numbers of more than 8 bits: as of an array, but files may mean 0-65535."""
    numbers = np.asarray(image)
    if image.mode != "F":
        low, high = int(numbers.min()), int(numbers.max())
        # Pillow reads 16 bits into 32 where a format has both signs; PPM's it has brought to 16 bits itself.
        if image.mode != "I" or image.format == "PPM" or high > 255:
            white = image.info.get(_WHITE, 65535)
            if low < 0 or high > 65535:
                raise InputError(f"{name} has values from {low} to {high}; expected 0-255, or 0-65535 for 16 bits")
            return ((numbers.astype(np.int32) * 255 + white // 2) // white).astype(np.uint8)
    return to_levels(check_values(numbers, name))[0]


@contextmanager
def _pillows_limit_lifted(pixels: int) -> Iterator[None]:
    """Keeps Pillow from refusing an image of so many pixels, or warning of it: they have been compared with
    `max_pixels`.

    Pillow's is a variable of its module. It is touched only where an image is beyond it.
    """
    global _lifted, _pillows_limit
    if Image.MAX_IMAGE_PIXELS is None or pixels <= min(Image.MAX_IMAGE_PIXELS, _pillows_limit):
        yield
        return
    with _lock:
        if not _lifted:
            _pillows_limit = Image.MAX_IMAGE_PIXELS
        _lifted += 1
        Image.MAX_IMAGE_PIXELS = sys.maxsize
    try:
        yield
    finally:
        with _lock:
            _lifted -= 1
            if not _lifted:
                Image.MAX_IMAGE_PIXELS, _pillows_limit = _pillows_limit, sys.maxsize


_lock = threading.Lock()
_lifted = 0
_pillows_limit = sys.maxsize


def _webp_size(start: bytes) -> tuple[int, int]:
    """Returns width and height from a WebP's first 30 bytes (RFC 9649); (0, 0) where there are none."""
    chunk, content = start[12:16], start[20:30]
    if chunk == b"VP8X" and len(content) == 10:
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if chunk == b"VP8 " and len(content) == 10:
        return int.from_bytes(content[6:8], "little") & 0x3FFF, int.from_bytes(content[8:10], "little") & 0x3FFF
    if chunk == b"VP8L" and len(content) >= 5:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 0, 0


def _icon_sizes(stream: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yields width and height of each image in an icon, PNG or bitmap, by its own header."""
    for entry in IcoImagePlugin.IcoFile(stream).entry:
        stream.seek(entry.offset)
        start = stream.read(24)
        if start[:4] == b"\x89PNG":
            yield int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
        elif start[:4] == b"\x0c\0\0\0":
            yield int.from_bytes(start[4:6], "little"), int.from_bytes(start[6:8], "little") // 2
        else:
            width, height = (int.from_bytes(start[at : at + 4], "little", signed=True) for at in (4, 8))
            yield abs(width), abs(height) // 2


def _without_long_texts(stream: IO[bytes]) -> io.BytesIO:
    """Returns a PNG without the texts and colour profiles whose length makes Pillow refuse the image."""
    stream.seek(0)
    content = stream.read()
    kept, at = [content[:8]], 8
    # Half of what Pillow bears: the other half is for an orientation, which is kept.
    room = PngImagePlugin.MAX_TEXT_MEMORY // 2
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        length = _text_length(content[at + 4 : at + 8], content[at + 8 : end - 4])
        if length <= min(PngImagePlugin.MAX_TEXT_CHUNK, room):
            kept.append(content[at:end])
            room -= length
        at = end
    return io.BytesIO(b"".join(kept))


def _text_length(kind: bytes, content: bytes) -> int:
    """Returns the unpacked length of a text or profile in a PNG, bounded by just too long; 0 for kept chunks."""
    most = PngImagePlugin.MAX_TEXT_CHUNK
    keyword, _, packed = content.partition(b"\0")
    # An orientation is among the first things in XMP, which may be long.
    if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or (kind == b"iTXt" and keyword == b"XML:com.adobe.xmp"):
        return 0
    if kind == b"iTXt":
        is_packed = packed[:1] == b"\1"
        packed = packed[2:].split(b"\0", 2)[-1]
    else:
        is_packed, packed = kind != b"tEXt", packed[1:]
    if not is_packed:
        return min(len(content), most + 1)
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return most + 1


# -- arrays --


def is_array(image: Any) -> bool:
    """Returns whether an image is a NumPy array or a tensor. (PIL images have no `ndim`.)"""
    return hasattr(image, "ndim") and hasattr(image, "shape")


def as_array(image: Any) -> _Array:
    """Returns an array or tensor of any framework as a NumPy array."""
    if isinstance(image, np.ndarray):
        return image
    if hasattr(image, "detach"):  # PyTorch: NumPy knows no bfloat16
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    elif hasattr(image, "dtype") and "bfloat16" in str(image.dtype):
        return np.asarray(image).astype(np.float32)
    return np.asarray(image)


def rgb_array(image: Any, layout: str | None, name: str, *, convert: bool, bounded: bool = True) -> _Array:
    """Returns an array or tensor as `[H, W, 3]`, uint8 or float32, its values checked.

    `bounded`: they must be those of an image, 0-255; else any that are finite.
    """
    array = as_array(image)
    shape = tuple(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise InputError(f"{name} has shape {shape}; expected [H, W, C], [C, H, W] or [H, W]")
    else:
        if layout is None:
            layout = _infer_layout(shape, name)
        if layout == "channels_first":
            array = array.transpose(1, 2, 0)
    channels = array.shape[2]
    if channels not in (1, 3, 4):
        raise InputError(f"{name} has shape {shape}, that is {channels} channels; expected 1, 3 or 4")
    if not array.size:
        raise InputError(f"{name} is empty: its shape is {shape}")
    if channels != 3:
        if not convert:
            raise InputError(f"{name} has {channels} channels and do_convert_rgb is off; expected 3")
        array = np.repeat(array, 3, axis=2) if channels == 1 else array[:, :, :3]
    return check_values(array, name, bounded=bounded)


def check_values(array: _Array, name: str, *, bounded: bool = True) -> _Array:
    """Returns integers 0-255 as uint8, floats 0-255 as float32. Raises `InputError` for others, with their range;
    unless `bounded`, for those alone that are not finite."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_ or not (
        np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    ):
        raise InputError(f"{name} has dtype {array.dtype}; expected uint8 or a floating-point type")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{name} contains values that are not finite")
    outside = low < 0 or high > 255
    if outside and bounded:
        raise InputError(f"{name} has values from {low:g} to {high:g}; expected 0-255, or 0-1 in floating point")
    return array.astype(np.uint8 if not outside and np.issubdtype(array.dtype, np.integer) else np.float32)


def _infer_layout(shape: tuple[int, ...], name: str) -> str:
    """Returns the position of the channels: transformers' order of preference, then four channels."""
    for counts in ((1, 3), (4,)):
        if shape[0] in counts:
            return "channels_first"
        if shape[2] in counts:
            return "channels_last"
    raise InputError(f"{name} has shape {shape}; expected 1, 3 or 4 channels first or last")


def to_levels(array: _Array) -> tuple[_Array, int]:
    """Returns checked values as uint8 levels, and what they were multiplied by: 255 where all lie in 0-1, else 1."""
    if array.dtype == np.uint8:
        return array, 1
    scale = 255 if array.max() <= 1 else 1
    # Rounded, where transformers cuts off: uint8 / 255 comes back as it was.
    return np.rint(array * np.float32(scale)).astype(np.uint8), scale


def level_image(levels: _Array) -> Image.Image:
    """Returns levels `[H, W, 3]`, uint8, as an image."""
    planes = levels.transpose(2, 0, 1)
    if planes.flags.c_contiguous:  # an array or tensor with channels first: NumPy takes ten times as long to turn it
        return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
    return Image.fromarray(np.ascontiguousarray(levels))
