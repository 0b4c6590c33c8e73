"""Pipelines under transformers' names: `groupvit_common.segmentation.pipelines` holds what is not Keras."""

from pathlib import Path
from typing import Any

import keras

from groupvit_common.errors import InputError
from groupvit_common.segmentation.pipelines import (
    BaseImageClassification,
    BaseImageSegmentation,
    BasePipeline,
    check_model,
    pipeline_of,
)
from groupvit_tf.model import GroupViTModel
from groupvit_tf.predictor import Segmenter

__all__ = ["ImageSegmentationPipeline", "Pipeline", "ZeroShotImageClassificationPipeline", "pipeline"]


class Pipeline(BasePipeline):
    __doc__ = BasePipeline.__doc__
    framework = "tf"
    segmenter_class = Segmenter

    @classmethod
    def load_model(cls, name: str | Path, device: str | None, **keywords: Any) -> GroupViTModel:
        with keras.device(Segmenter._device(device)):
            return GroupViTModel.from_pretrained(name, **keywords)

    @classmethod
    def _placed(cls, model: Any, device: str | None) -> GroupViTModel:
        check_model(model, GroupViTModel)
        if device is not None and Segmenter._device(device) != _place_of(model):
            raise InputError(
                f"the model at hand is on {_place_of(model)}, where Keras made it, not on {device!r}: give its name "
                "with device=..., or make it within keras.device(...)"
            )
        return model

    @property
    def device(self) -> str:
        return _place_of(self.model)


def _place_of(model: GroupViTModel) -> str:
    """Returns the device of a model's variables by Keras's name: "cpu:0", "gpu:0", ..."""
    value = model.logit_scale.value
    if keras.backend.backend() == "jax":
        # In JAX a distributed variable is on several devices.
        place = next(iter(value.devices()))
        return f"{place.platform}:{place.id}"
    return ":".join(value.device.lower().split(":")[-2:])


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
