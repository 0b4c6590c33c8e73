"""COCO-Stuff 164k: 171 classes, from the published pixel maps or from prepared masks."""

from __future__ import annotations

from pathlib import Path

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.coco_object import image_pairs
from groupvit_common.evaluation.datasets.mask_files import MaskFiles, find_files
from groupvit_common.evaluation.datasets.registry import DatasetSpec
from groupvit_common.evaluation.datasets.segmentation import Names, SegmentationSet, published_set

_PREPARED = "_labelTrainIds.png"
# The pixel maps hold a category's number less one; these numbers below 182 belong to no category.
_NO_CATEGORY = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens the prepared masks where they exist, else the published pixel maps."""
    split = spec.split_name(split)
    layout, annotations = spec.layout_of(split), folder / "annotations" / split
    found = find_files(annotations, "*.png", layout)
    masks = [mask for mask in found if mask.name.endswith(_PREPARED)]
    if masks:
        file_values, ending = list(range(171)), _PREPARED
        expected = "a prepared mask of coco-stuff holds 0 to 170 and 255"
    else:
        file_values, ending = [value for value in range(182) if value not in _NO_CATEGORY], ".png"
        expected = "a mask of coco-stuff holds the numbers of COCO's categories less one, and 255"
        masks = [mask for mask in found if "TrainIds" not in mask.name]
        if not masks:
            raise InputError(f"no pixel maps in {annotations}: expected {layout}")
    reader = MaskFiles(image_pairs(folder, split, masks, ending, layout), file_values, expected)
    return published_set(spec, split, names, reader, file_values)
