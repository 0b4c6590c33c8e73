"""PASCAL VOC 2012 and PASCAL Context, with and without their backgrounds."""

from pathlib import Path

from groupvit_common.evaluation.datasets.mask_files import MaskFiles, check_all_exist, find_root, read_list
from groupvit_common.evaluation.datasets.registry import DatasetSpec, Names
from groupvit_common.evaluation.datasets.segmentation import (
    SegmentationSet,
    class_names,
    published_set,
    voc_palette,
)


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens a set whose split is a list of names."""
    split = spec.split_name(split)
    layout = spec.layout_of(split)
    # Context's masks, made by mmsegmentation's preparation, may have any palette.
    ending, palette = ("Context", None) if spec.classes == "context" else ("", voc_palette())
    masks = "SegmentationClass" + ending
    root = find_root(folder, masks, spec, layout)
    pairs = [
        (name, root / "JPEGImages" / f"{name}.jpg", root / masks / f"{name}.png")
        for name in read_list(root / "ImageSets" / f"Segmentation{ending}" / f"{split}.txt", layout)
    ]
    check_all_exist([path for _, *paths in pairs for path in paths], layout)
    count = len(class_names(spec.classes))
    first = 1 if spec.drops_background else 0
    reader = MaskFiles(
        pairs,
        range(first, count),
        f"a mask of {spec.name} holds 0 to {count - 1} and 255",
        ignored=range(first),
        palette=palette,
    )
    return published_set(spec, split, names, reader, range(first, count))
