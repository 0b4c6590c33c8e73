"""Segmentation sets in the layouts they are published in: pictures, masks, classes. Read one by one, when they are asked for.

A set is named like `voc:DIR`. `open_sets` looks whether all its files are there and reads the first pair, so that a wrong folder
is told at once; a fault of a later file is told, with its name, when its turn comes.
"""

from __future__ import annotations

import os
import tomllib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.coco import Instances
from groupvit_common.preprocessing.images import GREY_STEP, image_suffixes, stored_image, to_rgb
from groupvit_common.preprocessing.prompts import Label, read_labels
from groupvit_common.storage.files import is_hidden, read_text

Mask = NDArray[np.uint8]
Bytes = NDArray[np.uint8]
Names = Literal["authors", "set"]

IGNORE = 255
"""Value of pixels that belong to no class and are not judged."""

BACKGROUND = "background"
SCENES_SEED = 1_000_003
"""Of the scenes that no recipe trains on, with which checkpoints are measured."""
SCENES = 200

KINDS = {
    "voc": "PASCAL VOC 2012, 20 classes and background",
    "voc20": "PASCAL VOC 2012 without its background",
    "context": "PASCAL Context, 59 classes and background",
    "context59": "PASCAL Context without its background",
    "coco-object": "the 80 objects of COCO and background",
    "coco-stuff": "COCO-Stuff 164k, 171 classes",
    "ade20k": "ADE20K, 150 classes",
    "cityscapes": "Cityscapes, 19 classes",
    "scenes": "generated scenes, three levels",
    "folder": "pictures, index masks and a list of classes",
}
"""What a name before the colon means."""

_VOC_LAYOUT = "JPEGImages/NAME.jpg, SegmentationClass/NAME.png and ImageSets/Segmentation/{split}.txt in VOC2012"
_CONTEXT_LAYOUT = (
    "JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png and ImageSets/SegmentationContext/{split}.txt in VOC2010"
)
_OBJECT_LAYOUT = (
    "images/{split}/NAME.jpg (or {split}/NAME.jpg) and annotations/instances_{split}.json "
    "or annotations/{split}/NAME_instanceTrainIds.png"
)
_STUFF_LAYOUT = (
    "images/{split}/NAME.jpg (or {split}/NAME.jpg) and annotations/{split}/NAME.png or NAME_labelTrainIds.png"
)
_ADE_LAYOUT = "images/{split}/NAME.jpg and annotations/{split}/NAME.png in ADEChallengeData2016"
_CITY_LAYOUT = "leftImg8bit/{split}/CITY/NAME_leftImg8bit.png and gtFine/{split}/CITY/NAME_gtFine_labelIds.png"
_FOLDER_LAYOUT = "images/NAME.jpg, masks/NAME.png and classes.txt, and {split}.txt with names where a part is asked for"

_SPLITS = {
    "coco": {"val": "val2017", "train": "train2017"},
    "ade20k": {"val": "validation", "train": "training"},
}
# COCO-Stuff's pixel maps hold the category's number less one; these numbers below 182 belong to no category.
_NOT_IN_STUFF = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# Cityscapes' ids of the classes that are judged, in the order of their training ids.
_CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITY_MOST = 33
_CITY_COLOURS = (
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 005064 "
    "0000e6 770b20"
)  # fmt: skip
_NO_CLASS = -1
_MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")
_NOT_INDICES = {
    "LA": "it has transparency beside the indices; save it without",
    "PA": "it has transparency beside the indices; save it without",
    "F": "fractions were put in the place of indices",
}


class _Reader(Protocol):
    """Where a set's pictures and masks come from. Masks are of class indices and `IGNORE`, and may be of any size."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def folders(self) -> Sequence[Path]:
        """Where images and masks lie, and others would be taken for the set's."""

    def image(self, index: int) -> Image.Image: ...

    def mask(self, index: int) -> Mask: ...

    def where(self, index: int) -> str:
        """Picture and mask, for messages."""


@dataclass(frozen=True)
class Sample:
    """One picture of a set: `name`, unlike any other's, is how the set calls it. Nothing is read before it is asked for."""

    name: str
    _reader: _Reader
    _index: int

    def image(self) -> Image.Image:
        """The picture, RGB, its pixels as they are stored: masks are drawn on these, whatever a camera noted about up and down.

        InputError if it cannot be read.
        """
        return self._reader.image(self._index)

    def mask(self) -> Mask:
        """Class of each pixel, `[H, W]` uint8, `IGNORE` where there is none. InputError for a mask that does not fit the set."""
        return self._reader.mask(self._index)

    def check_size(self, mask: Mask, image: Image.Image) -> None:
        """InputError unless the mask is as large as its picture."""
        if mask.shape != (image.height, image.width):
            raise InputError(
                f"{self._reader.where(self._index)}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its picture "
                f"{image.width} x {image.height}: they must be of one size"
            )


