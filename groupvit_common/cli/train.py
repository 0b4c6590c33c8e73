"""`groupvit train`: trains a model by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import add_backend, whole
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import backend_module, check_writable
from groupvit_common.cli.terminal import OK, SIGNALLED
from groupvit_common.errors import InputError

_DESCRIPTION = """\
Trains a model from captions alone and writes a checkpoint with its measured quality. The recipe scenes-demo made the
bundled model. On several GPUs:
torchrun --nproc-per-node 8 -m groupvit_common.cli train RECIPE --out DIR --resume auto
"""


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
    parser.add_argument("recipe", metavar="RECIPE", help="the name of a recipe, such as scenes-demo, or a TOML file")
    parser.add_argument("--out", metavar="DIR", help="folder for the checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="replaces a setting of the recipe, such as optimizer.learning_rate=1e-3 or learning_rate=1e-3; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole, help="the same as --set run.seed=SEED")
    parser.add_argument(
        "--resume", default="never", metavar="auto|never|PATH",
        help="auto: resume from the newest valid checkpoint in DIR if there is one; or from a checkpoint's path "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="print the recipe in full as TOML, and do nothing else")
    add_backend(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from groupvit_common.training.recipe import get_recipe
    from groupvit_common.training.settings import to_toml

    changes = [*options.changes, *([] if options.seed is None else [f"run.seed={options.seed}"])]
    recipe = get_recipe(options.recipe, changes)
    if options.show:
        terminal.print_lines(*to_toml(recipe).splitlines())
        return OK
    if not options.out:
        raise InputError("train needs --out DIR, the folder for the checkpoint")
    check_writable(Path(options.out))

    train = backend_module(options.backend, "train").train
    from groupvit_common.training.run import Interrupted

    try:
        result = train(recipe, options.out, resume=options.resume, log=terminal.print_lines)
    except Interrupted as stop:
        if not stop.rank:
            terminal.error(stop)
        return SIGNALLED + stop.signal
    if result.rank:
        return OK
    terminal.print_lines(
        f"The model is in {result.directory.resolve()}. Use it: groupvit segment PHOTO --model {result.directory} ..."
    )
    return OK
