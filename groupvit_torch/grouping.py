"""The grouping block: learned group tokens claim image segments (paper, section 3.1, "Grouping Block", equations 2 to
4)."""

import torch
from torch import Tensor, nn

from groupvit_common.model.config import GroupViTVisionConfig
from groupvit_torch.layers import MLP, Attention, MixerMLP
from groupvit_torch.linear import linear


def gumbel_noise_like(logits: Tensor) -> Tensor:
    """Returns standard Gumbel(0, 1) samples of the shape, dtype and device of `logits`."""
    return -torch.empty_like(logits).exponential_().log()


def assign(logits: Tensor, *, noise: Tensor | None = None, hard: bool = True, temperature: float = 1.0) -> Tensor:
    """Assigns every segment to a group: `[B, G, S]` logits -> `[B, G, S]` weights that sum to 1 over G.

    Args:
        noise: Gumbel noise added to the logits, of their shape; None: none (evaluation).
        hard: one group per segment in the value, the soft weights in the gradient (straight-through; paper, equation
            3).
        temperature: divides the noisy logits.
    """
    noisy = logits if noise is None else logits + noise
    soft = (noisy / temperature if temperature != 1.0 else noisy).softmax(dim=1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


def _wide(x: Tensor) -> Tensor:
    """Returns half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CrossAttentionLayer(nn.Module):
    """Cross attention of the group tokens to the segments, before the assignment."""

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.norm_post = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        x = query + self.attn(query, encoder_hidden_states=key)[0]
        x = x + self.mlp(self.norm2(x))
        return self.norm_post(x)


class AssignAttention(nn.Module):
    """Attention whose weights are normalised over the groups instead of the segments."""

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale = width**-0.5
        self.assign_eps = config.assign_eps
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def get_attn(self, attn: Tensor, gumbel: bool = True, hard: bool = True) -> Tensor:
        """Returns the assignment of logits `[B, G, S]`; gumbel: with noise in training."""
        noise = gumbel_noise_like(attn) if gumbel and self.training else None
        return assign(attn, noise=noise, hard=hard)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Args: query, the groups `[B, G, D]`; key, the segments `[B, S, D]`; the others as in `assign`. Noise None is
            drawn in training.

        Returns: the merged segments `[B, G, D]` and the soft assignment without noise `[B, G, S]`.
        """
        # Half precision ends here: two groups are often nearly as likely, and a tie moves the whole patch.
        queries, keys = _wide(linear(self.q_proj, query)), _wide(linear(self.k_proj, key))
        logits = queries @ keys.transpose(1, 2) * self.scale
        if noise is None and self.training:
            noise = gumbel_noise_like(logits)
        weights = assign(logits, noise=noise, hard=hard, temperature=temperature)
        # A mean over the claimed segments; assign_eps shrinks small groups and keeps empty ones finite.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + self.assign_eps)
        values = linear(self.v_proj, key)
        return linear(self.proj, weights.to(values.dtype) @ values), logits.softmax(dim=1).to(values.dtype)


class TokenAssign(nn.Module):
    """The whole grouping block: `[B, S, D]` segments, the image tokens, and `[B, N, D]` group tokens ->
    `[B, G, D]` larger segments."""

    def __init__(self, config: GroupViTVisionConfig, num_group_tokens: int, num_output_groups: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_output_group = num_output_groups
        tokens_width, channels_width = (int(ratio * width) for ratio in config.assign_mlp_ratio)
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        self.mlp_inter = MixerMLP(config, num_group_tokens, tokens_width, num_output_groups)
        self.norm_post_tokens = nn.LayerNorm(width, eps=eps)
        self.norm_x = nn.LayerNorm(width, eps=eps)
        self.pre_assign_attn = CrossAttentionLayer(config)
        self.assign = AssignAttention(config)
        self.norm_new_x = nn.LayerNorm(width, eps=eps)
        self.mlp_channels = MLP(config, width, channels_width, width)

    def project_group_token(self, group_tokens: Tensor) -> Tensor:
        """`[B, N, D]` normed group tokens -> `[B, G, D]`: one for each group that the block leaves."""
        return self.norm_post_tokens(self.mlp_inter(group_tokens))

    def forward(
        self,
        image_tokens: Tensor,
        group_tokens: Tensor,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Returns the new segments `[B, G, D]` and the soft assignment `[B, G, S]`; `noise`, `hard`, `temperature`:
        `assign`."""
        segments = self.norm_x(image_tokens)
        groups = self.project_group_token(self.norm_tokens(group_tokens))
        groups = self.pre_assign_attn(groups, segments)
        merged, assignment = self.assign(groups, segments, noise, hard, temperature)
        merged = merged + groups
        return merged + self.mlp_channels(self.norm_new_x(merged)), assignment
