"""Arguments of the commands: a parser whose errors are one line with what was meant, and the types of values."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from groupvit_common.cli import terminal
from groupvit_common.cli.terminal import BAD_INPUT
from groupvit_common.segmentation.options import OPTIONS, Kind, SegmentationOptions


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line instead of the whole usage. Options are spelled in full.

    `files`: the name of the argument that takes what stands between and behind options too, as in `segment a.jpg --labels cat b.jpg`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(
            *arguments, **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        )
        self.files: str | None = None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        self._check_options(args)
        found, rest = super().parse_known_args(args, namespace)
        rest = [argument for argument in rest if argument != "--"]
        if rest and self.files is not None:
            getattr(found, self.files).extend(rest)
        elif rest:
            self.error(f"there is one argument too many: {rest[0]!r}")
        return found, []

    def _check_options(self, arguments: Sequence[str]) -> None:
        """Refuses an option that there is not, before argparse finds that its value is one argument too many."""
        for argument in arguments:
            # As argparse has it: what holds a space is a value, and so is a number.
            is_option = argument.startswith("-") and argument != "-" and " " not in argument
            if argument == "--" or (self._subparsers is not None and not is_option):
                return  # what comes after a command is the command's
            name = argument.partition("=")[0]
            known = self._option_string_actions
            if not is_option or name in known or self._negative_number_matcher.match(argument):
                continue
            if name.startswith("--"):
                self.error(f"there is no option {name}{did_you_mean(name, known)}")
            self.error(f"there is no option {name}; a file of this name is written ./{name}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), choices) or f"; there are {', '.join(choices)}"
        if action is not getattr(self._subparsers, "_group_actions", [None])[0]:
            raise argparse.ArgumentError(action, f"unknown {value!r}{hint}")
        if os.path.exists(value):  # noqa: PTH110 (any text)
            hint = f"; did you mean {self.prog} {choices[0]} {value}?"
        raise argparse.ArgumentError(None, f"there is no command {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        terminal.error(f"{message.removeprefix('argument ')} ({self.prog} --help tells more)")
        raise SystemExit(BAD_INPUT)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Help and version.
        if message:
            terminal.say(*message.removesuffix("\n").split("\n"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the known word that is most like this one, "" where none is."""
    known = list(known)
    alike = [other for other in known if len(word) > 3 and other.startswith(word)]
    alike += get_close_matches(word.casefold(), known, 1, 0.7)
    return f"; did you mean {alike[0]}?" if alike else ""


# -- types of values -------------------------------------------------------------------------------------------------------


def text(argument: str) -> str:
    """Returns a text as Unicode, also where the locale is none of UTF-8 and Python took its bytes for something else."""
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
    value = whole(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {argument!r}")
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


# -- options of segmentation -----------------------------------------------------------------------------------------------

_TYPES: dict[Kind, Callable[[str], Any]] = {
    "count": count,
    "times": count,
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
            is_on = SegmentationOptions.__dataclass_fields__[name].default
            more = {"action": argparse.BooleanOptionalAction if is_on else "store_true"}
        elif or_none and option.optional:
            more = {"metavar": f"{option.metavar}|none", "type": _or_none(more["type"])}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=option.help, **more)
