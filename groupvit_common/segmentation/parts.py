"""The parts of a model as files of their own: names, inputs and outputs, whatever format they are exported to.

Axes: B images, C channels, H W pixels, h w patches, N texts, T tokens, L labels, G groups, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.segmentation.options import OPTIONS, SegmentationOptions
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.windows import Integers

PartName = Literal["image_encoder", "text_encoder", "segmenter"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file. inputs, outputs: dtype and axes by name."""

    name: PartName
    inputs: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, str]]

    def of(self, settings: ProgramSettings) -> Part:
        """Returns the part with the inputs that it has under these settings."""
        inputs = dict(self.inputs)
        if settings.labels is not None:
            inputs.pop("text_embeds", None)
        if settings.image_processor is not None and "pixel_values" in inputs:
            del inputs["pixel_values"]
            inputs = {**_IMAGES, **inputs}
        return replace(self, inputs=inputs)


_IMAGES = {"images": ("uint8", "B H W 3")}
_PIXELS = {"pixel_values": ("float32", "B C H W")}
PARTS = {
    "image": Part(
        name="image_encoder",
        inputs=_PIXELS,
        outputs={
            "image_embeds": ("float32", "B E"),
            "group_embeds": ("float32", "B G E"),
            "grouping": ("float32", "B G h w"),
        },
    ),
    "text": Part(
        name="text_encoder",
        inputs={"input_ids": ("int64", "N T"), "attention_mask": ("int64", "N T")},
        outputs={"text_embeds": ("float32", "N E")},
    ),
    "segment": Part(
        name="segmenter",
        inputs={**_PIXELS, "text_embeds": ("float32", "L E")},
        outputs={"label_map": ("int32", "B H W"), "scores": ("float32", "B H W"), "group_map": ("int32", "B H W")},
    ),
}
"""By the names that `parts` takes.

Embeddings have length 1. `grouping` is a patch's probability of each group, `label_map` the label of each pixel by its
most probable group, as a number (see `BakedLabels.values`), `scores` that label's affinity to the group, 0 to 1: what a
background threshold is compared with.
"""


@dataclass(frozen=True, eq=False)
class BakedLabels:
    """Labels that a segmenter has inside, instead of its input `text_embeds`.

    Attributes:
        names: by the value in a label map.
        embeds: `[L, E]`, or several of each label, `[L, K, E]`.
        values: `[L]`, of each label in a label map.
        background: groups of a lower score are background, value 0; None: there is no such threshold.
    """

    names: tuple[str, ...]
    embeds: Floats
    values: Integers
    background: float | None = None


LABEL_OPTIONS = ("templates", "normalize_prompts", "synonyms", "background")
"""Those of `SegmentationOptions` that need labels in the program."""
PROGRAM_OPTIONS = (*LABEL_OPTIONS, "assignment", "temperature", "top_k", "shorter_side")
"""Those that a program may have: it sees an image once, as a whole."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ProgramSettings:
    """The contents of a program besides a part of the model.

    Attributes:
        options: how pixels get labels.
        labels: take the place of the input `text_embeds`.
        image_processor: prepares images, `images`, RGB, uint8 `[B, H, W, 3]` of any size, which take the place of the
            input `pixel_values`. Maps then have the images' height and width.
    """

    options: SegmentationOptions = field(default_factory=SegmentationOptions)
    labels: BakedLabels | None = None
    image_processor: CLIPImageProcessor | None = None


def check_program_options(
    options: SegmentationOptions, parts: Sequence[Part], *, has_labels: bool, preprocess: bool
) -> None:
    """Raises `InputError` for an option that programs of these parts do not have."""
    given = [name for name, option in OPTIONS.items() if getattr(options, name) != option.default]
    names = {part.name for part in parts}
    for name in given:
        if name not in PROGRAM_OPTIONS:
            raise InputError(f"an exported segmenter sees an image once, as a whole: leave {name} out")
        if name in LABEL_OPTIONS and not has_labels:
            raise InputError(f"{name} is about labels in the segmenter: pass labels too")
        if name == "shorter_side" and not preprocess:
            raise InputError("shorter_side is about images that the file resizes: pass preprocess too")
        if name in ("assignment", "temperature", "top_k") and "segmenter" not in names:
            raise InputError(f"{name} is about the segmenter: add segment to parts")
    if preprocess and names == {"text_encoder"}:
        raise InputError("preprocess is about images: add image or segment to parts")


def check_image_processor(processor: CLIPImageProcessor, channels: int) -> None:
    """Raises `InputError` for an image processor that is no program."""
    if channels != 3:
        raise InputError(f"preprocess is for images in RGB, and this model has {channels} channels: leave it out")
    if processor.resample != Image.Resampling.BICUBIC:
        raise InputError(
            f"preprocess resizes bicubically, and this image processor by Pillow's filter {processor.resample}: leave "
            "preprocess out, or set resample to 3"
        )


def pixel_scale(processor: CLIPImageProcessor) -> tuple[float, list[float], list[float]]:
    """Returns factor, mean and std of channels: pixel values are `(factor * level - mean) / std`."""
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return factor, [0.0] * 3, [1.0] * 3
    return factor, [*processor.image_mean], [*processor.image_std]


def parse_parts(parts: str | Sequence[str], *, has_groups: bool, has_labels: bool) -> list[Part]:
    """Returns the parts of "image,text,segment", or of a list of these names.

    Args:
        has_groups: whether the model has groups. has_labels: whether labels are to be inside.

    Raises:
        InputError: an unknown or repeated part, or none; or one that this model cannot have.
    """
    names = [name.strip() for name in parts.split(",")] if isinstance(parts, str) else list(parts)
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(f"parts must be some of {', '.join(PARTS)}, each once, got {', '.join(names) or 'none'!r}")
    if has_labels and "segment" not in names:
        raise InputError("labels are put into the segmenter: add segment to parts, or leave labels out")
    if "segment" in names and not has_groups:
        raise InputError("this model has no groups to segment by: leave segment out of parts")
    return [PARTS[name] for name in PARTS if name in names]
