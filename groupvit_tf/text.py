"""The text tower: token ids -> a causal Transformer -> the state at the end-of-text token.

Shapes: N texts, T tokens, D width (legend in docs/architecture.md).
"""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from groupvit_common.model.checks import check_id_range, check_input_ids, given
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTTextConfig
from groupvit_common.model.text_length import TOKEN_STEP, needed_length
from groupvit_tf.compat.model import Keywords, flags
from groupvit_tf.layers import Block, EncoderLayer, LayerNorm, Tensor, Tracked
from groupvit_tf.outputs import BaseModelOutput, BaseModelOutputWithPooling
from groupvit_tf.variables import ZEROS


class Embedding(keras.layers.Embedding):
    """An embedding that starts with zeros: `groupvit_tf.init` draws the values, once the model is whole."""

    def __init__(self, input_dim: int, output_dim: int, **kwargs: Any) -> None:
        super().__init__(input_dim, output_dim, embeddings_initializer=ZEROS, **kwargs)

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Does as `keras.layers.Embedding.quantize`, which leaves subclasses alone: they might compute something
        else."""
        super().quantize(mode, type_check=False, config=config)


class TextEmbeddings(Block):
    def __init__(self, config: GroupViTTextConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.token_embedding = Embedding(
            config.vocab_size, config.hidden_size, name="token_embedding", dtype=self.dtype_policy
        )
        self.position_embedding = Embedding(
            config.max_position_embeddings, config.hidden_size, name="position_embedding", dtype=self.dtype_policy
        )

    @property
    def position_ids(self) -> Tensor:
        """Returns all positions `[1, most tokens]`."""
        return ops.arange(self.position_embedding.input_dim)[None]

    def call(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        tokens = self.token_embedding(given(input_ids, "input_ids")) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = ops.arange(ops.shape(tokens)[1])
        return tokens + self.position_embedding(position_ids)


class TextEncoder(Keywords, Tracked, Block):
    def __init__(self, config: GroupViTTextConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.gradient_checkpointing = False
        self.layers = [
            EncoderLayer(config, name=f"layers.{index}", dtype=self.dtype_policy)
            for index in range(config.num_hidden_layers)
        ]

    @flags
    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        training: bool = False,
    ) -> BaseModelOutput[Tensor]:
        """Applies the layers to embeddings `[N, T, D]`; masks as in `Attention`. Returns the fields of `TextTower`'s
        record."""
        x = hidden_states
        states = [x] if output_hidden_states else []
        attentions: list[Tensor] = []
        for layer in self.layers:
            if self.gradient_checkpointing and training:
                outputs = layer.rematerialised(x, attention_mask, causal_attention_mask, output_attentions)
            else:
                outputs = layer(
                    x, attention_mask, causal_attention_mask, output_attentions=output_attentions, training=training
                )
            x = outputs[0]
            states += [x] if output_hidden_states else ()
            attentions += outputs[1:] if output_attentions else ()
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class TextTower(Keywords, Block):
    """Token ids -> pooled text."""

    def __init__(self, config: GroupViTTextConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.output_shape = (None, config.hidden_size)  # of the pooled text, for `summary`
        self.embeddings = TextEmbeddings(config, name="embeddings", dtype=self.dtype_policy)
        self.encoder = TextEncoder(config, name="encoder", dtype=self.dtype_policy)
        self.final_layer_norm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, name="final_layer_norm", dtype=self.dtype_policy
        )

    @flags
    def call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        training: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Args:
            input_ids: `[N, T]` integers; attention_mask: `[N, T]`, 1 for tokens, 0 for padding; position_ids: `[N, T]`.

        Returns:
            `last_hidden_state` `[N, T, D]`, `pooler_output` `[N, D]`; `attentions`: per layer `[N, heads, T, T]`;
            `hidden_states`: the embeddings, then every layer's output.
        """
        # Ids fit, and 64-bit integers are slow or not there on many devices.
        input_ids = ops.cast(input_ids, "int32")
        x = self.embeddings(input_ids, position_ids)
        bias = _attention_bias(x, attention_mask)
        encoded = self.encoder(
            x,
            bias,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            training=training,
        )
        x = self.final_layer_norm(encoded.last_hidden_state)
        end = ops.expand_dims(self.end_of_text(input_ids), -1)
        chosen = ops.expand_dims(ops.equal(ops.arange(ops.shape(x)[1], dtype=end.dtype), end), -1)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            # One term per text is not zero; a lookup is no faster, and TensorFlow's writes to the terminal.
            pooler_output=ops.sum(ops.where(chosen, x, ops.zeros_like(x)), axis=1),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @property
    def eos_token_id(self) -> int:
        return self.config.eos_token_id

    def end_of_text(self, input_ids: Tensor) -> Tensor:
        """Returns position `[N]` of each text's first end-of-text token (0 where there is none)."""
        return _end_of_text(self.config, input_ids)


def check_ids(input_ids: Any, attention_mask: Any, config: GroupViTTextConfig) -> None:
    """Raises `InputError` for ids that the tower cannot read. Their range is checked outside of graphs."""
    dtype = keras.backend.standardize_dtype(input_ids.dtype)
    mask_shape = None if attention_mask is None else tuple(attention_mask.shape)
    # Keras builds models around ours from shapes alone: what stands for ids then are floating-point placeholders.
    is_integer = "int" in dtype or in_symbolic_scope()
    check_input_ids(tuple(input_ids.shape), dtype, is_integer, mask_shape, config)
    ids = _values(input_ids)
    if ids is not None and ids.size:
        check_id_range(int(ids.min()), int(ids.max()), config)


