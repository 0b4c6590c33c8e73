"""A page about an evaluation: one HTML file with its figures, its worst and best pictures, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation import journal
from groupvit_common.evaluation.datasets.classification import ClassificationSet
from groupvit_common.evaluation.datasets.segmentation import IGNORE, SegmentationSet
from groupvit_common.evaluation.metrics import class_iou, mean_iou, pixel_accuracy
from groupvit_common.evaluation.report import RESULTS
from groupvit_common.evaluation.segmentation import SegmentationResult
from groupvit_common.segmentation import figures as visualize
from groupvit_common.segmentation.postprocess import Indices
from groupvit_common.storage.json_text import read_json
from groupvit_common.storage.saving import write_files, write_text

PAGE = "report.html"

# Longer sides of the pictures on the page, in pixels. Smaller ones are enlarged without smoothing.
_SIDE = 320
_SMALL = 160
_ALPHA = 0.6
_JPEG_QUALITY = 85
_UNJUDGED = (255, 255, 255)
# Rows that are worth reading.
_MOST_CLASSES_OF_PICTURE = 12
_MOST_CONFUSIONS = 20


@dataclass(frozen=True)
class _Card:
    """One picture on the page: pictures with captions, and what was found of each class (colour, name, how much)."""

    name: str
    score: str
    pictures: Sequence[tuple[str, Image.Image]]
    classes: Sequence[tuple[tuple[int, ...] | None, str, str]] = ()


@dataclass(frozen=True)
class _Column:
    """Of a table: a title and the values down it; shares are written as percent, with a bar."""

    title: str
    values: Sequence[str | int | float | None]
    is_share: bool = False


@dataclass
class _Section:
    title: str
    about: str
    cards: list[_Card] = field(default_factory=list)
    columns: list[_Column] = field(default_factory=list)
    is_folded: bool = False


def write_page(
    folder: Path,
    data: SegmentationSet | ClassificationSet,
    segment: Callable[[Image.Image], Indices] | None = None,
    *,
    count: int = 8,
) -> Path:
    """Writes `report.html` about the evaluation whose `results.json` and journal are in `folder`; returns its path.

    Args:
        data: the set that was measured; the pictures on the page are read from it.
        segment: a picture -> its label map, as the evaluated model makes it. None: pictures and truths only.
        count: so many worst and so many best pictures.

    Raises:
        InputError: there are no results, they are not of this set, or a file cannot be read.
        CheckpointError: the page cannot be written.
    """
    record = _results(folder)
    found = record.get("set"), record.get("split")
    if found != (data.kind, data.split):
        raise InputError(f"{folder} holds results of {found[0]} ({found[1]}), not of {data.kind} ({data.split})")
    pictures = {each["name"]: each for each in journal.read(folder, journal.fault_of(data))}
    try:
        if isinstance(data, SegmentationSet):
            sections = _segmentation(record, pictures, data, segment, count)
        else:
            sections = _classification(record, pictures, data, count)
        page = _page(record, sections)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RESULTS} is damaged: evaluate once more") from error
    write_files(folder, {PAGE: lambda file: write_text(file, page)})
    return folder / PAGE


def _results(folder: Path) -> dict[str, Any]:
    if not (folder / RESULTS).exists():
        raise InputError(f"there is no {RESULTS} in {folder}: groupvit evaluate --out writes it")
    try:
        return read_json(folder / RESULTS)
    except CheckpointError as error:
        raise InputError(f"{folder / RESULTS} is damaged: evaluate once more") from error


# ---- segmentation ----


def _about_classes(settings: Mapping[str, Any]) -> str:
    """What the table of classes shows. The oracle names hard groups of one look: a bound only for masks made of these alone."""
    is_bound = (
        settings.get("assignment") == "hard"
        and settings.get("window") is None
        and not settings.get("flip")
        and len(settings.get("scales") or [1]) == 1
        and not settings.get("refine")
        and settings.get("foreground") is None
    )
    return "Over all pictures. The oracle gives each group its best label: " + (
        "what is lost beyond it is lost by naming groups."
        if is_bound
        else "it is about the groups, and no bound for these masks, which are made of more than one group a pixel."
    )


def _segmentation(
    record: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    data: SegmentationSet,
    segment: Callable[[Image.Image], Indices] | None,
    count: int,
) -> list[_Section]:
    left_out = SegmentationResult.of(data).left_out
    numbers = {sample.name: i for i, sample in enumerate(data)}
    confusions = {name: _confusion(r["confusion"], len(data.classes)) for name, r in records.items() if name in numbers}
    ious = {name: mean_iou(confusion, left_out) for name, confusion in confusions.items()}
    ranked = sorted((name for name in ious if not math.isnan(ious[name])), key=lambda name: (ious[name], name))
    half = min(count, (len(ranked) + 1) // 2)
    worst, best = ranked[:half], ranked[half:][-count:][::-1]

    def cards(names: Sequence[str]) -> list[_Card]:
        return [_segmentation_card(data, numbers[name], segment, confusions[name], ious[name]) for name in names]

    explained = "The mean IoU is of this picture alone, over the classes that are in it or were found in it."
    classes = record["classes"]
    return [
        _Section(
            "Classes",
            _about_classes(record.get("settings", {})),
            columns=[
                _Column("class", [each["name"] for each in classes]),
                _Column("IoU", [each["iou"] for each in classes], True),
                _Column("accuracy", [each["accuracy"] for each in classes], True),
                _Column("oracle IoU", [each["oracle_iou"] for each in classes], True),
                _Column("pixels", [each["pixels"] for each in classes]),
            ],
        ),
        _Section("Worst pictures", explained, cards=cards(worst)),
        _Section("Best pictures", explained, cards=cards(best)),
        _confusions(data.classes, confusions.values()),
        _Section(
            "All pictures",
            explained,
            columns=[
                _Column("picture", ranked),
                _Column("mean IoU", [ious[name] for name in ranked], True),
                _Column("pixel accuracy", [pixel_accuracy(confusions[name]) for name in ranked], True),
            ],
            is_folded=True,
        ),
    ]


def _confusion(cells: Iterable[tuple[int, int, int]], classes: int) -> NDArray[np.int64]:
    confusion = np.zeros((classes, classes), np.int64)
    for row, column, pixels in cells:
        confusion[row, column] = pixels
    return confusion


def _confusions(names: Sequence[str], confusions: Iterable[NDArray[np.int64]]) -> _Section:
    total = sum(confusions, np.zeros((len(names), len(names)), np.int64))
    there = total.sum(axis=1)
    wrong = total * ~np.eye(len(names), dtype=bool)
    order = [divmod(cell, len(names)) for cell in np.argsort(-wrong.ravel(), kind="stable")[:_MOST_CONFUSIONS].tolist()]
    rows = [(row, column) for row, column in order if wrong[row, column]]
    return _Section(
        "Taken for another",
        "What most pixels were lost to; shares are of the true class's pixels.",
        columns=[
            _Column("is", [names[row] for row, _ in rows]),
            _Column("was called", [names[column] for _, column in rows]),
            _Column("share", [float(wrong[row, column] / there[row]) for row, column in rows], True),
            _Column("pixels", [int(wrong[row, column]) for row, column in rows]),
        ],
    )


def _segmentation_card(
    data: SegmentationSet,
    index: int,
    segment: Callable[[Image.Image], Indices] | None,
    confusion: NDArray[np.int64],
    iou: float,
) -> _Card:
    sample = data[index]
    image, mask = sample.image(), sample.mask()
    names = data.classes
    colours = np.zeros((IGNORE + 1, 3), np.uint8)
    first = 1 if data.has_background else 0
    colours[first : len(names)] = visualize.label_colours(names[first:])
    colours[IGNORE] = _UNJUDGED
    skip = 0 if data.has_background else None
    shown = _to_show(image)

    def tinted(index_map: NDArray[np.unsignedinteger[Any]]) -> Image.Image:
        return visualize.overlay(shown, _nearest(index_map, shown.size), colours, _ALPHA, skip=skip)

    pictures = [("picture", shown), ("truth", tinted(mask))]
    if segment is not None:
        found = segment(image)
        wrong = (mask != IGNORE) & (mask != found)
        pictures += [
            ("found", tinted(found.astype(np.uint8))),
            ("wrong", visualize.difference(shown, _nearest(wrong.astype(np.uint8), shown.size) > 0)),
        ]
    of_class = class_iou(confusion)
    pixels = confusion.sum(axis=0) + confusion.sum(axis=1)
    present = [i for i in np.argsort(-pixels, kind="stable").tolist() if pixels[i]][:_MOST_CLASSES_OF_PICTURE]
    classes = [
        (None if i == skip else tuple(colours[i].tolist()), names[i], f"{of_class[i]:.0%}" if pixels[i] else "")
        for i in present
    ]
    return _Card(sample.name, f"mean IoU {iou:.1%}", pictures, classes)


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


# ---- classification ----


def _classification(
    record: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], data: ClassificationSet, count: int
) -> list[_Section]:
    def place(name: str) -> int:
        best, truth = records[name]["best"], records[name]["truth"]
        return best.index(truth) if truth in best else len(best)

    numbers = {picture.name: i for i, picture in enumerate(data)}
    places = {name: place(name) for name in records if name in numbers}
    ranked = [
        _by_turns({name: records[name]["truth"] for name in sorted(places) if places[name] == each})
        for each in sorted({0, *places.values()})
    ]
    right, missed = ranked[0], [name for names in ranked[:0:-1] for name in names]
    taken = Counter((records[name]["truth"], records[name]["best"][0]) for name in missed).most_common(_MOST_CONFUSIONS)

    def card(name: str) -> _Card:
        picture, said = data[numbers[name]], records[name]["best"]
        answers = [(None, data.words[i], "true" if i == picture.truth else "") for i in said]
        return _Card(name, f"is {data.words[picture.truth]}", [("picture", _to_show(picture.image()))], answers)

    classes = record["classes"]
    return [
        _Section(
            "Classes",
            "Shares of each class's pictures.",
            columns=[
                _Column("class", [each["name"] for each in classes]),
                _Column("top-1", [each["top1"] for each in classes], True),
                _Column("top-5", [each["top5"] for each in classes], True),
                _Column("pictures", [each["images"] for each in classes]),
            ],
        ),
        _Section(
            "Worst pictures",
            "Missed by the most, from every class in turn. Below each its likeliest classes, in order.",
            cards=[card(name) for name in missed[:count]],
        ),
        _Section(
            "Best pictures",
            "Some whose class came first, from every class in turn. Below each its likeliest classes, in order.",
            cards=[card(name) for name in right[:count]],
        ),
        _Section(
            "Taken for another",
            "What most pictures were taken for.",
            columns=[
                _Column("is", [data.words[truth] for (truth, _), _ in taken]),
                _Column("was called", [data.words[said] for (_, said), _ in taken]),
                _Column("pictures", [pictures for _, pictures in taken]),
            ],
        ),
    ]


def _by_turns(classes: Mapping[str, int]) -> list[str]:
    """Names with their classes -> the first name of each class, the second of each, and so on."""
    before: Counter[int] = Counter()
    turns = {}
    for name, each in classes.items():
        turns[name] = before[each]
        before[each] += 1
    return sorted(classes, key=lambda name: turns[name])


# ---- HTML ----

_MEASURES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "oracle_mean_iou": "oracle mean IoU",
    "mask_jaccard": "mask Jaccard",
    "top1": "top-1",
    "top5": "top-5",
}
_STYLE = """
:root { --paper: #fff; --ink: #1c1f23; --pale: #5b6470; --line: #d9dde2; --bar: #cfe3f5; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --pale: #a2abb6; --line: #363c44; --bar: #24486a; --card: #1e2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: var(--pale); max-width: 60rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.4rem; } .figures span { color: var(--pale); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
td.share { min-width: 8rem; background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share)); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th button::after { content: " \\2195"; color: var(--pale); } th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 36rem), 1fr)); gap: 1rem; }
.cards.single { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
.card header { display: flex; justify-content: space-between; gap: 1rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.card header span { color: var(--pale); white-space: nowrap; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .4rem; }
figure { margin: 0; } figcaption { color: var(--pale); font-size: .85rem; }
img { display: block; width: 100%; height: auto; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0; padding: 0; font-size: .9rem; }
li i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid var(--pale); }
li span, dt { color: var(--pale); }
summary { cursor: pointer; margin: 2.2rem 0 .2rem; font-size: 1.15rem; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; overflow-wrap: anywhere; }
"""
# Sorts a table by the column whose title is pressed, once more for the other way round; what has no value stays last.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const title = button.parentElement, column = title.cellIndex, body = title.closest("table").tBodies[0];
  const was = title.getAttribute("aria-sort"), text = title.className === "text";
  const way = was ? (was === "descending" ? 1 : -1) : text ? 1 : -1;
  for (const other of title.parentElement.cells) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const order = (a, b) => a === "" ? 1 : b === "" ? -1 : way * (text ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
};
"""
# What the page must not do, should a name in it be meant badly: load anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def _page(record: Mapping[str, Any], sections: Sequence[_Section]) -> str:
    title = f"{record['set']} ({record['split']})"
    about = [
        f"{record['model']}" if "model" in record else "",
        f"protocol {record['protocol']}" if "protocol" in record else "",
    ]
    figures = [
        *((name, _percent(record[key])) for key, name in _MEASURES.items() if key in record),
        ("pictures", str(record["images"])),
    ]
    known = {*_MEASURES, "classes", "settings", "set", "split", "images", "weights"}
    settings = {**{k: v for k, v in record.items() if k not in known}, **record.get("settings", {})}
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><p>{escape(', '.join(part for part in about if part))}</p>",
            '<div class="figures">',
            *(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures),
            "</div>",
            *(
                _section(section)
                for section in sections
                if section.cards or (section.columns and section.columns[0].values)
            ),
            "<details><summary>How it was measured</summary><dl>",
            *(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in settings.items()),
            f"</dl></details><script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _section(section: _Section) -> str:
    title, about = escape(section.title), f"<p>{escape(section.about)}</p>"
    body = _table(section.columns) if section.columns else _cards(section.cards)
    if section.is_folded:
        return f"<details><summary>{title}</summary>{about}{body}</details>"
    return f"<section><h2>{title}</h2>{about}{body}</section>"


def _table(columns: Sequence[_Column]) -> str:
    is_text = [all(isinstance(value, str) for value in column.values) for column in columns]
    titles = "".join(
        f'<th scope="col"{_class(text)}><button>{escape(column.title)}</button></th>'
        for column, text in zip(columns, is_text, strict=True)
    )
    rows = (
        "".join(_cell(value, column.is_share, text) for value, column, text in zip(row, columns, is_text, strict=True))
        for row in zip(*(column.values for column in columns), strict=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _cell(value: str | int | float | None, is_share: bool, is_text: bool) -> str:
    sorted_by = "" if value is None else escape(str(value))
    if is_share and value is not None:
        return f'<td class="share" data-value="{sorted_by}" style="--share:{100 * float(value):.1f}%">{_percent(value)}</td>'
    shown = f"{value:,}" if isinstance(value, int) else "–" if value is None else escape(str(value))
    return f'<td data-value="{sorted_by}"{_class(is_text)}>{shown}</td>'


def _cards(cards: Sequence[_Card]) -> str:
    single = " single" if all(len(card.pictures) == 1 for card in cards) else ""
    return f'<div class="cards{single}">' + "\n".join(map(_card, cards)) + "</div>"


def _card(card: _Card) -> str:
    pictures = "".join(
        f'<figure><img alt="{escape(f"{caption}: {card.name}")}" width="{picture.width}" height="{picture.height}" '
        f'src="{_data_uri(picture)}"><figcaption>{escape(caption if len(card.pictures) > 1 else "")}</figcaption></figure>'
        for caption, picture in card.pictures
    )
    classes = "".join(
        "<li>" + ("" if colour is None else f'<i style="background:rgb{colour}"></i>')
        + f"{escape(name)} <span>{escape(note)}</span></li>"
        for colour, name, note in card.classes
    )  # fmt: skip
    header = f"<header><b>{escape(card.name)}</b><span>{escape(card.score)}</span></header>"
    return f'<article class="card">{header}<div class="strip">{pictures}</div><ul>{classes}</ul></article>'


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(share: Any) -> str:
    return "–" if share is None else f"{float(share):.1%}"