@dataclass(frozen=True, eq=False)
class SegmentationSet:
    """A set that is open.

    kind: its name before the colon, with the level for scenes; split: the part of it. classes: what a mask's indices mean; the first is
    the background where `has_background`. labels: the words to look for, one for each class but a background; background_labels:
    words whose pixels are background. background_in_mean: whether the background's IoU counts in the mean, as it does in VOC.
    file_values, palette: for each class, what stands for it in the set's own mask files, and their colours `[256, 3]`.
    """

    kind: str
    split: str
    classes: tuple[str, ...]
    labels: tuple[Label, ...]
    has_background: bool
    file_values: tuple[int, ...]
    palette: Bytes
    reader: _Reader
    background_labels: tuple[Label, ...] = ()
    background_in_mean: bool = True
    limit: int | None = None

    def __len__(self) -> int:
        count = len(self.reader.names)
        return count if self.limit is None else min(count, self.limit)

    @property
    def folders(self) -> Sequence[Path]:
        """Where the set's files lie, and others would be taken for them."""
        return self.reader.folders

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Sample(self.reader.names[index], self.reader, index)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def prediction_image(self, label_map: NDArray[np.unsignedinteger[Any]]) -> Image.Image:
        """A label map `[H, W]` of class indices as the set's mask files are: their values, their colours (mode "P")."""
        image = Image.fromarray(np.asarray(self.file_values, np.uint8)[label_map])
        image.putpalette(self.palette.tobytes())
        return image


