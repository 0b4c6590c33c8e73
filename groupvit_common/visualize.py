"""Pictures of label maps: colours, overlays, legends."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

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


def with_legend(picture: Image.Image, entries: Sequence[Entry]) -> Image.Image:
    """`picture` with a legend on white: below it, or to the right of a picture that is taller than wide.

    The picture is neither covered nor scaled; the canvas grows. Entries stand in columns, in their order.
    """
    if not entries:
        return picture
    width, height = picture.size
    size = _font_size(picture.size)
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


def _fit(entry: Entry, size: int) -> tuple[str, Font]:
    """The name, cut to a bearable length, and a font that has its letters."""
    printable = "".join(c if c.isprintable() else " " for c in entry.name)
    without_accents = "".join(c for c in unicodedata.normalize("NFKD", printable) if not unicodedata.combining(c))
    text, font = entry.plain_name, _default_font(size)
    for spelling in (printable, without_accents):
        found = _font_for(frozenset(spelling), size)
        if found is not None:
            text, font = spelling, found
            break
    if font.getlength(text) > _MAX_TEXT_EMS * size:
        while text and font.getlength(text + "…") > _MAX_TEXT_EMS * size:
            text = text[:-1]
        text = text.rstrip() + "…"
    return text, font


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


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows and columns on white, a title over each column. Every row has as many pictures as there are titles."""
    size = 18
    font, gap = _default_font(size), size
    widths = [max(row[c].width for row in rows) for c in range(len(titles))]
    heights = [max(picture.height for picture in row) for row in rows]
    head = 2 * gap + size
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), head + sum(heights) + gap * len(rows)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((x, gap), title, fill=_INK, font=font)
        y = head
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(row[column], (x, y))
            y += height + gap
        x += width + gap
    return canvas
