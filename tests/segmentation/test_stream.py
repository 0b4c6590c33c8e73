"""The stream of images: order, groups, errors, bounds and threads, without a model."""

import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.segmentation import stream
from groupvit_common.segmentation.preparation import Loaded, Prepared
from groupvit_common.segmentation.stream import Steps, segmented


@dataclass
class Recorder:
    """Steps that keep a record. A source is its number, as text (decoded in the thread) or as a number (not so); a
    negative one cannot be read. Each third image is upright."""

    batch_size: int = 4
    threaded: bool = True
    delay: float = 0.0

    def __post_init__(self) -> None:
        self.groups: list[list[int]] = []
        self.readers: dict[int, str] = {}
        self.labellers: set[str] = set()
        self.prepared = 0

    def steps(self) -> Steps:
        return Steps(self.load, self.prepare, self.segment, self.batch_size, self.threaded)

    def load(self, source: Any) -> Loaded:
        number = int(source)
        self.readers[number] = threading.current_thread().name
        time.sleep(self.delay * (number % 3))
        if number < 0:
            raise InputError(f"{number} cannot be read")
        return Loaded(Image.new("L", (2, 3) if number % 3 == 0 else (3, 2)), str(number))

    def prepare(self, loaded: Loaded) -> Prepared:
        self.prepared += 1
        views = [np.zeros((3, *loaded.size), np.float32)]
        preparation: Any = None
        return Prepared(loaded, views, loaded.size, preparation)

    def segment(self, images: list[Prepared]) -> list[Any]:
        self.groups.append([int(image.loaded.source or "") for image in images])
        return [partial(self.label, image) for image in images]

    def label(self, image: Prepared) -> Any:
        self.labellers.add(threading.current_thread().name)
        return int(image.loaded.source or "")


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("groupvit-")}


@pytest.mark.parametrize("kind", [str, int])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_results_are_in_order_and_files_are_read_beside_the_model(kind, batch_size):
    recorder = Recorder(batch_size)
    assert list(segmented(map(kind, range(40)), recorder.steps())) == [*range(40)]
    assert set(recorder.readers.values()) == {"groupvit-read" if kind is str else threading.current_thread().name}
    assert recorder.labellers == {"groupvit-label_0"}
    assert not threads()
    assert list(segmented([], recorder.steps())) == []


def test_pixels_are_labelled_in_the_callers_thread_where_they_must_be():
    recorder = Recorder(threaded=False)
    assert list(segmented(map(str, range(9)), recorder.steps())) == [*range(9)]
    assert recorder.labellers == {threading.current_thread().name}


def test_groups_depend_on_order_and_size_alone():
    fast, slow = Recorder(), Recorder(delay=0.003)
    for recorder in (fast, slow):
        for _ in segmented(map(str, range(60)), recorder.steps()):
            time.sleep(recorder.delay / 2)
    assert fast.groups == slow.groups
    # Others of its size are found among the next ones; a third are upright.
    assert max(map(len, fast.groups)) == 4
    assert len(fast.groups) <= 17
    # The first result soon.
    assert 0 in fast.groups[0] or 0 in fast.groups[1]


@pytest.mark.parametrize("kind", [str, int])
def test_no_more_are_taken_than_four_batches(kind):
    taken = given = 0

    def sources():
        nonlocal taken
        for number in range(50):
            taken += 1
            assert taken - given <= 4 * 2
            yield kind(number)

    for _ in segmented(sources(), Recorder(2).steps()):
        given += 1
    assert given == 50


def test_memory_bounds_what_is_read_and_what_waits(monkeypatch):
    recorder = Recorder(8)
    # An image takes 96 bytes: two wait, four are held.
    monkeypatch.setattr(stream, "_BYTES_AHEAD", 4 * 96)
    results = segmented(map(str, range(30)), recorder.steps())
    for number, result in enumerate(results):
        assert result == number
        assert recorder.prepared <= number + 5
    assert max(map(len, recorder.groups)) == 2


@pytest.mark.parametrize("kind", [str, int])
def test_an_error_comes_after_the_results_before_it(kind):
    sources = [*range(6), -1, *range(6, 12)]
    results, found = segmented(map(kind, sources), Recorder().steps()), list[Any]()
    with pytest.raises(InputError, match="-1 cannot be read"):
        found.extend(results)
    assert found == [*range(6)]
    assert not threads()


def test_errors_that_the_caller_takes_come_in_order_among_the_results():
    found: list[Any] = []
    sources = ["0", "-1", "-2", *map(str, range(1, 12)), "-3"]
    for result in segmented(sources, Recorder().steps(), lambda source, error: found.append((source, str(error)))):
        found.append(result)
    bad = [(text, f"{text} cannot be read") for text in ("-1", "-2", "-3")]
    assert found == [0, *bad[:2], *range(1, 12), bad[2]]


def test_what_the_callers_iterator_raises_comes_after_the_results_before_it():
    def sources():
        yield from map(str, range(5))
        raise InputError("lost")

    found: list[Any] = []
    with pytest.raises(InputError, match="lost"):
        found.extend(segmented(sources(), Recorder().steps(), lambda *_: pytest.fail("it is no source's error")))
    assert found == [*range(5)]


def test_what_the_model_or_a_label_raises_comes_after_the_results_before_it(monkeypatch):
    for where, before in (("segment", 4), ("label", 5)):
        recorder = Recorder(2)
        step = getattr(recorder, where)

        def failing(images, step=step, where=where):
            numbers = [int(image.loaded.source) for image in (images if where == "segment" else [images])]
            if 5 in numbers:
                raise MemoryError("no room")
            return step(images)

        monkeypatch.setattr(recorder, where, failing)
        found: list[Any] = []
        with pytest.raises(MemoryError):
            found.extend(segmented(map(str, range(20)), recorder.steps()))
        assert found == [*range(before)]
        assert not threads()


def test_an_interrupt_passes_and_threads_end(monkeypatch):
    def sources():
        yield from map(str, range(9))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(segmented(sources(), Recorder(1).steps()))
    recorder = Recorder(1)
    steps = replace(recorder.steps(), segment=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(segmented(["0"], steps))
    assert not threads()


def test_an_iterator_that_is_closed_early_stops_its_threads():
    recorder = Recorder()
    results = segmented(map(str, range(1000)), recorder.steps())
    assert next(results) == 0
    assert threads()
    results.close()
    assert not threads()
    prepared = recorder.prepared
    assert prepared <= 16
    untouched = segmented(map(str, range(9)), recorder.steps())
    del untouched
    assert recorder.prepared == prepared


def test_paths_are_read_in_the_thread_as_well(tmp_path: Path):
    recorder = Recorder()
    sources = [Path(str(number)) for number in range(3)]
    steps = replace(recorder.steps(), load=lambda source: recorder.load(str(source)))
    assert list(segmented(sources, steps)) == [0, 1, 2]
    assert set(recorder.readers.values()) == {"groupvit-read"}