def open_sets(
    spelled: str, *, split: str | None = None, limit: int | None = None, names: Names = "authors"
) -> list[SegmentationSet]:
    """The set that `KIND:DIR` means; `scenes` is three of them, `scenes:1` to `scenes:3` one.

    Args:
        split: the part of the set, by default the validation part; of scenes the seed that they are made from.
        limit: so many of its pictures, the first ones. Of scenes 200 by default.
        names: words for the classes, "authors": as GroupViT's evaluation has them; "set": as mmsegmentation does.

    Raises:
        InputError: no such kind of set, or files that are missing or not as they should be.
    """
    kind, _, where = spelled.partition(":")
    if kind not in KINDS:
        raise InputError(
            f"unknown set {spelled!r}: it must be KIND:DIR, or scenes, where KIND is one of {', '.join(KINDS)}; "
            "imagenet, for classification, is known to groupvit evaluate"
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if kind == "scenes":
        return _scenes(where, split, SCENES if limit is None else limit)
    if not where:
        raise InputError(f"{kind} needs the folder it lies in: {kind}:DIR")
    folder = Path(os.path.expanduser(where))  # noqa: PTH111 (behind the colon no shell has seen it)
    if not folder.is_dir():
        raise InputError(f"there is no folder {where}: {kind}:DIR is {KINDS[kind]}, with {layout_of(kind, split)}")
    made = replace(_OPENERS[kind](folder, split, names), limit=limit)
    twice = next((name for name, count in Counter(made.reader.names).items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"two images of {where} are called {twice}: rename one, since results are noted by these names"
        )
    first = made[0]
    mask = first.mask()
    first.check_size(mask, first.image())
    if kind == "folder" and set(np.unique(mask)) == {0, IGNORE}:
        warnings.warn(
            f"the mask of {first.name} in {where} holds only 0 and {IGNORE}, and {IGNORE} is no class and is not judged: if it means "
            "a class, store its index",
            stacklevel=2,
        )
    return [made]


def layout_of(kind: str, split: str | None = None) -> str:
    """The files of a set, in words."""
    return _LAYOUTS[kind].format(split=split or "SPLIT")


def class_names(kind: str, names: Names = "authors") -> tuple[str, ...]:
    """The classes of a published set, a background first."""
    table = _tables()[{"voc20": "voc", "context59": "context"}.get(kind, kind)]
    spelled = tuple(table["names"])
    if names == "authors":
        spelled = tuple(table["authors"].get(name, name) for name in spelled)
    return spelled[1:] if kind in ("voc20", "context59") else spelled


def voc_palette() -> Bytes:
    """`[256, 3]`: VOC's colours. The bits of an index, from the lowest, go round red, green and blue, into their highest free bits."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> channel) & 1) << (7 - bit)).astype(np.uint8)
        index >>= 3
    return colours


@cache
def _tables() -> Mapping[str, Any]:
    with (Path(__file__).parent / "segmentation_classes.toml").open("rb") as file:
        return tomllib.load(file)


# ---- readers ----


class _Files:
    """Picture and mask files. `table`: class of each value in a mask file `[256]`, `IGNORE`, or `_NO_CLASS` for one that must not be."""

    def __init__(
        self,
        pairs: Sequence[tuple[str, Path, Path]],
        table: NDArray[np.int16],
        expected: str,
        palette: Bytes | None = None,
    ) -> None:
        self.names = tuple(name for name, _, _ in pairs)
        self.folders = tuple(dict.fromkeys(path.parent for _, *paths in pairs for path in paths))
        self._pairs, self._table, self._expected, self._palette = pairs, table, expected, palette

    def image(self, index: int) -> Image.Image:
        return _stored_rgb(self._pairs[index][1])

    def mask(self, index: int) -> Mask:
        path = self._pairs[index][2]
        image = stored_image(path)
        if image.mode not in _MASK_MODES:
            raise InputError(
                f"{path} must hold indices, one whole number a pixel (mode P or L), but it is an image of mode {image.mode}: "
                f"{_NOT_INDICES.get(image.mode, 'colours were put in the place of indices')}"
            )
        # Grey levels of few bits are spread over those of eight as they are read.
        values = np.asarray(image) // image.info[GREY_STEP] if GREY_STEP in image.info else np.asarray(image)
        given = np.asarray(image.getpalette() or (), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        outside = values[(values < 0) | (values > IGNORE)] if values.dtype.itemsize > 1 else values[:0]
        if outside.size:
            raise InputError(f"{path} holds the value {outside.flat[0]}, but {self._expected}")
        values = values.astype(np.uint8)
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        strange = present[self._table[present] == _NO_CLASS]
        if strange.size:
            raise InputError(f"{path} holds the value {strange[0]}, but {self._expected}")
        if given is not None and self._palette is not None:
            self._check_palette(path, present, given)
        return self._table[values].astype(np.uint8)

    def _check_palette(self, path: Path, present: NDArray[np.intp], given: Bytes) -> None:
        """A mask that a program stored with a palette of its own has other indices: its colours tell."""
        assert self._palette is not None
        grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        shown = present[present < len(given)]
        for palette in (self._palette, grey):
            if len(shown) == len(present) and (given[shown] == palette[shown]).all():
                return
        raise InputError(
            f"{path} has a palette of its own: index {present[-1]} is not of the set's colour, so its indices cannot be trusted; "
            "take the original file"
        )

    def where(self, index: int) -> str:
        return f"{self._pairs[index][1]} and {self._pairs[index][2]}"


class _Instances:
    """Masks painted from COCO's `instances_*.json`."""

    def __init__(self, path: Path, folder: Path, classes: Sequence[str]) -> None:
        self._path, self._folder = path, folder
        self._instances = Instances(path, classes)
        self.names = tuple(image.name for image in self._instances.images)
        self.folders = (folder,)
        _all_there([self._image(index) for index in range(len(self.names))], _OBJECT_LAYOUT.format(split=folder.name))

    def _image(self, index: int) -> Path:
        return self._folder / self._instances.images[index].path

    def image(self, index: int) -> Image.Image:
        return _stored_rgb(self._image(index))

    def mask(self, index: int) -> Mask:
        return self._instances.mask(index)

    def where(self, index: int) -> str:
        return f"{self._image(index)} in {self._path}"


class _Scenes:
    def __init__(self, seed: int, level: int, count: int) -> None:
        self._make: Callable[[int], Any] = partial(make_scene, seed, level=level)
        self.names = tuple(f"{index:06d}" for index in range(count))
        self.folders: tuple[Path, ...] = ()

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._make(index).image)

    def mask(self, index: int) -> Mask:
        mask: Mask = self._make(index).mask
        return mask

    def where(self, index: int) -> str:
        return f"scene {index}"


# ---- what the sets have in common ----


def _stored_rgb(path: Path) -> Image.Image:
    """An image as its pixels are stored, as its mask's are."""
    return to_rgb(stored_image(path), str(path))


def _table(file_values: Sequence[int], ignored: Sequence[int] = ()) -> NDArray[np.int16]:
    """For `_Files`: class i is stored as `file_values[i]`; `ignored` values and 255 are no class."""
    table = np.full(256, _NO_CLASS, np.int16)
    table[[IGNORE, *ignored]] = IGNORE
    table[list(file_values)] = np.arange(len(file_values))
    return table


def _root(given: Path, below: Sequence[str], needed: str, layout: str) -> Path:
    """`given`, or the folder below it, that holds the folder `needed`."""
    for folder in (given, *(given / name for name in below)):
        if (folder / needed).is_dir():
            return folder
    places = " or ".join([str(given), *(f"{given}/{name}" for name in below)])
    raise InputError(f"there is no folder {needed} in {places}: expected {layout}")


def _listed(path: Path, layout: str) -> list[str]:
    """The names in a list of a split's images, one a line."""
    try:
        names = [_composed(line.strip()) for line in read_text(path).split("\n") if line.strip()]
    except CheckpointError as error:
        if path.exists():
            raise InputError(f"cannot read the list: {error}") from error
        there = sorted(other.stem for other in path.parent.glob("*.txt") if not is_hidden(other.name))
        what = f"there are {', '.join(there)}" if there else "there are no lists"
        raise InputError(f"there is no list {path} ({what}): expected {layout}") from error
    if not names:
        raise InputError(f"the list {path} is empty")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"the list {path} has the name {twice} twice")
    for name in names:
        # Label maps are written under these names.
        if Path(name).is_absolute() or ".." in Path(name).parts or any(unicodedata.category(c) == "Cc" for c in name):
            raise InputError(f"the list {path} has {name!r}, which is no name of an image within the set")
    return names


