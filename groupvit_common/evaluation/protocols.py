"""Protocols of zero-shot evaluation: the settings with which a set is measured."""

from dataclasses import dataclass
from typing import Any

from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.registry import PROTOCOLS, Names, ProtocolName, find_spec
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.predictor import BaseSegmenter


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings(SegmentationOptions):
    """Settings of a set's evaluation: the options of segmentation, and `names`, the class names of `open_sets`."""

    names: Names = "authors"

    def segmenter(self, base: BaseSegmenter, batch_size: int) -> BaseSegmenter:
        """Returns a segmenter of the same model with these settings."""
        options = self.to_dict()
        del options["names"]
        return type(base)(base.model, base.processor, batch_size=batch_size, max_pixels=base.max_pixels, **options)

    def to_dict(self) -> dict[str, Any]:
        return {"names": self.names, **super().to_dict()}


def default_protocol(kind: str) -> ProtocolName:
    """Returns the default protocol of a set: the paper's, but for scenes, which have their model's size."""
    spec = find_spec(kind)
    return PROTOCOLS[0] if spec is None else spec.protocol


def protocol_settings(protocol: ProtocolName, kind: str) -> ProtocolSettings:
    """Returns the settings of a protocol for a kind of set.

    "paper": the authors' evaluation. "tcl": the same with mmsegmentation's class names, as in TCL's unified protocol.
    "native": the defaults of `Segmenter`, with the authors' class names and thresholds.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    spec = find_spec(kind)
    if spec is not None and spec.task == "classification":
        return (
            ProtocolSettings() if protocol == "native" else ProtocolSettings(templates="seven", normalize_prompts=False)
        )
    threshold = None if spec is None else spec.threshold
    if protocol == "native":
        return ProtocolSettings(background=threshold)
    return ProtocolSettings(
        names="set" if protocol == "tcl" else "authors",
        normalize_prompts=False,
        background=threshold,
        assignment="hard",
        top_k=5,
        shorter_side=448,
        window=448,
        stride=224,
    )
