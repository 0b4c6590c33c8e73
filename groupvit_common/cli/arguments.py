"""Arguments of the commands: types of values, and the flags that commands share."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

from groupvit_common.cli.parser import Parser
from groupvit_common.segmentation.options import DEFAULT_MODEL, OPTIONS, Kind

BACKENDS = ("torch", "tf")


# -- types of values ---------------------------------------------------------------------------------------------------


def text(argument: str) -> str:
    """Returns a text as Unicode, even where the locale is not UTF-8 and Python decoded its bytes differently."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(f"must be text in UTF-8, got {argument!r}") from None
    return argument


# Beyond it the arithmetic of NumPy, let alone the memory, has an end.
_MOST = 2**31 - 1


def count(argument: str) -> int:
    """Returns a whole number of at least 1."""
    return _whole_from(1, argument)


def times(argument: str) -> int:
    """Returns a whole number of at least 0."""
    return _whole_from(0, argument)


def _whole_from(least: int, argument: str) -> int:
    value = whole(argument)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {argument!r}")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {argument!r}")
    return value


def whole(argument: str) -> int:
    """Returns a whole number."""
    try:
        return int(argument)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {argument[:40]!r}") from None


def score(argument: str) -> float:
    """Returns a number from 0 to 1."""
    value = _number(argument)
    if 0 <= value <= 1:
        return value
    meant = _number(argument.strip().removesuffix("%").replace(",", "."))
    percent = meant / 100 if meant > 1 else meant
    hint = f"; did you mean {percent:g}?" if 0 <= percent <= 1 else ""
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {argument!r}{hint}")


def positive(argument: str) -> float:
    """Returns a finite number above 0."""
    value = _number(argument)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {argument!r}")
    return value


def numbers(argument: str) -> tuple[float, ...]:
    """Returns numbers above 0, with commas between."""
    return tuple(positive(part) for part in argument.split(","))


def scales(argument: str) -> tuple[float, ...]:
    """Returns different numbers above 0, with commas between."""
    return _different(numbers(argument), argument)


def distances(argument: str) -> tuple[int, ...]:
    """Returns different whole numbers of at least 1, with commas between."""
    return _different(tuple(count(part) for part in argument.split(",")), argument)


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a type that also takes the word "none"."""
    return lambda argument: None if argument == "none" else convert(argument)


def template(argument: str) -> str:
    """Returns a sentence as text; what is none may be a file, whose name stays as it is."""
    return text(argument) if "{}" in argument else argument


def _number(argument: str) -> float:
    """Returns NaN for a text that is not a number."""
    try:
        return float(argument)
    except ValueError:
        return math.nan


def _different(values: tuple[Any, ...], argument: str) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"has a number twice, {argument!r}")
    return values


# -- options of segmentation -------------------------------------------------------------------------------------------

_TYPES: dict[Kind, Callable[[str], Any]] = {
    "count": count,
    "times": times,
    "fraction": score,
    "positive": positive,
    "scales": scales,
    "distances": distances,
    "templates": template,
}


def add_options(parser: Any, names: Iterable[str], *, or_none: bool = False) -> None:
    """Adds the flags of these options of segmentation; a flag that is not given leaves no trace.

    or_none: the word "none" is a value of each option that may be absent.
    """
    for name in names:
        option = OPTIONS[name]
        more: dict[str, Any] = {"metavar": option.metavar, "type": _TYPES.get(option.kind)}
        if option.kind == "choice":
            more = {"choices": option.choices}
        elif option.kind == "flag":
            # What is on by default can be switched off.
            more = {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
        elif or_none and option.optional:
            more = {"metavar": f"{option.metavar}|none", "type": _or_none(more["type"])}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=option.help, **more)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Returns those of the named options that the user gave."""
    return {name: vars(options)[name] for name in names if name in options}


# -- flags that commands share -----------------------------------------------------------------------------------------


def add_model(parser: Any) -> None:
    """Adds the flags of the model and of what computes."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL",
        help='a checkpoint folder, "org/name" on the Hugging Face hub, or "demo", the bundled one (default: '
        '%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        "--processor", metavar="MODEL",
        help="the checkpoint whose tokenizer and image processor are used (default: those of --model)",
    )  # fmt: skip
    add_backend(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "int8"),
        help="of the weights (default: float32); int8 is for CPUs, and checked against float32",
    )  # fmt: skip
    parser.add_argument(
        "--fast", action="store_true",
        help="choose the dtype by what computes, such as bfloat16 where the CPU has instructions for it; results "
        "differ a little",
    )  # fmt: skip


def add_backend(parser: Any) -> None:
    """Adds the flag of the backend."""
    parser.add_argument(
        "--backend", choices=BACKENDS,
        help="torch: PyTorch; tf: Keras on TensorFlow (default: the first of them that is installed)",
    )  # fmt: skip


def add_images(parser: Parser) -> None:
    """Adds the images, the labels and the model of `segment`, `compare` and `classify`."""
    parser.files = "photos"
    parser.add_argument(
        "photos", nargs="*", metavar="PHOTO", help='image files, folders of them, or quoted patterns such as "*.jpg"'
    )
    parser.add_argument(
        "--from-file", metavar="FILE", help='also take what a text file names, one PHOTO a line; "-": standard input'
    )
    parser.add_argument(
        "--labels", type=text, metavar="WORDS",
        help='labels to find: "cat, couch, remote control"; with synonyms "couch|sofa", definitions in double quotes',
    )  # fmt: skip
    parser.add_argument(
        "--labels-file", metavar="FILE",
        help='labels from a text file: one a line, synonyms after commas (couch, sofa, "a seat"), lines with # first '
        'ignored',
    )  # fmt: skip
    add_model(parser)
    add_options(parser, [name for name, option in OPTIONS.items() if option.command == "classify"])
    parser.add_argument(
        "--max-pixels", type=count, default=argparse.SUPPRESS, metavar="N",
        help="refuse images of more pixels, before they are decoded; a JPEG of up to four times as many is read at "
        "half its size (default: 128 million)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per image, a line each, and nothing else"
    )


def add_segmentation(parser: Parser) -> None:
    """Adds the options of segmentation of `segment` and `compare`."""
    group = parser.add_argument_group("how pixels get labels")
    add_options(group, [name for name, option in OPTIONS.items() if option.command == "segment"])
    group.add_argument(
        "--background-labels", type=text, default="", metavar="WORDS",
        help='labels whose pixels become background, among --labels or besides them, such as "sky, wall"',
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=count, default=argparse.SUPPRESS, metavar="N",
        help="images or windows of one size at once (default: 8)",
    )  # fmt: skip
