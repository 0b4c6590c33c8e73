"""The records that models of both backends return, under transformers' names.

A record is a dictionary of the fields that are present, which can also be read as attributes, by position and in slices
(`out.loss`, `out["loss"]`, `out[0]`, `out[:2]`). A field that is absent reads as None as an attribute and takes no
position, as in transformers. Why a plain dictionary underneath: of the designs tried it alone passes
`keras.Model.predict`, `tf.function`, PyTorch's `DataParallel` and `torch.compile` alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

Array = TypeVar("Array")


class ModelOutput(dict[str, Any]):
    """Base of the records. `fields` lists a record's possible fields, in order."""

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *values: Any, **fields: Any) -> None:
        """Args: values: a mapping or pairs of fields and values; or values of the first fields in order."""
        if len(values) == 1 and _are_pairs(values[0]):
            given = {**dict(values[0]), **fields}
        elif len(values) > len(self.fields):
            raise TypeError(f"{type(self).__name__} has {len(self.fields)} fields, got {len(values)} values")
        else:
            given = {**dict(zip(self.fields, values, strict=False)), **fields}
        unknown = [name for name in given if name not in self.fields]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no field {unknown[0]!r}; its fields are {', '.join(self.fields)}"
            )
        super().__init__({name: given[name] for name in self.fields if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # What is no field is a program's own remark: no value, no position, and lost where a framework copies records.
        if name in type(self).fields:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in type(self).fields:
            raise KeyError(f"{type(self).__name__} has no field {key!r}; its fields are {', '.join(self.fields)}")
        if value is None:
            self.pop(key, None)
        else:
            # Fields keep their order whatever the order of assignment: positions must not depend on it.
            merged = {**self, key: value}
            super().clear()
            super().update({name: merged[name] for name in type(self).fields if name in merged})

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __copy__(self) -> "ModelOutput":
        return type(self)(self)

    copy = __copy__

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the present fields in order; records within become tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def _are_pairs(value: Any) -> bool:
    """Returns whether a value stands for fields and their values; a tensor or a tuple of tensors does not."""
    if isinstance(value, Mapping | zip):
        return True
    if not isinstance(value, list | tuple | Iterator) or isinstance(value, str):
        return False
    return isinstance(value, Iterator) or all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )


class BaseModelOutput(ModelOutput, Generic[Array]):
    """A Transformer's output.

    last_hidden_state: `[B, S, D]`.
    hidden_states: tuple of `[B, S, D]`: the embeddings, then the output of every layer (text) or stage (vision).
    attentions: tuple: text `[B, heads, T, T]` per layer; vision `[B, G_out, G_in]` soft assignments per grouping block.
    """

    fields: ClassVar[tuple[str, ...]] = ("last_hidden_state", "hidden_states", "attentions")

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


class BaseModelOutputWithPooling(BaseModelOutput[Array]):
    """The same with `pooler_output` `[B, D]`: the end-of-text state, or the mean over the groups."""

    fields: ClassVar[tuple[str, ...]] = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")

    pooler_output: Array


class GroupViTModelOutput(ModelOutput, Generic[Array]):
    """The output of a GroupViT for B images and N texts.

    loss: scalar, with `return_loss`: symmetric contrastive loss.
    logits_per_image `[B, N]`, logits_per_text `[N, B]`: cosine similarities times exp(logit_scale).
    segmentation_logits `[B, N, H, W]`, with `output_segmentation`.
    text_embeds `[N, E]`, image_embeds `[B, E]`: unit length.
    text_model_output, vision_model_output: the towers' records.
    """

    fields: ClassVar[tuple[str, ...]] = (
        "loss",
        "logits_per_image",
        "logits_per_text",
        "segmentation_logits",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    )

    loss: Array | None
    logits_per_image: Array
    logits_per_text: Array
    segmentation_logits: Array | None
    text_embeds: Array
    image_embeds: Array
    text_model_output: BaseModelOutputWithPooling[Array]
    vision_model_output: BaseModelOutputWithPooling[Array]
