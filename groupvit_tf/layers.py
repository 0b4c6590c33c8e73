"""The parts that both towers are made of: attention, MLP, Transformer layer, projection.

Shapes: B batch, S tokens, D width (legend in docs/architecture.md). Layer names are those of transformers' state dict,
so that the path of a Keras variable is the tensor's canonical name but for its last part (`groupvit_tf.checkpoint`).

Every layer makes its sub-layers in its constructor and builds them in `build`, which needs no shapes: a model has all
its weights before its first call. Flags go to sub-layers by keyword, because Keras takes tensors only by position.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from groupvit_common.model.checks import check_batch_norm
from groupvit_common.model.config import GroupViTTextConfig, GroupViTVisionConfig
from groupvit_tf.distributed import Seeds, num_replicas, replica_sum
from groupvit_tf.variables import ONES, ZEROS, SharedConstant

TowerConfig = GroupViTTextConfig | GroupViTVisionConfig
Tensor = Any


def wide_dtype(dtype: Any) -> str:
    """Returns float32 for half precision, else the dtype. Keras's `result_type` takes float64 for float32 on JAX."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def mean(x: Tensor, axis: int | None = None) -> Tensor:
    """Returns the mean over one axis, or all. Keras's own computes float64 in float32 on JAX."""
    if _narrowed(x.dtype):
        return ops.sum(x, axis=axis) / (ops.size(x) if axis is None else x.shape[axis])
    return ops.mean(x, axis=axis)


def _length(x: Tensor) -> Any:
    """Returns the size of axis 1: a number, or a tensor where only a running graph knows it."""
    return ops.shape(x)[1] if x.shape[1] is None else x.shape[1]


def _narrowed(dtype: Any) -> bool:
    """Returns whether Keras computes means and norms of this dtype in a narrower one."""
    return keras.backend.backend() == "jax" and wide_dtype(dtype) == "float64"


# The two GELUs are written out: the constants of TensorFlow's own are float32, which costs float64 half its digits.
def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + ops.erf(x * 2**-0.5))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * ops.sigmoid(1.702 * x)


def _gelu_new(x: Tensor) -> Tensor:
    # (1 + tanh(y)) / 2 is sigmoid(2 y); Keras's tanh is float32 on JAX.
    return x * ops.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))


# The names of `groupvit_common.model.config.ACTIVATIONS`, transformers' names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "quick_gelu": _quick_gelu,
    "gelu_new": _gelu_new,
    "relu": ops.relu,
    "selu": ops.selu,
    "silu": ops.silu,
}


def softmax(x: Tensor, axis: int) -> Tensor:
    """Returns the softmax over one axis. Keras's own warns of an axis of one entry: one group, one patch."""
    return ops.ones_like(x) if x.shape[axis] == 1 else ops.softmax(x, axis=axis)


class Tracked:
    """A layer whose sub-layers in lists and dictionaries `tf.train.Checkpoint` finds: Keras shows attributes alone."""

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **options)  # type: ignore[misc]
        if save_type == "checkpoint":
            for name, value in vars(self).items():
                if isinstance(value, list | tuple | dict) and not name.startswith("_"):
                    items = value.items() if isinstance(value, dict) else enumerate(value)
                    children |= {f"{name}.{key}": item for key, item in items if isinstance(item, keras.layers.Layer)}
        return children


class Block(keras.layers.Layer):
    """A layer that is built by building its sub-layers, which need no shapes."""

    def build(self, input_shape: Any = None) -> None:
        for layer in self._layers:
            layer.build()


class Dense(keras.layers.Dense):
    """A dense layer that knows the width of its input, and can be built without being called."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        # Zeros: `groupvit_tf.init` draws the values, once the model is whole.
        super().__init__(out_features, kernel_initializer=ZEROS, bias_initializer=ZEROS, **kwargs)
        self.in_features = in_features

    def build(self, input_shape: Any = None) -> None:
        super().build((None, self.in_features))

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._as_matrix(super().call, x)

    def quantized_call(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._as_matrix(super().quantized_call, x)

    def _as_matrix(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # TensorFlow multiplies more axes than two by ten operations where a length is not known.
        if len(x.shape) != 3:
            return call(x)
        return ops.reshape(call(ops.reshape(x, (-1, self.in_features))), (-1, _length(x), self.units))

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Does as `keras.layers.Dense.quantize`, which leaves subclasses alone: they might compute something else."""
        super().quantize(mode, type_check=False, config=config)


