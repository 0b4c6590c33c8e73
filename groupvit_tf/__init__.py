"""GroupViT in Keras 3, under the names of transformers' TensorFlow GroupViT, with and without their `TF` prefix.

Code written for transformers runs after changing `from transformers import ...` to `from groupvit_tf import ...`.
"""

import os

from groupvit_common.model.checks import check_keras_backend
from groupvit_common.tensorflow_logging import tensorflow_start_up

with tensorflow_start_up():
    # Before Keras, which would first import a backend that need not be there.
    check_keras_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
    import keras

    check_keras_backend(keras.backend.backend())
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Searches for GPUs now, so that a missing one is not reported in the middle of a user's work.
        tf.config.list_physical_devices()

from groupvit_common.compat import logging
from groupvit_common.compat.encoding import CharSpan, TensorType, TokenSpan
from groupvit_common.compat.features import BatchFeature
from groupvit_common.compat.image_processor import BaseImageProcessor, ImageProcessingMixin
from groupvit_common.compat.keywords import ChannelDimension
from groupvit_common.compat.processor import ProcessorMixin
from groupvit_common.compat.tokenizer import PreTrainedTokenizerBase
from groupvit_common.model.auto import AutoConfig
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_common.preprocessing.encoding import BatchEncoding
from groupvit_common.preprocessing.image_processor import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    CLIPFeatureExtractor,
    CLIPImageProcessor,
    CLIPImageProcessorFast,
    CLIPImageProcessorPil,
    GroupViTImageProcessor,
)
from groupvit_common.preprocessing.images import load_image
from groupvit_common.preprocessing.processor import AutoProcessor, CLIPProcessor, GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import (
    AddedToken,
    AutoTokenizer,
    CLIPTokenizer,
    CLIPTokenizerFast,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)
from groupvit_tf.auto import AutoModel, AutoModelForZeroShotImageClassification
from groupvit_tf.base import GroupViTPreTrainedModel
from groupvit_tf.checkpoint import PreTrainedModel
from groupvit_tf.compat.seed import set_seed
from groupvit_tf.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_tf.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_tf.pipelines import ImageSegmentationPipeline, Pipeline, ZeroShotImageClassificationPipeline, pipeline
from groupvit_tf.predictor import Segmenter

TFAutoModel = AutoModel
TFAutoModelForZeroShotImageClassification = AutoModelForZeroShotImageClassification
TFBaseModelOutput = BaseModelOutput
TFBaseModelOutputWithPooling = BaseModelOutputWithPooling
TFGroupViTModel = GroupViTModel
TFGroupViTModelOutput = GroupViTModelOutput
TFGroupViTPreTrainedModel = GroupViTPreTrainedModel
TFGroupViTTextModel = GroupViTTextModel
TFGroupViTVisionModel = GroupViTVisionModel
TFPreTrainedModel = PreTrainedModel

__all__ = [
    "AddedToken",
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForZeroShotImageClassification",
    "AutoProcessor",
    "AutoTokenizer",
    "BaseImageProcessor",
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "BatchEncoding",
    "BatchFeature",
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPProcessor",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "ChannelDimension",
    "CharSpan",
    "GroupViTConfig",
    "GroupViTImageProcessor",
    "GroupViTModel",
    "GroupViTModelOutput",
    "GroupViTPreTrainedModel",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
    "ImageProcessingMixin",
    "ImageSegmentationPipeline",
    "Pipeline",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "ProcessorMixin",
    "Segmenter",
    "TFAutoModel",
    "TFAutoModelForZeroShotImageClassification",
    "TFBaseModelOutput",
    "TFBaseModelOutputWithPooling",
    "TFGroupViTModel",
    "TFGroupViTModelOutput",
    "TFGroupViTPreTrainedModel",
    "TFGroupViTTextModel",
    "TFGroupViTVisionModel",
    "TFPreTrainedModel",
    "TensorType",
    "TokenSpan",
    "ZeroShotImageClassificationPipeline",
    "load_image",
    "logging",
    "pipeline",
    "set_seed",
]
