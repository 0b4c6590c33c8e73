"""COCO-Object, 80 objects and background, and COCO-Stuff 164k, 171 classes: published or prepared masks."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.coco_instances import Instances
from groupvit_common.evaluation.datasets.mask_files import (
    MaskFiles,
    check_all_exist,
    find_files,
    stored_rgb,
    visible_files,
)
from groupvit_common.evaluation.datasets.registry import DatasetSpec, Names
from groupvit_common.evaluation.datasets.segmentation import (
    Mask,
    Reader,
    SegmentationSet,
    class_names,
    published_set,
)

_PREPARED = {"coco-object": "_instanceTrainIds.png", "coco-stuff": "_labelTrainIds.png"}
# The published maps of COCO-Stuff hold a category's number less one; these numbers below 182 belong to no category.
_NO_CATEGORY = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens the prepared masks where they exist, else what COCO publishes: a file of instances, or maps of stuff."""
    split = spec.split_name(split)
    layout, annotations, ending = spec.layout_of(split), folder / "annotations" / split, _PREPARED[spec.name]
    images = next((path for path in (folder / "images" / split, folder / split) if path.is_dir()), None)
    masks, count = visible_files(annotations, f"*{ending}"), len(class_names(spec.name))
    file_values = list(range(count))
    expected = f"a prepared mask of {spec.name} holds 0 to {count - 1} and 255"
    reader: Reader
    if not masks and spec.name == "coco-object":
        instances = folder / "annotations" / f"instances_{split}.json"
        if not instances.is_file():
            raise InputError(f"there is neither {instances} nor a mask *{ending} in {annotations}: expected {layout}")
        reader = _InstanceMasks(
            instances, _existing(images, folder, split, layout), class_names(spec.name, "set"), layout
        )
        if not reader.names:
            raise InputError(f"there are no images in {instances}")
        return published_set(spec, split, names, reader, file_values)
    if not masks:
        file_values, ending = [value for value in range(182) if value not in _NO_CATEGORY], ".png"
        expected = "a mask of coco-stuff holds the numbers of COCO's categories less one, and 255"
        masks = [mask for mask in find_files(annotations, "*.png", layout) if "TrainIds" not in mask.name]
        if not masks:
            raise InputError(f"no pixel maps in {annotations}: expected {layout}")
    images = _existing(images, folder, split, layout)
    stems = [mask.name.removesuffix(ending) for mask in masks]
    pairs = [(stem, images / f"{stem}.jpg", mask) for stem, mask in zip(stems, masks, strict=True)]
    check_all_exist([image for _, image, _ in pairs], layout)
    return published_set(spec, split, names, MaskFiles(pairs, file_values, expected), file_values)


def _existing(images: Path | None, root: Path, split: str, layout: str) -> Path:
    if images is None:
        raise InputError(f"there is no folder images/{split} or {split} in {root}: expected {layout}")
    return images


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

    def image(self, index: int, max_pixels: int) -> Image.Image:
        return stored_rgb(self._image_path(index), max_pixels)

    def mask(self, index: int) -> Mask:
        return self._instances.mask(index)

    def describe(self, index: int) -> str:
        return f"{self._image_path(index)} in {self._path}"
