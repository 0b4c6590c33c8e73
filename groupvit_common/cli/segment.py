"""`groupvit segment`: labels every pixel of images."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from groupvit_common.cli.arguments import add_images, add_segmentation
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import (
    DEFAULT_OUT,
    ImageRun,
    check_writable,
    load_segmenter,
    make_writable,
    output_names,
    read_request,
)
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
images of equal names get numbers (NAME-2).
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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    shown = _modes(options.show)
    labels, background_labels = read_request(options)
    coco = _Coco(Path(options.coco)) if options.coco else None
    out = Path(options.out or DEFAULT_OUT) if options.out or not options.json else None
    run = ImageRun(options, only_prints=out is None and coco is None)
    if out is not None:
        check_writable(out)
        if options.sheet and any(path.resolve() == (out / _SHEET).resolve() for path in run.paths):
            raise InputError(f"{out / _SHEET} is among the images, and --sheet would replace it: choose another --out")
    elif shown or options.sheet:
        raise InputError("--show and --sheet write images: with --json they need --out DIR, the folder for them")
    if not run.paths:
        return run.code()
    segmenter = load_segmenter(options, labels=labels, background_labels=background_labels)
    # Only now: a model that cannot be loaded leaves no empty folder.
    for folder in (out, None if coco is None else coco.file.parent):
        if folder is not None:
            make_writable(folder)
    names = {} if out is None else output_names(run.paths, out)
    figures = _Figures(segmenter, shown, out if options.sheet else None)

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
    return run.code()


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
    from groupvit_common.drawing.canvas import percent

    present = sorted((s for s in result.scores if s.pixel_share > 0), key=lambda s: -s.pixel_share)
    return ", ".join(f"{score.name} {percent(score.pixel_share)}" for score in present)
