"""COCO-Object: the 80 objects and background, from COCO's file of instances or from prepared masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.coco_instances import Instances
from groupvit_common.evaluation.datasets.mask_files import MaskFiles, check_all_exist, stored_rgb, visible_files
from groupvit_common.evaluation.datasets.registry import DatasetSpec
from groupvit_common.evaluation.datasets.segmentation import (
    Mask,
    Names,
    Reader,
    SegmentationSet,
    class_names,
    published_set,
)

_PREPARED = "_instanceTrainIds.png"


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens the prepared masks where they exist, else the file of instances."""
    split = spec.split_name(split)
    layout = spec.layout_of(split)
    masks, instances = folder / "annotations" / split, folder / "annotations" / f"instances_{split}.json"
    prepared = visible_files(masks, f"*{_PREPARED}")
    reader: Reader
    if prepared:
        expected = "a prepared mask of coco-object holds 0 to 80 and 255"
        reader = MaskFiles(image_pairs(folder, split, prepared, _PREPARED, layout), range(81), expected)
    elif instances.is_file():
        reader = _InstanceMasks(instances, image_folder(folder, split, layout), class_names(spec.name, "set"), layout)
    else:
        raise InputError(f"there is neither {instances} nor a mask *{_PREPARED} in {masks}: expected {layout}")
    if not reader.names:
        raise InputError(f"there are no images in {instances}")
    return published_set(spec, split, names, reader, range(81))


def image_folder(root: Path, split: str, layout: str) -> Path:
    """Returns the folder of a split's images."""
    for folder in (root / "images" / split, root / split):
        if folder.is_dir():
            return folder
    raise InputError(f"there is no folder images/{split} or {split} in {root}: expected {layout}")


def image_pairs(
    root: Path, split: str, masks: Sequence[Path], ending: str, layout: str
) -> list[tuple[str, Path, Path]]:
    """Returns the names, images and masks of a split, given its mask files, whose names end in `ending`."""
    images = image_folder(root, split, layout)
    stems = [mask.name.removesuffix(ending) for mask in masks]
    pairs = [(stem, images / f"{stem}.jpg", mask) for stem, mask in zip(stems, masks, strict=True)]
    check_all_exist([image for _, image, _ in pairs], layout)
    return pairs


class _InstanceMasks:
    """Reads images, and paints their masks from COCO's `instances_*.json`."""

    def __init__(self, path: Path, folder: Path, classes: Sequence[str], layout: str) -> None:
        self._path, self._folder = path, folder
        self._instances = Instances(path, classes)
        self.names = tuple(image.name for image in self._instances.images)
        self.folders = (folder,)
        check_all_exist([self._image_path(index) for index in range(len(self.names))], layout)

    def _image_path(self, index: int) -> Path:
        return self._folder / self._instances.images[index].path

    def image(self, index: int) -> Image.Image:
        return stored_rgb(self._image_path(index))

    def mask(self, index: int) -> Mask:
        return self._instances.mask(index)

    def describe(self, index: int) -> str:
        return f"{self._image_path(index)} in {self._path}"
