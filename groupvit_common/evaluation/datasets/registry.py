"""The registry of evaluation sets: a set is one row here and one module of this package that opens it.

Only the standard library is imported, since the command line's help is made from these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

ProtocolName = Literal["paper", "tcl", "native"]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set for evaluation.

    Attributes:
        name: the name before the colon of `NAME:DIR`.
        help: one line about it.
        layout: its files in words, with `{split}` for the part of the set; "" for a set that has no files.
        module: the module of this package whose `open_dataset` opens it.
        classes: the table of its class names in `segmentation_classes.toml`; "" where the set has its own.
        drops_background: the table's background is not judged.
        threshold: the authors' background threshold; None for a set without one.
        protocol: the default protocol.
        splits: the set's own names of "val" and "train".
        parents: folders below DIR in which the set may lie.
    """

    name: str
    help: str
    module: str
    layout: str = ""
    classes: str = ""
    drops_background: bool = False
    threshold: float | None = None
    protocol: ProtocolName = "paper"
    splits: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[str, ...] = ()

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


_VOC = DatasetSpec(
    name="voc",
    help="PASCAL VOC 2012, 20 classes and background",
    module="voc",
    layout="JPEGImages/NAME.jpg, SegmentationClass/NAME.png and ImageSets/Segmentation/{split}.txt in VOC2012",
    classes="voc",
    threshold=0.95,
    parents=("VOC2012", "VOCdevkit/VOC2012"),
)
_CONTEXT = DatasetSpec(
    name="context",
    help="PASCAL Context, 59 classes and background",
    module="voc",
    layout="JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png and ImageSets/SegmentationContext/{split}.txt "
    "in VOC2010",
    classes="context",
    threshold=0.35,
    parents=("VOC2010", "VOCdevkit/VOC2010"),
)
_COCO_IMAGES = "images/{split}/NAME.jpg (or {split}/NAME.jpg)"
_COCO_SPLITS = {"val": "val2017", "train": "train2017"}

DATASETS: Mapping[str, DatasetSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _VOC,
            replace(
                _VOC,
                name="voc20",
                help="PASCAL VOC 2012 without its background",
                drops_background=True,
                threshold=None,
            ),
            _CONTEXT,
            replace(
                _CONTEXT,
                name="context59",
                help="PASCAL Context without its background",
                drops_background=True,
                threshold=None,
            ),
            DatasetSpec(
                name="coco-object",
                help="the 80 objects of COCO and background",
                module="coco_object",
                layout=f"{_COCO_IMAGES} and annotations/instances_{{split}}.json "
                "or annotations/{split}/NAME_instanceTrainIds.png",
                classes="coco-object",
                threshold=0.95,
                splits=_COCO_SPLITS,
            ),
            DatasetSpec(
                name="coco-stuff",
                help="COCO-Stuff 164k, 171 classes",
                module="coco_stuff",
                layout=f"{_COCO_IMAGES} and annotations/{{split}}/NAME.png or NAME_labelTrainIds.png",
                classes="coco-stuff",
                splits=_COCO_SPLITS,
            ),
            DatasetSpec(
                name="ade20k",
                help="ADE20K, 150 classes",
                module="ade20k",
                layout="images/{split}/NAME.jpg and annotations/{split}/NAME.png in ADEChallengeData2016",
                classes="ade20k",
                splits={"val": "validation", "train": "training"},
                parents=("ADEChallengeData2016",),
            ),
            DatasetSpec(
                name="cityscapes",
                help="Cityscapes, 19 classes",
                module="cityscapes",
                layout="leftImg8bit/{split}/CITY/NAME_leftImg8bit.png and gtFine/{split}/CITY/NAME_gtFine_labelIds.png",
                classes="cityscapes",
            ),
            DatasetSpec(
                name="folder",
                help="images, index masks and a list of classes",
                module="folder",
                layout="images/NAME.jpg, masks/NAME.png and classes.txt, "
                "and {split}.txt with names where a split is requested",
                threshold=0.95,
            ),
            DatasetSpec(name="scenes", help="synthetic scenes, three levels", module="scenes", protocol="native"),
        )
    }
)
"""The segmentation sets by name. A folder of one's own has VOC's threshold."""

IMAGENET = DatasetSpec(
    name="imagenet",
    help="ImageNet, or other images in folders by class, for classification",
    module="classification",
    layout="{split}/CLASS/*.jpg (or CLASS/*.jpg) with names in classes.txt, "
    "or shards DIR/name-{{000..049}}.tar of .jpg and .cls",
)
"""The classification set."""
