"""The stream of batches: its order, its workers, bad samples, and resuming."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupvit_common.data.captions.order import UNITS_PER_RANK
from groupvit_common.data.captions.samples import SampleMaker
from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.data.captions.stream import BAD_SAMPLES_ALLOWED, BAD_SHARDS_ALLOWED, CaptionBatch, CaptionStream
from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor
from tests.data.test_sources import write_shard
from tests.support.paths import ROOT

DEMO = ROOT / "groupvit_common" / "demo_model"
PROCESSOR = GroupViTProcessor.from_pretrained(DEMO)

CAPTIONS = (
    "a red circle on grass",
    "a blue star and a ring over water",
    "so nice",
    "a striped square in front of a wall",
)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(key: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", CAPTIONS[number % 4].encode())]


def write_shards(folder: Path, shards: int, each: int, name: str = "s") -> SourceSettings:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = [file for n in range(each) for file in sample(f"{name}{shard:02d}-{n:03d}", shard * each + n)]
        write_shard(folder / f"{name}-{shard:02d}.tar", files)
    return SourceSettings(kind="webdataset", path=f"{folder}/{name}-{{00..{shards - 1:02d}}}.tar")


def settings_of(*sources: SourceSettings, **more: object) -> DataSettings:
    return DataSettings(**{"sources": sources, "image_size": 12, "shuffle_buffer": 10} | more)


def stream(settings: DataSettings, batch_size: int = 4, seed: int = 0, **more: int) -> CaptionStream:
    return CaptionStream(settings, PROCESSOR, batch_size=batch_size, seed=seed, **more)


def take(source: CaptionStream, count: int) -> list[CaptionBatch]:
    batches: Iterator[CaptionBatch] = iter(source)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def keys(batches: list[CaptionBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def assert_same(first: list[CaptionBatch], second: list[CaptionBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys == other.keys
        for name in ("pixel_values", "input_ids", "attention_mask", "prompt_ids", "prompt_mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> SourceSettings:
    """Six shards of seven samples."""
    return write_shards(tmp_path_factory.mktemp("shards"), 6, 7)


# ---- what a batch is ----


def test_a_batch(shards: SourceSettings) -> None:
    (batch,) = take(stream(settings_of(shards, prompts=2)), 1)
    length = PROCESSOR.tokenizer.model_max_length
    assert batch.pixel_values.shape == (4, 3, 12, 12)
    assert batch.pixel_values.dtype == np.float32
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, length)
    assert batch.prompt_ids is not None
    assert batch.prompt_mask is not None
    assert batch.prompt_ids.shape == batch.prompt_mask.shape == (4, 2, length)
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.prompt_ids.dtype} == {np.dtype(np.int64)}


def test_without_variation_a_batch_is_what_the_processor_makes(shards: SourceSettings) -> None:
    """The order as written, pixels and tokens against the processor's own way from file to tensor."""
    plain = settings_of(
        shards,
        image_size=20,
        crop_scale=None,
        flip=0,
        rand_augment=0,
        color_jitter=0,
        erasing=0,
        shuffle_buffer=0,
        prompts=0,
    )
    (batch,) = take(stream(plain, 9), 1)
    assert batch.keys == [f"s00-{n:03d}" for n in range(7)] + ["s01-000", "s01-001"]
    assert batch.prompt_ids is None
    assert batch.prompt_mask is None
    images = [Image.open(io.BytesIO(picture(n))).crop((2, 0, 22, 20)) for n in range(9)]
    expected = PROCESSOR(
        text=[CAPTIONS[n % 4] for n in range(9)],
        images=images,
        padding="max_length",
        truncation=True,
        return_tensors="np",
        do_resize=False,
        do_center_crop=False,
    )
    np.testing.assert_array_equal(batch.pixel_values, expected["pixel_values"])
    np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(batch.attention_mask, expected["attention_mask"])


# ---- order ----


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(shards: SourceSettings) -> None:
    batches = take(stream(settings_of(shards), 7), 12)
    first, second = keys(batches[:6]), keys(batches[6:])
    assert sorted(first) == sorted(second) == [f"s{shard:02d}-{n:03d}" for shard in range(6) for n in range(7)]
    assert first != second
    assert first != sorted(first)
    # A pool is two shards here: both occur in what comes first.
    assert len({key[:3] for key in first[:14]}) == 2
    assert len({key[:3] for key in first[:6]}) == 2


