"""The files of a segmented clip: a video in colours, label maps, and a record of labels over time."""

from __future__ import annotations

import zipfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

from groupvit_common.drawing.canvas import SOFTWARE, Entry, image_writer, index_image, percent, with_legend
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.segmentation.clips import Clip, cause, clock_offset, import_av
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.video import VideoFrame
from groupvit_common.storage.json_text import unicode_json
from groupvit_common.storage.saving import write_files, write_text

LabelMaps = Literal["png", "npz"]

# Encoders in the order of preference; FFmpeg is built with or without them. What an encoder is told: quality like a
# good original's at a speed that leaves the processor to the model, and frames in the order in which they are shown.
_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20", "bf": "0"},
    "mpeg4": {"qscale": "3"},
}
# BT.709, limited range: named in the file, since players guess by the size.
_BT709, _LIMITED = 1, 1
# What x264 takes.
_LONGEST_SIDE = 16384
# Frames that wait to be drawn and written at most.
_DRAWN = 4


def save_clip(
    frames: Iterable[VideoFrame],
    clip: Clip,
    folder: Path,
    name: str,
    *,
    label_maps: LabelMaps | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Writes the files of a clip while its frames are segmented, all or none.

    `NAME_overlay.mp4`: the clip in colours, with its size, time stamps and sound. `NAME_overlay.png`: its first frame
    with a legend. `NAME_segmentation.json`: `ClipRecord`. Files there are replaced. Memory does not grow with the
    number of frames, but for some bytes of each in the record.

    Args:
        frames: the results of the clip's frames, as `Segmenter.video` gives them.
        label_maps: "png": also `NAME_labels/000000.png`, ..., a palette PNG for each frame, called after its number.
            "npz": `NAME_labels.npz` with an array `[H, W]` for each frame, called alike, besides `frames`, `times` and
            `labels`.
        about: settings to be noted in the record. progress: is called after each frame.

    Returns:
        The paths by kind, and the record.

    Raises:
        InputError: a file cannot be written, or a fault of the clip.
    """
    record = ClipRecord(clip, about or {})
    paths = {
        "overlay": folder / f"{name}_overlay.mp4",
        "legend": folder / f"{name}_overlay.png",
        "record": folder / f"{name}_segmentation.json",
    }
    maps: _PngMaps | _NpzMaps | None = None
    if label_maps is not None:
        paths["labels"] = folder / (f"{name}_labels" if label_maps == "png" else f"{name}_labels.npz")
        maps = (_PngMaps if label_maps == "png" else _NpzMaps)(paths["labels"], clip)

    def write_overlay(path: Path) -> None:
        waiting: deque[Future[None]] = deque()
        with ExitStack() as open_files:
            if maps is not None:
                open_files.enter_context(maps.opened(path.parent))
            video = open_files.enter_context(OverlayVideo(path, clip))
            writer = open_files.enter_context(ThreadPoolExecutor(1, "groupvit-write"))

            def write(frame: VideoFrame) -> None:
                video.add(frame)
                if maps is not None:
                    maps.add(frame)

            for frame in frames:
                record.add(frame)
                waiting.append(writer.submit(write, frame))
                del frame
                while len(waiting) > _DRAWN:
                    waiting.popleft().result()
                    progress()
            while waiting:
                waiting.popleft().result()
                progress()
            video.finish()
            if maps is not None:
                maps.finish(record)

    def write_record(path: Path) -> None:
        write_text(path, unicode_json(record.to_dict(), separators=(",", ":")) + "\n")
        # The last file: from here on nothing fails but the disk.
        if isinstance(maps, _PngMaps):
            maps.publish()

    writers = {paths["overlay"].name: write_overlay, paths["legend"].name: image_writer(record.legend, "legend.png")}
    if isinstance(maps, _NpzMaps):
        writers[paths["labels"].name] = maps.move
    writers[paths["record"].name] = write_record
    try:
        write_files(folder, writers)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    return paths, record.to_dict()


class ClipRecord:
    """The labels of a clip, in all and over time.

    `to_dict`: the clip's properties and settings; `labels` with the mean probability and share of the pixels of each;
    `over_time` with, for each segmented frame, its number in the clip, its time in seconds, and the share of each
    label.
    """

    def __init__(self, clip: Clip, about: dict[str, Any]) -> None:
        self._clip, self._about = clip, about
        self._first: Segmentation | None = None
        self._numbers, self._times, self._shares = array("q"), array("d"), array("d")
        self._probabilities: Any = 0.0

    def add(self, frame: VideoFrame) -> None:
        """Takes the next frame."""
        result = frame.segmentation
        if self._first is None:
            self._first = result
        self._numbers.append(frame.number)
        self._times.append(frame.time)
        self._shares.extend(score.pixel_share for score in result.scores)
        self._probabilities += np.array([np.nan if s.probability is None else s.probability for s in result.scores])

    @property
    def numbers(self) -> array[int]:
        return self._numbers

    @property
    def times(self) -> array[float]:
        return self._times

    @property
    def labels(self) -> tuple[str, ...]:
        return self._result.labels

    @property
    def _result(self) -> Segmentation:
        assert self._first is not None, "a clip has a frame, or an error"
        return self._first

    def _table(self) -> Any:
        """Shares `[frames, labels]`."""
        return np.frombuffer(self._shares).reshape(len(self._numbers), -1)

    def legend(self) -> Image.Image:
        """The first frame in colours, and a legend of the whole clip."""
        result, shares = self._result, self._table().mean(0).tolist()
        colours = result.colours()
        present = [i for i, share in enumerate(shares) if share > 0]
        present.sort(key=lambda i: (i == result.background, -shares[i]))
        entries = [
            Entry(
                None if i == result.background else colours[i], result.labels[i], f"label {i}", percent(shares[i])
            )
            for i in present
        ]  # fmt: skip
        return with_legend(result.overlay(legend=False), entries)

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        result, table, count = self._result, self._table(), len(self._numbers)
        labels = [
            {"index": i, "name": name, "probability": None if np.isnan(p) else p / count, "pixel_share": share}
            for i, (name, p, share) in enumerate(
                zip(result.labels, self._probabilities.tolist(), table.mean(0).tolist(), strict=True)
            )
        ]
        rate = self._clip.rate
        return {
            "source": self._clip.source,
            "size": {"width": result.image.width, "height": result.image.height},
            "frames": count,
            "frame_rate": None if rate is None else float(rate),
            "seconds": float(self._clip.end),
            **self._about,
            "fault": self._clip.fault,
            "has_background": result.has_background,
            "labels": labels,
            "over_time": {
                "frame": self._numbers.tolist(),
                "time": [round(time, 6) for time in self._times],
                "pixel_share": {
                    name: np.round(table[:, i], 6).tolist() for i, name in enumerate(result.labels)
                },
            },
        }  # fmt: skip


# -- videos ------------------------------------------------------------------------------------------------------------


class OverlayVideo:
    """An MP4 of overlays, upright, with the size, time stamps and sound of a clip.

    The video is H.264 (MPEG-4 where FFmpeg lacks it). Frames of odd sides have their colours at full resolution, which
    not every player shows. Sound is copied as it is, where MP4 holds its kind.

    Raises:
        InputError: PyAV is not installed.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, clip: Clip) -> None:
        self._av, self._clip = import_av(), clip
        # No name in a hidden folder is to end up in the file.
        self._output = self._av.open(
            f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}
        )  # fmt: skip
        self._output.metadata["comment"] = SOFTWARE
        self._stream: Any = None
        self._sound: _Sound | None = None
        self._pts: int | None = None
        self._base = Fraction(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        # Without an end it is no video, and is removed.
        if self._sound is not None:
            self._sound.close()
        try:
            self._output.close()
        except self._av.FFmpegError as error:
            if unused[0] is None:
                raise OSError(getattr(error, "errno", None), cause(error)) from error

    def add(self, frame: VideoFrame) -> None:
        """Draws and writes the next frame."""
        drawn = frame.segmentation.overlay(legend=False)
        with _as_system_errors(self._av):
            if self._stream is None:
                self._open(drawn.size, frame.time_base)
            size = (self._stream.width, self._stream.height)
            if drawn.size != size:
                drawn = drawn.resize(size)
            image = self._av.VideoFrame.from_image(drawn)
            image = image.reformat(
                format=self._stream.pix_fmt, dst_colorspace=_BT709, dst_color_range=_LIMITED
            )  # fmt: skip
            image.pts, image.time_base = frame.pts, frame.time_base
            self._pts = frame.pts
            if self._sound is not None:
                self._sound.copy(frame.pts * frame.time_base)
            for packet in self._stream.encode(image):
                self._output.mux(packet)

    def finish(self) -> None:
        """Writes what is left; the last frame is shown up to the end of what was read of the clip."""
        if self._stream is None or self._pts is None:
            return
        end, is_whole = self._clip.end, self._clip.is_over and self._clip.fault is None
        with _as_system_errors(self._av):
            for packet in self._stream.encode():
                if packet.pts == self._pts:
                    packet.duration = max(1, round(end / self._base) - self._pts)
                self._output.mux(packet)
            if self._sound is not None:
                self._sound.copy(None if is_whole else end)
            self._output.close()

    def _open(self, size: tuple[int, int], base: Fraction) -> None:
        if max(size) > _LONGEST_SIDE:
            raise InputError(
                f"its frames are {size[0]}x{size[1]} pixels, and the overlay's sides are at most {_LONGEST_SIDE}: make "
                "it smaller"
            )
        is_odd = size[0] % 2 or size[1] % 2
        name = next((each for each in _ENCODERS if each in self._av.codecs_available), None)
        if name is None:
            raise InputError(f"this FFmpeg has no encoder for MP4: expected {' or '.join(_ENCODERS)}")
        rate = (self._clip.rate or Fraction(25)).limit_denominator(100_000)
        self._stream = stream = self._output.add_stream(name, rate=rate, options=_ENCODERS[name])
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if is_odd and name == "libx264" else "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED
        if self._clip.aspect != 1:
            codec.sample_aspect_ratio = self._clip.aspect
        stream.time_base = codec.time_base = self._base = base
        if self._clip.source is not None:
            self._sound = _Sound.of(self._clip.source, self._output, self._av)


class _Sound:
    """The sound of a clip on its way into another file, packet by packet."""

    @classmethod
    def of(cls, source: str, output: Any, av: Any) -> _Sound | None:
        """Returns the sound of a file; None if there is none that fits."""
        if not Path(source).is_file():
            return None
        try:
            container = av.open(f"file:{source}", metadata_errors="replace")
        except (av.FFmpegError, UnicodeError, ValueError):
            return None
        stream = container.streams.best("audio")
        codec = None if stream is None else stream.codec_context
        if codec is None or codec.codec.canonical_name not in output.supported_codecs:
            container.close()
            return None
        return cls(container, stream, output, av)

    def __init__(self, container: Any, stream: Any, output: Any, av: Any) -> None:
        self._container, self._output, self._av = container, output, av
        self._target = output.add_stream_from_template(stream)
        self._base = stream.time_base
        self._offset = round(clock_offset(container) / self._base)
        self._packets = container.demux(stream)
        self._next: Any = None
        self._last = -(2**62)
        self._has_ended = False

    def copy(self, until: Fraction | None) -> None:
        """Writes the packets that begin before this second; None: all."""
        while not self._has_ended:
            if self._next is None:
                self._next = self._read()
            if self._next is None or (until is not None and self._next.dts * self._base >= until):
                return
            self._output.mux(self._next)
            self._next = None

    def _read(self) -> Any:
        """Returns the next packet; None at the end of what can be read."""
        try:
            for packet in self._packets:
                # A clock that jumps back is not followed.
                if packet.size and packet.dts is not None and packet.dts - self._offset > self._last:
                    packet.dts -= self._offset
                    self._last = packet.dts
                    packet.pts = packet.dts if packet.pts is None else packet.pts - self._offset
                    packet.stream = self._target
                    return packet
        except self._av.FFmpegError:
            pass
        self._has_ended = True
        return None

    def close(self) -> None:
        self._container.close()


class _as_system_errors:
    """Raises FFmpeg's errors as those of the system, such as a full disk's."""

    def __init__(self, av: Any) -> None:
        self._av = av

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._av.FFmpegError) and not isinstance(error, OSError):
            raise OSError(None, f"the video cannot be encoded ({cause(error)})") from error


