"""Counts of a set against images that are segmented one by one; runs that are resumed; several processes."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.calibration import calibrate
from groupvit_common.evaluation.datasets.segmentation import open_sets, voc_palette
from groupvit_common.evaluation.metrics import (
    best_overlaps,
    confusion_matrix,
    group_counts,
    mean_iou,
    oracle_confusion,
)
from groupvit_common.evaluation.report import record_of, table
from groupvit_common.evaluation.run import RunOptions
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.preprocessing.prompts import parse_labels
from groupvit_torch.predictor import Segmenter
from tests.support.evaluation import SIZES, WORDS, Killed, settings, stop_after

# What is written as a fraction of all pixels is rounded once.
EXACT = 1e-15


@pytest.fixture(scope="module")
def torch_base(checkpoint):
    """In float64: a batch is summed in another order than its images one by one, which in float32 may turn a tie."""
    return Segmenter.from_pretrained(checkpoint, device="cpu", dtype="float64")


def same(a, b):
    np.testing.assert_array_equal(a.confusion, b.confusion)
    np.testing.assert_array_equal(a.oracle, b.oracle)
    assert sorted(a.overlaps) == sorted(b.overlaps)
    assert (a.images, a.scores()) == (b.images, b.scores())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": None, "stride": None, "assignment": "soft"},
        {"top_k": 2},
        {"flip": True, "scales": (1.0, 1.5), "refine": 2},
    ],
)
def test_counts_are_those_of_the_images_one_by_one(torch_base, folder, changes):
    """Batches give what single images give in either backend: tests/segmentation/test_segmenter.py."""
    (data,) = open_sets(f"folder:{folder}")
    segmenter = settings(**changes).segmenter(torch_base, 3)
    result = evaluate_segmentation(segmenter, data)

    confusion, oracle, overlaps = np.zeros((5, 5), int), np.zeros((5, 5), int), []
    for sample in data:
        found, mask = segmenter(sample.image()), sample.mask()
        assert found.labels == data.classes
        confusion += confusion_matrix(mask, found.label_map, 5)
        counts = group_counts(mask, found.group_map, 5, int(found.group_map.max()) + 1)
        oracle += oracle_confusion(counts)
        overlaps += best_overlaps(counts, 0).tolist()
    np.testing.assert_array_equal(result.confusion, confusion)
    np.testing.assert_array_equal(result.oracle, oracle)
    scores = result.scores()
    np.testing.assert_allclose(scores["mask_jaccard"], np.mean(overlaps), rtol=EXACT * 8)
    assert scores["mean_iou"] == mean_iou(confusion)
    assert scores["oracle_mean_iou"] == mean_iou(oracle)
    assert scores["pixel_accuracy"] == np.trace(confusion) / confusion.sum()
    assert (result.images, result.timed) == (6, 6)
    assert len(np.flatnonzero(confusion.sum(axis=0))) > 2, "the model should say more than one thing"


def test_the_oracle_is_at_least_as_good_as_any_names_for_hard_groups(torch_base, folder):
    (data,) = open_sets(f"folder:{folder}")
    result = evaluate_segmentation(settings(window=None, stride=None, background=0.0).segmenter(torch_base, 2), data)
    assert np.trace(result.oracle) >= np.trace(result.confusion)


def test_a_set_without_background(torch_base, folder, tmp_path):
    root = tmp_path / "set"
    (root / "masks").mkdir(parents=True)
    (root / "images").symlink_to(folder / "images")
    for path in (folder / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 0, 255, mask - (mask < 255)).astype(np.uint8)).save(root / "masks" / path.name)
    (root / "classes.txt").write_text("\n".join(WORDS[1:]))
    (data,) = open_sets(f"folder:{root}")
    result = evaluate_segmentation(settings(background=None).segmenter(torch_base, 2), data)
    assert result.confusion.shape == (4, 4)
    assert result.class_outside_mean is None
    with pytest.raises(InputError, match="folder has no background class"):
        evaluate_segmentation(settings().segmenter(torch_base, 2), data)
    (with_background,) = open_sets(f"folder:{folder}")
    with pytest.raises(InputError, match="folder has a background class: give a threshold"):
        evaluate_segmentation(settings(background=None).segmenter(torch_base, 2), with_background)
    with pytest.raises(InputError, match="'Cat' is a class of folder"):
        evaluate_segmentation(
            settings().segmenter(torch_base, 2), with_background, background_labels=parse_labels("wall, Cat")
        )
    with pytest.raises(InputError, match="no background class: there is no threshold to find"):
        calibrate(settings(background=None).segmenter(torch_base, 2), data)


def test_one_class_and_images_without_a_judged_pixel(torch_base, folder, tmp_path):
    root = tmp_path / "set"
    (root / "masks").mkdir(parents=True)
    (root / "images").symlink_to(folder / "images")
    for number, size in enumerate(SIZES):
        Image.fromarray(np.full(size, 0 if number == 2 else 255, np.uint8)).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("cat")
    (data,) = open_sets(f"folder:{root}")
    segmenter = settings(background=None).segmenter(torch_base, 2)
    result = evaluate_segmentation(segmenter, data)
    assert result.confusion.tolist() == [[36 * 36]]
    assert result.scores()["mean_iou"] == 1.0
    nothing = evaluate_segmentation(segmenter, replace(data, limit=2))
    assert all(math.isnan(score) for score in nothing.scores().values())
    record = record_of(nothing, {})
    assert json.loads(json.dumps(record, allow_nan=False))["mean_iou"] is None
    assert "mean IoU none" in table(record)


def test_a_killed_run_is_resumed_and_ends_the_same(torch_base, folder, tmp_path):
    (data,) = open_sets(f"folder:{folder}")
    segmenter = settings().segmenter(torch_base, 1)
    whole = evaluate_segmentation(segmenter, data)
    with pytest.raises(Killed):
        evaluate_segmentation(segmenter, data, RunOptions(folder=tmp_path, progress=stop_after(4)))
    journal = tmp_path / "journal-0.jsonl"
    with journal.open("a") as file:
        file.write('{"name": "5", "confus')  # what a kill leaves in the middle of a line
    begun = []
    options = RunOptions(folder=tmp_path, begin=lambda done, every: begun.append((done, every)))
    result = evaluate_segmentation(segmenter, data, options)
    same(result, whole)
    assert result.timed == 2
    assert begun == [(4, 6)]
    again = evaluate_segmentation(segmenter, data, options)
    same(again, whole)
    assert again.timed == 0
    assert record_of(again, {})["images_per_second"] is None
    few = evaluate_segmentation(segmenter, replace(data, limit=2), options)
    assert (few.images, few.timed) == (2, 0)


def test_a_run_with_other_settings_is_not_resumed(torch_base, folder, tmp_path):
    (data,) = open_sets(f"folder:{folder}", limit=2)
    options = RunOptions(folder=tmp_path, about={"model": "a"})
    evaluate_segmentation(settings().segmenter(torch_base, 2), data, options)
    other = settings(background=0.3).segmenter(torch_base, 2)
    with pytest.raises(InputError, match=r"holds another evaluation \(background was 0.2 and is 0.3\).*--restart"):
        evaluate_segmentation(other, data, options)
    with pytest.raises(InputError, match="model was 'a' and is 'b'"):
        evaluate_segmentation(
            settings().segmenter(torch_base, 2), data, RunOptions(folder=tmp_path, about={"model": "b"})
        )
    result = evaluate_segmentation(other, data, replace(options, restart=True))
    assert result.timed == 2


def test_predictions_are_written_as_the_sets_masks_and_made_again_where_missing(torch_base, folder, tmp_path):
    (data,) = open_sets(f"folder:{folder}")
    segmenter = settings().segmenter(torch_base, 2)
    evaluate_segmentation(segmenter, data, RunOptions(folder=tmp_path))
    options = RunOptions(folder=tmp_path, predictions=True)
    assert evaluate_segmentation(segmenter, data, options).timed == 6
    for sample in data:
        image = Image.open(tmp_path / "predictions" / f"{sample.name}.png")
        assert image.mode == "P"
        assert image.getpalette()[:12] == voc_palette()[:4].ravel().tolist()
        np.testing.assert_array_equal(np.asarray(image), segmenter(sample.image()).label_map)
    (tmp_path / "predictions" / "3.png").unlink()
    result = evaluate_segmentation(segmenter, data, options)
    assert (result.images, result.timed) == (6, 1)


class Together:
    """Processes as threads."""

    def __init__(self, world):
        self.world, self.barrier, self.values = world, threading.Barrier(world), [None] * world

    def place(self, rank):
        together = self

        class Place:
            world = together.world

            def __init__(self):
                self.rank = rank

            def all(self, value):
                together.values[rank] = value
                together.barrier.wait()
                values = list(together.values)
                together.barrier.wait()
                return values

        return Place()


def run_together(world, work):
    together, results = Together(world), [None] * world

    def run(rank):
        results[rank] = work(rank, together.place(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_several_processes_share_the_images(torch_base, folder, tmp_path):
    (data,) = open_sets(f"folder:{folder}")
    alone = evaluate_segmentation(settings().segmenter(torch_base, 2), data)

    def work(rank, place):
        # First only two of the images, so that another number of processes has something to resume.
        some = replace(data, limit=2) if place.world == 2 else data
        return evaluate_segmentation(settings().segmenter(torch_base, 2), some, RunOptions(folder=tmp_path), place)

    first = run_together(2, work)
    assert (first[0].images, first[1]) == (2, None)
    every = run_together(3, work)
    same(every[0], alone)
    assert every[0].timed == 4
    assert every[1:] == [None, None]
    same(evaluate_segmentation(settings().segmenter(torch_base, 2), data, RunOptions(folder=tmp_path)), alone)