def test_seeds_and_epochs_vary_order_and_images(shards: SourceSettings) -> None:
    settings = settings_of(shards)
    one, again, other = (take(stream(settings, 42, seed), 2) for seed in (3, 3, 4))
    assert_same(one, again)
    assert one[0].keys != other[0].keys
    pictures = [{key: batch.pixel_values[n] for n, key in enumerate(batch.keys)} for batch in (*one, *other)]
    for first, second in ((0, 1), (0, 2)):
        alike = sum(np.array_equal(pictures[first][key], pictures[second][key]) for key in pictures[0])
        # Two crops of 20 x 24 pixels may be the same one by chance.
        assert alike <= 2


def test_batch_size_changes_neither_order_nor_images(shards: SourceSettings) -> None:
    small, large = (take(stream(settings_of(shards), size), 60 // size) for size in (5, 20))
    assert keys(small) == keys(large)
    np.testing.assert_array_equal(
        np.concatenate([batch.pixel_values for batch in small]), np.concatenate([batch.pixel_values for batch in large])
    )


@pytest.mark.parametrize("count", [6, 4 * UNITS_PER_RANK + 2], ids=["by sample", "by shard"])
def test_ranks_share_an_epoch(tmp_path: Path, count: int) -> None:
    settings = settings_of(write_shards(tmp_path, count, 3), image_size=4, prompts=0)
    seen: Counter[str] = Counter()
    for rank in range(4):
        source = stream(settings, 1, rank=rank, world=4)
        batches = iter(source)
        while True:
            seen.update(next(batches).keys)
            if source.counters.epoch:
                break
        batches.close()
    assert set(seen.values()) == {1}
    assert len(seen) == 3 * count


def test_fewer_samples_than_ranks_is_an_error(tmp_path: Path) -> None:
    settings = settings_of(write_shards(tmp_path, 1, 3))
    assert keys(take(stream(settings, 1, rank=2, world=4), 2))
    with pytest.raises(InputError, match="there is no sample for rank 3 of 4 in a whole epoch"):
        take(stream(settings, 1, rank=3, world=4), 1)


def test_weights(tmp_path: Path) -> None:
    one, two, half = (
        replace(write_shards(tmp_path, 4, 2, name), weight=weight)
        for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.5))
    )
    # 8 + 16 + 4 samples an epoch
    batches = take(stream(settings_of(one, two, half, image_size=4, prompts=0), 28), 2)
    for batch in batches:
        counts = Counter(key[0] for key in batch.keys)
        assert counts == {"a": 8, "b": 16, "c": 4}
        assert set(Counter(key for key in batch.keys if key[0] == "b").values()) == {2}
    halves = [{key for key in batch.keys if key[0] == "c"} for batch in batches]
    assert len(halves[0] | halves[1]) == 8
    twins = [n for n, key in enumerate(batches[0].keys) if key == "b00-000"]
    first, second = batches[0].pixel_values[twins]
    assert not np.array_equal(first, second)


def test_kinds_of_sources_mix(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 1, 3)
    folder, rows = tmp_path / "folder", ["image,caption"]
    folder.mkdir()
    for n in range(3):
        (folder / f"f{n}.png").write_bytes(picture(n))
        (folder / f"f{n}.txt").write_text(CAPTIONS[n])
        rows.append(f"folder/f{n}.png,{CAPTIONS[n]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    settings = settings_of(
        shards,
        SourceSettings(kind="folder", path=str(folder)),
        SourceSettings(kind="table", path=str(tmp_path / "t.csv")),
    )
    (batch,) = take(stream(settings, 9), 1)
    assert sorted(batch.keys) == sorted(
        [*(f"s00-{n:03d}" for n in range(3)), *(f"f{n}.png" for n in range(3)), *(f"folder/f{n}.png" for n in range(3))]
    )
    texts = {
        key: PROCESSOR.tokenizer.decode(ids, skip_special_tokens=True)
        for key, ids in zip(batch.keys, batch.input_ids, strict=True)
    }
    assert texts["s00-001"] == texts["f1.png"] == texts["folder/f1.png"] == CAPTIONS[1]


# ---- workers ----


def test_workers_change_nothing_and_end_with_the_iteration(tmp_path: Path) -> None:
    """Bad samples and a broken shard among them, so that pieces of work come back with holes."""
    settings = settings_of(broken(tmp_path), max_bad_share=1)
    inline, workers = stream(settings, 5), stream(settings, 5, workers=2)
    assert_same(take(inline, 9), take(workers, 9))
    assert inline.state_dict() == workers.state_dict()
    assert inline.counters == workers.counters
    assert children(os.getpid()) == []


