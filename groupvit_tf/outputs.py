"""The records of `groupvit_common.model.outputs` and the encodings of the processor, made known to Keras, so that
`fit`, `predict`, `tf.function`, XLA, functional models and JAX find the tensors in them."""

from collections.abc import Iterable
from typing import Any

import keras
import optree

from groupvit_common.compat.features import BatchFeature
from groupvit_common.model.outputs import BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput, ModelOutput
from groupvit_common.preprocessing.encoding import BatchEncoding

__all__ = ["BaseModelOutput", "BaseModelOutputWithPooling", "GroupViTModelOutput", "ModelOutput"]


def _register(record: Any) -> None:
    def flatten(output: Any) -> tuple[list[Any], tuple[str, ...]]:
        return list(output.values()), tuple(output)

    def unflatten(names: Any, values: Iterable[Any]) -> Any:
        return record(zip(names, values, strict=True))

    def flatten_with_entries(output: Any) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
        return (*flatten(output), tuple(output))

    # Keras's namespace for containers.
    optree.register_pytree_node(record, flatten_with_entries, unflatten, namespace="keras")
    if keras.backend.backend() == "jax":
        import jax

        jax.tree_util.register_pytree_node(record, flatten, unflatten)


for _record in (BaseModelOutput, BaseModelOutputWithPooling, GroupViTModelOutput, BatchEncoding, BatchFeature):
    _register(_record)
