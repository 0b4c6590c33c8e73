"""Batches of captioned pictures for the training loop.

What is kept of a scene is what training may know: its picture, and which words its caption names. Masks are left behind here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groupvit_common.data.scenes import Scene, make_scene


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Pictures of one level in memory.

    images: uint8 `[N, H, W, 3]`; captions: N sentences; words: the different words that they name, sorted;
    named: bool `[N, words]`, which caption names which.
    """

    images: NDArray[np.uint8]
    captions: tuple[str, ...]
    words: tuple[str, ...]
    named: NDArray[np.bool_]

    @classmethod
    def of(cls, scenes: Iterable[Scene]) -> CaptionedImages:
        """The pictures and words of scenes."""
        images, captions, nouns = zip(*((scene.image, scene.caption, scene.nouns) for scene in scenes), strict=True)
        words = tuple(sorted({word for names in nouns for word in names}))
        named = np.array([[word in names for word in words] for names in nouns])
        return cls(np.stack(images), captions, words, named)

    @classmethod
    def scenes(cls, seed: int, count: int, level: int, size: int) -> CaptionedImages:
        """Scenes 0 .. count - 1 of a seed and level, square."""
        return cls.of(make_scene(seed, index, level, (size, size)) for index in range(count))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """`count` pictures at random, the batch mirrored at random along either axis, and their numbers."""
        numbers = rng.integers(len(self.images), size=count)
        images = self.images[numbers]
        if rng.random() < 0.5:
            images = images[:, :, ::-1]
        if rng.random() < 0.5:
            images = images[:, ::-1]
        return np.ascontiguousarray(images), numbers


def to_pixels(images: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]`, normalised per channel as the image processor does."""
    centre, spread = (torch.tensor(tuple(values), dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - centre) / spread


def mix_halves(
    pixels: Tensor, named: Tensor, share: float, patch: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Puts part of one picture beside part of another in the first `share` of a batch.

    The cut is straight, across or down, on a patch border, between a quarter and three quarters of the way. (Yun et al. 2019,
    "CutMix", mix rectangles and whole-image labels; here each patch keeps the words of the picture that it comes from.)

    Args:
        pixels: `[B, 3, H, W]`; named: bool `[B, W]`, words of each caption; patch: side of a patch in pixels.

    Returns:
        pixels `[B, 3, H, W]` and the words of each patch's caption, bool `[B, P, W]`.
    """
    batch, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    mixed = int(batch * share)
    other = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for number in range(mixed):
        if rng.random() < 0.5:
            other[number, :, int(rng.integers(columns // 4, columns - columns // 4 + 1)) :] = True
        else:
            other[number, int(rng.integers(rows // 4, rows - rows // 4 + 1)) :] = True
    partner = torch.arange(batch)
    partner[:mixed] = partner[:mixed].roll(1)
    from_other = other.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    pixels = torch.where(from_other, pixels[partner], pixels)
    return pixels, torch.where(other.flatten(1)[..., None], named[partner][:, None], named[:, None])
