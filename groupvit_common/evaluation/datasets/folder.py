"""A set of one's own: a folder of images, a folder of index masks, and a list of classes."""

from pathlib import Path

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.mask_files import (
    MaskFiles,
    check_all_exist,
    composed,
    files_by_stem,
    read_list,
)
from groupvit_common.evaluation.datasets.registry import DatasetSpec, Names
from groupvit_common.evaluation.datasets.segmentation import IGNORE, SegmentationSet, voc_palette
from groupvit_common.preprocessing.images import image_suffixes
from groupvit_common.preprocessing.prompts import Label, read_labels
from groupvit_common.segmentation.result import BACKGROUND


def open_dataset(spec: DatasetSpec, folder: Path, split: str | None, names: Names) -> SegmentationSet:
    """Opens all images of the folder, or those that `{split}.txt` lists; `names` makes no difference."""
    layout = spec.layout_of(split)
    for needed in ("images", "masks"):
        if not (folder / needed).is_dir():
            raise InputError(f"there is no folder {folder / needed}: expected {layout}")
    labels = _read_classes(folder / "classes.txt")
    images = files_by_stem(folder / "images", image_suffixes())
    stems = sorted(images) if split is None else _listed(folder, split, images, layout)
    if not stems:
        raise InputError(f"no images in {folder / 'images'}: expected {layout}")
    masks = files_by_stem(folder / "masks", (".png",))
    pairs = [(stem, images[stem], masks.get(stem, folder / "masks" / f"{stem}.png")) for stem in stems]
    check_all_exist([mask for _, _, mask in pairs], layout)
    has_background = labels[0].name.casefold() == BACKGROUND
    file_values = range(len(labels))
    expected = f"classes.txt names {len(labels)} classes, 0 to {len(labels) - 1}, and 255 is no class"
    return SegmentationSet(
        spec.name,
        split or "all",
        tuple(label.name for label in labels),
        labels[has_background:],
        has_background,
        tuple(file_values),
        voc_palette(),
        MaskFiles(pairs, file_values, expected),
    )


def _read_classes(path: Path) -> tuple[Label, ...]:
    if not path.is_file():
        raise InputError(f"there is no file {path}, which names the classes one a line, in the order of their indices")
    labels = read_labels(path)
    if len(labels) > IGNORE:
        raise InputError(f"{path} has {len(labels)} classes: 8-bit masks hold at most {IGNORE}")
    if any(label.name.casefold() == BACKGROUND for label in labels[1:]):
        raise InputError(f"{path} names the background after other classes: it must be first, index 0 in the masks")
    return labels


def _listed(folder: Path, split: str, images: dict[str, Path], layout: str) -> list[str]:
    """Returns the stems in the list of a split, whose names may have suffixes or not."""
    stems = {composed(path.name): stem for stem, path in images.items()}
    names = read_list(folder / f"{split}.txt", layout)
    found = [name if name in images else stems.get(name, name) for name in names]
    absent = [name for name in found if name not in images]
    if absent:
        raise InputError(
            f"{folder / f'{split}.txt'} names {absent[0]}, which is not in {folder / 'images'} "
            f"({len(absent)} of {len(names)} names)"
        )
    return found
