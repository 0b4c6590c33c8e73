"""GroupViT in PyTorch, under the names of transformers' GroupViT.

Code written for transformers runs after changing `from transformers import ...` to `from groupvit_torch import ...`.
"""

from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_common.preprocessing.image_processor import AutoImageProcessor, CLIPImageProcessor, GroupViTImageProcessor
from groupvit_common.preprocessing.images import load_image
from groupvit_common.preprocessing.processor import AutoProcessor, CLIPProcessor, GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast
from groupvit_torch.base import GroupViTPreTrainedModel
from groupvit_torch.model import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_torch.pipelines import ImageSegmentationPipeline, ZeroShotImageClassificationPipeline, pipeline
from groupvit_torch.predictor import Segmenter

__all__ = [
    "AutoImageProcessor",
    "AutoProcessor",
    "AutoTokenizer",
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "CLIPImageProcessor",
    "CLIPProcessor",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
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
    "ImageSegmentationPipeline",
    "Segmenter",
    "ZeroShotImageClassificationPipeline",
    "load_image",
    "pipeline",
]
