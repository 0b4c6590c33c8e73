"""Images of index maps, values and names: overlays, legends, sheets, heat maps. Arrays in, images out."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from groupvit_common.drawing.palette import Colours, heat_colours, oklab, palette
from groupvit_common.errors import InputError

IndexMap = npt.NDArray[np.unsignedinteger[Any]]

SOFTWARE = "groupvit"
"""The text "Software" of images that this package writes, so that a later run does not take them for images to work
on."""

_INK = (32, 32, 32)
_PALE_INK = (112, 112, 112)
_PAPER = (255, 255, 255)
# zlib's level for photos: files of the same size as at its default of 6, in less than half the time.
_PHOTO_LEVEL = 2
# Longer names are cut, in widths of a letter m or so (the font size).
_MAX_TEXT_EMS = 22


def image_writer(make: Callable[[], Image.Image], name: str) -> Callable[[Path], None]:
    """Returns a writer for `saving.write_files`: makes an image and writes it in the format that the name of its file
    ends with."""
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(Path(name).suffix.lower(), "PNG")

    def write(path: Path) -> None:
        mark: dict[str, Any] = {}
        image = make()
        if kind == "PNG":
            mark["pnginfo"] = PngImagePlugin.PngInfo()
            mark["pnginfo"].add_text("Software", SOFTWARE)
            if image.mode == "RGB":
                mark["compress_level"] = _PHOTO_LEVEL
        else:
            mark["exif"] = Image.Exif()
            mark["exif"][ExifTags.Base.Software] = SOFTWARE
        image.save(path, format=kind, **mark)

    return write


# ---- index maps ----


def overlay(
    image: Image.Image,
    index_map: IndexMap,
    colours: Colours,
    alpha: float = 0.5,
    *,
    skip: int | None = None,
) -> Image.Image:
    """`image` (RGB, H x W) tinted with `colours[index_map]` (`[N, 3]`, `[H, W]`), each region with an outline of its
    colour.

    `skip`: an index that is not tinted (the background).
    """
    tint = colour_image(index_map, colours)
    strength = np.full(index_map.shape, round(255 * alpha), dtype=np.uint8)
    strength[outlines(index_map, line_width(image.size))] = round(255 * max(alpha, 0.9)) if alpha > 0 else 0
    if skip is not None:
        strength[index_map == skip] = 0
    return Image.composite(tint, image, Image.fromarray(strength))


def colour_image(index_map: IndexMap, colours: Colours) -> Image.Image:
    """The colours alone: `colours[index_map]`."""
    if index_map.dtype == np.uint8:
        return index_image(index_map, colours).convert("RGB")
    return Image.fromarray(colours[index_map])


def line_width(size: tuple[int, int]) -> int:
    """Width of an outline, in pixels, for an image of this size: thin, but seen when the image fills a screen."""
    return max(1, round(min(size) / 300))


def outlines(index_map: IndexMap, width: int) -> npt.NDArray[np.bool_]:
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


def index_image(index_map: IndexMap, colours: Colours) -> Image.Image:
    """An image whose pixel values are the indices: mode "P" with the colours as palette, or 16-bit grey beyond 256."""
    image = Image.fromarray(index_map)
    if index_map.dtype == np.uint8:
        image.putpalette(colours.tobytes())
    return image


# Of the image below.
_DIM = 0.45
GROUP_ALPHA = 0.6
DIFFERENT = (214, 47, 75)


def difference(image: Image.Image, different: npt.NDArray[np.bool_]) -> Image.Image:
    """`image` in pale grey with the pixels of `different` `[H, W]` in red."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _PAPER), 1 - _DIM)
    return Image.composite(Image.new("RGB", image.size, DIFFERENT), pale, Image.fromarray(different))


def group_overlay(image: Image.Image, group_map: IndexMap) -> Image.Image:
    """`image` (H x W) tinted with a colour for each group of `group_map` `[H, W]`."""
    return overlay(image, group_map, palette(int(group_map.max()) + 1), GROUP_ALPHA)


