"""`groupvit segment`: labels every pixel of images."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import add_images, add_segmentation
from groupvit_common.cli.clips import add_clip_options, check_clip_options, clip_files, segment_clips, shares_in_words
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import (
    DEFAULT_OUT,
    ImageRun,
    backend_module,
    check_writable,
    choose_backend,
    load_segmenter,
    make_writable,
    output_names,
    read_request,
)
from groupvit_common.cli.shares import Share, is_done
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.segmentation.figures import FIGURES, show, thumbnail, write_images

if TYPE_CHECKING:
    from PIL import Image

    from groupvit_common.segmentation.predictor import BaseSegmenter
    from groupvit_common.segmentation.result import Details, Segmentation

_DESCRIPTION = """\
Colours the pixels of each image by the label that fits them best. Writes, into the folder --out, for each image NAME:
NAME_overlay.png (the image in colours, with a legend), NAME_labels.png (one index per pixel, with the same colours as
its palette) and NAME_segmentation.json. Files of an earlier run are replaced; an input image is never overwritten, and
images of equal names get numbers (NAME-2). A clip gets NAME_overlay.mp4, NAME_overlay.png (its first frame with a
legend) and NAME_segmentation.json.

Several processes divide the inputs: torchrun --nproc-per-node 8 -m groupvit_common.cli segment ..., or RANK and
WORLD_SIZE in the environment.
"""
# All images of a command on one page, each with its legend.
_SHEET, _SHEET_SIDE = "contact_sheet.png", 320
# Results that wait to be written at most.
_UNWRITTEN = 4


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
    add_images(parser)
    add_segmentation(parser)
    add_clip_options(parser)
    parser.add_argument(
        "--out", metavar="DIR", help=f"folder to write into (default: {DEFAULT_OUT}; with --json: none)"
    )
    parser.add_argument(
        "--group-map", action="store_true", help="also write NAME_groups.png: the groups and their labels"
    )
    parser.add_argument(
        "--show", default="", metavar="KIND[,KIND...]",
        help=f"also write NAME_KIND.png for each kind of figure: {', '.join(FIGURES)}",
    )  # fmt: skip
    parser.add_argument("--sheet", action="store_true", help=f"also write {_SHEET}: all images in colours on one page")
    parser.add_argument(
        "--coco", metavar="FILE", help="also write FILE, all results as a COCO data set (JSON, with run lengths)"
    )
    parser.add_argument(
        "--skip-existing", action="store_true",
        help="leave out inputs whose results are in --out already, whole and for these labels",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    shown = _modes(options.show)
    labels, background_labels = read_request(options)
    coco = _Coco(Path(options.coco)) if options.coco else None
    out = Path(options.out or DEFAULT_OUT) if options.out or not options.json else None
    share = Share.of_environment()
    _check_parts(options, share, out)
    run = ImageRun(options, only_prints=out is None and coco is None, share=share, takes_clips=True)
    check_clip_options(options, run.every_clip, out)
    if out is not None:
        check_writable(out)
        if options.sheet and any(path.resolve() == (out / _SHEET).resolve() for path in run.paths):
            raise InputError(f"{out / _SHEET} is among the images, and --sheet would replace it: choose another --out")
    elif shown or options.sheet:
        raise InputError("--show and --sheet write images: with --json they need --out DIR, the folder for them")
    names = {} if out is None else output_names(run.inputs, out)
    mine, missing = [*run.paths, *run.clips], run.failed
    if share.world > 1:
        terminal.note(f"{share.name}: {len(mine)} of {len(run.inputs)} inputs")
    done: list[Path] = []
    if options.skip_existing and out is not None:
        hidden = {label.name for label in background_labels}
        wanted = [label.name for label in labels if label.name not in hidden]
        for paths, files_of in ((run.paths, _files), (run.clips, clip_files)):
            for path in paths:
                files = files_of(options, out, names[path])
                if is_done(path, files, out / f"{names[path]}_segmentation.json", wanted):
                    done.append(path)
        run.skip(done)
        if done:
            terminal.note(f"{len(done)} of {len(mine)} inputs have their results in {out} already")
    share.begin(out)
    if run.paths or run.clips:
        segmenter = load_segmenter(
            options, **_device_of(options, share), labels=labels, background_labels=background_labels
        )
        # Only now: a model that cannot be loaded leaves no empty folder.
        for folder in (out, None if coco is None else coco.file.parent):
            if folder is not None:
                make_writable(folder)
        if run.paths:
            figures = _Figures(segmenter, shown, out if options.sheet else None)
            _segment_images(options, run, segmenter, figures, coco, out, names)
        if run.clips:
            segment_clips(segmenter, run, options, out, names)
    counts = {"done": len(mine) - len(done) - (run.failed - missing), "there already": len(done), "failed": run.failed}
    return share.end(out, counts, run.code())


def _check_parts(options: argparse.Namespace, share: Share, out: Path | None) -> None:
    """Raises `InputError` for results of all images in one file where a process has only some of them."""
    one = "--sheet" if options.sheet else "--coco" if options.coco else None
    if options.skip_existing and out is None:
        raise InputError("--skip-existing looks for files: with --json it needs --out DIR, the folder of them")
    if one is not None and options.skip_existing:
        raise InputError(f"{one} needs the results of all images, and --skip-existing leaves some out: choose one")
    if one is not None and share.world > 1:
        raise InputError(f"{one} needs the results of all images, and {share.name} has some of them: run one process")


def _device_of(options: argparse.Namespace, share: Share) -> dict[str, str]:
    """Returns the device of one of several processes: of a machine's GPUs each has its own."""
    if share.world == 1 or options.device is not None or choose_backend(options.backend) != "torch":
        return {}
    return {"device": str(backend_module("torch", "distributed").rank_device())}


