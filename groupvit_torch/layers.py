"""The parts that both towers are made of: attention, MLP, Transformer layer, projection.

Shapes: B batch, S tokens, D width (legend in docs/architecture.md). Module names are those of transformers' state dict.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn import functional as F

from groupvit_common.model.checks import check_batch_norm
from groupvit_common.model.config import GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.attention import attention, attention_weights
from groupvit_torch.inference import encoder_layer, is_plain_layer
from groupvit_torch.linear import linear, linears, mlp, quick_gelu
from groupvit_torch.recompute import recomputed

TowerConfig = GroupViTTextConfig | GroupViTVisionConfig


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The names of `groupvit_common.model.config.ACTIVATIONS`, transformers' names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": _gelu_new,
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
}


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over `[B, D]` that refuses a batch of one in training in a sentence of ours."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            check_batch_norm(x.shape[0])
        return super().forward(x)


def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Returns the sum of two biases, of which either may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


class Attention(nn.Module):
    """Multi-head scaled dot-product attention, of a sequence to itself or to another."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embed_dim = width
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_attentions: bool = False,
        *,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Args: hidden_states, the queries `[B, S, D]`; encoder_hidden_states, the keys `[B, S', D]`, None: the
        queries; attention_mask, causal_attention_mask broadcastable to `[B, heads, S, S']`, added to the logits;
        is_causal: tokens attend to none that come later.

        Returns: output `[B, S, D]` and, if requested, the weights `[B, heads, S, S']` (before dropout's scaling: as
            used).
        """
        attn_bias = added(attention_mask, causal_attention_mask)
        if encoder_hidden_states is None:
            projected = linears(self, (self.q_proj, self.k_proj, self.v_proj), hidden_states)
        else:
            key = encoder_hidden_states
            projected = [linear(self.q_proj, hidden_states), linear(self.k_proj, key), linear(self.v_proj, key)]
        q, k, v = map(self._heads, projected)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions:
            # The fused kernel never holds the weights; requesting them costs the plain computation.
            weights = attention_weights(q, k, attn_bias, is_causal=is_causal)
            context = F.dropout(weights, dropout) @ v
        else:
            context = attention(q, k, v, attn_bias, is_causal=is_causal, dropout=dropout)
        return linear(self.out_proj, context.transpose(1, 2).flatten(2)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, S, D]` -> `[B, heads, S, D / heads]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two dense layers over the last axis. `in_features`, `out_features` default to the tower's width."""

    def __init__(
        self,
        config: TowerConfig,
        in_features: int | None = None,
        hidden_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        in_features = in_features or config.hidden_size
        hidden_features = hidden_features or config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # A trace is the same with gradients and without.
        if is_tracing() or not torch.is_grad_enabled():
            return mlp(self.fc1, self.activation, self.fc2, x)
        hidden = linear(self.fc1, x)
        activated = self.activation(hidden)
        with recomputed(activated, lambda: self.activation(hidden)):
            return linear(self.fc2, activated)


class MixerMLP(MLP):
    """An MLP across tokens: `[B, in, D]` -> `[B, out, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Returns a residual branch `[B, S, D]`, dropped for a random fraction `rate` of the batch in training and scaled
    up for the others (stochastic depth, Huang et al. 2016)."""
    if not training or rate == 0.0:
        return x
    kept = torch.empty((len(x), 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - rate)
    return x * kept / (1.0 - rate)


@contextmanager
def normed(norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Gives `norm(x)`; what is computed of it within does not keep it for the backward pass."""
    y = norm(x)
    if type(norm) is nn.LayerNorm and not norm._forward_hooks and not norm._forward_pre_hooks:
        with recomputed(y, lambda: norm.forward(x)):
            yield y
    else:
        yield y


class EncoderLayer(nn.Module):
    """A pre-norm Transformer layer.

    `drop_path`: the rate at which its two branches are dropped in training; the training run sets it.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.embed_dim = config.hidden_size
        self.drop_path = 0.0
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        *,
        is_causal: bool = False,
    ) -> tuple[Tensor, ...]:
        """`[B, S, D]` -> `[B, S, D]`, and the attention weights if requested (see `Attention`)."""
        if not output_attentions and is_plain_layer(self, (Attention, MLP), hidden_states):
            attn_bias = added(attention_mask, causal_attention_mask)
            return (encoder_layer(self, hidden_states, attn_bias, is_causal=is_causal),)
        with normed(self.layer_norm1, hidden_states) as queries:
            attended, weights = self.self_attn(
                queries,
                attention_mask,
                causal_attention_mask,
                output_attentions=output_attentions,
                is_causal=is_causal,
            )
        x = hidden_states + drop_path(attended, self.drop_path, self.training)
        with normed(self.layer_norm2, x) as y:
            mixed = self.mlp(y)
        x = x + drop_path(mixed, self.drop_path, self.training)
        return (x,) if weights is None else (x, weights)


class Projection(nn.Sequential):
    """The MLP into the shared embedding (paper, section 3.2; batch norm as in the authors' code)."""

    def __init__(self, width: int, hidden_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(width, hidden_features),
            BatchNorm(hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, out_features),
        )
