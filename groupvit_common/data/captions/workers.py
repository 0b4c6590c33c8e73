"""Where samples are made and shards are listed: in this process, or in others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groupvit_common.data.captions.order import list_here
from groupvit_common.data.captions.processes import Bulky, Process
from groupvit_common.data.captions.samples import Made, SampleMaker
from groupvit_common.data.captions.sources import Entry, Shards, Source, Unit, list_shard

Work = Sequence[tuple[Entry, tuple[int, ...]]]


class Result(Protocol):
    """What became of a piece of work: `Made`, but for the pictures, which are taken one at a time, in order."""

    causes: list[str | None]
    tokens: NDArray[np.int64]
    mask: NDArray[np.int64]

    def next_picture(self, out: NDArray[np.float32]) -> None:
        """Writes the next picture into `out`, float32 `[3, S, S]`."""


class Makers(Protocol):
    """Where work is done: results come in the order in which work was given."""

    ahead: int
    """Pieces of work that keep it busy."""

    def give(self, work: Work) -> None:
        """Takes a piece of work."""

    def take(self) -> Result:
        """The result of the oldest piece of work not yet taken; the pictures of the one before must have been taken."""

    def list_unit(self, source: Source, number: int) -> Unit:
        """`source.unit(number)`. May be called from another thread than the rest."""

    def close(self) -> None:
        """Ends it."""


class Here:
    """In this process, when it is asked for."""

    ahead = 1

    def __init__(self, maker: SampleMaker) -> None:
        self._maker = maker
        self._work: deque[Work] = deque()

    def give(self, work: Work) -> None:
        self._work.append(work)

    def take(self) -> Result:
        return _Made(self._maker(self._work.popleft()))

    def list_unit(self, source: Source, number: int) -> Unit:
        return list_here(source, number)

    def close(self) -> None:
        self._maker.close()


class _Made:
    def __init__(self, made: Made) -> None:
        self.causes, self.tokens, self.mask = made.causes, made.tokens, made.mask
        self._pictures = iter(made.pictures)

    def next_picture(self, out: NDArray[np.float32]) -> None:
        out[...] = next(self._pictures)


class Workers:
    """In processes that take turns, and one more that lists shards: in a thread here, that would wait for the training loop."""

    _EACH = 3
    """Pieces of work that a worker is given ahead: one it does, one done before, one to go on with."""

    def __init__(self, maker: SampleMaker, count: int) -> None:
        self.ahead = self._EACH * count
        self._given = self._taken = 0
        self._processes: list[Process] = []
        try:
            for _ in range(count):
                self._processes.append(Process(_Sender(maker)))
            self._lister = Process(list_shard)
            self._processes.append(self._lister)
        except BaseException:
            self.close()
            raise
        self._makers = self._processes[:count]

    def give(self, work: Work) -> None:
        self._makers[self._given % len(self._makers)].ask(work)
        self._given += 1

    def take(self) -> Result:
        process = self._makers[self._taken % len(self._makers)]
        self._taken += 1
        return _Piped(process)

    def list_unit(self, source: Source, number: int) -> Unit:
        if not isinstance(source, Shards):
            return list_here(source, number)
        self._lister.ask(source.shard(number))
        unit: Unit = self._lister.answer()
        return unit

    def close(self) -> None:
        for process in self._processes:
            process.close()


class _Sender:
    """Makes samples in a worker, and parts the pictures from the rest."""

    def __init__(self, maker: SampleMaker) -> None:
        self._maker = maker

    def __call__(self, work: Work) -> Bulky:
        made = self._maker(work)
        return Bulky((made.causes, made.tokens, made.mask), [picture.data.cast("B") for picture in made.pictures])


class _Piped:
    """A result whose pictures still lie in the pipe."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.causes, self.tokens, self.mask = process.answer()

    def next_picture(self, out: NDArray[np.float32]) -> None:
        self._process.read_into(out.data.cast("B"))
