"""Batches as dictionaries, which `fit` takes: those of a user in any of Keras's forms, and those of a recipe.

Shapes: B images, M prompts of each caption, W different prompts, T tokens, P patches (legend in docs/architecture.md).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from numpy.typing import NDArray

from groupvit_common.model.text_length import TOKEN_STEP
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.scene_batches import Batch

if TYPE_CHECKING:
    from groupvit_common.data.captions.stream import CaptionBatch
    from groupvit_common.training.run import Stream

Inputs = dict[str, Any]


def inputs(batch: Batch[NDArray[Any]] | CaptionBatch, recipe: Recipe) -> Inputs:
    """Returns a batch as `groupvit_tf.train.Trainer` takes it: the arrays that the recipe's objective uses, by name.

    pixel_values: `[B, 3, H, W]`; captions: tokens `[B, T]`; prompts: tokens `[B, M, T]` of captioned images, which
    have their own, or `[W, T]` of scenes, which share them: of_caption `[B, M]` then says which are whose. allowed,
    named: see `Batch`.
    """
    if not isinstance(batch, Batch):
        arrays: Inputs = {
            "pixel_values": batch.pixel_values,
            "captions": _trimmed(batch.input_ids, batch.attention_mask),
        }
        if recipe.multi_label and batch.prompt_ids is not None and batch.prompt_mask is not None:
            arrays["prompts"] = _trimmed(batch.prompt_ids, batch.prompt_mask)
        return arrays
    arrays = {"pixel_values": batch.pixels, "prompts": dict(batch.prompts)}
    if recipe.objective.has_paper_losses:
        arrays |= {"captions": dict(batch.captions or {}), "of_caption": batch.of_caption}
    if recipe.objective.kind == "groups":
        arrays |= {"allowed": batch.allowed, "named": batch.named}
    return arrays


def _trimmed(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Inputs:
    """Returns texts without the padding that all have. A text's state at its end does not depend on what follows."""
    longest = int(attention_mask.sum(axis=-1).max())
    length = min(-(-longest // TOKEN_STEP) * TOKEN_STEP, input_ids.shape[-1])
    return {"input_ids": input_ids[..., :length], "attention_mask": attention_mask[..., :length]}


def parts(arrays: Inputs, count: int) -> Iterator[Inputs]:
    """Divides a batch among `count` replicas. Prompts that its images share go to each of them."""
    share = len(arrays["pixel_values"]) // count
    for number in range(count):
        mine = slice(number * share, (number + 1) * share)
        part: Inputs = {}
        for name, value in arrays.items():
            if not isinstance(value, Mapping):
                part[name] = value[mine]
            else:
                shared = name == "prompts" and value["input_ids"].ndim == 2
                part[name] = dict(value) if shared else {key: array[mine] for key, array in value.items()}
        yield part


def dataset(batches: Callable[[], Iterable[Batch[NDArray[Any]] | CaptionBatch]], recipe: Recipe) -> Any:
    """Returns a recipe's batches for `fit`, made ahead while the model computes.

    Args:
        batches: starts the batches of this process, such as `run.stream` of a `Run` or `lambda: stream` of a
            `CaptionStream`. Each has the recipe's batch size over the number of processes.

    Returns:
        With TensorFlow, a `tf.data.Dataset`; in the scope of a strategy, one that is distributed already, each batch
        divided among this process's replicas. Numbers of prompts and tokens are left open, so that a graph is traced
        once for all batches. On other backends of Keras, a generator.
    """
    if keras.backend.backend() != "tensorflow":
        return ((inputs(batch, recipe),) for batch in batches())
    import tensorflow as tf

    strategy = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    replicas = 1 if strategy is None else int(strategy.num_replicas_in_sync)
    signature = _signature(recipe, recipe.schedule.batch_size // replicas)

    def pipeline(here: int) -> Any:
        def generate() -> Iterator[Inputs]:
            for batch in batches():
                yield from parts(inputs(batch, recipe), here)

        return tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(2 * here)

    if strategy is None:
        return pipeline(1)
    return strategy.distribute_datasets_from_function(
        lambda context: pipeline(context.num_replicas_in_sync // context.num_input_pipelines)
    )


def _signature(recipe: Recipe, count: int) -> Inputs:
    """Shapes and dtypes of `inputs` for `count` images."""
    import tensorflow as tf

    def text(*shape: int | None) -> Inputs:
        tokens = tf.TensorSpec(shape, tf.int64)
        return {"input_ids": tokens, "attention_mask": tokens}

    side = recipe.model.image_size
    signature: Inputs = {"pixel_values": tf.TensorSpec((count, 3, side, side), tf.float32)}
    if recipe.data is not None:
        signature["captions"] = text(count, None)
        if recipe.multi_label:
            signature["prompts"] = text(count, recipe.data.prompts, None)
        return signature
    signature["prompts"] = text(None, None)
    if recipe.objective.has_paper_losses:
        signature |= {"captions": text(count, None), "of_caption": tf.TensorSpec((count, None), tf.int64)}
    if recipe.objective.kind == "paper":
        return signature
    patches = (side // recipe.model.patch_size) ** 2
    return signature | {
        "allowed": tf.TensorSpec((count, patches, None), tf.bool),
        "named": tf.TensorSpec((count, None), tf.bool),
    }


def known(data: Any) -> Any:
    """Returns inputs of a model in any form, or an iterable of batches of them, in the types that Keras knows.

    Encodings (any mapping) become dictionaries and lists of numbers arrays; so do those which a generator, a
    `keras.utils.PyDataset`, a `tf.data.Dataset` or a PyTorch `DataLoader` yields. Any iterator is a generator.
    """
    if isinstance(data, Iterator):
        return (_batch(batch) for batch in data)
    if isinstance(data, keras.utils.PyDataset):
        return data if isinstance(data, _Known) else _Known(data)
    kinds = {parent.__name__: parent.__module__ for parent in type(data).__mro__}
    if kinds.get("DataLoader", "").startswith("torch.utils.data"):
        return _known_loader(data)
    if "DatasetV2" in kinds:
        return data.map(lambda *parts: _plain(parts)) if _holds_other_mappings(data.element_spec) else data
    return _plain(data)


def _plain(data: Any) -> Any:
    """Mappings as dictionaries, lists of numbers as arrays, all the way down; what has a shape as it is."""
    if isinstance(data, Mapping):
        return {name: _plain(value) for name, value in data.items() if value is not None}
    if isinstance(data, list | tuple):
        numbers = is_nested_numbers(data)
        return np.asarray(data) if numbers else type(data)(_plain(value) for value in data)
    return data


def is_nested_numbers(value: Any) -> bool:
    """True for a list that is one tensor written out, False for a list of tensors."""
    return bool(value) and all(isinstance(part, list | tuple | int | float) for part in value)


def _batch(batch: Any) -> tuple[Any, ...]:
    """Inputs, targets, weights, as far as there are any: Keras takes nothing but a tuple from a generator."""
    plain = _plain(batch)
    return tuple(plain) if isinstance(plain, list | tuple) else (plain,)


def _holds_other_mappings(spec: Any) -> bool:
    if isinstance(spec, Mapping):
        return type(spec) is not dict or any(map(_holds_other_mappings, spec.values()))
    return isinstance(spec, tuple) and any(map(_holds_other_mappings, spec))


class _Known(keras.utils.PyDataset):
    """A `PyDataset` whose batches are dictionaries and arrays."""

    def __init__(self, batches: keras.utils.PyDataset) -> None:
        super().__init__(
            workers=batches.workers,
            use_multiprocessing=batches.use_multiprocessing,
            max_queue_size=batches.max_queue_size,
        )
        self.batches = batches

    @property
    def num_batches(self) -> int | None:
        return self.batches.num_batches

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return _batch(self.batches[index])

    def on_epoch_begin(self) -> None:
        self.batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.batches.on_epoch_end()


def _known_loader(loader: Any) -> Any:
    """Returns a PyTorch loader that yields tuples: Keras makes one of each batch, of a dictionary from its names."""

    class Known(type(loader)):  # type: ignore[misc]
        def __iter__(self) -> Iterator[tuple[Any, ...]]:
            return map(_batch, super().__iter__())

    known = copy.copy(loader)
    known.__class__ = Known
    return known


class Feed:
    """A stream for `fit`, which fetches batches before it computes with them: tells which of them are computed.

    Iterate it once: `dataset(lambda: feed, recipe)`.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.place = stream.state_dict()
        self.waiting: deque[tuple[Any, dict[str, Any]]] = deque()
        self.running: Iterator[Any] | None = None

    def __iter__(self) -> Generator[Any]:
        self.running = iter(self.stream)
        for batch in self.running:
            self.waiting.append((batch, self.stream.state_dict()))
            yield batch

    def done(self) -> Any:
        """Notes that a step was computed, and returns its batch."""
        batch, self.place = self.waiting.popleft()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch that was computed."""
        return self.place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the stream's position, before it is iterated."""
        self.stream.load_state_dict(state)
        self.place = dict(state)

    def close(self) -> None:
        """Ends the stream's workers."""
        close = getattr(self.running, "close", None)
        deadline = time.monotonic() + 30
        while close is not None and time.monotonic() < deadline:
            with contextlib.suppress(ValueError):  # TensorFlow's thread is in it, fetching a last batch
                close()
                return
            time.sleep(0.02)
