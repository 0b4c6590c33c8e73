"""Pictures of results: colours, overlays, legends, names, groups, heat maps, comparisons, sheets."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.image_files import SOFTWARE
from groupvit_common.storage.saving import write_files

if TYPE_CHECKING:
    from groupvit_common.segmentation.postprocess import Details, Segmentation

Mode = Literal[
    "input", "pred", "input_pred", "input_pred_label", "first_group", "final_group", "all_groups", "similarity"
]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Kinds of pictures of a result: the seven of the authors' evaluation, under their names, and the heat maps."""
NEED_DETAILS: frozenset[Mode] = frozenset({"first_group", "all_groups", "similarity"})
"""Those of them that show more than a `Segmentation` holds."""

# The first colours follow Okabe and Ito (2008), made to be told apart by colour-blind people: black left out, vermilion
# and blue moved away from orange and sky blue, and ordered so that unlike ones stand next to each other.
_FIRST = ("e69f00", "0a7fc4", "d62f4b", "00a676", "f0e442", "cc79a7", "56b4e9")

# Colour vision without medium- (deuteranopia) and long-wave cones (protanopia), for linear RGB: Machado, Oliveira and
# Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.
_DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
_PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))

# Linear RGB -> OKLab (Ottosson 2020), in which equal distances look equally different.
_TO_CONES = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
             (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
_TO_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
           (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip

# How much a difference counts that only the full-colour eye sees, against one that all see.
_COLOUR_BLIND_WEIGHT = 0.5
_MAX_COLOURS = 256


def _oklab(rgb: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    return np.cbrt(np.maximum(rgb @ np.array(_TO_CONES).T, 0)) @ np.array(_TO_LAB).T


def _linear_rgb(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    c = colours / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=1)
def _all_colours() -> npt.NDArray[np.uint8]:
    first = np.array([list(bytes.fromhex(c)) for c in _FIRST], dtype=np.uint8)
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(_linear_rgb(grid))
    # Neither near black nor near white (both are part of photos, and white is the legend's paper), nor grey.
    vivid = (lab[:, 0] > 0.40) & (lab[:, 0] < 0.92) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.06)
    grid = grid[vivid]

    def seen(colours: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float64]]:
        rgb = _linear_rgb(colours)
        blind = [_oklab(np.clip(rgb @ np.array(m).T, 0, 1)) for m in (_DEUTERANOPIA, _PROTANOPIA)]
        return [_oklab(rgb), *blind]

    def distance(colour: npt.NDArray[np.uint8], eyes: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        full, *blind = [np.linalg.norm(e - c, axis=1) for e, c in zip(eyes, seen(colour[None]), strict=True)]
        return (1 - _COLOUR_BLIND_WEIGHT) * full + _COLOUR_BLIND_WEIGHT * np.minimum(*blind)

    eyes = seen(grid)
    nearest = np.min([distance(c, eyes) for c in first], axis=0)
    chosen = list(first)
    while len(chosen) < min(_MAX_COLOURS, len(grid)):
        best = grid[nearest.argmax()]
        chosen.append(best)
        nearest = np.minimum(nearest, distance(best, eyes))
    return np.array(chosen, dtype=np.uint8)


def palette(count: int) -> npt.NDArray[np.uint8]:
    """`[count, 3]` RGB. The same colours in the same order every time: a longer palette begins with the shorter one.

    The first seven follow Okabe and Ito. Each further colour is the one farthest from all before it, where distance is
    the mean of what full colour vision sees and what the worse of two kinds of red-green blindness sees (OKLab). Beyond
    about ten no palette is safe for everyone, hence the outlines and the legend. After 256 the colours repeat.
    """
    colours = _all_colours()
    return colours[np.arange(count) % len(colours)]


# A label that is the name of a colour is shown in that colour: "red" in orange would puzzle.
_NAMED = {
    "red": "d62f4b",
    "orange": "e69f00",
    "yellow": "f0e442",
    "green": "00a676",
    "cyan": "35c9d6",
    "blue": "0a7fc4",
    "purple": "7b2d9e",
    "pink": "f48fb1",
    "brown": "8b5a2b",
}
# Palette colours nearer than this (OKLab) to one taken by its name are skipped.
_TOO_NEAR = 0.08


def label_colours(names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """`[len(names), 3]` RGB: the palette in its order, but names of colours in their own."""
    named = {i: bytes.fromhex(_NAMED[n.casefold()]) for i, n in enumerate(names) if n.casefold() in _NAMED}
    if not named:
        return palette(len(names))
    taken = np.array([list(colour) for colour in named.values()], dtype=np.uint8)
    every = palette(_MAX_COLOURS)
    apart = np.linalg.norm(_oklab(_linear_rgb(every))[:, None] - _oklab(_linear_rgb(taken)), axis=-1).min(axis=1)
    others = every[apart >= _TOO_NEAR]
    colours = np.empty((len(names), 3), dtype=np.uint8)
    rest = [i for i in range(len(names)) if i not in named]
    colours[rest] = others[np.arange(len(rest)) % len(others)]
    colours[list(named)] = taken
    return colours


def percent(share: float) -> str:
    """A share 0..1 as people read it: "23%", and "<1%" rather than "0%" for a little."""
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def overlay(
    image: Image.Image,
    index_map: npt.NDArray[np.unsignedinteger[Any]],
    colours: npt.NDArray[np.uint8],
    alpha: float = 0.5,
    *,
    skip: int | None = None,
) -> Image.Image:
    """`image` (RGB, H x W) tinted with `colours[index_map]` (`[N, 3]`, `[H, W]`), each region with an outline of its colour.

    `skip`: an index that is not tinted (the background).
    """
    tint = Image.fromarray(colours[index_map])
    strength = np.full(index_map.shape, round(255 * alpha), dtype=np.uint8)
    strength[outlines(index_map, line_width(image.size))] = round(255 * max(alpha, 0.9)) if alpha > 0 else 0
    if skip is not None:
        strength[index_map == skip] = 0
    return Image.composite(tint, image, Image.fromarray(strength))


def line_width(size: tuple[int, int]) -> int:
    """Width of an outline, in pixels, for a picture of this size: thin, but seen when the picture fills a screen."""
    return max(1, round(min(size) / 300))


def outlines(index_map: npt.NDArray[np.unsignedinteger[Any]], width: int) -> npt.NDArray[np.bool_]:
    """`[H, W]` bool: the pixels within `width` rows or columns of another index."""
    edge = np.zeros(index_map.shape, dtype=bool)
    for d in range(1, width + 1):
        differs = index_map[d:] != index_map[:-d]
        edge[d:] |= differs
        edge[:-d] |= differs
        differs = index_map[:, d:] != index_map[:, :-d]
        edge[:, d:] |= differs
        edge[:, :-d] |= differs
    return edge


def index_image(index_map: npt.NDArray[np.unsignedinteger[Any]], colours: npt.NDArray[np.uint8]) -> Image.Image:
    """An image whose pixel values are the indices: mode "P" with the colours as palette, or 16-bit grey beyond 256."""
    image = Image.fromarray(index_map)
    if index_map.dtype == np.uint8:
        image.putpalette(colours.tobytes())
    return image


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    `colour`: `[3]`, or None for what is left uncoloured. `name`; `plain_name`: what to show instead where no font at hand has the name's letters.
    `note`: a few letters in grey behind the name.
    """

    colour: npt.NDArray[np.uint8] | None
    name: str
    plain_name: str
    note: str = ""


_INK = (32, 32, 32)
_PALE_INK = (112, 112, 112)
_PAPER = (255, 255, 255)
_MAX_TEXT_EMS = 22
"""Longer names are cut, in widths of a letter m or so (the font size)."""


def with_legend(picture: Image.Image, entries: Sequence[Entry], size: int | None = None) -> Image.Image:
    """`picture` with a legend on white: below it, or to the right of a picture that is taller than wide.

    The picture is neither covered nor scaled; the canvas grows. Entries stand in columns, in their order. `size` of the letters in
    pixels: by default as fits the picture.
    """
    if not entries:
        return picture
    width, height = picture.size
    size = _font_size(picture.size) if size is None else size
    pad, line = size, round(1.7 * size)
    names = [_fit(entry, size) for entry in entries]
    note_font = _default_font(size)
    swatch, name_left, gap = size, size + size // 2, size // 2
    note_left = [name_left + round(font.getlength(name)) + gap for name, font in names]
    ends = [x + round(note_font.getlength(entry.note)) for x, entry in zip(note_left, entries, strict=True)]
    column = max(ends) + pad

    side: Literal["right", "below"] = "right" if height > 1.2 * width else "below"
    if side == "right":
        rows = max(1, min(len(entries), (height - 2 * pad) // line))
        # One column of a picture that is tiny: rather a taller canvas than a row of columns.
        rows = max(rows, -(-len(entries) // 2))
        columns = -(-len(entries) // rows)
    else:
        columns = max(1, min(len(entries), (width - pad) // column))
        rows = -(-len(entries) // columns)
    legend = (pad + columns * column, 2 * pad + rows * line - (line - swatch))
    if side == "right":
        canvas = Image.new("RGB", (width + legend[0], max(height, legend[1])), _PAPER)
        left, top = width + pad, pad
    else:
        canvas = Image.new("RGB", (max(width, legend[0]), height + legend[1]), _PAPER)
        left, top = pad, height + pad
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (entry, (name, font)) in enumerate(zip(entries, names, strict=True)):
        # Below, read along the rows; beside, down the columns.
        row, col = (i % rows, i // rows) if side == "right" else (i // columns, i % columns)
        x, y = left + col * column, top + row * line
        middle = y + swatch / 2
        fill = _PAPER if entry.colour is None else tuple(entry.colour.tolist())
        draw.rectangle((x, y, x + swatch - 1, y + swatch - 1), fill=fill, outline=_INK)
        draw.text((x + name_left, middle), name, fill=_INK, font=font, anchor="lm")
        draw.text((x + note_left[i], middle), entry.note, fill=_PALE_INK, font=note_font, anchor="lm")
    return canvas


def _font_size(size: tuple[int, int]) -> int:
    """Legible when the picture fills a screen, and never so small that the letters break."""
    return max(13, round(0.028 * (size[0] * size[1]) ** 0.5))


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font has ASCII only. For other letters, fonts that systems usually have, by coverage; Pillow looks in the
# system's font folders.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "segoeui.ttf",
)


def _fit(entry: Entry, size: int, width: int | None = None, end: str = "") -> tuple[str, Font]:
    """The name, cut to a bearable length or to `width` pixels, with `end`, which is never cut, and a font that has its letters."""
    width = _MAX_TEXT_EMS * size if width is None else width
    printable = "".join(c if c.isprintable() else " " for c in entry.name)
    without_accents = "".join(c for c in unicodedata.normalize("NFKD", printable) if not unicodedata.combining(c))
    text, font = entry.plain_name, _default_font(size)
    for spelling in (printable, without_accents):
        found = _font_for(frozenset(spelling), size)
        if found is not None:
            text, font = spelling, found
            break
    if font.getlength(text + end) > width:
        while text and font.getlength(text + "…" + end) > width:
            text = text[:-1]
        text = text.rstrip() + "…"
    return text + end, font


@lru_cache(maxsize=32)
def _default_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=256)
def _font_for(letters: frozenset[str], size: int) -> Font | None:
    font = _default_font(size)
    if _has_letters(font, letters):
        return font
    for name in _SYSTEM_FONTS:
        try:
            other = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _has_letters(other, letters):
            return other
    return None


def _has_letters(font: Font, letters: frozenset[str]) -> bool:
    """Whether the font draws each letter as something else than its box for what it lacks."""
    missing = bytes(font.getmask("\U0010fffe")), font.getlength("\U0010fffe")
    return all(c == " " or (bytes(font.getmask(c)), font.getlength(c)) != missing for c in letters)


def image_writer(make: Callable[[], Image.Image], name: str) -> Callable[[Path], None]:
    """Returns a writer for `write_files`: makes an image and writes it in the format that the name of its file ends with."""
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    kind = formats.get(Path(name).suffix.lower(), "PNG")

    def write(path: Path) -> None:
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", SOFTWARE)
        make().save(path, format=kind, **({"pnginfo": mark} if kind == "PNG" else {}))

    return write


def write_images(folder: Path, images: Mapping[str, Image.Image]) -> None:
    """Writes images under these names into a folder, all or none.

    Raises:
        InputError: they cannot be written.
    """
    try:
        write_files(folder, {name: image_writer(lambda image=image: image, name) for name, image in images.items()})  # type: ignore[misc]
    except CheckpointError as error:
        raise InputError(str(error)) from error


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows and columns on white, a title over each column. Every row has as many pictures as there are titles."""
    size = _title_size(picture for row in rows for picture in row)
    gap = size
    lines = [_fit(Entry(None, title, title), size) for title in titles]
    widths = [max(round(font.getlength(line)), *(row[c].width for row in rows)) for c, (line, font) in enumerate(lines)]
    heights = [max(picture.height for picture in row) for row in rows]
    head = 2 * gap + size
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), head + sum(heights) + gap * len(rows)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for column, ((line, font), width) in enumerate(zip(lines, widths, strict=True)):
        draw.text((x, gap), line, fill=_INK, font=font)
        y = head
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(row[column], (x, y))
            y += height + gap
        x += width + gap
    return canvas


def _title_size(pictures: Iterable[Image.Image]) -> int:
    return max(18, *(_font_size(picture.size) for picture in pictures))


# Of a contact sheet; a narrower cell would have no room for a name.
_CELL_GAP = 12
_NARROWEST_CELL = 120


def contact_sheet(
    pictures: Iterable[tuple[str, Image.Image]],
    *,
    side: int = 256,
    columns: int | None = None,
    ends: Sequence[str] | None = None,
) -> Image.Image:
    """Many pictures at one glance on white, each made to fit `side` x `side` pixels if it is larger, its name under it.

    Args:
        pictures: names and pictures, in order. They are taken one by one and only kept small.
        columns: as many in a row. None: about as many as rows.
        ends: for each picture what stands behind its name and is not cut where the name is.

    Raises:
        InputError: there are no pictures, or `side` or `columns` are below 1.
    """
    if side < 1 or (columns is not None and columns < 1):
        raise InputError(f"side and columns of a contact sheet must be at least 1, got {side} and {columns}")
    cells = []
    for name, picture in pictures:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        cells.append((name, small))
    if not cells:
        raise InputError("a contact sheet needs at least one picture")
    size = 14
    across = min(columns or int(np.ceil(len(cells) ** 0.5)), len(cells))
    width = max(_NARROWEST_CELL, *(small.width for _, small in cells))
    rows = [cells[i : i + across] for i in range(0, len(cells), across)]
    heights = [max(small.height for _, small in row) for row in rows]
    line = size + _CELL_GAP
    canvas = Image.new(
        "RGB",
        (across * (width + _CELL_GAP) + _CELL_GAP, sum(heights) + len(rows) * (line + _CELL_GAP) + _CELL_GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    endings = iter([""] * len(cells) if ends is None else ends)
    y = _CELL_GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (name, small) in enumerate(row):
            end = next(endings)
            x = _CELL_GAP + column * (width + _CELL_GAP)
            canvas.paste(small, (x, y + height - small.height))
            text, font = _fit(Entry(None, name, "?"), size, width, end)
            draw.text((x, y + height + _CELL_GAP // 2), text, fill=_INK, font=font)
        y += height + line + _CELL_GAP
    return canvas


# ---- pictures of a result ----

_GROUP_ALPHA = 0.6


def thumbnail(result: Segmentation, side: int) -> Image.Image:
    """The overlay of a result made to fit `side` x `side` pixels if it is larger, with a legend that can still be read."""
    small = result.image.copy()
    small.thumbnail((side, side))
    index_map = np.asarray(Image.fromarray(result.label_map).resize(small.size, Image.Resampling.NEAREST))
    return replace(result, image=small, label_map=index_map).overlay()


def show(result: Segmentation, mode: Mode, details: Details | None = None) -> Image.Image:
    """A picture of a result, of the size of the photo where it is one picture, as the authors' evaluation shows it.

    Args:
        mode: "input": the photo. "pred": the labels' colours alone, a background black. "input_pred": the photo tinted with them.
            "input_pred_label": with the labels' names on it as well. "first_group", "final_group": the photo tinted with a colour for
            each group of the first or the last grouping block. "all_groups": of every block, side by side. "similarity": a heat map
            for each label (`similarity_sheet`).
        details: `Segmenter.details` of the same photo, for the modes in `NEED_DETAILS`.

    Raises:
        InputError: no such mode, or details that are missing or of another photo.
    """
    if mode not in MODES:
        raise InputError(f"unknown kind of picture {mode!r}: it must be one of {', '.join(MODES)}")
    if mode == "input":
        return result.image
    if mode == "pred":
        return Image.fromarray(result.colours()[result.label_map])
    if mode == "input_pred":
        return result.overlay(legend=False)
    if mode == "input_pred_label":
        return _with_names(result)
    if mode == "final_group":
        return _groups(result.image, result.group_map)
    if details is None:
        raise InputError(f"{mode} shows more than a result holds: give details, which segmenter.details(photo) finds")
    if any(group_map.shape != result.label_map.shape for group_map in details.group_maps):
        raise InputError(
            f"details of a picture of {_size(details.group_maps[0])} pixels, but the result is of {_size(result.label_map)}"
        )
    if mode == "similarity":
        return similarity_sheet(result.image, details)
    if mode == "first_group":
        return _groups(result.image, details.group_maps[0])
    # The last block's groups are the result's: windows and precision are those it was made with.
    group_maps = (*details.group_maps[:-1], result.group_map)
    titles = [f"block {i}: {len(np.unique(group_map))} groups" for i, group_map in enumerate(group_maps, 1)]
    return sheet([[_groups(result.image, group_map) for group_map in group_maps]], titles)


def _groups(image: Image.Image, group_map: npt.NDArray[np.unsignedinteger[Any]]) -> Image.Image:
    return overlay(image, group_map, palette(int(group_map.max()) + 1), _GROUP_ALPHA)


def _size(index_map: npt.NDArray[Any]) -> str:
    return f"{index_map.shape[1]} x {index_map.shape[0]}"


# Where names go is found on a map of so many rows and columns at most.
_COARSE = 160


def _with_names(result: Segmentation) -> Image.Image:
    """The overlay with each label's name on it, the background's left out."""
    drawn = result.overlay(legend=False)
    colours, size = result.colours(), _font_size(drawn.size)
    draw = ImageDraw.Draw(drawn)
    height, width = result.label_map.shape
    rows, columns = (
        ((np.arange(n) + 0.5) * (side / n)).astype(np.int64)
        for side, n in ((height, min(height, _COARSE)), (width, min(width, _COARSE)))
    )
    coarse = result.label_map[np.ix_(rows, columns)]
    depths = _depths(coarse)
    present = [i for i, s in enumerate(result.scores) if s.pixel_share > 0 and not (result.has_background and i == 0)]
    taken: list[tuple[float, float, float, float]] = []
    for i in sorted(present, key=lambda i: -result.scores[i].pixel_share):
        there = np.flatnonzero(coarse == i)
        if not len(there):
            continue
        text, font = _fit(Entry(None, result.labels[i], f"label {i}"), size)
        box_width, box_height = font.getlength(text) + size, 1.4 * size
        deepest_first = there[np.argsort(-depths.ravel()[there], kind="stable")]
        boxes = [
            _box(int(columns[at % len(columns)]), int(rows[at // len(columns)]), box_width, box_height, (width, height))
            for at in deepest_first[:: max(1, len(deepest_first) // 200)].tolist()
        ]
        box = next((b for b in boxes if not any(_overlap(b, other) for other in taken)), boxes[0])
        taken.append(box)
        colour = colours[i]
        is_light = _oklab(_linear_rgb(colour[None]))[0, 0] > 0.62
        ink = _INK if is_light else _PAPER
        draw.rounded_rectangle(box, radius=size / 3, fill=tuple(colour.tolist()), outline=ink)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, text, fill=ink, font=font, anchor="mm")
    return drawn


def _box(x: float, y: float, width: float, height: float, within: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom around a point, moved into the picture."""
    left = min(max(0.0, x - width / 2), max(0.0, within[0] - width))
    top = min(max(0.0, y - height / 2), max(0.0, within[1] - height))
    return left, top, left + width, top + height


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _depths(index_map: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.int64]:
    """`[H, W]`: how many steps up, down, left or right each pixel is from another index or the edge."""
    alive = ~outlines(index_map, 1)
    alive[[0, -1]] = alive[:, [0, -1]] = False
    depths = np.zeros(index_map.shape, np.int64)
    while alive.any():
        depths += alive
        inside = alive[1:-1, 1:-1] & alive[:-2, 1:-1] & alive[2:, 1:-1] & alive[1:-1, :-2] & alive[1:-1, 2:]
        alive = np.pad(inside, 1)
    return depths


# From little to much: dark to light, so that it is read without colours too.
_HEAT = ((20, 11, 70), (98, 22, 122), (186, 48, 96), (238, 116, 46), (250, 226, 110))
_HEAT_ALPHA = 0.7
_HEAT_SIDE = 384


def heat_colours(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """`[...]`, 0 to 1 -> `[..., 3]` RGB, from dark violet to light yellow."""
    anchors = np.linspace(0, 1, len(_HEAT))
    return (
        np.stack([np.interp(values, anchors, channel) for channel in np.array(_HEAT).T], axis=-1)
        .round()
        .astype(np.uint8)
    )


def heat_map(
    image: Image.Image, values: npt.NDArray[np.floating[Any]], low: float, high: float, alpha: float = _HEAT_ALPHA
) -> Image.Image:
    """`image`, in grey, tinted by `values` `[h, w]` from `low` to `high`; values of another size are interpolated."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    smooth = Image.fromarray(share.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(heat_colours(np.asarray(smooth))), alpha)


def similarity_sheet(image: Image.Image, details: Details) -> Image.Image:
    """A heat map for each label: where the picture is how like it. One scale for all, written below."""
    low, high = float(details.similarity.min()), float(details.similarity.max())
    small = image.copy()
    small.thumbnail((_HEAT_SIDE, _HEAT_SIDE))
    panels = [
        (name, heat_map(small, values, low, high))
        for name, values in zip(details.labels, details.similarity, strict=True)
    ]
    highest = [f" (at most {values.max():.2f})" for values in details.similarity]
    drawn = contact_sheet(panels, side=_HEAT_SIDE, ends=highest)
    font, line = _default_font(14), 14
    canvas = Image.new("RGB", (drawn.width, drawn.height + 3 * line), _PAPER)
    canvas.paste(drawn, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left, length = _CELL_GAP, min(256, drawn.width - 2 * _CELL_GAP)
    bar = Image.fromarray(np.broadcast_to(heat_colours(np.linspace(0, 1, length)), (line, length, 3)))
    canvas.paste(bar, (left, drawn.height))
    below = drawn.height + line + 2
    draw.text((left, below), f"{low:.2f}", fill=_INK, font=font)
    draw.text((left + length, below), f"{high:.2f}", fill=_INK, font=font, anchor="ra")
    return canvas


# ---- two results ----

_DIFFERENT = (214, 47, 75)
_DIM = 0.45


def difference(image: Image.Image, different: npt.NDArray[np.bool_]) -> Image.Image:
    """`image` in pale grey with the pixels of `different` `[H, W]` in red."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _PAPER), 1 - _DIM)
    return Image.composite(Image.new("RGB", image.size, _DIFFERENT), pale, Image.fromarray(different))


def compare(first: Segmentation, second: Segmentation, titles: tuple[str, str] = ("first", "second")) -> Image.Image:
    """Two results of one picture side by side, and where they differ: from two models, two backends, two ways to ask.

    InputError if they are of different sizes or labels.
    """
    if first.label_map.shape != second.label_map.shape:
        raise InputError(
            f"the results are of {_size(first.label_map)} and {_size(second.label_map)} pixels: they must be of one picture"
        )
    if first.labels != second.labels:
        raise InputError(
            f"the results have other labels ({', '.join(first.labels)}; {', '.join(second.labels)}): they must have the same"
        )
    different = np.asarray(first.label_map != second.label_map)
    pictures = [
        first.image,
        first.overlay(legend=False),
        second.overlay(legend=False),
        difference(first.image, different),
    ]
    drawn = sheet([pictures], ("picture", *titles, f"different: {_share(different)} of the pixels"))
    colours = first.colours()
    present = np.unique([*np.unique(first.label_map), *np.unique(second.label_map)]).tolist()
    entries = [
        Entry(None if first.has_background and i == 0 else colours[i], first.labels[i], f"label {i}") for i in present
    ]
    return with_legend(drawn, entries, _title_size(pictures))


def _share(pixels: npt.NDArray[np.bool_]) -> str:
    """More exact than `percent`: backends differ in a few pixels of a photo, or in none."""
    share = float(pixels.mean())
    return "none" if share == 0 else f"{share:.2%}" if share >= 0.0001 else "<0.01%"
