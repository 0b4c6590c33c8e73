"""The parts of a model as TensorFlow functions, and their files: SavedModel, LiteRT.

`groupvit_common.segmentation.parts` names the parts. Numbers of images, texts, tokens and labels, and the height and
width of images differ from call to call; sides of `pixel_values` are multiples of the patch size.

Shapes: B images, N texts, T tokens, L labels, G groups, H W pixels, E embedding (legend in docs/architecture.md).
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, image_sides
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig
from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.segmentation.parts import Part, ProgramSettings, pixel_scale
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_tf.grouping import largest
from groupvit_tf.label_maps import grouping_map, label_affinity, similarity, unit
from groupvit_tf.layers import softmax

Tensor = Any
Function = Callable[..., dict[str, Tensor]]

METADATA = "assets.extra/groupvit.json"
"""The file in a SavedModel that says what it is, as JSON."""
LITERT_METADATA = "groupvit.json"
"""That in the zip archive that a LiteRT file is too."""
# Pillow's parameter of the bicubic kernel.
_PILLOW_A = -0.5


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


def segmenter_program(model: keras.Model, settings: ProgramSettings) -> Function:
    """`pixel_values`, `text_embeds` -> `label_map`, `scores`, `group_map`; without `text_embeds` if labels are baked
    in."""
    import tensorflow as tf

    encode = image_encoder(model)
    options, labels = settings.options.for_model(model.config), settings.labels
    is_soft = options.assignment == "soft"

    def affinity_of(groups: Tensor, texts: Tensor, images: Tensor) -> Tensor:
        """`[B, G, E]`, `[L, E]`, `[B, E]` -> `[B, G, L]`."""
        scale = ops.exp(_float32(model.logit_scale))
        if options.top_k is None:
            return label_affinity(groups, texts, scale, temperature=options.temperature)
        # `label_affinity` sorts the labels, of a known number: here the rank of each is counted.
        scaled = ops.minimum(scale, MAX_LOGIT_SCALE) / options.temperature * similarity(groups, texts)
        order, found = tf.range(tf.shape(texts)[0]), similarity(images, texts)
        before = (found[:, None] > found[..., None]) | (
            (found[:, None] == found[..., None]) & (order < order[:, None])
        )  # [B, L, L]
        left_out = ops.sum(ops.cast(before, "int32"), axis=-1) >= options.top_k
        return softmax(scaled, axis=-1) * softmax(ops.where(left_out[:, None], -float("inf"), scaled), axis=-1)

    def call(
        pixel_values: Tensor, text_embeds: Tensor | None = None, size: Tensor | tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """`size`: height and width of the maps; None: those of `pixel_values`."""
        image = encode(pixel_values)
        if labels is not None:
            text_embeds = tf.constant(labels.embeds, tf.float32)
        affinity = affinity_of(image["group_embeds"], text_embeds, image["image_embeds"])
        probabilities = ops.transpose(image["grouping"], (0, 2, 3, 1))  # [B, h, w, G]
        size = tf.shape(pixel_values)[2:] if size is None else size
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


def preprocessed(program: Function, image_processor: CLIPImageProcessor, *, has_maps: bool) -> Function:
    """Returns a program whose input is `images`, RGB, uint8 `[B, H, W, 3]`, in the place of `pixel_values`.

    They are resized and normalised as the image processor does it, whose resize is Pillow's: in float32, so that one
    value in ten thousand is one step of 255 away. has_maps: those have the images' height and width.
    """
    import tensorflow as tf

    factor, mean, std = pixel_scale(image_processor)
    channel_mean, channel_std = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
    patch = image_processor.size_divisor

    def call(images: Tensor, text_embeds: Tensor | None = None) -> dict[str, Tensor]:
        size = tf.shape(images)[1:3]
        height, width = size[0], size[1]
        rows, columns = _patches(height, width, image_processor)
        channels = ops.cast(ops.transpose(images, (0, 3, 1, 2)), "float32")
        # Both passes of Pillow's resize end with whole numbers.
        # Not `ops.matmul`, whose reshapes LiteRT refuses.
        wide = _levels(tf.linalg.matmul(channels, pillow_matrix(width, columns * patch), transpose_b=True))
        pixels = _levels(tf.linalg.matmul(pillow_matrix(height, rows * patch), wide))
        pixels = (pixels * factor - channel_mean) / channel_std
        more = {} if text_embeds is None else {"text_embeds": text_embeds}
        return program(pixels, **more, **({"size": size} if has_maps else {}))

    return call


def _patches(height: Tensor, width: Tensor, image_processor: CLIPImageProcessor) -> tuple[Tensor, Tensor]:
    """Returns rows and columns of patches: `CLIPImageProcessor.resized_size` in whole numbers."""
    size, patch = image_processor.size, image_processor.size_divisor
    shortest, longest = size["shortest_edge"], size["longest_edge"]
    short, long = ops.minimum(height, width), ops.maximum(height, width)
    is_long = shortest * long > longest * short
    # The resized length of a side is this over that, times the side.
    over, under = ops.where(is_long, longest, shortest), ops.where(is_long, long, short)
    rows, columns = (
        ops.clip((2 * over * side + under * patch) // (2 * under * patch), 1, longest // patch)
        for side in (height, width)
    )
    return rows, columns


def pillow_matrix(n_in: Tensor, n_out: Tensor) -> Tensor:
    """Returns the matrix `[n_out, n_in]`, float32, of Pillow's bicubic resize along one axis, of any size in a program.

    Unlike `groupvit_common.model.resample`'s, its kernel widens where the image becomes smaller.
    """
    centre, place = (2 * ops.arange(n, dtype="int32") + 1 for n in (n_out, n_in))
    # In whole numbers, which are exact where the kernel is not 0.
    distance = ops.cast(ops.abs(place * n_out - centre[:, None] * n_in), "float32")
    distance = distance / ops.cast(2 * ops.maximum(n_in, n_out), "float32")
    near = ((_PILLOW_A + 2) * distance - (_PILLOW_A + 3)) * distance * distance + 1
    far = ((_PILLOW_A * distance - 5 * _PILLOW_A) * distance + 8 * _PILLOW_A) * distance - 4 * _PILLOW_A
    weights = ops.where(distance < 1, near, ops.where(distance < 2, far, 0.0))
    return weights / ops.sum(weights, axis=1, keepdims=True)


def _levels(values: Tensor) -> Tensor:
    return ops.clip(ops.floor(values + 0.5), 0, 255)


def runner(
    model: keras.Model, part: Part, settings: ProgramSettings | None = None, **more: Any
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns a function of named NumPy arrays that is a part, computed by the model itself: as a graph of TensorFlow,
    like `keras.Model.predict`.

    more: `size` of a segmenter's maps, see `segmenter_program`.
    """
    function = partial(_function(model, part, settings or ProgramSettings()), **more)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        function = tf.function(function, autograph=False)
    return _of_arrays(function)


