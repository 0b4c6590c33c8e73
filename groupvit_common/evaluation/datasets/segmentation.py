"""Segmentation sets: images, masks and classes, in the layouts they are published in.

A set is named like `voc:DIR`. `open_sets` checks that all its files exist and reads the first pair, so that a wrong
folder is reported at once; a fault of a later file is reported, with its name, when the file is read.
"""

import importlib
import os
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.registry import DATASETS, DatasetSpec, Names, find_spec, names_of_sets
from groupvit_common.preprocessing.images import MAX_PIXELS
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.result import BACKGROUND

Mask = NDArray[np.uint8]
Bytes = NDArray[np.uint8]

IGNORE = 255
"""The mask value of pixels that belong to no class and are not judged."""


class Reader(Protocol):
    """Reads a set's images and masks. Masks hold class indices and `IGNORE`, and may be of any size."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def folders(self) -> Sequence[Path]:
        """The folders of images and masks, in which other files would be taken for the set's."""

    def image(self, index: int, max_pixels: int) -> Image.Image: ...

    def mask(self, index: int) -> Mask: ...

    def describe(self, index: int) -> str:
        """Returns the paths of an image and its mask, for messages."""


@dataclass(frozen=True)
class Sample:
    """One image of a set with its mask, read when requested. `name` is the set's own and unique."""

    name: str
    _reader: Reader
    _index: int
    _max_pixels: int = MAX_PIXELS

    def image(self) -> Image.Image:
        """Returns the image, RGB, its pixels as they are stored: masks are drawn on these, whatever a camera noted
        about orientation.

        Raises:
            InputError: the file cannot be read, or has more pixels than the set's `max_pixels`.
        """
        return self._reader.image(self._index, self._max_pixels)

    def mask(self) -> Mask:
        """Returns the class of each pixel, `[H, W]` uint8, `IGNORE` where there is none.

        Raises:
            InputError: the mask cannot be read or does not fit the set.
        """
        return self._reader.mask(self._index)

    def check_size(self, mask: Mask, image: Image.Image) -> None:
        """Raises `InputError` unless the mask has its image's size."""
        if mask.shape != (image.height, image.width):
            raise InputError(
                f"{self._reader.describe(self._index)}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, "
                f"its image {image.width} x {image.height}: they must be of one size"
            )


@dataclass(frozen=True, eq=False)
class SegmentationSet:
    """An open segmentation set.

    Attributes:
        kind: its name before the colon, with the level for scenes.
        split: the part of the set.
        classes: the names of a mask's indices; the first is the background where `has_background`.
        labels: the labels to segment by, one for each class but a background.
        file_values: the value of each class in the set's own mask files.
        palette: colours of those values, `[256, 3]`.
        background_labels: labels whose pixels are background.
        background_in_mean: the background's IoU counts in the mean, as it does in VOC.
        limit: the number of images used, the first ones; None: all.
        max_pixels: images of more pixels are refused before they are decoded.
    """

    kind: str
    split: str
    classes: tuple[str, ...]
    labels: tuple[Label, ...]
    has_background: bool
    file_values: tuple[int, ...]
    palette: Bytes
    reader: Reader
    background_labels: tuple[Label, ...] = ()
    background_in_mean: bool = True
    limit: int | None = None
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        count = len(self.reader.names)
        return count if self.limit is None else min(count, self.limit)

    @property
    def folders(self) -> Sequence[Path]:
        """The folders of the set, in which other files would be taken for its own."""
        return self.reader.folders

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Sample(self.reader.names[index], self.reader, index, self.max_pixels)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def prediction_image(self, label_map: NDArray[np.unsignedinteger[Any]]) -> Image.Image:
        """Returns a label map `[H, W]` of class indices in the form of the set's mask files (mode "P")."""
        image = Image.fromarray(np.asarray(self.file_values, np.uint8)[label_map])
        image.putpalette(self.palette.tobytes())
        return image


