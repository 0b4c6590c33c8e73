"""The `groupvit` command.

Only the standard library is imported here: `groupvit --help` answers at once, and what a command needs is imported when it
runs. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import Parser, add_options, count, numbers, text, whole
from groupvit_common.cli.terminal import BAD_INPUT as BAD_INPUT
from groupvit_common.cli.terminal import OK, SIGNALLED, SOME_FAILED
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.registry import DATASETS, IMAGENET
from groupvit_common.segmentation.options import OPTIONS, SegmentationOptions

if TYPE_CHECKING:
    from PIL import Image

    from groupvit_common.preprocessing.prompts import Label
    from groupvit_common.segmentation.figures import Mode
    from groupvit_common.segmentation.postprocess import Segmentation
    from groupvit_common.segmentation.predictor import BaseSegmenter

_EXIT_CODES = """\
exit codes:
  0    done
  1    some images could not be done, or what is printed could not be written; the others are done. verify: not the same model
  2    bad usage or input: an option, the labels, a folder without images, a folder that cannot be written
  3    the model cannot be used: no such checkpoint, no network, a damaged file, neither PyTorch nor TensorFlow, out of memory
  70   a fault of this program (GROUPVIT_TRACEBACK=1 shows where)
  130  interrupted (Ctrl-C)
  141  the reader of the output went away
  143  asked to end (SIGTERM); a training run has saved where it stands
"""
_DESCRIPTION = "Segment and classify pictures by words, with GroupViT; train it; convert its checkpoints."
_EXAMPLES = """\
examples:
  groupvit demo
  groupvit segment cat.jpg --labels "cat, couch, remote control"
  groupvit segment holiday/ --labels-file words.txt --background 0.9 --out segmented
  groupvit classify *.jpg --labels "indoors, outdoors" --json
  groupvit evaluate --data voc:VOCdevkit/VOC2012 --model nvidia/groupvit-gcc-yfcc --out voc
  groupvit convert group_vit_gcc_yfcc_30e.pth groupvit-yfcc