def run(
    model: keras.Model, part: Part, settings: ProgramSettings | None, inputs: Mapping[str, np.ndarray], **more: Any
) -> dict[str, np.ndarray]:
    """Returns the outputs of a part for NumPy arrays, by the model itself. more: as of `runner`."""
    return _of_arrays(partial(_function(model, part, settings or ProgramSettings()), **more))(inputs)


def _of_arrays(function: Function) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    def run_function(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {k: ops.convert_to_tensor(v.astype(np.int32) if v.dtype == np.int64 else v) for k, v in inputs.items()}
        return {name: ops.convert_to_numpy(value) for name, value in function(**given).items()}

    return run_function


def write(
    to: str, model: keras.Model, part: Part, settings: ProgramSettings, path: Path, metadata: Mapping[str, Any]
) -> None:
    """Writes a part as the file, or the folder, of a format."""
    import tensorflow as tf

    signature = {
        name: tf.TensorSpec(_shape(model.config, axes), tf.int32 if dtype == "int64" else dtype, name)
        for name, (dtype, axes) in part.of(settings).inputs.items()
    }
    function = tf.function(_function(model, part, settings), autograph=False).get_concrete_function(**signature)
    module = tf.Module()
    # What the function reads, and no more: a text encoder goes without the image tower.
    module.read = [*function.graph.variables]
    module.serve = function
    if to == "savedmodel":
        _write_saved_model(module, path, metadata)
    else:
        _write_litert(module, path, metadata)


def _function(model: keras.Model, part: Part, settings: ProgramSettings) -> Function:
    if part.name == "text_encoder":
        return text_encoder(model)
    has_maps = part.name == "segmenter"
    function = segmenter_program(model, settings) if has_maps else image_encoder(model)
    processor = settings.image_processor
    return function if processor is None else preprocessed(function, processor, has_maps=has_maps)


def _shape(config: GroupViTConfig, axes: str) -> list[int | None]:
    known = {"C": config.vision_config.num_channels, "E": config.projection_dim, "3": 3}
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
