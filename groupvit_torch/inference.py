"""A Transformer layer in inference on a CPU, in fewer operations than its modules take.

What is no matrix product takes a quarter of an image's time there; an operation costs some microseconds of its own,
as much as a product of few tokens. So a layer's parts are looked at once, and its residual branches are added by the
products themselves or in place: 0.95-0.98 of the time of an image (Zen 3, busy). Layers whose
parts are replaced or watched, gradients, GPUs and compilers take the modules' own way, which has the same values but
for rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from groupvit_torch.attention import attention
from groupvit_torch.linear import (
    has_plain_parameters,
    is_plain_call,
    is_plain_module,
    library,
    products,
    sum_with_mlp,
    sum_with_product,
)

# Of more tokens, PyTorch's operations take as long one by one: between 0.93 and 1.15 of the time, Zen 3.
MOST_ROWS = 512


def is_plain_layer(layer: Any, kinds: tuple[type[nn.Module], type[nn.Module]], x: Tensor) -> bool:
    """Returns whether nothing sees how an `EncoderLayer` is computed, but by its values.

    Args:
        kinds: the classes that its attention and its MLP have if they were not replaced.
    """
    if layer.training or not is_plain_call(x) or not x.numel():
        return False
    if x.shape[:-1].numel() > MOST_ROWS and library(x.dtype) == "PyTorch":
        return False
    # Attributes of modules are found in several times the time of a dictionary's.
    parts = layer._modules
    own_attention, own_mlp = parts["self_attn"], parts["mlp"]
    if not (is_plain_module(own_attention, kinds[0]) and is_plain_module(own_mlp, kinds[1])):
        return False
    norms = [(parts[name], nn.LayerNorm) for name in ("layer_norm1", "layer_norm2")]
    linears = [(linear, nn.Linear) for linear in (*own_attention._modules.values(), *own_mlp._modules.values())]
    return all(is_plain_module(part, kind) and has_plain_parameters(part, x.dtype) for part, kind in norms + linears)


def encoder_layer(layer: Any, x: Tensor, bias: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Returns what a plain `EncoderLayer` makes of `[B, S, D]`; `bias`, `is_causal` as in `attention`."""
    block, mlp = layer.self_attn, layer.mlp
    rows = x.flatten(0, 1)
    q, k, v = (
        values.view(*x.shape[:2], block.num_heads, -1).transpose(1, 2)
        for values in products(block, (block.q_proj, block.k_proj, block.v_proj), _normed(layer.layer_norm1, rows))
    )
    context = attention(q, k, v, bias, is_causal=is_causal).transpose(1, 2).flatten(2).flatten(0, 1)
    y = sum_with_product(rows, block.out_proj, context)
    y = sum_with_mlp(y, mlp.fc1, mlp.activation, mlp.fc2, _normed(layer.layer_norm2, y))
    return y.view(x.shape)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
