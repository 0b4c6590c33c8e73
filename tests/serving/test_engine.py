"""The model's thread, kept images, metrics and masks, without a model."""

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from groupvit_common.segmentation.encoded import EncodedImage, EncodedView
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.preparation import Loaded
from groupvit_common.segmentation.windows import Windows
from groupvit_common.serving.app import Answer
from groupvit_common.serving.engine import Engine
from groupvit_common.serving.metrics import Metrics
from groupvit_common.serving.pool import _POOL, in_pool
from groupvit_common.serving.problems import Problem
from groupvit_common.serving.results import run_lengths
from groupvit_common.serving.store import Held, ImageStore, Memory

SOON = 10


class FakeSegmenter:
    """Notes the batches that it is given; an image of one pixel is one that it cannot take."""

    def __init__(self, batches, **options):
        self.batches, self.options = batches, SegmentationOptions(**options)

    def encode(self, images):
        self.batches.append([image.width for image in images])
        if any(image.width == 1 for image in images):
            raise ValueError("one pixel")
        return [f"encoded {image.width}" for image in images]


class Blocked:
    """Work that goes on until it is let go."""

    def __init__(self, engine):
        self._begun, self._go = threading.Event(), threading.Event()
        self.future = engine.run(self._wait)
        assert self._begun.wait(SOON)

    def _wait(self):
        self._begun.set()
        assert self._go.wait(SOON)

    def let_go(self):
        self._go.set()


@pytest.fixture
def engine():
    segmenter, metrics = FakeSegmenter([]), Metrics()
    engine = Engine("torch", segmenter, batch_size=3, batch_seconds=0, metrics=metrics)
    engine.metrics = metrics
    yield engine
    engine.stop()


def image(side):
    return Image.new("RGB", (side, 1))


def test_images_that_wait_go_together_and_only_with_those_of_their_options(engine):
    blocked, batches = Blocked(engine), engine.segmenter.batches
    mirrored = FakeSegmenter(batches, flip=True)
    futures = [engine.encode(engine.segmenter if side != 3 else mirrored, image(side)) for side in (2, 3, 4, 5, 6)]
    assert len(engine) == 5
    blocked.let_go()
    assert [future.result(SOON)[0] for future in futures] == [f"encoded {side}" for side in (2, 3, 4, 5, 6)]
    assert batches == [[2, 4, 5], [3], [6]]
    assert 'groupvit_batch_images_bucket{backend="torch",le="4"} 3' in engine.metrics.text()


def test_one_bad_image_is_no_fault_of_its_batch(engine):
    blocked = Blocked(engine)
    futures = [engine.encode(engine.segmenter, image(side)) for side in (2, 1, 3)]
    blocked.let_go()
    assert futures[0].result(SOON)[0] == "encoded 2"
    assert futures[2].result(SOON)[0] == "encoded 3"
    with pytest.raises(ValueError, match="one pixel"):
        futures[1].result(SOON)


def test_short_work_goes_first_but_not_for_ever(engine):
    blocked, order = Blocked(engine), []
    long = engine.run(lambda: order.append("long"), long=True)
    short = [engine.run(lambda: order.append("short")) for _ in range(12)]
    blocked.let_go()
    for future in (long, *short):
        future.result(SOON)
    assert 1 <= order.index("long") <= 8
    assert order.count("short") == 12


def test_what_nobody_waits_for_is_dropped_and_a_stop_refuses_the_rest(engine):
    blocked, done = Blocked(engine), []
    dropped, kept = engine.run(lambda: done.append("dropped")), engine.run(lambda: done.append("kept"))
    gone = engine.encode(engine.segmenter, image(2))
    assert len(engine) == 3
    assert dropped.cancel()
    assert gone.cancel()
    # At once: images whose clients have gone must not pile up behind what runs.
    assert len(engine) == 1
    blocked.let_go()
    kept.result(SOON)
    assert done == ["kept"]
    blocked = Blocked(engine)
    waiting = engine.encode(engine.segmenter, image(2))
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    with pytest.raises(Problem, match="stopping"):
        waiting.result(SOON)
    assert stopper.is_alive()
    blocked.let_go()
    stopper.join(SOON)
    blocked.future.result(SOON)
    with pytest.raises(Problem, match="stopping"):
        engine.run(lambda: None)


