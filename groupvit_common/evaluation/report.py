"""Results of an evaluation for people and programs: a table, a record, a confusion matrix as CSV and as a chart."""

import csv
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from groupvit_common.evaluation import charts
from groupvit_common.evaluation.calibration import Point, best_point
from groupvit_common.evaluation.metrics import Confusion
from groupvit_common.evaluation.run import EvaluationResult
from groupvit_common.evaluation.segmentation import SegmentationResult
from groupvit_common.storage.json_text import finite, unicode_json
from groupvit_common.storage.saving import write_files, write_text

RESULTS = "results.json"
CONFUSION_CSV = "confusion.csv"
CONFUSION_PNG = "confusion.png"
CALIBRATION = "calibration.json"
CALIBRATION_PNG = "calibration.png"

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MAX_ROWS = 200  # of a table for people


def record_of(result: EvaluationResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a result ready for JSON: fractions from 0 to 1, None where there is nothing to measure."""
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


def write_results(result: EvaluationResult, record: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, and of a segmentation the confusion matrix as CSV and as a chart."""
    writers: dict[str, Callable[[Path], None]] = {RESULTS: lambda file: write_text(file, _json(record))}
    if isinstance(result, SegmentationResult):
        names, confusion = result.data.classes, result.confusion
        writers[CONFUSION_CSV] = lambda file: write_text(file, confusion_csv(names, confusion))
        writers |= _chart(CONFUSION_PNG, lambda file: charts.save_confusion(names, confusion, file))
    write_files(folder, writers)


def calibration_record(curve: Sequence[Point], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a calibration curve and its highest point, ready for JSON."""
    return finite({**about, "best": vars(best_point(curve)), "curve": [vars(point) for point in curve]})


def write_calibration(curve: Sequence[Point], record: Mapping[str, Any], folder: Path) -> None:
    """Writes `calibration.json`, and a chart of the curve."""
    writers: dict[str, Callable[[Path], None]] = {CALIBRATION: lambda file: write_text(file, _json(record))}
    writers |= _chart(CALIBRATION_PNG, lambda file: charts.save_calibration(curve, file))
    write_files(folder, writers)


def _chart(name: str, save: Callable[[Path], None]) -> dict[str, Callable[[Path], None]]:
    """Returns the writer of a chart, none where matplotlib is not installed: results are written all the same."""
    if charts.has_matplotlib():
        return {name: save}
    warnings.warn(
        f"{name} is not written: charts need the package matplotlib: pip install 'groupvit[evaluate]'", stacklevel=3
    )
    return {}


def _json(record: Mapping[str, Any]) -> str:
    return unicode_json(record, indent=2) + "\n"


def table(record: Mapping[str, Any]) -> str:
    """Returns a record as lines of text."""
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
    if 0 < len(classes) <= _MAX_ROWS:
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
            f"mean IoU {percent(record['mean_iou'])}, pixel accuracy {percent(record['pixel_accuracy'])}, "
            f"mean accuracy {percent(record['mean_accuracy'])}"
        )
        lines.append(
            "groups, whatever they are called: mean IoU with the best label for each "
            f"{percent(record['oracle_mean_iou'])}, mask Jaccard {percent(record['mask_jaccard'])}"
        )
    else:
        lines.append(f"top-1 {percent(record['top1'])}, top-5 {percent(record['top5'])}")
    speed = record["images_per_second"]
    lines.append(f"{record['images']} images" + (f", {speed:.3g} a second" if speed else ", all from an earlier run"))
    return "\n".join(lines)


def calibration_table(curve: Sequence[Point]) -> str:
    """Returns a calibration curve as lines of text, its highest point last."""
    best = best_point(curve)
    lines = ["temperature  threshold  mean IoU"]
    lines += [f"{p.temperature:11g}  {p.threshold:9g}  {percent(p.mean_iou):>8}" for p in curve]
    lines.append(
        f"best: --temperature {best.temperature:g} --background {best.threshold:g}, mean IoU {percent(best.mean_iou)}"
    )
    return "\n".join(lines)


def percent(fraction: float | None, absent: str = "none") -> str:
    """Returns a fraction in percent; `absent` for None and NaN."""
    return absent if fraction is None or fraction != fraction else f"{fraction:.1%}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1%}"


def confusion_csv(names: Sequence[str], confusion: Confusion) -> str:
    """Returns a confusion matrix as CSV: a row for each true class, a column for each predicted one.

    Names that a spreadsheet would compute get an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shown = [_as_text(name) for name in names]
    writer.writerow(["true \\ predicted", *shown])
    writer.writerows([name, *row] for name, row in zip(shown, confusion.tolist(), strict=True))
    return text.getvalue()


def _as_text(cell: str) -> str:
    """Escapes a formula, which begins with one of these characters or their wide forms in Asian scripts."""
    return f"'{cell}" if cell.lstrip(" ").startswith(_FORMULA) else cell