# ---- names ----


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    `colour`: `[3]`, or None for what is left uncoloured. `name`; `plain_name`: what to show instead where no font at
    hand has the name's letters.
    `note`: a few letters in grey behind the name.
    """

    colour: Colours | None
    name: str
    plain_name: str
    note: str = ""


def percent(fraction: float) -> str:
    """A fraction 0..1 as people read it: "23%", and "<1%" rather than "0%" for a little."""
    return "<1%" if 0 < fraction < 0.01 else f"{fraction:.0%}"


def with_legend(image: Image.Image, entries: Sequence[Entry], size: int | None = None) -> Image.Image:
    """Returns `image` with a legend on white: below it, or to the right of an image that is taller than wide.

    The image is neither covered nor scaled; the canvas grows. Entries stand in columns, in their order. `size`: of the
    letters in pixels, by default as fits the image.
    """
    if not entries:
        return image
    width, height = image.size
    size = _font_size(image.size) if size is None else size
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
        # One column of an image that is tiny: rather a taller canvas than a row of columns.
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
    canvas.paste(image, (0, 0))
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


# Where names go is found on a map of so many rows and columns at most.
_COARSE = 160


def with_names(
    tinted: Image.Image, index_map: IndexMap, names: Sequence[str], colours: Colours, *, skip: int | None = None
) -> Image.Image:
    """Returns `tinted` (H x W) with the name of each index of `index_map` `[H, W]` where it is thickest, but of
    `skip`."""
    drawn, size = tinted.copy(), _font_size(tinted.size)
    draw = ImageDraw.Draw(drawn)
    height, width = index_map.shape
    rows, columns = (
        ((np.arange(n) + 0.5) * (side / n)).astype(np.int64)
        for side, n in ((height, min(height, _COARSE)), (width, min(width, _COARSE)))
    )
    coarse = index_map[np.ix_(rows, columns)]
    depths = _depths(coarse)
    counts = np.bincount(index_map.ravel(), minlength=len(names))
    present = [i for i in np.flatnonzero(counts).tolist() if i != skip]
    taken: list[tuple[float, float, float, float]] = []
    for i in sorted(present, key=lambda i: -counts[i]):
        there = np.flatnonzero(coarse == i)
        if not len(there):
            continue
        text, font = _fit(Entry(None, names[i], f"label {i}"), size)
        box_width, box_height = font.getlength(text) + size, 1.4 * size
        deepest_first = there[np.argsort(-depths.ravel()[there], kind="stable")]
        boxes = [
            _box(int(columns[at % len(columns)]), int(rows[at // len(columns)]), box_width, box_height, (width, height))
            for at in deepest_first[:: max(1, len(deepest_first) // 200)].tolist()
        ]
        box = next((b for b in boxes if not any(_overlap(b, other) for other in taken)), boxes[0])
        taken.append(box)
        colour = colours[i]
        is_light = oklab(colour)[0] > 0.62
        ink = _INK if is_light else _PAPER
        draw.rounded_rectangle(box, radius=size / 3, fill=tuple(colour.tolist()), outline=ink)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, text, fill=ink, font=font, anchor="mm")
    return drawn


def _box(x: float, y: float, width: float, height: float, within: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom around a point, moved into the image."""
    left = min(max(0.0, x - width / 2), max(0.0, within[0] - width))
    top = min(max(0.0, y - height / 2), max(0.0, within[1] - height))
    return left, top, left + width, top + height


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _depths(index_map: IndexMap) -> npt.NDArray[np.int64]:
    """`[H, W]`: how many steps up, down, left or right each pixel is from another index or the edge."""
    alive = ~outlines(index_map, 1)
    alive[[0, -1]] = alive[:, [0, -1]] = False
    depths = np.zeros(index_map.shape, np.int64)
    while alive.any():
        depths += alive
        inside = alive[1:-1, 1:-1] & alive[:-2, 1:-1] & alive[2:, 1:-1] & alive[1:-1, :-2] & alive[1:-1, 2:]
        alive = np.pad(inside, 1)
    return depths


# ---- sheets ----


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Images in rows and columns on white, a title over each column. Every row has as many images as there are
    titles."""
    size = title_size(image for row in rows for image in row)
    gap = size
    lines = [_fit(Entry(None, title, title), size) for title in titles]
    widths = [max(round(font.getlength(line)), *(row[c].width for row in rows)) for c, (line, font) in enumerate(lines)]
    heights = [max(image.height for image in row) for row in rows]
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


def title_size(images: Iterable[Image.Image]) -> int:
    return max(18, *(_font_size(image.size) for image in images))


# Of a contact sheet; a narrower cell would have no room for a name.
_CELL_GAP = 12
_NARROWEST_CELL = 120


def contact_sheet(
    images: Iterable[tuple[str, Image.Image]],
    *,
    side: int = 256,
    columns: int | None = None,
    ends: Sequence[str] | None = None,
) -> Image.Image:
    """Many images at one glance on white, each made to fit `side` x `side` pixels if it is larger, its name under it.

    Args:
        images: names and images, in order. They are taken one by one and only kept small.
        columns: as many in a row. None: about as many as rows.
        ends: for each image what stands behind its name and is not cut where the name is.

    Raises:
        InputError: there are no images, or `side` or `columns` are below 1.
    """
    if side < 1 or (columns is not None and columns < 1):
        raise InputError(f"side and columns of a contact sheet must be at least 1, got {side} and {columns}")
    cells = []
    for name, image in images:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        cells.append((name, small))
    if not cells:
        raise InputError("a contact sheet needs at least one image")
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


# ---- values ----

_HEAT_ALPHA = 0.7
_HEAT_SIDE = 384


def heat_map(
    image: Image.Image, values: npt.NDArray[np.floating[Any]], low: float, high: float, alpha: float = _HEAT_ALPHA
) -> Image.Image:
    """`image`, in grey, tinted by `values` `[h, w]` from `low` to `high`; values of another size are interpolated."""
    heat = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(heat_colours(np.asarray(smooth))), alpha)


def heat_sheet(image: Image.Image, names: Sequence[str], maps: npt.NDArray[np.floating[Any]]) -> Image.Image:
    """A heat map of `image` for each of `maps` `[N, h, w]`, its name and largest value below it. One scale for all, at
    the bottom."""
    low, high = float(maps.min()), float(maps.max())
    small = image.copy()
    small.thumbnail((_HEAT_SIDE, _HEAT_SIDE))
    panels = [(name, heat_map(small, values, low, high)) for name, values in zip(names, maps, strict=True)]
    highest = [f" (at most {values.max():.2f})" for values in maps]
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


# ---- fonts ----

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


def _font_size(size: tuple[int, int]) -> int:
    """Legible when the image fills a screen, and never so small that the letters break."""
    return max(13, round(0.028 * (size[0] * size[1]) ** 0.5))


def _fit(entry: Entry, size: int, width: int | None = None, end: str = "") -> tuple[str, Font]:
    """The name, cut to a bearable length or to `width` pixels, with `end`, which is never cut, and a font that has its
    letters."""
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
        fitting = bisect_right(
            range(1, len(text) + 1), float(width), key=lambda n: float(font.getlength(text[:n] + "…" + end))
        )
        text = text[:fitting].rstrip() + "…"
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
    """Tests that the font draws no letter as its box for a missing one."""
    missing = bytes(font.getmask("\U0010fffe")), font.getlength("\U0010fffe")
    return all(c == " " or (bytes(font.getmask(c)), font.getlength(c)) != missing for c in letters)
