"""Clips made of synthetic scenes, and what is in a file."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from groupvit_common.data.scenes import make_scene


def moving_scene(index: int, count: int, size: tuple[int, int] = (64, 80), step: int = 2) -> list[np.ndarray]:
    """Frames `[H, W, 3]` of a camera that pans over a scene."""
    height, width = size
    wide = np.asarray(make_scene(3, index, 1, (height, width + step * count)).image)
    return [np.ascontiguousarray(wide[:, step * i : step * i + width]) for i in range(count)]


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    rate: int = 10,
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: tuple[int, bool] | None = None,
    sound: bool = False,
    colours: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    **how: Any,
) -> Path:
    """Writes frames `[H, W, 3]` as a video; returns its path.

    `pts` in units of `time_base`: time stamps. `rotation`: counterclockwise degrees to turn it upright, and whether it
    is mirrored then. `colours`: colour space and range that are used and named.
    """
    with av.open(str(path), "w", **how) as output:
        stream: Any = output.add_stream(codec, rate=rate, options={"crf": "1", **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        named: dict[str, Any] = {}
        if colours is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colours
            named = {"dst_colorspace": colours[0], "dst_color_range": colours[1]}
        if sound:
            write_sound(output, len(frames) / rate)
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt, **named)
            if pts is not None:
                image.pts, image.time_base = pts[number], time_base
            output.mux(stream.encode(image))
        output.mux(stream.encode())
    return path


def write_sound(output: Any, seconds: float, rate: int = 8000) -> None:
    """Adds a tone."""
    stream: Any = output.add_stream("aac", rate=rate)
    for number in range(int(seconds * rate / 1024)):
        tone = np.sin(np.arange(1024, dtype=np.float32) / 3)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 1024 * number
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def read_clip(path: Path) -> tuple[list[Fraction], list[np.ndarray]]:
    """Returns the time stamps in seconds and the pixels of a video's frames."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    return [frame.pts * frame.time_base for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def sound_of(path: Path) -> list[bytes]:
    """Returns the packets of a file's sound."""
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


def write_animation(path: Path, frames: Sequence[np.ndarray], durations: Sequence[int]) -> Path:
    """Writes an animated image, lossless where its format is; returns its path."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=list(durations), lossless=True)
    return path