def _all_there(paths: Sequence[Path], layout: str) -> None:
    """InputError unless all files exist."""
    known: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in known:
            known[path.parent] = {entry.name for entry in os.scandir(path.parent)} if path.parent.is_dir() else set()
        if path.name not in known[path.parent]:
            missing.append(path)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} files are missing, the first is {missing[0]}: expected {layout}"
        )


def _found(folder: Path, pattern: str, layout: str) -> list[Path]:
    """Files of a pattern in a folder, by name, but for hidden ones; there must be some."""
    found = _visible(folder, pattern)
    if not found:
        what = f"no {pattern} in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        raise InputError(f"{what}: expected {layout}")
    return found


def _visible(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(pattern) if not any(map(is_hidden, path.relative_to(folder).parts)))


def _published(
    kind: str,
    split: str,
    names: Names,
    reader: _Reader,
    file_values: Sequence[int],
    palette: Bytes | None = None,
) -> SegmentationSet:
    classes = class_names(kind, names)
    has_background = classes[0] == BACKGROUND
    labels = tuple(Label(name) for name in (classes[1:] if has_background else classes))
    colours = voc_palette() if palette is None else palette
    return SegmentationSet(kind, split, classes, labels, has_background, tuple(file_values), colours, reader)


# ---- the sets ----


def _voc(given: Path, split: str | None, names: Names, *, kind: str = "voc") -> SegmentationSet:
    split = split or "val"
    context = kind.startswith("context")
    layout = (_CONTEXT_LAYOUT if context else _VOC_LAYOUT).format(split=split)
    folder, lists, year, count = (
        ("SegmentationClassContext", "SegmentationContext", "VOC2010", 60)
        if context
        else ("SegmentationClass", "Segmentation", "VOC2012", 21)
    )
    root = _root(given, [year, f"VOCdevkit/{year}"], folder, layout)
    pairs = [
        (name, root / "JPEGImages" / f"{name}.jpg", root / folder / f"{name}.png")
        for name in _listed(root / "ImageSets" / lists / f"{split}.txt", layout)
    ]
    _all_there([path for _, *paths in pairs for path in paths], layout)
    without = kind in ("voc20", "context59")
    file_values = range(1 if without else 0, count)
    reader = _Files(
        pairs,
        _table(file_values, [0] if without else []),
        f"a mask of {kind} holds 0 to {count - 1} and 255",
        None if context else voc_palette(),
    )
    return _published(kind, split, names, reader, file_values)


def _coco_images(root: Path, split: str, layout: str) -> Path:
    for folder in (root / "images" / split, root / split):
        if folder.is_dir():
            return folder
    raise InputError(f"there is no folder images/{split} or {split} in {root}: expected {layout}")


