"""Initial values by role: the vision tower's as the paper's authors start it, the text tower's as CLIP does.

transformers instead draws most vision weights from normals scaled by width and depth; see docs/differences.md.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from groupvit_tf.layers import Dense, EncoderLayer, LayerNorm, Projection
from groupvit_tf.text import TextTower
from groupvit_tf.variables import ONES, ZEROS, SharedConstant, quick_variables
from groupvit_tf.vision import PatchEmbeddings, Stage, VisionTower

_drawing = True


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Makes models start with zeros within, because all their values are about to be replaced."""
    global _drawing
    before, _drawing = _drawing, False
    try:
        yield
    finally:
        _drawing = before


def initialise(model: keras.layers.Layer, factor: float = 1.0) -> None:
    """Draws every parameter of a model anew, in place; repeatable after `keras.utils.set_random_seed`.

    - Vision tower: truncated normal of `initializer_range` (0.02) for dense weights, positions and group tokens; zero
      biases;
      PyTorch's default for the patch convolution, times `initializer_factor`.
    - Text tower (CLIP, Radford et al. 2021, section 2.4 and released code): normals of width^-0.5, output layers
      further
      divided by sqrt(2 layers); token embeddings 0.02, positions 0.01. All times `initializer_factor`.
    - Norms start as the identity; projections start with PyTorch's default for dense layers, times `factor`, the full
      configuration's `initializer_factor`.
    """
    if not _drawing:
        return
    with quick_variables():
        for layer in model._flatten_layers():
            if isinstance(layer, VisionTower):
                _vision(layer)
            elif isinstance(layer, TextTower):
                _text(layer)
            elif isinstance(layer, Projection):
                for dense in (layer.hidden, layer.output_layer):
                    _uniform(dense, dense.in_features, factor)


def _vision(tower: VisionTower) -> None:
    std = tower.config.initializer_range
    for layer in tower._flatten_layers():
        if isinstance(layer, Dense):
            _truncated_normal(layer.kernel, std)
            _fill(layer.bias, ZEROS)
        elif isinstance(layer, LayerNorm):
            _identity(layer)
        elif isinstance(layer, PatchEmbeddings):
            fan_in = layer.num_channels * math.prod(layer.projection.kernel_size)
            _uniform(layer.projection, fan_in, tower.config.initializer_factor)
        elif isinstance(layer, Stage) and layer.group_token is not None:
            _truncated_normal(layer.group_token, std)
    _truncated_normal(tower.embeddings.position_embeddings, std)


def _text(tower: TextTower) -> None:
    config = tower.config
    factor, width = config.initializer_factor, config.hidden_size
    into_residual = width**-0.5 / math.sqrt(2 * max(config.num_hidden_layers, 1))
    _normal(tower.embeddings.token_embedding.embeddings, factor * 0.02)
    _normal(tower.embeddings.position_embedding.embeddings, factor * 0.01)
    for layer in tower._flatten_layers():
        if isinstance(layer, LayerNorm):
            _identity(layer)
        elif isinstance(layer, Dense):
            _fill(layer.bias, ZEROS)
        elif isinstance(layer, EncoderLayer):
            attention, mlp = layer.self_attn, layer.mlp
            for dense in (attention.q_proj, attention.k_proj, attention.v_proj):
                _normal(dense.kernel, factor * width**-0.5)
            _normal(attention.out_proj.kernel, factor * into_residual)
            _normal(mlp.fc1.kernel, factor * (2 * width) ** -0.5)
            _normal(mlp.fc2.kernel, factor * into_residual)


def _draw(variable: Any, initializer: keras.initializers.Initializer) -> None:
    # Drawn in float32: half precision has too few numbers to draw from.
    variable.assign(ops.cast(initializer(variable.shape, dtype="float32"), variable.dtype))


def _fill(variable: Any, constant: SharedConstant) -> None:
    variable.assign(constant(variable.shape, dtype=variable.dtype))


def _normal(variable: Any, std: float) -> None:
    _draw(variable, keras.initializers.RandomNormal(stddev=std))


def _truncated_normal(variable: Any, std: float) -> None:
    """Draws normals within -2 .. 2, as PyTorch's `trunc_normal_`; Keras's cuts at two standard deviations."""
    at_most = math.erf(2 / std / math.sqrt(2)) if std else 0.0
    uniform = keras.initializers.RandomUniform(-at_most, at_most)(variable.shape, dtype="float32")
    value = ops.clip(std * math.sqrt(2) * ops.erfinv(uniform), -2.0, 2.0)
    variable.assign(ops.cast(value, variable.dtype))


def _uniform(layer: Any, fan_in: int, factor: float) -> None:
    """Draws PyTorch's default for dense and convolution layers: uniform within 1 / sqrt(fan_in), weights and biases;
    times a factor."""
    bound = factor * fan_in**-0.5
    for variable in (layer.kernel, layer.bias):
        _draw(variable, keras.initializers.RandomUniform(-bound, bound))


def _identity(norm: LayerNorm) -> None:
    _fill(norm.gamma, ONES)
    _fill(norm.beta, ZEROS)
