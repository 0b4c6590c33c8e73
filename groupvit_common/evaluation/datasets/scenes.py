"""Synthetic scenes as a set: made from a seed that no recipe trains on, so that checkpoints are measured by them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.registry import DatasetSpec
from groupvit_common.evaluation.datasets.segmentation import Mask, SegmentationSet, voc_palette
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.result import BACKGROUND

_SEED = 1_000_003
_COUNT = 200


def open_dataset(spec: DatasetSpec, level: str, split: str | None, count: int | None) -> list[SegmentationSet]:
    """Opens the scenes of a level, all levels if "". `split` is the seed, `count` the number of scenes a level."""
    if level not in ("", *map(str, LEVELS)):
        raise InputError(f"scenes are scenes:1, scenes:2 or scenes:3, or scenes for all of them, got scenes:{level}")
    seed = split or str(_SEED)
    if not seed.isdecimal():
        raise InputError(f"the split of scenes is the seed they are made from, a whole number, got {split!r}")
    levels = [int(level)] if level else sorted(LEVELS)
    return [_open_level(spec, number, seed, count or _COUNT) for number in levels]


def _open_level(spec: DatasetSpec, level: int, seed: str, count: int) -> SegmentationSet:
    labels, background_labels = (
        tuple(Label(words[0], tuple(words[1:])) for words in listed) for listed in (LEVELS[level], BACKGROUNDS)
    )
    classes = (BACKGROUND, *(label.name for label in labels))
    return SegmentationSet(
        f"{spec.name}:{level}",
        seed,
        classes,
        labels,
        True,
        tuple(range(len(classes))),
        voc_palette(),
        _Scenes(int(seed), level, count),
        background_labels=background_labels,
        background_in_mean=False,
    )


class _Scenes:
    """Makes scenes when they are requested."""

    def __init__(self, seed: int, level: int, count: int) -> None:
        self._make: Callable[[int], Any] = partial(make_scene, seed, level=level)
        self.names = tuple(f"{index:06d}" for index in range(count))
        self.folders: tuple[Path, ...] = ()

    def image(self, index: int, max_pixels: int) -> Image.Image:
        return Image.fromarray(self._make(index).image)

    def mask(self, index: int) -> Mask:
        mask: Mask = self._make(index).mask
        return mask

    def describe(self, index: int) -> str:
        return f"scene {index}"
