"""The record of a segmented image, and its files."""

import json

import numpy as np
import pytest
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.image_files import images_in
from groupvit_common.segmentation.label_maps import PixelLabels, View, pixel_labels
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.result import segmentation


@pytest.fixture
def result():
    """A segmentation of a 12 x 8 image (width x height), two labels and a background named by a word."""
    affinity = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    grouping = np.zeros((3, 1, 3))
    grouping[[0, 1, 2], 0, [0, 1, 2]] = 1
    hidden = [False, True, False]
    view = View(affinity[None], grouping[None])
    pixels = pixel_labels([view], np.zeros((3, 8, 12)), (8, 12), SegmentationOptions(), hidden)
    return segmentation(
        Image.new("RGB", (12, 8), "grey"),
        pixels,
        ["cat", "sky", "sofa"],
        [0.5, 0.3, 0.2],
        is_background=hidden,
        threshold=None,
        source="photos/my photo.jpg",
    )


def test_record(result):
    assert result.labels == ("background", "cat", "sofa")
    assert [(s.name, s.probability) for s in result.scores] == [("background", 0.3), ("cat", 0.5), ("sofa", 0.2)]
    assert [round(12 * s.pixel_share) for s in result.scores] == [4, 4, 4]
    assert result.group_labels == (1, 0, 2)
    np.testing.assert_array_equal(result.label_map[0], np.repeat([1, 0, 2], 4))
    np.testing.assert_array_equal(result.mask("sofa"), result.label_map == 2)
    with pytest.raises(InputError, match="background, cat, sofa"):
        result.mask("dog")


def test_record_as_json(result):
    record = json.loads(json.dumps(result.to_dict()))
    assert record["size"] == {"width": 12, "height": 8}
    assert record["labels"][1] == {"index": 1, "name": "cat", "probability": 0.5, "pixel_share": pytest.approx(1 / 3)}
    assert record["groups"] == ["cat", "background", "sofa"]


def test_save_to_a_folder(result, tmp_path):
    paths = result.save(tmp_path / "new" / "folder", groups=True)
    assert {kind: p.name for kind, p in paths.items()} == {
        "overlay": "my photo_overlay.png",
        "labels": "my photo_labels.png",
        "record": "my photo_segmentation.json",
        "groups": "my photo_groups.png",
    }
    with Image.open(paths["labels"]) as labels:
        assert labels.mode == "P"
        np.testing.assert_array_equal(np.asarray(labels), result.label_map)
    with Image.open(paths["overlay"]) as overlay:
        assert overlay.height > 8  # the legend
    assert json.loads(paths["record"].read_text(encoding="utf-8")) == result.to_dict()


def test_save_to_a_file(result, tmp_path):
    paths = result.save(tmp_path / "cat.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.jpg", "cat_labels.png", "cat_segmentation.json"]
    assert paths["overlay"] == tmp_path / "cat.jpg"


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp"])
def test_results_are_not_taken_for_images(result, tmp_path, name):
    result.image.save(tmp_path / name)
    result.save(tmp_path / f"result-{name}")
    with pytest.warns(UserWarning, match="2 results of an earlier run"):
        assert [path.name for path in images_in(tmp_path)] == [name]


def test_save_where_one_cannot_write(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        result.save(tmp_path / "file" / "folder")


def test_label_map_of_sixteen_bits_is_saved_exactly(tmp_path):
    names = [f"label {i}" for i in range(400)]
    label_map = np.random.default_rng(0).integers(0, 400, (30, 20), dtype=np.uint16)
    pixels = PixelLabels(label_map, np.zeros((30, 20), np.uint8), np.zeros(1, np.int64))
    image = Image.new("RGB", (20, 30))
    result = segmentation(image, pixels, names, [1 / 400] * 400, is_background=[False] * 400, threshold=None)
    with Image.open(result.save(tmp_path)["labels"]) as labels:
        np.testing.assert_array_equal(np.asarray(labels), result.label_map)
