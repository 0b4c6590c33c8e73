"""`groupvit compare`: segments images with two models or backends."""

from __future__ import annotations

import argparse
from pathlib import Path

from groupvit_common.cli.arguments import BACKENDS, add_images, add_segmentation
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import (
    COMPARE_END,
    DEFAULT_OUT,
    ImageRun,
    backend_title,
    check_writable,
    choose_backend,
    load_segmenter,
    make_writable,
    output_names,
    read_request,
)
from groupvit_common.errors import InputError

_DESCRIPTION = """\
Segments each image twice, by --model and --other, or by two backends, and writes NAME_compare.png into the folder
--out: the image, both results, and in red the pixels whose labels differ.
"""


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
    add_images(parser)
    parser.add_argument("--other", metavar="MODEL", help="the second model (default: the first)")
    parser.add_argument(
        "--other-backend", choices=BACKENDS, help="the backend of the second result (default: that of the first)"
    )
    add_segmentation(parser)
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="folder to write into (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.other is None and options.other_backend is None:
        raise InputError(
            "nothing to compare: name a second model with --other, or a second backend with --other-backend"
        )
    labels, background_labels = read_request(options)
    run = ImageRun(options)
    out = Path(options.out)
    check_writable(out)
    if not run.paths:
        return run.code()
    first = choose_backend(options.backend)
    chosen = ((options.model, first), (options.other or options.model, options.other_backend or first))
    segmenters = [
        load_segmenter(options, model=model, backend=backend, labels=labels, background_labels=background_labels)
        for model, backend in chosen
    ]
    # Only now: a model that cannot be loaded leaves no empty folder.
    make_writable(out)
    names = output_names(run.paths, out)
    titles = tuple(f"{Path(model).name or model}, {backend_title(backend)}" for model, backend in chosen)

    from groupvit_common.preprocessing.images import load_image
    from groupvit_common.segmentation.figures import compare, write_images

    with run:
        for path in run.pending():
            with run.attempt(path):
                image = load_image(path, max_pixels=segmenters[0].max_pixels)
                one, other = (segmenter(image) for segmenter in segmenters)
                file = out / f"{names[path]}{COMPARE_END}"
                write_images(out, {file.name: compare(one, other, (titles[0], titles[1]))})
                different = float((one.label_map != other.label_map).mean())
                record = {"source": str(path), "different": different, "files": {"compare": str(file)}}
                run.done(record, f"{path}: {different:.3%} of the pixels differ -> {file}")
    return run.code()
