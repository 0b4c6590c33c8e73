"""A page about an evaluation: one HTML file with measures, charts and images, and nothing from elsewhere.

The template is `page.html`. jinja2 and matplotlib come with the extra `evaluate`, and are imported when a page is made.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.drawing.canvas import difference, overlay
from groupvit_common.drawing.palette import label_colours
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation import charts
from groupvit_common.evaluation.classification import ClassificationResult
from groupvit_common.evaluation.datasets.classification import ClassificationSet, ClassifiedImage
from groupvit_common.evaluation.datasets.segmentation import IGNORE, SegmentationSet
from groupvit_common.evaluation.journal import Record, read_journals
from groupvit_common.evaluation.metrics import Confusion, class_iou, mean_iou, pixel_accuracy
from groupvit_common.evaluation.report import RESULTS, percent
from groupvit_common.evaluation.segmentation import SegmentationResult, confusion_of
from groupvit_common.segmentation.label_maps import Indices
from groupvit_common.segmentation.options import OPTIONS
from groupvit_common.storage.json_text import read_json
from groupvit_common.storage.saving import write_files, write_text

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"

# Longer sides of the images on the page, in pixels. Smaller ones are enlarged without smoothing.
_SIDE = 320
_SMALL = 160
_ALPHA = 0.6
_JPEG_QUALITY = 85
_IGNORED_COLOUR = (255, 255, 255)
# Rows that are worth reading.
_MAX_CLASSES_OF_IMAGE = 12
_MAX_CONFUSIONS = 20
_MEASURES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "oracle_mean_iou": "oracle mean IoU",
    "mask_jaccard": "mask Jaccard",
    "top1": "top-1",
    "top5": "top-5",
}


@dataclass(frozen=True)
class _Card:
    """An image of the set: images with captions, and of each class its colour, name and score."""

    name: str
    score: str
    images: Sequence[tuple[str, Image.Image]]
    classes: Sequence[tuple[tuple[int, ...] | None, str, str]] = ()


def write_page(
    folder: Path,
    data: SegmentationSet | ClassificationSet,
    segment: Callable[[Image.Image], Indices] | None = None,
    *,
    count: int = 8,
) -> Path:
    """Writes `report.html` about the evaluation whose `results.json` and journal are in `folder`; returns its path.

    Args:
        data: the set that was measured; the images on the page are read from it.
        segment: returns the label map of an image, as the evaluated model makes it. None: images and truths only.
        count: the number of worst images, and of best ones.

    Raises:
        InputError: jinja2 or matplotlib is not installed, there are no results, they are not of this set, or a file
            cannot be read.
        CheckpointError: the page cannot be written.
    """
    template = load_template()
    record = _results(folder)
    found = record.get("set"), record.get("split")
    if found != (data.kind, data.split):
        raise InputError(f"{folder} holds results of {found[0]} ({found[1]}), not of {data.kind} ({data.split})")
    elsewhere = {*_MEASURES, "classes", "settings", "set", "split", "images", "weights"}
    try:
        if isinstance(data, SegmentationSet):
            content = _segmentation(record, folder, data, segment, count)
        else:
            content = _classification(record, folder, data, count)
        protocol = f"protocol {record['protocol']}" if "protocol" in record else ""
        page = template.render(
            title=f"{data.kind} ({data.split})",
            about=", ".join(part for part in (record.get("model", ""), protocol) if part),
            record=record,
            measures=_MEASURES,
            settings={**{k: v for k, v in record.items() if k not in elsewhere}, **record.get("settings", {})},
            **content,
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RESULTS} is damaged: evaluate once more") from error
    write_files(folder, {PAGE: lambda file: write_text(file, page)})
    return folder / PAGE


def load_template() -> Template:
    """Returns the template of pages. Raises `InputError` if a package that pages need is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError("a page needs the package jinja2: pip install 'groupvit[evaluate]'") from error
    if not charts.has_matplotlib():
        raise InputError("a page needs the package matplotlib: pip install 'groupvit[evaluate]'")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    filters: Any = {"percent": lambda value: percent(value, "–"), "plain": _plain, "data_uri": _data_uri}
    environment.filters |= filters
    return environment.get_template("page.html")


def _results(folder: Path) -> dict[str, Any]:
    if not (folder / RESULTS).exists():
        raise InputError(f"there is no {RESULTS} in {folder}: groupvit evaluate --out writes it")
    try:
        return read_json(folder / RESULTS)
    except CheckpointError as error:
        raise InputError(f"{folder / RESULTS} is damaged: evaluate once more") from error


def _records(folder: Path, result: SegmentationResult | ClassificationResult) -> dict[str, Record]:
    """Returns the records of the set's images by their names."""
    names = {sample.name for sample in result.data}
    records = {record["name"]: record for record in read_journals(folder, result.fault_in)}
    return {name: record for name, record in records.items() if name in names}


