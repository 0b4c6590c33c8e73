"""Floating-point operations of a forward pass, counted from the configuration alone."""

from __future__ import annotations

from groupvit_common.model.config import GroupViTConfig


def image_flops(config: GroupViTConfig) -> int:
    """Returns the operations of one image: tower and projection, two a product."""
    vision = config.vision_config
    width, hidden = vision.hidden_size, vision.intermediate_size
    tokens_width, channels_width = (int(ratio * width) for ratio in vision.assign_mlp_ratio)
    patches = (vision.image_size // vision.patch_size) ** 2
    products = patches * vision.num_channels * vision.patch_size**2 * width
    segments, before = patches, 0
    for depth, tokens, groups in zip(vision.depths, vision.num_group_tokens, vision.num_output_groups, strict=True):
        products += depth * _layer(segments + tokens, width, hidden)
        if tokens:
            if before:
                products += width * tokens_width * (before + tokens)
            products += width * tokens_width * (tokens + groups)
            attention = 2 * width**2 * (groups + segments) + 2 * groups * segments * width
            products += 2 * attention + 2 * groups * width * (hidden + channels_width)
            segments, before = groups, tokens
    return 2 * (products + _projection(config, width))


def text_flops(config: GroupViTConfig, tokens: int) -> int:
    """Returns the operations of one text of this many tokens."""
    text = config.text_config
    products = text.num_hidden_layers * _layer(tokens, text.hidden_size, text.intermediate_size)
    return 2 * (products + _projection(config, text.hidden_size))


def _layer(length: int, width: int, hidden: int) -> int:
    return length * (4 * width**2 + 2 * width * hidden) + 2 * length**2 * width


def _projection(config: GroupViTConfig, width: int) -> int:
    return config.projection_intermediate_dim * (width + config.projection_dim)
