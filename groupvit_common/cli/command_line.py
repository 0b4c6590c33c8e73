"""The `groupvit` command: its parser and `main`.

Only the standard library and the tables of options are imported here, so that `groupvit --help` answers at once.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from groupvit_common.cli import classify, compare, demo, evaluate, segment, terminal, train
from groupvit_common.cli.arguments import EXIT_CODES, Parser
from groupvit_common.cli.runtime import BackendMissingError
from groupvit_common.errors import InputError

_DESCRIPTION = "Segment and classify images by text labels, with GroupViT; train it; convert its checkpoints."
_EXAMPLES = """\
examples:
  groupvit demo
  groupvit segment cat.jpg --labels "cat, couch, remote control"
  groupvit segment holiday/ --labels-file labels.txt --background 0.9 --out segmented
  groupvit classify *.jpg --labels "indoors, outdoors" --json
  groupvit evaluate --data voc:VOCdevkit/VOC2012 --model nvidia/groupvit-gcc-yfcc --out voc
  groupvit convert group_vit_gcc_yfcc_30e.pth groupvit-yfcc

"""
_COMMANDS = (segment, compare, classify, demo, train, evaluate)
# A framework's module -> the backend that needs it.
_BACKEND_OF = {"torch": "torch", "keras": "tf", "tensorflow": "tf"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. `SystemExit` for --help, --version and bad usage, as argparse does."""
    return terminal.run(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = build_parser().parse_args(arguments)
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        # Libraries that load others by relative paths end the process.
        raise InputError("the current folder is gone or cannot be read: change to another one") from error
    try:
        code: int = options.run(options)
    except ModuleNotFoundError as error:
        if error.name not in _BACKEND_OF:
            raise
        raise BackendMissingError(_BACKEND_OF[error.name]) from error
    return code


def build_parser() -> Parser:
    """Returns the parser of all commands; each sets `run` to the function that runs it."""
    parser = Parser(prog="groupvit", description=_DESCRIPTION, epilog=_EXAMPLES + EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_command(commands)

    # Another package, whose commands are as light as these.
    from conversion.commands import add_commands

    add_commands(commands, EXIT_CODES)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            terminal.print_lines(f"groupvit {version('groupvit')}")
        except PackageNotFoundError:
            terminal.print_lines("groupvit, from a folder where it is not installed")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