def without_padding(
    config: GroupViTTextConfig,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    step: int = 1,
) -> tuple[Any, Any, Any]:
    """Returns the inputs of a tower without the columns at their end that change no pooled state.

    In programs of JAX, whose shapes are fixed, and where fetching values would stall: the inputs as they are. In
    graphs of TensorFlow the length is a tensor.

    Args:
        step: lengths are multiples of it: few shapes for a compiler. JAX, which compiles for each, has `TOKEN_STEP`.
    """
    whole = input_ids.shape[1]
    # Positions may come as lists, or in a shape that the tower refuses.
    positions = whole if position_ids is None else getattr(position_ids, "shape", (0,))[-1]
    length = None
    if positions == whole and 0 not in input_ids.shape:
        length = _shorter_length(config, input_ids, attention_mask, step)
    if length is None:
        return input_ids, attention_mask, position_ids
    return (
        input_ids[:, :length],
        None if attention_mask is None else attention_mask[:, :length],
        None if position_ids is None else position_ids[..., :length],
    )


def with_padding(
    output: BaseModelOutputWithPooling[Tensor], columns: Any, whole: Any
) -> BaseModelOutputWithPooling[Tensor]:
    """Returns a tower's record with zeros at the columns that `without_padding` left out.

    Args:
        columns: the ids of the record, `[N, T']`; whole: those before they were cut, `[N, T]`.
    """
    if columns is whole:
        return output
    total = ops.shape(whole)[1]

    def padded(x: Tensor, axis: int) -> Tensor:
        # As many zeros as there are columns at all: XLA needs a fixed number, and the rest is cut off again.
        shape = [*ops.shape(x)]
        shape[axis] = total if x.shape[axis] is None else total - x.shape[axis]
        longer = ops.concatenate([x, ops.zeros(shape, x.dtype)], axis=axis)
        return longer if x.shape[axis] is not None else longer[(slice(None),) * axis + (slice(total),)]

    states, attentions = padded(output.last_hidden_state, 1), output.attentions
    if attentions is not None:
        attentions = tuple(padded(padded(weights, 2), 3) for weights in attentions)
    return BaseModelOutputWithPooling({**output, "last_hidden_state": states, "attentions": attentions})


def _shorter_length(config: GroupViTTextConfig, input_ids: Any, attention_mask: Any, step: int) -> Any:
    """Returns the number of columns that are needed, in a graph as a tensor; None: all, or it is not known."""
    ids, mask = _values(input_ids), None if attention_mask is None else _values(attention_mask)
    if ids is None or (attention_mask is not None and mask is None):
        return _needed_length(config, input_ids, attention_mask) if _in_graph() else None
    step = TOKEN_STEP if keras.backend.backend() == "jax" else step
    length = -(-needed_length(ids, None if mask is None else mask != 0, config.eos_token_id) // step) * step
    return length if length < ids.shape[1] else None


def _needed_length(config: GroupViTTextConfig, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`needed_length` in a graph."""
    end = ops.cast(_end_of_text(config, input_ids), "int32")
    if attention_mask is not None:
        attended = ops.not_equal(attention_mask, 0)
        positions = ops.arange(ops.shape(input_ids)[1], dtype="int32")
        sees = ops.any(ops.logical_and(attended, positions <= end[:, None]), axis=1)
        last = ops.max(ops.where(attended, positions, 0), axis=1)
        end = ops.where(sees, end, ops.maximum(end, last))
    # A replica may have no texts at all.
    return ops.maximum(ops.max(end), 0) + 1


def _in_graph() -> bool:
    """Returns whether a graph of TensorFlow is being traced."""
    if keras.backend.backend() != "tensorflow" or in_symbolic_scope():
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def _end_of_text(config: GroupViTTextConfig, input_ids: Tensor) -> Tensor:
    """Returns position `[N]` of each text's first end-of-text token (0 where there is none)."""
    eos = config.eos_token_id
    score = input_ids if eos == LEGACY_EOS_TOKEN_ID else ops.cast(ops.equal(input_ids, eos), "int32")
    return ops.argmax(score, axis=-1)


def _values(tensor: Any) -> np.ndarray[Any, Any] | None:
    """Returns the numbers of a tensor on the CPU; None in a graph, and where fetching them would stall."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        on_cpu = isinstance(tensor, tf.Tensor) and tf.executing_eagerly() and "CPU" in getattr(tensor, "device", "")
        return tensor.numpy() if on_cpu and hasattr(tensor, "numpy") else None
    if keras.backend.backend() == "jax":
        import jax

        known = isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer)
        on_cpu = known and all(device.platform == "cpu" for device in tensor.devices())
        return np.asarray(tensor) if on_cpu else None
    return None


def _attention_bias(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns the logits' bias `[1 or N, 1, T, T]`: the dtype's lowest number where attention is masked."""
    position = ops.arange(ops.shape(x)[1])
    lowest = ops.convert_to_tensor(np.asarray(ml_dtypes.finfo(keras.backend.standardize_dtype(x.dtype)).min))
    zero = ops.zeros_like(lowest)
    bias = ops.where(position[None, :] > position[:, None], lowest, zero)[None, None]
    if attention_mask is None:
        return bias
    # The two lowest numbers may add up to -inf; no row is -inf throughout, because a token's bias to itself is finite.
    # By expand_dims: LiteRT has no slice that adds two axes.
    return bias + ops.expand_dims(ops.where(ops.equal(attention_mask, 0), lowest, zero), (1, 2))
