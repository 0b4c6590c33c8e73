"""Clips: videos and animated images as upright frames with time stamps, one after the other."""

from __future__ import annotations

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image, ImageSequence

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.images import MAX_PIXELS, TooLargeError, image_suffixes, readers, to_rgb

CLIP_SUFFIXES = frozenset([
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m1v", ".m2ts",
    ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".mxf", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m",
])  # fmt: skip
"""Ends of the names of videos."""

ANIMATED = ("GIF", "WEBP", "PNG")
"""Pillow's names of the formats of images that may be animated."""
_ANIMATED_SUFFIXES = (".gif", ".webp", ".png", ".apng")

# The nine numbers of a display matrix (ISO 14496-12, 8.5.2.3) in fixed point: x' = a x + c y, y' = b x + d y, by the
# signs of a, b, c, d -> what turns a stored frame upright.
_UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
)  # fmt: skip
# A clip that ends earlier than its file says is truncated: by more than so many seconds and this part of it.
_EARLY_SECONDS, _EARLY_PART = 0.5, 0.05
# A clock that goes back by more seconds was set anew.
_CLOCK_JUMP = 0.5
# Frames of a video without a rate, such as raw H.264, are shown so many a second.
_USUAL_RATE = Fraction(25)
# Decoding in more threads holds more frames.
_DECODER_THREADS = 4
# FFmpeg's names of formats that are lists of other files: whoever sends bytes must not choose what is opened.
_LISTS = frozenset(["concat", "dash", "hls", "applehttp", "imf", "sdp", "webm_dash_manifest"])
# AVFMT_TS_DISCONT among the flags of a format.
_COUNTS_FROM_ANYWHERE = 0x0200


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a clip.

    Attributes:
        image: upright, RGB.
        number: its place in the clip, from 0 on.
        pts, time_base: its time stamp, `pts * time_base` seconds, as the clip has it.
        duration: until the next frame in units of `time_base`, as the clip says it; 0 if it does not.
    """

    image: Image.Image
    number: int
    pts: int
    time_base: Fraction
    duration: int

    @property
    def time(self) -> float:
        """The time stamp in seconds."""
        return float(self.pts * self.time_base)


class Clip(ABC):
    """A clip that is open, to be read once.

    Attributes:
        name: for messages; `source`: its file, None for one that is no file.
        rate: frames a second, on average; None if it is not known.
        count: the number of frames, as the file says it or as follows from its length; None if it is not known.
        seconds: its length as the file says it; None if it does not.
        aspect: width of a pixel as a multiple of its height, of upright frames.
        end: the end of the last frame that was read, in seconds.
        is_over: the last frame has been read.
        fault: then, what was wrong with the file; None if nothing was.
    """

    def __init__(self, name: str, source: str | None) -> None:
        self.name, self.source = name, source
        self.rate: Fraction | None = None
        self.count: int | None = None
        self.seconds: float | None = None
        self.aspect = Fraction(1)
        self.end = Fraction(0)
        self.is_over = False
        self.fault: str | None = None
        self._is_used = False

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Yields the frames in the order in which they are shown; their time stamps increase.

        Raises:
            InputError: there are none, none can be decoded, or one has more pixels than are allowed.
        """

    def _begin(self) -> None:
        """Raises `InputError` for a clip that has been read or closed."""
        if self._is_used:
            raise InputError(f"{self.name} has been read or closed: open it again")
        self._is_used = True

    @abstractmethod
    def close(self) -> None:
        """Closes the file; a frame that another thread decodes is waited for, and is the last."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def open_clip(source: str | Path | bytes | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> Clip:
    """Returns a video, by PyAV, or an animated image, by Pillow.

    Args:
        source: a path, the bytes of a file, or a binary file that can be searched.
        max_pixels: frames of more are refused before one is decoded.

    Raises:
        InputError: there is no such file, it is no clip or a damaged one, or PyAV is not installed.
    """
    name = str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "the clip"))
    path = str(source) if isinstance(source, str | Path) else None
    stream: Any = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
    if not isinstance(stream, str | Path) and not hasattr(stream, "read"):
        raise InputError(f"{name} is a {type(source).__name__}; expected a path, bytes or a binary file")
    start = _start(stream, name)
    if not start:
        raise InputError(f"{name} is empty: expected a video")
    image = _image_format(start)
    if image is not None and image not in ANIMATED:
        raise InputError(f"{name} is a photo ({image}): expected a video, GIF, WebP or PNG")
    if image is not None:
        return _AnimatedImage(stream, name, path, max_pixels)
    return _Video(stream, name, path, max_pixels)


def is_clip(path: Path) -> bool:
    """Returns whether a file is a video, or an image that is animated, by its content and name.

    A file that cannot be read, or is neither a video nor an image, is a clip if its name ends like a video's.
    """
    suffix = path.suffix.lower()
    if suffix in image_suffixes() and suffix not in _ANIMATED_SUFFIXES:
        return False
    try:
        if path.exists() and not path.is_file():
            # A pipe would be waited for, and what is read of it is gone.
            return False
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError:
        start = b""
    found = _image_format(start)
    if found == "GIF":
        return _is_animated(path)
    if found == "WEBP":
        return start[12:16] == b"VP8X" and start[20:21] != b"" and bool(start[20] & 2)
    if found is not None:
        # The chunk of animations comes before the pixels.
        return found == "PNG" and b"acTL" in start
    return _is_video(start) or suffix in CLIP_SUFFIXES


# -- kinds of files ----------------------------------------------------------------------------------------------------

_START = 564
# First bytes of videos, at their place.
_VIDEO_MARKS = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (0, b"\x1a\x45\xdf\xa3"), (0, b"FLV\x01"), (0, b"OggS"),
    (0, b"\0\0\x01\xba"), (0, b"\0\0\x01\xb3"), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), (0, b"YUV4MPEG2"),
    (0, b"\x06\x0e\x2b\x34"),
)  # fmt: skip
# Kinds of the first mark that are images, which Pillow or nobody here opens.
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"crx ")


def _start(stream: Any, name: str) -> bytes:
    """Returns the first bytes of a file."""
    try:
        if isinstance(stream, str | Path):
            with Path(stream).open("rb") as file:
                return file.read(_START)
        stream.seek(0)
        start: Any = stream.read(_START)
        stream.seek(0)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null character in a name
        raise InputError(f"{name!r} cannot be read: {error}") from error
    if isinstance(start, str):
        raise InputError(f"{name} is open as text: open it as a binary file")
    return bytes(start)


def _image_format(start: bytes) -> str | None:
    """Returns Pillow's name of the format of an image that begins so; None for what is none."""
    if start[4:8] == b"ftyp":
        return "AVIF" if start[8:12] in _IMAGE_BRANDS else None
    for name in ("GIF", "WEBP", "PNG", "JPEG", "TIFF"):
        accept = readers().get(name, (None, None))[1]
        if accept is not None and accept(start[:16]):
            return name
    return None


