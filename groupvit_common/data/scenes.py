"""Synthetic captioned scenes from a seed: images and captions for training, masks for evaluation only.

A scene is a textured background with two to four objects that do not hide each other. The caption names every object by
the property that its level is about, and the background; nothing else about the image.

* level 1: the class is the object's colour (plain objects of any shape),
* level 2: the class is the texture (any shape, any pair of colours),
* level 3: the class is the shape (any texture, any pair of colours).

`make_scene` is a pure function of `(seed, index, level, size)`. Objects do not grow with the image, so that a model
trained at one size finds objects of the same scale in a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import InputError

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

COLOURS = (
    ("red", "crimson"),
    ("orange", "tangerine"),
    ("yellow", "golden"),
    ("green", "emerald"),
    ("cyan", "turquoise"),
    ("blue", "azure"),
    ("purple", "violet"),
    ("pink", "rosy"),
)
TEXTURES = (
    ("plain", "solid"),
    ("striped", "banded"),
    ("dotted", "spotted"),
    ("checked", "chequered"),
    ("netted", "meshed"),
    ("speckled", "grainy"),
    ("shaded", "fading"),
    ("blotchy", "marbled"),
)
SHAPES = (
    ("circle", "disc"),
    ("square", "box"),
    ("triangle", "wedge"),
    ("star", "asterisk"),
    ("cross", "plus"),
    ("ring", "hoop"),
    ("bar", "stick"),
    ("crescent", "moon"),
)

LEVELS: Mapping[int, tuple[tuple[str, ...], ...]] = MappingProxyType({1: COLOURS, 2: TEXTURES, 3: SHAPES})
"""Level -> its classes; class k (mask value k + 1) is a tuple of synonyms, the usual name first."""

BACKGROUNDS: tuple[tuple[str, ...], ...] = (
    ("grass", "lawn"),
    ("sand", "beach"),
    ("water", "sea"),
    ("bricks", "wall"),
    ("wood", "planks"),
    ("clouds", "fog"),
)
"""Names of the backgrounds (mask value 0), with synonyms."""

SYNONYM_SHARE = 0.25  # of names that are synonyms of the usual one

COUNT_SHARES = (0.4, 0.35, 0.25)  # of scenes with two, three and four objects

# Hue in turns, saturation, value of the eight colours, in the order of COLOURS.
_HSV = np.array(
    [
        (0.99, 0.92, 0.82),
        (0.075, 0.95, 0.97),
        (0.155, 0.90, 0.96),
        (0.36, 0.90, 0.62),
        (0.50, 0.85, 0.88),
        (0.62, 0.90, 0.88),
        (0.77, 0.80, 0.62),
        (0.91, 0.50, 0.98),
    ],
    np.float32,
)

_THINGS = {1: ("object", "thing", "shape"), 2: ("object", "thing", "shape"), 3: ()}
_JOINTS = ("{things} on {ground}", "{things} in front of {ground}", "{ground} with {things}", "{things} over {ground}")


@dataclass(frozen=True, slots=True)
class Scene:
    """One captioned image.

    image: uint8 `[H, W, 3]`, RGB. nouns: the names in the caption: the objects in their order, then the background.
    mask: uint8 `[H, W]`, 0 background, k + 1 for class k of `LEVELS[level]`; for evaluation only. background: index
    into `BACKGROUNDS`.
    """

    image: Bytes
    caption: str
    nouns: tuple[str, ...]
    mask: Bytes
    level: int
    background: int


def make_scene(
    seed: int,
    index: int,
    level: int,
    size: tuple[int, int] = (64, 64),
    *,
    single_share: float = 0.0,
    close_up_share: float = 0.0,
) -> Scene:
    """Returns scene number `index` of the endless sequence that `seed` and `level` define.

    Args:
        size: height and width in pixels.
        single_share: fraction of scenes with one object.
        close_up_share: fraction of scenes that show one thing: a colour or texture that fills the image (level 3: one
            shape as large as the image), or a background without objects.

    Raises:
        InputError: no such level, a negative seed or index, shares that exceed 1 together, a size under 48 pixels.
    """
    if level not in LEVELS:
        raise InputError(f"level {level!r} does not exist; choose one of {', '.join(map(str, LEVELS))}")
    if seed < 0 or index < 0:
        raise InputError(f"seed and index must not be negative, got seed {seed} and index {index}")
    if min(single_share, close_up_share) < 0 or single_share + close_up_share > 1:
        raise InputError(
            "single_share and close_up_share must not be negative nor exceed 1 together, "
            f"got {single_share} and {close_up_share}"
        )
    height, width = size
    if min(height, width) < 48:
        raise InputError(f"a scene of {height} x {width} pixels has no room for four objects; use at least 48 x 48")
    rng = np.random.default_rng((seed, level, index))

    background = int(rng.integers(len(BACKGROUNDS)))
    image = _GROUNDS[background](rng, *_grid(height, width))
    mask = np.zeros((height, width), np.uint8)

    # Drawn only where it matters: the sequence of usual scenes stays as it is.
    kind = rng.random() if single_share or close_up_share else 1.0
    close_up = kind < close_up_share
    if close_up:
        thing = int(rng.integers(len(LEVELS[level]) + len(BACKGROUNDS)))
        classes = np.arange(len(LEVELS[level]))[thing : thing + 1]  # none: the background alone
    else:
        count = 1 if kind < close_up_share + single_share else int(rng.choice((2, 3, 4), p=COUNT_SHARES))
        classes = rng.permutation(len(LEVELS[level]))[:count]
    fills = close_up and level != 3
    if close_up:
        places = [(height / 2, width / 2, rng.uniform(0.37, 0.48) * min(height, width))] * len(classes)
    else:
        places = _places(rng, len(classes), height, width)
    for number, place in zip(classes, places, strict=True):
        colour = number if level == 1 else None
        texture = {1: 0, 2: number}.get(level, rng.integers(len(TEXTURES)))
        shape = None if fills else int(number if level == 3 else rng.integers(len(SHAPES)))
        _draw(rng, image, mask, int(number) + 1, place, shape, int(texture), colour)
    image += rng.normal(0.0, 0.012, image.shape[:2]).astype(np.float32)[..., None]
    pixels = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)

    caption, nouns = _caption(rng, level, classes, None if fills and len(classes) else background, close_up)
    return Scene(pixels, caption, nouns, mask, level, background)


# Captions


def _caption(
    rng: np.random.Generator, level: int, classes: NDArray[np.int64], background: int | None, close_up: bool
) -> tuple[str, tuple[str, ...]]:
    """Returns a sentence that names each class and the visible background, and those names in order."""
    names = [_name(rng, LEVELS[level][number]) for number in classes]
    ground = None if background is None else _name(rng, BACKGROUNDS[background])
    things = _THINGS[level]
    phrases = []
    for name in names:
        phrase = f"{name} {things[rng.integers(len(things))]}" if things else name
        phrases.append(f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}")
    listed = " and ".join(part for part in (", ".join(phrases[:-1]), *phrases[-1:]) if part)
    nouns = (*names, ground) if ground else tuple(names)
    if listed and ground:
        sentence = _JOINTS[rng.integers(len(_JOINTS))].format(things=listed, ground=ground)
    else:
        sentence = listed or str(ground)
    return f"a close-up of {sentence}" if close_up else sentence, nouns


def _name(rng: np.random.Generator, synonyms: tuple[str, ...]) -> str:
    if rng.random() >= SYNONYM_SHARE:
        return synonyms[0]
    return synonyms[rng.integers(1, len(synonyms))]


# Objects


def _places(rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple[float, float, float]]:
    """Returns (y, x, radius) in pixels of `count` discs that do not overlap: fewer objects may be larger."""
    radii = rng.uniform(*{1: (13.0, 17.0), 2: (13.0, 17.0), 3: (12.0, 15.0), 4: (11.5, 13.5)}[count], size=count)
    while True:
        unit = rng.random((24, 2))
        places: list[tuple[float, float, float]] = []
        for v, u in unit:
            radius = float(radii[len(places)])
            y = radius + float(v) * (height - 2 * radius)
            x = radius + float(u) * (width - 2 * radius)
            if all((y - b) ** 2 + (x - a) ** 2 >= (radius + r) ** 2 for b, a, r in places):
                places.append((y, x, radius))
                if len(places) == count:
                    return places
        radii *= 0.97  # a crowded try: a little smaller, so that the loop ends


def _draw(
    rng: np.random.Generator,
    image: Float,
    mask: Bytes,
    label: int,
    place: tuple[float, float, float],
    shape: int | None,
    texture: int,
    colour: int | None,
) -> None:
    """Paints one object into `image` `[H, W, 3]` in [0, 1] and its label into `mask`; without a shape it fills them."""
    y, x, radius = place
    extent = int(radius * 1.3) + 2
    top, left = max(int(y) - extent, 0), max(int(x) - extent, 0)
    window = np.s_[:, :] if shape is None else np.s_[top : int(y) + extent, left : int(x) + extent]
    height, width = mask[window].shape
    dy, dx = _grid(height, width)
    dy, dx = dy + np.float32(top - y), dx + np.float32(left - x)

    tilt = rng.uniform(-0.35, 0.35)
    if shape is None:
        inside = np.ones((height, width), bool)
    else:
        inside = _INSIDE[shape](*_turn(dy / np.float32(radius), dx / np.float32(radius), tilt))
    ink, paper = _colours(rng, colour)
    amount = _PATTERNS[texture](rng, *_turn(dy, dx, rng.uniform(0, np.pi)))[..., None]
    paint = paper + (ink - paper) * amount
    image[window] = np.where(inside[..., None], paint, image[window])
    mask[window][inside] = label


def _turn(dy: Float, dx: Float, angle: float) -> tuple[Float, Float]:
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    return cosine * dy - sine * dx, sine * dy + cosine * dx


def _colours(rng: np.random.Generator, colour: int | None) -> tuple[Float, Float]:
    """Returns two colours of a texture, float32 `[3]`: the named one twice, or a dark and a light one of any hue."""
    if colour is not None:
        jitter = rng.uniform((-0.012, -0.07, -0.07), (0.012, 0.05, 0.03))
        ink = _rgb(_HSV[colour] + jitter)
        return ink, ink
    dark = _rgb(np.array((rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.25, 0.5))))
    light = _rgb(np.array((rng.random(), rng.uniform(0.5, 0.95), rng.uniform(0.85, 1.0))))
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _rgb(hsv: NDArray[np.floating]) -> Float:
    """Converts HSV (hue in turns) to RGB in [0, 1], float32 `[3]`: the closed form with shifted triangle waves."""
    hue, saturation, value = hsv[0] % 1.0, min(max(float(hsv[1]), 0.0), 1.0), min(max(float(hsv[2]), 0.0), 1.0)
    sector = (np.array((5.0, 3.0, 1.0)) + hue * 6.0) % 6.0
    wave = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    return np.asarray(value - value * saturation * wave, np.float32)


# Shapes: inside or not, in units of the radius, y down and x right.


def _circle(y: Float, x: Float) -> Bool:
    return np.asarray(y * y + x * x < 0.95)


def _square(y: Float, x: Float) -> Bool:
    return np.asarray(np.maximum(np.abs(y), np.abs(x)) < 0.84)


def _triangle(y: Float, x: Float) -> Bool:
    y = y - np.float32(0.18)
    return (y < 0.57) & (np.float32(0.866) * np.abs(x) - np.float32(0.5) * y < 0.57)


def _star(y: Float, x: Float) -> Bool:
    # Folded into one tenth of the turn, the outline of a five-pointed star is one line from the tip to the notch.
    fifth = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    distance = np.sqrt(y * y + x * x)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    notch_along, notch_across = 0.55 * np.cos(np.pi / 5), 0.55 * np.sin(np.pi / 5)
    return along + across * np.float32((1.12 - notch_along) / notch_across) < 1.12


def _cross(y: Float, x: Float) -> Bool:
    y, x = np.abs(y), np.abs(x)
    return (np.minimum(y, x) < 0.34) & (np.maximum(y, x) < 0.98)


def _ring(y: Float, x: Float) -> Bool:
    square = y * y + x * x
    return (square < 0.98) & (square > 0.25)


def _bar(y: Float, x: Float) -> Bool:
    return (np.abs(x) < 1.05) & (np.abs(y) < 0.36)


def _crescent(y: Float, x: Float) -> Bool:
    return (y * y + x * x < 1.0) & (y * y + (x - np.float32(0.55)) ** 2 > 0.55)


_INSIDE = (_circle, _square, _triangle, _star, _cross, _ring, _bar, _crescent)


# Textures of objects: the fraction of ink in [0, 1], of pixel coordinates.


def _plain(rng: np.random.Generator, y: Float, x: Float) -> Float:
    return np.ones_like(y)


def _striped(rng: np.random.Generator, y: Float, x: Float) -> Float:
    period = np.float32(rng.uniform(5.0, 7.0))
    return ((y / period + np.float32(rng.random())) % 1 < 0.5).astype(np.float32)


def _dotted(rng: np.random.Generator, y: Float, x: Float) -> Float:
    period = np.float32(rng.uniform(6.0, 7.5))
    v, u = _cells(rng, y, x, period)
    return ((v - 0.5) ** 2 + (u - 0.5) ** 2 < 0.09).astype(np.float32)


def _checked(rng: np.random.Generator, y: Float, x: Float) -> Float:
    period = np.float32(rng.uniform(7.0, 9.0))
    v, u = _cells(rng, y, x, period)
    return ((v < 0.5) ^ (u < 0.5)).astype(np.float32)


def _netted(rng: np.random.Generator, y: Float, x: Float) -> Float:
    period = np.float32(rng.uniform(5.0, 6.5))
    v, u = _cells(rng, y, x, period)
    return (np.minimum(v, u) < 0.24).astype(np.float32)


def _speckled(rng: np.random.Generator, y: Float, x: Float) -> Float:
    return rng.random(y.shape, np.float32)


def _shaded(rng: np.random.Generator, y: Float, x: Float) -> Float:
    # From one side of the object to the other, whatever its size.
    return np.asarray((y - y.min()) / (y.max() - y.min()))


def _blotchy(rng: np.random.Generator, y: Float, x: Float) -> Float:
    phases = rng.uniform(0, 2 * np.pi, 6).astype(np.float32)
    v, u = y / np.float32(rng.uniform(1.6, 2.1)), x / np.float32(rng.uniform(1.6, 2.1))
    waves = np.sin(v + phases[0] + np.sin(u * 0.7 + phases[1]) * 1.5) + np.sin(
        u + phases[2] + np.sin(v * 0.6 + phases[3]) * 1.5
    )
    return (waves > 0).astype(np.float32)


def _cells(rng: np.random.Generator, y: Float, x: Float, period: np.float32) -> tuple[Float, Float]:
    """Returns positions inside the cells of a square lattice, both in [0, 1)."""
    v, u = rng.random(2, np.float32)
    return (y / period + v) % 1, (x / period + u) % 1


_PATTERNS = (_plain, _striped, _dotted, _checked, _netted, _speckled, _shaded, _blotchy)


# Backgrounds: float32 [H, W, 3] in [0, 1], muted colours, so that the vivid ones belong to objects.


def _grass(rng: np.random.Generator, y: Float, x: Float) -> Float:
    blades = _stretched_noise(rng, y.shape, 5, 1)
    return _blend(rng, blades, (0.20, 0.30, 0.14), (0.45, 0.55, 0.30))


def _sand(rng: np.random.Generator, y: Float, x: Float) -> Float:
    grain = rng.random(y.shape, np.float32)
    return _blend(rng, grain, (0.66, 0.57, 0.42), (0.88, 0.80, 0.64))


def _water(rng: np.random.Generator, y: Float, x: Float) -> Float:
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    ripple = np.sin(y * np.float32(rng.uniform(0.8, 1.1)) + 2 * np.sin(x * np.float32(0.2) + phase) + phase)
    return _blend(rng, np.float32(0.5) + np.float32(0.5) * ripple, (0.25, 0.36, 0.46), (0.48, 0.60, 0.68))


def _bricks(rng: np.random.Generator, y: Float, x: Float) -> Float:
    height, width = np.float32(rng.uniform(6.0, 8.0)), np.float32(rng.uniform(12.0, 16.0))
    row = y / height + np.float32(rng.random())
    column = x / width + np.floor(row) * np.float32(0.5) + np.float32(rng.random())
    mortar = (row % 1 * height < 1.3) | (column % 1 * width < 1.3)
    shade = np.where(mortar, np.float32(1), np.float32(0.25) * rng.random(y.shape, np.float32))
    return _blend(rng, shade, (0.46, 0.28, 0.24), (0.74, 0.70, 0.66))


def _wood(rng: np.random.Generator, y: Float, x: Float) -> Float:
    grain = _stretched_noise(rng, y.shape, 1, 24)
    seam = (y / np.float32(rng.uniform(13.0, 18.0)) + np.float32(rng.random())) % 1 < 0.08
    return _blend(rng, np.where(seam, np.float32(-0.4), grain), (0.40, 0.30, 0.20), (0.62, 0.49, 0.34))


def _clouds(rng: np.random.Generator, y: Float, x: Float) -> Float:
    coarse = rng.random((-(-y.shape[0] // 16) + 2, -(-y.shape[1] // 16) + 2), dtype=np.float32)
    low, high = y / 16, x / 16
    row, column = low.astype(np.int64), high.astype(np.int64)
    v, u = low - row, high - column
    top = coarse[row, column] * (1 - u) + coarse[row, column + 1] * u
    bottom = coarse[row + 1, column] * (1 - u) + coarse[row + 1, column + 1] * u
    return _blend(rng, (top * (1 - v) + bottom * v).astype(np.float32), (0.62, 0.66, 0.72), (0.95, 0.95, 0.96))


_GROUNDS = (_grass, _sand, _water, _bricks, _wood, _clouds)


def _blend(
    rng: np.random.Generator, amount: Float, low: tuple[float, float, float], high: tuple[float, float, float]
) -> Float:
    """Interpolates two colours by `[H, W]` -> `[H, W, 3]`, the whole a little lighter or darker at random."""
    first, second = np.array(low, np.float32), np.array(high, np.float32)
    return (first + amount[..., None] * (second - first)) * np.float32(rng.uniform(0.88, 1.08))


def _stretched_noise(rng: np.random.Generator, shape: tuple[int, ...], down: int, right: int) -> Float:
    """Returns noise with grains of `down` x `right` pixels, each row (or column) of grains shifted at random."""
    height, width = shape
    grains = rng.random((-(-height // down), -(-width // right) + 1), dtype=np.float32)
    noise = np.repeat(grains, down, axis=0)[:height]
    if right == 1:
        # Blades: every column starts at its own height.
        rows = (_grid(height, width)[0].astype(np.int64) + rng.integers(height, size=width)) % height
        return np.asarray(noise[rows, np.arange(width)])
    columns = (np.arange(width) + rng.integers(right, size=(height, 1))) // right
    return np.asarray(noise[np.arange(height)[:, None], columns])


@cache
def _grid(height: int, width: int) -> tuple[Float, Float]:
    """Returns pixel coordinates (y, x), float32 `[H, W]` each; cached and never written to."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y, x
