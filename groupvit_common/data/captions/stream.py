"""An endless stream of batches of captioned images, the same for a seed whatever the number of worker processes.

`order.py` alone decides the order of samples, from the seed and the rank. Workers turn the entries that they are sent
into arrays, each sample with a seed of its own (`samples.py`), and their results are taken in that order. A position in
the stream is therefore a few numbers, and resuming costs listing a shard or two.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from groupvit_common.data.captions.nouns import check_tagger
from groupvit_common.data.captions.order import Draw, Listed, Position, SampleOrder
from groupvit_common.data.captions.samples import SampleMaker
from groupvit_common.data.captions.settings import DataSettings
from groupvit_common.data.captions.sources import Entry, Source, open_source
from groupvit_common.data.captions.workers import InlineExecutor, WorkerExecutor
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor

BAD_SAMPLES_ALLOWED = 20
BAD_SHARDS_ALLOWED = 3
"""Up to so many, `max_bad_share` does not apply, however few have been read."""

T = TypeVar("T")

_WORST = 100  # shards whose bad samples a saved state lists
_PIECE = 16  # samples sent to a worker together
_PREFETCHED = 2  # complete batches that wait


@dataclass(frozen=True, eq=False)
class CaptionBatch:
    """B images with captions of T tokens and M prompts each.

    pixel_values: float32 `[B, 3, H, W]`, normalised as the processor does; input_ids, attention_mask: int64 `[B, T]`,
    T the tokenizer's `model_max_length`; prompt_ids, prompt_mask: int64 `[B, M, T]`, None without prompts; keys: the
    samples' names.
    """

    pixel_values: NDArray[np.float32]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    prompt_ids: NDArray[np.int64] | None
    prompt_mask: NDArray[np.int64] | None
    keys: list[str]


@dataclass
class StreamStats:
    """Counts of a stream so far.

    epoch: from 0; read: samples, bad ones included; shards: shards (and blocks of rows) listed; bad_shards: those
    unreadable to their end; bad: cause -> unusable samples and shards; bad_in: shard, table or folder -> the same.
    """

    epoch: int = 0
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    bad_shards: int = 0
    bad_in: Counter[str] = field(default_factory=Counter)

    def copy(self) -> StreamStats:
        """Returns an independent copy."""
        return StreamStats(self.epoch, self.read, Counter(self.bad), self.shards, self.bad_shards, Counter(self.bad_in))


class CaptionStream:
    """Batches of one rank, without end.

    Iterating continues after the last batch taken; `state_dict` is the position after that batch.

    Args:
        processor: its image processor's normalisation and its tokenizer are used.
        batch_size: of this rank.
        seed: of order and augmentation.
        rank, world: every rank has other samples.
        workers: processes that decode; 0: this process decodes, when a batch is taken.

    Raises:
        InputError: a missing or empty source; while iterating, more bad samples than `settings.max_bad_share` allows.
    """

    def __init__(
        self,
        settings: DataSettings,
        processor: GroupViTProcessor,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or seed < 0 or workers < 0:
            raise InputError(
                "batch_size must be at least 1, seed and workers not negative, "
                f"got batch_size {batch_size}, seed {seed}, workers {workers}"
            )
        if not 0 <= rank < world:
            raise InputError(f"rank must be one of 0 to world - 1, got rank {rank} of {world}")
        if settings.prompts:
            check_tagger()
        self.settings, self.batch_size, self.workers = settings, batch_size, workers
        self._length = processor.tokenizer.model_max_length
        self._sources = [open_source(source) for source in settings.sources]
        self._order = SampleOrder(
            self._sources, seed=seed, rank=rank, world=world, shuffle_buffer=settings.shuffle_buffer
        )
        self._maker = SampleMaker(settings, processor)
        self._identity = {
            "seed": seed,
            "rank": rank,
            "world": world,
            "data": _digest(self._sources, settings.shuffle_buffer),
        }
        self._position, self._stats = Position(), StreamStats()

    # ---- position ----

    @property
    def counters(self) -> StreamStats:
        """Counts of the stream up to the last batch taken."""
        return self._stats.copy()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch taken, as JSON values. Every rank has its own."""
        stats = self._stats
        return {
            **self._identity,
            "epoch": self._position.epoch,
            "unit": self._position.unit,
            "sample": self._position.sample,
            "read": stats.read,
            "bad": dict(stats.bad),
            "shards": stats.shards,
            "bad_shards": stats.bad_shards,
            "bad_in": dict(stats.bad_in.most_common(_WORST)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position: the batches from there on are those of an uninterrupted run.

        `{"epoch": n}` alone moves to the start of an epoch, for resuming with another number of ranks or other data.

        Raises:
            InputError: the state is of another seed, rank or number of ranks, or of other data.
        """
        if set(state) != {"epoch"}:
            for name, own in self._identity.items():
                if state.get(name) != own:
                    subject = (
                        "other data (shards, their order, weights or shuffle_buffer)"
                        if name == "data"
                        else f"{name} {state.get(name)}, not {own}"
                    )
                    raise InputError(
                        f"the saved position in the data is of {subject}: its order cannot be resumed; to continue "
                        f'from the beginning of an epoch, load {{"epoch": {state.get("epoch", 0)}}}'
                    )
        epoch, unit, sample, read, shards, bad_shards = (
            _count_of(state.get(name, 0), name) for name in ("epoch", "unit", "sample", "read", "shards", "bad_shards")
        )
        bad, bad_in = (
            Counter({cause: _count_of(count, name) for cause, count in dict(state.get(name, {})).items()})
            for name in ("bad", "bad_in")
        )
        self._position = Position(epoch, unit, sample)
        self._stats = StreamStats(epoch, read, bad, shards, bad_shards, bad_in)

    # ---- batches ----

    def __iter__(self) -> Generator[CaptionBatch]:
        """Yields batches without end, from the current position on. `close` of the generator ends the workers."""
        made = self._batches() if not self.workers else _prefetched(self._batches, _PREFETCHED)
        try:
            for batch, position, stats in made:
                self._position, self._stats = position, stats
                yield batch
        finally:
            made.close()

    def _batches(self) -> Generator[tuple[CaptionBatch, Position, StreamStats]]:
        """Yields batches, each with the position and the counts after it."""
        executor = WorkerExecutor(self._maker, self.workers) if self.workers else InlineExecutor(self._maker)
        draws = self._order.draws(self._position, executor.list_unit)
        stats = self._stats.copy()
        submitted: deque[list[Draw]] = deque()
        # Of the epoch: usable samples so far, and whether it is seen from its beginning.
        epoch, usable, whole = self._position.epoch, 0, self._position == Position(self._position.epoch)
        try:
            batch, filled = self._new_batch(), 0
            while True:
                while len(submitted) < executor.ahead:
                    submitted.append(list(islice(draws, _PIECE)))
                    executor.submit(
                        [(draw.entry, draw.seed) for draw in submitted[-1] if isinstance(draw.entry, Entry)]
                    )
                samples = executor.result()
                causes = iter(samples.causes)
                good = 0
                for draw in submitted.popleft():
                    cause = draw.entry.fault if isinstance(draw.entry, Listed) else next(causes)
                    self._count(stats, draw, cause)
                    usable += isinstance(draw.entry, Entry) and cause is None
                    if draw.after.epoch != epoch:
                        if whole and not usable:
                            raise InputError(self._nothing(stats))
                        epoch, usable, whole = draw.after.epoch, 0, True
                    if isinstance(draw.entry, Listed) or cause is not None:
                        continue
                    batch.pixel_values[filled] = samples.images[good]
                    tokens, mask = samples.tokens[good], samples.mask[good]
                    batch.input_ids[filled], batch.attention_mask[filled] = tokens[0], mask[0]
                    if batch.prompt_ids is not None and batch.prompt_mask is not None:
                        batch.prompt_ids[filled], batch.prompt_mask[filled] = tokens[1:], mask[1:]
                    batch.keys.append(draw.entry.key)
                    filled, good = filled + 1, good + 1
                    if filled == self.batch_size:
                        yield batch, draw.after, stats.copy()
                        batch, filled = self._new_batch(), 0
        finally:
            executor.close()
            draws.close()

    def _new_batch(self) -> CaptionBatch:
        side, prompts, length = self.settings.image_size, self.settings.prompts, self._length
        shape = (self.batch_size, prompts, length)
        return CaptionBatch(
            np.empty((self.batch_size, 3, side, side), np.float32),
            np.empty((self.batch_size, length), np.int64),
            np.empty((self.batch_size, length), np.int64),
            np.empty(shape, np.int64) if prompts else None,
            np.empty(shape, np.int64) if prompts else None,
            [],
        )

    def _nothing(self, stats: StreamStats) -> str:
        rank, world = self._order.rank, self._order.world
        of_rank = f" for rank {rank} of {world}" if world > 1 else ""
        return f"there is no usable sample{of_rank} in a whole epoch: {_found(stats)}. Mend these files, or give others"

    def _count(self, stats: StreamStats, draw: Draw, cause: str | None) -> None:
        """Counts one sample, or one shard. InputError if there are too many bad ones."""
        entry = draw.entry
        stats.epoch = draw.after.epoch
        if isinstance(entry, Listed):
            stats.shards += 1
            stats.bad_shards += cause is not None
        else:
            stats.read += 1
        if cause is None:
            return
        stats.bad[cause] += 1
        stats.bad_in[entry.where] += 1
        share = self.settings.max_bad_share
        samples = stats.bad.total() - stats.bad_shards
        if share < 1 and (
            samples > max(BAD_SAMPLES_ALLOWED, share * stats.read)
            or stats.bad_shards > max(BAD_SHARDS_ALLOWED, share * stats.shards)
        ):
            raise InputError(_too_many(stats, draw, share))


def _count_of(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(
            f"the saved position in the data is invalid: {name} must be a whole number from 0, got {value!r}"
        )
    return value


def count_samples(settings: DataSettings) -> int:
    """Returns the samples of an epoch over all ranks, by weight. Lists every shard, which may take minutes."""
    total = 0.0
    for chosen in settings.sources:
        source = open_source(chosen)
        complete = sum(entry.complete for number in range(len(source)) for entry in source.unit(number).entries)
        total += chosen.weight * complete
    return round(total)


def _too_many(stats: StreamStats, draw: Draw, share: float) -> str:
    """Returns the sentence that stops training."""
    last = f", the last one {draw.entry.key!r} in {draw.entry.where}" if isinstance(draw.entry, Entry) else ""
    return (
        f"too much of the data cannot be used: {stats.bad.total() - stats.bad_shards} of {stats.read} samples and "
        f"{stats.bad_shards} of {stats.shards} shards or blocks, where max_bad_share = {share:g} allows less. "
        f"Causes: {_found(stats)}{last}. Mend or leave out these files, or raise max_bad_share"
    )


def _found(stats: StreamStats) -> str:
    """Returns causes and places of the bad samples."""
    causes = ", ".join(f"{cause} ({count})" for cause, count in stats.bad.most_common(5))
    places = ", ".join(f"{place} ({count})" for place, count in stats.bad_in.most_common(3))
    return f"{causes}. Most in {places}"


def _digest(sources: list[Source], shuffle_buffer: int) -> str:
    """Returns a digest of what the order of samples depends on besides the seed and the rank."""
    content = [shuffle_buffer, *([source.weight, len(source), *source.names] for source in sources)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _prefetched(make: Callable[[], Generator[T]], count: int) -> Generator[T]:
    """Yields the same items, made in a thread that is up to `count` ahead."""
    ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=count)
    stop = threading.Event()

    def put(item: T | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        items = make()
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:
            put(error)
        finally:
            items.close()

    thread = threading.Thread(target=run, name="groupvit-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
