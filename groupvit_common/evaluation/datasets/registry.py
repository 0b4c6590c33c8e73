"""The registry of evaluation sets: a set is one row here and one module of this package that opens it.

The module of a segmentation set has one of two functions:

- a set with files: `open_dataset(spec, folder, split, names) -> SegmentationSet`, `folder` a `Path` that exists;
- a generated set (without a `layout`): `open_dataset(spec, variant, split, count) -> list[SegmentationSet]`, `variant`
  the text behind the colon, "" for all of them, `count` the number of images or None.

`split` is the user's, None for the default. `names` is one of `NAMES`.

Only the standard library is imported, since the command line's help is made from these rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

ProtocolName = Literal["paper", "tcl", "native"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
"""Names of the protocols, the usual one first."""

Names = Literal["authors", "set"]
NAMES: tuple[Names, ...] = get_args(Names)
"""The words for a set's classes: "authors", as in GroupViT's evaluation; "set", its own, as in mmsegmentation."""


@dataclass(frozen=True)
class DatasetSpec:
    """A data set for evaluation.

    Attributes:
        name: the name before the colon of `NAME:DIR`.
        help: one line about it.
        module: the module of this package whose `open_dataset` opens it.
        layout: its files in words, with `{split}` for the part of the set; "" for a set that has no files.
        classes: the table of its class names in `segmentation_classes.toml`; "" where the set has its own.
        drops_background: the table's background is not judged.
        threshold: the authors' background threshold; None for a set without one.
        protocol: the default protocol.
        splits: the set's own names of "val" and "train".
        parents: folders below DIR in which the set may lie.
        task: the task by which it measures a model.
    """

    name: str
    help: str
    module: str
    layout: str = ""
    classes: str = ""
    drops_background: bool = False
    threshold: float | None = None
    protocol: ProtocolName = PROTOCOLS[0]
    splits: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    task: Literal["segmentation", "classification"] = "segmentation"

    @property
    def usage(self) -> str:
        """The name as the command line takes it."""
        return f"{self.name}:DIR" if self.layout else self.name

    def split_name(self, split: str | None) -> str:
        """Returns the set's own name of a split; None is the one for validation."""
        return self.splits.get(split or "val", split or "val")

    def layout_of(self, split: str | None) -> str:
        """Returns the set's files in words, for a split; None leaves it open."""
        return self.layout.format(split=split or "SPLIT")


_VOC = "JPEGImages/NAME.jpg, SegmentationClass/NAME.png and ImageSets/Segmentation/{split}.txt in VOC2012"
_CONTEXT = (
    "JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png and ImageSets/SegmentationContext/{split}.txt in VOC2010"
)
_COCO = "images/{split}/NAME.jpg (or {split}/NAME.jpg) and annotations/"
_OBJECT = _COCO + "instances_{split}.json or annotations/{split}/NAME_instanceTrainIds.png"
_STUFF = _COCO + "{split}/NAME.png or NAME_labelTrainIds.png"
_ADE = "images/{split}/NAME.jpg and annotations/{split}/NAME.png in ADEChallengeData2016"
_CITYSCAPES = "leftImg8bit/{split}/CITY/NAME_leftImg8bit.png and gtFine/{split}/CITY/NAME_gtFine_labelIds.png"
_FOLDER = "images/NAME.jpg, masks/NAME.png and classes.txt, and {split}.txt with names where a split is requested"
_IMAGENET = "{split}/CLASS/*.jpg (or CLASS/*.jpg) with names in classes.txt, "
_IMAGENET += "or shards DIR/name-{{000..049}}.tar of .jpg and .cls"
_COCO_SPLITS = {"val": "val2017", "train": "train2017"}
_VOC_PARENTS, _CONTEXT_PARENTS = ("VOC2012", "VOCdevkit/VOC2012"), ("VOC2010", "VOCdevkit/VOC2010")

IMAGENET = DatasetSpec(
    "imagenet", "images in folders by class, for classification", "classification", _IMAGENET, task="classification"
)

# fmt: off
_ROWS = (
    DatasetSpec("voc", "PASCAL VOC 2012, 20 classes and background", "voc", _VOC, "voc",
                threshold=0.95, parents=_VOC_PARENTS),
    DatasetSpec("voc20", "PASCAL VOC 2012 without its background", "voc", _VOC, "voc",
                drops_background=True, parents=_VOC_PARENTS),
    DatasetSpec("context", "PASCAL Context, 59 classes and background", "voc", _CONTEXT, "context",
                threshold=0.35, parents=_CONTEXT_PARENTS),
    DatasetSpec("context59", "PASCAL Context without its background", "voc", _CONTEXT, "context",
                drops_background=True, parents=_CONTEXT_PARENTS),
    DatasetSpec("coco-object", "the 80 objects of COCO and background", "coco", _OBJECT, "coco-object",
                threshold=0.95, splits=_COCO_SPLITS),
    DatasetSpec("coco-stuff", "COCO-Stuff 164k, 171 classes", "coco", _STUFF, "coco-stuff",
                splits=_COCO_SPLITS),
    DatasetSpec("ade20k", "ADE20K, 150 classes", "ade20k", _ADE, "ade20k",
                splits={"val": "validation", "train": "training"}, parents=("ADEChallengeData2016",)),
    DatasetSpec("cityscapes", "Cityscapes, 19 classes", "cityscapes", _CITYSCAPES, "cityscapes"),
    DatasetSpec("folder", "images, index masks and a list of classes", "folder", _FOLDER, threshold=0.95),
    DatasetSpec("scenes", "synthetic scenes, three levels", "scenes", protocol="native"),
    IMAGENET,
)
# fmt: on
DATASETS: Mapping[str, DatasetSpec] = MappingProxyType({spec.name: spec for spec in _ROWS})
"""The sets by name. A folder of one's own has VOC's threshold."""


def names_of_sets(task: str) -> list[str]:
    """Returns the names of the sets of a task."""
    return [spec.name for spec in _ROWS if spec.task == task]


def find_spec(spelled: str) -> DatasetSpec | None:
    """Returns the row of a set as the command line takes it, such as "voc:DIR"; None for an unknown one."""
    return DATASETS.get(spelled.partition(":")[0])
