"""Results in the formats of other tools, read by the tools where they are installed, and by a second reader here."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.segmentation.adapters import (
    CocoDataset,
    polygons,
    to_coco,
    to_coco_annotations,
    to_coco_results,
    to_fiftyone,
    to_fiftyone_detections,
    to_label_studio,
    to_supervision,
)
from groupvit_common.segmentation.adapters.label_studio import packed
from groupvit_common.segmentation.result import LabelScore, Segmentation
from groupvit_common.segmentation.segments import segments

# pycocotools 2.0.11 hands NumPy 2 arrays as NumPy 1 took them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

HEIGHT, WIDTH = 34, 47
PROBABLE = np.array([[0.64, 0.04, 0.09], [0.01, 0.81, 0.01], [0.09, 0.04, 0.25]])


def made(has_background=False, labels=("cat", "couch", "remote"), source="photos/a.jpg"):
    """A ring with a hole (cat), two parts (remote) and the rest; each group has one label."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(y - 15, x - 17)
    label_map = np.ones((HEIGHT, WIDTH), np.uint8)
    label_map[(distance < 12) & (distance > 5)] = 0
    label_map[2:9, 36:44] = label_map[20:31, 38:45] = 2
    if has_background:
        label_map = np.array([1, 0, 2], np.uint8)[label_map]
        labels = ("background", labels[0], labels[2])
        groups, scores = (1, 0, 2), PROBABLE[:, [1, 0, 2]]
    else:
        groups, scores = (0, 1, 2), PROBABLE
    shares = np.bincount(label_map.ravel(), minlength=3) / label_map.size
    return Segmentation(
        Image.new("RGB", (WIDTH, HEIGHT), "grey"),
        label_map,
        labels,
        tuple(LabelScore(name, 0.3, share) for name, share in zip(labels, shares.tolist(), strict=True)),
        np.array([groups.index(value) for value in range(3)], np.uint8)[label_map],
        groups,
        has_background,
        source,
        scores,
    )


@pytest.fixture
def result():
    return made()


def filled(outlines, shape):
    """A second way to fill polygons of horizontal and vertical edges: the pixels whose centre is within (even-odd)."""
    inside = np.zeros(shape, int)
    for outline in outlines:
        crossings = np.zeros((shape[0], shape[1] + 1), int)
        for (x, y), (next_x, next_y) in zip(outline, outline[1:] + outline[:1], strict=True):
            assert (x == next_x) != (y == next_y)
            if x == next_x:
                crossings[min(y, next_y) : max(y, next_y), x] += 1
        inside += np.cumsum(crossings, axis=1)[:, :-1] % 2
    return inside