class LayerNorm(keras.layers.LayerNormalization):
    """Layer norm over the last axis, of a width that is known."""

    def __init__(self, width: int, eps: float, **kwargs: Any) -> None:
        super().__init__(epsilon=eps, gamma_initializer=ONES, beta_initializer=ZEROS, **kwargs)
        self.width = width

    def build(self, input_shape: Any = None) -> None:
        super().build((None, self.width))

    def call(self, x: Tensor) -> Tensor:
        if not _narrowed(x.dtype):
            return super().call(x)
        centred = x - ops.sum(x, axis=-1, keepdims=True) / self.width
        variance = ops.sum(ops.square(centred), axis=-1, keepdims=True) / self.width
        return centred * ops.rsqrt(variance + self.epsilon) * self.gamma + self.beta


class BatchNorm(keras.layers.Layer):
    """Batch norm over `[B, D]` with PyTorch's numbers: running statistics move by a tenth, their variance is the
    unbiased one.

    Keras's own layer keeps the biased variance, and counts no batches. Under a distribution strategy the statistics are
    those of the whole batch. Computed in float32 at least. Frozen, it uses what it has kept, as every batch norm of
    Keras.
    """

    epsilon = 1e-5
    momentum = 0.1  # of the new value, as PyTorch has it

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width

    def build(self, input_shape: Any = None) -> None:
        shape = (self.width,)
        self.gamma = self.add_weight(shape=shape, initializer=ONES, name="gamma", autocast=False)
        self.beta = self.add_weight(shape=shape, initializer=ZEROS, name="beta", autocast=False)

        def statistic(name: str, initial: SharedConstant, **kind: Any) -> Any:
            # Every replica computes the same value, so any of them may be kept.
            return self.add_weight(
                initializer=initial,
                name=name,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                **kind,
            )

        self.moving_mean = statistic("moving_mean", ZEROS, shape=shape)
        self.moving_variance = statistic("moving_variance", ONES, shape=shape)
        self.num_batches_tracked = statistic("num_batches_tracked", ZEROS, shape=(), dtype="int32")

    def call(self, x: Tensor, training: bool = False, together: bool = True, keep: bool = True) -> Tensor:
        """Args:
        together: False: over this replica's rows alone, for inputs that are the same on every replica.
        keep: False: the statistics of the batch are used, but not kept.
        """
        wide = ops.cast(x, wide_dtype(x.dtype))
        mean, variance = (ops.cast(v, wide.dtype) for v in (self.moving_mean, self.moving_variance))
        if training and self.trainable_variables:
            own_mean, own_variance, count = batch_statistics(wide, together)
            # A batch of one row, which only a running graph may know, has no variance: it uses the kept statistics.
            several = count > 1
            if keep:
                self._move(self.moving_mean, own_mean, several)
                self._move(self.moving_variance, own_variance * (count / ops.maximum(count - 1, 1)), several)
                self.num_batches_tracked.assign_add(ops.cast(several, "int32"))
            mean, variance = ops.where(several, own_mean, mean), ops.where(several, own_variance, variance)
        gamma, beta = (ops.cast(v, wide.dtype) for v in (self.gamma, self.beta))
        return ops.cast((wide - mean) * (ops.rsqrt(variance + self.epsilon) * gamma) + beta, x.dtype)

    def _move(self, running: Any, value: Tensor, several: Tensor) -> None:
        value = ops.cast(ops.stop_gradient(value), running.dtype)
        kept = ops.convert_to_tensor(running)  # JAX takes no variable there
        running.assign(ops.where(several, kept * (1 - self.momentum) + value * self.momentum, kept))


