"""`groupvit serve`: a page and an API over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import BACKENDS, add_model, count, positive, text, whole
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import choose_backend, installed_backends, load_segmenter
from groupvit_common.errors import InputError

if TYPE_CHECKING:
    from groupvit_common.segmentation.predictor import BaseSegmenter
    from groupvit_common.serving.settings import ServeSettings

_DESCRIPTION = """\
Serves a page to segment images in, and an API for programs, until it is interrupted (Ctrl-C). Only this machine reaches
it unless --host says otherwise. docs/serving.md describes the API, limits and proxies; /docs of the server lists its
fields.
"""
_KEY = "GROUPVIT_API_KEY"
# Limits: flag, setting, type, help.
_LIMITS: tuple[tuple[str, str, Any, str], ...] = (
    ("--max-bytes", "max_bytes", count, "of an image file (default: 20 million)"),
    ("--max-pixels", "max_pixels", count, "of an image (default: 16 million)"),
    ("--max-labels", "max_labels", count, "of a request, synonyms counted (default: 1000)"),
    ("--max-queue", "max_queue", count, "requests that wait or are answered; others are told to wait (default: 64)"),
    ("--cache-bytes", "cache_bytes", count, "memory of images that are kept for further labels (default: 512 million)"),
    ("--cache-seconds", "cache_seconds", positive, "that an unused image is kept (default: 1800)"),
    ("--batch-size", "batch_size", count, "images of several clients in the model at once (default: 8)"),
    ("--request-seconds", "work_seconds", positive, "that a request may take (default: 60)"),
)


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
    add_model(parser)
    backend = parser._option_string_actions["--backend"]
    backend.choices = (*BACKENDS, "both")
    backend.help = "torch, tf, or both, which the page compares (default: the first of them that is installed)"
    parser.set_defaults(model="demo")
    parser.add_argument("--labels", type=text, metavar="WORDS", help="what the page begins with, and requests without")
    parser.add_argument(
        "--background-labels", type=text, default="", metavar="WORDS", help="the same of labels that are background"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="of the CPU for the model (default: all)")
    group = parser.add_argument_group("where it listens, and who may ask")
    group.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: all addresses of this machine (default: %(default)s)"
    )
    group.add_argument("--port", type=whole, default=8000, help="0: a free one (default: %(default)s)")
    group.add_argument(
        "--api-key", type=text, metavar="KEY",
        help=f"that requests must bring; better in the environment, as {_KEY}, where other users do not see it",
    )  # fmt: skip
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name that the Host header may have"
    )
    group.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="pages that may call the API")
    group.add_argument("--root-path", default="", metavar="PATH", help="prefix under which a proxy serves this")
    group.add_argument(
        "--forwarded-from", action="append", default=[], metavar="IP", help="proxy whose X-Forwarded headers count"
    )
    group.add_argument("--access-log", action="store_true", help="print a line about each request")
    group = parser.add_argument_group("limits")
    for flag, name, convert, help_text in _LIMITS:
        group.add_argument(flag, dest=name, type=convert, default=argparse.SUPPRESS, metavar="N", help=help_text)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    backends = installed_backends() if options.backend == "both" else [choose_backend(options.backend)]
    if options.backend == "both" and len(backends) < len(BACKENDS):
        choose_backend(next(name for name in BACKENDS if name not in backends))
    if options.threads is not None:
        # Before a framework is imported: each reads its own.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            os.environ[name] = str(options.threads)
    # Threads that wait by spinning take the time of those that answer others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from groupvit_common.serving.server import Server
    except ModuleNotFoundError as error:
        raise InputError(
            f"this command needs {error.name}, which is not installed: pip install 'groupvit[serve]'"
        ) from error

    def load() -> dict[str, BaseSegmenter]:
        return {name: load_segmenter(options, backend=name, max_pixels=settings.max_pixels) for name in backends}

    server = Server(load, settings)
    if not settings.is_loopback and settings.api_key is None:
        terminal.note(f"anybody who reaches {settings.host} may use this server: set {_KEY} to ask for a key")
    if settings.access_log:
        _log_to_stderr()
    # Of images that others send, from the libraries that decode them.
    warnings.simplefilter("ignore")
    server.run(lambda: terminal.print_lines(f"{options.model} is served at {server.url} (Ctrl-C ends it)"))
    return 0


def _settings(options: argparse.Namespace) -> ServeSettings:
    from groupvit_common.preprocessing.prompts import parse_labels
    from groupvit_common.serving.settings import ServeSettings

    labels, background = options.labels, options.background_labels
    if labels is None and options.model == "demo":
        # What it was trained on.
        from groupvit_common.data.scenes import BACKGROUNDS, COLOURS

        labels = ", ".join(names[0] for names in COLOURS)
        background = background or ", ".join(names[0] for names in BACKGROUNDS)
    for words in (labels, background):
        if words:
            parse_labels(words)
    given = {name: getattr(options, name) for _, name, _, _ in _LIMITS if hasattr(options, name)}
    return ServeSettings(
        host=options.host,
        port=options.port,
        name=str(options.model),
        api_key=options.api_key or os.environ.get(_KEY) or None,
        default_labels=labels or "",
        default_background_labels=background,
        allowed_hosts=tuple(options.allowed_host),
        cors=tuple(options.cors),
        root_path=options.root_path,
        forwarded_from=tuple(options.forwarded_from),
        access_log=options.access_log,
        **given,
    )


def _log_to_stderr() -> None:
    logger = logging.getLogger("groupvit.serving")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