def _coco_pairs(
    root: Path, split: str, masks: Sequence[Path], ending: str, layout: str
) -> list[tuple[str, Path, Path]]:
    images = _coco_images(root, split, layout)
    stems = [mask.name.removesuffix(ending) for mask in masks]
    pairs = [(stem, images / f"{stem}.jpg", mask) for stem, mask in zip(stems, masks, strict=True)]
    _all_there([image for _, image, _ in pairs], layout)
    return pairs


def _coco_object(root: Path, split: str | None, names: Names) -> SegmentationSet:
    split = _SPLITS["coco"].get(split or "val", split or "")
    layout, ending = _OBJECT_LAYOUT.format(split=split), "_instanceTrainIds.png"
    folder, instances = root / "annotations" / split, root / "annotations" / f"instances_{split}.json"
    prepared = _visible(folder, f"*{ending}")
    reader: _Reader
    if prepared:
        expected = "a prepared mask of coco-object holds 0 to 80 and 255"
        reader = _Files(_coco_pairs(root, split, prepared, ending, layout), _table(range(81)), expected)
    elif instances.is_file():
        reader = _Instances(instances, _coco_images(root, split, layout), class_names("coco-object", "set"))
    else:
        raise InputError(f"there is neither {instances} nor a mask *{ending} in {folder}: expected {layout}")
    if not reader.names:
        raise InputError(f"there are no pictures in {instances}")
    return _published("coco-object", split, names, reader, range(81))


def _coco_stuff(root: Path, split: str | None, names: Names) -> SegmentationSet:
    split = _SPLITS["coco"].get(split or "val", split or "")
    layout, folder = _STUFF_LAYOUT.format(split=split), root / "annotations" / split
    masks = _found(folder, "*.png", layout)
    prepared = [mask for mask in masks if mask.name.endswith("_labelTrainIds.png")]
    if prepared:
        file_values, ending, masks = list(range(171)), "_labelTrainIds.png", prepared
        expected = "a prepared mask of coco-stuff holds 0 to 170 and 255"
    else:
        file_values = [value for value in range(182) if value not in _NOT_IN_STUFF]
        ending, expected = ".png", "a mask of coco-stuff holds the numbers of COCO's categories less one, and 255"
        masks = [mask for mask in masks if "TrainIds" not in mask.name]
        if not masks:
            raise InputError(f"no pixel maps in {folder}: expected {layout}")
    reader = _Files(_coco_pairs(root, split, masks, ending, layout), _table(file_values), expected)
    return _published("coco-stuff", split, names, reader, file_values)


def _ade20k(given: Path, split: str | None, names: Names) -> SegmentationSet:
    split = _SPLITS["ade20k"].get(split or "val", split or "")
    layout = _ADE_LAYOUT.format(split=split)
    root = _root(given, ["ADEChallengeData2016"], "annotations", layout)
    masks = _found(root / "annotations" / split, "*.png", layout)
    pairs = [(mask.stem, root / "images" / split / f"{mask.stem}.jpg", mask) for mask in masks]
    _all_there([image for _, image, _ in pairs], layout)
    file_values = range(1, 151)
    reader = _Files(pairs, _table(file_values, [0]), "a mask of ade20k holds 1 to 150, 0 for everything else, and 255")
    return _published("ade20k", split, names, reader, file_values)


def _cityscapes(root: Path, split: str | None, names: Names) -> SegmentationSet:
    split = split or "val"
    layout, ending = _CITY_LAYOUT.format(split=split), "_gtFine_labelIds.png"
    masks = _found(root / "gtFine" / split, f"*/*{ending}", layout)
    images = root / "leftImg8bit" / split
    pairs = []
    for mask in masks:
        stem = mask.name.removesuffix(ending)
        pairs.append((stem, images / mask.parent.name / f"{stem}_leftImg8bit.png", mask))
    _all_there([image for _, image, _ in pairs], layout)
    others = [value for value in range(_CITY_MOST + 1) if value not in _CITY_IDS]
    reader = _Files(pairs, _table(_CITY_IDS, others), f"a mask of Cityscapes' ids holds 0 to {_CITY_MOST} and 255")
    palette = np.zeros((256, 3), np.uint8)
    palette[list(_CITY_IDS)] = [list(bytes.fromhex(colour)) for colour in _CITY_COLOURS.split()]
    return _published("cityscapes", split, names, reader, _CITY_IDS, palette)


