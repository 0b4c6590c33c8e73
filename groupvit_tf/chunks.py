"""A batch that goes through a tower a piece at a time, on Keras's TensorFlow backend: the two passes of cached features (Gao et al. 2021)
that `groupvit_tf.train.Trainer` makes with `run.chunk_size`.

What is in memory is one piece's. Eager code frees a piece by itself; a graph computes what it can as soon as it can, so pieces are the
turns of a loop of which one runs at a time, and what must wait for it is told to (`_waiting`). Pieces have `size` rows; the odd
ones, if the rows are no multiple of it, go first, outside the loop.

Shapes: N rows of a tower's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

Tensor = Any
Rows = Any  # tensors `[N, ...]`, nested
Size = Any  # rows at a time: a number, or a tensor where a graph does not know it yet; None: all at once
Encode = Callable[[Rows], dict[str, Tensor]]


def encoded(encode: Encode, rows: Rows, size: Size, after: Rows = ()) -> dict[str, Tensor]:
    """The features `[N, ...]` of all rows, `size` of them at a time. Called outside of a gradient tape, it keeps
    nothing else.

    Args:
        after: tensors to wait for.
    """
    import tensorflow as tf

    first, others, number = _pieces(_waiting(rows, after), _count(rows), size)
    features = encode(first)
    if size is None or _none(number):
        return features
    start = _waiting(tf.constant(0), features)
    kept = {
        name: tf.TensorArray(feature.dtype, number, element_shape=(None, *feature.shape[1:]))
        for name, feature in features.items()
    }

    def turn(index: Tensor, kept: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        found = encode(_piece(others, index))
        return index + 1, {name: array.write(index, found[name]) for name, array in kept.items()}

    _, kept = tf.while_loop(lambda index, _: index < number, turn, (start, kept), parallel_iterations=1)
    return {
        name: tf.concat([feature, tf.reshape(kept[name].stack(), (number * size, *feature.shape[1:]))], axis=0)
        for name, feature in features.items()
    }


def carried_back(
    encode: Encode,
    rows: Rows,
    size: Size,
    gradients: Mapping[str, Tensor],
    variables: Sequence[Any],
    after: Rows = (),
) -> list[Tensor | None]:
    """The gradient of each variable, as a plain tensor, from those of the features; None of one that has no part in them.

    The rows pass again in the order of `encoded`, so that from the same seeds they meet the same noise.

    Args:
        gradients: of the features `[N, ...]` that have one; after: tensors to wait for besides.
    """
    import tensorflow as tf

    if not gradients or not variables:
        return [None] * len(variables)

    def of(piece: Rows, learnt: Sequence[Any]) -> list[Tensor | None]:
        with tf.GradientTape() as tape:
            features = encode(piece["rows"])
        targets = [features[name] for name in piece["gradients"]]
        found = tape.gradient(targets, learnt, output_gradients=list(piece["gradients"].values()))
        return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]

    both = {"rows": _waiting(rows, (dict(gradients), after)), "gradients": dict(gradients)}
    first, others, number = _pieces(both, _count(rows), size)
    sums = of(first, list(variables))
    if _none(number):
        return sums
    places = [place for place, gradient in enumerate(sums) if gradient is not None]
    learnt = [variables[place] for place in places]

    def turn(index: Tensor, sums: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return index + 1, [s + g for s, g in zip(sums, of(_piece(others, index), learnt), strict=True)]

    begun = [sums[place] for place in places]
    start = _waiting(tf.constant(0), begun)
    _, ended = tf.while_loop(lambda index, _: index < number, turn, (start, begun), parallel_iterations=1)
    whole = dict(zip(places, ended, strict=True))
    return [whole.get(place) for place in range(len(variables))]


def _pieces(rows: Rows, count: Size, size: Size) -> tuple[Rows, Rows, Size]:
    """The first rows, the others as `[pieces, size, ...]`, and how many pieces these are."""
    import tensorflow as tf

    if size is None:
        return rows, rows, 0
    first = (count - 1) % size + 1
    number = (count - first) // size
    others = tf.nest.map_structure(lambda x: tf.reshape(x[first:], (number, size, *ops.shape(x)[1:])), rows)
    return tf.nest.map_structure(lambda x: x[:first], rows), others, number


def _none(number: Size) -> bool:
    """Whether a number is known to be zero."""
    return isinstance(number, int) and number == 0


def _count(rows: Rows) -> Size:
    import tensorflow as tf

    return ops.shape(tf.nest.flatten(rows)[0])[0]


def _piece(rows: Rows, index: Tensor) -> Rows:
    import tensorflow as tf

    return tf.nest.map_structure(lambda x: tf.gather(x, index), rows)


def _waiting(values: Rows, before: Rows) -> Rows:
    """The same tensors, in a graph not to be had before others are there."""
    import tensorflow as tf

    with tf.control_dependencies(tf.nest.flatten(before)):
        return tf.nest.map_structure(tf.identity, values)
