"""The parts of a model as files of their own: names, inputs and outputs, whatever format they are exported to.

Axes: B images, C channels, H W pixels, h w patches, N texts, T tokens, L labels, G groups, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from groupvit_common.errors import InputError
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.windows import Integers

PartName = Literal["image_encoder", "text_encoder", "segmenter"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file. inputs, outputs: dtype and axes by name."""

    name: PartName
    inputs: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, str]]


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
