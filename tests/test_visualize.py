"""Colours, overlays and legends."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from groupvit_common import visualize


def entries(count, name="label"):
    return [visualize.Entry(c, f"{name} {i}", f"label {i}", "5%") for i, c in enumerate(visualize.palette(count))]


def test_palette_is_stable_distinct_and_repeats_after_its_end():
    colours = visualize.palette(256)
    np.testing.assert_array_equal(visualize.palette(9), colours[:9])
    assert len({tuple(c) for c in colours.tolist()}) == 256
    np.testing.assert_array_equal(visualize.palette(300)[256:], colours[:44])
    # The colours that most users see must not change between versions: people keep pictures side by side.
    assert [bytes(c).hex() for c in colours[:8].tolist()] == [
        "e69f00", "0a7fc4", "d62f4b", "00a676", "f0e442", "cc79a7", "56b4e9", "780078"]  # fmt: skip


def test_the_first_colours_are_far_apart_for_colour_blind_eyes_too():
    rgb = visualize._linear_rgb(visualize.palette(8))
    for matrix in (np.eye(3), np.array(visualize._DEUTERANOPIA), np.array(visualize._PROTANOPIA)):
        lab = visualize._oklab(np.clip(rgb @ matrix.T, 0, 1))
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(8, 1)]
        # About 0.02 is just noticeable in OKLab.
        assert distance.min() > 0.06


def test_names_of_colours_are_shown_in_their_colour():
    np.testing.assert_array_equal(visualize.label_colours(["cat", "dog"]), visualize.palette(2))
    names = ["cat", "Red", "dog", "blue", *(f"label {i}" for i in range(300))]
    colours = visualize.label_colours(names)
    assert [bytes(c).hex() for c in colours[[1, 3]].tolist()] == ["d62f4b", "0a7fc4"]
    others = np.delete(colours, [1, 3], axis=0)
    np.testing.assert_array_equal(others[:2], visualize.palette(4)[[0, 3]])  # 1 and 2 are that blue and red
    assert not {tuple(c) for c in others.tolist()} & {tuple(c) for c in colours[[1, 3]].tolist()}


def test_overlay_tints_labels_and_leaves_the_background():
    picture = Image.new("RGB", (20, 10), (100, 100, 100))
    index_map = np.zeros((10, 20), np.uint8)
    index_map[:, 10:] = 1
    colours = np.array([[0, 0, 0], [200, 0, 0]], np.uint8)
    drawn = np.asarray(visualize.overlay(picture, index_map, colours, 0.5, skip=0))
    assert (drawn[:, :10] == 100).all()
    np.testing.assert_allclose(drawn[5, 15], [150, 50, 50], atol=1)
    # The outline, one pixel wide here, is stronger.
    assert drawn[5, 10, 0] > 180
    assert drawn[5, 11, 0] == drawn[5, 15, 0]
    np.testing.assert_array_equal(visualize.overlay(picture, index_map, colours, 0.0), picture)
    assert (np.asarray(visualize.overlay(picture, index_map, colours, 1.0))[:, 10:] == [200, 0, 0]).all()


def test_outlines_are_what_lies_near_another_index():
    index_map = np.zeros((9, 9), np.uint8)
    index_map[4, 4] = 1
    edge = visualize.outlines(index_map, 2)
    expected = np.zeros((9, 9), bool)
    expected[4, 2:7] = expected[2:7, 4] = True
    np.testing.assert_array_equal(edge, expected)
    assert not visualize.outlines(np.ones((1, 1), np.uint8), 3).any()
    assert not visualize.outlines(np.ones((2, 300), np.uint8), 3).any()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1, 1), (32, 32), (2000, 20), (20, 2000), (700, 400)])
@pytest.mark.parametrize("count", [1, 3, 80])
def test_legend_neither_covers_nor_scales_the_picture(size, count):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    drawn = visualize.with_legend(picture, entries(count))
    np.testing.assert_array_equal(drawn.crop((0, 0, *size)), picture)
    # Every entry's colour is there, whole: a swatch is at least 11 pixels wide inside its line.
    outside = np.asarray(drawn).astype(int)
    outside[: size[1], : size[0]] = 255
    for entry in entries(count):
        assert (outside == entry.colour).all(axis=-1).sum() >= 11 * 11
    # The last column's text ends before the edge.
    assert (np.asarray(drawn)[:, -3:] == 255).all() or drawn.width == size[0]


def test_what_is_left_uncoloured_has_an_empty_swatch():
    entry = visualize.Entry(None, "background", "label 0")
    drawn = np.asarray(visualize.with_legend(Image.new("RGB", (200, 100)), [entry]))[100:]
    assert drawn[:, :, 0].max() == 255
    assert (drawn[13:26, 13:26].min(axis=(0, 1)) < 40).all()  # its outline
    assert (drawn[15:24, 15:24] == 255).all()


def test_no_entries_no_legend():
    picture = Image.new("RGB", (30, 20))
    assert visualize.with_legend(picture, []) is picture


def test_long_names_are_cut():
    drawn = visualize.with_legend(Image.new("RGB", (100, 100)), entries(1, "word " * 200))
    assert drawn.width < 500


def test_names_that_no_font_can_write(monkeypatch):
    monkeypatch.setattr(visualize, "_SYSTEM_FONTS", ())
    visualize._font_for.cache_clear()
    colour = visualize.palette(1)[0]
    for name, shown in [("cat", "cat"), ("télé", "tele"), ("猫", "label 7"), ("a\nb", "a b")]:
        assert visualize._fit(visualize.Entry(colour, name, "label 7"), 20)[0] == shown
    visualize._font_for.cache_clear()


def test_a_system_font_writes_what_pillows_cannot():
    try:
        ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    text, font = visualize._fit(visualize.Entry(visualize.palette(1)[0], "télé", "label 7"), 20)
    assert text == "télé"
    assert font.getname()[0] != "Aileron"


def test_index_image_keeps_the_indices():
    small = np.arange(200, dtype=np.uint8).reshape(10, 20)
    image = visualize.index_image(small, visualize.palette(200))
    assert image.mode == "P"
    np.testing.assert_array_equal(image, small)
    np.testing.assert_array_equal(image.convert("RGB"), visualize.palette(200)[small])
    large = np.arange(400, dtype=np.uint16).reshape(20, 20)
    np.testing.assert_array_equal(visualize.index_image(large, visualize.palette(400)), large)


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (0.001, "<1%"), (0.236, "24%"), (1, "100%")])
def test_percent(share, text):
    assert visualize.percent(share) == text