"""
_SEGMENT = """\
Colours the pixels of each picture by the label that fits them best. Writes, into the folder --out, for each picture NAME:
NAME_overlay.png (the picture in colours, with a legend), NAME_labels.png (one index per pixel, with the same colours as its
palette) and NAME_segmentation.json. Files of an earlier run are replaced; a picture that was given is never overwritten,
and pictures of equal names get numbers (NAME-2).
"""
_EVALUATE = """\
Measures a model by the words of a set's classes: mean IoU, IoU and accuracy of each class, and how good the groups are whatever
they are called; top-1 and top-5 for classification. With --out a run that was killed goes on where it was. On several GPUs:
torchrun --nproc-per-node 8 -m groupvit_common.cli evaluate --data voc:DIR --model MODEL --out DIR
"""
# What each backend needs: the module that must be there, and what it is called.
_BACKENDS = {"torch": ("torch", "PyTorch"), "tf": ("keras", "TensorFlow")}
_DEFAULT_OUT = "groupvit_out"
_COMPARE_END = "_compare.png"
# All pictures of a command at one glance, each with its legend.
_SHEET, _SHEET_SIDE = "contact_sheet.png", 320
# From so many pictures on, a bar shows how far it is.
_MANY = 4
_LEVELS = {1: "colours", 2: "textures", 3: "shapes"}
_DEMO_SIZES = ((64, 64), (96, 160))  # height, width: as trained, and larger of another shape
# Strong colours: the objects' own are strong too.
_DEMO_ALPHA = 0.7


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. `SystemExit` for --help, --version and bad usage, as argparse does."""
    return terminal.run(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        # Libraries that load others by relative paths end the process.
        raise InputError("the current folder is gone or cannot be read: change to another one") from error
    try:
        code: int = options.run(options)
    except ModuleNotFoundError as error:
        backend = {"torch": "torch", "keras": "tf", "tensorflow": "tf"}.get(error.name or "")
        if backend is None:
            raise
        raise _BackendMissing(backend) from error
    return code


def _parser() -> Parser:
    parser = Parser(prog="groupvit", description=_DESCRIPTION, epilog=_EXAMPLES + _EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    segment = commands.add_parser("segment", help="label every pixel", description=_SEGMENT, epilog=_EXIT_CODES)
    _add_what(segment)
    _add_how(segment)
    segment.add_argument(
        "--out", metavar="DIR", help=f"folder to write into (default: {_DEFAULT_OUT}; with --json: none)"
    )
    segment.add_argument(
        "--group-map", action="store_true", help="also write NAME_groups.png: the groups and their labels"
    )
    segment.add_argument(
        "--show", default="", metavar="KIND[,KIND...]",
        help="also write NAME_KIND.png: input, pred, input_pred, input_pred_label, first_group, final_group, all_groups "
        "(as in the authors' evaluation), similarity (a heat map for each label)",
    )  # fmt: skip
    segment.add_argument(
        "--sheet", action="store_true", help=f"also write {_SHEET}: all pictures in colours at one glance"
    )
    segment.set_defaults(run=_segment)

    compare = commands.add_parser(
        "compare", help="segment with two models or backends and show where they differ", epilog=_EXIT_CODES,
        description="Segments each picture twice, by --model and --other, or by two backends, and writes NAME_compare.png into the folder\n"
        "--out: the picture, both results, and in red the pixels whose labels differ.",
    )  # fmt: skip
    _add_what(compare)
    compare.add_argument("--other", metavar="MODEL", help="the second model (default: the first)")
    compare.add_argument(
        "--other-backend", choices=tuple(_BACKENDS), help="what computes the second result (default: what computes the first)"
    )  # fmt: skip
    _add_how(compare)
    compare.add_argument(
        "--out", default=_DEFAULT_OUT, metavar="DIR", help="folder to write into (default: %(default)s)"
    )
    compare.set_defaults(run=_compare)

    classify = commands.add_parser(
        "classify", help="say how likely each label is for the whole picture", epilog=_EXIT_CODES,
        description="Says, for each picture, how likely each label is: the labels of one picture add up to 100%.",
    )  # fmt: skip
    _add_what(classify)
    classify.set_defaults(run=_classify)

    demo = commands.add_parser(
        "demo", help="segment freshly made pictures with the bundled model, offline", epilog=_EXIT_CODES,
        description="Makes pictures that the bundled model has never seen, in two sizes, segments them by words, and\n"
        "compares with the truth: IoU (intersection over union) is 100% where every pixel of a label is found and no other.",
    )  # fmt: skip
    demo.add_argument("--out", default="demo_output", metavar="DIR", help="folder to write into (default: %(default)s)")
    demo.add_argument("--seed", type=whole, default=2022, help="which pictures are made (default: %(default)s)")
    demo.add_argument(
        "--backend", choices=(*_BACKENDS, "all"), default="all",
        help="what computes; all: whatever is installed, compared with each other (default: %(default)s)",
    )  # fmt: skip
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train", help="train a model by a recipe", epilog=_EXIT_CODES,
        description="Trains a model from captions alone and writes a checkpoint with its measured quality.\n"
        "The recipe scenes-demo made the bundled model. On several GPUs:\n"
        "torchrun --nproc-per-node 8 -m groupvit_common.cli train RECIPE --out DIR --resume auto",
    )  # fmt: skip
    train.add_argument("recipe", metavar="RECIPE", help="the name of a recipe, such as scenes-demo, or a TOML file")
    train.add_argument("--out", metavar="DIR", help="folder for the checkpoint")
    train.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="replaces a setting of the recipe, such as optimizer.learning_rate=1e-3 or learning_rate=1e-3; may be repeated",
    )  # fmt: skip
    train.add_argument("--seed", type=whole, help="the same as --set run.seed=SEED")
    train.add_argument(
        "--resume", default="never", metavar="auto|never|PATH",
        help="auto: go on from the newest valid checkpoint in DIR if there is one; or from a checkpoint's path (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--show", action="store_true", help="print the recipe in full as TOML, and do nothing else")
    _add_backend(train)
    train.set_defaults(run=_train)

    _add_evaluate(commands)

    # What converts checkpoints lies beside this package; its commands need no framework, and are light like this file.
    from conversion.commands import add_commands

    add_commands(commands, _EXIT_CODES)
    return parser


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate", help="measure a model on a segmentation or classification set", description=_EVALUATE,
        epilog=_EXIT_CODES, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="SET",
        help=f"{', '.join(spec.usage for spec in (*DATASETS.values(), IMAGENET))}; several are measured one after the other",
    )  # fmt: skip
    parser.add_argument("--split", default=None, metavar="NAME", help="the part of the set (default: for validation)")
    parser.add_argument("--limit", default=None, type=count, metavar="N", help="so many of its pictures")
    parser.add_argument(
        "--model", default="nvidia/groupvit-gcc-yfcc", metavar="MODEL",
        help='a checkpoint folder, "org/name" on the Hugging Face hub, or "demo", the bundled one (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        "--processor", default=None, metavar="MODEL",
        help="the checkpoint whose tokenizer and image processor are used (default: those of --model)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", default=None, choices=tuple(_BACKENDS),
        help="torch: PyTorch; tf: Keras on TensorFlow (default: the first of them that is installed)",
    )  # fmt: skip
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="of the weights (default: float32)"
    )
    parser.add_argument(
        "--batch-size", default=8, type=count, metavar="N", help="pictures or windows at once (default: %(default)s)"
    )
    parser.add_argument(
        "--protocol", default=None, choices=("paper", "tcl", "native"),
        help="paper: the authors' evaluation; tcl: the same with the sets' own class names; native: as groupvit segment does it "
        "(default: paper; native for scenes)",
    )  # fmt: skip

    knobs = parser.add_argument_group("instead of what the protocol says")
    knobs.add_argument(
        "--names", choices=("authors", "set"), help="the authors' words for the classes, or the set's own"
    )
    add_options(knobs, OPTIONS, or_none=True)
    knobs.add_argument(
        "--background-labels", type=text, default="", metavar="WORDS", help="words whose pixels are background"
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", default=None, metavar="DIR",
        help="folder for results.json, the confusion matrix and a journal; the same command again continues a run that was killed",
    )  # fmt: skip
    results.add_argument(
        "--restart", action="store_true", default=False, help="forget what an earlier run left in --out"
    )
    results.add_argument(
        "--save-predictions", action="store_true", default=False,
        help="also write label maps into --out, in the form of the set's own masks",
    )  # fmt: skip
    results.add_argument(
        "--html", action="store_true", default=False,
        help="also write report.html into --out: a page with the figures, the worst and the best pictures",
    )  # fmt: skip
    results.add_argument(
        "--json", action="store_true", default=False, help="print one JSON object per set, a line each"
    )
    search = parser.add_argument_group("calibration")
    search.add_argument(
        "--calibrate", action="store_true", default=False,
        help="find the best background threshold on --split instead of measuring; the curve is printed, and written into --out",
    )  # fmt: skip
    search.add_argument(
        "--thresholds", type=numbers, default=None, metavar="A,B,...", help="to be tried (default: 21 of them)"
    )
    search.add_argument(
        "--temperatures", type=numbers, default=None, metavar="A,B,...", help="to be tried with each (default: 1)"
    )
    parser.set_defaults(run=_evaluate)


