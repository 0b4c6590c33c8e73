"""Clips: reading, segmenting and writing them, in both backends."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.images import TooLargeError
from groupvit_common.segmentation import label_maps
from groupvit_common.segmentation.clips import is_clip, open_clip
from groupvit_common.segmentation.label_maps import View
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.smoothing import Smoother
from groupvit_common.segmentation.video_files import OverlayVideo, save_clip
from tests.support.clips import moving_scene, read_clip, sound_of, write_animation, write_clip

LABELS, BACKGROUND = "red, yellow, green, cyan, blue, pink", "grass, sand, water, bricks, wood, clouds"
# A video loses colour resolution; levels of 255.
LOSSY = 6


@pytest.fixture(scope="module")
def segmenter(demo: Any) -> Any:
    return demo("torch", labels=LABELS, background_labels=BACKGROUND, shorter_side=64, batch_size=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of one scene, cut to a second of another, with sound."""
    folder = tmp_path_factory.mktemp("clip")
    return write_clip(folder / "clip.mp4", [*moving_scene(1, 10), *moving_scene(4, 10)], sound=True)


def times_and_images(path: Path | bytes, **how: Any) -> tuple[list[float], list[np.ndarray]]:
    with open_clip(path, **how) as clip:
        frames = list(clip)
    assert [frame.number for frame in frames] == list(range(len(frames)))
    return [frame.time for frame in frames], [np.asarray(frame.image) for frame in frames]


# -- reading --


def test_frames_come_in_the_order_in_which_they_are_shown_with_their_times(clip: Path) -> None:
    times, images = times_and_images(clip)
    wanted_times, wanted = read_clip(clip)
    assert times == [float(time) for time in wanted_times]
    assert all((one == other).all() for one, other in zip(images, wanted, strict=True))
    with open_clip(clip) as opened:
        assert (opened.count, opened.rate, opened.seconds) == (20, 10, 2)
        assert len(list(opened)) == 20
        assert (opened.end, opened.is_over, opened.fault) == (2, True, None)


