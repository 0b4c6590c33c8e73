"""The commands `convert`, `export`, `benchmark`, `verify` and `inspect`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import TYPE_CHECKING

from conversion.exports.formats import FORMATS as EXPORT_FORMATS
from conversion.registry import FORMATS, TARGETS, get_format
from groupvit_common.cli import arguments, terminal
from groupvit_common.cli.parser import EXIT_CODES, Parser

if TYPE_CHECKING:
    from pathlib import Path

    from conversion.checkpoint import Checkpoint
    from conversion.exports.agreement import Agreement

SAME, OTHER = 0, 1
# Options of segmentation that an exported program may have.
EXPORT_OPTIONS = ("background", "templates", "synonyms", "assignment", "temperature", "top_k", "shorter_side")
# From this number of bytes on, a progress bar is shown.
_LARGE = 100_000_000

_CONVERT = """\
Writes a checkpoint of any format as another, proves that both are the same model, and leaves a report beside the result
(conversion_report.json). The source's format is recognised. Nothing in it is executed. The result appears when whole.
"""
_CONVERT_EXAMPLES = """\
examples:
  groupvit convert group_vit_gcc_yfcc_30e.pth groupvit-yfcc
  groupvit convert nvidia/groupvit-gcc-yfcc groupvit.keras
  groupvit convert trained.ckpt somewhere --key model_ema
  groupvit convert org/name/tf_model.h5 somewhere --dtype float16

"""
_VERIFY = """\
Compares two checkpoints of any formats: every tensor, and every output of both models for the same images and texts, in
float64 and in the backend of each format. Either may be a SavedModel.
"""
_VERIFY_EXIT = """\
exit codes:
  0    the same model
  1    not the same model
  2    bad usage
  3    one of them cannot be read
"""
_INSPECT = "Describes a checkpoint: format, architecture, parameters by part, dtypes, batch norms, and warnings."


_EXPORT = """\
Writes a model as files for other runtimes, one for each part: image_encoder, text_encoder, and segmenter (photo and
text embeddings in, label map out). Each file is run in its own runtime, on images of several sizes, and compared with
the model; export_report.json says how far they agree. The result appears when whole.
"""
_EXPORT_EXAMPLES = """\
examples:
  groupvit export demo exported --to onnx
  groupvit export nvidia/groupvit-gcc-yfcc pets --to openvino --parts segment --labels "cat, dog"
  groupvit export demo web --to onnx --parts segment --preprocess --labels "red, green" --background 0.2

"""

_BENCHMARK = """\
Measures a model in memory and its exported files on this machine: milliseconds of a call, size on disk, and the largest
difference from the model. All run in one process on the same images, call by call in turn, with the same number of
threads. A format that fails, or whose packages are missing, is a line that says why.
"""
_BENCHMARK_EXAMPLES = """\
examples:
  groupvit benchmark demo --threads 1
  groupvit benchmark nvidia/groupvit-gcc-yfcc --formats onnx,onnx:int8,openvino --sizes 224x224 448x448 --batch 1 8
  groupvit benchmark trained --formats exported_onnx,litert --parts image,text --json

