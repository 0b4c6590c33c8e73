"""The parser of the commands: argparse's, with errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from groupvit_common.cli import terminal
from groupvit_common.cli.terminal import BAD_INPUT

EXIT_CODES = """\
exit codes:
  0    done
  1    some images failed, or the output could not be printed; the others are done. verify: not the same model
  2    bad usage or input: an option, the labels, a folder without images, a folder that cannot be written
  3    the model cannot be used: no such checkpoint, no network, a damaged file, no PyTorch or TensorFlow, out of memory
  70   a fault of this program (GROUPVIT_TRACEBACK=1 shows its place)
  130  interrupted (Ctrl-C)
  141  the reader of the output went away
  143  ended by SIGTERM; a training run has saved its state
"""


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line instead of the whole usage. Options are spelled in full.

    `files`: the argument that also takes values between and after options, as in `segment a.jpg --labels cat b.jpg`.

    Args:
        fill: adds the parser's arguments when they are first needed; the help of all commands loads none of them.
    """

    def __init__(self, *arguments: Any, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(
            *arguments, **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        )
        self.files: str | None = None
        self._fill = fill

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        self._check_options(args)
        found, rest = super().parse_known_args(args, namespace)
        rest = [argument for argument in rest if argument != "--"]
        if rest and self.files is not None:
            getattr(found, self.files).extend(rest)
        elif rest:
            self.error(f"there is one argument too many: {rest[0]!r}")
        if self.files is not None and not getattr(found, self.files) and found.from_file is None:
            self.error("the following arguments are required: PHOTO, or --from-file FILE")
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
        terminal.error(f"{message.removeprefix('argument ')} (see {self.prog} --help)")
        raise SystemExit(BAD_INPUT)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Help and version.
        if message:
            terminal.print_lines(*message.removesuffix("\n").split("\n"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the known word that is most like this one, "" where none is."""
    known = list(known)
    alike = [other for other in known if len(word) > 3 and other.startswith(word)]
    alike += get_close_matches(word.casefold(), known, 1, 0.7)
    return f"; did you mean {alike[0]}?" if alike else ""
