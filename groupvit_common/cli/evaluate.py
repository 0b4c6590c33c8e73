"""`groupvit evaluate`: measures a model on segmentation and classification sets."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import add_model, add_options, count, given, numbers, text
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import (
    backend_module,
    backend_title,
    choose_backend,
    make_writable,
    note_optimization,
    read_background_labels,
)
from groupvit_common.cli.terminal import OK, SOME_FAILED
from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.registry import DATASETS, NAMES, PROTOCOLS, find_spec
from groupvit_common.segmentation.options import OPTIONS

if TYPE_CHECKING:
    from groupvit_common.preprocessing.prompts import Label
    from groupvit_common.segmentation.predictor import BaseSegmenter

_DESCRIPTION = """\
Measures a model by a set's class names: mean IoU, IoU and accuracy of each class, and the quality of the groups
whatever their labels are; top-1 and top-5 for classification. With --out, the same command resumes a killed run.
On several GPUs:
torchrun --nproc-per-node 8 -m groupvit_common.cli evaluate --data voc:DIR --model MODEL --out DIR
"""


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _sets() + EXIT_CODES
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="SET",
        help="one of the sets below; several are measured one after the other",
    )  # fmt: skip
    parser.add_argument("--split", metavar="NAME", help="the part of the set (default: for validation)")
    parser.add_argument("--limit", type=count, metavar="N", help="the number of its images (default: all)")
    add_model(parser)
    parser.add_argument(
        "--batch-size", default=8, type=count, metavar="N", help="images or windows at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=count, default=argparse.SUPPRESS, metavar="N",
        help="refuse images of more pixels, before they are decoded (default: 128 million)",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", choices=PROTOCOLS,
        help="paper: the authors' evaluation; tcl: the same with the sets' own class names; native: as groupvit "
        "segment (default: paper; native for scenes)",
    )  # fmt: skip

    options = parser.add_argument_group("instead of the protocol's values")
    options.add_argument(
        "--names", choices=NAMES, default=argparse.SUPPRESS,
        help="the authors' words for the classes, or the set's own",
    )  # fmt: skip
    add_options(options, OPTIONS, or_none=True)
    options.add_argument(
        "--background-labels", type=text, default="", metavar="WORDS", help="labels whose pixels are background"
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", metavar="DIR",
        help="folder for results.json, the confusion matrix and a journal; the same command resumes a killed run",
    )  # fmt: skip
    results.add_argument("--restart", action="store_true", help="discard the results of an earlier run in --out")
    results.add_argument(
        "--save-predictions", action="store_true",
        help="also write label maps into --out, in the form of the set's own masks",
    )  # fmt: skip
    results.add_argument(
        "--html", action="store_true",
        help="also write report.html into --out: a page with the figures, the worst and the best images",
    )  # fmt: skip
    results.add_argument("--json", action="store_true", help="print one JSON object per set, a line each")
    search = parser.add_argument_group("calibration")
    search.add_argument(
        "--calibrate", action="store_true",
        help="find the best background threshold on --split instead of measuring; the curve is printed, and written "
        "into --out",
    )  # fmt: skip
    search.add_argument("--thresholds", type=numbers, metavar="A,B,...", help="to be tried (default: 21 of them)")
    search.add_argument("--temperatures", type=numbers, metavar="A,B,...", help="to be tried with each (default: 1)")
    parser.set_defaults(run=_run)


def _sets() -> str:
    """Returns the sets, a line each."""
    width = max(len(spec.usage) for spec in DATASETS.values())
    rows = (f"  {spec.usage:<{width}}  {spec.help}" for spec in DATASETS.values())
    return "\n".join(["sets (--data):", *rows]) + "\n\n"


def _run(options: argparse.Namespace) -> int:
    from groupvit_common.evaluation.datasets.classification import ClassificationSet, open_classification_set
    from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
    from groupvit_common.evaluation.journal import check_output
    from groupvit_common.evaluation.processes import ProcessInfo, SingleProcess
    from groupvit_common.evaluation.protocols import ProtocolSettings, default_protocol, protocol_settings

    # Faults of the request are found before the model is loaded.
    if options.save_predictions and options.out is None:
        raise InputError("--save-predictions needs --out DIR, the folder for them")
    if options.html and options.out is None:
        raise InputError("--html needs --out DIR, the folder for the page")
    if options.html:
        from groupvit_common.evaluation.page import load_template

        load_template()
    if options.calibrate and options.split is None:
        raise InputError(
            "--calibrate needs --split, with images on which the model is not measured later, such as --split train"
        )
    background_labels = read_background_labels(options)
    chosen, bound = given(options, ("names", *OPTIONS)), given(options, ("max_pixels",))
    if "window" in chosen and "stride" not in chosen:
        chosen["stride"] = None
    if background_labels and "background" not in chosen:
        chosen["background"] = None
    work: list[tuple[SegmentationSet | ClassificationSet, ProtocolSettings, str]] = []
    for spelled in options.data:
        kind, _, where = spelled.partition(":")
        protocol = options.protocol or default_protocol(kind)
        settings = replace(protocol_settings(protocol, kind), **chosen)
        spec = find_spec(spelled)
        if spec is not None and spec.task == "classification":
            opened_set = open_classification_set(where, split=options.split, limit=options.limit, **bound)
            work.append((opened_set, settings, protocol))
        else:
            opened = open_sets(spelled, split=options.split, limit=options.limit, names=settings.names, **bound)
            work += [(one, settings, protocol) for one in opened]
    folders = _result_folders(options.out, [data.kind for data, _, _ in work])
    for data, folder in zip((data for data, _, _ in work), folders, strict=True):
        if folder is not None:
            check_output(folder, data)
    if options.out is not None:
        make_writable(Path(options.out))

    backend = choose_backend(options.backend)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and backend == "tf":
        raise InputError(
            "several processes evaluate together in PyTorch only: leave torchrun out, or pass --backend torch"
        )
    together = (
        backend_module(backend, "distributed").process_group(options.device)
        if world > 1
        else nullcontext(SingleProcess())
    )
    with together as place:
        here: ProcessInfo = place
        base: BaseSegmenter = backend_module(backend, "predictor").Segmenter.from_pretrained(
            options.model,
            processor=options.processor,
            device=getattr(place, "device", options.device),
            dtype=options.dtype,
            fast=options.fast,
            **bound,
        )
        if here.rank == 0:
            note_optimization(base)
        about = {
            "model": options.model,
            "backend": backend,
            "dtype": _dtype_of(base, options.dtype),
            **_weights_of(base.directory),
        }
        code = OK
        for (data, settings, protocol), folder in zip(work, folders, strict=True):
            run = _Evaluation(options, data, settings, folder, {**about, "protocol": protocol}, here)
            try:
                segmenter = settings.segmenter(base, options.batch_size)
                if options.calibrate:
                    run.calibrate(segmenter)
                else:
                    run.measure(segmenter, background_labels)
            except InputError as error:
                # The same on all processes. The other sets are measured all the same.
                if len(work) == 1:
                    raise
                terminal.error(f"{data.kind}: {error}")
                code = SOME_FAILED
    return code


def _result_folders(out: str | None, kinds: Sequence[str]) -> list[Path | None]:
    """Returns the folder of each set's results: the folder itself for one set, else folders inside it."""
    if out is None or len(kinds) == 1:
        return [None if out is None else Path(out)] * len(kinds)
    names = [kind.replace(":", "-") for kind in kinds]
    return [Path(out) / (name if names.count(name) == 1 else f"{name}-{i + 1}") for i, name in enumerate(names)]


