"""Cityscapes: 19 classes, from the files of label ids."""

from pathlib import Path

import numpy as np

from groupvit_common.evaluation.datasets.mask_files import MaskFiles, check_all_exist, find_files
from groupvit_common.evaluation.datasets.registry import DatasetSpec, Names
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, published_set

_ENDING = "_gtFine_labelIds.png"
# The ids of the classes that are judged, in the order of their training ids, and their colours.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_COLOURS = (
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 "
    "005064 0000e6 770b20"
)


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens a split, whose images are those of its masks."""
    split = spec.split_name(split)
    layout = spec.layout_of(split)
    images = folder / "leftImg8bit" / split
    pairs = []
    for mask in find_files(folder / "gtFine" / split, f"*/*{_ENDING}", layout):
        stem = mask.name.removesuffix(_ENDING)
        pairs.append((stem, images / mask.parent.name / f"{stem}_leftImg8bit.png", mask))
    check_all_exist([image for _, image, _ in pairs], layout)
    ignored = [value for value in range(max(_IDS)) if value not in _IDS]
    reader = MaskFiles(pairs, _IDS, f"a mask of Cityscapes' ids holds 0 to {max(_IDS)} and 255", ignored=ignored)
    palette = np.zeros((256, 3), np.uint8)
    palette[list(_IDS)] = [list(bytes.fromhex(colour)) for colour in _COLOURS.split()]
    return published_set(spec, split, names, reader, _IDS, palette)
