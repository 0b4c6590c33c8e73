"""An endless stream of batches of captioned pictures, the same for a seed whatever the number of worker processes.

Which sample comes when is decided in one place (`order.py`) from the seed and the rank; workers only turn what they are given
into arrays, each sample from a seed of its own (`samples.py`), and their results are taken in that order. A place in the stream
is therefore a few numbers, and continuing from it costs listing a shard or two.
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
from groupvit_common.data.captions.workers import Here, Makers, Workers
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor

BAD_SAMPLES_ALLOWED = 20
BAD_SHARDS_ALLOWED = 3
"""However few have been read, `max_bad_share` is not asked about up to so many."""

T = TypeVar("T")

_WORST = 100  # shards whose bad samples a saved place remembers
_PIECE = 16  # samples that are sent to a worker together
_PREFETCHED = 2  # batches that wait, complete


@dataclass(frozen=True, eq=False)
class CaptionBatch:
    """B pictures with captions of T tokens and M prompts each.

    pixel_values: float32 `[B, 3, H, W]`, normalised as the processor does; input_ids, attention_mask: int64 `[B, T]`, T =
    the tokenizer's `model_max_length`; prompt_ids, prompt_mask: int64 `[B, M, T]`, None without prompts; keys: the samples' names.
    """

    pixel_values: NDArray[np.float32]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    prompt_ids: NDArray[np.int64] | None
    prompt_mask: NDArray[np.int64] | None
    keys: list[str]


@dataclass
class Tally:
    """What has gone through a stream so far.

    epoch: counted from 0; read: samples, bad ones included; shards: shards (and blocks of rows) listed; bad_shards: those of them
    that could not be read to their end; bad: cause -> samples and shards; bad_in: shard, table or folder -> the same.
    """

    epoch: int = 0
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    bad_shards: int = 0
    bad_in: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Tally:
        """One that does not change with this one."""
        return Tally(self.epoch, self.read, Counter(self.bad), self.shards, self.bad_shards, Counter(self.bad_in))


class CaptionStream:
    """Batches of one rank, endless.

    Iterating goes on from where the last batch taken ended; `state_dict` is the place after that batch.

    Args:
        processor: its image processor's normalisation and its tokenizer are used.
        batch_size: of this rank. seed: of order and variation. rank, world: every rank has other samples.
        workers: processes that decode; 0: decoding happens in this process, when a batch is asked for.

    Raises InputError for sources that are missing or empty, and while iterating, when more samples are bad than
    `settings.max_bad_share` allows.
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
        self._position, self._tally = Position(), Tally()

    # ---- where the stream is ----

    @property
    def counters(self) -> Tally:
        """What has gone through the stream up to the last batch taken."""
        return self._tally.copy()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch taken, as JSON can hold it. Every rank has its own."""
        tally = self._tally
        return {
            **self._identity,
            "epoch": self._position.epoch,
            "unit": self._position.unit,
            "sample": self._position.sample,
            "read": tally.read,
            "bad": dict(tally.bad),
            "shards": tally.shards,
            "bad_shards": tally.bad_shards,
            "bad_in": dict(tally.bad_in.most_common(_WORST)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place: the batches from there on are those of a run that was never interrupted.

        `{"epoch": n}` alone goes to the beginning of an epoch, which is how to go on with another number of ranks or other data.
        InputError if the state is of another seed, rank or number of ranks, or of other data.
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
                        f"the saved place in the data is of {subject}: its order cannot be continued; to go on from the "
                        f'beginning of an epoch, load {{"epoch": {state.get("epoch", 0)}}}'
                    )
        epoch, unit, sample, read, shards, bad_shards = (
            _count_of(state.get(name, 0), name) for name in ("epoch", "unit", "sample", "read", "shards", "bad_shards")
        )
        bad, bad_in = (
            Counter({cause: _count_of(count, name) for cause, count in dict(state.get(name, {})).items()})
            for name in ("bad", "bad_in")
        )
        self._position = Position(epoch, unit, sample)
        self._tally = Tally(epoch, read, bad, shards, bad_shards, bad_in)

    # ---- batches ----

    def __iter__(self) -> Generator[CaptionBatch]:
        """Batches without end, from the current place on. The generator owns the workers: `close` ends them."""
        made = self._batches() if not self.workers else _prefetched(self._batches, _PREFETCHED)
        try:
            for batch, position, tally in made:
                self._position, self._tally = position, tally
                yield batch
        finally:
            made.close()

    def _batches(self) -> Generator[tuple[CaptionBatch, Position, Tally]]:
        """Batches, each with the place after it."""
        makers: Makers = Workers(self._maker, self.workers) if self.workers else Here(self._maker)
        draws = self._order.draws(self._position, makers.list_unit)
        tally = self._tally.copy()
        given: deque[list[Draw]] = deque()
        # Of the epoch: usable samples so far, and whether it is seen from its beginning.
        epoch, usable, whole = self._position.epoch, 0, self._position == Position(self._position.epoch)
        try:
            batch, filled = self._new_batch(), 0
            while True:
                while len(given) < makers.ahead:
                    given.append(list(islice(draws, _PIECE)))
                    makers.give([(draw.entry, draw.seed) for draw in given[-1] if isinstance(draw.entry, Entry)])
                result = makers.take()
                causes = iter(result.causes)
                good = 0
                for draw in given.popleft():
                    cause = draw.entry.fault if isinstance(draw.entry, Listed) else next(causes)
                    self._count(tally, draw, cause)
                    usable += isinstance(draw.entry, Entry) and cause is None
                    if draw.after.epoch != epoch:
                        if whole and not usable:
                            raise InputError(self._nothing(tally))
                        epoch, usable, whole = draw.after.epoch, 0, True
                    if isinstance(draw.entry, Listed) or cause is not None:
                        continue
                    result.next_picture(batch.pixel_values[filled])
                    tokens, mask = result.tokens[good], result.mask[good]
                    batch.input_ids[filled], batch.attention_mask[filled] = tokens[0], mask[0]
                    if batch.prompt_ids is not None and batch.prompt_mask is not None:
                        batch.prompt_ids[filled], batch.prompt_mask[filled] = tokens[1:], mask[1:]
                    batch.keys.append(draw.entry.key)
                    filled, good = filled + 1, good + 1
                    if filled == self.batch_size:
                        yield batch, draw.after, tally.copy()
                        batch, filled = self._new_batch(), 0
        finally:
            makers.close()
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

    def _nothing(self, tally: Tally) -> str:
        rank, world = self._order.rank, self._order.world
        of_rank = f" for rank {rank} of {world}" if world > 1 else ""
        return f"there is no usable sample{of_rank} in a whole epoch: {_found(tally)}. Mend these files, or give others"

    def _count(self, tally: Tally, draw: Draw, cause: str | None) -> None:
        """Counts one sample, or one shard. InputError beyond the bound."""
        entry = draw.entry
        tally.epoch = draw.after.epoch
        if isinstance(entry, Listed):
            tally.shards += 1
            tally.bad_shards += cause is not None
        else:
            tally.read += 1
        if cause is None:
            return
        tally.bad[cause] += 1
        tally.bad_in[entry.where] += 1
        share = self.settings.max_bad_share
        samples = tally.bad.total() - tally.bad_shards
        if share < 1 and (
            samples > max(BAD_SAMPLES_ALLOWED, share * tally.read)
            or tally.bad_shards > max(BAD_SHARDS_ALLOWED, share * tally.shards)
        ):
            raise InputError(_too_many(tally, draw, share))


def _count_of(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"the saved place in the data is none: {name} must be a whole number from 0, got {value!r}")
    return value


def count_samples(settings: DataSettings) -> int:
    """Samples of an epoch over all ranks: complete ones, times their source's weight. Lists every shard, which may take minutes."""
    total = 0.0
    for chosen in settings.sources:
        source = open_source(chosen)
        complete = sum(entry.complete for number in range(len(source)) for entry in source.unit(number).entries)
        total += chosen.weight * complete
    return round(total)


def _too_many(tally: Tally, draw: Draw, share: float) -> str:
    """The sentence that stops a run."""
    last = f", the last one {draw.entry.key!r} in {draw.entry.where}" if isinstance(draw.entry, Entry) else ""
    return (
        f"too much of the data cannot be used: {tally.bad.total() - tally.bad_shards} of {tally.read} samples and "
        f"{tally.bad_shards} of {tally.shards} shards or blocks, where max_bad_share = {share:g} allows less. "
        f"Causes: {_found(tally)}{last}. Mend or leave out these files, or raise max_bad_share"
    )


def _found(tally: Tally) -> str:
    """What was unusable, and where."""
    causes = ", ".join(f"{cause} ({count})" for cause, count in tally.bad.most_common(5))
    places = ", ".join(f"{place} ({count})" for place, count in tally.bad_in.most_common(3))
    return f"{causes}. Most in {places}"


def _digest(sources: list[Source], shuffle_buffer: int) -> str:
    """What the order of samples depends on beside the seed and the rank."""
    content = [shuffle_buffer, *([source.weight, len(source), *source.names] for source in sources)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _prefetched(make: Callable[[], Generator[T]], count: int) -> Generator[T]:
    """The same items, made in a thread that is up to `count` ahead."""
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
