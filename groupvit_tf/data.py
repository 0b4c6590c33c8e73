"""Batches as a `tf.data.Dataset` of dictionaries, which `fit` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from numpy.typing import NDArray

from groupvit_common.data.captioned import Batch
from groupvit_common.recipe import Recipe

Inputs = dict[str, Any]


def inputs(batch: Batch[NDArray[Any]], recipe: Recipe) -> Inputs:
    """What `groupvit_tf.train.ScenesTrainer` takes of a batch: the arrays that the recipe's objective uses, by name."""
    if recipe.objective.kind == "paper":
        return {
            "pixel_values": batch.pixels,
            "prompts": dict(batch.prompts),
            "captions": dict(batch.captions or {}),
            "of_caption": batch.of_caption,
        }
    return {
        "pixel_values": batch.pixels,
        "prompts": dict(batch.prompts),
        "allowed": batch.allowed,
        "named": batch.named,
    }


def dataset(batches: Callable[[], Iterable[Batch[NDArray[Any]]]], recipe: Recipe) -> Any:
    """A `tf.data.Dataset` of a recipe's batches, made one or two ahead while the model computes.

    Args:
        batches: starts the batches anew, such as `groupvit_common.training.Run.batches`.

    The numbers of prompts and tokens are left open, so that a graph is traced once for all batches.
    """
    import tensorflow as tf

    count, side = recipe.schedule.batch_size, recipe.model.image_size
    tokens = tf.TensorSpec((None, None), tf.int64)
    text = {"input_ids": tokens, "attention_mask": tokens}
    signature: Inputs = {"pixel_values": tf.TensorSpec((count, 3, side, side), tf.float32), "prompts": text}
    if recipe.objective.kind == "paper":
        signature |= {"captions": text, "of_caption": tf.TensorSpec((count, None), tf.int64)}
    else:
        patches = (side // recipe.model.patch_size) ** 2
        signature |= {
            "allowed": tf.TensorSpec((count, patches, None), tf.bool),
            "named": tf.TensorSpec((count, None), tf.bool),
        }
    return tf.data.Dataset.from_generator(
        lambda: (inputs(batch, recipe) for batch in batches()), output_signature=signature
    ).prefetch(2)
