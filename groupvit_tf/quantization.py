"""Keras's `quantize` for our models: which layers it changes, and how a file of Keras says so."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.quantizers.utils import should_quantize_layer  # what `keras.Model.quantize` asks

from groupvit_common.errors import InputError
from groupvit_tf.grouping import AssignAttention
from groupvit_tf.layers import Dense
from groupvit_tf.text import Embedding

# Of Keras's modes, those without training or calibration.
_MODES = {"int8": keras.quantizers.Int8QuantizationConfig, "int4": keras.quantizers.Int4QuantizationConfig}


def chosen_layers(model: Any, mode: Any, filters: Any = None) -> Callable[[Any], bool]:
    """Returns which layers `quantize` changes: dense layers and embeddings that Keras's `filters` let through, without
    those that assign patches to groups, where a near tie moves whole patches.

    Raises:
        InputError: a mode or a dtype that cannot be used, or a layer that is quantized already.
    """
    name = type(model).__name__
    if mode not in _MODES:
        raise InputError(
            f"a {name} is quantized to int8 or int4, got {mode!r}: Keras's other modes are for training, or need "
            "examples of text to calibrate with"
        )
    if model.compute_dtype == "float16":
        raise InputError(f"a {name} in float16 cannot be quantized: load it with dtype='float32' or 'bfloat16'")
    layers = model._flatten_layers()
    assigning = {id(part) for layer in layers if isinstance(layer, AssignAttention) for part in layer._flatten_layers()}
    chosen = {
        id(layer)
        for layer in layers
        if isinstance(layer, Dense | Embedding) and id(layer) not in assigning and should_quantize_layer(layer, filters)
    }
    twice = next((layer for layer in layers if id(layer) in chosen and layer.quantization_mode), None)
    if twice is not None:
        raise InputError(f"{twice.path} is quantized already, to {twice.quantization_mode}: load the model anew")
    return lambda layer: id(layer) in chosen


@contextmanager
def few_collections() -> Iterator[None]:
    """Keeps garbage collections within it short: Keras collects for each layer that is quantized, which takes a third
    of a second each time among TensorFlow's objects."""
    others = gc.get_freeze_count()
    gc.collect()  # garbage is not kept for ever
    gc.freeze()
    try:
        yield
    finally:
        # What others froze stays so.
        if not others:
            gc.unfreeze()


def quantized_layers(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Keras's quantization settings of the layers that are quantized, by path, as `get_config` writes them."""
    return {
        path: keras.saving.serialize_keras_object(layer.quantization_config)
        for path, layer in layers.items()
        if isinstance(layer, Dense | Embedding) and layer.quantization_mode in _MODES
    }


def quantize_as(layers: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Quantizes new layers as `quantized_layers` says: their values come from a file. Raises `InputError` for settings
    that do not fit."""
    known = {kind.__name__ for kind in _MODES.values()}
    with few_collections():
        for path, written in settings.items():
            layer = layers.get(path)
            is_known = isinstance(written, Mapping) and written.get("class_name") in known
            if not is_known or not isinstance(layer, Dense | Embedding) or layer.quantization_mode:
                raise InputError(f"the quantization of {path!r} does not fit the model: save the model again")
            try:
                layer.quantize(config=keras.saving.deserialize_keras_object(written))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"the quantization of {path!r} cannot be read: save the model again") from error