# -- label maps --------------------------------------------------------------------------------------------------------


def _digits(clip: Clip) -> int:
    """Returns the number of digits in names of frames, so that they sort as the frames."""
    return max(6, len(str(2 * (clip.count or 0))))


class _PngMaps:
    """Label maps as PNG files, in a folder of their own.

    Raises:
        InputError: there is something else in the place of the folder.
    """

    def __init__(self, target: Path, clip: Clip) -> None:
        self._target, self._digits = target, _digits(clip)
        self._folder = Path()
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise InputError(f"{target} is a file; label maps are to be a folder of this name: move it away")
        if target.is_dir() and not all(_is_map(path) for path in target.iterdir()):
            raise InputError(f"{target} holds other files than the label maps of a clip: move it away")

    def opened(self, staging: Path) -> Any:
        self._folder = staging / ".label_maps"
        self._folder.mkdir()
        return ExitStack()

    def add(self, frame: VideoFrame) -> None:
        result = frame.segmentation
        path = self._folder / f"{frame.number:0{self._digits}d}.png"
        image_writer(lambda: index_image(result.label_map, result.colours()), path.name)(path)

    def finish(self, record: ClipRecord) -> None:
        pass

    def publish(self) -> None:
        """Puts the folder into its place."""
        if self._target.is_dir():
            old = self._folder.with_name(".old_label_maps")
            self._target.rename(old)
        self._folder.rename(self._target)


def _is_map(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdecimal()


class _NpzMaps:
    """Label maps as an archive of arrays, one for each frame."""

    def __init__(self, target: Path, clip: Clip) -> None:
        self._digits = _digits(clip)
        self._path = Path()
        self._archive: zipfile.ZipFile | None = None

    def opened(self, staging: Path) -> Any:
        self._path = staging / ".label_maps"
        self._archive = zipfile.ZipFile(self._path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        return self._archive

    def add(self, frame: VideoFrame) -> None:
        self._write(f"{frame.number:0{self._digits}d}", frame.segmentation.label_map)

    def finish(self, record: ClipRecord) -> None:
        self._write("frames", np.array(record.numbers, np.int64))
        self._write("times", np.array(record.times, np.float64))
        self._write("labels", np.array(record.labels))

    def move(self, path: Path) -> None:
        """Puts the archive into the place of an empty file."""
        self._path.replace(path)

    def _write(self, name: str, values: Any) -> None:
        assert self._archive is not None
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)
