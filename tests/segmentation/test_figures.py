"""Figures of results, of small models in both backends."""

import importlib
import json
import re
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_common import cli
from groupvit_common.cli.terminal import BAD_INPUT
from groupvit_common.drawing import canvas
from groupvit_common.drawing.palette import heat_colours, label_colours, palette
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation import figures
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.segmentation.result import Details, LabelScore, Segmentation
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter
from tests.support.backends import BACKENDS
from tests.support.checkpoints import random_checkpoint

pytestmark = pytest.mark.usefixtures("shared_traces")

# Rounding of float32 through three stages, in a cosine.
FLOAT32 = 1e-5
FLOAT64 = 1e-12
# Pixels at the border of two groups that are as large as each other but for rounding.
TIES = 0.001


# ---- pictures of a result ----


def blocks(size=(60, 40), seed=0):
    """A picture of random blocks; `size` = (width, height)."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def result_of(label_map, labels, has_background=False, group_map=None):
    shares = np.bincount(label_map.ravel(), minlength=len(labels)) / label_map.size
    scores = tuple(LabelScore(n, None, float(s)) for n, s in zip(labels, shares, strict=True))
    group_map = label_map if group_map is None else group_map
    image = Image.new("RGB", label_map.shape[::-1], (100, 100, 100))
    return Segmentation(image, label_map, tuple(labels), scores, group_map, tuple(range(len(labels))), has_background)


@pytest.fixture
def halves():
    """120 x 60 pixels: background on the left, a cat on the right, and a little of a dog in its middle."""
    label_map = np.zeros((60, 120), np.uint8)
    label_map[:, 60:] = 1
    label_map[25:35, 85:95] = 2
    return result_of(label_map, ["background", "cat", "dog"], has_background=True)


def test_pictures_of_labels(halves):
    cat, dog = label_colours(["cat", "dog"])
    assert figures.show(halves, "input") is halves.image
    drawn = np.asarray(figures.show(halves, "pred"))
    for y, x, colour in ((10, 10, (0, 0, 0)), (10, 110, cat), (30, 90, dog)):
        np.testing.assert_array_equal(drawn[y, x], colour)
    tinted = np.asarray(figures.show(halves, "input_pred"))
    assert tinted.shape == (60, 120, 3)
    np.testing.assert_array_equal(tinted, halves.overlay(legend=False))
    np.testing.assert_array_equal(tinted[10, 10], [100, 100, 100])
    np.testing.assert_allclose(tinted[10, 110], (cat.astype(int) + 100) / 2, atol=1)


def test_names_stand_on_their_regions(halves):
    plain, drawn = (np.asarray(figures.show(halves, mode)) for mode in ("input_pred", "input_pred_label"))
    assert drawn.shape == plain.shape
    changed = (plain != drawn).any(axis=-1)
    # The background has no name, and the names keep clear of each other: two tags, each with its label's colour.
    assert not changed[:, :50].any()
    for colour in label_colours(["cat", "dog"]):
        assert (drawn[changed] == colour).all(axis=-1).sum() > 50


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (500, 2)])
def test_pictures_of_any_size(size):
    label_map = np.zeros(size, np.uint8)
    label_map[size[0] // 2 :] = 1
    result = result_of(label_map, ["a cat with a long name", "dog"])
    details = Details((label_map, label_map), result.labels, np.zeros((2, 2, 2), np.float32))
    for mode in figures.FIGURES:
        drawn = figures.show(result, mode, details)
        if mode not in ("all_groups", "similarity"):
            assert drawn.size == result.image.size
    assert figures.thumbnail(result, 64).width > 0


def test_pictures_of_groups(halves):
    first = np.zeros((60, 120), np.uint8)
    first[30:] = 5
    details = Details((first, halves.group_map), ("cat", "dog"), np.zeros((2, 6, 12), np.float32))
    colours = palette(6).astype(int)
    drawn = np.asarray(figures.show(halves, "first_group", details))
    for y, group in ((10, 0), (50, 5)):
        np.testing.assert_allclose(drawn[y, 20], 0.6 * colours[group] + 40, atol=1)
    final = np.asarray(figures.show(halves, "final_group"))
    for x, group in ((20, 0), (110, 1)):
        np.testing.assert_allclose(final[10, x], 0.6 * colours[group] + 40, atol=1)
    both = np.asarray(figures.show(halves, "all_groups", details))
    width = both.shape[1]
    assert any((both[y : y + 60, x : x + 120] == drawn).all() for y in range(30, 70) for x in (18,))
    assert any((both[y : y + 60, x : x + 120] == final).all() for y in range(30, 70) for x in range(150, width - 120))


def test_heat_maps_share_one_scale():
    values = np.zeros((2, 4, 6), np.float32)
    values[0, :, 3:] = 1.0
    values[1] = 0.5
    image = Image.new("RGB", (60, 40), (128, 128, 128))
    drawn = np.asarray(canvas.heat_map(image, values[0], 0.0, 1.0, alpha=1.0))
    np.testing.assert_array_equal(drawn[20, 2], heat_colours(np.array(0.0)))
    np.testing.assert_array_equal(drawn[20, 57], heat_colours(np.array(1.0)))
    # A picture alike everywhere is no fault.
    assert canvas.heat_map(image, values[1], 0.5, 0.5).size == image.size
    label_map = np.zeros((40, 60), np.uint8)
    sheet = np.asarray(
        figures.show(result_of(label_map, ["a", "b"]), "similarity", Details((label_map,), ("a", "b"), values))
    )
    grey = np.round(0.3 * 100 + 0.7 * heat_colours(np.array([0.0, 0.5, 1.0])))
    for colour in grey:
        assert (np.abs(sheet.astype(int) - colour).max(axis=-1) <= 1).any()


def test_drawing_is_found_where_programs_took_it_from():
    """Earlier versions had one module `groupvit_common.visualize`."""
    visualize = importlib.import_module("groupvit_common.visualize")
    assert visualize.show is figures.show
    assert visualize.contact_sheet is canvas.contact_sheet
    assert visualize.palette is palette
    with pytest.raises(AttributeError, match="no attribute 'palettes'"):
        visualize.palettes  # noqa: B018


def test_what_cannot_be_shown(halves):
    with pytest.raises(InputError, match="unknown figure 'seg'"):
        figures.show(halves, "seg")
    with pytest.raises(InputError, match="give details"):
        figures.show(halves, "first_group")
    other = Details((np.zeros((4, 6), np.uint8),), ("cat",), np.zeros((1, 4, 6), np.float32))
    with pytest.raises(InputError, match="an image of 6 x 4 pixels, but the result is of 120 x 60"):
        figures.show(halves, "similarity", other)


def test_two_results_side_by_side(halves):
    label_map = halves.label_map.copy()
    label_map[:6, :12] = 1
    drawn = np.asarray(figures.compare(halves, result_of(label_map, halves.labels, True), ("torch", "tf")))
    red = (drawn == canvas.DIFFERENT).all(axis=-1)
    rows, columns = np.nonzero(red)
    assert red.sum() == 72
    assert (np.ptp(rows), np.ptp(columns)) == (5, 11)
    same = np.asarray(figures.compare(halves, halves))
    assert not (same == canvas.DIFFERENT).all(axis=-1).any()
    assert figures._percent(np.zeros((2, 2), bool)) == "none"
    assert figures._percent(np.arange(20000) == 3) == "<0.01%"
    with pytest.raises(InputError, match="other labels"):
        figures.compare(halves, replace(halves, labels=("background", "cat", "cow")))
    with pytest.raises(InputError, match="120 x 60 and 3 x 2 pixels"):
        figures.compare(halves, result_of(np.zeros((2, 3), np.uint8), halves.labels))


# ---- what the models see ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two grouping blocks with different numbers of groups."""
    return random_checkpoint(tmp_path_factory.mktemp("figures") / "model", 1, groups=(12, 6))


