"""GroupViT in PyTorch, under the names of transformers' GroupViT.

Code written for transformers runs after changing `from transformers import ...` to `from groupvit_torch import ...`.
"""

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
from groupvit_torch.auto import AutoModel, AutoModelForZeroShotImageClassification
from groupvit_torch.base import GroupViTPreTrainedModel
from groupvit_torch.checkpoint import PreTrainedModel
from groupvit_torch.compat.seed import set_seed
from groupvit_torch.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_torch.pipelines import ImageSegmentationPipeline, Pipeline, ZeroShotImageClassificationPipeline, pipeline
from groupvit_torch.predictor import Segmenter

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
    "TensorType",
    "TokenSpan",
    "ZeroShotImageClassificationPipeline",
    "load_image",
    "logging",
    "pipeline",
    "set_seed",
]
