"""Journals of evaluations: what is counted is what was written, or the line that is not is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groupvit_common.data.captions.sources import ByteRange
from groupvit_common.errors import InputError
from groupvit_common.evaluation.classification import ClassificationResult
from groupvit_common.evaluation.datasets.classification import (
    ClassificationSet,
    ClassifiedImage,
    open_classification_set,
)
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.journal import LOCK_NAME, Journal, check_output, line_of, read_journals
from groupvit_common.evaluation.processes import SingleProcess
from groupvit_common.evaluation.run import EvaluationResult
from groupvit_common.evaluation.segmentation import SegmentationResult
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.storage.locks import FolderLock

PIXELS = {"name": "a", "confusion": [[0, 1, 5], [1, 1, 7]], "oracle": [[0, 0, 5], [1, 0, 7]], "overlaps": [0.5]}
CLASS = {"name": "a", "truth": 1, "best": [1, 0, 2]}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> SegmentationResult:
    """Three classes, the first the background."""
    root = tmp_path_factory.mktemp("journal") / "set"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(root / folder / "a.png")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    return SegmentationResult(open_sets(f"folder:{root}")[0])


@pytest.fixture(scope="module")
def classes() -> ClassificationResult:
    images = ClassifiedImage("a", ByteRange("a"), 1), ClassifiedImage("b", ByteRange("b"), 0)
    return ClassificationResult(ClassificationSet("imagenet", "val", ("cat", "dog", "cow"), images))


def write(folder: Path, *records: object, checked: bool = True) -> Path:
    lines = [
        record if isinstance(record, str) else line_of(record) if checked else json.dumps(record)
        for record in ({"run": {}}, *records)
    ]
    path = folder / "journal-0.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("checked", [True, False], ids=["with checksums", "of an earlier version"])
def test_what_was_written_is_read(pixels, classes, tmp_path, checked):
    for data, record in ((pixels, PIXELS), (classes, CLASS)):
        path = write(
            tmp_path, record, {**record, "name": "b", **({"truth": 0} if "truth" in record else {})}, checked=checked
        )
        with path.open("a") as file:
            file.write('{"name": "c", "conf')  # cut off by a kill
        assert [each["name"] for each in read_journals(tmp_path, data.fault_in)] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"confusion": [[0, 1, -5], [1, 1, 7]]}, "confusion counts -5 pixels"),
        ({"confusion": [[0, 1, 5.0]]}, "not three whole numbers"),
        ({"confusion": [[0, 1, True]]}, "not three whole numbers"),
        ({"confusion": [[0, 3, 5]]}, "confusion names class 3, there are 0 to 2"),
        ({"oracle": [[-1, 0, 5]]}, "oracle names class -1, there are 0 to 2"),
        ({"confusion": [[0, 1, 5], [0, 1, 5]]}, "has a cell twice"),
        ({"confusion": [[0, 1, 10**20]]}, "counts 100000000000000000000 pixels"),
        ({"confusion": {"0": 1}}, "confusion is no list"),
        ({"oracle": [[0, 0, 6], [1, 0, 7]]}, "not of the same pixels"),
        ({"overlaps": [1.5]}, "not numbers from 0 to 1"),
        ({"overlaps": [0.5, 0.5]}, "not one for each class"),
        ({"overlaps": None}, "not numbers from 0 to 1"),
        ({"name": 5}, "not a record of an image's pixels"),
        ({"more": 1}, "not a record of an image's pixels"),
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_a_record_of_another_shape_is_named(pixels, tmp_path, change, cause, checked):
    path = write(tmp_path, PIXELS, {**PIXELS, "name": "b", **change}, checked=checked)
    with pytest.raises(InputError) as caught:
        read_journals(tmp_path, pixels.fault_in)
    assert str(caught.value).startswith(f"{path}, line 3, is not what an evaluation writes (")
    assert cause in str(caught.value)


def test_a_count_that_is_nan_is_named(pixels, tmp_path):
    path = write(tmp_path, PIXELS, {**PIXELS, "name": "b", "confusion": [[0, 1, float("nan")]]}, checked=False)
    with pytest.raises(InputError, match="NaN is not a JSON number") as caught:
        read_journals(tmp_path, pixels.fault_in)
    assert str(caught.value).startswith(f"{path}, line 3, ")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"truth": 3}, "it names class 3"),
        ({"truth": "1"}, "it names class '1'"),
        ({"truth": 0}, "a is of class 1"),
        ({"best": [1, 1, 0]}, "best are not 3 classes"),
        ({"best": [1]}, "best are not 3 classes"),
        ({"best": [1, 0, -1]}, "it names class -1"),
        ({"best": [1, 0, [2]]}, r"it names class \[2\]"),
        ({"best": 1}, "best are not 3 classes"),
    ],
)
def test_a_class_of_another_shape_is_named(classes, tmp_path, change, cause):
    write(tmp_path, {**CLASS, **change})
    with pytest.raises(InputError, match=rf"journal-0.jsonl, line 2, is not what an evaluation writes \({cause}"):
        read_journals(tmp_path, classes.fault_in)


@pytest.mark.parametrize("line", ["5", "[]", "null", "", "{", "[" * 9000, '"text"', '{"run": {}}', "\0\0"])
def test_other_lines_are_named(pixels, tmp_path, line):
    for number in (1, 2):
        path = write(tmp_path, line, PIXELS, checked=False)
        if number == 1:
            path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
            if line == '{"run": {}}':
                continue
        with pytest.raises(InputError, match=rf"journal-0.jsonl, line {number}, is not what an evaluation writes"):
            read_journals(tmp_path, pixels.fault_in)


def test_no_changed_letter_is_counted(pixels, tmp_path):
    """Whatever is changed in a line with a checksum is noticed, and so is a checksum taken away."""
    path = write(tmp_path, PIXELS)
    head, line = path.read_bytes().splitlines()
    rng = random.Random(0)
    for _ in range(100):
        place, letter = rng.randrange(len(line)), rng.choice(b"0123456789-,[]{}ae")
        changed = line[:place] + bytes([letter]) + line[place + 1 :]
        if changed != line:
            path.write_bytes(head + b"\n" + changed + b"\n")
            with pytest.raises(InputError, match="line 2, is not what an evaluation writes"):
                read_journals(tmp_path, pixels.fault_in)
    path.write_bytes(head + b"\n" + json.dumps(PIXELS).encode() + b"\n")
    with pytest.raises(InputError, match=r"line 2, .*it lacks its checksum"):
        read_journals(tmp_path, pixels.fault_in)


def opened(folder: Path, result: EvaluationResult, restart: bool = False) -> Journal:
    return Journal(folder, result.data, {}, result.fault_in, SingleProcess(), restart)


def test_two_evaluations_in_one_folder(pixels, tmp_path):
    with opened(tmp_path, pixels):
        for restart in (False, True):
            with pytest.raises(InputError, match="another evaluation writes into"):
                opened(tmp_path, pixels, restart)
    with opened(tmp_path, pixels) as journal:
        journal.add(PIXELS)
    with (tmp_path / "journal-0.jsonl").open("a") as file:
        file.write("5\n")
    for _ in range(2):  # a refused one leaves no lock
        with pytest.raises(InputError, match="line 3, is not what"):
            opened(tmp_path, pixels)
    FolderLock(tmp_path, LOCK_NAME, "evaluation").release()


def test_a_journal_from_before_an_option_is_resumed_with_its_default(pixels, tmp_path):
    head = {"model": "demo", **SegmentationOptions().to_dict()}
    without = {key: value for key, value in head.items() if key not in ("refine", "scales", "foreground")}

    def resumed(**changes: object) -> list[dict[str, object]]:
        with Journal(tmp_path, pixels.data, {**head, **changes}, pixels.fault_in, SingleProcess()) as journal:
            return journal.before

    path = tmp_path / "journal-0.jsonl"
    begun = "".join(f"{line_of(record)}\n" for record in ({"run": without}, PIXELS))
    path.write_text(begun)
    assert resumed() == [PIXELS]
    assert resumed() == [PIXELS]
    for name, was, value in (("refine", 0, 2), ("scales", [1.0], (0.5, 1.0)), ("foreground", None, 0.8)):
        path.write_text(begun)
        with pytest.raises(InputError) as caught:
            resumed(**{name: value})
        now = list(value) if isinstance(value, tuple) else value
        assert f"({name} was {was} and is {now})" in str(caught.value)
    # Other keys have no default.
    with pytest.raises(InputError, match="weights was None and is 'abc'"):
        resumed(weights="abc")


def test_results_do_not_go_among_the_sets_files(pixels, tmp_path):
    root = pixels.data.folders[0].parent
    (tmp_path / "link").symlink_to(root / "images", target_is_directory=True)
    for place in (root / "images", root / "masks" / "sub", tmp_path / "link", root / "images" / ".." / "masks"):
        before = sorted(root.rglob("*"))
        with pytest.raises(
            InputError, match=r"the results cannot go into .*: folder reads its files from .*(images|masks), where"
        ):
            opened(place, pixels)
        assert sorted(root.rglob("*")) == before
    check_output(root, pixels.data)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "cat" / "a.png")
    data = open_classification_set(str(tmp_path))
    for place in (tmp_path / "val", tmp_path / "val" / "results"):
        with pytest.raises(InputError, match=r"imagenet reads its files from .*val"):
            check_output(place, data)
    check_output(tmp_path / "results", data)
