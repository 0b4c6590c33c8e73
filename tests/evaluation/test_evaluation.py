"""Evaluation: counts against pictures segmented one by one, runs that are killed and continued, several processes, the command."""

import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from groupvit_common import cli
from groupvit_common.cli import evaluate
from groupvit_common.cli.command_line import build_parser
from groupvit_common.cli.terminal import BAD_INPUT
from groupvit_common.errors import InputError
from groupvit_common.evaluation.calibration import Point, best_point, calibrate
from groupvit_common.evaluation.classification import evaluate_classification
from groupvit_common.evaluation.datasets.classification import open_classification_set
from groupvit_common.evaluation.datasets.segmentation import open_sets, voc_palette
from groupvit_common.evaluation.metrics import (
    best_overlaps,
    confusion_matrix,
    group_counts,
    mean_iou,
    oracle_confusion,
)
from groupvit_common.evaluation.protocols import ProtocolSettings, default_protocol, protocol_settings
from groupvit_common.evaluation.report import record_of, table
from groupvit_common.evaluation.run import RunOptions
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.preprocessing.prompts import parse_labels
from groupvit_common.segmentation.predictor import DEMO_MODEL
from groupvit_torch.predictor import Segmenter as TorchSegmenter
from tests.support.backends import BACKENDS
from tests.support.checkpoints import random_checkpoint
from tests.support.paths import ROOT

WORDS = ["background", "cat", "couch", "dog", "sofa"]
SIZES = [(40, 56), (48, 40), (36, 36), (40, 56), (64, 40), (44, 44)]
# What is written as a share of all pixels is rounded once.
EXACT = 1e-15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("evaluation") / "model", seed=1)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def base(request, checkpoint):
    """A segmenter of each backend."""
    return importlib.import_module(f"groupvit_{request.param}.predictor").Segmenter.from_pretrained(
        checkpoint, device="cpu"
    )