@pytest.mark.parametrize("which", [0, 1], ids=["one that makes", "one that lists"])
def test_a_worker_that_dies_is_reported(shards: SourceSettings, which: int) -> None:
    batches = iter(stream(settings_of(shards, prompts=0), 1, workers=1))
    next(batches)
    os.kill(sorted(children(os.getpid()))[which], signal.SIGKILL)
    with pytest.raises(GroupViTError, match=r"a worker process of the data pipeline ended unexpectedly \(killed"):
        list(islice(batches, 200))
    batches.close()
    assert children(os.getpid()) == []


def test_ctrl_c_and_a_schedulers_signal_are_left_to_the_caller(shards: SourceSettings) -> None:
    source = stream(settings_of(shards, prompts=0), 1, workers=1)
    batches = iter(source)
    next(batches)
    for worker in children(os.getpid()):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
    assert len(list(islice(batches, 60))) == 60
    batches.close()


def test_workers_of_a_killed_run_go_too(shards: SourceSettings) -> None:
    code = f"""
        from tests.data.test_stream import *
        batches = iter(stream(settings_of({shards!r}, prompts=0), workers=2))
        next(batches)
        print("ready", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        workers = children(run.pid)
        assert len(workers) == 3  # two that make samples, one that lists shards
        run.kill()
    for _ in range(200):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive the run")


def children(parent: int) -> list[int]:
    """Processes started by one, by Linux's list."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, its_parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if (
                int(its_parent) == parent
                and state != "Z"
                and b"groupvit_common.data.captions.workers" in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# ---- bad samples ----


def broken(folder: Path) -> SourceSettings:
    """Three shards of twelve samples: the second has six bad ones, the third breaks off after four."""
    files = [file for n in range(12) for file in sample(f"good-{n}", n)]
    write_shard(folder / "b-0.tar", files)
    damaged = picture(0)[:200]
    bad = [
        ("no-text.png", picture(1)),
        ("empty.png", picture(2)),
        ("empty.txt", b" \n"),
        ("latin.png", picture(3)),
        ("latin.txt", "café".encode("latin-1")),
        ("cut.png", damaged),
        ("cut.txt", b"a cat"),
        ("html.jpg", b"<html>"),
        ("html.txt", b"a cat"),
        ("no-picture.txt", b"a cat"),
    ]
    write_shard(folder / "b-1.tar", [*bad, *(file for n in range(6) for file in sample(f"fine-{n}", n))])
    whole = write_shard(folder / "b-2.tar", [file for n in range(12) for file in sample(f"half-{n}", n)]).read_bytes()
    text = whole.index(b"half-4.txt")
    (folder / "b-2.tar").write_bytes(whole[: text - 100])
    return SourceSettings(kind="webdataset", path=f"{folder}/b-{{0..2}}.tar")


def test_bad_samples_are_counted_and_skipped(tmp_path: Path) -> None:
    source = stream(settings_of(broken(tmp_path), max_bad_share=1, shuffle_buffer=0), 22)
    (batch,) = take(source, 1)
    assert batch.keys == [
        *(f"good-{n}" for n in range(12)),
        *(f"fine-{n}" for n in range(6)),
        *(f"half-{n}" for n in range(4)),
    ]
    counters = source.counters
    assert counters.read == 28
    assert counters.epoch == 1
    assert counters.bad == {
        "no caption": 1,
        "the caption is empty": 1,
        "the caption is not UTF-8": 1,
        "the image is damaged": 1,
        "not an image": 1,
        "no image": 1,
        "the shard is truncated": 1,
    }
    assert (counters.shards, counters.bad_shards) == (3, 1)
    assert counters.bad_in == {f"{tmp_path}/b-1.tar": 6, f"{tmp_path}/b-2.tar": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_a_run(tmp_path: Path, workers: int) -> None:
    files = [
        file for n in range(60) for file in ((f"{n}.png", b"damage" if n % 2 else picture(n)), (f"{n}.txt", b"a cat"))
    ]
    path = write_shard(tmp_path / "bad.tar", files)
    settings = settings_of(SourceSettings(kind="webdataset", path=str(path)), max_bad_share=0.3, prompts=0)
    source = stream(settings, 1, workers=workers)
    batches = iter(source)
    with pytest.raises(InputError) as caught:
        list(islice(batches, 1000))
    message = str(caught.value)
    assert f"{BAD_SAMPLES_ALLOWED + 1} of " in message
    assert "max_bad_share = 0.3" in message
    assert f"not an image ({BAD_SAMPLES_ALLOWED + 1})" in message
    assert f"{path} ({BAD_SAMPLES_ALLOWED + 1})" in message
    assert "\n" not in message
    assert children(os.getpid()) == []


def test_too_many_bad_shards_stop_a_run(tmp_path: Path) -> None:
    source = write_shards(tmp_path, 8, 4)
    for number in range(BAD_SHARDS_ALLOWED + 1):
        shard = tmp_path / f"s-{number:02d}.tar"
        shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"4 of [4-8] shards or blocks.*the shard is truncated \(4\)"):
        take(stream(settings_of(source), 1), 100)