def unpacked(data):
    """A second reader of Label Studio's format, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def read(count):
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    count, value_bits = read(32), read(5) + 1
    counters = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < count:
        is_run = read(1)
        length = read(counters[read(2)]) + 1
        values += [read(value_bits)] * length if is_run else [read(value_bits) for _ in range(length)]
    return np.array(values, np.uint8)


masks = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans())


# -- segments --


def test_segments_have_scores_of_their_groups(result):
    found = list(segments(result))
    assert [(each.label, each.index, each.group) for each in found] == [
        ("cat", 0, None),
        ("couch", 1, None),
        ("remote", 2, None),
    ]
    np.testing.assert_allclose([each.score for each in found], [0.8, 0.9, 0.5])
    by_group = list(segments(made(has_background=True), by="group"))
    assert [(each.label, each.group) for each in by_group] == [("cat", 0), ("remote", 2)]
    assert [each.label for each in segments(made(has_background=True), background=True)] == [
        "background",
        "cat",
        "remote",
    ]
    with pytest.raises(InputError, match="by must be one of label, group, got 'part'"):
        next(segments(result, by="part"))


# -- polygons --


@given(masks)
def test_polygons_are_the_mask(mask):
    outlines = polygons(mask)
    np.testing.assert_array_equal(filled(outlines, mask.shape), mask)


@given(masks)
def test_polygons_are_the_mask_for_pycocotools(mask):
    from pycocotools import mask as coco

    flat = [[float(value) for point in outline for value in point] for outline in polygons(mask)]
    if flat:
        read = coco.decode(coco.merge(coco.frPyObjects(flat, *mask.shape)))
        np.testing.assert_array_equal(read, mask)


def test_a_part_is_a_polygon_without_needless_points():
    assert polygons(np.ones((3, 4), bool)) == [[(0, 0), (0, 3), (4, 3), (4, 0)]]
    assert polygons(np.zeros((3, 4), bool)) == []
    two = np.array([[1, 0], [0, 1]], bool)  # they touch at a corner
    assert sorted(map(sorted, polygons(two))) == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(1, 1), (1, 2), (2, 1), (2, 2)],
    ]


def test_many_holes_in_a_row():
    mask = np.ones((5, 2001), bool)
    mask[2, 1::2] = False
    [outline] = polygons(mask)
    np.testing.assert_array_equal(filled([outline], mask.shape), mask)


# -- COCO --


@pytest.mark.parametrize("form", ["rle", "polygons"])
@pytest.mark.parametrize("by", ["label", "group"])
def test_coco_reads_the_masks(tmp_path, form, by):
    from pycocotools.coco import COCO

    first, second = made(), made(has_background=True, source=None)
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(to_coco([first, second], form=form, by=by)))
    coco = COCO(str(file))
    assert [coco.imgs[i]["file_name"] for i in (1, 2)] == ["a.jpg", "2.png"]
    assert (coco.imgs[1]["width"], coco.imgs[1]["height"]) == (WIDTH, HEIGHT)
    assert {category["name"]: number for number, category in coco.cats.items()} == {"cat": 1, "couch": 2, "remote": 3}
    assert sorted(coco.anns) == [1, 2, 3, 4, 5]
    for result, image_id in ((first, 1), (second, 2)):
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = result.mask(coco.cats[annotation["category_id"]]["name"])
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width - 1, y + height - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0


def test_coco_results_are_read_by_its_evaluation(tmp_path, result, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(to_coco(result)))
    found.write_text(json.dumps(to_coco_results(result, image_id=1)))
    coco = COCO(str(truth))
    evaluation = COCOeval(coco, coco.loadRes(str(found)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)  # the mean over thresholds
    assert [each["score"] for each in json.loads(found.read_text())] == pytest.approx([0.8, 0.9, 0.5])


def test_numbers_of_categories(result):
    ids = {"cat": 17, "couch": 63, "remote": 75}
    assert [each["category_id"] for each in to_coco_annotations(result, image_id=9, category_ids=ids)] == [17, 63, 75]
    assert [each["id"] for each in to_coco_annotations(result, first_id=40)] == [40, 41, 42]
    with pytest.raises(InputError, match="no number for 'couch': it has those of cat"):
        to_coco_annotations(result, category_ids={"cat": 1})
    with pytest.raises(InputError, match="form must be one of rle, polygons, got 'png'"):
        to_coco(result, form="png")


def test_images_of_one_name_are_told_apart():
    data_set = CocoDataset(form="polygons")
    for source in ("a/x.jpg", "b/x.jpg", None):
        data_set.add(made(source=source))
    assert [image["file_name"] for image in data_set.to_dict()["images"]] == ["x.jpg", "b/x.jpg", "3.png"]


def test_coco_from_the_command_line(tmp_path, monkeypatch, capsys):
    from groupvit_common import cli

    monkeypatch.chdir(tmp_path)
    for name, colour in (("a.png", (220, 30, 30)), ("b.png", (40, 160, 40))):
        Image.new("RGB", (24, 16), colour).save(name)
    command = ["segment", "a.png", "b.png", "missing.png", "--model", "demo", "--labels", "red, grass", "--json"]
    assert cli.main([*command, "--coco", "out/all.json"]) != 0  # an image is missing
    capsys.readouterr()
    written = json.loads((tmp_path / "out" / "all.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["a.png", "b.png"]
    assert sum(each["area"] for each in written["annotations"]) == 2 * 24 * 16
    assert {each["name"] for each in written["categories"]} == {"red", "grass"}
    assert cli.main([*command, "--coco", "all.png"]) != 0
    assert "--coco writes a JSON file, got all.png" in capsys.readouterr().err


# -- supervision --


class _Detections:
    """What `supervision.Detections` takes, checked as it checks it."""

    def __init__(self, xyxy, mask=None, confidence=None, class_id=None, data=None):
        count = len(xyxy)
        assert xyxy.shape == (count, 4)
        assert mask.shape[0] == len(class_id) == count
        assert mask.dtype == bool
        assert all(len(values) == count for values in data.values())
        self.xyxy, self.mask, self.confidence, self.class_id, self.data = xyxy, mask, confidence, class_id, data

    @classmethod
    def empty(cls):
        return None

    def __len__(self):
        return len(self.xyxy)


def _module(**names):
    return type(sys)("stub") if not names else type("stub", (), names)


@pytest.mark.parametrize("which", ["real", "stub"])
def test_supervision(monkeypatch, which):
    if which == "real":
        pytest.importorskip("supervision")
    else:
        monkeypatch.setitem(sys.modules, "supervision", _module(Detections=_Detections))
    result = made(has_background=True)
    detections = to_supervision(result)
    assert len(detections) == 2
    assert detections.class_id.tolist() == [0, 1]
    assert detections.data["class_name"].tolist() == ["cat", "remote"]
    np.testing.assert_allclose(detections.confidence, [0.8, 0.5])
    np.testing.assert_array_equal(detections.mask, [result.mask("cat"), result.mask("remote")])
    for mask, box in zip(detections.mask, detections.xyxy, strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# -- FiftyOne --


def _fiftyone():
    return _module(
        Segmentation=lambda mask: type("Segmentation", (), {"mask": mask}),
        Detection=lambda **fields: type("Detection", (), fields),
        Detections=lambda detections: type("Detections", (), {"detections": detections}),
    )


@pytest.mark.parametrize("which", ["real", "stub"])
def test_fiftyone(monkeypatch, which):
    if which == "real":
        pytest.importorskip("fiftyone")
    else:
        monkeypatch.setitem(sys.modules, "fiftyone", _fiftyone())
    plain, hidden = made(), made(has_background=True)
    label, targets = to_fiftyone(plain)
    assert targets == {1: "cat", 2: "couch", 3: "remote"}
    assert label.mask.dtype == np.uint8
    for value, name in targets.items():
        np.testing.assert_array_equal(label.mask == value, plain.mask(name))
    label, targets = to_fiftyone(hidden)
    assert targets == {1: "cat", 2: "remote"}
    np.testing.assert_array_equal(label.mask, hidden.label_map)

    for detection in to_fiftyone_detections(hidden).detections:
        x, y, width, height = np.multiply(detection.bounding_box, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round().astype(int)
        whole = np.zeros((HEIGHT, WIDTH), bool)
        whole[y : y + height, x : x + width] = detection.mask
        np.testing.assert_array_equal(whole, hidden.mask(detection.label))
        assert detection.confidence == pytest.approx({"cat": 0.8, "remote": 0.5}[detection.label])


# -- Label Studio --


@given(masks)
def test_label_studios_packing(mask):
    values = unpacked(packed(mask)).reshape(*mask.shape, 4)
    np.testing.assert_array_equal(values, np.where(mask, 255, 0)[:, :, None].repeat(4, 2))


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 64, 65, 16384, 16385, 40000])
def test_label_studios_runs_of_every_length(pixels):
    """Around the bounds of its four counters."""
    mask = np.zeros((2, pixels), bool)
    mask[1] = True
    np.testing.assert_array_equal(unpacked(packed(mask))[::4].reshape(mask.shape), np.where(mask, 255, 0))


def test_label_studio():
    result = made(has_background=True)
    regions = json.loads(json.dumps(to_label_studio(result, from_name="brush", to_name="photo")))
    assert [region["value"]["brushlabels"] for region in regions] == [["cat"], ["remote"]]
    assert len({region["id"] for region in regions}) == 2
    for region in regions:
        assert (region["from_name"], region["to_name"], region["type"]) == ("brush", "photo", "brushlabels")
        assert (region["original_width"], region["original_height"], region["image_rotation"]) == (WIDTH, HEIGHT, 0)
        assert region["value"]["format"] == "rle"
        mask = unpacked(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[:, :, 3] > 0
        np.testing.assert_array_equal(mask, result.mask(region["value"]["brushlabels"][0]))


def test_label_studio_reads_it(result):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    for region in to_label_studio(result):
        values = brush.decode_rle(region["value"]["rle"])
        np.testing.assert_array_equal(values, unpacked(region["value"]["rle"]))


# -- all --


@pytest.mark.parametrize(
    "convert",
    [
        to_coco_annotations, to_fiftyone, to_fiftyone_detections, to_label_studio,
        lambda other: to_coco([other], form="polygons"), lambda other: to_coco_results(other, image_id=1),
    ],
)  # fmt: skip
def test_results_of_a_pipeline_are_refused(convert):
    with pytest.raises(InputError, match="takes what a Segmenter returns for an image, a Segmentation, got dict"):
        convert({"score": 0.5, "label": "cat", "mask": None})


@pytest.mark.parametrize(
    ("convert", "package"),
    [
        (to_coco, "pycocotools"),
        (lambda result: CocoDataset(), "pycocotools"),
        (to_supervision, "supervision"),
        (to_fiftyone, "fiftyone"),
        (to_fiftyone_detections, "fiftyone"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, result, convert, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.mask", None)
    with pytest.raises(InputError, match=rf"needs {package}, which is not installed: pip install"):
        convert(result)
