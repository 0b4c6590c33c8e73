"""Results as files: their format is recorded, and charts are left out where matplotlib is not installed."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.evaluation.calibration import Point
from groupvit_common.evaluation.classification import evaluate_classification
from groupvit_common.evaluation.datasets.classification import open_classification_set
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.page import load_template
from groupvit_common.evaluation.protocols import ProtocolSettings
from groupvit_common.evaluation.report import (
    calibration_record,
    confusion_csv,
    record_of,
    write_calibration,
    write_results,
)
from groupvit_common.evaluation.run import RunOptions
from groupvit_common.evaluation.segmentation import SegmentationResult, evaluate_segmentation
from groupvit_common.preprocessing.prompts import parse_labels

RECORDED = Path(__file__).parent / "recorded"
"""Files of earlier versions: `results_TASK.json` and `confusion.csv` are of the runs in `journal_TASK.jsonl`."""

ABOUT = {"model": "demo", "backend": "torch", "dtype": "float32", "weights": "0" * 64}


def test_a_segmentation_that_was_begun_before_is_resumed(demo, tmp_path):
    """The first line has all options and kinds of labels: it is the same to the byte, and so are the results."""
    shutil.copy(RECORDED / "journal_segmentation.jsonl", tmp_path / "journal-0.jsonl")
    (data,) = open_sets("scenes:1", limit=2)
    options = {"top_k": 6, "window": 64, "stride": 32, "flip": True, "scales": (1.0, 1.5), "refine": 1}
    options |= {"refine_dilations": (1, 2), "foreground": 0.5, "templates": "seven", "synonyms": "max"}
    settings = ProtocolSettings(**options, normalize_prompts=False, temperature=2, assignment="soft")
    about = {**ABOUT, "protocol": "native"}
    background = parse_labels('road | "a grey \u732b"')
    run = RunOptions(folder=tmp_path, about=about)
    result = evaluate_segmentation(settings.segmenter(demo, 2), data, run, background_labels=background)
    assert (result.images, result.timed) == (2, 0)
    assert (tmp_path / "journal-0.jsonl").read_bytes() == (RECORDED / "journal_segmentation.jsonl").read_bytes()
    result.timed, result.seconds = 2, 0.5
    write_results(
        result, record_of(result, {**about, "settings": {"names": "authors", "scales": (1.0, 1.5)}}), tmp_path
    )
    for written, recorded in (("results.json", "results_segmentation.json"), ("confusion.csv", "confusion.csv")):
        assert (tmp_path / written).read_bytes() == (RECORDED / recorded).read_bytes()
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_classification_that_was_begun_before_is_resumed(demo, tmp_path):
    for name in ("c0/0", "c0/1", "c1/0", "c1/1", "c2/0", "c2/1"):
        path = tmp_path / "set" / "val" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "set" / "classes.txt").write_text("red\nazure, sky\npink\n")
    data = open_classification_set(str(tmp_path / "set"))
    shutil.copy(RECORDED / "journal_classification.jsonl", tmp_path / "journal-0.jsonl")
    about = {**ABOUT, "protocol": "paper"}
    segmenter = ProtocolSettings(templates="seven", normalize_prompts=False).segmenter(demo, 4)
    result = evaluate_classification(segmenter, data, RunOptions(folder=tmp_path, about=about))
    assert (result.images, result.timed) == (6, 0)
    assert (tmp_path / "journal-0.jsonl").read_bytes() == (RECORDED / "journal_classification.jsonl").read_bytes()
    result.timed, result.seconds = 6, 0.25
    write_results(result, record_of(result, {**about, "protocol": "native"}), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == (RECORDED / "results_classification.json").read_bytes()


def test_counts_of_processes_add_up(demo):
    """As JSON brings them from one process to another."""
    (data,) = open_sets("scenes:1", limit=1)
    classes = len(data.classes)
    one, other = SegmentationResult(data), SegmentationResult(data)
    one.add({"name": "a", "confusion": [[0, 1, 5]], "oracle": [[0, 0, 5]], "overlaps": [0.5]})
    other.add({"name": "b", "confusion": [[0, 1, 2], [8, 8, 3]], "oracle": [[0, 0, 2], [8, 8, 3]], "overlaps": [1.0]})
    other.seconds, other.timed = 2.0, 1
    one.merge(json.loads(json.dumps(other.numbers())))
    expected = np.zeros((classes, classes), int)
    expected[0, 1], expected[8, 8] = 7, 3
    np.testing.assert_array_equal(one.confusion, expected)
    assert (one.images, one.timed, one.seconds, one.overlaps) == (2, 1, 2.0, [0.5, 1.0])


def test_without_matplotlib_results_are_written_without_charts(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (data,) = open_sets("scenes:1", limit=1)
    result = SegmentationResult(data)
    with pytest.warns(UserWarning, match=r"confusion\.png is not written: charts need .*groupvit\[evaluate\]"):
        write_results(result, record_of(result, {}), tmp_path)
    with pytest.warns(UserWarning, match=r"calibration\.png is not written"):
        write_calibration([Point(1.0, 0.5, math.nan)], {}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "confusion.csv", "calibration.json"}
    for package in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            InputError, match=rf"a page needs the package {package}: pip install 'groupvit\[evaluate\]'"
        ):
            load_template()


def test_a_calibration_without_a_value_is_null(tmp_path):
    curve = [Point(1.0, 0.25, 0.5), Point(2.0, 0.5, math.nan)]
    write_calibration(curve, calibration_record(curve, {"set": "voc"}), tmp_path)
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert list(record) == ["set", "best", "curve"]
    assert record["best"] == record["curve"][0] == {"temperature": 1.0, "threshold": 0.25, "mean_iou": 0.5}
    assert record["curve"][1]["mean_iou"] is None
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 21])
def test_confusion_as_csv(count):
    names = [f"class {i}" for i in range(count)]
    confusion = np.arange(count**2).reshape(count, count)
    rows = list(csv.reader(io.StringIO(confusion_csv(names, confusion))))
    assert rows[0] == ["true \\ predicted", *names]
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in rows[1:]], confusion)


def test_names_in_csv_are_no_formulas():
    names = [
        '=HYPERLINK("http://x","y")',
        "+1",
        "-1",
        "@SUM(A1)",
        "\tcat",
        " =1",
        "two\nlines",
        'a "quoted", name',
        "cat-dog",
        "\uff1d1",
    ]
    text = confusion_csv(names, np.eye(len(names), dtype=np.int64))
    (head, *rows) = csv.reader(io.StringIO(text))
    shown = [f"'{name}" for name in names[:6]] + names[6:9] + [f"'{names[9]}"]
    assert head[1:] == [row[0] for row in rows] == shown
