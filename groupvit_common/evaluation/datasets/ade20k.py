"""ADE20K (SceneParsing): 150 classes, stored as 1 to 150."""

from pathlib import Path

from groupvit_common.evaluation.datasets.mask_files import MaskFiles, check_all_exist, find_files, find_root
from groupvit_common.evaluation.datasets.registry import DatasetSpec, Names
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, published_set


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens a split, whose images are those of its masks."""
    split = spec.split_name(split)
    layout = spec.layout_of(split)
    root = find_root(folder, "annotations", spec, layout)
    masks = find_files(root / "annotations" / split, "*.png", layout)
    pairs = [(mask.stem, root / "images" / split / f"{mask.stem}.jpg", mask) for mask in masks]
    check_all_exist([image for _, image, _ in pairs], layout)
    file_values = range(1, 151)
    expected = "a mask of ade20k holds 1 to 150, 0 for everything else, and 255"
    return published_set(spec, split, names, MaskFiles(pairs, file_values, expected, ignored=[0]), file_values)
