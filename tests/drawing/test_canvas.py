"""Overlays, legends, sheets."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from groupvit_common.drawing import canvas
from groupvit_common.drawing.palette import palette
from groupvit_common.errors import InputError

# A colour as one number.
RGB = np.array([1 << 16, 1 << 8, 1])


def entries(count, name="label"):
    return [canvas.Entry(c, f"{name} {i}", f"label {i}", "5%") for i, c in enumerate(palette(count))]


def test_overlay_tints_labels_and_leaves_the_background():
    picture = Image.new("RGB", (20, 10), (100, 100, 100))
    index_map = np.zeros((10, 20), np.uint8)
    index_map[:, 10:] = 1
    colours = np.array([[0, 0, 0], [200, 0, 0]], np.uint8)
    drawn = np.asarray(canvas.overlay(picture, index_map, colours, 0.5, skip=0))
    assert (drawn[:, :10] == 100).all()
    np.testing.assert_allclose(drawn[5, 15], [150, 50, 50], atol=1)
    # The outline, one pixel wide here, is stronger.
    assert drawn[5, 10, 0] > 180
    assert drawn[5, 11, 0] == drawn[5, 15, 0]
    np.testing.assert_array_equal(canvas.overlay(picture, index_map, colours, 0.0), picture)
    assert (np.asarray(canvas.overlay(picture, index_map, colours, 1.0))[:, 10:] == [200, 0, 0]).all()


def test_outlines_are_what_lies_near_another_index():
    index_map = np.zeros((9, 9), np.uint8)
    index_map[4, 4] = 1
    edge = canvas.outlines(index_map, 2)
    expected = np.zeros((9, 9), bool)
    expected[4, 2:7] = expected[2:7, 4] = True
    np.testing.assert_array_equal(edge, expected)
    assert not canvas.outlines(np.ones((1, 1), np.uint8), 3).any()
    assert not canvas.outlines(np.ones((2, 300), np.uint8), 3).any()


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((640, 480), 3),
        ((480, 640), 80),
        ((1, 1), 1),
        ((32, 32), 80),
        ((2000, 20), 80),
        ((20, 2000), 80),
        ((20, 2000), 3),
    ],
)
def test_legend_neither_covers_nor_scales_the_picture(size, count):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    drawn = canvas.with_legend(picture, entries(count))
    np.testing.assert_array_equal(drawn.crop((0, 0, *size)), picture)
    # Every entry's colour is there, whole: a swatch is at least 11 pixels wide inside its line.
    outside = np.array(drawn)
    outside[: size[1], : size[0]] = 255
    numbers, pixels = np.unique(outside @ RGB, return_counts=True)
    pixels_of = dict(zip(numbers.tolist(), pixels.tolist(), strict=True))
    for entry in entries(count):
        assert pixels_of[int(entry.colour @ RGB)] >= 11 * 11
    # The last column's text ends before the edge.
    assert (np.asarray(drawn)[:, -3:] == 255).all() or drawn.width == size[0]


def test_what_is_left_uncoloured_has_an_empty_swatch():
    entry = canvas.Entry(None, "background", "label 0")
    drawn = np.asarray(canvas.with_legend(Image.new("RGB", (200, 100)), [entry]))[100:]
    assert drawn[:, :, 0].max() == 255
    assert (drawn[13:26, 13:26].min(axis=(0, 1)) < 40).all()  # its outline
    assert (drawn[15:24, 15:24] == 255).all()


def test_no_entries_no_legend():
    picture = Image.new("RGB", (30, 20))
    assert canvas.with_legend(picture, []) is picture


def test_long_names_are_cut():
    drawn = canvas.with_legend(Image.new("RGB", (100, 100)), entries(1, "word " * 200))
    assert drawn.width < 500


def test_names_that_no_font_can_write(monkeypatch):
    monkeypatch.setattr(canvas, "_SYSTEM_FONTS", ())
    canvas._font_for.cache_clear()
    colour = palette(1)[0]
    for name, shown in [("cat", "cat"), ("télé", "tele"), ("猫", "label 7"), ("a\nb", "a b")]:
        assert canvas._fit(canvas.Entry(colour, name, "label 7"), 20)[0] == shown
    canvas._font_for.cache_clear()


def test_a_system_font_writes_what_pillows_cannot():
    try:
        ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    text, font = canvas._fit(canvas.Entry(palette(1)[0], "télé", "label 7"), 20)
    assert text == "télé"
    assert font.getname()[0] != "Aileron"


def test_index_image_keeps_the_indices():
    small = np.arange(200, dtype=np.uint8).reshape(10, 20)
    image = canvas.index_image(small, palette(200))
    assert image.mode == "P"
    np.testing.assert_array_equal(image, small)
    np.testing.assert_array_equal(image.convert("RGB"), palette(200)[small])
    large = np.arange(400, dtype=np.uint16).reshape(20, 20)
    np.testing.assert_array_equal(canvas.index_image(large, palette(400)), large)


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (0.001, "<1%"), (0.236, "24%"), (1, "100%")])
def test_percent(share, text):
    assert canvas.percent(share) == text


def test_places_for_names_are_deep_inside():
    index_map = np.zeros((9, 12), np.uint8)
    index_map[:, 7:] = 1
    depths = canvas._depths(index_map)
    assert depths[4, 3] == depths.max() == 3
    assert depths[4, 9] == 2
    assert (depths[[0, -1]] == 0).all()
    assert (depths[:, [0, 6, 7, -1]] == 0).all()
    for shape in ((1, 1), (2, 2), (1, 9), (9, 2)):
        assert not canvas._depths(np.zeros(shape, np.uint8)).any()


def test_contact_sheet_holds_every_picture_small():
    pictures = [(f"picture {i} " + "x" * 300, Image.new("RGB", (400, 200), (i * 20, 255 - i, 7))) for i in range(7)]
    drawn = np.asarray(canvas.contact_sheet(iter(pictures), side=100))
    for _, picture in pictures:
        at = np.argwhere((drawn == picture.getpixel((0, 0))).all(axis=-1))
        assert np.abs(np.ptp(at, axis=0) + 1 - [50, 100]).max() <= 1
    one_row = canvas.contact_sheet(pictures, side=100, columns=9)
    assert one_row.width > 7 * 100 > one_row.height


def test_a_narrow_sheet_of_similarities_cuts_names_and_no_number(monkeypatch):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, at, text, **options: written.append((text, options)))
    similarity = np.stack([np.full((6, 2), value, np.float32) for value in (0.25, 0.5)])
    names = ("green armchair in the garden", "cat")
    canvas.heat_sheet(Image.new("RGB", (20, 60)), names, similarity)
    (long, options), (short, _) = written[:2]
    assert long.startswith("g")
    assert long.endswith("… (at most 0.25)")
    assert options["font"].getlength(long) <= canvas._NARROWEST_CELL
    assert short == "cat (at most 0.50)"


def test_what_cannot_be_a_contact_sheet():
    with pytest.raises(InputError, match="at least one image"):
        canvas.contact_sheet([])
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        canvas.contact_sheet([("a", Image.new("RGB", (9, 9)))], side=0)