def _is_video(start: bytes) -> bool:
    """Returns whether a file that begins so is a video; one without a mark, as MPEG's transport stream, may be."""
    if any(start[at:].startswith(mark) for at, mark in _VIDEO_MARKS):
        return True
    is_transport = any(start[at : at + 377 : 188] == b"GGG" for at in (0, 4))
    return is_transport or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")


def _is_animated(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            # Frames are not counted: that fails where the file is truncated.
            return bool(getattr(image, "is_animated", False))
    except Exception:  # whoever opens it as an image reports it
        return False


def _check_pixels(name: str, width: int, height: int, most: int) -> None:
    if width * height > most:
        raise TooLargeError(
            f"{name} has frames of {width}x{height} pixels, more than max_pixels={most}: make it smaller, or raise "
            "max_pixels if you trust it"
        )


# -- animated images ---------------------------------------------------------------------------------------------------


class _AnimatedImage(Clip):
    """A GIF, WebP or PNG with frames; one without is a clip of one frame."""

    def __init__(self, stream: Any, name: str, source: str | None, max_pixels: int) -> None:
        super().__init__(name, source)
        try:
            with Image.open(stream, formats=ANIMATED) as image:
                _check_pixels(name, *image.size, max_pixels)
                with suppress(Exception):  # a truncated GIF: those that there are come all the same
                    self.count = int(getattr(image, "n_frames", 1))
                # Counting may have ended anywhere.
            if not isinstance(stream, str | Path):
                stream.seek(0)
            self._image = Image.open(stream, formats=ANIMATED)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise several
            raise InputError(f"{name} cannot be read: the image is truncated or damaged ({error})") from error

    def __iter__(self) -> Iterator[Frame]:
        self._begin()
        pts = number = 0
        frames = iter(ImageSequence.Iterator(self._image))
        while True:
            try:
                image = next(frames)
                rgb = to_rgb(image.copy(), self.name)
                # After the frame is decoded. Browsers show one of hardly any duration for a tenth of a second.
                duration = round(image.info.get("duration") or 0)
                duration = duration if duration > 10 else 100
            except StopIteration:
                break
            except Exception as error:
                if not number:
                    raise InputError(f"no frame of {self.name} can be decoded: it is truncated or damaged") from error
                of = "" if self.count is None else f" of {self.count}"
                self.fault = f"only {number}{of} frames can be decoded: the file is truncated or damaged"
                break
            self.end = Fraction(pts + duration, 1000)
            self.rate = (number + 1) / self.end
            yield Frame(rgb, number, pts, Fraction(1, 1000), duration)
            number, pts = number + 1, pts + duration
        self.is_over = True

    def close(self) -> None:
        self._is_used = True
        self._image.close()


# -- videos ------------------------------------------------------------------------------------------------------------


def import_av() -> Any:
    """Returns PyAV. Raises `InputError` if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV: pip install 'groupvit[video]'") from error
    # What FFmpeg says of damaged files comes as errors and faults, once.
    av.logging.set_level(None)
    return av


def clock_offset(container: Any) -> Fraction:
    """Returns the time in seconds that is 0 to a viewer: broadcasts, and files cut from them, count from anywhere."""
    counts_from_anywhere = container.format.flags & _COUNTS_FROM_ANYWHERE
    return Fraction(container.start_time or 0, 1_000_000) if counts_from_anywhere else Fraction(0)


def cause(error: Exception) -> str:
    """Returns the cause that an error of FFmpeg names."""
    return str(getattr(error, "strerror", None) or error)


class _Video(Clip):
    """A file that FFmpeg reads."""

    def __init__(self, stream: Any, name: str, source: str | None, max_pixels: int) -> None:
        super().__init__(name, source)
        av = import_av()
        self._max_pixels, self._errors = max_pixels, (av.FFmpegError, UnicodeError)
        # FFmpeg does not survive that a file is closed while another thread reads it, as it is after an error.
        self._lock, self._is_closed = threading.Lock(), False
        try:
            # "file:" keeps a name such as http:x or concat:x from being more than a name.
            self._container = av.open(f"file:{stream}" if source is not None else stream, metadata_errors="replace")
        except (*self._errors, ValueError) as error:
            raise InputError(f"{name} is not a video, or truncated or damaged ({cause(error)})") from error
        try:
            self._stream = self._opened()
        except BaseException:
            self._container.close()
            raise

    def _opened(self) -> Any:
        """Returns the video's stream, after its properties have been looked at."""
        if not _LISTS.isdisjoint(self._container.format.name.split(",")):
            raise InputError(f"{self.name} is a list of other files: name these")
        # A song has its cover as a stream of one frame.
        streams = [each for each in self._container.streams.video if not _is_cover(each)]
        if not streams:
            kinds = sorted({each.type or "data" for each in self._container.streams})
            found = f"it has {' and '.join(kinds)} alone" if kinds else "it is empty"
            raise InputError(f"{self.name} has no video stream: {found}")
        best = self._container.streams.best("video")
        stream = best if best in streams else streams[0]
        codec = stream.codec_context
        if codec is None:
            raise InputError(f"{self.name} is in a video format that this FFmpeg does not decode")
        _check_pixels(self.name, codec.width, codec.height, self._max_pixels)
        stream.thread_type = "AUTO"
        codec.thread_count = min(_DECODER_THREADS, os.cpu_count() or 1)
        self.rate = stream.average_rate or stream.guessed_rate or None
        if stream.duration and stream.time_base:
            self.seconds = float(stream.duration * stream.time_base)
        elif self._container.duration:
            self.seconds = self._container.duration / 1_000_000
        if stream.frames:
            self.count = int(stream.frames)
        elif self.seconds and self.rate:
            self.count = max(1, round(self.seconds * self.rate))
        self.aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
        self.offset = clock_offset(self._container)
        return stream

    def __iter__(self) -> Iterator[Frame]:
        self._begin()
        base = self._stream.time_base or Fraction(1, 90000)
        usual = max(1, round(1 / ((self.rate or _USUAL_RATE) * base)))
        number, pts, after, turned = 0, -1, 0, False
        start = round(self.offset / base)
        first = (self._stream.start_time or 0) - start
        for frame in self._decoded():
            _check_pixels(self.name, frame.width, frame.height, self._max_pixels)
            operation = _upright(frame)
            if operation in _SIDEWAYS and not turned:
                self.aspect, turned = 1 / self.aspect, True
            given = after if frame.pts is None else int(frame.pts) - start
            if number and (pts - given) * base > _CLOCK_JUMP:
                # As where recordings were joined: time goes on from the last frame.
                start -= after - given
                given = after
            # Two frames of one time would be one to a player.
            pts = max(given, pts + 1) if number else given
            duration = int(frame.duration or 0)
            after = pts + (duration or usual)
            self.end = max(self.end, after * base)
            yield Frame(_image(frame, operation), number, pts, base, duration)
            number += 1
        if not number:
            why = "it is truncated or damaged" if self._damaged or self.count else "it has none"
            raise InputError(f"no frame of {self.name} can be decoded: {self._ended_by or why}")
        self.is_over = True
        if self.rate and self._stream.duration is None and abs(Fraction(self.seconds or 0) - self.end) < 1 / self.rate:
            # Matroska's durations of frames are rounded to milliseconds.
            self.end = Fraction(self.seconds or 0).limit_denominator(1_000_000)
        self.fault = self._found_fault(number, float(self.end - first * base))

    def _decoded(self) -> Iterator[Any]:
        """Yields what can be decoded; ends where the file ends or cannot be read."""
        self._damaged, self._ended_by = 0, ""
        packets = self._container.demux(self._stream)
        while True:
            with self._lock:
                if self._is_closed:
                    raise InputError(f"{self.name} was closed while it was read")
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except self._errors as error:
                    self._ended_by = cause(error)
                    packet = None
                try:
                    # Without a packet: those that the decoder still has.
                    frames = self._stream.decode(packet)
                except self._errors:
                    self._damaged += 1
                    frames = []
            self._damaged += sum(bool(frame.is_corrupt) for frame in frames)
            yield from frames
            if packet is None:
                return

    def _length(self) -> float | None:
        """Returns the seconds of the video alone, as the file says them."""
        if self._stream.duration:
            return float(self._stream.duration * self._stream.time_base)
        # Matroska: a tag, "00:00:02.048000000".
        parts = str(self._stream.metadata.get("DURATION", "")).split(":")
        try:
            hours, minutes, seconds = map(float, parts)
        except ValueError:
            return None
        # Unlike a duration it counts from 0, not from the first frame.
        start = (self._stream.start_time or 0) * (self._stream.time_base or 0)
        return 3600 * hours + 60 * minutes + seconds - float(start)

    def _found_fault(self, number: int, end: float) -> str | None:
        """Returns what was wrong with a file of which so many frames, up to this second, were decoded."""
        length = self._length()
        if length and length - end > max(_EARLY_SECONDS, _EARLY_PART * length):
            return f"only {number} frames, {end:.1f} of {length:.1f} seconds, can be decoded: the file is truncated"
        if self._ended_by:
            return f"only {number} frames can be decoded: {self._ended_by}"
        if self._damaged:
            return f"{self._damaged} of its packets or frames are damaged"
        return None

    def close(self) -> None:
        with self._lock:
            self._is_used = self._is_closed = True
            self._container.close()


def _is_cover(stream: Any) -> bool:
    return "attached_pic" in str(getattr(stream.disposition, "name", stream.disposition))


def _upright(frame: Any) -> Image.Transpose | None:
    """Returns what turns a frame upright, by its display matrix: phones hold it, and front cameras mirror."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    # Of an angle between, the nearest quarter.
    if abs(a) + abs(d) >= abs(b) + abs(c):
        signs = (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    else:
        signs = (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)
    return _UPRIGHT.get(signs)


def _image(frame: Any, operation: Image.Transpose | None) -> Image.Image:
    """Returns a decoded frame as an upright RGB image, by the colour space and range that it names."""
    image: Image.Image = frame.to_image()
    return image if operation is None else image.transpose(operation)