@lru_cache
def base_of(name, checkpoint, dtype) -> BaseSegmenter:
    predictor = importlib.import_module(f"groupvit_{name}.predictor")
    return predictor.Segmenter.from_pretrained(checkpoint, device="cpu", dtype=dtype)


def segmenter_of(name, checkpoint, dtype="float32", **options) -> BaseSegmenter:
    base = base_of(name, checkpoint, dtype)
    return type(base)(base.model, base.processor, labels="cat, couch, dog", **options)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def name(request):
    return request.param


@pytest.mark.parametrize("windows", [{}, {"window": 16, "stride": 12, "shorter_side": 32}], ids=["whole", "windows"])
def test_details_say_what_the_result_says(name, checkpoint, windows):
    segmenter = segmenter_of(name, checkpoint, assignment="soft", **windows)
    image = blocks()
    result, details = segmenter(image), segmenter.details(image)
    assert details.labels == ("cat", "couch", "dog")
    assert len(details.group_maps) == 2
    for group_map in details.group_maps:
        assert group_map.shape == (40, 60)
        assert len(np.unique(group_map)) > 1
    first, final = details.group_maps
    assert len(np.unique(first)) > len(np.unique(final))
    assert (final != result.group_map).mean() <= TIES
    assert details.similarity.shape == (3, 32, 48)
    assert np.abs(details.similarity).max() <= 1


