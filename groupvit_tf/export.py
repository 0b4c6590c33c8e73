"""A model as a TensorFlow SavedModel: what TensorFlow Serving and programs without this package run.

Shapes: B images, N texts, T tokens, H W pixels, E embedding width (legend in docs/architecture.md).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from keras import ops

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, image_sides
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig

Tensor = Any
Function = Callable[..., dict[str, Tensor]]


def export_saved_model(
    model: keras.Model, directory: str | Path, image_size: int | tuple[int, int] | None = None
) -> None:
    """Writes a SavedModel whose endpoints take and return named tensors, in evaluation, any number of images and texts.

    Endpoints of a full model, float32 in and out, token ids and masks int32:

    - `image_features`: `pixel_values` `[B, C, H, W]` -> `image_features` `[B, E]`, as `get_image_features`.
    - `text_features`: `input_ids`, `attention_mask` `[N, T]` -> `text_features` `[N, E]`, as `get_text_features`.
    - `segment`: `pixel_values`, `text_features` -> `segmentation_logits` `[B, N, H, W]`, as `call` with
      `output_segmentation`:
      the texts are encoded once for any number of calls.

    A tower's model has one, `serve`: its inputs -> `last_hidden_state` and `pooler_output`.

    Args:
        directory: made if need be; a SavedModel in it is replaced.
        image_size: side of the images, or (height, width), multiples of the patch size: a graph is made for one size.
            The configuration's if None.

    Raises:
        CheckpointError: the directory cannot be written.
        InputError: an image size that the model cannot take.
    """
    config = model.config
    if isinstance(config, GroupViTTextConfig):
        if image_size is not None:
            raise InputError("image_size has no meaning for the text tower")
        endpoints = {"serve": (_record(model.text_model), [*_token_inputs()])}
    else:
        vision = config.vision_config if isinstance(config, GroupViTConfig) else config
        height, width = image_sides(vision.image_size if image_size is None else image_size)
        check_pixel_values((1, vision.num_channels, height, width), "float32", True, vision)
        pixels = keras.InputSpec(dtype="float32", shape=(None, vision.num_channels, height, width), name="pixel_values")
        if not isinstance(config, GroupViTConfig):
            endpoints = {"serve": (_record(model.vision_model), [pixels])}
        else:
            features = keras.InputSpec(dtype="float32", shape=(None, config.projection_dim), name="text_features")
            endpoints = {
                "image_features": (_image_features(model), [pixels]),
                "text_features": (_text_features(model), [*_token_inputs()]),
            }
            # A model without groups has nothing to segment by.
            if any(vision.num_group_tokens):
                endpoints["segment"] = (_segment(model), [pixels, features])
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, inputs) in endpoints.items():
        archive.add_endpoint(name, function, input_signature=inputs)
    archive.write_out(str(directory), verbose=False)


def _token_inputs() -> tuple[keras.InputSpec, keras.InputSpec]:
    ids, mask = (
        keras.InputSpec(dtype="int32", shape=(None, None), name=name) for name in ("input_ids", "attention_mask")
    )
    return ids, mask


def _image_features(model: Any) -> Function:
    def image_features(pixel_values: Tensor) -> dict[str, Tensor]:
        return {"image_features": _float32(model.get_image_features(_as(model, pixel_values)))}

    return image_features


def _text_features(model: Any) -> Function:
    def text_features(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"text_features": _float32(model.get_text_features(input_ids, attention_mask))}

    return text_features


def _segment(model: Any) -> Function:
    def segment(pixel_values: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        pixel_values, texts = _as(model, pixel_values), _as(model, text_features)
        vision = model.vision_model(pixel_values, output_attentions=True, return_dict=True, training=False)
        texts = ops.normalize(texts, axis=-1, epsilon=1e-12)
        logits = model._segmentation_logits(vision, texts, pixel_values, training=False)
        return {"segmentation_logits": _float32(logits)}

    return segment


def _record(tower: Any) -> Function:
    def named(record: Any) -> dict[str, Tensor]:
        return {name: _float32(record[name]) for name in ("last_hidden_state", "pooler_output")}

    def text(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return named(tower(input_ids, attention_mask, training=False))

    def vision(pixel_values: Tensor) -> dict[str, Tensor]:
        return named(tower(_as(tower, pixel_values), training=False))

    return text if isinstance(tower.config, GroupViTTextConfig) else vision


def _as(layer: Any, tensor: Tensor) -> Tensor:
    return ops.cast(tensor, layer.compute_dtype)


def _float32(tensor: Tensor) -> Tensor:
    return ops.cast(tensor, "float32")
