"""A model as `torch.export` programs: what programs without this package load and run.

Shapes: B images, N texts, T tokens, H W pixels, E embedding width (legend in docs/architecture.md).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, image_sides
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig
from groupvit_torch.checkpoint import PreTrainedModel


def export_programs(
    model: PreTrainedModel, directory: str | Path, image_size: int | tuple[int, int] | None = None
) -> None:
    """Writes programs (`NAME.pt2`, for `torch.export.load`) that take and return named tensors, in evaluation.

    Programs of a full model, any number of images and texts, float32 in and out, token ids and masks int64:

    - `image_features`: `pixel_values` `[B, C, H, W]` -> `image_features` `[B, E]`, as `get_image_features`.
    - `text_features`: `input_ids`, `attention_mask` `[N, T]` -> `text_features` `[N, E]`, as `get_text_features`.
    - `segment`: `pixel_values`, `text_features` -> `segmentation_logits` `[B, N, H, W]`, as `forward` with
      `output_segmentation`: the texts are encoded once for any number of calls.

    A tower's model has one, `serve`: its inputs -> `last_hidden_state` and `pooler_output`.

    Args:
        directory: made if need be; programs in it are replaced.
        image_size: side of the images, or (height, width), multiples of the patch size: a program is made for one size.
            The configuration's if None.

    Raises:
        CheckpointError: the directory cannot be written.
        InputError: an image size that the model cannot take.
    """
    config = model.config
    # Two of each: torch.export takes a size of 1 for a constant.
    text_inputs = {name: torch.ones(2, 3, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    texts = {0: Dim("texts"), 1: Dim("tokens", max=_longest(config))}
    text_sizes = dict.fromkeys(text_inputs, texts)
    programs: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]]
    if isinstance(config, GroupViTTextConfig):
        if image_size is not None:
            raise InputError("image_size has no meaning for the text tower")
        programs = {"serve": (_TextTower(model), text_inputs, text_sizes)}
    else:
        vision = config.vision_config if isinstance(config, GroupViTConfig) else config
        height, width = image_sides(vision.image_size if image_size is None else image_size)
        check_pixel_values((1, vision.num_channels, height, width), "float32", True, vision)
        image_inputs = {"pixel_values": torch.zeros(2, vision.num_channels, height, width)}
        image_sizes = {"pixel_values": {0: Dim("images")}}
        if not isinstance(config, GroupViTConfig):
            programs = {"serve": (_VisionTower(model), image_inputs, image_sizes)}
        else:
            features = {"text_features": torch.zeros(3, config.projection_dim)}
            programs = {
                "image_features": (_ImageFeatures(model), image_inputs, image_sizes),
                "text_features": (_TextFeatures(model), text_inputs, text_sizes),
            }
            # A model without groups has nothing to segment by.
            if any(vision.num_group_tokens):
                inputs, sizes = {**image_inputs, **features}, {**image_sizes, "text_features": {0: Dim("texts")}}
                programs["segment"] = (_Segment(model), inputs, sizes)
    was_training = model.training
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, (module, inputs, sizes) in programs.items():
            program = torch.export.export(module.eval(), (), inputs, dynamic_shapes=sizes)
            torch.export.save(program, Path(directory) / f"{name}.pt2")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        model.train(was_training)


def _longest(config: Any) -> int:
    text = config.text_config if isinstance(config, GroupViTConfig) else config
    return int(getattr(text, "max_position_embeddings", 2))


class _Endpoint(nn.Module):
    """A program: the model, called in one way. Pixels and features come as float32, whatever the model computes in."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class _ImageFeatures(_Endpoint):
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"image_features": self.model.get_image_features(pixel_values).float()}


class _TextFeatures(_Endpoint):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"text_features": self.model.get_text_features(input_ids, attention_mask).float()}


class _Segment(_Endpoint):
    def forward(self, pixel_values: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        vision = self.model.vision_model(pixel_values, output_attentions=True, return_dict=True)
        texts = F.normalize(text_features.to(self.model.dtype), dim=-1)
        return {"segmentation_logits": self.model._segmentation_logits(vision, texts, pixel_values).float()}


class _TextTower(_Endpoint):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return _named(self.model(input_ids, attention_mask, return_dict=True))


class _VisionTower(_Endpoint):
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return _named(self.model(pixel_values, return_dict=True))


def _named(record: Any) -> dict[str, Tensor]:
    return {name: record[name].float() for name in ("last_hidden_state", "pooler_output")}