def batch_statistics(x: Tensor, together: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean `[D]`, biased variance `[D]` and number of the rows of `[B, D]`, over all replicas.

    Raises `InputError` for one row.
    """
    if num_replicas() == 1:
        check_batch_norm(x.shape[0])
    total = replica_sum if together else (lambda value: value)
    count = total(ops.cast(ops.shape(x)[0], x.dtype))
    rows = ops.maximum(count, 1)
    mean = total(ops.sum(x, axis=0)) / rows
    variance = total(ops.sum(ops.square(x - mean), axis=0)) / rows
    return mean, variance, count


def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Returns the sum of two biases, of which either may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


class Attention(Block):
    """Multi-head scaled dot-product attention, of a sequence to itself or to another."""

    def __init__(self, config: TowerConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = config.hidden_size
        self.embed_dim = width
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.seed_generator = Seeds() if self.dropout else None
        self.k_proj = Dense(width, width, name="k_proj", dtype=self.dtype_policy)
        self.v_proj = Dense(width, width, name="v_proj", dtype=self.dtype_policy)
        self.q_proj = Dense(width, width, name="q_proj", dtype=self.dtype_policy)
        self.out_proj = Dense(width, width, name="out_proj", dtype=self.dtype_policy)

    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_attentions: bool = False,
        training: bool = False,
        dropout_seed: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Args: hidden_states, the queries `[B, S, D]`; encoder_hidden_states, the keys `[B, S', D]`, None: the
        queries; attention_mask, causal_attention_mask broadcastable to `[B, heads, S, S']`, added to the logits;
        dropout_seed: instead of a fresh one (see `FixedSeed`).

        Returns: output `[B, S, D]` and, if requested, the weights `[B, heads, S, S']` (before dropout's scaling: as
            used).
        """
        query, key = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attn_bias = added(attention_mask, causal_attention_mask)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(key))
        logits = ops.matmul(q * self.scale, ops.transpose(k, (0, 1, 3, 2)))
        weights = softmax(logits if attn_bias is None else logits + attn_bias, axis=-1)
        used = weights
        if training and self.dropout:
            used = keras.random.dropout(weights, self.dropout, seed=dropout_seed or self.seed_generator)
        context = ops.transpose(ops.matmul(used, v), (0, 2, 1, 3))
        context = ops.reshape(context, (-1, _length(query), self.num_heads * self.head_dim))
        return self.out_proj(context), weights if output_attentions else None

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, S, D]` -> `[B, heads, S, D / heads]`."""
        x = ops.reshape(x, (-1, _length(x), self.num_heads, self.head_dim))
        return ops.transpose(x, (0, 2, 1, 3))


class FixedSeed(keras.random.SeedGenerator):
    """A seed that is drawn once and the same for every use.

    Gradient checkpointing computes a layer a second time in the backward pass: it must drop the same entries again.
    """

    def __init__(self, seed: Any) -> None:
        # Without the parent's constructor, which would make a variable.
        self._seed = seed

    def next(self, ordered: bool = True) -> Any:
        return self._seed


class MLP(Block):
    """Two dense layers over the last axis. `in_features`, `out_features` default to the tower's width."""

    def __init__(
        self,
        config: TowerConfig,
        in_features: int | None = None,
        hidden_features: int | None = None,
        out_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        in_features = in_features or config.hidden_size
        hidden_features = hidden_features or config.intermediate_size
        out_features = out_features or config.hidden_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Dense(in_features, hidden_features, name="fc1", dtype=self.dtype_policy)
        self.fc2 = Dense(hidden_features, out_features, name="fc2", dtype=self.dtype_policy)

    def call(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class MixerMLP(MLP):
    """An MLP across tokens: `[B, in, D]` -> `[B, out, D]`."""

    def call(self, x: Tensor) -> Tensor:
        return ops.transpose(super().call(ops.transpose(x, (0, 2, 1))), (0, 2, 1))


class DropPath:
    """Drops a residual branch `[B, S, D]` for a random fraction `rate` of the batch and scales it up for the others
    (stochastic depth, Huang et al. 2016).

    No Keras layer, since training gives it to layers that are built; `seeds` belong to the training run.
    """

    def __init__(self, rate: float, seeds: keras.random.SeedGenerator) -> None:
        self.rate = rate
        self.seeds = seeds

    def __call__(self, x: Tensor, seed: Any = None) -> Tensor:
        return keras.random.dropout(x, self.rate, noise_shape=(None, 1, 1), seed=seed or self.seeds)


class EncoderLayer(Block):
    """A pre-norm Transformer layer.

    `drop_path`: drops its two branches at random in training; the training run sets it.
    """

    def __init__(self, config: TowerConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed_dim = config.hidden_size
        self.drop_path: DropPath | None = None
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = Attention(config, name="self_attn", dtype=self.dtype_policy)
        self.layer_norm1 = LayerNorm(width, eps, name="layer_norm1", dtype=self.dtype_policy)
        self.mlp = MLP(config, name="mlp", dtype=self.dtype_policy)
        self.layer_norm2 = LayerNorm(width, eps, name="layer_norm2", dtype=self.dtype_policy)

    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        training: bool = False,
        dropout_seed: Any = None,
        drop_path_seeds: tuple[Any, Any] = (None, None),
    ) -> tuple[Tensor, ...]:
        """`[B, S, D]` -> `[B, S, D]`, and the attention weights if requested (see `Attention`).

        dropout_seed, drop_path_seeds: instead of fresh ones (see `FixedSeed`).
        """
        attended, weights = self.self_attn(
            self.layer_norm1(hidden_states),
            attention_mask,
            causal_attention_mask,
            output_attentions=output_attentions,
            training=training,
            dropout_seed=dropout_seed,
        )
        x = hidden_states + self._kept(attended, training, drop_path_seeds[0])
        x = x + self._kept(self.mlp(self.layer_norm2(x)), training, drop_path_seeds[1])
        return (x,) if weights is None else (x, weights)

    def _kept(self, branch: Tensor, training: bool, seed: Any) -> Tensor:
        return branch if self.drop_path is None or not training else self.drop_path(branch, seed)

    def rematerialised(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Computes the layer in training without keeping intermediate values: the backward pass computes them again."""
        generator = self.self_attn.seed_generator
        seed = None if generator is None else FixedSeed(generator.next())
        path_seeds: tuple[Any, Any] = (None, None)
        if self.drop_path is not None:
            path_seeds = (FixedSeed(self.drop_path.seeds.next()), FixedSeed(self.drop_path.seeds.next()))

        def layer(x: Tensor) -> tuple[Tensor, ...]:
            return self(
                x,
                attention_mask,
                causal_attention_mask,
                output_attentions=output_attentions,
                training=True,
                dropout_seed=seed,
                drop_path_seeds=path_seeds,
            )

        outputs: tuple[Tensor, ...] = keras.remat(layer)(hidden_states)
        return outputs


class Projection(Block):
    """The MLP into the shared embedding (paper, section 3.2; batch norm as in the authors' code)."""

    def __init__(self, width: int, hidden_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = Dense(width, hidden_features, name="0", dtype=self.dtype_policy)
        self.norm = BatchNorm(hidden_features, name="1", dtype=self.dtype_policy)
        self.output_shape = (None, out_features)  # for `summary`
        self.output_layer = Dense(hidden_features, out_features, name="3", dtype=self.dtype_policy)

    def call(self, x: Tensor, training: bool = False, together: bool = True, keep: bool = True) -> Tensor:
        """`[B, D]` -> `[B, E]`; the last two arguments as in `BatchNorm`."""
        normed = self.norm(self.hidden(x), training=training, together=together, keep=keep)
        return self.output_layer(ops.relu(normed))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        """Returns one of the four steps, as in a list of layers."""
        return (self.hidden, self.norm, ops.relu, self.output_layer)[index]