def _add_what(parser: Parser) -> None:
    """The arguments of `segment`, `compare` and `classify` alike."""
    parser.files = "photos"
    parser.add_argument(
        "photos", nargs="+", metavar="PHOTO", help='picture files, folders of them, or quoted patterns such as "*.jpg"'
    )
    parser.add_argument(
        "--labels", type=text, metavar="WORDS",
        help='what to look for: "cat, couch, remote control"; with synonyms "couch|sofa", definitions in double quotes',
    )  # fmt: skip
    parser.add_argument(
        "--labels-file", metavar="FILE",
        help='labels from a text file: one a line, other words after commas (couch, sofa, "a seat"), lines with # first ignored',
    )  # fmt: skip
    parser.add_argument(
        "--model", default="nvidia/groupvit-gcc-yfcc", metavar="MODEL",
        help='a checkpoint folder, "org/name" on the Hugging Face hub, or "demo", the bundled one (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        "--processor", default=None, metavar="MODEL",
        help="the checkpoint whose tokenizer and image processor are used (default: those of --model)",
    )  # fmt: skip
    add_options(parser, _OF_WORDS)
    _add_backend(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: float32)")
    parser.add_argument(
        "--max-pixels", type=count, default=argparse.SUPPRESS, metavar="N",
        help="refuse images of more pixels, before they are decoded; a JPEG of up to four times as many is read at half its size "
        "(default: 128 million)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per picture, a line each, and nothing else"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    """How pixels get their labels, for `segment` and `compare` alike; but for the labels, what is given is the `Segmenter`'s."""
    how = parser.add_argument_group("how pixels get labels")
    add_options(how, [name for name in OPTIONS if name not in (*_OF_WORDS, *_ONLY_EVALUATE)])
    how.add_argument(
        "--background-labels", type=text, default="", metavar="WORDS",
        help="labels whose pixels become background, among --labels or besides them, such as \"sky, wall\"",
    )  # fmt: skip
    how.add_argument(
        "--batch-size", type=count, default=argparse.SUPPRESS, metavar="N",
        help="images or windows of one size at once (default: 8)",
    )  # fmt: skip


# Options of the words, for `classify` too, and those that only `evaluate` has.
_OF_WORDS, _ONLY_EVALUATE = ("templates", "synonyms"), ("normalize_prompts",)


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of the `Segmenter`'s options; it knows the others' defaults."""
    return _given(options, (*OPTIONS, "batch_size", "max_pixels"))


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: vars(options)[name] for name in names if name in options}


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=tuple(_BACKENDS),
        help="torch: PyTorch; tf: Keras on TensorFlow (default: the first of them that is installed)",
    )  # fmt: skip


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            terminal.say(f"groupvit {version('groupvit')}")
        except PackageNotFoundError:
            terminal.say("groupvit, from a folder where it is not installed")
        parser.exit()


# Backends


class _BackendMissing(InputError):
    """A backend that was asked for is not installed; `backend` None: there is none at all."""

    exit_code = CheckpointError.exit_code

    def __init__(self, backend: str | None) -> None:
        if backend is None:
            super().__init__(
                'this command needs PyTorch or TensorFlow: pip install "groupvit[torch]" or "groupvit[tf]"'
            )
        else:
            super().__init__(f'this command needs {_BACKENDS[backend][1]}: pip install "groupvit[{backend}]"')


def _installed() -> list[str]:
    return [name for name, (module, _) in _BACKENDS.items() if importlib.util.find_spec(module) is not None]


def _module(backend: str | None, name: str) -> Any:
    """A module of the backend asked for, of the first that is installed if None."""
    installed = _installed()
    if not installed or (backend is not None and backend not in installed):
        raise _BackendMissing(backend)
    backend = backend or installed[0]
    if backend == "tf":
        # What TensorFlow's C++ has to say beyond an exception's message is nothing for a user, and PyTorch may want memory too.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    return importlib.import_module(f"groupvit_{backend}.{name}")


# segment and classify


def _segment(options: argparse.Namespace) -> int:
    from groupvit_common.preprocessing.prompts import parse_labels

    # All that can be wrong about the request is said before the model is loaded.
    shown = _modes(options.show)
    labels = _labels(options)
    background_labels = parse_labels(options.background_labels) if options.background_labels else ()
    SegmentationOptions(**_given(options, OPTIONS))
    out = Path(options.out or _DEFAULT_OUT) if options.out or not options.json else None
    run = _Run(options, only_prints=out is None)
    if out is not None:
        _make_writable(out)
        if options.sheet and any(path.resolve() == (out / _SHEET).resolve() for path in run.paths):
            raise InputError(
                f"{out / _SHEET} is among the pictures, and --sheet would replace it: choose another --out"
            )
    elif shown or options.sheet:
        raise InputError("--show and --sheet write pictures: with --json they need --out DIR, the folder for them")
    if not run.paths:
        return run.code()
    names = {} if out is None else _output_names(run.paths, out)

    segmenter: BaseSegmenter = _module(options.backend, "predictor").Segmenter.from_pretrained(
        options.model,
        processor=options.processor,
        device=options.device,
        dtype=options.dtype,
        labels=labels,
        background_labels=background_labels,
        **_how(options),
    )
    pictures_of = _Pictures(segmenter, shown, out if options.sheet else None)
    with run:
        for path, result in run.segmented(segmenter):
            with run.attempt(path):
                record, where = result.to_dict(), ""
                if out is not None:
                    files = result.save_as(out, names[path], groups=options.group_map)
                    files |= pictures_of.save(result, out, names[path])
                    record["files"] = {kind: str(file) for kind, file in files.items()}
                    where = f" -> {files['overlay']}"
                run.done(record, f"{path}: {_shares(result)}{where}")
    pictures_of.save_sheet()
    return run.code()


def _modes(text: str) -> tuple[Mode, ...]:
    """What --show asks for."""
    from groupvit_common.segmentation.figures import MODES

    asked = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in asked if word not in MODES]
    if unknown:
        raise InputError(f"--show knows no {unknown[0]!r}: it must be among {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in asked)


class _Pictures:
    """The pictures that --show and --sheet ask for. `sheet`: the folder for the contact sheet, None: there is none."""

    def __init__(self, segmenter: BaseSegmenter, modes: Sequence[Mode], sheet: Path | None) -> None:
        self._segmenter, self._modes, self._sheet = segmenter, modes, sheet
        self._small: list[tuple[str, Image.Image]] = []

    def save(self, result: Segmentation, out: Path, name: str) -> dict[str, Path]:
        """Write those of one result; the paths by mode."""
        from groupvit_common.segmentation.figures import NEED_DETAILS, show, thumbnail, write_images

        if self._sheet is not None:
            self._small.append((name, thumbnail(result, _SHEET_SIDE)))
        details = self._segmenter.details(result.image) if NEED_DETAILS.intersection(self._modes) else None
        images = {f"{name}_{mode}.png": show(result, mode, details) for mode in self._modes}
        if images:
            write_images(out, images)
        return dict(zip(self._modes, (out / file for file in images), strict=True))

    def save_sheet(self) -> None:
        """Write the contact sheet of all pictures so far, if it is wanted and there are any."""
        if self._sheet is not None and self._small:
            from groupvit_common.segmentation.figures import contact_sheet, write_images

            write_images(self._sheet, {_SHEET: contact_sheet(self._small, side=2 * _SHEET_SIDE)})


def _compare(options: argparse.Namespace) -> int:
    from groupvit_common.preprocessing.prompts import parse_labels

    if options.other is None and options.other_backend is None:
        raise InputError(
            "nothing to compare: name a second model with --other, or a second backend with --other-backend"
        )
    labels = _labels(options)
    background_labels = parse_labels(options.background_labels) if options.background_labels else ()
    SegmentationOptions(**_given(options, OPTIONS))
    run = _Run(options)
    out = Path(options.out)
    _make_writable(out)
    if not run.paths:
        return run.code()
    names = _output_names(run.paths, out)
    installed = _installed()
    if not installed:
        raise _BackendMissing(None)
    first: str = options.backend or installed[0]
    chosen = ((options.model, first), (options.other or options.model, options.other_backend or first))
    segmenters: list[BaseSegmenter] = [
        _module(backend, "predictor").Segmenter.from_pretrained(
            model,
            processor=options.processor,
            device=options.device,
            dtype=options.dtype,
            labels=labels,
            background_labels=background_labels,
            **_how(options),
        )
        for model, backend in chosen
    ]
    titles = tuple(f"{Path(model).name or model}, {_BACKENDS[backend][1]}" for model, backend in chosen)

    from groupvit_common.preprocessing.images import load_image
    from groupvit_common.segmentation.figures import compare, write_images

    with run:
        for path in run.pending():
            with run.attempt(path):
                image = load_image(path, max_pixels=segmenters[0].max_pixels)
                one, other = (segmenter(image) for segmenter in segmenters)
                file = out / f"{names[path]}{_COMPARE_END}"
                write_images(out, {file.name: compare(one, other, (titles[0], titles[1]))})
                different = float((one.label_map != other.label_map).mean())
                record = {"source": str(path), "different": different, "files": {"compare": str(file)}}
                run.done(record, f"{path}: {different:.3%} of the pixels differ -> {file}")
    return run.code()


def _classify(options: argparse.Namespace) -> int:
    labels = _labels(options)
    SegmentationOptions(**_given(options, OPTIONS))
    run = _Run(options, only_prints=True)
    if not run.paths:
        return run.code()

    segmenter: BaseSegmenter = _module(options.backend, "predictor").Segmenter.from_pretrained(
        options.model,
        processor=options.processor,
        device=options.device,
        dtype=options.dtype,
        labels=labels,
        **_how(options),
    )
    with run:
        for path in run.pending():
            with run.attempt(path):
                likely = segmenter.classify(path)
                ranked = sorted(likely.items(), key=lambda item: -item[1])
                record = {"source": str(path), "labels": [{"name": n, "probability": p} for n, p in ranked]}
                run.done(record, f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in ranked))
    return run.code()


def _labels(options: argparse.Namespace) -> tuple[Label, ...]:
    from groupvit_common.preprocessing.prompts import parse_labels, read_labels

    if options.labels is None and options.labels_file is None:
        raise InputError('no labels: say what to look for with --labels "cat, couch" or --labels-file FILE')
    if (options.labels or "").rstrip().endswith(",") and not all(map(os.path.exists, options.photos)):
        raise InputError('--labels ends with a comma: put all labels between quotes, as in --labels "cat, couch"')
    given = () if options.labels is None else parse_labels(options.labels)
    return parse_labels([*given, *(read_labels(options.labels_file) if options.labels_file is not None else ())])


def _shares(result: Segmentation) -> str:
    from groupvit_common.segmentation.figures import percent

    present = sorted((s for s in result.scores if s.pixel_share > 0), key=lambda s: -s.pixel_share)
    return ", ".join(f"{score.name} {percent(score.pixel_share)}" for score in present)


def _output_names(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """A name for each image's files in `out`: its stem, numbered where that is taken or would overwrite an image given, and shortened
    where the system takes no longer one."""
    from groupvit_common.segmentation.figures import MODES
    from groupvit_common.segmentation.postprocess import RESULT_ENDS
    from groupvit_common.storage.names import fit_name, name_key

    given = {name_key(os.path.realpath(path)) for path in paths}
    folder = os.path.realpath(out)
    ends = (*RESULT_ENDS, _COMPARE_END, *(f"_{mode}.png" for mode in MODES))
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = fit_name(path.stem, ends, out), 1
        while name_key(name) in taken or any(name_key(f"{folder}{os.sep}{name}{end}") in given for end in ends):
            number += 1
            name = fit_name(f"{path.stem}-{number}", ends, out)
        taken.add(name_key(name))
        names[path] = name
    return names


def _make_writable(folder: Path) -> None:
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into the folder {folder}: {terminal.reason(error)}") from error


class _Run:
    """The images of one command: which there are, which failed, a line about each, and a bar when there are many."""

    def __init__(self, options: argparse.Namespace, *, only_prints: bool = False) -> None:
        from groupvit_common.preprocessing.image_files import distinct, expand

        self._json: bool = options.json
        self._only_prints = only_prints
        self._bar: terminal.Bar | None = None
        self._failed = 0
        there: dict[Path, None] = {}
        for name in dict.fromkeys(options.photos):
            try:
                found = expand([name])
            except (InputError, OSError) as error:
                if len(options.photos) == 1 and isinstance(error, InputError):
                    raise
                self.fail(Path(name), error if isinstance(error, InputError) else terminal.reason(error))
                continue
            for path in found:
                # `os.path` calls what cannot be looked at missing, whatever the cause.
                if os.path.exists(path):  # noqa: PTH110
                    there[path] = None
                else:
                    self.fail(path, f"there is no file {path}")
        self.paths = distinct(there)
        self._every = self._failed + len(self.paths)

    def __enter__(self) -> None:
        if len(self.paths) >= _MANY:
            self._bar = terminal.Bar(len(self.paths), "image")

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def pending(self) -> Iterator[Path]:
        """The images one after the other; none any more when nobody could learn of the result."""
        for path in self.paths:
            if self._only_prints and terminal.is_lost():
                return
            yield path

    def segmented(self, segmenter: BaseSegmenter) -> Iterator[tuple[Path, Segmentation]]:
        """What can be segmented of them; those of one size go through the model together, but where that fails."""
        from groupvit_common.preprocessing.images import load_image

        pending, opened = self.pending(), deque[Path]()

        def images() -> Iterator[Image.Image]:
            for path in pending:
                image = None
                with self.attempt(path):
                    image = load_image(path, max_pixels=segmenter.max_pixels)
                if image is not None:
                    opened.append(path)
                    yield image

        while True:
            try:
                for result in segmenter.iter(images()):
                    path = opened.popleft()
                    yield path, replace(result, source=str(path))
                return
            except Exception as error:
                if not opened or not (isinstance(error, InputError) or terminal.is_out_of_memory(error)):
                    raise
            # One by one those that were under way: only one of them may be at fault.
            while opened:
                path, alone = opened.popleft(), None
                with self.attempt(path):
                    alone = segmenter(path)
                if alone is not None:
                    yield path, alone

    @contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Within, what goes wrong with an image is reported, and no reason to leave the others undone."""
        try:
            yield
        except InputError as error:
            self.fail(path, error)
        except Exception as error:
            if not terminal.is_out_of_memory(error):
                raise
            self.fail(path, f"{path}: out of memory; try a smaller --shorter-side, or --device cpu")

    def done(self, record: dict[str, Any], line: str) -> None:
        if self._json:
            terminal.say_json(record)
        else:
            terminal.say(line)
        self._step()

    def fail(self, path: Path, reason: object) -> None:
        self._failed += 1
        from groupvit_common.preprocessing.images import TooLargeError

        text = str(reason) if str(path) in str(reason) else f"{path}: {reason}"
        text += " (--max-pixels)" if isinstance(reason, TooLargeError) else ""
        terminal.error(text)
        if self._json:
            terminal.say_json({"source": str(path), "error": text})
        self._step()

    def code(self) -> int:
        """The exit code; says how many failed where that is not plain to see."""
        if self._failed and self._every > 1:
            terminal.error(f"{self._failed} of {self._every} images failed")
        return SOME_FAILED if self._failed else OK

    def _step(self) -> None:
        if self._bar is not None:
            self._bar.advance()


# demo and train


def _demo(options: argparse.Namespace) -> int:
    from groupvit_common.training.recipe import get_recipe

    out = Path(options.out)
    if options.seed < 0:
        raise InputError(f"--seed must not be negative, got {options.seed}")
    recipe = get_recipe("scenes-demo-fine")
    if options.seed == recipe.run.seed:
        raise InputError(f"the model was trained on pictures of seed {options.seed}; choose another --seed")
    _make_writable(out)

    from groupvit_common.checkpoints.hub import DEMO_MODEL

    backends: list[str] = _installed() if options.backend == "all" else [options.backend]
    if not backends:
        raise _BackendMissing(None)
    classes: list[type[BaseSegmenter]] = [_module(backend, "predictor").Segmenter for backend in backends]
    rows: list[list[Image.Image]] = []
    agreement = _Agreement()
    for size in _DEMO_SIZES:
        # Objects of a larger scene are not larger: it is enlarged as much as those of the training.
        side = min(size) * recipe.model.image_size // recipe.scene_size
        segmenters = [Segmenter.from_pretrained("demo", shorter_side=side) for Segmenter in classes]
        if not rows:
            millions = segmenters[0].model.num_parameters() / 1e6
            by = " and ".join(_BACKENDS[backend][1] for backend in backends)
            terminal.say(
                f"The bundled model: {millions:.1f} million parameters, trained from captions alone; run by {by}."
            )
        rows += [
            _demo_picture(segmenters, agreement, out, options.seed, level, what, size)
            for level, what in _LEVELS.items()
        ]

    measured = json.loads((DEMO_MODEL / "training.json").read_text(encoding="utf-8"))["mean_iou"]
    means = ", ".join(f"{what} {measured[str(level)]:.0f}%" for level, what in _LEVELS.items())
    terminal.say("", f"Over 200 such pictures of each kind, the mean IoU is: {means}.")
    if len(backends) > 1:
        terminal.say(
            f"{by} label {agreement.share:.3%} of the pixels alike; {agreement.probability:.0e} is the largest difference of a probability."
        )

    from groupvit_common.segmentation.figures import sheet

    overview = out / "overview.png"
    sheet(rows, ("picture", "found by words", "truth")).save(overview)
    terminal.say(f"Images, overlays and label maps are in {out.resolve()}; all at one glance: {overview.resolve()}")
    return OK


class _Agreement:
    """How far backends are apart: share of pixels with the same label, largest difference of a probability."""

    def __init__(self) -> None:
        self._alike = self._pixels = 0
        self.probability = 0.0

    @property
    def share(self) -> float:
        return self._alike / self._pixels

    def add(self, a: Segmentation, b: Segmentation) -> None:
        self._alike += int((a.label_map == b.label_map).sum())
        self._pixels += a.label_map.size
        pairs = zip(a.scores, b.scores, strict=True)
        differences = (abs((one.probability or 0.0) - (other.probability or 0.0)) for one, other in pairs)
        self.probability = max(self.probability, *differences)


def _demo_picture(
    segmenters: Sequence[BaseSegmenter],
    agreement: _Agreement,
    out: Path,
    seed: int,
    level: int,
    what: str,
    size: tuple[int, int],
) -> list[Image.Image]:
    """Make, segment, measure and save one picture of `size` = (height, width); returns a row of the overview.

    Shown is what the first segmenter says; `agreement` learns how the others differ.
    """
    from PIL import Image

    from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
    from groupvit_common.evaluation.metrics import class_iou, confusion_matrix
    from groupvit_common.preprocessing.prompts import Label

    scene = make_scene(seed, 0, level, size)
    picture = Image.fromarray(scene.image)
    labels, grounds = ([Label(names[0], names[1:]) for names in words] for words in (LEVELS[level], BACKGROUNDS))
    results: list[Segmentation] = []
    for segmenter in segmenters:
        segmenter.set_labels(labels, grounds)
        results.append(segmenter(picture))
    result = results[0]
    for other in results[1:]:
        agreement.add(result, other)
    iou = class_iou(confusion_matrix(scene.mask, result.label_map, len(labels) + 1, None))

    height, width = size
    terminal.say("", f'{what.capitalize()}, {width} x {height} pixels: "{scene.caption}"')
    for index, name in enumerate(result.labels):
        if index and (scene.mask == index).any():
            terminal.say(f"  {name:<10} IoU {iou[index]:4.0%}")
    wrong = [
        name for i, name in enumerate(result.labels) if i and result.mask(name).any() and not (scene.mask == i).any()
    ]
    if wrong:
        terminal.say(f"  found, but not there: {', '.join(wrong)}")

    name = f"{what}_{width}x{height}"
    picture.save(out / f"{name}.png")
    result.save_as(out, name)
    drawn = _enlarged(result, 384 // height)
    drawn.overlay(_DEMO_ALPHA).save(out / f"{name}_overlay.png")
    truth = _enlarged(replace(result, label_map=scene.mask), 384 // height)
    return [drawn.image, drawn.overlay(_DEMO_ALPHA), truth.overlay(_DEMO_ALPHA, legend=False)]


def _enlarged(result: Segmentation, zoom: int) -> Segmentation:
    """A small picture's result with every pixel drawn as `zoom` x `zoom`."""
    import numpy as np
    from PIL import Image

    def enlarged(index_map: Any) -> Any:
        return np.kron(index_map, np.ones((zoom, zoom), index_map.dtype))

    width, height = result.image.size
    return replace(
        result,
        image=result.image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST),
        label_map=enlarged(result.label_map),
        group_map=enlarged(result.group_map),
    )


def _train(options: argparse.Namespace) -> int:
    from groupvit_common.training.recipe import get_recipe
    from groupvit_common.training.settings import to_toml

    changes = [*options.changes, *([] if options.seed is None else [f"run.seed={options.seed}"])]
    recipe = get_recipe(options.recipe, changes)
    if options.show:
        terminal.say(*to_toml(recipe).splitlines())
        return OK
    if not options.out:
        raise InputError("train needs --out DIR, the folder for the checkpoint")
    _make_writable(Path(options.out))

    train = _module(options.backend, "train").train
    from groupvit_common.training.run import Interrupted

    try:
        result = train(recipe, options.out, resume=options.resume, log=terminal.say)
    except Interrupted as stop:
        if not stop.rank:
            terminal.error(stop)
        return SIGNALLED + stop.signal
    if result.rank:
        return OK
    terminal.say(
        f"The model is in {result.directory.resolve()}. Use it: groupvit segment PHOTO --model {result.directory} ..."
    )
    return OK


# evaluate


def _evaluate(options: argparse.Namespace) -> int:
    from groupvit_common.evaluation.datasets.classification import ClassificationSet, open_classification_set
    from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
    from groupvit_common.evaluation.journal import check_output
    from groupvit_common.evaluation.processes import ProcessInfo, SingleProcess
    from groupvit_common.evaluation.protocols import ProtocolSettings, default_protocol, protocol_settings
    from groupvit_common.preprocessing.prompts import parse_labels

    # All that can be wrong about the request is said before the model is loaded.
    if options.save_predictions and options.out is None:
        raise InputError("--save-predictions needs --out DIR, the folder for them")
    if options.html and options.out is None:
        raise InputError("--html needs --out DIR, the folder for the page")
    if options.html:
        from groupvit_common.evaluation.page import load_template

        load_template()
    if options.calibrate and options.split is None:
        raise InputError(
            "--calibrate needs --split, with pictures on which the model is not judged later, such as --split train"
        )
    background_labels = parse_labels(options.background_labels) if options.background_labels else ()
    chosen = _given(options, ("names", *OPTIONS))
    if "window" in chosen and "stride" not in chosen:
        chosen["stride"] = None
    if background_labels and "background" not in chosen:
        chosen["background"] = None
    work: list[tuple[SegmentationSet | ClassificationSet, ProtocolSettings, str]] = []
    for spelled in options.data:
        kind, _, where = spelled.partition(":")
        protocol = options.protocol or default_protocol(kind)
        settings = replace(protocol_settings(protocol, kind), **chosen)
        if kind == "imagenet":
            work.append((open_classification_set(where, split=options.split, limit=options.limit), settings, protocol))
        else:
            opened = open_sets(spelled, split=options.split, limit=options.limit, names=settings.names)
            work += [(one, settings, protocol) for one in opened]
    folders = _evaluation_folders(options.out, [data.kind for data, _, _ in work])
    for data, folder in zip((data for data, _, _ in work), folders, strict=True):
        if folder is not None:
            check_output(folder, data)
    if options.out is not None:
        _make_writable(Path(options.out))

    backend = options.backend or next(iter(_installed()), None)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and backend == "tf":
        raise InputError(
            "several processes evaluate together in PyTorch only: leave torchrun out, or take --backend torch"
        )
    together = (
        _module(backend, "distributed").process_group(options.device) if world > 1 else nullcontext(SingleProcess())
    )
    with together as place:
        here: ProcessInfo = place
        base: BaseSegmenter = _module(backend, "predictor").Segmenter.from_pretrained(
            options.model,
            processor=options.processor,
            device=getattr(place, "device", options.device),
            dtype=options.dtype,
        )
        about = {
            "model": options.model,
            "backend": backend,
            "dtype": options.dtype or "float32",
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
                # On all processes alike. The other sets are measured all the same.
                if len(work) == 1:
                    raise
                terminal.error(f"{data.kind}: {error}")
                code = SOME_FAILED
    return code


def _evaluation_folders(out: str | None, kinds: Sequence[str]) -> list[Path | None]:
    """Where each set's results go: into the folder itself if there is one set, else into folders inside it."""
    if out is None or len(kinds) == 1:
        return [None if out is None else Path(out)] * len(kinds)
    names = [kind.replace(":", "-") for kind in kinds]
    return [Path(out) / (name if names.count(name) == 1 else f"{name}-{i + 1}") for i, name in enumerate(names)]


def _weights_of(directory: Path | None) -> dict[str, str]:
    """What tells weights from others that take their place, in a folder, on the hub or in this package: a run must not go on with those."""
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
    """One set's evaluation on the command line: a bar while it runs, the results afterwards. The first process alone tells."""

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
        record = record_of(result, self._told(segmenter))
        if self._folder is not None:
            write_results(result, record, self._folder)
            if self._options.html:
                from groupvit_common.evaluation.page import write_page

                write_page(self._folder, self._data, lambda image: segmenter(image).label_map)
        self._say(record, table(record))

    def calibrate(self, segmenter: BaseSegmenter) -> None:
        from groupvit_common.evaluation.calibration import CALIBRATION_THRESHOLDS, best_point, calibrate
        from groupvit_common.evaluation.datasets.segmentation import SegmentationSet
        from groupvit_common.evaluation.report import calibration_table, write_calibration

        if not isinstance(self._data, SegmentationSet):
            raise InputError("imagenet has no background: there is nothing to calibrate")
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
        told = {"set": self._data.kind, "split": self._data.split, "images": len(self._data), **self._told(segmenter)}
        if self._folder is not None:
            write_calibration(curve, told, self._folder)
        record = {**told, "best": vars(best_point(curve)), "curve": [vars(point) for point in curve]}
        self._say(record, calibration_table(curve))

    def _told(self, segmenter: BaseSegmenter) -> dict[str, Any]:
        # What the model's own defaults filled in.
        used = {name: getattr(segmenter.options, name) for name in ("assignment", "shorter_side")}
        return {**self._about, "settings": {**self._settings.to_dict(), **used}, "processes": self._place.world}

    def _say(self, record: dict[str, Any], text: str) -> None:
        if self._options.json:
            terminal.say_json(record)
            return
        data = self._data
        terminal.say(
            f"{data.kind} ({data.split}), protocol {self._about['protocol']}, {self._about['model']} "
            f"by {_BACKENDS[self._about['backend']][1]}",
            "",
            *text.split("\n"),
        )
        if self._folder is not None:
            terminal.say(f"Results are in {self._folder.resolve()}")
        terminal.say("")

    def _begin(self, done: int, every: int) -> None:
        if self._place.rank == 0:
            self._bar = terminal.Bar(every, "image", done=done, title=self._data.kind)

    def _progress(self, count: int) -> None:
        if self._bar is not None:
            # The others are about as fast.
            self._bar.advance(count * self._place.world)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