"""


_SOURCE = 'a file, a directory, "org/name" on the Hugging Face hub, or one file of it as "org/name/FILE"'


def add_convert(convert: Parser) -> None:
    """Adds the arguments of `convert`."""
    convert.description, convert.epilog = _CONVERT, _formats() + _CONVERT_EXAMPLES + EXIT_CODES
    convert.add_argument("source", metavar="SOURCE", help=_SOURCE)
    convert.add_argument("destination", metavar="DEST", help="the directory or file to write")
    convert.add_argument(
        "--to", choices=TARGETS, metavar="FORMAT", help="see below (default: by DEST's ending; a directory is native)"
    )
    convert.add_argument(
        "--dtype", choices=("float32", "float64", "float16", "bfloat16"), help="of the weights (default: as stored)"
    )
    convert.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="compare the result with the source; one that is not the same model is not kept (default: --verify)",
    )  # fmt: skip
    convert.add_argument(
        "--max-shard-size", metavar="SIZE",
        help="spread larger weights over several files, in the formats of transformers (default: 5GB)",
    )  # fmt: skip
    convert.add_argument(
        "--processor", metavar="SOURCE",
        help="directory, or name on the hub, whose tokenizer and image processor go along (default: those beside "
        "SOURCE)",
    )  # fmt: skip
    convert.add_argument("--push", metavar="ORG/NAME", help="also send the result to this repository on the hub")
    convert.add_argument("--overwrite", action="store_true", help="replace what is at DEST")
    convert.add_argument(
        "--allow-missing", action="append", default=[], metavar="PATTERN",
        help="let tensors whose names fit be missing (they become 0) or left over; may be given several times",
    )  # fmt: skip
    _add_config(convert)
    _add_key(convert)
    convert.add_argument("--revision", help="branch, tag or commit of SOURCE on the hub")
    convert.set_defaults(run=_convert)


def add_verify(verify: Parser) -> None:
    """Adds the arguments of `verify`."""
    verify.description, verify.epilog = _VERIFY, _VERIFY_EXIT
    verify.add_argument("a", metavar="A", help=_SOURCE)
    verify.add_argument("b", metavar="B", help="the same")
    verify.add_argument(
        "--tolerance", type=float, metavar="X",
        help="largest difference that passes, over the largest value (default: 1e-9; with a SavedModel, in float32, "
        "1e-3)",
    )  # fmt: skip
    verify.add_argument("--seed", type=int, default=2022, help="of the images and texts (default: %(default)s)")
    _add_config(verify)
    _add_key(verify)
    verify.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    verify.set_defaults(run=_verify)


def add_inspect(inspect: Parser) -> None:
    """Adds the arguments of `inspect`."""
    inspect.description, inspect.epilog = _INSPECT, EXIT_CODES
    inspect.add_argument("path", metavar="PATH", help=_SOURCE)
    _add_config(inspect)
    _add_key(inspect)
    inspect.add_argument("--revision", help="branch, tag or commit on the hub")
    inspect.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    inspect.set_defaults(run=_inspect)


def add_export(export: Parser) -> None:
    """Adds the arguments of `export`."""
    rows = {row.name: row.title for row in EXPORT_FORMATS}
    width = max(map(len, rows))
    listed = "\n".join(["formats (--to):", *(f"  {name:<{width}}  {title}" for name, title in rows.items())])
    export.description, export.epilog = _EXPORT, listed + "\n\n" + _EXPORT_EXAMPLES + EXIT_CODES
    export.add_argument("source", metavar="SOURCE", help=_SOURCE + ', or "demo"')
    export.add_argument("destination", metavar="DEST", help="the folder to write")
    export.add_argument("--to", choices=tuple(rows), metavar="FORMAT", required=True, help="see below")
    export.add_argument(
        "--parts", default="image,text,segment", help="some of image, text, segment (default: %(default)s)"
    )
    export.add_argument(
        "--dtype", choices=("float32", "float16", "int8"), default="float32",
        help="of the weights; inputs and outputs are float32 (default: %(default)s)",
    )  # fmt: skip
    export.add_argument(
        "--labels", type=arguments.text, help="put these labels into the segmenter, which then needs no texts"
    )
    export.add_argument(
        "--background-labels",
        type=arguments.text,
        metavar="LABELS",
        default="",
        help="labels whose pixels become background",
    )
    arguments.add_options(export, EXPORT_OPTIONS)
    export.add_argument(
        "--preprocess", action="store_true",
        help="the files take images as they are, RGB, uint8 [B, H, W, 3], and resize and normalise them inside",
    )  # fmt: skip
    export.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="run the files and compare them with the model; what differs is not kept (default: --verify)",
    )  # fmt: skip
    export.add_argument(
        "--processor", metavar="SOURCE", help="directory, or name on the hub, of the tokenizer and image processor"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an export that is at DEST")
    _add_config(export)
    _add_key(export)
    export.add_argument("--revision", help="branch, tag or commit of SOURCE on the hub")
    export.set_defaults(run=_export)


def add_benchmark(benchmark: Parser) -> None:
    """Adds the arguments of `benchmark`."""
    names = ",".join(row.name for row in EXPORT_FORMATS)
    benchmark.description, benchmark.epilog = _BENCHMARK, _BENCHMARK_EXAMPLES + EXIT_CODES
    benchmark.add_argument("source", metavar="MODEL", help=_SOURCE + ', or "demo"')
    benchmark.add_argument(
        "--formats", default=names,
        help="formats of `groupvit export`, each perhaps with a dtype (onnx:int8), or folders that it wrote (default: "
        "%(default)s)",
    )  # fmt: skip
    benchmark.add_argument(
        "--models", default="installed", metavar="BACKENDS",
        help="the models in memory that come first: torch, tf, both (torch,tf) or none (default: those installed)",
    )  # fmt: skip
    benchmark.add_argument("--parts", default="segment", help="some of image, text, segment (default: %(default)s)")
    benchmark.add_argument(
        "--sizes", type=_sides, nargs="+", default=[], metavar="HxW",
        help="heights and widths of images (default: the model's)",
    )  # fmt: skip
    benchmark.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="numbers of images, or texts (default: 1)"
    )
    benchmark.add_argument("--threads", type=int, metavar="N", help="of every runtime (default: as PyTorch chooses)")
    benchmark.add_argument("--rounds", type=int, default=15, metavar="N", help="calls of each (default: %(default)s)")
    _add_config(benchmark)
    _add_key(benchmark)
    benchmark.add_argument("--revision", help="branch, tag or commit of MODEL on the hub")
    benchmark.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    benchmark.set_defaults(run=_benchmark)


def _sides(text: str) -> tuple[int, int]:
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH in pixels, such as 224x224, got {text!r}")
    return int(height), int(width)


def _benchmark(options: argparse.Namespace) -> int:
    from conversion.exports.benchmark import benchmark, parse_models

    result = benchmark(
        options.source, options.formats, parts=options.parts, sizes=options.sizes, batches=options.batch,
        models=parse_models(options.models), threads=options.threads, rounds=options.rounds, config=options.config,
        revision=options.revision, key=options.key, progress=terminal.note,
    )  # fmt: skip
    if options.json:
        terminal.print_json(result.to_dict())
    else:
        terminal.print_lines(*result.lines())
    return terminal.SOME_FAILED if any(row.error for row in result.rows) else terminal.OK


def _export(options: argparse.Namespace) -> int:
    from conversion.describe import size
    from conversion.exports.export import disk_size, export

    def written(name: str, path: Path, agreements: list[Agreement]) -> None:
        terminal.print_lines(f"{path.name}: {size(disk_size(path))}")
        for sizes, some in groupby(agreements, lambda each: each.sizes):
            each = [*some]
            differences = ", ".join(f"{one.output} {one.difference:.1e}" for one in each)
            terminal.print_lines(f"  {sizes:<14} {1e3 * each[0].seconds:7.1f} ms  differs by: {differences}")

    done = export(
        options.source, options.destination, options.to, parts=options.parts, dtype=options.dtype,
        labels=options.labels, background_labels=options.background_labels, preprocess=options.preprocess,
        config=options.config, processor=options.processor, revision=options.revision, key=options.key,
        verify=options.verify, overwrite=options.overwrite, written=written,
        **arguments.given(options, EXPORT_OPTIONS),
    )  # fmt: skip
    for note in done.notes:
        terminal.print_lines(f"note: {note}")
    if not done.agreements:
        terminal.print_lines("not verified")
    terminal.print_lines(f"report: {done.report}")
    return SAME


def _formats() -> str:
    """Returns the values of `--to`, a line each."""
    rows = [(", ".join(spec.targets), spec.help) for spec in FORMATS if spec.help]
    width = max(len(names) for names, _ in rows)
    return "\n".join(["formats (--to):", *(f"  {names:<{width}}  {text}" for names, text in rows)]) + "\n\n"


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="PATH", help="directory or file of the configuration, for weights that come without one"
    )


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="the model to read, of a file that holds several (model_ema, state_dict.teacher; inspect lists them)",
    )


def _convert(options: argparse.Namespace) -> int:
    from conversion.convert import convert
    from conversion.describe import size

    def opened(checkpoint: Checkpoint) -> None:
        source = checkpoint.source
        terminal.print_lines(f"source: {source.path}: {source.spec.title}, {checkpoint.num_parameters():,} parameters")
        for note in source.choice.notes:
            printed.append(note)
            terminal.print_lines(f"note: {note}")

    printed: list[str] = []
    bar = _Bar()
    try:
        done = convert(
            options.source, options.destination, options.to, config=options.config, revision=options.revision,
            key=options.key, dtype=options.dtype, verify=options.verify, max_shard_size=options.max_shard_size,
            processor=options.processor, push=options.push,
            overwrite=options.overwrite, allow_missing=options.allow_missing, opened=opened, progress=bar.show,
        )  # fmt: skip
    finally:
        bar.close()
    total = sum(file.stat().st_size for file in done.files)
    terminal.print_lines(f"result: {done.destination}: {get_format(done.format).title}, {size(total)}")
    for note in done.notes[len(printed) :]:
        terminal.print_lines(f"note: {note}")
    for line in ["not verified"] if done.verification is None else done.verification.lines():
        terminal.print_lines(line)
    terminal.print_lines(f"report: {done.report}")
    if done.address is not None:
        terminal.print_lines(f"sent to: {done.address}")
    return SAME


class _Bar:
    """The progress bar of a large conversion."""

    def __init__(self) -> None:
        self._bar: terminal.Bar | None = None
        self._done = 0

    def show(self, done: int, total: int) -> None:
        if total < _LARGE:
            return
        if self._bar is None:
            self._bar = terminal.Bar(total, "B", scale=True)
        self._bar.advance(done - self._done)
        self._done = done
        if done == total:
            self._bar.name("comparing")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _verify(options: argparse.Namespace) -> int:
    from conversion.verify import verify

    result = verify(
        options.a, options.b, config=options.config, key=options.key, tolerance=options.tolerance, seed=options.seed
    )
    if options.json:
        terminal.print_json(result.to_dict())
    else:
        terminal.print_lines(*result.lines())
    return SAME if result.passed else OTHER


def _inspect(options: argparse.Namespace) -> int:
    from conversion.describe import describe

    result = describe(options.path, config=options.config, revision=options.revision, key=options.key)
    if options.json:
        terminal.print_json(result.to_dict())
    else:
        terminal.print_lines(*result.lines())
    return SAME
