"""Cached features (`run.chunk_size`; Gao et al. 2021): a whole batch's gradients with a chunk in the towers at a time.

On Keras's TensorFlow backend. Activations in memory are one chunk's. Eager code frees a chunk by itself; a graph
computes what it can as soon as it can, so chunks are the turns of a loop of which one runs at a time, with control
dependencies for what comes after it (`_after`). Chunks have `size` rows; the remainder goes first, outside the loop.
`groupvit_torch.chunks` does the same.

Shapes: N rows of a tower's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.training.recipe import Recipe
from groupvit_tf.objective import Features, Objective, shares_prompts

Tensor = Any
Rows = Any  # tensors `[N, ...]`, nested
Size = Any  # rows at a time: a number, or a tensor where a graph does not know it yet; None: all at once
Encode = Callable[[Rows], dict[str, Tensor]]


def check_chunks(recipe: Recipe) -> None:
    """Raises InputError for a recipe with cached features on a backend of Keras that lacks them."""
    backend = keras.backend.backend()
    if 0 < recipe.run.chunk_size < recipe.schedule.batch_size and backend != "tensorflow":
        raise InputError(
            f"run.chunk_size {recipe.run.chunk_size} asks for cached features, which Keras has on TensorFlow alone, "
            f"not on {backend}: set it to 0, with gradient_checkpointing=true for memory, or use "
            "KERAS_BACKEND=tensorflow"
        )


def cached_backward(
    objective: Objective, inputs: dict[str, Any], chunk: int
) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Computes a batch's loss and gradients with the towers' activations of `chunk` images in memory at a time.

    Three passes ("GradCache"): the features of all chunks without a tape; the loss of all of them and its gradient
    with respect to each; every chunk once more, from the random state it had before, for the variables' gradients.
    Batch norm is in the projections, which come after the features and see all of them, in the second pass only. So
    nothing is approximate.

    Returns:
        The embeddings, the loss, and the gradients of the trainable variables: of the scaled loss, as in Keras's step.
    """
    import tensorflow as tf

    variables = objective.trainable_variables
    rows, sizes = objective.rows(inputs), chunk_sizes(inputs, chunk)
    before = random_state(objective)
    features: Features = {}
    names: dict[str, list[str]] = {}
    for kind, part in rows.items():
        encoded = encode_chunks(partial(objective.encode, kind, training=True), part, sizes[kind], features)
        features |= encoded
        names[kind] = list(encoded)
    after = random_state(objective)
    with tf.GradientTape() as tape:
        tape.watch(features)
        embeddings = objective.embed(features, inputs, training=True)
        loss = objective.compute_loss(inputs, None, embeddings, training=True)
        scaled = objective.optimizer.scale_loss(loss)
    feature_gradients, variable_gradients = tape.gradient(scaled, (features, variables))
    gradients = {id(v): g for v, g in zip(variables, variable_gradients, strict=True) if g is not None}
    set_random_state(before, objective)
    for kind, part in rows.items():
        tower = objective.model.vision_model if kind == "images" else objective.model.text_model
        trainable = tower.trainable_variables
        own = {name: feature_gradients[name] for name in names[kind] if feature_gradients[name] is not None}
        encode = partial(objective.encode, kind, training=True)
        sums = backward_chunks(encode, part, sizes[kind], own, trainable, list(gradients.values()))
        for variable, gradient in zip(trainable, sums, strict=True):
            if gradient is not None:
                gradients[id(variable)] = gradients.get(id(variable), 0) + gradient
    set_random_state(after, objective)
    return embeddings, loss, [gradients.get(id(variable)) for variable in variables]


def chunk_sizes(inputs: Mapping[str, Any], chunk: int) -> dict[str, Size]:
    """Returns how many rows of each kind go through a tower with so many images."""
    sizes: dict[str, Any] = {"images": chunk, "captions": chunk, "prompts": None}
    if "prompts" in inputs and not shares_prompts(inputs):
        sizes["prompts"] = chunk * ops.shape(inputs["prompts"]["input_ids"])[1]
    return sizes


