"""The model's classes and functions, under the module's name and theirs in transformers."""

from groupvit_tf import modeling_groupvit as _model
from groupvit_tf.modeling_groupvit import (
    GroupViTConfig,
    GroupViTTextConfig,
    GroupViTVisionConfig,
    contrastive_loss,
    get_grouping_from_attentions,
    groupvit_loss,
    gumbel_softmax,
    hard_softmax,
    resize_attention_map,
)

TFBaseModelOutput = _model.BaseModelOutput
TFBaseModelOutputWithPooling = _model.BaseModelOutputWithPooling
TFGroupViTAssignAttention = _model.GroupViTAssignAttention
TFGroupViTAttention = _model.GroupViTAttention
TFGroupViTCrossAttentionLayer = _model.GroupViTCrossAttentionLayer
TFGroupViTEncoderLayer = _model.GroupViTEncoderLayer
TFGroupViTMLP = _model.GroupViTMLP
TFGroupViTMixerMLP = _model.GroupViTMixerMLP
TFGroupViTModel = _model.GroupViTModel
TFGroupViTModelOutput = _model.GroupViTModelOutput
TFGroupViTPatchEmbeddings = _model.GroupViTPatchEmbeddings
TFGroupViTPreTrainedModel = _model.GroupViTPreTrainedModel
TFGroupViTStage = _model.GroupViTStage
TFGroupViTTextEmbeddings = _model.GroupViTTextEmbeddings
TFGroupViTTextEncoder = _model.GroupViTTextEncoder
TFGroupViTTextModel = _model.GroupViTTextModel
TFGroupViTTextTransformer = _model.GroupViTTextTransformer
TFGroupViTTokenAssign = _model.GroupViTTokenAssign
TFGroupViTVisionEmbeddings = _model.GroupViTVisionEmbeddings
TFGroupViTVisionEncoder = _model.GroupViTVisionEncoder
TFGroupViTVisionModel = _model.GroupViTVisionModel
TFGroupViTVisionTransformer = _model.GroupViTVisionTransformer
# Layers that hold a model's parts there: the models themselves.
TFGroupViTMainLayer = _model.GroupViTModel
TFGroupViTTextMainLayer = _model.GroupViTTextModel
TFGroupViTVisionMainLayer = _model.GroupViTVisionModel

__all__ = [
    "GroupViTConfig",
    "GroupViTTextConfig",
    "GroupViTVisionConfig",
    "TFBaseModelOutput",
    "TFBaseModelOutputWithPooling",
    "TFGroupViTAssignAttention",
    "TFGroupViTAttention",
    "TFGroupViTCrossAttentionLayer",
    "TFGroupViTEncoderLayer",
    "TFGroupViTMLP",
    "TFGroupViTMainLayer",
    "TFGroupViTMixerMLP",
    "TFGroupViTModel",
    "TFGroupViTModelOutput",
    "TFGroupViTPatchEmbeddings",
    "TFGroupViTPreTrainedModel",
    "TFGroupViTStage",
    "TFGroupViTTextEmbeddings",
    "TFGroupViTTextEncoder",
    "TFGroupViTTextMainLayer",
    "TFGroupViTTextModel",
    "TFGroupViTTextTransformer",
    "TFGroupViTTokenAssign",
    "TFGroupViTVisionEmbeddings",
    "TFGroupViTVisionEncoder",
    "TFGroupViTVisionMainLayer",
    "TFGroupViTVisionModel",
    "TFGroupViTVisionTransformer",
    "contrastive_loss",
    "get_grouping_from_attentions",
    "groupvit_loss",
    "gumbel_softmax",
    "hard_softmax",
    "resize_attention_map",
]