def _dtype_of(segmenter: BaseSegmenter, wanted: str | None) -> str:
    """Returns the dtype that a model computes in, "int8" for a quantized one."""
    if segmenter.optimization is None:
        return wanted or "float32"
    return segmenter.optimization.quantize or segmenter.optimization.dtype


def _weights_of(directory: Path | None) -> dict[str, str]:
    """Returns a hash of the weights, so that a run is not resumed with others of the same name."""
    if directory is None:
        return {}
    from groupvit_common.checkpoints.directory import find_weights
    from groupvit_common.storage.saving import read_lock

    digest = hashlib.sha256()
    with read_lock(directory) as held:
        for path in find_weights(held).files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return {"weights": digest.hexdigest()}


class _Evaluation:
    """One set's evaluation: a progress bar while it runs, the results afterwards. Only the first process prints."""

    def __init__(
        self,
        options: argparse.Namespace,
        data: Any,
        settings: Any,
        folder: Path | None,
        about: dict[str, Any],
        place: Any,
    ) -> None:
        self._options, self._data, self._settings, self._folder = options, data, settings, folder
        self._about, self._place = about, place
        self._bar: terminal.Bar | None = None

    def measure(self, segmenter: BaseSegmenter, background_labels: Sequence[Label]) -> None:
        """Measures the model, prints and writes the results."""
        from groupvit_common.evaluation.classification import ClassificationResult, evaluate_classification
        from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
        from groupvit_common.evaluation.report import record_of, table, write_results
        from groupvit_common.evaluation.run import RunOptions
        from groupvit_common.evaluation.segmentation import SegmentationResult, evaluate_segmentation

        options = RunOptions(
            folder=self._folder,
            restart=self._options.restart,
            predictions=self._options.save_predictions,
            about=self._about,
            begin=self._begin,
            progress=self._progress,
        )
        result: SegmentationResult | ClassificationResult | None
        with closing(self):
            if isinstance(self._data, SegmentationSet):
                result = evaluate_segmentation(
                    segmenter, self._data, options, self._place, background_labels=background_labels
                )
            else:
                result = evaluate_classification(segmenter, self._data, options, self._place)
        if result is None:
            return
        record = record_of(result, self._record(segmenter))
        if self._folder is not None:
            write_results(result, record, self._folder)
            if self._options.html:
                from groupvit_common.evaluation.page import write_page

                write_page(self._folder, self._data, lambda image: segmenter(image).label_map)
        self._print(record, table(record))

    def calibrate(self, segmenter: BaseSegmenter) -> None:
        """Tries thresholds and temperatures, prints and writes the curve."""
        from groupvit_common.evaluation.calibration import CALIBRATION_THRESHOLDS, calibrate
        from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
        from groupvit_common.evaluation.report import calibration_record, calibration_table, write_calibration

        if not isinstance(self._data, SegmentationSet):
            raise InputError(f"{self._data.kind} has no background: there is nothing to calibrate")
        self._begin(0, len(self._data))
        with closing(self):
            curve = calibrate(
                segmenter,
                self._data,
                self._options.thresholds or CALIBRATION_THRESHOLDS,
                self._options.temperatures or (segmenter.options.temperature,),
                self._progress,
                self._place,
            )
        if curve is None:
            return
        about = {
            "set": self._data.kind,
            "split": self._data.split,
            "images": len(self._data),
            **self._record(segmenter),
        }
        record = calibration_record(curve, about)
        if self._folder is not None:
            write_calibration(curve, record, self._folder)
        self._print(record, calibration_table(curve))

    def _record(self, segmenter: BaseSegmenter) -> dict[str, Any]:
        # The model's own defaults included.
        used = {name: getattr(segmenter.options, name) for name in ("assignment", "shorter_side")}
        return {**self._about, "settings": {**self._settings.to_dict(), **used}, "processes": self._place.world}

    def _print(self, record: dict[str, Any], text: str) -> None:
        if self._options.json:
            terminal.print_json(record)
            return
        data = self._data
        terminal.print_lines(
            f"{data.kind} ({data.split}), protocol {self._about['protocol']}, {self._about['model']} "
            f"by {backend_title(self._about['backend'])}",
            "",
            *text.split("\n"),
        )
        if self._folder is not None:
            terminal.print_lines(f"Results are in {self._folder.resolve()}")
        terminal.print_lines("")

    def _begin(self, done: int, every: int) -> None:
        if self._place.rank == 0:
            self._bar = terminal.Bar(every, "image", done=done, title=self._data.kind)

    def _progress(self, count: int) -> None:
        if self._bar is not None:
            # The others are about as fast.
            self._bar.advance(count * self._place.world)

    def close(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
