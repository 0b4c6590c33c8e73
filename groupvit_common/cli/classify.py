"""`groupvit classify`: probabilities of labels for whole images."""

from __future__ import annotations

import argparse

from groupvit_common.cli.arguments import add_images
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import ImageRun, load_segmenter, read_request

_DESCRIPTION = "Prints, for each image, the probability of each label: the labels of one image add up to 100%."


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
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
