"""Settings of the data pipeline: the sources of captioned images and their augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import get_templates

SourceKind = Literal["webdataset", "table", "folder"]
Interpolation = Literal["bilinear", "bicubic"]

_KINDS, _INTERPOLATIONS = get_args(SourceKind), get_args(Interpolation)


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One set of captioned images.

    kind and path:
        "webdataset": tar shards, `"cc3m/{00000..00331}.tar"` or a pattern such as `"cc3m/*.tar"`, with an image and a
            caption under one key, `000012.jpg` and `000012.txt` (img2dataset's layout);
        "table": a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a pattern of such, with a column of image files and
            one of captions;
        "folder": a folder with images and captions side by side, `cat.jpg` and `cat.txt`, in folders inside it too.
    weight: how often its samples occur in an epoch: 1 once, 2 twice, 0.5 every second epoch.
    caption_suffix: of a shard's or folder's captions, without the dot.
    image_column, caption_column: of a table. root: folder of a table's relative image paths; None: the table's own.
    """

    kind: SourceKind
    path: str
    weight: float = 1.0
    caption_suffix: str = "txt"
    image_column: str = "image"
    caption_column: str = "caption"
    root: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"kind of a data source must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        if not self.path:
            raise InputError(f"a data source of kind {self.kind} needs a path, got an empty one")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"weight of {self.path} must be greater than 0, got {self.weight!r}")
        if not self.caption_suffix or self.caption_suffix.startswith("."):
            raise InputError(f"caption_suffix is written without a dot, such as 'txt', got {self.caption_suffix!r}")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data and augmentation of a training run; the defaults are the paper's, in the authors' settings.

    image_size: side of the square given to the model, in pixels.
    crop_scale: smallest and largest fraction of an image's area that a random crop has; None: no random crop, the
        middle of the image with its shorter side resized to `image_size`.
    interpolation: of the resize. flip: probability of mirroring.
    rand_augment: operations drawn for each image, 0: none. rand_augment_magnitude, rand_augment_std: their strength, 0
        to 10, normally distributed. (timm's "rand-m9-mstd0.5-inc1" is 2, 9 and 0.5.)
    color_jitter: brightness, contrast and saturation change by up to this fraction, where `rand_augment` is 0. (The
        authors set 0.4 beside RandAugment; timm, which they use, then leaves the jitter out.)
    erasing: probability of replacing a rectangle by noise.
    shuffle_buffer: samples among which the order is random: shards, in random order, are read until there are as many.
        0: no shuffling at all.
    prompts: sentences about nouns of each caption, for the multi-label loss; 0: none. templates: a set by name or size
        ("eighty"), or sentences with `{}`.
    max_bad_share: fraction of samples (and of shards) that may be unusable; beyond it training stops. 1: never.
    max_pixels: larger images are counted as unusable and not decoded.
    """

    sources: tuple[SourceSettings, ...]
    image_size: int = 224
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5
    rand_augment: int = 2
    rand_augment_magnitude: float = 9.0
    rand_augment_std: float = 0.5
    color_jitter: float = 0.4
    erasing: float = 0.25
    shuffle_buffer: int = 10_000
    prompts: int = 3
    templates: str | int | tuple[str, ...] = "eighty"
    max_bad_share: float = 0.01
    max_pixels: int = 89_478_485  # above which Pillow warns of a decompression bomb

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("there are no data sources; name at least one, such as shards, a table or a folder")
        for name in ("image_size", "max_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("rand_augment", "shuffle_buffer", "prompts", "rand_augment_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("flip", "color_jitter", "erasing", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if not 0 <= self.rand_augment_magnitude <= 10:
            raise InputError(f"rand_augment_magnitude must lie between 0 and 10, got {self.rand_augment_magnitude!r}")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"crop_scale must be two fractions of the area, the smaller one first, or None, got {self.crop_scale!r}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise InputError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")
        get_templates(self.templates)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates, each with one `{}`."""
        return get_templates(self.templates)
