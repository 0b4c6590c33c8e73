"""Charts of results, drawn by matplotlib: as PNG files, and as SVG for a page that has its own colours.

matplotlib comes with the extra `evaluate`, and is imported when a chart is drawn.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groupvit_common.errors import printable
from groupvit_common.evaluation.calibration import Point
from groupvit_common.evaluation.metrics import Confusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100
_LONGEST_NAME = 48  # characters of a class name in a chart
_INK, _FAINT, _BLUE = "#202020", "#e1e1e1", "#08306b"
# In an SVG the colours of text and lines are the page's: these stand for them while matplotlib draws.
_PAGE_COLOURS = {"#010101": "currentColor", "#010102": "var(--line)", "#010103": "var(--chart)"}
_PAGE_INK, _PAGE_FAINT, _PAGE_BLUE = _PAGE_COLOURS
# Seen on white and on black.
_MIDDLE_BLUE = "#4a90d9"


def has_matplotlib() -> bool:
    """Tells whether charts can be drawn."""
    return find_spec("matplotlib") is not None


def save_confusion(names: Sequence[str], confusion: Confusion, path: Path) -> None:
    """Saves a confusion matrix as a PNG: rows are the true classes, columns the predicted ones."""
    with _style(_INK, _FAINT):
        figure, axes, fractions = _draw_confusion(names, confusion, _BLUE, _FAINT)
        # Numbers fit into the cells of so many classes.
        for i in np.flatnonzero(confusion.sum(axis=1)).tolist() if len(names) <= 46 else ():
            colour = "white" if fractions[i, i] > 0.3 else _INK
            axes.text(i, i, f"{100 * fractions[i, i]:.0f}", color=colour, fontsize=7.2, ha="center", va="center")
        # Grows by the names and the caption.
        figure.savefig(path, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.16)


def save_calibration(curve: Sequence[Point], path: Path) -> None:
    """Saves the mean IoU over the background threshold as a PNG, with a line for each temperature."""
    with _style(_INK, _FAINT):
        figure, axes = _axes((7.6, 4.6), layout="constrained")
        for temperature, marker in zip(dict.fromkeys(point.temperature for point in curve), cycle("os^Dv")):
            points = [(point.threshold, point.mean_iou) for point in curve if point.temperature == temperature]
            axes.plot(*zip(*points, strict=True), marker=marker, label=f"temperature {temperature:g}")
        axes.set(xlabel="background threshold", ylabel="mean IoU", xlim=(-0.02, 1.02))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:.1%}")
        axes.grid()
        figure.legend(loc="outside right upper")
        figure.savefig(path, format="png", dpi=_DPI)


def confusion_svg(names: Sequence[str], confusion: Confusion) -> str:
    """Returns a confusion matrix as an SVG element."""
    with _style(_PAGE_INK, _PAGE_FAINT):
        figure, *_ = _draw_confusion(names, confusion, _MIDDLE_BLUE, _PAGE_FAINT)
        return _svg(
            figure,
            "confusion",
            "Confusion matrix: for each true class, a row, the fractions of its pixels by predicted class. "
            "The largest errors are in the table of confusions.",
        )


def histogram_svg(scores: Sequence[float], name: str) -> str:
    """Returns the distribution of the images' scores, 0 to 1, as an SVG element."""
    with _style(_PAGE_INK, _PAGE_FAINT):
        from matplotlib.ticker import MaxNLocator

        figure, axes = _axes((6.4, 2.4), layout="constrained")
        counts, edges, _ = axes.hist(scores, bins=20, range=(0, 1), color=_PAGE_BLUE)
        axes.set(xlabel=name, ylabel="images", xlim=(0, 1))
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        bins = zip(np.asarray(counts).astype(int), edges[:-1], edges[1:], strict=True)
        filled = ", ".join(f"{count} from {low:.0%} to {high:.0%}" for count, low, high in bins if count)
        return _svg(figure, "histogram", f"Number of images by {name}: {filled}.")


@contextmanager
def _style(ink: str, faint: str) -> Iterator[None]:
    """Sets the colours of text and lines while a chart is drawn."""
    # A font cache that is built the first time, or a home that cannot be written to, is no news for users of a chart.
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import matplotlib

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    settings: Any = {
        **colours,
        "text.parse_math": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": faint,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "groupvit",
    }
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            # A class name may be in any script; the font draws a box for a sign that it lacks.
            warnings.filterwarnings("ignore", message="Glyph ")
            yield
    finally:
        logger.setLevel(level)


def _axes(size: tuple[float, float], **how: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, **how)
    return figure, figure.add_axes((0, 0, 1, 1)) if not how else figure.add_subplot()


def _draw_confusion(names: Sequence[str], confusion: Confusion, colour: str, faint: str) -> tuple[Figure, Any, Any]:
    """Draws each row's fractions as shades of a colour; returns the figure, its axes and the fractions."""
    from matplotlib.colors import to_rgb

    count = len(names)
    cell = max(10, min(32, 1200 // count))
    figure, axes = _axes((count * cell / _DPI, count * cell / _DPI))
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shades = np.empty((count, count, 4))
    shades[..., :3] = to_rgb(colour)
    # A root, so that a few percent can be seen.
    shades[..., 3] = np.sqrt(fractions)
    axes.imshow(shades, interpolation="none", aspect="auto")
    size = max(9, min(16, cell - 4)) * 72 / _DPI
    shown = [_shorten(name) for name in names]
    # As texts and lines of a collection: the ticks of an axis take seconds for a hundred classes.
    axes.set_axis_off()
    for i, name in enumerate(shown):
        axes.annotate(name, (-0.5, i), (-4, 0), textcoords="offset points", fontsize=size, ha="right", va="center")
        axes.annotate(
            name, (i, -0.5), (0, 4), textcoords="offset points", fontsize=size, ha="center", va="bottom", rotation=90
        )
    caption = "rows: true classes; columns: predicted classes\nstronger colour: a larger fraction of the row's pixels"
    axes.annotate(caption, (-0.5, count - 0.5), (0, -6), textcoords="offset points", va="top")
    borders = np.arange(count + 1) - 0.5
    for draw in (axes.hlines, axes.vlines):
        draw(borders, -0.5, count - 0.5, colors=faint, linewidth=0.8)
    return figure, axes, fractions


def _shorten(name: str) -> str:
    """Returns a name on one line, its middle left out if it is very long."""
    name = printable(name).replace("\n", "\\n")
    half = (_LONGEST_NAME - 3) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def _svg(figure: Figure, name: str, description: str) -> str:
    """Returns a figure as an SVG element whose ids begin with `name`, described for those who cannot see it."""
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        dpi=_DPI,
        transparent=True,
        bbox_inches=None if figure.get_layout_engine() else "tight",
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    for drawn, shown in _PAGE_COLOURS.items():
        text = text.replace(drawn, shown)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
