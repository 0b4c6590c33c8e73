"""What an evaluation came to, for people and programs: a table, a record, a confusion matrix as a picture and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from groupvit_common.errors import printable
from groupvit_common.evaluation.segmentation import ClassificationResult, Counts, Point, SegmentationResult, best_point
from groupvit_common.storage.json_text import finite, unicode_json
from groupvit_common.storage.saving import write_files, write_text

RESULTS = "results.json"
CONFUSION_CSV = "confusion.csv"
CONFUSION_PNG = "confusion.png"
CALIBRATION = "calibration.json"
CALIBRATION_PNG = "calibration.png"

_INK = (32, 32, 32)
_FAINT = (225, 225, 225)
_PAPER = (255, 255, 255)
_DARK = np.array([8, 48, 107])
# Beyond so many classes a table is no longer for reading.
_MOST_ROWS = 200


def record_of(result: SegmentationResult | ClassificationResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that a result says, ready for JSON: shares 0 to 1, None where there is nothing to measure."""
    speed = result.timed / result.seconds if result.timed and result.seconds else None
    return finite(
        {
            "set": result.data.kind,
            "split": result.data.split,
            "images": result.images,
            **about,
            **result.scores(),
            "seconds": result.seconds,
            "images_per_second": speed,
            "classes": result.by_class(),
        }
    )


def write_results(result: SegmentationResult | ClassificationResult, record: Mapping[str, Any], folder: Path) -> None:
    """`results.json`, and the confusion matrix of a segmentation."""
    writers: dict[str, Callable[[Path], None]] = {RESULTS: lambda file: write_text(file, _json(record))}
    if isinstance(result, SegmentationResult):
        names, confusion = result.data.classes, result.confusion
        writers[CONFUSION_CSV] = lambda file: write_text(file, confusion_csv(names, confusion))
        writers[CONFUSION_PNG] = lambda file: confusion_picture(names, confusion).save(file, format="PNG")
    write_files(folder, writers)


def write_calibration(curve: Sequence[Point], about: Mapping[str, Any], folder: Path) -> None:
    """`calibration.json` with the curve and its highest point, and a picture of it."""
    record = {**about, "best": vars(best_point(curve)), "curve": [vars(point) for point in curve]}
    writers: dict[str, Callable[[Path], None]] = {
        CALIBRATION: lambda file: write_text(file, _json(finite(record))),
        CALIBRATION_PNG: lambda file: curve_picture(curve).save(file, format="PNG"),
    }
    write_files(folder, writers)


def _json(record: Mapping[str, Any]) -> str:
    return unicode_json(record, indent=2) + "\n"


# ---- text ----