def encode_chunks(encode: Encode, rows: Rows, size: Size, after: Rows = ()) -> dict[str, Tensor]:
    """Takes all rows through a tower, `size` of them at a time. Outside of a gradient tape, it keeps nothing else.

    Args:
        after: tensors that come first.

    Returns:
        The features `[N, ...]`.
    """
    import tensorflow as tf

    first, others, number = _split(_after(rows, after), _count(rows), size)
    features = encode(first)
    if size is None or _is_zero(number):
        return features
    start = _after(tf.constant(0), features)
    kept = {
        name: tf.TensorArray(feature.dtype, number, element_shape=(None, *feature.shape[1:]))
        for name, feature in features.items()
    }

    def turn(index: Tensor, kept: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        found = encode(_chunk(others, index))
        return index + 1, {name: array.write(index, found[name]) for name, array in kept.items()}

    _, kept = tf.while_loop(lambda index, _: index < number, turn, (start, kept), parallel_iterations=1)
    return {
        name: tf.concat([feature, tf.reshape(kept[name].stack(), (number * size, *feature.shape[1:]))], axis=0)
        for name, feature in features.items()
    }


def backward_chunks(
    encode: Encode,
    rows: Rows,
    size: Size,
    gradients: Mapping[str, Tensor],
    variables: Sequence[Any],
    after: Rows = (),
) -> list[Tensor | None]:
    """Computes the variables' gradients, as plain tensors, from those of the features; None for one that is not used.

    The rows pass again in the order of `encode_chunks`, so that from the same seeds they meet the same noise.

    Args:
        gradients: of the features `[N, ...]` that have one.
        after: further tensors that come first.
    """
    import tensorflow as tf

    if not gradients or not variables:
        return [None] * len(variables)

    def backward(part: Rows, variables: Sequence[Any]) -> list[Tensor | None]:
        with tf.GradientTape() as tape:
            features = encode(part["rows"])
        targets = [features[name] for name in part["gradients"]]
        found = tape.gradient(targets, variables, output_gradients=list(part["gradients"].values()))
        return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]

    both = {"rows": _after(rows, (dict(gradients), after)), "gradients": dict(gradients)}
    first, others, number = _split(both, _count(rows), size)
    sums = backward(first, list(variables))
    if _is_zero(number):
        return sums
    places = [place for place, gradient in enumerate(sums) if gradient is not None]
    used = [variables[place] for place in places]

    def turn(index: Tensor, sums: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return index + 1, [s + g for s, g in zip(sums, backward(_chunk(others, index), used), strict=True)]

    begun = [sums[place] for place in places]
    start = _after(tf.constant(0), begun)
    _, ended = tf.while_loop(lambda index, _: index < number, turn, (start, begun), parallel_iterations=1)
    whole = dict(zip(places, ended, strict=True))
    return [whole.get(place) for place in range(len(variables))]


def random_state(module: Any) -> list[Tensor]:
    """Returns the states of all generators that training draws from, in an order that does not change."""
    return [ops.copy(seed) for seed in _seeds(module)]


def set_random_state(states: Sequence[Any], module: Any) -> None:
    """Sets the generators to `random_state`'s states; those that lack one stay."""
    for seed, state in zip(_seeds(module), states, strict=False):
        seed.assign(state)


def _seeds(module: Any) -> list[keras.Variable]:
    return [variable for variable in module.non_trainable_variables if variable.name == "seed_generator_state"]


def _split(rows: Rows, count: Size, size: Size) -> tuple[Rows, Rows, Size]:
    """The first rows, the others as `[chunks, size, ...]`, and the number of these chunks."""
    import tensorflow as tf

    if size is None:
        return rows, rows, 0
    first = (count - 1) % size + 1
    number = (count - first) // size
    others = tf.nest.map_structure(lambda x: tf.reshape(x[first:], (number, size, *ops.shape(x)[1:])), rows)
    return tf.nest.map_structure(lambda x: x[:first], rows), others, number


def _is_zero(number: Size) -> bool:
    """True for a number that is known to be zero."""
    return isinstance(number, int) and number == 0


def _count(rows: Rows) -> Size:
    import tensorflow as tf

    return ops.shape(tf.nest.flatten(rows)[0])[0]


def _chunk(rows: Rows, index: Tensor) -> Rows:
    import tensorflow as tf

    return tf.nest.map_structure(lambda x: tf.gather(x, index), rows)


def _after(values: Rows, before: Rows) -> Rows:
    """The same tensors, in a graph not to be had before others are there."""
    import tensorflow as tf

    with tf.control_dependencies(tf.nest.flatten(before)):
        return tf.nest.map_structure(tf.identity, values)
