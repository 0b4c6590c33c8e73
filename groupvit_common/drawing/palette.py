"""Colours: of labels and groups, and from little to much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Colours = npt.NDArray[np.uint8]

# The first seven follow Okabe and Ito (2008), made to be told apart by colour-blind people: black left out, vermilion
# and blue moved away from orange and sky blue, and ordered so that unlike ones stand next to each other. Each further
# one is the farthest from all before it: tests/drawing/test_palette.py holds the search that found them.
_TABLE = (
    "e69f000a7fc4d62f4b00a676f0e442cc79a756b4e9780078005a005affffd200ff0000e1ffb4c396001e00e196ff78ff"
    "b42da50f7869004b9600c3008778001e5affff5a4b8787ff8700e100ff00784b78ff00c3c3f0b4a5d2ffa5b4875a00b4"
    "966987b48769785a2da5d20ff0c378b4005a005a5a6996b4ff2d87ff87961ed2d2965ad23c5ac3e196d200a51e006996"
    "b42d000fff96d269e1007800693c3cd25a00ffb4ffc3870000c3784bb4b496e1d2ff3cff2d8796b4a5ff5a875a2d96e1"
    "ffd2f04b00ff87a54bd22d879678c3783ca57869ffa5695ae19669ff5ab45a3c691e693cff000fd200d2a5b400d25a78"
    "ffb40087004ba5ff69785aa51e3cc3961e87ffa587c3d2a500e15ad24bb4a500c39696e1a5e17800ffd2962dff693c00"
    "a54b69b45af000d2ffb4c369e1a5b45a2d87ffe196ff781e0078f0a55a1ef06987b4b4e14ba5ff963c3c0f4be13c871e"
    "69964b7878a587c3b4ff0f5a5a1ed2ffd2b42d96875a5ae1ff96f0c396b47878e13c5a78c387ff78a587e1d24b4b783c"
    "3ce1f0e178d269f05aa55aa52da5d2a53c87b4783cf01ee1873c5a1e4b78c3003cb4f0e10fe1c34b69b47800968700b4"
    "d2695a78690000d2a5b487c30fa5a5e100000fb44bc30078b47887965a4b1e5aa53c87ff784bc39687004b3ca5ff4be1"
    "871e69c3f087a53ce178c35a96a5d2c35a96f000a5a500a500f0b4f0a55a0069691e5a3c1e78a500f0e15a5a00e10069"
    "7800ff4bd2005a87c31e7887ff78b469c3e1b43cc3c3e10000b496b4c396006900a578a51e87785a4b87e1692dd24bd2"
    "d2874b6969d2d28796962d00d2b4ff0087e1694b2d964b0096c3ffd21eb4963cb4d269c3b4a55af07869b4e1ffd2c33c"
    "f0a5d28796691ed278c33c2d696996b478ff694bff3c0fc38769b4875a78ff2da5c3e196d2c3f087784b96d2e187d287"
    "c34b69d29687ff4b6996ffa54bf0ff8787e1a5003c00c3a587b469b45ac3b44b870f96009696ff5a3ce1002df0f0c3a5"
    "1e96a5ff78e1c387e1c35a3cf069ffe15aa5ffd26900c3ff4b4b1e87e1a5d2787800f087ffb4e15a5a9600b47896d2b4"
)
_PALETTE = np.frombuffer(bytes.fromhex("".join(_TABLE)), np.uint8).reshape(-1, 3)

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

# Linear RGB -> OKLab (Ottosson 2020), in which equal distances look equally different.
_TO_CONES = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
             (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
_TO_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
           (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip

# From little to much: dark to light, so that it is read without colours too.
_HEAT = ((20, 11, 70), (98, 22, 122), (186, 48, 96), (238, 116, 46), (250, 226, 110))


def palette(count: int) -> Colours:
    """Returns `[count, 3]` RGB, the same colours in the same order every time: a longer palette begins with the shorter
    one.

    The first seven follow Okabe and Ito. Each further colour is the one farthest from all before it, where distance is
    the mean over full colour vision and the worse of two kinds of red-green blindness (OKLab). Beyond about ten no
    palette is safe for everyone, hence the outlines and the legend. After 256 the colours repeat.
    """
    return _PALETTE[np.arange(count) % len(_PALETTE)]


def label_colours(names: Sequence[str]) -> Colours:
    """Returns `[len(names), 3]` RGB: the palette in its order, but names of colours in their own."""
    named = {i: bytes.fromhex(_NAMED[n.casefold()]) for i, n in enumerate(names) if n.casefold() in _NAMED}
    if not named:
        return palette(len(names))
    taken = np.array([list(colour) for colour in named.values()], dtype=np.uint8)
    apart = np.linalg.norm(oklab(_PALETTE)[:, None] - oklab(taken), axis=-1).min(axis=1)
    others = _PALETTE[apart >= _TOO_NEAR]
    colours = np.empty((len(names), 3), dtype=np.uint8)
    rest = [i for i in range(len(names)) if i not in named]
    colours[rest] = others[np.arange(len(rest)) % len(others)]
    colours[list(named)] = taken
    return colours


def heat_colours(values: npt.NDArray[np.floating[Any]]) -> Colours:
    """`[...]`, 0 to 1 -> `[..., 3]` RGB, from dark violet to light yellow."""
    anchors = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, anchors, channel) for channel in np.array(_HEAT).T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def oklab(colours: Colours) -> npt.NDArray[np.float64]:
    """`[..., 3]` RGB -> `[..., 3]` OKLab, the lightness first."""
    return linear_oklab(linear_rgb(colours))


def linear_oklab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`[..., 3]` linear RGB, 0 to 1 -> `[..., 3]` OKLab."""
    return np.cbrt(np.maximum(rgb @ np.array(_TO_CONES).T, 0)) @ np.array(_TO_LAB).T


def linear_rgb(colours: Colours) -> npt.NDArray[np.float64]:
    """`[..., 3]` RGB -> linear RGB, 0 to 1."""
    c = colours / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
