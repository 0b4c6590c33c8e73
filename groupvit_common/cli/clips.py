"""Clips of `groupvit segment`: videos and animated images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common.cli.arguments import count, given, score
from groupvit_common.cli.parser import Parser
from groupvit_common.errors import InputError

if TYPE_CHECKING:
    from groupvit_common.cli.runtime import ImageRun
    from groupvit_common.segmentation.predictor import BaseSegmenter

_OPTIONS = ("label_maps", "smoothing", "every", "max_frames")


def add_clip_options(parser: Parser) -> None:
    """Adds the options of clips; one that is not given leaves no trace."""
    group = parser.add_argument_group("clips (videos; GIF, WebP and PNG with several frames)")
    group.add_argument(
        "--label-maps", choices=("png", "npz"), default=argparse.SUPPRESS,
        help="also write a label map for each frame: a folder NAME_labels of PNG files, or an archive NAME_labels.npz",
    )  # fmt: skip
    group.add_argument(
        "--smoothing", type=_smoothing, default=argparse.SUPPRESS, metavar="WEIGHT",
        help="average scores over time: the weight of earlier frames, 0 to less than 1, such as 0.7 (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--every", type=count, default=argparse.SUPPRESS, metavar="N", help="only each N-th frame (default: 1)"
    )
    group.add_argument(
        "--max-frames", type=count, default=argparse.SUPPRESS, metavar="N", help="at most N frames (default: all)"
    )


def _smoothing(argument: str) -> float:
    value = score(argument)
    if value == 1:
        raise argparse.ArgumentTypeError("must be less than 1, which would keep the scores of the first frame")
    return value


def check_clip_options(options: argparse.Namespace, clips: Sequence[Path], out: Path | None) -> None:
    """Raises `InputError` for options that clips do not take, for options of clips without one, and without PyAV."""
    named = ["--" + name.replace("_", "-") for name in given(options, _OPTIONS)]
    if not clips:
        if named:
            raise InputError(f"{named[0]} is for clips, and there is none among the inputs")
        return
    for name, is_given in (
        ("--show", options.show), ("--group-map", options.group_map), ("--sheet", options.sheet),
        ("--coco", options.coco),
    ):  # fmt: skip
        if is_given:
            raise InputError(f"{name} is for images, and {clips[0]} is a clip: run the command for one kind only")
    if out is None and "label_maps" in options:
        raise InputError("--label-maps writes files: with --json it needs --out DIR, the folder for them")
    from groupvit_common.segmentation.clips import import_av

    if out is not None or not all(path.suffix.lower() in (".gif", ".webp", ".png", ".apng") for path in clips):
        import_av()


def clip_files(options: argparse.Namespace, out: Path, name: str) -> list[Path]:
    """Returns the files of a clip that the command writes."""
    kinds = {"png": "_labels", "npz": "_labels.npz"}
    ends = ["_overlay.mp4", "_overlay.png"]
    ends += [kinds[options.label_maps]] if "label_maps" in options else []
    return [out / f"{name}{end}" for end in ends]


def segment_clips(
    segmenter: BaseSegmenter,
    run: ImageRun,
    options: argparse.Namespace,
    out: Path | None,
    names: Mapping[Path, str],
) -> None:
    """Segments the clips of a command, one after the other: prints a line about each, and writes its files."""
    from groupvit_common.segmentation.clips import open_clip
    from groupvit_common.segmentation.video_files import ClipRecord, save_clip

    chosen = given(options, _OPTIONS)
    label_maps = chosen.pop("label_maps", None)
    about: dict[str, Any] = {
        "every": 1,
        "smoothing": 0.0,
        **{name: chosen[name] for name in ("every", "smoothing") if name in chosen},
    }
    for number, path in enumerate(run.pending(run.clips), 1):
        with run.attempt(path), open_clip(path, max_pixels=segmenter.max_pixels) as clip:
            total = None if clip.count is None else -(-clip.count // about["every"])
            most = chosen.get("max_frames")
            total = most if total is None else total if most is None else min(total, most)
            title = path.name if len(run.clips) == 1 else f"{path.name} ({number} of {len(run.clips)})"
            with run.bar(total, "frame", title) as bar:
                frames = segmenter.video(clip, **chosen)
                files: dict[str, Path] = {}
                if out is None:
                    record = ClipRecord(clip, about)
                    for frame in frames:
                        record.add(frame)
                        bar.advance()
                    content = record.to_dict()
                else:
                    files, content = save_clip(
                        frames, clip, out, names[path], label_maps=label_maps, about=about, progress=bar.advance
                    )
            where = f" -> {files['overlay']}" if files else ""
            content["files"] = {kind: str(file) for kind, file in files.items()}
            shares = shares_in_words((each["name"], each["pixel_share"]) for each in content["labels"])
            length = content["frames"]
            run.done(content, f"{path}: {length} frame{'s' if length > 1 else ''}, {shares}{where}")
            if clip.fault is not None:
                run.fail(path, f"{path}: {clip.fault}{'; what there is was segmented' if files else ''}", printed=True)


def shares_in_words(shares: Iterable[tuple[str, float]]) -> str:
    """Returns labels and their shares of the pixels, the largest first, for a line."""
    from groupvit_common.drawing.canvas import percent

    present = sorted(((name, share) for name, share in shares if share > 0), key=lambda each: -each[1])
    return ", ".join(f"{name} {percent(share)}" for name, share in present)
