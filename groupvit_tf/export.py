"""The parts of a model as TensorFlow functions, and their files: SavedModel, LiteRT.

`groupvit_common.segmentation.parts` names the parts. Numbers of images, texts, tokens and labels, and the height and
width of images differ from call to call; sides are multiples of the patch size.

Shapes: B images, N texts, T tokens, L labels, G groups, H W pixels, E embedding (legend in docs/architecture.md).
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, image_sides
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.parts import BakedLabels, Part
from groupvit_tf.grouping import largest
from groupvit_tf.label_maps import grouping_map, label_affinity, unit

Tensor = Any
Function = Callable[..., dict[str, Tensor]]

METADATA = "assets.extra/groupvit.json"
"""The file in a SavedModel that says what it is, as JSON."""
LITERT_METADATA = "groupvit.json"
"""That in the zip archive that a LiteRT file is too."""


def image_encoder(model: keras.Model) -> Function:
    """`pixel_values` -> `image_embeds`, `group_embeds`, `grouping`."""
    patch = model.config.vision_config.patch_size

    def call(pixel_values: Tensor) -> dict[str, Tensor]:
        vision = model.vision_model(_as(model, pixel_values), output_attentions=True, return_dict=True, training=False)
        states = vision.last_hidden_state
        groups = model.visual_projection(ops.reshape(states, (-1, states.shape[2])), training=False)
        groups = ops.reshape(groups, (-1, states.shape[1], groups.shape[1]))
        found = {
            "image_embeds": unit(_float32(model.visual_projection(vision.pooler_output, training=False))),
            "group_embeds": unit(_float32(groups)),
        }
        if vision.attentions:
            height, width = ops.shape(pixel_values)[2:]
            grid = (height // patch, width // patch)
            found["grouping"] = grouping_map([_float32(each) for each in vision.attentions], grid)
        return found

    return call


def text_encoder(model: keras.Model) -> Function:
    """`input_ids`, `attention_mask` -> `text_embeds`."""

    def call(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"text_embeds": unit(_float32(model.get_text_features(input_ids, attention_mask)))}

    return call


def segmenter_program(model: keras.Model, labels: BakedLabels | None = None) -> Function:
    """`pixel_values`, `text_embeds` -> `label_map`, `scores`, `group_map`; without `text_embeds` if labels are baked
    in."""
    import tensorflow as tf

    encode = image_encoder(model)
    is_soft = SegmentationOptions().for_model(model.config).assignment == "soft"

    def call(pixel_values: Tensor, text_embeds: Tensor | None = None) -> dict[str, Tensor]:
        image = encode(pixel_values)
        if labels is not None:
            text_embeds = tf.constant(labels.embeds, tf.float32)
        affinity = label_affinity(image["group_embeds"], text_embeds, ops.exp(_float32(model.logit_scale)))
        probabilities = ops.transpose(image["grouping"], (0, 2, 3, 1))  # [B, h, w, G]
        size = tf.shape(pixel_values)[2:]
        group_map = largest(tf.image.resize(probabilities, size), axis=-1)  # [B, H, W]
        if is_soft:
            maps = tf.image.resize(ops.einsum("bhwg,bgl->bhwl", probabilities, affinity), size)
            score, best = ops.max(maps, axis=-1), largest(maps, axis=-1)
        else:
            score, best = (
                tf.gather(each, group_map, batch_dims=1)
                for each in (ops.max(affinity, axis=-1), largest(affinity, axis=-1))
            )
        if labels is not None:
            best = tf.gather(tf.constant(labels.values, tf.int32), best)
            if labels.background is not None:
                limit = ops.minimum(ops.max(affinity, axis=(1, 2)), labels.background)
                best = ops.where(score < limit[:, None, None], 0, best)
        return {"label_map": best, "scores": score, "group_map": group_map}

    return call


def runner(
    model: keras.Model, part: Part, labels: BakedLabels | None = None
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns a function of named NumPy arrays that is a part, computed by the model itself: as a graph of TensorFlow,
    like `keras.Model.predict`."""
    function = _function(model, part, labels)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        function = tf.function(function, autograph=False)
    return _of_arrays(function)


def run(
    model: keras.Model, part: Part, labels: BakedLabels | None, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the outputs of a part for NumPy arrays, by the model itself."""
    return _of_arrays(_function(model, part, labels))(inputs)


def _of_arrays(function: Function) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    def run_function(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {k: ops.convert_to_tensor(v.astype(np.int32) if v.dtype == np.int64 else v) for k, v in inputs.items()}
        return {name: ops.convert_to_numpy(value) for name, value in function(**given).items()}

    return run_function


def write(
    to: str, model: keras.Model, part: Part, labels: BakedLabels | None, path: Path, metadata: Mapping[str, Any]
) -> None:
    """Writes a part as the file, or the folder, of a format."""
    import tensorflow as tf

    signature = {
        name: tf.TensorSpec(_shape(model.config, axes), tf.int32 if dtype == "int64" else dtype, name)
        for name, (dtype, axes) in part.inputs.items()
        if not (name == "text_embeds" and labels is not None)
    }
    function = tf.function(_function(model, part, labels), autograph=False).get_concrete_function(**signature)
    module = tf.Module()
    # What the function reads, and no more: a text encoder goes without the image tower.
    module.read = [*function.graph.variables]
    module.serve = function
    if to == "savedmodel":
        _write_saved_model(module, path, metadata)
    else:
        _write_litert(module, path, metadata)


def _function(model: keras.Model, part: Part, labels: BakedLabels | None) -> Function:
    if part.name == "segmenter":
        return segmenter_program(model, labels)
    return image_encoder(model) if part.name == "image_encoder" else text_encoder(model)


def _shape(config: GroupViTConfig, axes: str) -> list[int | None]:
    known = {"C": config.vision_config.num_channels, "E": config.projection_dim}
    return [known.get(axis) for axis in axes.split()]


def _write_saved_model(module: Any, path: Path, metadata: Mapping[str, Any]) -> None:
    import tensorflow as tf

    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    file = path / METADATA
    file.parent.mkdir()
    file.write_text(json.dumps(metadata), encoding="utf-8")


def _write_litert(module: Any, path: Path, metadata: Mapping[str, Any]) -> None:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve], module)
    if metadata["dtype"] != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if metadata["dtype"] == "float16":
            converter.target_spec.supported_types = [tf.float16]
    try:
        path.write_bytes(converter.convert())
    except Exception as error:
        # TensorFlow's own, which holds the program in text.
        if type(error).__name__ != "ConverterError":
            raise
        raise CheckpointError(f"LiteRT's converter fails: {str(error)[:200]!r}") from error
    # A zip archive behind the program, where LiteRT's own tools look for what belongs to a model.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(LITERT_METADATA, json.dumps(metadata))


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