def test_nothing_but_broken_shards_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nonsense")
    settings = settings_of(SourceSettings(kind="webdataset", path=str(tmp_path / "a.tar")))
    with pytest.raises(InputError, match="the shard is truncated or not a tar file"):
        take(stream(settings), 1)


def test_nothing_usable_is_an_error_within_an_epoch(tmp_path: Path) -> None:
    """However much is allowed to be unusable; nobody would ever get a batch."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"not an image")
        (tmp_path / f"{number}.txt").write_text("a cat")
    settings = settings_of(SourceSettings(kind="folder", path=str(tmp_path)), max_bad_share=1)
    message = (
        r"^there is no usable sample in a whole epoch: not an image \(3\)\. Most in .*\. "
        r"Mend these files, or give others$"
    )
    with pytest.raises(InputError, match=message):
        take(stream(settings, 2), 1)
    # One is enough: it comes once an epoch.
    (tmp_path / "1.jpg").write_bytes(picture(1))
    source = stream(settings, 2)
    assert keys(take(source, 2)) == ["1.jpg"] * 4
    assert source.counters.bad["not an image"] >= 6
    # Data that went bad while a run stood still: told at the end of the next whole epoch.
    (tmp_path / "1.jpg").write_bytes(b"not an image")
    source.load_state_dict(source.state_dict() | {"sample": 2})
    with pytest.raises(InputError, match="no usable sample"):
        take(source, 1)
    with pytest.raises(InputError, match="no usable sample for rank 1 of 2"):
        take(stream(settings, 2, rank=1, world=2), 1)


def test_captions_in_other_encodings(tmp_path: Path) -> None:
    texts = {
        "a": "\ufeffa cat".encode(),
        "b": "a cat".encode("utf-16"),
        "c": "a cat".encode("utf-16-le"),
        "d": b"caf\xe9",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.png").write_bytes(picture(0))
        (tmp_path / f"{name}.txt").write_bytes(text)
    settings = settings_of(
        SourceSettings(kind="folder", path=str(tmp_path)), shuffle_buffer=0, max_bad_share=1, prompts=0
    )
    source = stream(settings, 3)
    (batch,) = take(source, 1)
    assert batch.keys == ["a.png", "b.png", "a.png"]
    assert (batch.input_ids[0] == batch.input_ids[1]).all()
    assert source.counters.bad == {
        "the caption has null characters, as UTF-16 and binary files have": 1,
        "the caption is not UTF-8": 1,
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_what_is_no_file_is_a_bad_sample(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(picture(0))
    rows = [{"image": name, "caption": "a cat"} for name in ("pipe.png", "a.png", "a\0b.png", "/dev/zero")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = settings_of(SourceSettings(kind="table", path=f"{tmp_path}/a.jsonl"), max_bad_share=1, shuffle_buffer=0)
    source = stream(settings, 2)
    assert keys(take(source, 1)) == ["a.png", "a.png"]
    assert source.counters.bad["the image is no regular file"] >= 2


def test_a_file_that_went_away_is_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\nnowhere.png,a cat\nhere.png,a dog\n")
    (tmp_path / "here.png").write_bytes(picture(0))
    source = stream(settings_of(SourceSettings(kind="table", path=str(tmp_path / "t.csv"))), 3)
    assert keys(take(source, 1)) == ["here.png"] * 3
    assert source.counters.bad["the image file cannot be read (No such file or directory)"] >= 2


def test_endless_captions_and_files_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption of one word of five million letters would keep tokenizer and tagger busy for hours."""
    monkeypatch.setattr("groupvit_common.data.captions.samples._MOST_BYTES", 6_000_000)
    files = [
        *sample("good", 0),
        ("long.png", picture(1)),
        ("long.txt", b"zq" * 2_500_000),
        ("large.png", picture(2) + bytes(6_000_000)),
        ("large.txt", b"a cat"),
    ]
    path = write_shard(tmp_path / "a.tar", files)
    settings = settings_of(SourceSettings(kind="webdataset", path=str(path)), shuffle_buffer=0)
    source = stream(settings, 3)
    assert keys(take(source, 1)) == ["good", "long", "good"]
    assert source.counters.bad == {"the image file is too large": 1}


