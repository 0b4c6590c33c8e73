"""`groupvit classify`: probabilities of labels for whole images."""

from __future__ import annotations

import argparse
from typing import Any

from groupvit_common.cli.arguments import EXIT_CODES, add_images
from groupvit_common.cli.runtime import ImageRun, load_segmenter, read_request


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "classify", help="print the probability of each label for the whole image", epilog=EXIT_CODES,
        description="Prints, for each image, the probability of each label: the labels of one image add up to 100%.",
    )  # fmt: skip
    add_images(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    labels, _ = read_request(options)
    run = ImageRun(options, only_prints=True)
    if not run.paths:
        return run.code()
    segmenter = load_segmenter(options, labels=labels)
    with run:
        for path in run.pending():
            with run.attempt(path):
                likely = segmenter.classify(path)
                ranked = sorted(likely.items(), key=lambda item: -item[1])
                record = {"source": str(path), "labels": [{"name": n, "probability": p} for n, p in ranked]}
                run.done(record, f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in ranked))
    return run.code()