def _folder(root: Path, split: str | None, names: Names) -> SegmentationSet:
    layout = _FOLDER_LAYOUT.format(split=split or "SPLIT")
    for needed in ("images", "masks"):
        if not (root / needed).is_dir():
            raise InputError(f"there is no folder {root / needed}: expected {layout}")
    if not (root / "classes.txt").is_file():
        raise InputError(
            f"there is no file {root / 'classes.txt'}, which names the classes one a line, in the order of their indices"
        )
    given = read_labels(root / "classes.txt")
    if len(given) > IGNORE:
        raise InputError(f"{root / 'classes.txt'} has {len(given)} classes: 8-bit masks hold at most {IGNORE}")
    pictures = _by_stem(root / "images", image_suffixes())
    stems = sorted(pictures) if split is None else _listed(root / f"{split}.txt", layout)
    if not stems:
        raise InputError(f"no pictures in {root / 'images'}: expected {layout}")
    # A list may give names with or without their suffix.
    whole = {_composed(path.name): stem for stem, path in pictures.items()}
    stems = [stem if stem in pictures else whole.get(stem, stem) for stem in stems]
    absent = [stem for stem in stems if stem not in pictures]
    if absent:
        raise InputError(
            f"{root / f'{split}.txt'} names {absent[0]}, which is not in {root / 'images'} ({len(absent)} of {len(stems)} names)"
        )
    masks = _by_stem(root / "masks", (".png",))
    pairs = [(stem, pictures[stem], masks.get(stem, root / "masks" / f"{stem}.png")) for stem in stems]
    _all_there([mask for _, _, mask in pairs], layout)
    has_background = given[0].name.casefold() == BACKGROUND
    if any(label.name.casefold() == BACKGROUND for label in given[1:]):
        raise InputError(
            f"{root / 'classes.txt'} names the background after other classes: it must be first, index 0 in the masks"
        )
    reader = _Files(
        pairs,
        _table(range(len(given))),
        f"classes.txt names {len(given)} classes, 0 to {len(given) - 1}, and 255 is no class",
    )
    return SegmentationSet(
        "folder",
        split or "all",
        tuple(label.name for label in given),
        given[1:] if has_background else given,
        has_background,
        tuple(range(len(given))),
        voc_palette(),
        reader,
    )


def _composed(name: str) -> str:
    """A name as it is compared: macOS takes letters and their accents apart in the names of files, other systems and editors do not."""
    return unicodedata.normalize("NFC", name)


def _by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """The files with one of these suffixes, by what comes before it. InputError where two share that."""
    found: dict[str, Path] = {}
    for path in _visible(folder, "*"):
        if path.suffix.lower() in suffixes and path.is_file():
            other = found.setdefault(_composed(path.stem), path)
            if other != path:
                raise InputError(
                    f"{other} and {path.name} have one name but for the suffix, so that it is open which of them a mask or name is of: "
                    "rename one, or take it out"
                )
    return found


def _scenes(where: str, split: str | None, count: int) -> list[SegmentationSet]:
    if where and where not in ("1", "2", "3"):
        raise InputError(f"scenes are scenes:1, scenes:2 or scenes:3, or scenes for all of them, got scenes:{where}")
    seed = split or str(SCENES_SEED)
    if not seed.isdecimal():
        raise InputError(f"the split of scenes is the seed they are made from, a whole number, got {split!r}")
    made = []
    for level in [int(where)] if where else sorted(LEVELS):
        labels, grounds = (
            tuple(Label(words[0], tuple(words[1:])) for words in every) for every in (LEVELS[level], BACKGROUNDS)
        )
        classes = (BACKGROUND, *(label.name for label in labels))
        made.append(
            SegmentationSet(
                f"scenes:{level}",
                seed,
                classes,
                labels,
                True,
                tuple(range(len(classes))),
                voc_palette(),
                _Scenes(int(seed), level, count),
                background_labels=grounds,
                background_in_mean=False,
            )
        )
    return made


_OPENERS: dict[str, Callable[[Path, str | None, Names], SegmentationSet]] = {
    **{kind: partial(_voc, kind=kind) for kind in ("voc", "voc20", "context", "context59")},
    "coco-object": _coco_object,
    "coco-stuff": _coco_stuff,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "folder": _folder,
}
_LAYOUTS = {
    "voc": _VOC_LAYOUT,
    "voc20": _VOC_LAYOUT,
    "context": _CONTEXT_LAYOUT,
    "context59": _CONTEXT_LAYOUT,
    "coco-object": _OBJECT_LAYOUT,
    "coco-stuff": _STUFF_LAYOUT,
    "ade20k": _ADE_LAYOUT,
    "cityscapes": _CITY_LAYOUT,
    "folder": _FOLDER_LAYOUT,
}