def test_one_strange_image_does_not_end_a_run(shards: SourceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def augment(*arguments: Any) -> Image.Image:
        calls.append(arguments)
        if len(calls) == 2:
            raise ZeroDivisionError
        return Image.new("RGB", (12, 12))

    monkeypatch.setattr("groupvit_common.data.captions.samples.augment", augment)
    source = stream(settings_of(shards), 4)
    take(source, 1)
    assert source.counters.bad == {"the image cannot be processed (ZeroDivisionError)": 1}


# ---- resuming ----


def test_resuming_is_as_if_never_interrupted(tmp_path: Path) -> None:
    """From every batch of two epochs, bad samples and a broken shard included."""
    settings = settings_of(broken(tmp_path), max_bad_share=1)
    source = stream(settings, 5)
    batches, states = [], [source.state_dict()]
    for batch in islice(iter(source), 9):
        batches.append(batch)
        states.append(json.loads(json.dumps(source.state_dict())))
    for number in range(len(batches)):
        later = stream(settings, 5)
        later.load_state_dict(states[number])
        assert later.state_dict() == states[number]
        rest = batches[number : number + 2]
        assert_same(take(later, len(rest)), rest)
        assert later.state_dict() == states[number + len(rest)]


def test_the_state_is_that_of_the_last_batch_taken(shards: SourceSettings) -> None:
    """Batches made ahead do not count; iterating again, here without workers, continues from there."""
    settings = settings_of(shards, prompts=0)
    reference = take(stream(settings), 6)
    source = stream(settings, workers=1)
    first = take(source, 2)
    assert source.counters.read == 8
    source.workers = 0
    assert_same([*first, *take(source, 4)], reference)


def test_resuming_decodes_nothing_that_came_before(shards: SourceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stream(settings_of(shards), 4)
    take(source, 30)
    state = source.state_dict()
    asked: list[str] = []
    make = SampleMaker.__call__
    monkeypatch.setattr(
        SampleMaker, "__call__", lambda self, work: (asked.extend(entry.key for entry, _ in work), make(self, work))[1]
    )
    later = stream(settings_of(shards), 4)
    later.load_state_dict(state)
    (batch,) = take(later, 1)
    # A piece of work is longer than this batch.
    assert asked[:4] == batch.keys
    assert len(asked) <= 16


def test_an_epoch_can_be_begun_anew(shards: SourceSettings) -> None:
    reference = take(stream(settings_of(shards), 42), 3)
    later = stream(settings_of(shards), 42)
    later.load_state_dict({"epoch": 2})
    assert_same(take(later, 1), reference[2:])
    assert later.counters.read == 42


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "of seed 0, not 1"),
        ({"rank": 1, "world": 2}, "of rank 0, not 1"),
        ({"world": 2}, "of world 1, not 2"),
        ({"shuffle_buffer": 20}, "of other data"),
        ({"weight": 2.0}, "of other data"),
    ],
)
def test_states_of_another_run_are_refused(shards: SourceSettings, other: dict[str, float], message: str) -> None:
    state = stream(settings_of(shards)).state_dict()
    chosen = settings_of(
        replace(shards, weight=other.pop("weight", 1.0)), shuffle_buffer=int(other.pop("shuffle_buffer", 10))
    )
    later = stream(chosen, **other)
    with pytest.raises(InputError, match=rf"{message}.*load {{\"epoch\": 0}}"):
        later.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "seed and workers not negative"),
        ({"rank": 2, "world": 2}, "rank must be one of 0 to world - 1, got rank 2 of 2"),
    ],
)
def test_bad_arguments(shards: SourceSettings, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CaptionStream(settings_of(shards), PROCESSOR, **{"batch_size": 4, "seed": 0} | change)


# ---- light, and as documented ----


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DEMO.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    for documented, small in {
        "cc3m/{00000..00331}": "s-{00..01}",
        "nvidia/groupvit-gcc-yfcc": str(DEMO),
        "batch_size=256": "batch_size=8",
        "workers=8": "workers=1",
    }.items():
        assert documented in code
        code = code.replace(documented, small)
    write_shards(tmp_path, 2, 5)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "0.png").write_bytes(picture(0))
    (tmp_path / "own" / "captions.csv").write_text("image,caption\n0.png,a red circle\n")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(code, values)
    length = PROCESSOR.tokenizer.model_max_length
    assert values["batch"].pixel_values.shape == (8, 3, 224, 224)
    assert values["batch"].prompt_ids.shape == (8, 3, length)


def test_the_pipeline_needs_no_framework() -> None:
    code = """
        import sys
        from groupvit_common.data.captions.stream import CaptionStream
        heavy = {"torch", "tensorflow", "keras", "pyarrow", "HanTa", "braceexpand"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], check=True)