@pytest.fixture(scope="module")
def torch_base(checkpoint):
    return TorchSegmenter.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of six pictures with blocks of colour; class 4 is nowhere, and some pixels are ignored."""
    root = tmp_path_factory.mktemp("sets") / "folder"
    rng = np.random.default_rng(6)
    for number, size in enumerate(SIZES):
        image = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)[: size[0], : size[1]]
        mask = np.kron(rng.choice([0, 1, 2, 3, 255], (4, 4)), np.ones((16, 16))).astype(np.uint8)[: size[0], : size[1]]
        for kind, array in (("images", image), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(WORDS))
    return root


def settings(**changes):
    return ProtocolSettings(
        **{"background": 0.2, "assignment": "hard", "shorter_side": 32, "window": 32, "stride": 16, **changes}
    )


def same(a, b):
    np.testing.assert_array_equal(a.confusion, b.confusion)
    np.testing.assert_array_equal(a.oracle, b.oracle)
    assert sorted(a.overlaps) == sorted(b.overlaps)
    assert (a.images, a.scores()) == (b.images, b.scores())


# ---- what is counted ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": None, "stride": None, "assignment": "soft"},
        {"top_k": 2},
        {"flip": True, "scales": (1.0, 1.5), "refine": 2},
    ],
)
def test_counts_are_those_of_the_pictures_one_by_one(base, folder, changes):
    (data,) = open_sets(f"folder:{folder}")
    segmenter = settings(**changes).segmenter(base, 3)
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


def test_one_class_and_pictures_without_a_judged_pixel(torch_base, folder, tmp_path):
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


# ---- runs that are continued ----


class Killed(Exception):
    pass


def stop_after(count):
    def progress(_, left=[count]):  # noqa: B006 (a counter)
        left[0] -= 1
        if not left[0]:
            raise Killed

    return progress


def test_a_killed_run_goes_on_and_ends_the_same(torch_base, folder, tmp_path):
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


def test_a_run_with_other_settings_is_not_continued(torch_base, folder, tmp_path):
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
    result = evaluate_segmentation(other, data, replace_restart(options))
    assert result.timed == 2


def replace_restart(options):
    return replace(options, restart=True)


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


def test_several_processes_share_the_pictures(torch_base, folder, tmp_path):
    (data,) = open_sets(f"folder:{folder}")
    alone = evaluate_segmentation(settings().segmenter(torch_base, 2), data)

    def work(rank, place):
        # The first time only two of the pictures, so that there is something to continue, with another number of processes.
        some = replace(data, limit=2) if place.world == 2 else data
        return evaluate_segmentation(settings().segmenter(torch_base, 2), some, RunOptions(folder=tmp_path), place)

    first = run_together(2, work)
    assert (first[0].images, first[1]) == (2, None)
    every = run_together(3, work)
    same(every[0], alone)
    assert every[0].timed == 4
    assert every[1:] == [None, None]
    same(evaluate_segmentation(settings().segmenter(torch_base, 2), data, RunOptions(folder=tmp_path)), alone)


# ---- calibration ----


def test_the_curve_is_that_of_evaluations(base, folder):
    (data,) = open_sets(f"folder:{folder}", limit=4)
    segmenter = settings(temperature=2.0).segmenter(base, 2)
    curve = calibrate(segmenter, data, [0.05, 0.3], [1.0, 3.0])
    assert segmenter.options.temperature == 2.0
    assert [(p.temperature, p.threshold) for p in curve] == [(1, 0.05), (1, 0.3), (3, 0.05), (3, 0.3)]
    for point in curve:
        chosen = settings(background=point.threshold, temperature=point.temperature).segmenter(base, 2)
        assert point.mean_iou == evaluate_segmentation(chosen, data).mean_iou
    assert len({point.mean_iou for point in curve}) > 1
    assert best_point(curve).mean_iou == max(point.mean_iou for point in curve)


def test_a_threshold_is_background_enough_for_a_foreground(torch_base, folder):
    (data,) = open_sets(f"folder:{folder}", limit=2)
    options = {"foreground": 0.4, "window": None, "stride": None}
    segmenter = settings(background=None, **options).segmenter(torch_base, 2)
    curve = calibrate(segmenter, data, [0.05, 0.3])
    for point in curve:
        chosen = settings(background=point.threshold, **options).segmenter(torch_base, 2)
        assert point.mean_iou == evaluate_segmentation(chosen, data).mean_iou
    assert segmenter.options.background is None
    with pytest.raises(InputError, match="foreground weighs labels against a background"):
        segmenter(data[0].image())


def test_the_best_of_a_curve_with_gaps():
    points = [Point(1, 0.1, math.nan), Point(1, 0.2, 0.5), Point(1, 0.3, 0.5)]
    assert best_point(points).threshold == 0.2


@pytest.mark.parametrize(("what", "bad"), [("thresholds", [1.5]), ("temperatures", [0.0])])
def test_what_cannot_be_tried(torch_base, folder, what, bad):
    with pytest.raises(InputError, match=what):
        calibrate(settings().segmenter(torch_base, 2), open_sets(f"folder:{folder}")[0], **{what: bad})


# ---- classification ----


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Four folders of pictures; two classes share a word."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(8)
    for number in range(12):
        path = root / "val" / f"n0000000{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((12, 12, 1))).astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("cat\ncouch, sofa\ncat\ndog\n")
    return root


def test_classification_against_each_picture(base, classes, tmp_path):
    data = open_classification_set(str(classes))
    assert (data.words, data.split, len(data)) == (("cat", "couch", "cat", "dog"), "val", 12)
    segmenter = ProtocolSettings(templates="seven").segmenter(base, 5)
    with pytest.raises(Killed):
        evaluate_classification(segmenter, data, RunOptions(folder=tmp_path, progress=stop_after(10)))
    result = evaluate_classification(segmenter, data, RunOptions(folder=tmp_path))
    assert (result.images, result.timed) == (12, 2)
    first = among = 0
    for picture in data:
        likely = segmenter.classify(picture.image())
        ranked = sorted(range(4), key=lambda i: -likely[data.words[i]])
        first += ranked[0] == picture.truth
        among += picture.truth in ranked[:5]
    assert result.scores() == {"top1": first / 12, "top5": among / 12}
    assert [each["images"] for each in result.by_class()] == [3, 3, 3, 3]


def test_shards_say_the_same_as_folders(torch_base, classes, tmp_path):
    data = open_classification_set(str(classes))
    for shard in range(2):
        with tarfile.open(tmp_path / f"val-{shard:02d}.tar", "w") as tar:
            for number, picture in list(enumerate(data))[shard::2]:
                buffer = io.BytesIO()
                picture.image().save(buffer, format="png")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(picture.truth).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("cat\ncouch\ncat\ndog\n")
    packed = open_classification_set(f"{tmp_path}/val-{{00..01}}.tar")
    segmenter = ProtocolSettings().segmenter(torch_base, 4)
    results = [evaluate_classification(segmenter, each) for each in (data, packed)]
    np.testing.assert_array_equal(results[0].first, results[1].first)
    assert results[0].scores() == results[1].scores()
    (tmp_path / "classnames.txt").write_text("cat\ncouch\n")
    with pytest.raises(InputError, match=r"is of class '\d', but .*classnames\.txt names classes 0 to 1"):
        open_classification_set(f"{tmp_path}/val-*.tar")


def test_names_of_classes(classes, tmp_path):
    assert len(open_classification_set(str(classes), limit=4)) == 4
    assert [p.truth for p in open_classification_set(str(classes), limit=4)] == [0, 1, 2, 3]
    plain = tmp_path / "plain"
    (plain / "polar_bear").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(plain / "polar_bear" / "1.png")
    assert open_classification_set(str(plain)).words == ("polar bear",)
    (plain / "polar_bear").rename(plain / "n02134084")
    with pytest.raises(InputError, match=r"n02134084 have no words.*classes\.txt"):
        open_classification_set(str(plain))
    (plain / "LOC_synset_mapping.txt").write_text("n02134084 ice bear, polar bear\n")
    assert open_classification_set(str(plain)).words == ("ice bear",)
    (plain / "classes.txt").write_text("polar bear\ncat\n")
    with pytest.raises(InputError, match="names 2 classes, but there are 1 folders"):
        open_classification_set(str(plain))
    with pytest.raises(InputError, match=r"there is no folder .*/test"):
        open_classification_set(str(plain), split="test")


# ---- protocols and results ----


def test_protocols():
    paper = protocol_settings("paper", "voc")
    assert (paper.background, paper.top_k, paper.assignment, paper.names) == (0.95, 5, "hard", "authors")
    assert (paper.shorter_side, paper.window, paper.stride, paper.normalize_prompts) == (448, 448, 224, False)
    assert protocol_settings("paper", "context").background == 0.35
    assert protocol_settings("paper", "coco-object").background == 0.95
    for kind in ("voc20", "context59", "coco-stuff", "ade20k", "cityscapes"):
        assert protocol_settings("tcl", kind) == replace(paper, names="set", background=None)
    assert protocol_settings("native", "voc") == ProtocolSettings(background=0.95)
    assert protocol_settings("paper", "imagenet") == ProtocolSettings(templates="seven", normalize_prompts=False)
    assert (default_protocol("scenes"), default_protocol("voc")) == ("native", "paper")
    with pytest.raises(InputError, match="protocol must be one of paper, tcl, native"):
        protocol_settings("other", "voc")


# ---- the command ----


def run_cli(capsys, *arguments):
    code = cli.main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_the_command_measures_writes_and_continues(capsys, checkpoint, folder, tmp_path, backend):
    options = [
        "--data",
        f"folder:{folder}",
        "--model",
        checkpoint,
        "--backend",
        backend,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    ]
    knobs = ["--background", "0.2", "--shorter-side", "32", "--window", "32", "--top-k", "none", "--save-predictions"]
    code, out, err = run_cli(capsys, *options, *knobs)
    assert (code, err) == (0, "")
    assert "mean IoU" in out
    assert "protocol paper" in out
    record = json.loads((tmp_path / "results.json").read_text())
    (data,) = open_sets(f"folder:{folder}")
    module = importlib.import_module(f"groupvit_{backend}.predictor")
    base = module.Segmenter.from_pretrained(checkpoint, device="cpu")
    expected = evaluate_segmentation(settings(normalize_prompts=False).segmenter(base, 8), data)
    assert {name: record[name] for name in expected.scores()} == expected.scores()
    assert [each["name"] for each in record["classes"]] == WORDS
    assert record["settings"]["stride"] is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "confusion.csv", "confusion.png", "journal-0.jsonl", "predictions",
    }  # fmt: skip

    code, out, _ = run_cli(capsys, *options, *knobs, "--json")
    again = json.loads(out)
    assert again["images_per_second"] is None
    assert again["mean_iou"] == record["mean_iou"]
    code, _, err = run_cli(capsys, *options)
    assert code == BAD_INPUT
    assert "holds another evaluation" in err


def test_other_weights_under_the_same_name_are_noticed(capsys, monkeypatch, checkpoint, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(checkpoint, tmp_path / name)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    changed = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    options = ["--data", "scenes:1", "--limit", 1, "--model", "demo", "--backend", "torch", "--out", tmp_path / "out"]
    monkeypatch.setattr("groupvit_common.checkpoints.hub.DEMO_MODEL", tmp_path / "a")
    assert run_cli(capsys, *options)[0] == 0
    # The same weights in a newer file go on.
    (tmp_path / "a" / "model.safetensors").touch()
    assert run_cli(capsys, *options)[0] == 0
    monkeypatch.setattr("groupvit_common.checkpoints.hub.DEMO_MODEL", tmp_path / "b")
    code, _, err = run_cli(capsys, *options)
    assert code == BAD_INPUT
    assert "holds another evaluation (weights was" in err


def test_the_command_measures_several_sets_and_calibrates(capsys, tmp_path):
    code, out, _ = run_cli(
        capsys, "--data", "scenes:1", "scenes:3", "--limit", 3, "--model", "demo", "--out", tmp_path, "--json"
    )
    assert code == 0
    assert [json.loads(line)["set"] for line in out.splitlines()] == ["scenes:1", "scenes:3"]
    assert (tmp_path / "scenes-1" / "results.json").is_file()
    calibration = ["--data", "scenes:1", "--limit", 3, "--model", "demo", "--calibrate", "--out", tmp_path]
    code, _, err = run_cli(capsys, *calibration)
    assert code == BAD_INPUT
    assert "--calibrate needs --split" in err
    code, out, _ = run_cli(capsys, *calibration, "--split", 5, "--thresholds", "0.1,0.5", "--temperatures", "1,2")
    assert code == 0
    assert "best: --temperature" in out
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert len(record["curve"]) == 4
    assert record["best"]["mean_iou"] == max(point["mean_iou"] for point in record["curve"])


def test_one_set_that_cannot_be_measured_ends_no_others(capsys, checkpoint, folder, tmp_path):
    """A set with a damaged image; one with a name that is not UTF-8, whose run is continued."""
    sets = [shutil.copytree(folder, tmp_path / name) for name in ("bad", "good")]
    damaged = sets[0] / "images" / "3.png"  # the first is looked at when the set is opened
    damaged.write_bytes(damaged.read_bytes()[:-60])
    for kind in ("images", "masks"):
        try:
            (sets[1] / kind / "0.png").rename(sets[1] / kind / "caf\udce9.png")
        except (OSError, UnicodeError):
            pytest.skip("this file system takes no such name")
    out_dir = tmp_path / "out"
    options = ["--data", *(f"folder:{path}" for path in sets), "--model", checkpoint, "--out", out_dir, "--json"]
    records = []
    for _ in range(2):
        code, out, err = run_cli(capsys, *options)
        assert code == 1
        (line,) = err.splitlines()
        assert line.startswith("groupvit: error: folder")
        assert "3.png" in line
        records.append(json.loads(out))
    assert records[0]["images"] == records[1]["images"] == len(SIZES)
    assert records[0]["mean_iou"] == records[1]["mean_iou"]


def test_the_command_classifies(capsys, checkpoint, classes):
    code, out, _ = run_cli(capsys, "--data", f"imagenet:{classes}", "--model", checkpoint, "--backend", "torch")
    assert code == 0
    assert "top-1" in out
    assert "12 images" in out


def test_the_background_by_words(capsys, checkpoint, folder):
    options = ["--data", f"folder:{folder}", "--model", checkpoint, "--backend", "torch", "--device", "cpu", "--json"]
    code, out, _ = run_cli(
        capsys, *options, "--background-labels", "wall, remote control", "--window", "none", "--shorter-side", 32
    )
    record = json.loads(out)
    assert code == 0
    assert record["settings"]["background"] is None
    assert record["settings"]["window"] is None
    (data,) = open_sets(f"folder:{folder}")
    base = TorchSegmenter.from_pretrained(checkpoint, device="cpu")
    plain = settings(background=None, window=None, stride=None, top_k=5, normalize_prompts=False)
    expected = evaluate_segmentation(
        plain.segmenter(base, 8), data, background_labels=parse_labels("wall, remote control")
    )
    assert record["mean_iou"] == expected.mean_iou


def test_options_for_better_masks(capsys):
    options = ["--data", "scenes:1", "--limit", 2, "--model", "demo", "--backend", "torch", "--device", "cpu", "--json"]
    masks = ["--flip", "--scales", "1,1.5", "--refine", 2, "--refine-dilations", "1,3"]
    masks += ["--foreground", 0.7, "--synonyms", "max"]
    code, out, _ = run_cli(capsys, *options, *masks)
    assert code == 0
    record = json.loads(out)
    chosen = {"flip": True, "scales": (1.0, 1.5), "refine": 2, "refine_dilations": (1, 3)}
    chosen |= {"foreground": 0.7, "synonyms": "max"}
    assert {name: record["settings"][name] for name in chosen} == {
        **chosen, "scales": [1.0, 1.5], "refine_dilations": [1, 3],
    }  # fmt: skip
    (data,) = open_sets("scenes:1", limit=2)
    base = TorchSegmenter.from_pretrained("demo", device="cpu")
    expected = evaluate_segmentation(replace(protocol_settings("native", data.kind), **chosen).segmenter(base, 8), data)
    assert record["mean_iou"] == expected.mean_iou


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "voc:/nowhere", "--model", "no/such"], "there is no folder /nowhere"),
        (["--data", "voc"], "voc needs the folder"),
        (["--data", "imagenet"], "imagenet needs the folder"),
        (["--data", "scenes", "--save-predictions"], "--save-predictions needs --out"),
        (["--data", "scenes", "--templates", "nine"], "unknown template set"),
        (["--data", "scenes:1", "--limit", "1", "--model", "demo", "--window", "3"], "multiple of the patch size"),
    ],
)
def test_bad_requests_are_told_in_one_line(capsys, arguments, message):
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out) == (BAD_INPUT, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("bad", ["1,0", "2,2", "1.5", ""])
def test_bad_dilations(capsys, bad):
    with pytest.raises(SystemExit):
        run_cli(capsys, "--data", "scenes", "--refine-dilations", bad)
    assert "--refine-dilations" in capsys.readouterr().err


def test_keras_does_not_run_in_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run_cli(capsys, "--data", "scenes:1", "--model", "demo", "--backend", "tf")
    assert code == BAD_INPUT
    assert "several processes evaluate together in PyTorch only" in err


def test_the_page_about_evaluation_says_what_works(capsys):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(program, {})
    assert capsys.readouterr().out.startswith("scenes:1 0.7")
    commands = re.findall(r"evaluate( --data .*)", page)
    assert len(commands) > 4
    for command in commands:
        options = build_parser().parse_args(["evaluate", *shlex.split(command.split("`")[0], comments=True)])
        assert options.run is evaluate._run


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_scenes_are_measured_as_training_measured_them(capsys, backend):
    """The bundled model's record holds percentages with one digit."""
    expected = json.loads((DEMO_MODEL / "training.json").read_text())["mean_iou"]
    code, out, _ = run_cli(capsys, "--data", "scenes", "--model", "demo", "--backend", backend, "--json")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [round(100 * record["mean_iou"], 1) for record in records] == [expected[level] for level in "123"]


@pytest.mark.slow
def test_torchrun_measures_as_one_process_does(capsys, tmp_path):
    arguments = ["--data", "scenes:1", "--limit", "9", "--model", "demo", "--backend", "torch", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    done = subprocess.run(
        [*command, "groupvit_common.cli", "evaluate", *arguments, "--out", str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    together = json.loads(line)
    _, out, _ = run_cli(capsys, *arguments)
    alone = json.loads(out)
    assert together["processes"] == 2
    assert together["images"] == 9
    assert together["classes"] == alone["classes"]
    assert together["mask_jaccard"] == alone["mask_jaccard"]