def open_sets(
    spelled: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    names: Names = "authors",
    max_pixels: int = MAX_PIXELS,
) -> list[SegmentationSet]:
    """Opens the set that `NAME:DIR` means; `scenes` is three of them, `scenes:1` to `scenes:3` one.

    Args:
        split: the part of the set, by default the one for validation; for scenes the seed that they are made from.
        limit: the number of images, the first ones; by default all, and 200 scenes.
        names: class names, "authors": as in GroupViT's evaluation; "set": as in mmsegmentation.
        max_pixels: images of more pixels are refused before they are decoded.

    Raises:
        InputError: an unknown set, or files that are missing or malformed.
    """
    kind, _, where = spelled.partition(":")
    spec = find_spec(spelled)
    if spec is None or spec.task != "segmentation":
        raise InputError(
            f"unknown set {spelled!r}: it must be KIND:DIR, or scenes, where KIND is one of "
            f"{', '.join(names_of_sets('segmentation'))}; {', '.join(names_of_sets('classification'))}, for "
            "classification, is known to groupvit evaluate"
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    module = importlib.import_module(f"{__package__}.{spec.module}")
    if not spec.layout:
        generated: list[SegmentationSet] = module.open_dataset(spec, where, split, limit)
        return generated
    if not where:
        raise InputError(f"{kind} needs the folder it lies in: {kind}:DIR")
    folder = Path(os.path.expanduser(where))  # noqa: PTH111 (behind the colon no shell has seen it)
    if not folder.is_dir():
        raise InputError(f"there is no folder {where}: {kind}:DIR is {spec.help}, with {spec.layout_of(split)}")
    opened: SegmentationSet = module.open_dataset(spec, folder, split, names)
    opened = replace(opened, limit=limit, max_pixels=max_pixels)
    repeated = next((name for name, count in Counter(opened.reader.names).items() if count > 1), None)
    if repeated is not None:
        raise InputError(
            f"two images of {where} are called {repeated}: rename one, since results are noted by these names"
        )
    first = opened[0]
    mask = first.mask()
    first.check_size(mask, first.image())
    # Masks of one's own may be drawn in black and white; those of published classes are as published.
    if not spec.classes and set(np.unique(mask)) == {0, IGNORE}:
        warnings.warn(
            f"the mask of {first.name} in {where} holds only 0 and {IGNORE}, and {IGNORE} is no class and is not "
            "judged: if it means a class, store its index",
            stacklevel=2,
        )
    return [opened]


def class_names(kind: str, names: Names = "authors") -> tuple[str, ...]:
    """Returns the classes of a published set, a background first."""
    spec = DATASETS[kind]
    table = _class_tables()[spec.classes]
    spelled = tuple(table["names"])
    if names == "authors":
        spelled = tuple(table["authors"].get(name, name) for name in spelled)
    return spelled[1:] if spec.drops_background else spelled


@cache
def _class_tables() -> Mapping[str, Any]:
    with (Path(__file__).parent / "segmentation_classes.toml").open("rb") as file:
        return tomllib.load(file)


def voc_palette() -> Bytes:
    """Returns VOC's colours, `[256, 3]`. The bits of an index, from the lowest, go to red, green and blue in turn, into
    their highest free bits."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> channel) & 1) << (7 - bit)).astype(np.uint8)
        index >>= 3
    return colours


def published_set(
    spec: DatasetSpec,
    split: str,
    names: Names,
    reader: Reader,
    file_values: Sequence[int],
    palette: Bytes | None = None,
) -> SegmentationSet:
    """Returns a set with the published classes of `spec`; its palette is VOC's if None."""
    classes = class_names(spec.name, names)
    has_background = classes[0] == BACKGROUND
    return SegmentationSet(
        spec.name,
        split,
        classes,
        tuple(Label(name) for name in classes[has_background:]),
        has_background,
        tuple(file_values),
        voc_palette() if palette is None else palette,
        reader,
    )
