"""Colours."""

import numpy as np

from groupvit_common.drawing.palette import heat_colours, label_colours, linear_oklab, linear_rgb, oklab, palette

# Colour vision without medium- (deuteranopia) and long-wave cones (protanopia), for linear RGB: Machado, Oliveira and
# Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)


def test_the_table_is_what_the_search_finds():
    """Each colour after the seven is the farthest from all before it, for full colour vision and red-green
    blindness."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(grid)
    # Neither near black nor near white (both are part of photos, and white is the legend's paper), nor grey.
    grid = grid[(lab[:, 0] > 0.40) & (lab[:, 0] < 0.92) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.06)]

    def eyes(colours):
        rgb = linear_rgb(colours)
        blind = [linear_oklab(np.clip(rgb @ matrix.T, 0, 1)) for matrix in (DEUTERANOPIA, PROTANOPIA)]
        return [linear_oklab(rgb), *blind]

    all_eyes = eyes(grid)

    def distance(colour):
        full, *blind = [np.linalg.norm(e - c, axis=1) for e, c in zip(all_eyes, eyes(colour[None]), strict=True)]
        return 0.5 * full + 0.5 * np.minimum(*blind)

    expected = palette(256)
    nearest = np.min([distance(colour) for colour in expected[:7]], axis=0)
    for colour in expected[7:]:
        np.testing.assert_array_equal(colour, grid[nearest.argmax()])
        nearest = np.minimum(nearest, distance(colour))


def test_palette_is_stable_distinct_and_repeats_after_its_end():
    colours = palette(256)
    np.testing.assert_array_equal(palette(9), colours[:9])
    assert len({tuple(c) for c in colours.tolist()}) == 256
    np.testing.assert_array_equal(palette(300)[256:], colours[:44])
    # The colours that most users see must not change between versions: people keep pictures side by side.
    assert [bytes(c).hex() for c in colours[:8].tolist()] == [
        "e69f00", "0a7fc4", "d62f4b", "00a676", "f0e442", "cc79a7", "56b4e9", "780078"]  # fmt: skip


def test_the_first_colours_are_far_apart_for_colour_blind_eyes_too():
    rgb = linear_rgb(palette(8))
    for matrix in (np.eye(3), DEUTERANOPIA, PROTANOPIA):
        lab = linear_oklab(np.clip(rgb @ matrix.T, 0, 1))
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(8, 1)]
        # About 0.02 is just noticeable in OKLab.
        assert distance.min() > 0.06


def test_names_of_colours_are_shown_in_their_colour():
    np.testing.assert_array_equal(label_colours(["cat", "dog"]), palette(2))
    names = ["cat", "Red", "dog", "blue", *(f"label {i}" for i in range(300))]
    colours = label_colours(names)
    assert [bytes(c).hex() for c in colours[[1, 3]].tolist()] == ["d62f4b", "0a7fc4"]
    others = np.delete(colours, [1, 3], axis=0)
    np.testing.assert_array_equal(others[:2], palette(4)[[0, 3]])  # 1 and 2 are that blue and red
    assert not {tuple(c) for c in others.tolist()} & {tuple(c) for c in colours[[1, 3]].tolist()}


def test_heat_colours_go_from_dark_to_light():
    lightness = oklab(heat_colours(np.linspace(0, 1, 50)))[:, 0]
    assert (np.diff(lightness) > 0).all()