def test_what_waits_for_a_thread_leaves_with_who_waits_for_it():
    async def leave():
        go, body = threading.Event(), np.zeros(10)
        busy = [asyncio.ensure_future(in_pool(go.wait, SOON)) for _ in range(_POOL._max_workers)]
        waiting, seen = asyncio.ensure_future(in_pool(np.sum, body)), weakref.ref(body)
        del body
        await asyncio.sleep(0)
        assert seen() is not None
        waiting.cancel()
        await asyncio.wait({waiting})
        del waiting
        gc.collect()
        try:
            assert seen() is None
        finally:
            go.set()
        assert all(await asyncio.gather(*busy))

    asyncio.run(leave())


def encoded(side=10, count=1):
    view = EncodedView(np.zeros((1, 2, 4)), np.zeros((1, 4)), (np.zeros((1, 2, 3, 3)),), Windows.whole((3, 3)))
    loaded = Loaded(Image.new("RGB", (side, side)), None)
    return EncodedImage(loaded, np.zeros((3, 3, 3)), (view,) * count, SimpleNamespace(), None)


def test_images_are_kept_within_a_bound_of_memory_and_age():
    now = [0.0]
    one = encoded().nbytes
    store = ImageStore(3 * one, 60, clock=lambda: now[0])
    names = []
    for _ in range(3):
        names.append(store.add("torch", encoded()))
        now[0] += 10
    assert len(set(names)) == 3
    assert all(len(name) == 32 for name in names)
    store.find(names[0], "torch")
    store.add("torch", encoded())
    assert store.nbytes == 3 * one
    with pytest.raises(Problem, match="send it again"):
        store.find(names[1], "torch")
    now[0] += 55
    store.find(names[0], "torch")
    with pytest.raises(Problem, match="send it again"):
        store.find(names[2], "torch")
    with pytest.raises(Problem, match="more memory than"):
        store.add("torch", encoded(40))
    assert store.remove(names[0])
    assert not store.remove(names[0])
    now[0] += 100
    assert not store.remove("other")
    assert (len(store), store.nbytes) == (0, 0)


def test_one_image_is_kept_in_several_ways_but_not_in_all():
    store = ImageStore(10**9, 60)
    name, first = store.add("a", encoded()), None
    for key in "bcdef":
        found, first = store.find(name, key)
        assert found is None
        store.extend(name, key, EncodedImage(first.loaded, first.pixels, first.views, first.preparation, None))
    assert store.find(name, "f")[0] is not None
    assert store.find(name, "b")[0] is None
    views = 4 * (encoded().nbytes - 4 * 100)
    assert store.nbytes == 4 * 100 + views
    store.extend("gone", "a", encoded())
    assert len(store) == 1


def test_memory_of_requests_is_given_back():
    memory = Memory(100)
    with Held(memory) as one:
        one.take(60)
        with Held(memory) as other, pytest.raises(Problem, match="try again in 2 s") as error:
            other.take(50)
        assert (error.value.status, error.value.retry_after) == (429, 2)
        one.take(40)
    assert memory.nbytes == 0
    with pytest.raises(Problem):
        one.take(1)
    assert memory.nbytes == 0


def test_memory_of_an_answer_counts_until_it_is_sent():
    memory, during = Memory(100), []

    async def send(message):
        during.append(memory.nbytes)

    answer = Answer(b"1" * 80, memory)
    with pytest.raises(Problem, match="holds as much"):
        Answer(b"1" * 30, memory)
    asyncio.run(answer({"type": "http"}, None, send))
    assert (during, memory.nbytes) == ([80, 80], 0)


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.describe("seen_total", "counter", "What was seen.")
    metrics.count("seen_total", path='a"\\\n')
    metrics.count("seen_total", 2, path='a"\\\n')
    for seconds in (0.001, 0.3, 100):
        metrics.observe("took_seconds", seconds)
    metrics.gauge("now", "What is now.", lambda: 1.5)
    lines = metrics.text().splitlines()
    assert "# TYPE seen_total counter" in lines
    assert 'seen_total{path="a\\"\\\\\\n"} 3' in lines
    assert 'took_seconds_bucket{le="0.01"} 1' in lines
    assert 'took_seconds_bucket{le="0.5"} 2' in lines
    assert 'took_seconds_bucket{le="+Inf"} 3' in lines
    assert "took_seconds_count 3" in lines
    assert lines[-1] == "now 1.5"


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_are_cocos(seed):
    mask_library = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 50)) < (0, 0.02, 0.5, 0.98, 1, 0.1)[seed]
    mask[:, 20:30] ^= rng.random((37, 1)) < 0.1
    expected = mask_library.encode(np.asfortranarray(mask, np.uint8))
    assert run_lengths(mask) == {"size": [37, 50], "counts": expected["counts"].decode()}