@pytest.mark.parametrize(("degrees", "mirrored"), [(90, False), (-90, True), (180, False), (0, True)])
def test_a_phones_video_is_turned_upright(degrees: int, mirrored: bool, tmp_path: Path) -> None:
    upright = moving_scene(1, 2, (48, 64))
    # What the camera stores: the inverse of turning by so much and mirroring.
    stored = [np.rot90(frame[:, ::-1] if mirrored else frame, -degrees // 90) for frame in upright]
    path = tmp_path / "phone.mov"
    write_clip(path, [np.ascontiguousarray(f) for f in stored], rotation=(degrees, mirrored), pix_fmt="yuv444p")
    _, images = times_and_images(path)
    assert images[0].shape == upright[0].shape
    assert np.abs(images[0].astype(int) - upright[0]).mean() < LOSSY


@pytest.mark.parametrize(
    ("pix_fmt", "colours"), [("yuv444p", (1, 1)), ("yuv444p", (1, 2)), ("yuvj444p", (5, 2)), ("yuv444p10le", None)]
)
def test_colours_are_those_of_the_source(pix_fmt: str, colours: tuple[int, int] | None, tmp_path: Path) -> None:
    """Of either matrix, limited and full range, and of 10 bits."""
    frames = [np.broadcast_to(np.uint8(colour), (32, 32, 3)).copy() for colour in ([200, 30, 40], [20, 180, 220])]
    path = write_clip(tmp_path / "colours.mp4", frames, pix_fmt=pix_fmt, colours=colours)
    _, images = times_and_images(path)
    for image, frame in zip(images, frames, strict=True):
        assert np.abs(image.astype(int) - frame).max() <= LOSSY


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animated_image_is_a_clip(name: str, tmp_path: Path) -> None:
    frames, durations = moving_scene(1, 4), [100, 200, 50, 100]
    path = write_animation(tmp_path / name, frames, durations)
    times, images = times_and_images(path.read_bytes())
    assert times == [0, 0.1, 0.3, 0.35]
    if not name.endswith("gif"):
        assert all((one == other).all() for one, other in zip(images, frames, strict=True))
    assert is_clip(path)
    Image.fromarray(frames[0]).save(tmp_path / f"still{name}")
    assert not is_clip(tmp_path / f"still{name}")


def test_kinds_are_told_by_content(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "film").write_bytes(clip.read_bytes())
    (tmp_path / "photo.mp4").write_bytes(_png())
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "text").write_text("hello")
    found = {name: is_clip(tmp_path / name) for name in ("film", "photo.mp4", "text.mp4", "text", "none.mkv")}
    assert found == {"film": True, "photo.mp4": False, "text.mp4": True, "text": False, "none.mkv": True}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_not_read(clip: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    # With a writer and some bytes, so that whoever reads does not wait.
    pipe = os.open(tmp_path / "pipe.mp4", os.O_RDWR)
    os.write(pipe, clip.read_bytes()[:1000])
    assert not is_clip(tmp_path / "pipe.mp4")
    assert len(os.read(pipe, 2000)) == 1000
    os.close(pipe)


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_what_is_no_clip_is_refused_in_one_sentence(clip: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index is at the end
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as output:
        from tests.support.clips import write_sound

        write_sound(output, 1)
    for name, message in {
        "cut.mp4": "not a video, or truncated or damaged", "text.mp4": "not a video", "empty.mp4": "is empty",
        "song.mp4": "no video stream: it has audio alone", "none.mp4": "No such file", ".": "Is a directory",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_clip(tmp_path / name)
    with pytest.raises(TooLargeError, match="frames of 80x64 pixels, more than max_pixels=5000"):
        open_clip(clip, max_pixels=5000)
    with pytest.raises(InputError, match="is a int; expected a path"):
        open_clip(3)  # type: ignore[arg-type]
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    (tmp_path / clip.name).write_bytes(whole)
    with pytest.raises(InputError, match="is a list of other files"):
        open_clip(tmp_path / "list.mp4")
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    with pytest.raises(InputError, match=r"is a photo \(JPEG\): expected a video"):
        open_clip(photo)
    with (tmp_path / "text.mp4").open() as text, pytest.raises(InputError, match=r"^\S+text.mp4 is open as text"):
        open_clip(text)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'groupvit\[video\]'"):
        open_clip(clip)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_clip_that_begins_late_is_whole(name: str, tmp_path: Path) -> None:
    times = [2000 + 100 * i for i in range(12)]
    path = write_clip(tmp_path / name, moving_scene(1, 12), pts=times, time_base=Fraction(1, 1000))
    with open_clip(path) as clip:
        assert [round(1000 * frame.time) for frame in clip] == times
        assert (clip.fault, clip.end) == (None, Fraction(16, 5))


def test_a_clip_is_read_once(clip: Path) -> None:
    for source in (clip, _png()):
        with open_clip(source) as opened:
            assert list(opened)
            with pytest.raises(InputError, match="has been read or closed: open it again"):
                list(opened)
        opened = open_clip(source)
        opened.close()
        with pytest.raises(InputError, match="has been read or closed: open it again"):
            list(opened)
    with open_clip(clip) as opened:
        frames = iter(opened)
        next(frames)
    with pytest.raises(InputError, match="was closed while it was read"):
        list(frames)


def test_what_there_is_of_a_truncated_clip_is_given(tmp_path: Path) -> None:
    frames = [np.random.default_rng(i).integers(0, 255, (64, 80, 3), np.uint8) for i in range(20)]
    for name, how in (("a.mp4", {"container_options": {"movflags": "+faststart"}}), ("a.mkv", {})):
        path = write_clip(tmp_path / name, frames, **how)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with open_clip(path) as clip:
            count = len(list(clip))
            assert 5 < count < 15
            assert clip.fault is not None
            assert f"only {count} frames" in clip.fault
    gif = write_animation(tmp_path / "a.gif", frames, [100] * 20)
    whole = gif.read_bytes()
    # Wherever a frame is cut, it is not taken for an image.
    for length in range(len(whole) // 2, len(whole) // 2 + 40):
        gif.write_bytes(whole[:length])
        assert is_clip(gif), length
    with open_clip(gif) as clip:
        count = len(list(clip))
        assert 5 < count < 15


# -- segmenting --


def test_frames_are_segmented_as_images(segmenter: Any, clip: Path) -> None:
    results = list(segmenter.video(clip))
    times, images = times_and_images(clip)
    assert [result.time for result in results] == times
    for result, image in zip(results[::5], images[::5], strict=True):
        alone = segmenter(Image.fromarray(image))
        assert (np.asarray(result.segmentation.image) == image).all()
        # In a batch of another size, sums are rounded otherwise.
        assert (result.segmentation.label_map == alone.label_map).mean() > 0.999
        assert result.segmentation.source == str(clip)


def test_every_and_max_frames(segmenter: Any, clip: Path) -> None:
    assert [frame.number for frame in segmenter.video(clip, every=3)] == [0, 3, 6, 9, 12, 15, 18]
    assert [frame.number for frame in segmenter.video(str(clip), every=4, max_frames=2)] == [0, 4]
    with clip.open("rb") as file:
        assert [frame.number for frame in segmenter.video(file, max_frames=1)] == [0]
    for wrong in ({"every": 0}, {"max_frames": 0}, {"every": 1.5}, {"smoothing": 1}, {"smoothing": "much"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            list(segmenter.video(clip, **wrong))


def test_both_backends_agree(demo: Any, segmenter: Any, clip: Path) -> None:
    keras = demo("tf", labels=LABELS, background_labels=BACKGROUND, shorter_side=64, batch_size=4)
    for smoothing in (0, 0.6):
        pairs = zip(
            segmenter.video(clip, smoothing=smoothing, max_frames=5),
            keras.video(clip, smoothing=smoothing, max_frames=5),
            strict=True,
        )
        assert all((a.segmentation.label_map == b.segmentation.label_map).mean() > 0.999 for a, b in pairs)


def test_an_error_comes_after_the_results_before_it(segmenter: Any, monkeypatch: Any, clip: Path) -> None:
    from groupvit_common.segmentation import clips

    decoded = clips._Video._decoded

    def fails(self: Any) -> Any:
        for number, frame in enumerate(decoded(self)):
            if number == 6:
                raise TooLargeError("too large")
            yield frame

    monkeypatch.setattr(clips._Video, "_decoded", fails)
    results = segmenter.video(clip)
    assert [next(results).number for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(TooLargeError):
        next(results)


def test_a_clip_is_closed_after_the_frame_that_a_thread_decodes(clip: Path) -> None:
    opened: Any = open_clip(clip)
    file, order, begun, may_end = opened._container, [], threading.Event(), threading.Event()

    def packets(stream: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        order.append("read")
        yield from file.demux(stream)

    def close() -> None:
        order.append("closed")
        file.close()

    opened._container = SimpleNamespace(demux=packets, close=close)
    with ThreadPoolExecutor(2) as threads:
        frames = threads.submit(list, opened)
        assert begun.wait(30)
        closed = threads.submit(opened.close)
        # Without the lock it would be closed by now.
        assert not wait([closed], timeout=0.05).done
        may_end.set()
        assert closed.exception() is None
        frames.exception()
    assert order == ["read", "closed"]


def test_few_frames_are_alive_at_a_time(segmenter: Any, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", moving_scene(1, 32, (48, 48), step=1), options={"preset": "ultrafast"})
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    for frame in segmenter.video(path):
        alive.add(frame.segmentation)
        del frame
        gc.collect(0)
        most = max(most, len(alive))
    # Of two batches of four, one being given back.
    assert most <= 9


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames(segmenter: Any, tmp_path: Path) -> None:
    peaks = []
    for count in (50, 250):
        path = write_clip(tmp_path / f"{count}.mp4", moving_scene(1, count, (64, 64), step=1))
        tracemalloc.start()
        with open_clip(path) as opened:
            save_clip(segmenter.video(opened, smoothing=0.5), opened, tmp_path, path.stem, label_maps="npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The record grows by some numbers for each frame, of which the image alone has 12288; a batch more may be there.
    assert peaks[1] < peaks[0] + 200 * 4000


# -- smoothing --


def views_of(scores: list[list[float]]) -> list[View]:
    """A view of 1x2 patches, each a group, with scores of two labels."""
    return [View(np.float32([scores]), np.float32([[[[1, 0]], [[0, 1]]]]))]


def smoothed(smoother: Smoother, scores: list[list[float]], level: float = 0.0, **options: Any) -> list[int]:
    chosen = SegmentationOptions(assignment="soft", **options)
    pixels = np.full((3, 8, 16), level, np.float32)
    return smoother.pixel_labels(views_of(scores), pixels, (1, 2), chosen, [False, False]).label_map[0].tolist()


def test_scores_are_averaged_over_time() -> None:
    smoother = Smoother(0.75)
    assert smoothed(smoother, [[0.8, 0.2], [0.1, 0.9]]) == [0, 1]
    # One frame in which all is the other way is not enough, since 0.75 * 0.8 + 0.25 * 0.2 = 0.65.
    assert smoothed(smoother, [[0.2, 0.8], [0.9, 0.1]]) == [0, 1]
    # 0.75 * 0.65 + 0.25 * 0.2 = 0.5375; then 0.453.
    assert smoothed(smoother, [[0.2, 0.8], [0.9, 0.1]]) == [0, 1]
    assert smoothed(smoother, [[0.2, 0.8], [0.9, 0.1]]) == [1, 0]
    assert smoother.cuts == 0


def test_a_cut_begins_anew() -> None:
    smoother = Smoother(0.9)
    assert smoothed(smoother, [[0.8, 0.2], [0.1, 0.9]]) == [0, 1]
    assert smoothed(smoother, [[0.2, 0.8], [0.9, 0.1]], level=0.5) == [1, 0]
    assert smoother.cuts == 1


def test_a_threshold_meets_smoothed_scores() -> None:
    smoother = Smoother(0.5)
    assert smoothed(smoother, [[0.8, 0.1], [0.1, 0.6]], background=0.5) == [1, 2]
    # (0.8 + 0.1) / 2 is below the threshold, (0.6 + 0.9) / 2 is not.
    assert smoothed(smoother, [[0.1, 0.1], [0.1, 0.9]], background=0.5) == [0, 2]


@pytest.mark.parametrize("options", [{}, {"assignment": "hard"}, {"flip": True, "refine": 1, "background": 0.3}])
def test_a_still_clip_is_smoothed_to_itself(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    affinity, grouping = rng.random((1, 3, 4), np.float32), rng.random((1, 3, 4, 5), np.float32)
    views = [View(affinity, grouping)] * (2 if options.get("flip") else 1)
    pixels, chosen = rng.random((3, 32, 40), np.float32), SegmentationOptions(**{"assignment": "soft", **options})
    smoother = Smoother(0.7)
    maps = [
        smoother.pixel_labels(views, pixels, (50, 60), chosen, [False] * 3 + [True]).label_map for _ in range(3)
    ]  # fmt: skip
    assert all((each == maps[0]).all() for each in maps)
    plain = label_maps.pixel_labels(views, pixels, (50, 60), chosen, [False] * 3 + [True]).label_map
    # Hard assignments are made at the size that the model sees.
    assert (maps[0] == plain).mean() > (0.9 if options.get("assignment") == "hard" else 0.9999)


def test_smoothing_of_a_clip_resets_at_its_cut(segmenter: Any, clip: Path) -> None:
    plain = [frame.segmentation.label_map for frame in segmenter.video(clip)]
    smooth = [frame.segmentation.label_map for frame in segmenter.video(clip, smoothing=0.8)]
    same = [float((one == other).mean()) for one, other in zip(plain, smooth, strict=True)]
    assert same[0] == same[10] == 1
    assert min(same[1:10]) < 1
    flicker = [sum((a != b).mean() for a, b in pairwise(maps[:10])) for maps in (plain, smooth)]
    assert flicker[1] < flicker[0]


# -- files --


def saved(segmenter: Any, path: Path, out: Path, **how: Any) -> tuple[dict[str, Path], dict[str, Any]]:
    settings = {name: how.pop(name) for name in ("every", "max_frames", "smoothing") if name in how}
    with open_clip(path) as clip:
        return save_clip(segmenter.video(clip, **settings), clip, out, path.stem, **how)


def test_the_overlay_has_the_times_size_and_sound_of_the_clip(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    files, record = saved(segmenter, clip, tmp_path / "out")
    times, frames = read_clip(files["overlay"])
    assert times == read_clip(clip)[0]
    assert sound_of(files["overlay"]) == sound_of(clip)
    with av.open(str(files["overlay"])) as video:
        assert video.streams.video[0].average_rate == 10
        assert video.duration == 2_000_000
    results = list(segmenter.video(clip))
    for number in (0, 9, 10, 19):
        drawn = np.asarray(results[number].segmentation.overlay(legend=False)).astype(int)
        # Noise is compressed, and colours have half the resolution.
        assert np.abs(frames[number] - drawn).mean() < 2 * LOSSY
    assert json.loads(files["record"].read_text()) == record
    table = np.array([[score.pixel_share for score in frame.segmentation.scores] for frame in results])
    assert record["over_time"]["frame"] == list(range(20))
    assert record["over_time"]["time"] == [float(time) for time in times]
    names = [label["name"] for label in record["labels"]]
    assert names == ["background", *LABELS.split(", ")]
    assert np.allclose([record["over_time"]["pixel_share"][name] for name in names], table.T, atol=1e-6)
    assert np.allclose([label["pixel_share"] for label in record["labels"]], table.mean(0))
    assert (record["frames"], record["seconds"], record["frame_rate"], record["fault"]) == (20, 2, 10, None)
    with Image.open(files["legend"]) as legend:
        assert legend.height > 64


def test_times_of_any_rate_and_odd_sizes(segmenter: Any, tmp_path: Path) -> None:
    pts, base = [0, 3000, 9000, 12000, 30000], Fraction(1, 90000)
    path = write_clip(
        tmp_path / "odd.mp4", moving_scene(1, 5, (49, 61)), pts=pts, time_base=base, pix_fmt="yuv444p",
        options={"bf": "0"},
    )  # fmt: skip
    files, _ = saved(segmenter, path, tmp_path / "out")
    times, frames = read_clip(files["overlay"])
    assert times == [time * base for time in pts]
    assert frames[0].shape == (49, 61, 3)
    with av.open(str(path)) as source, av.open(str(files["overlay"])) as overlay:
        assert overlay.streams.video[0].duration * overlay.streams.video[0].time_base == (
            source.streams.video[0].duration * source.streams.video[0].time_base
        )


def test_a_broadcast_begins_at_zero(segmenter: Any, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "cut.ts", moving_scene(1, 5), pts=[90000 + 9000 * i for i in range(5)],
                      time_base=Fraction(1, 90000), options={"bf": "0"})  # fmt: skip
    assert read_clip(path)[0][0] >= 1
    files, record = saved(segmenter, path, tmp_path / "out")
    assert [round(float(time), 6) for time in read_clip(files["overlay"])[0]] == [0, 0.1, 0.2, 0.3, 0.4]
    assert record["over_time"]["time"][0] == 0


def test_recordings_that_were_joined_go_on(segmenter: Any, tmp_path: Path) -> None:
    """Of another size, and with a clock that begins again."""
    parts = [
        write_clip(tmp_path / f"{i}.ts", moving_scene(i, 8, size), sound=True)
        for i, size in ((1, (48, 64)), (2, (64, 80)))
    ]  # fmt: skip
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    files, _ = saved(segmenter, path, tmp_path / "out", smoothing=0.5, label_maps="npz")
    times, frames = read_clip(files["overlay"])
    assert len(times) == 16
    assert [round(float(b - a), 3) for a, b in pairwise(times)] == [0.1] * 15
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    with np.load(files["labels"]) as archive:
        assert [archive[f"{i:06d}"].shape for i in (7, 8)] == [(48, 64), (64, 80)]


def test_every_second_frame_makes_a_video_as_long(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    files, record = saved(segmenter, clip, tmp_path, every=2, label_maps="png")
    assert read_clip(files["overlay"])[0] == read_clip(clip)[0][::2]
    with av.open(str(files["overlay"])) as video:
        assert video.duration == 2_000_000
    assert record["over_time"]["frame"] == list(range(0, 20, 2))
    assert sorted(path.name for path in files["labels"].iterdir()) == [f"{i:06d}.png" for i in range(0, 20, 2)]


def test_frames_too_large_for_the_overlay_are_told(clip: Path, tmp_path: Path) -> None:
    drawn = SimpleNamespace(overlay=lambda legend: Image.new("RGB", (20_000, 2)))
    frame: Any = SimpleNamespace(segmentation=drawn, pts=0, time_base=Fraction(1, 10))
    with (
        open_clip(clip) as opened,
        pytest.raises(InputError, match="its frames are 20000x2 pixels"),
        OverlayVideo(tmp_path / "a.mp4", opened) as video,
    ):
        video.add(frame)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_label_maps_are_sorted_by_frame(kind: Any, segmenter: Any, clip: Path, tmp_path: Path) -> None:
    wanted = {f"{frame.number:06d}": frame.segmentation for frame in segmenter.video(clip, max_frames=3)}
    for _ in range(2):  # a second run replaces the first
        files, _ = saved(segmenter, clip, tmp_path, max_frames=3, label_maps=kind)
    if kind == "png":
        found = {path.stem: np.asarray(Image.open(path)) for path in sorted(files["labels"].iterdir())}
    else:
        with np.load(files["labels"]) as archive:
            found = dict(archive)
        assert found.pop("frames").tolist() == [0, 1, 2]
        assert found.pop("times").tolist() == [0, 0.1, 0.2]
        assert tuple(found.pop("labels").tolist()) == wanted["000000"].labels
    assert list(found) == list(wanted)
    assert all((found[name] == wanted[name].label_map).all() for name in wanted)


def test_nothing_is_left_of_a_run_that_fails(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "clip_overlay.mp4").write_bytes(b"before")

    def frames(failure: BaseException) -> Any:
        yield from segmenter.video(clip, max_frames=3)
        raise failure

    for failure in (KeyboardInterrupt(), InputError("no"), OSError(28, "No space left on device")):
        with open_clip(clip) as opened, pytest.raises((KeyboardInterrupt, InputError)):
            save_clip(frames(failure), opened, tmp_path, "clip", label_maps="png")
        assert [path.name for path in tmp_path.iterdir()] == ["clip_overlay.mp4"]
        assert (tmp_path / "clip_overlay.mp4").read_bytes() == b"before"


def test_a_folder_of_other_files_is_not_replaced(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "clip_labels").mkdir()
    (tmp_path / "clip_labels" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        saved(segmenter, clip, tmp_path, label_maps="png")
    assert (tmp_path / "clip_labels" / "notes.txt").read_text() == "mine"