def _segmentation(
    record: Mapping[str, Any],
    folder: Path,
    data: SegmentationSet,
    segment: Callable[[Image.Image], Indices] | None,
    count: int,
) -> dict[str, Any]:
    result, names = SegmentationResult(data), data.classes
    numbers = {sample.name: i for i, sample in enumerate(data)}
    confusions = {name: confusion_of(each["confusion"], len(names)) for name, each in _records(folder, result).items()}
    ious = {name: mean_iou(confusion, result.class_outside_mean) for name, confusion in confusions.items()}
    ranked = sorted((name for name in ious if not math.isnan(ious[name])), key=lambda name: (ious[name], name))
    half = min(count, (len(ranked) + 1) // 2)

    def cards(images: Sequence[str]) -> list[_Card]:
        return [_segmentation_card(data, numbers[name], segment, confusions[name], ious[name]) for name in images]

    total = sum(confusions.values(), np.zeros((len(names), len(names)), np.int64))
    sums, errors = total.sum(axis=1), total * ~np.eye(len(names), dtype=bool)
    largest = [divmod(cell, len(names)) for cell in np.argsort(-errors.ravel(), kind="stable").tolist()]
    return {
        "task": "segmentation",
        "oracle_is_bound": _oracle_is_bound(record.get("settings", {})),
        "classes": _rows(record["classes"], "name", "iou", "accuracy", "oracle_iou", "pixels"),
        "histogram": charts.histogram_svg([ious[name] for name in ranked], "mean IoU"),
        "worst": cards(ranked[:half]),
        "best": cards(ranked[half:][-count:][::-1]),
        "confusion_matrix": charts.confusion_svg(names, total) if sums.any() else "",
        "confusions": [
            (names[row], names[column], float(errors[row, column] / sums[row]), int(errors[row, column]))
            for row, column in largest[:_MAX_CONFUSIONS]
            if errors[row, column]
        ],
        "images": [(name, ious[name], pixel_accuracy(confusions[name])) for name in ranked],
    }


def _rows(classes: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(each[key] for key in keys) for each in classes]


def _oracle_is_bound(settings: Mapping[str, Any]) -> bool:
    """Tells whether masks are made of the hard groups of one view alone, which the oracle names."""
    options = ((option, settings.get(name, option.default)) for name, option in OPTIONS.items() if option.moves_pixels)
    return not any(option.is_used(value) for option, value in options)


def _segmentation_card(
    data: SegmentationSet,
    index: int,
    segment: Callable[[Image.Image], Indices] | None,
    confusion: Confusion,
    iou: float,
) -> _Card:
    sample = data[index]
    image, mask = sample.image(), sample.mask()
    names = data.classes
    colours = np.zeros((IGNORE + 1, 3), np.uint8)
    first = 1 if data.has_background else 0
    colours[first : len(names)] = label_colours(names[first:])
    colours[IGNORE] = _IGNORED_COLOUR
    skip = 0 if data.has_background else None
    shown = _to_show(image)

    def tinted(index_map: NDArray[np.unsignedinteger[Any]]) -> Image.Image:
        return overlay(shown, _nearest(index_map, shown.size), colours, _ALPHA, skip=skip)

    images = [("image", shown), ("truth", tinted(mask))]
    if segment is not None:
        predicted = segment(image)
        wrong = (mask != IGNORE) & (mask != predicted)
        images += [
            ("prediction", tinted(predicted.astype(np.uint8))),
            ("errors", difference(shown, _nearest(wrong.astype(np.uint8), shown.size) > 0)),
        ]
    ious = class_iou(confusion)
    pixels = confusion.sum(axis=0) + confusion.sum(axis=1)
    present = [i for i in np.argsort(-pixels, kind="stable").tolist() if pixels[i]][:_MAX_CLASSES_OF_IMAGE]
    classes = [(None if i == skip else tuple(colours[i].tolist()), names[i], f"{ious[i]:.0%}") for i in present]
    return _Card(sample.name, f"mean IoU {iou:.1%}", images, classes)


def _to_show(image: Image.Image) -> Image.Image:
    width, height = image.size
    if max(width, height) < _SMALL:
        times = _SIDE // max(width, height)
        return image.resize((width * times, height * times), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    return small


def _nearest(index_map: NDArray[np.unsignedinteger[Any]], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(index_map).resize(size, Image.Resampling.NEAREST))


def _classification(record: Mapping[str, Any], folder: Path, data: ClassificationSet, count: int) -> dict[str, Any]:
    records = _records(folder, ClassificationResult(data))
    samples = {sample.name: sample for sample in data}
    # The place of the true class among the likeliest; the last one for classes that are not among them.
    places = {name: [*each["best"], each["truth"]].index(each["truth"]) for name, each in records.items()}
    ranked = [
        _by_turns({name: records[name]["truth"] for name in sorted(places) if places[name] == place})
        for place in sorted({0, *places.values()})
    ]
    missed = [name for names in ranked[:0:-1] for name in names]
    confused = Counter((records[name]["truth"], records[name]["best"][0]) for name in missed)

    def cards(images: Sequence[str]) -> list[_Card]:
        return [_classification_card(data, samples[name], records[name]["best"]) for name in images]

    return {
        "task": "classification",
        "classes": _rows(record["classes"], "name", "top1", "top5", "images"),
        "worst": cards(missed[:count]),
        "best": cards(ranked[0][:count]),
        "confusions": [
            (data.words[truth], data.words[predicted], images)
            for (truth, predicted), images in confused.most_common(_MAX_CONFUSIONS)
        ],
    }


def _classification_card(data: ClassificationSet, sample: ClassifiedImage, best: Sequence[int]) -> _Card:
    answers = [(None, data.words[i], "true" if i == sample.truth else "") for i in best]
    return _Card(sample.name, f"is {data.words[sample.truth]}", [("image", _to_show(sample.image()))], answers)


def _by_turns(classes: Mapping[str, int]) -> list[str]:
    """Returns names, given their classes: the first name of each class, the second of each, and so on."""
    counts: Counter[int] = Counter()
    turns = {}
    for name, each in classes.items():
        turns[name] = counts[each]
        counts[each] += 1
    return sorted(classes, key=lambda name: turns[name])


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
