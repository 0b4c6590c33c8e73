"""The `groupvit` command: its parser and `main`.

A command's module is imported when the command is asked for, so that `groupvit --help` answers at once.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from groupvit_common.cli import terminal
from groupvit_common.cli.parser import EXIT_CODES, Parser
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
# For each command: the function that adds its arguments, among them `run`, which runs it; and its help.
_COMMANDS = {
    "segment": ("groupvit_common.cli.segment:add_arguments", "label every pixel"),
    "compare": (
        "groupvit_common.cli.compare:add_arguments", "segment with two models or backends and show the differences",
    ),
    "classify": (
        "groupvit_common.cli.classify:add_arguments", "print the probability of each label for the whole image",
    ),
    "demo": ("groupvit_common.cli.demo:add_arguments", "segment synthetic images with the bundled model, offline"),
    "serve": ("groupvit_common.cli.serve:add_arguments", "serve a page and an API over HTTP"),
    "train": ("groupvit_common.cli.train:add_arguments", "train a model by a recipe"),
    "evaluate": (
        "groupvit_common.cli.evaluate:add_arguments", "measure a model on a segmentation or classification set",
    ),
    "convert": (
        "conversion.commands:add_convert", "write a checkpoint in another format, and prove that it is the same model",
    ),
    "export": (
        "conversion.commands:add_export", "write a model for another runtime, and prove that it is the same",
    ),
    "benchmark": (
        "conversion.commands:add_benchmark", "measure a model and its exports on this machine, in one table",
    ),
    "verify": ("conversion.commands:add_verify", "compare two checkpoints: are they the same model?"),
    "inspect": ("conversion.commands:add_inspect", "describe a checkpoint"),
}  # fmt: skip
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
        from groupvit_common.cli.runtime import BackendMissingError

        raise BackendMissingError(_BACKEND_OF[error.name]) from error
    return code


def build_parser() -> Parser:
    """Returns the parser of all commands; each sets `run` to the function that runs it."""
    parser = Parser(prog="groupvit", description=_DESCRIPTION, epilog=_EXAMPLES + EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, summary) in _COMMANDS.items():
        commands.add_parser(name, help=summary, fill=partial(_fill, function))
    return parser


def _fill(function: str, parser: Parser) -> None:
    module, _, name = function.partition(":")
    getattr(import_module(module), name)(parser)


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