def test_first_groups_and_similarities_by_hand(checkpoint):
    segmenter = segmenter_of("torch", checkpoint)
    image = blocks()
    details = segmenter.details(image)
    with torch.no_grad():
        pixels = torch.from_numpy(segmenter.prepare(image)[None])
        vision = segmenter.model.vision_model(pixels, output_attentions=True)
        groups = segmenter.model.visual_projection(vision.last_hidden_state[0])
        maps = torch.nn.functional.interpolate(
            vision.attentions[0].reshape(1, 12, 8, 12).double(), (40, 60), mode="bilinear"
        )[0].numpy()
        texts = segmenter.processor.tokenizer(["a photo of a couch."], return_tensors="pt")
        cosine = torch.nn.functional.cosine_similarity(groups, segmenter.model.get_text_features(**texts)).double()
        shares = (vision.attentions[1] @ vision.attentions[0])[0].double()
        couch = torch.nn.functional.interpolate((cosine @ shares).reshape(1, 1, 8, 12), (32, 48), mode="bilinear")[0, 0]
    taken = np.take_along_axis(maps, details.group_maps[0][None].astype(np.int64), axis=0)[0]
    assert (taken >= maps.max(axis=0) - FLOAT32).all()
    np.testing.assert_allclose(details.similarity[1], couch.numpy(), rtol=0, atol=FLOAT32)


def test_both_backends_see_the_same(checkpoint):
    for options in ({}, {"window": 16, "shorter_side": 32}):
        one, other = (
            segmenter_of(each, checkpoint, dtype="float64", **options).details(blocks()) for each in sorted(BACKENDS)
        )
        assert len(one.group_maps) == len(other.group_maps) == 2
        for a, b in zip(one.group_maps, other.group_maps, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(one.similarity, other.similarity, rtol=0, atol=FLOAT64)


def test_details_need_labels(checkpoint):
    segmenter = importlib.import_module("groupvit_torch.predictor").Segmenter.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(InputError, match="there are no labels"):
        segmenter.details(blocks())


# ---- the command ----


def test_segment_writes_the_pictures_asked_for(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks(seed=0).save("p0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: stored a quarter turn to the left
    blocks(seed=1).transpose(Image.Transpose.ROTATE_90).save("p1.png", exif=exif)
    base = ["segment", "p0.png", "p1.png", "--model", str(checkpoint), "--labels", "cat, dog", "--device", "cpu"]
    assert cli.main([*base, "--show", " similarity,pred ,first_group,pred", "--sheet", "--out", "out"]) == 0
    written = {file.name for file in (tmp_path / "out").iterdir()}
    usual = {"overlay.png", "labels.png", "segmentation.json"}
    kinds = {f"p{i}_{end}" for i in range(2) for end in {*usual, "similarity.png", "pred.png", "first_group.png"}}
    assert written == kinds | {"contact_sheet.png"}
    segmenter = segmenter_of("torch", checkpoint)
    segmenter.set_labels("cat, dog")
    result, details = segmenter(blocks(seed=1)), segmenter.details(blocks(seed=1))
    for mode in ("pred", "first_group", "similarity"):
        with Image.open(f"out/p1_{mode}.png") as picture:
            np.testing.assert_array_equal(picture, figures.show(result, mode, details))
    capsys.readouterr()

    for arguments, message in (
        (["--show", "pred,groups"], "--show knows no 'groups': it must be among input, pred"),
        (["--sheet", "--json"], "with --json they need --out DIR"),
    ):
        assert cli.main([*base, *arguments]) == BAD_INPUT
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("always:left out")
def test_a_picture_that_was_given_is_not_replaced(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks().save("p.png")
    blocks(seed=1).save("p_pred.png")
    base = ["segment", ".", "--model", str(checkpoint), "--labels", "cat, dog", "--device", "cpu", "--out", "."]
    assert cli.main([*base, "--show", "pred"]) == 0
    np.testing.assert_array_equal(Image.open("p_pred.png"), blocks(seed=1))
    assert (tmp_path / "p-2_pred.png").is_file()
    blocks().save("contact_sheet.png")
    assert cli.main([*base, "--sheet"]) == BAD_INPUT
    told = capsys.readouterr().err
    assert "left out in the folder .: 6 results of an earlier run" in told
    assert "contact_sheet.png is among the images" in told


def test_compare_shows_where_two_results_differ(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks().save("p.png")
    other = tmp_path / "other"
    model = GroupViTModel.from_pretrained(checkpoint)
    with torch.no_grad():
        model.visual_projection[-1].weight.mul_(-1)
    model.save_pretrained(other)
    GroupViTProcessor.from_pretrained(checkpoint).save_pretrained(other)
    base = ["compare", "p.png", "--labels", "cat, dog", "--model", str(checkpoint), "--device", "cpu", "--out", "out"]
    assert cli.main([*base, "--other", str(other), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    results = [
        Segmenter.from_pretrained(each, device="cpu", labels="cat, dog")("p.png") for each in (checkpoint, other)
    ]
    different = results[0].label_map != results[1].label_map
    assert record["different"] == different.mean() > 0
    with Image.open(record["files"]["compare"]) as drawn:
        assert (np.asarray(drawn) == canvas.DIFFERENT).all(axis=-1).sum() == different.sum()

    assert cli.main([*base, "--backend", "torch", "--other-backend", "tf"]) == 0
    assert re.search(r"p.png: 0\.\d+% of the pixels differ -> out.p_compare.png", capsys.readouterr().out)
    assert cli.main(base) == BAD_INPUT
    assert "name a second model with --other" in capsys.readouterr().err