def _files(options: argparse.Namespace, out: Path, name: str) -> list[Path]:
    """Returns the files of an image that the command writes."""
    ends = ["_overlay.png", "_labels.png", *(f"_{mode}.png" for mode in _modes(options.show))]
    return [out / f"{name}{end}" for end in (*ends, *(["_groups.png"] if options.group_map else []))]


def _segment_images(
    options: argparse.Namespace,
    run: ImageRun,
    segmenter: BaseSegmenter,
    figures: _Figures,
    coco: _Coco | None,
    out: Path | None,
    names: Mapping[Path, str],
) -> None:
    """Segments the images of a command: prints a line or record about each, and writes its files."""

    def write(path: Path, result: Segmentation, details: Details | None) -> dict[str, Path]:
        if out is None:
            return {}
        files = result.save_as(out, names[path], groups=options.group_map)
        return files | figures.save(result, out, names[path], details)

    def finish(path: Path, result: Segmentation, written: Callable[[], dict[str, Path]]) -> None:
        with run.attempt(path):
            files, record, where = written(), result.to_dict(), ""
            if coco is not None:
                coco.add(result)
            if files:
                record["files"] = {kind: str(file) for kind, file in files.items()}
                where = f" -> {files['overlay']}"
            run.done(record, f"{path}: {_shares(result)}{where}")

    # Files of an image are drawn and written beside the model, which has the next ones meanwhile.
    waiting: deque[tuple[Path, Segmentation, Callable[[], dict[str, Path]]]] = deque()
    with run, ThreadPoolExecutor(1) as writer:
        for path, result in run.segmented(segmenter):
            with run.attempt(path):
                details = figures.details(result)
                if out is None or len(run.paths) == 1:
                    finish(path, result, partial(write, path, result, details))
                else:
                    waiting.append((path, result, writer.submit(write, path, result, details).result))
            while len(waiting) > _UNWRITTEN:
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
    figures.save_sheet()
    if coco is not None:
        coco.save()


class _Coco:
    """The data set of --coco, which is written when all images are done."""

    def __init__(self, file: Path) -> None:
        from groupvit_common.segmentation.adapters.coco import CocoDataset

        if file.suffix.lower() != ".json" or file.is_dir():
            raise InputError(f"--coco writes a JSON file, got {file}: give a name that ends in .json")
        self.file, self._data_set = file, CocoDataset()
        check_writable(file.parent)

    def add(self, result: Segmentation) -> None:
        self._data_set.add(result)

    def save(self) -> None:
        from groupvit_common.storage.json_text import unicode_json
        from groupvit_common.storage.saving import write_texts

        try:
            write_texts(self.file.parent, {self.file.name: unicode_json(self._data_set.to_dict()) + "\n"})
        except CheckpointError as error:
            raise InputError(str(error)) from error


def _modes(text: str) -> tuple[str, ...]:
    """Returns the kinds of images of --show."""
    wanted = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in wanted if word not in FIGURES]
    if unknown:
        raise InputError(f"--show knows no {unknown[0]!r}: it must be among {', '.join(FIGURES)}")
    return tuple(mode for mode in FIGURES if mode in wanted)


class _Figures:
    """The images of --show and --sheet. `sheet`: the folder for the contact sheet; None for none."""

    def __init__(self, segmenter: BaseSegmenter, modes: Sequence[str], sheet: Path | None) -> None:
        self._segmenter, self._modes, self._sheet = segmenter, modes, sheet
        self._small: list[tuple[str, Image.Image]] = []

    def details(self, result: Segmentation) -> Details | None:
        """Returns what the figures show besides a result; None if they need no more."""
        needs_details = any(FIGURES[mode].needs_details for mode in self._modes)
        return self._segmenter.details(result.image) if needs_details else None

    def save(self, result: Segmentation, out: Path, name: str, details: Details | None) -> dict[str, Path]:
        """Writes those of one result; returns the paths by mode."""
        if self._sheet is not None:
            self._small.append((name, thumbnail(result, _SHEET_SIDE)))
        images = {f"{name}_{mode}.png": show(result, mode, details) for mode in self._modes}
        if images:
            write_images(out, images)
        return dict(zip(self._modes, (out / file for file in images), strict=True))

    def save_sheet(self) -> None:
        """Writes the contact sheet of all images so far, if it is wanted and there are any."""
        if self._sheet is not None and self._small:
            from groupvit_common.drawing.canvas import contact_sheet

            write_images(self._sheet, {_SHEET: contact_sheet(self._small, side=2 * _SHEET_SIDE)})


def _shares(result: Segmentation) -> str:
    return shares_in_words((score.name, score.pixel_share) for score in result.scores)