def table(record: Mapping[str, Any]) -> str:
    """A record as lines of text."""
    columns = {
        "iou": "IoU",
        "accuracy": "accuracy",
        "oracle_iou": "oracle IoU",
        "pixels": "pixels",
        "top1": "top-1",
        "top5": "top-5",
        "images": "images",
    }
    classes = record["classes"]
    lines = []
    if 0 < len(classes) <= _MOST_ROWS:
        shown = {key: title for key, title in columns.items() if key in classes[0]}
        rows = [["", *shown.values()], *([each["name"], *(_cell(each[key]) for key in shown)] for each in classes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for name, *cells in rows:
            lines.append(
                "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
            )
        lines.append("")
    if "mean_iou" in record:
        lines.append(
            f"mean IoU {_percent(record['mean_iou'])}, pixel accuracy {_percent(record['pixel_accuracy'])}, "
            f"mean accuracy {_percent(record['mean_accuracy'])}"
        )
        lines.append(
            f"groups, whatever they are called: mean IoU with the best label for each {_percent(record['oracle_mean_iou'])}, "
            f"mask Jaccard {_percent(record['mask_jaccard'])}"
        )
    else:
        lines.append(f"top-1 {_percent(record['top1'])}, top-5 {_percent(record['top5'])}")
    speed = record["images_per_second"]
    lines.append(f"{record['images']} pictures" + (f", {speed:.3g} a second" if speed else ", all from an earlier run"))
    return "\n".join(lines)


def calibration_table(curve: Sequence[Point]) -> str:
    """A curve as lines of text, its highest point last."""
    best = best_point(curve)
    lines = ["temperature  threshold  mean IoU"]
    lines += [f"{p.temperature:11g}  {p.threshold:9g}  {_percent(p.mean_iou):>8}" for p in curve]
    lines.append(
        f"best: --temperature {best.temperature:g} --background {best.threshold:g}, mean IoU {_percent(best.mean_iou)}"
    )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None or math.isnan(share) else f"{share:.1%}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1%}"


# ---- the confusion matrix ----


def confusion_csv(names: Sequence[str], confusion: Counts) -> str:
    """Pixels: a row for each true class, a column for each predicted one. Names that a spreadsheet would compute get an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shown = [_as_text(name) for name in names]
    writer.writerow(["true \\ predicted", *shown])
    writer.writerows([name, *row] for name, row in zip(shown, confusion.tolist(), strict=True))
    return text.getvalue()


def _as_text(cell: str) -> str:
    """What a spreadsheet shows as it is: formulas begin with these signs, and their wide forms in Asian scripts."""
    return (
        f"'{cell}"
        if cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))
        else cell
    )


_TITLE = ("rows: true classes; columns: predicted classes", "darker: a larger fraction of the row's pixels")
_LONGEST_NAME = 48  # letters of a class name in an image


def confusion_picture(names: Sequence[str], confusion: Counts) -> Image.Image:
    """Each row's fractions as shades: white none, dark blue all. Rows are the true classes, columns the predicted ones."""
    count = len(names)
    cell = max(10, min(32, 1200 // count))
    font = ImageFont.load_default(max(9, min(16, cell - 4)))
    shown = [_shortened(name) for name in names]
    rows = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(rows, 1)
    # A root, so that a few percent can be seen.
    strength = np.sqrt(shares)[..., None]
    shades = np.round(np.array(_PAPER) * (1 - strength) + _DARK * strength).astype(np.uint8)
    grid = Image.fromarray(shades).resize((count * cell, count * cell), Image.Resampling.NEAREST)

    title = ImageFont.load_default(16)
    margin = math.ceil(max(font.getlength(name) for name in shown)) + 12
    head = 10 + 22 * len(_TITLE) + 8
    width = max(margin + grid.width + 16, math.ceil(max(title.getlength(line) for line in _TITLE)) + 24)
    canvas = Image.new("RGB", (width, head + margin + grid.height + 16), _PAPER)
    left, top = margin, head + margin
    canvas.paste(grid, (left, top))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(_TITLE):
        draw.text((12, 10 + 22 * i), line, fill=_INK, font=title)
    for i in range(count + 1):
        border = i * cell
        draw.line((left, top + border, left + grid.width, top + border), fill=_FAINT)
        draw.line((left + border, top, left + border, top + grid.height), fill=_FAINT)
    for i, name in enumerate(shown):
        middle = i * cell + cell // 2
        draw.text((left - 6, top + middle), name, fill=_INK, font=font, anchor="rm")
        upright = Image.new("L", (margin, cell), 0)
        ImageDraw.Draw(upright).text((6, cell // 2), name, fill=255, font=font, anchor="lm")
        canvas.paste(_INK, (left + i * cell, head), upright.rotate(90, expand=True))
        if cell >= 26 and rows[i]:
            _share(draw, (left + middle, top + middle), float(shares[i, i]), font)
    return canvas


def _shortened(name: str) -> str:
    """A name on one line, its middle left out if it is very long."""
    name = printable(name).replace("\n", "\\n")
    half = (_LONGEST_NAME - 3) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def _share(draw: ImageDraw.ImageDraw, at: tuple[int, int], share: float, font: Any) -> None:
    small = font.font_variant(size=10) if isinstance(font, ImageFont.FreeTypeFont) else font
    draw.text(at, f"{100 * share:.0f}", fill=_PAPER if share > 0.3 else _INK, font=small, anchor="mm")


# ---- the calibration curve ----

_CURVES = ((8, 81, 156), (217, 95, 14), (35, 139, 69), (152, 78, 163), (120, 120, 120))


def curve_picture(curve: Sequence[Point]) -> Image.Image:
    """Mean IoU over the threshold, a line for each temperature."""
    width, height, left, top, right, bottom = 760, 460, 70, 50, 150, 60
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font, title = ImageFont.load_default(13), ImageFont.load_default(16)
    highest = max((p.mean_iou for p in curve if not math.isnan(p.mean_iou)), default=0.0)
    step = next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if highest / s <= 8), 0.2)
    most = step * max(1, math.ceil(highest / step))

    def at(threshold: float, share: float) -> tuple[float, float]:
        return (
            left + threshold * (width - left - right),
            height - bottom - share / most * (height - top - bottom),
        )

    for i in range(round(most / step) + 1):
        x, y = at(0, i * step)
        draw.line((x, y, width - right, y), fill=_FAINT)
        draw.text((x - 8, y), f"{i * step:.1%}", fill=_INK, font=font, anchor="rm")
    for i in range(6):
        x, y = at(i / 5, 0)
        draw.line((x, top, x, y), fill=_FAINT)
        draw.text((x, y + 8), f"{i / 5:g}", fill=_INK, font=font, anchor="mt")
    draw.text((left, 14), "mean IoU", fill=_INK, font=title)
    draw.text((width - right, height - 14), "background threshold", fill=_INK, font=title, anchor="rs")
    for i, temperature in enumerate(dict.fromkeys(point.temperature for point in curve)):
        colour = _CURVES[i % len(_CURVES)]
        points = [
            at(p.threshold, p.mean_iou) for p in curve if p.temperature == temperature and p.mean_iou == p.mean_iou
        ]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((width - right + 16, top + 20 * i), f"temperature {temperature:g}", fill=colour, font=font)
    return canvas
