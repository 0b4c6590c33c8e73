"""The order of samples: a pure function of the seed, the rank and the sources.

An epoch's units (shards, blocks of rows) are shuffled and divided among ranks. A rank lists units until it has
`shuffle_buffer` entries, a pool, and draws these in random order; then the next pool. A position in this endless
sequence is three numbers, and resuming from it costs listing one pool.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from groupvit_common.data.captions.sources import Entry, Source, Unit
from groupvit_common.errors import InputError

UNITS_PER_RANK = 8
"""With as many units for each, ranks get whole units, so that one rank reads a shard; else every rank lists all units
and takes its part of the samples. With eight, no rank reads more than an eighth more than another."""


class Position(NamedTuple):
    """The next sample: number `sample` of the pool that starts at `unit` of this rank's units in `epoch`."""

    epoch: int = 0
    unit: int = 0
    sample: int = 0


class Listed(NamedTuple):
    """A unit that was listed. fault: the reason why its rest is unreadable; None for a sound one."""

    where: str
    fault: str | None


class Draw(NamedTuple):
    """One element of the sequence: a sample, or a unit's report. seed: of the sample; after: the next position."""

    entry: Entry | Listed
    seed: tuple[int, ...]
    after: Position


class SampleOrder:
    """The endless sequence of one rank."""

    def __init__(self, sources: Sequence[Source], *, seed: int, rank: int, world: int, shuffle_buffer: int) -> None:
        self.sources, self.seed, self.rank, self.world, self.buffer = sources, seed, rank, world, shuffle_buffer
        # Many pools share an epoch.
        self.units = lru_cache(maxsize=2)(self._units)

    def draws(self, start: Position, list_unit: Callable[[Source, int], Unit]) -> Generator[Draw]:
        """Yields the sequence from a position on, each pool's units before its samples; a thread lists the next pool.

        Args:
            list_unit: lists a unit of a source, as `source.unit(number)` does.
        """
        with ThreadPoolExecutor(1) as ahead:
            position, any_found, broken = start, start != Position(start.epoch), ""
            coming = ahead.submit(self._pool, position.epoch, position.unit, list_unit)
            while True:
                pool, following = coming.result()
                coming = ahead.submit(self._pool, following.epoch, following.unit, list_unit)
                for entry, _ in pool:
                    any_found = any_found or isinstance(entry, Entry)
                    if isinstance(entry, Listed) and entry.fault is not None:
                        broken = f" ({entry.where}: {entry.fault})"
                if following.epoch > position.epoch:
                    if not any_found:
                        raise InputError(
                            f"there is no sample for rank {self.rank} of {self.world} in a whole epoch{broken}: "
                            "give more data, or use fewer ranks"
                        )
                    any_found = False
                for number in range(position.sample, len(pool)):
                    entry, seed = pool[number]
                    last = number + 1 == len(pool)
                    yield Draw(entry, seed, following if last else Position(position.epoch, position.unit, number + 1))
                position = following

    def _units(self, epoch: int) -> list[tuple[int, int, int]]:
        """Returns all ranks' units of an epoch in order: (number before shuffling, source, unit)."""
        found: list[tuple[int, int]] = []
        for number, source in enumerate(self.sources):
            whole, share = divmod(source.weight, 1)
            found += [(number, unit) for unit in range(len(source))] * int(whole)
            part = round(share * len(source)) or int(share > 0)
            if part:
                # One fixed permutation, used up epoch by epoch, so that every unit has its turn.
                turns = np.random.default_rng((self.seed, number)).permutation(len(source))
                turns = turns.take(range(epoch * part, (epoch + 1) * part), mode="wrap")
                found += [(number, int(unit)) for unit in turns]
        numbers = np.arange(len(found))
        if self.buffer:
            numbers = np.random.default_rng((self.seed, epoch)).permutation(numbers)
        return [(int(number), *found[number]) for number in numbers]

    def _pool(
        self, epoch: int, first: int, list_unit: Callable[[Source, int], Unit]
    ) -> tuple[list[tuple[Entry | Listed, tuple[int, ...]]], Position]:
        """Returns this rank's samples of the pool that starts at a unit, in order, and the next pool's start."""
        units = self.units(epoch)
        by_unit = len(units) >= UNITS_PER_RANK * self.world
        if by_unit:
            units = units[self.rank :: self.world]
        listed: list[tuple[Entry | Listed, tuple[int, ...]]] = []
        found: list[tuple[Entry | Listed, tuple[int, ...]]] = []
        unit = first
        while unit < len(units) and (unit == first or len(found) < self.buffer):
            number, source, which = units[unit]
            entries, where, fault = list_unit(self.sources[source], which)
            found += [(entry, (self.seed, epoch, number, index)) for index, entry in enumerate(entries)]
            listed.append((Listed(where, fault), ()))
            unit += 1
        if self.buffer:
            order = np.random.default_rng((self.seed, epoch, first)).permutation(len(found))
            found = [found[number] for number in order]
        if not by_unit:
            found = found[self.rank :: self.world]
        return listed + found, Position(epoch, unit) if unit < len(units) else Position(epoch + 1)
