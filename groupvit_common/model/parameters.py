"""The manifest: a configuration -> every tensor of the model, by its canonical name (transformers' PyTorch state dict).

Backends, checkpoints and conversions are held against this one list. `kind` determines how a tensor's layout differs
between frameworks: a `dense` weight is `[out, in]` in PyTorch and in files, `[in, out]` in Keras; a `conv` weight is
OIHW and HWIO; all others are laid out alike.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig

Kind = Literal["dense", "conv", "bias", "norm", "embedding", "token", "running_mean", "running_var", "counter", "scale"]


class Parameter(NamedTuple):
    """A tensor: canonical name, shape as in PyTorch and in files, and kind."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


def manifest(config: GroupViTConfig | GroupViTTextConfig | GroupViTVisionConfig) -> dict[str, Parameter]:
    """Returns every tensor of the model that `config` describes, by name, in the order of the data's flow.

    Raises:
        InputError: there is no such model.
    """
    config.check_model()
    if isinstance(config, GroupViTTextConfig):
        parameters = _text(config)
    elif isinstance(config, GroupViTVisionConfig):
        parameters = _vision(config)
    else:
        parameters = _full(config)
    return {parameter.name: parameter for parameter in parameters}


def _full(config: GroupViTConfig) -> Iterator[Parameter]:
    yield from _text(config.text_config)
    yield from _vision(config.vision_config)
    hidden, out = config.projection_intermediate_dim, config.projection_dim
    towers = (("visual", config.vision_config.hidden_size), ("text", config.text_config.hidden_size))
    for tower, width in towers:
        prefix = f"{tower}_projection"
        yield from _dense(f"{prefix}.0", width, hidden)
        yield from _norm(f"{prefix}.1", hidden)
        yield Parameter(f"{prefix}.1.running_mean", (hidden,), "running_mean")
        yield Parameter(f"{prefix}.1.running_var", (hidden,), "running_var")
        yield Parameter(f"{prefix}.1.num_batches_tracked", (), "counter")
        yield from _dense(f"{prefix}.3", hidden, out)
    yield Parameter("logit_scale", (), "scale")


def _text(config: GroupViTTextConfig) -> Iterator[Parameter]:
    width, prefix = config.hidden_size, "text_model"
    yield Parameter(f"{prefix}.embeddings.token_embedding.weight", (config.vocab_size, width), "embedding")
    yield Parameter(
        f"{prefix}.embeddings.position_embedding.weight", (config.max_position_embeddings, width), "embedding"
    )
    for layer in range(config.num_hidden_layers):
        yield from _encoder_layer(f"{prefix}.encoder.layers.{layer}", config)
    yield from _norm(f"{prefix}.final_layer_norm", width)


def _vision(config: GroupViTVisionConfig) -> Iterator[Parameter]:
    width, patch, prefix = config.hidden_size, config.patch_size, "vision_model"
    embeddings = f"{prefix}.embeddings"
    yield Parameter(f"{embeddings}.position_embeddings", (1, (config.image_size // patch) ** 2, width), "token")
    yield Parameter(
        f"{embeddings}.patch_embeddings.projection.weight", (width, config.num_channels, patch, patch), "conv"
    )
    yield Parameter(f"{embeddings}.patch_embeddings.projection.bias", (width,), "bias")
    yield from _norm(f"{embeddings}.layernorm", width)
    for index in range(len(config.depths)):
        yield from _stage(f"{prefix}.encoder.stages.{index}", config, index)
    yield from _norm(f"{prefix}.layernorm", width)


def _stage(prefix: str, config: GroupViTVisionConfig, index: int) -> Iterator[Parameter]:
    width, tokens, groups = config.hidden_size, config.num_group_tokens[index], config.num_output_groups[index]
    for layer in range(config.depths[index]):
        yield from _encoder_layer(f"{prefix}.layers.{layer}", config)
    if not tokens:
        return
    yield Parameter(f"{prefix}.group_token", (1, tokens, width), "token")
    block = f"{prefix}.downsample"
    tokens_width, channels_width = (int(ratio * width) for ratio in config.assign_mlp_ratio)
    for norm in ("norm_tokens", "norm_post_tokens", "norm_x", "norm_new_x"):
        yield from _norm(f"{block}.{norm}", width)
    yield from _mlp(f"{block}.mlp_inter", tokens, tokens_width, groups)
    yield from _attention(f"{block}.pre_assign_attn.attn", width, "out_proj")
    yield from _norm(f"{block}.pre_assign_attn.norm2", width)
    yield from _mlp(f"{block}.pre_assign_attn.mlp", width, config.intermediate_size, width)
    yield from _norm(f"{block}.pre_assign_attn.norm_post", width)
    yield from _attention(f"{block}.assign", width, "proj")
    yield from _mlp(f"{block}.mlp_channels", width, channels_width, width)
    if index and config.num_output_groups[index - 1]:
        yield from _norm(f"{prefix}.group_projector.0", width)
        yield from _mlp(f"{prefix}.group_projector.1", config.num_output_groups[index - 1], width // 2, tokens)


def _encoder_layer(prefix: str, config: GroupViTTextConfig | GroupViTVisionConfig) -> Iterator[Parameter]:
    width = config.hidden_size
    yield from _norm(f"{prefix}.layer_norm1", width)
    yield from _attention(f"{prefix}.self_attn", width, "out_proj")
    yield from _norm(f"{prefix}.layer_norm2", width)
    yield from _mlp(f"{prefix}.mlp", width, config.intermediate_size, width)


def _attention(prefix: str, width: int, output: str) -> Iterator[Parameter]:
    for name in ("q_proj", "k_proj", "v_proj", output):
        yield from _dense(f"{prefix}.{name}", width, width)


def _mlp(prefix: str, n_in: int, hidden: int, n_out: int) -> Iterator[Parameter]:
    yield from _dense(f"{prefix}.fc1", n_in, hidden)
    yield from _dense(f"{prefix}.fc2", hidden, n_out)


def _dense(prefix: str, n_in: int, n_out: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}.weight", (n_out, n_in), "dense")
    yield Parameter(f"{prefix}.bias", (n_out,), "bias")


def _norm(prefix: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}.weight", (width,), "norm")
    yield Parameter(f"{prefix}.bias", (width,), "norm")
