"""Pipelines under transformers' names: `groupvit_common.segmentation.pipelines` holds what is not PyTorch."""

from pathlib import Path
from typing import Any

import torch

from groupvit_common.segmentation.pipelines import (
    BaseImageClassification,
    BaseImageSegmentation,
    BasePipeline,
    check_model,
    pipeline_of,
)
from groupvit_torch.checkpoint import usable_device
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter

__all__ = ["ImageSegmentationPipeline", "Pipeline", "ZeroShotImageClassificationPipeline", "pipeline"]


class Pipeline(BasePipeline):
    __doc__ = BasePipeline.__doc__
    framework = "pt"
    segmenter_class = Segmenter

    @classmethod
    def load_model(cls, name: str | Path, device: str | None, **keywords: Any) -> GroupViTModel:
        return GroupViTModel.from_pretrained(name, device=Segmenter._device(device), **keywords)

    @classmethod
    def _placed(cls, model: Any, device: str | None) -> GroupViTModel:
        check_model(model, GroupViTModel)
        return model if device is None else model.to(usable_device(device))

    @property
    def device(self) -> torch.device:
        return self.model.device


class ZeroShotImageClassificationPipeline(BaseImageClassification, Pipeline):
    __doc__ = BaseImageClassification.__doc__


class ImageSegmentationPipeline(BaseImageSegmentation, Pipeline):
    __doc__ = BaseImageSegmentation.__doc__


pipeline = pipeline_of(
    {
        "zero-shot-image-classification": ZeroShotImageClassificationPipeline,
        "zero-shot-image-segmentation": ImageSegmentationPipeline,
        "image-segmentation": ImageSegmentationPipeline,
    }
)
