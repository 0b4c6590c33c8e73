"""The order of samples, on sources that hold numbers only."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_common.data.captions.order import Draw, Listed, Position, SampleOrder
from groupvit_common.data.captions.sources import Entry, Unit


@dataclass
class Numbers:
    """A source of units of given sizes; every fifth unit breaks off."""

    name: str
    sizes: list[int]
    weight: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __len__(self) -> int:
        return len(self.sizes)

    def unit(self, number: int) -> Unit:
        where = f"{self.name}{number}"
        entries = [Entry(f"{where}-{n}", where, None, None) for n in range(self.sizes[number])]
        return Unit(entries, where, "broken" if number % 5 == 4 else None)


sources = st.lists(
    st.builds(
        Numbers,
        st.sampled_from("abc"),
        st.lists(st.integers(0, 6), min_size=1, max_size=20).filter(any),
        st.sampled_from([1.0, 1.0, 2.0, 0.5, 1.25]),
    )
    # Half of the units may be the empty ones; an epoch without samples is an error.
    .filter(lambda source: source.weight >= 1 or all(source.sizes)),
    min_size=1,
    max_size=3,
    unique_by=lambda source: source.name,
)
buffers = st.sampled_from([0, 1, 7, 30, 1000])


def epoch_of(order: SampleOrder, epoch: int) -> list[Draw]:
    """One rank's draws of an epoch."""
    found = []
    draws = order.draws(Position(epoch), Numbers.unit)
    for draw in draws:
        found.append(draw)
        if draw.after.epoch > epoch:
            break
    draws.close()
    return found


def keys(draws: list[Draw]) -> Counter[str]:
    return Counter(draw.entry.key for draw in draws if isinstance(draw.entry, Entry))


@settings(deadline=None, max_examples=40)
@given(sources=sources, buffer=buffers, world=st.integers(1, 4), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_ranks_together_see_each_sample_as_often_as_its_weight_says(
    sources: list[Numbers], buffer: int, world: int, seed: int, epoch: int
) -> None:
    if sum(sum(source.sizes) for source in sources) < 60:
        world = 1  # a rank without samples is an error
    whole = epoch_of(SampleOrder(sources, seed=seed, rank=0, world=1, shuffle_buffer=buffer), epoch)
    for source in sources:
        times, share = divmod(source.weight, 1)
        for number, size in enumerate(source.sizes):
            counts = {keys(whole)[f"{source.name}{number}-{n}"] for n in range(size)}
            assert counts <= ({int(times), int(times) + 1} if share else {int(times)})
            # What a unit has comes together.
            assert len(counts) <= 1
    assert len({draw.seed for draw in whole if draw.seed}) == keys(whole).total()
    try:
        parts = [
            epoch_of(SampleOrder(sources, seed=seed, rank=rank, world=world, shuffle_buffer=buffer), epoch)
            for rank in range(world)
        ]
    except ValueError:
        return
    assert sum(map(keys, parts), Counter()) == keys(whole)
    # A sample is augmented in the same way whichever rank has it.
    assert {draw.seed for part in parts for draw in part} == {draw.seed for draw in whole}


@settings(deadline=None, max_examples=40)
@given(sources=sources, buffer=buffers, seed=st.integers(0, 5), start=st.integers(0, 80), length=st.integers(1, 60))
def test_the_order_continues_from_every_position(
    sources: list[Numbers], buffer: int, seed: int, start: int, length: int
) -> None:
    order = SampleOrder(sources, seed=seed, rank=0, world=1, shuffle_buffer=buffer)
    draws = order.draws(Position(), Numbers.unit)
    before, rest = list(islice(draws, start)), list(islice(draws, length))
    draws.close()
    fresh = SampleOrder(sources, seed=seed, rank=0, world=1, shuffle_buffer=buffer)
    again = fresh.draws(before[-1].after if before else Position(), Numbers.unit)
    assert list(islice(again, length)) == rest
    again.close()


@settings(deadline=None, max_examples=30)
@given(sources=sources, buffer=buffers)
def test_every_unit_is_reported_before_its_samples(sources: list[Numbers], buffer: int) -> None:
    order = SampleOrder(sources, seed=0, rank=0, world=1, shuffle_buffer=buffer)
    listed: Counter[str] = Counter()
    for draw in epoch_of(order, 0):
        if isinstance(draw.entry, Listed):
            listed[draw.entry.where] += 1
            assert (draw.entry.fault is None) == (int(draw.entry.where[1:]) % 5 != 4)
        else:
            assert listed[draw.entry.where]
    assert listed.total() == len(order.units(0))


def test_parts_of_a_source_take_turns() -> None:
    source = Numbers("a", [1] * 10, 0.3)
    order = SampleOrder([source], seed=0, rank=0, world=1, shuffle_buffer=5)
    seen = sum((keys(epoch_of(order, epoch)) for epoch in range(10)), Counter())
    assert set(seen.values()) == {3}
    assert len(seen) == 10
