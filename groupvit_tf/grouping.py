"""The grouping block: learned group tokens claim image segments (paper, section 3.1, "Grouping Block", equations 2 to
4)."""

from typing import Any

import keras
from keras import ops

from groupvit_common.model.config import GroupViTVisionConfig
from groupvit_tf.distributed import Seeds
from groupvit_tf.layers import MLP, Attention, Block, Dense, LayerNorm, MixerMLP, Tensor, softmax, wide_dtype

# The smallest uniform sample: its double logarithm is finite in float32.
_LEAST = 1e-30


def gumbel_noise_like(logits: Tensor, seed: Any = None) -> Tensor:
    """Returns standard Gumbel(0, 1) samples of the shape and dtype of `logits`. seed: a `keras.random.SeedGenerator`;
    None: the global one."""
    dtype = wide_dtype(logits.dtype)
    uniform = keras.random.uniform(ops.shape(logits), minval=_LEAST, maxval=1.0, dtype=dtype, seed=seed)
    return ops.cast(-ops.log(-ops.log(uniform)), logits.dtype)


def assign(logits: Tensor, *, noise: Tensor | None = None, hard: bool = True, temperature: float = 1.0) -> Tensor:
    """Assigns every segment to a group: `[B, G, S]` logits -> `[B, G, S]` weights that sum to 1 over G.

    Args:
        noise: Gumbel noise added to the logits, of their shape; None: none (evaluation).
        hard: one group per segment in the value, the soft weights in the gradient (straight-through; paper, equation
            3).
        temperature: divides the noisy logits.
    """
    noisy = logits if noise is None else logits + ops.cast(noise, logits.dtype)
    soft = softmax(noisy / temperature if temperature != 1.0 else noisy, axis=1)
    if not hard:
        return soft
    one_hot = ops.one_hot(largest(soft, axis=1), soft.shape[1], axis=1, dtype=soft.dtype)
    return one_hot - ops.stop_gradient(soft) + soft


def largest(x: Tensor, axis: int) -> Tensor:
    """Returns the index of the largest number along an axis, of equal ones the first, int32."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Keras's own tells -0.0 from 0.0 by operations on bits, which LiteRT does not have.
        return tf.argmax(x, axis=axis, output_type=tf.int32)
    return ops.argmax(x, axis=axis)


def _wide(x: Tensor) -> Tensor:
    """Returns half precision as float32."""
    return ops.cast(x, wide_dtype(x.dtype))


class CrossAttentionLayer(Block):
    """Cross attention of the group tokens to the segments, before the assignment."""

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attn = Attention(config, name="attn", dtype=self.dtype_policy)
        self.norm2 = LayerNorm(width, eps, name="norm2", dtype=self.dtype_policy)
        self.mlp = MLP(config, name="mlp", dtype=self.dtype_policy)
        self.norm_post = LayerNorm(width, eps, name="norm_post", dtype=self.dtype_policy)

    def call(self, query: Tensor, key: Tensor, training: bool = False) -> Tensor:
        x = query + self.attn(query, encoder_hidden_states=key, training=training)[0]
        x = x + self.mlp(self.norm2(x))
        return self.norm_post(x)


class AssignAttention(Block):
    """Attention whose weights are normalised over the groups instead of the segments."""

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = config.hidden_size
        self.scale = width**-0.5
        self.assign_eps = config.assign_eps
        self.seed_generator = Seeds()
        self.q_proj = Dense(width, width, name="q_proj", dtype=self.dtype_policy)
        self.k_proj = Dense(width, width, name="k_proj", dtype=self.dtype_policy)
        self.v_proj = Dense(width, width, name="v_proj", dtype=self.dtype_policy)
        self.proj = Dense(width, width, name="proj", dtype=self.dtype_policy)

    def get_attn(self, attn: Tensor, gumbel: bool = True, hard: bool = True, training: bool = False) -> Tensor:
        """Returns the assignment of logits `[B, G, S]`; gumbel: with noise in training."""
        noise = gumbel_noise_like(attn, self.seed_generator) if gumbel and training else None
        return assign(attn, noise=noise, hard=hard)

    def call(
        self,
        query: Tensor,
        key: Tensor,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Args: query, the groups `[B, G, D]`; key, the segments `[B, S, D]`; the others as in `assign`. Noise None is
            drawn in training.

        Returns: the merged segments `[B, G, D]` and the soft assignment without noise `[B, G, S]`.
        """
        # Half precision ends here: two groups are often nearly as likely, and a tie moves the whole patch.
        keys = ops.transpose(_wide(self.k_proj(key)), (0, 2, 1))
        logits = ops.matmul(_wide(self.q_proj(query)), keys) * self.scale
        if noise is None and training:
            noise = gumbel_noise_like(logits, self.seed_generator)
        weights = assign(logits, noise=noise, hard=hard, temperature=temperature)
        # A mean over the claimed segments; assign_eps shrinks small groups and keeps empty ones finite.
        weights = weights / (ops.sum(weights, axis=-1, keepdims=True) + self.assign_eps)
        values = self.v_proj(key)
        merged = ops.matmul(ops.cast(weights, values.dtype), values)
        return self.proj(merged), ops.cast(softmax(logits, axis=1), values.dtype)


class TokenAssign(Block):
    """The whole grouping block: `[B, S, D]` segments, the image tokens, and `[B, N, D]` group tokens ->
    `[B, G, D]` larger segments."""

    def __init__(
        self, config: GroupViTVisionConfig, num_group_tokens: int, num_output_groups: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_output_group = num_output_groups
        tokens_width, channels_width = (int(ratio * width) for ratio in config.assign_mlp_ratio)
        self.norm_tokens = LayerNorm(width, eps, name="norm_tokens", dtype=policy)
        self.mlp_inter = MixerMLP(
            config, num_group_tokens, tokens_width, num_output_groups, name="mlp_inter", dtype=policy
        )
        self.norm_post_tokens = LayerNorm(width, eps, name="norm_post_tokens", dtype=policy)
        self.norm_x = LayerNorm(width, eps, name="norm_x", dtype=policy)
        self.pre_assign_attn = CrossAttentionLayer(config, name="pre_assign_attn", dtype=policy)
        self.assign = AssignAttention(config, name="assign", dtype=policy)
        self.norm_new_x = LayerNorm(width, eps, name="norm_new_x", dtype=policy)
        self.mlp_channels = MLP(config, width, channels_width, width, name="mlp_channels", dtype=policy)

    def project_group_token(self, group_tokens: Tensor) -> Tensor:
        """`[B, N, D]` normed group tokens -> `[B, G, D]`: one for each group that the block leaves."""
        return self.norm_post_tokens(self.mlp_inter(group_tokens))

    def call(
        self,
        image_tokens: Tensor,
        group_tokens: Tensor,
        noise: Tensor | None = None,
        hard: bool = True,
        temperature: float = 1.0,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns the new segments `[B, G, D]` and the soft assignment `[B, G, S]`; `noise`, `hard`, `temperature`:
        `assign`."""
        segments = self.norm_x(image_tokens)
        groups = self.project_group_token(self.norm_tokens(group_tokens))
        groups = self.pre_assign_attn(groups, segments, training=training)
        merged, assignment = self.assign(groups, segments, noise, hard=hard, temperature=temperature, training=training)
        merged = merged + groups
        return merged + self.mlp_channels(self.norm_new_x(merged)), assignment
