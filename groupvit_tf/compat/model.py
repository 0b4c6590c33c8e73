"""Habits of programs written for transformers with a Keras model (see `groupvit_common.compat.model`)."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from groupvit_common.checkpoints.safetensors_file import array_info, stored_bytes
from groupvit_common.compat.model import resized
from groupvit_common.errors import InputError
from groupvit_common.model.checks import given

# State of a batch norm that PyTorch keeps as buffers.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_NOT_LISTED = ("base_model", "dummy_inputs", "groupvit", "input_signature")


def flags(call: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a part's `call` be called as transformers': flags that are None are the configuration's, and
    `return_dict=False` gives a tuple of the present fields."""
    signature = inspect.signature(call)
    parameters = [*signature.parameters.values()]
    by_position = [p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "training"]
    main = by_position[0]

    @functools.wraps(call)
    def with_flags(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(by_position, args, strict=False))
        given(kwargs.get(main), main)
        for flag in ("output_attentions", "output_hidden_states"):
            if kwargs.get(flag) is None:
                kwargs[flag] = getattr(self.config, flag)
        return_dict = kwargs.pop("return_dict", None)
        output = call(self, **kwargs)
        return output if (self.config.use_return_dict if return_dict is None else return_dict) else output.to_tuple()

    place = len(by_position) + 1
    added = inspect.Parameter("return_dict", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    with_flags.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:place], added, *parameters[place:]]
    )
    return with_flags


class Keywords:
    """A layer whose flags may be given by position, as in transformers; Keras itself takes tensors only."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = [*inspect.signature(self.call).parameters][1 : len(args)]  # type: ignore[attr-defined]
        return super().__call__(*args[:1], **dict(zip(names, args[1:], strict=True)), **kwargs)  # type: ignore[misc]


class TransformersMethods:
    """Methods of transformers' base class that touch variables."""

    framework: ClassVar[str] = "tf"
    main_input_name: ClassVar[str]

    config: Any

    def __dir__(self) -> list[str]:
        # Keras saves what `dir` lists: it must not meet the model in itself, nor compute the rest.
        return [name for name in super().__dir__() if name not in _NOT_LISTED]

    @property
    def groupvit(self) -> Any:
        """The model itself: transformers' TensorFlow models hold all their parts in a layer of this name."""
        return self

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """A text of two tokens and an image of the trained size, all ones, as far as the model takes them."""
        sizes = {name: [1, *(side or 2 for side in spec.shape[1:])] for name, spec in self.input_signature.items()}
        return {name: ops.ones(size, self.input_signature[name].dtype.name) for name, size in sizes.items()}

    @property
    def input_signature(self) -> dict[str, Any]:
        """The shapes and types of the inputs, as TensorFlow's specifications."""
        import tensorflow as tf

        names = self._input_names()
        found: dict[str, Any] = {
            name: tf.TensorSpec((None, None), tf.int32, name=name)
            for name in ("input_ids", "attention_mask")
            if name in names
        }
        if "pixel_values" in names:
            config = getattr(self.config, "vision_config", self.config)
            shape = (None, config.num_channels, config.image_size, config.image_size)
            found["pixel_values"] = tf.TensorSpec(shape, tf.float32, name="pixel_values")
        return found

    def serving(self, inputs: Mapping[str, Any]) -> Any:
        """Returns the outputs for a dictionary of inputs, without dropout; `export` writes a program that does so."""
        return self(dict(inputs), training=False)  # type: ignore[operator]

    eager_serving = serving

    def serving_output(self, output: Any) -> Any:
        """Returns the outputs as they are."""
        return output

    def build_in_name_scope(self) -> None:
        """Does nothing: a model is built when it is made."""

    def get_lm_head(self) -> None:
        """Returns None: the model has no head."""

    get_bias = get_output_layer_with_bias = get_prefix_bias_name = get_lm_head

    def _input_names(self) -> list[str]:
        return list(inspect.signature(self.call).parameters)  # type: ignore[attr-defined]

    # -- sizes --

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of the parameters, and of the batch norms' statistics."""
        found = self._own_tensors().items()
        kept = [value for name, value in found if return_buffers or not name.endswith(_BUFFERS)]
        return sum(stored_bytes(array_info(shape, dtype)) for shape, dtype in kept)

    def _own_tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        raise NotImplementedError

    # -- initial values --

    def post_init(self) -> None:
        """Draws initial values and obeys `config.gradient_checkpointing`; constructors end with it."""
        self.init_weights()
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()
            del self.config.gradient_checkpointing

    def init_weights(self) -> None:
        raise NotImplementedError

    def gradient_checkpointing_enable(self) -> None:
        raise NotImplementedError

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError

    # -- token embeddings --

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Gives the text tower as many tokens, and its configuration; returns the embeddings. Call it before `compile`.

        Args:
            new_num_tokens: None: as many as there are.
            pad_to_multiple_of: rounds the number up to a multiple of this.
            mean_resizing: whether new tokens start as the mean of the old ones, instead of at random with the standard
                deviation `initializer_range`.

        Raises:
            InputError: the model has no token embeddings, or the number is none.
        """
        old = self.get_input_embeddings()
        if not isinstance(old, keras.layers.Embedding):
            raise InputError(f"{type(self).__name__} has no token embeddings to resize")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return old
        config = self.config.get_text_config()
        number = resized(old.input_dim, new_num_tokens, pad_to_multiple_of)
        config.vocab_size = number
        if number == old.input_dim:
            return old
        values = np.asarray(old.embeddings)
        more = (max(number - len(values), 0), values.shape[1])
        if mean_resizing:
            rows = np.broadcast_to(values.astype(np.float32).mean(axis=0), more)
        else:
            rows = np.random.default_rng().normal(scale=config.initializer_range, size=more)
        new = type(old)(number, values.shape[1], name=old.name, dtype=old.dtype_policy)
        new.trainable = old.trainable
        self.set_input_embeddings(new)
        new.embeddings.assign(np.concatenate([values[:number], rows.astype(values.dtype)]))
        return new

    def set_input_embeddings(self, value: Any) -> None:
        raise InputError(f"{type(self).__name__} has no token embeddings to set")


def replace_layer(parent: keras.layers.Layer, name: str, value: keras.layers.Layer) -> None:
    """Puts a layer, built if need be, in the place of a part of one that is built."""
    parent._tracker.unlock()
    # Deleting the attribute does not make Keras forget the layer.
    parent._tracker.untrack(getattr(parent, name))
    delattr(parent, name)
    setattr(parent, name, value)
    if not value.built:
        with parent._open_name_scope():
            value.build(None)
    parent._tracker.lock()
