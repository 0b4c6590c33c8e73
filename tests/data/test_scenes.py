"""Scenes: the same for ever from a seed, true to their captions, learnable, and masks apart from what training sees."""

from collections import Counter

import numpy as np
import pytest

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import InputError

SCENES = [(level, index) for level in LEVELS for index in range(20)]


@pytest.mark.parametrize("level", list(LEVELS))
def test_a_scene_is_a_pure_function_of_seed_index_level_and_size(level):
    first, second = make_scene(3, 5, level), make_scene(3, 5, level)
    assert first.caption == second.caption
    assert (first.image == second.image).all()
    assert (first.mask == second.mask).all()
    for other in (make_scene(4, 5, level), make_scene(3, 6, level)):
        assert (other.image != first.image).any()


@pytest.mark.parametrize(("level", "index"), SCENES)
def test_the_caption_names_what_the_mask_holds_and_the_background(level, index):
    scene = make_scene(11, index, level)
    classes = LEVELS[level]
    shown = sorted(set(np.unique(scene.mask).tolist()) - {0})
    *objects, ground = scene.nouns
    assert 2 <= len(objects) <= 4
    assert shown == sorted(1 + next(k for k, names in enumerate(classes) if name in names) for name in objects)
    assert ground in BACKGROUNDS[scene.background]
    words = scene.caption.replace(",", "").split()
    assert all(noun in words for noun in scene.nouns)


@pytest.mark.parametrize("level", list(LEVELS))
def test_scenes_of_one_thing(level):
    """Close-ups and single objects: as many as asked for, their captions name what is seen and nothing else."""
    kinds = Counter()
    for index in range(200):
        scene = make_scene(12, index, level, single_share=0.3, close_up_share=0.4)
        classes, shown = LEVELS[level], np.unique(scene.mask).tolist()
        seen = {name for value in shown if value for name in classes[value - 1]}
        if 0 in shown:
            seen |= set(BACKGROUNDS[scene.background])
        assert len(scene.nouns) == len(shown)
        assert set(scene.nouns) <= seen
        assert all(noun in scene.caption.replace(",", "").split() for noun in scene.nouns)
        close_up = scene.caption.startswith("a close-up of ")
        kinds["close-up" if close_up else "single" if len(shown) == 2 else "usual"] += 1
        kinds["full"] += shown not in ([0], [0, *shown[1:]])
        if close_up:
            assert len(shown) == 1 or level == 3
    # Binomial, 200 draws: within four standard deviations.
    assert abs(kinds["close-up"] - 80) < 28
    assert abs(kinds["single"] - 60) < 26
    assert (kinds["full"] > 0) == (level != 3)


def test_shares_leave_the_usual_sequence_as_it_is():
    usual = make_scene(3, 5, 2)
    assert make_scene(3, 5, 2, single_share=0.0, close_up_share=0.0).image.tobytes() == usual.image.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (48, 48), (96, 144), (120, 56)])
def test_any_size_and_objects_stay_as_large(size):
    for level in LEVELS:
        for index in range(5):
            scene = make_scene(2, index, level, size)
            assert scene.image.shape == (*size, 3)
            assert scene.image.dtype == scene.mask.dtype == np.uint8
            assert scene.mask.shape == size
            for value in set(np.unique(scene.mask).tolist()) - {0}:
                rows, columns = np.nonzero(scene.mask == value)
                # A radius of at most 17 pixels, and corners that stick out by less than a third. The smallest shape,
                # the bar, has 1.5 squared radii; in the smallest image a crowd shrinks the radius from 11.5 to about 8
                # (96 pixels), and of 720 scenes no object had fewer than 84. A clipped or hidden object has less.
                assert len(rows) > 80
                assert max(np.ptp(rows), np.ptp(columns)) < 46


def test_colours_are_what_their_names_say():
    """Level 1: the mean colour of each class lies nearest to its own class's mean over other scenes."""
    means = []
    for seed in (0, 1):
        sums, counts = np.zeros((9, 3)), np.zeros(9)
        for index in range(60):
            scene = make_scene(seed, index, 1)
            for value in range(1, 9):
                sums[value] += scene.image[scene.mask == value].sum(axis=0)
                counts[value] += (scene.mask == value).sum()
        means.append(sums[1:] / counts[1:, None])
    distance = np.linalg.norm(means[0][:, None] - means[1][None], axis=-1)
    assert (distance.argmin(axis=1) == np.arange(8)).all()


def test_levels_two_and_three_say_nothing_by_colour():
    """The mean colour of a class over many scenes is about the mean of all objects: colour does not give it away."""
    for level in (2, 3):
        values = {k + 1: [] for k in range(len(LEVELS[level]))}
        for index in range(120):
            scene = make_scene(0, index, level)
            for value in set(np.unique(scene.mask).tolist()) - {0}:
                values[value].append(scene.image[scene.mask == value].mean(axis=0))
        means = np.array([np.mean(v, axis=0) for v in values.values()])
        spread = np.concatenate(list(values.values())).std(axis=0)
        # Far below the spread between single objects (20 to 60 grey levels): about 0.15 of it is left by chance.
        assert (np.abs(means - means.mean(axis=0)) < 0.5 * spread).all()


def test_names_are_unique_across_the_words_of_a_level_and_the_backgrounds():
    for classes in LEVELS.values():
        words = [word for names in (*classes, *BACKGROUNDS) for word in names]
        assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("arguments", "shares", "message"),
    [
        ((0, 0, 4), {}, "level 4 does not exist"),
        ((-1, 0, 1), {}, "must not be negative"),
        ((0, 0, 1, (32, 64)), {}, "at least 48 x 48"),
        ((0, 0, 1), {"single_share": 0.6, "close_up_share": 0.5}, "nor exceed 1 together, got 0.6 and 0.5"),
        ((0, 0, 1), {"single_share": -0.1}, "must not be negative"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, shares, message):
    with pytest.raises(InputError, match=message):
        make_scene(*arguments, **shares)
