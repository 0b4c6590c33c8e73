"""Options for better masks: looks in several sizes and mirrored, refinement, foreground against background; in both
backends."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks import mask_options
from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import InputError
from groupvit_common.evaluation.protocols import protocol_settings
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation import refinement
from tests.support.backends import BACKENDS
from tests.support.checkpoints import random_checkpoint

pytestmark = pytest.mark.usefixtures("shared_traces")

LABELS, GROUNDS = ["cat", "couch, sofa", "dog"], ["remote control", "photo"]
# Batches of other sizes multiply their matrices in another order, in float32; scores lie in 0..1. What is nearer than
# this is a tie.
TIE = 1e-5
TIED = 1e-3  # of the pixels: one or two
# Bicubic resizing of a mirrored picture may round a level of 256 otherwise, and hard groups then change at their
# borders.
MIRRORED = 0.99


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("masks") / "model", seed=3)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def make(request, checkpoint):
    """A segmenter of each backend, with options."""
    base = importlib.import_module(f"groupvit_{request.param}.predictor").Segmenter.from_pretrained(
        checkpoint, device="cpu"
    )

    def made(**options):
        return type(base)(
            base.model,
            base.processor,
            **{"labels": LABELS, "background_labels": GROUNDS, "temperature": 0.2, **options},
        )

    return made


def picture(seed=0, size=(60, 40)):
    """A PIL image of random blocks; `size` = (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def resized(maps, size):
    return F.interpolate(torch.from_numpy(np.ascontiguousarray(maps, np.float64))[None], size, mode="bilinear")[
        0
    ].numpy()


def agree(label_map, scores, values):
    """Whether a label map is where the scores `[C, H, W]` of the channels' `values` are largest, ties aside."""
    second, first = np.sort(scores, axis=0)[-2:]
    clear = first - second > TIE
    assert clear.mean() > 0.98
    assert len(np.unique(scores.argmax(axis=0))) > 1
    np.testing.assert_array_equal(label_map[clear], np.asarray(values)[scores.argmax(axis=0)][clear])


PLAIN = {"window": None}
WINDOWS = {"window": 16, "stride": 8}


@pytest.mark.parametrize(
    ("options", "flip", "scales"),
    [
        (PLAIN, False, (0.75, 1.0, 1.5)),
        (WINDOWS, True, (1.25, 1.0)),
        ({**PLAIN, "assignment": "soft", "background": 0.15}, True, (1.25, 2.0)),
        ({**WINDOWS, "top_k": 2, "background": 0.15}, True, (1.0,)),
    ],
)
def test_scores_are_the_mean_over_looks(make, options, flip, scales):
    image = picture()
    nearest = min(scales, key=lambda scale: abs(np.log(scale)))
    first = make(**options, shorter_side=round(32 * nearest))
    side = first.prepare(image).shape[1:]
    total, count = 0, 0
    for scale in scales:
        segmenter = make(**options, shorter_side=round(32 * scale))
        pixels = segmenter.prepare(image)
        for mirrored in (False, True) if flip else (False,):
            seen = np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels
            scores = segmenter.pixel_scores(seen, side)
            total, count = total + (scores[:, :, ::-1] if mirrored else scores), count + 1
    result = make(**options, flip=flip, scales=scales)(image)
    values = [1, 2, 3, 0, 0]
    values = [0, *values] if "background" in options else values
    agree(result.label_map, resized(total / count, (40, 60)), values)

    plain = first(image)
    # A picture's groups are made in strips of rows for one look and in windows for several: rounding apart.
    assert (result.group_map == plain.group_map).mean() > 0.999
    assert result.group_labels == plain.group_labels
    assert sum(score.probability for score in result.scores) == pytest.approx(1, abs=TIE)


def test_with_flip_a_mirrored_picture_has_the_mirrored_map(make):
    segmenter = make(flip=True, assignment="soft")
    one = segmenter(picture()).label_map
    other = segmenter(Image.fromarray(np.asarray(picture())[:, ::-1].copy())).label_map
    assert (other[:, ::-1] == one).mean() > MIRRORED


def test_one_look_in_another_size_is_that_size(make):
    one, other = make(scales=(2.0,))(picture()), make(shorter_side=64)(picture())
    np.testing.assert_array_equal(one.label_map, other.label_map)
    np.testing.assert_array_equal(one.group_map, other.group_map)


@pytest.mark.parametrize("options", [PLAIN, {**WINDOWS, "assignment": "soft", "background": 0.15}])
def test_refined_scores_make_the_map(make, options):
    segmenter = make(**options, refine=4, refine_dilations=(1, 3))
    pixels = segmenter.prepare(picture())
    scores = refinement.refine(segmenter.pixel_scores(pixels), pixels, 4, (1, 3))
    values = [0, 1, 2, 3, 0, 0] if "background" in options else [1, 2, 3, 0, 0]
    expected = resized(scores, (40, 60))
    agree(segmenter(picture()).label_map, expected, values)
    agree(segmenter.pixel_labels(pixels, (40, 60)).label_map, expected, values)
    assert (make(**options)(picture()).label_map != segmenter(picture()).label_map).any()


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("options", [PLAIN, {**WINDOWS, "assignment": "soft", "background": 0.15}])
def test_foreground_is_a_share_of_all_scores(make, options, share):
    segmenter = make(**options, foreground=share)
    pixels = segmenter.prepare(picture())
    scores = resized(segmenter.pixel_scores(pixels), (40, 60))
    words = scores[1:] if "background" in options else scores
    enough = words[:3].sum(axis=0) - share * scores.sum(axis=0)
    second, first = np.sort(words[:3], axis=0)[-2:]
    clear = (np.abs(enough) > TIE) & (first - second > TIE)
    assert clear.mean() > 0.9 or share == 0
    result = segmenter(picture())
    expected = np.where(enough >= 0, 1 + words[:3].argmax(axis=0), 0)
    np.testing.assert_array_equal(result.label_map[clear], expected[clear])
    assert result.mask("background").all() == (share == 1)
    if options is PLAIN:
        # With hard groups a pixel has what its group is called, but for pixels between two groups.
        named = np.asarray(result.group_labels)[result.group_map]
        assert (named == result.label_map).mean() > 0.9


def test_foreground_needs_both_sides(make):
    for labels, grounds, background in [("cat, dog", (), None), ("cat", "cat", None)]:
        with pytest.raises(InputError, match="foreground weighs labels against a background"):
            make(labels=labels, background_labels=grounds, background=background, foreground=0.5)
    make(labels="cat, dog", background_labels=(), background=0.9, foreground=0.5)(picture())


def test_maps_for_several_thresholds_are_those_of_segmenters_with_them(make):
    options = {"flip": True, "scales": (1.0, 1.5), "refine": 2, "foreground": 0.3}
    thresholds = [None, 0.2, 0.4]
    for threshold, label_map in zip(thresholds, make(**options).threshold_maps(picture(), thresholds), strict=True):
        assert (label_map != make(**options, background=threshold)(picture()).label_map).mean() <= TIED


@pytest.mark.parametrize("options", [PLAIN, WINDOWS])
def test_pictures_together_are_the_pictures_one_by_one(make, options):
    segmenter = make(**options, flip=True, scales=(0.25, 1.0), refine=1, batch_size=3, assignment="soft")
    pictures = [picture(i, size) for i, size in enumerate([(60, 40), (40, 60), (60, 40)])]
    for result, image in zip(segmenter(pictures), pictures, strict=True):
        alone = segmenter(image)
        assert result.label_map.shape == (image.height, image.width)
        assert (result.label_map == alone.label_map).mean() > 0.999
        for one, other in zip(result.scores, alone.scores, strict=True):
            assert one.probability == pytest.approx(other.probability, abs=TIE)


WORDS = ["cat", 'couch, sofa, "a couch and a sofa of the photo"', "dog"]


def test_the_most_similar_word_of_a_label_counts(make):
    segmenter = make(labels=WORDS, background_labels=(), synonyms="max", templates="seven")
    every = make(labels="cat, couch, sofa, dog", background_labels=(), templates="seven")
    alone = make(labels=["a couch and a sofa of the photo"], background_labels=(), templates="{}")
    embeds = np.concatenate([every._labelled().embeds, alone._labelled().embeds])
    assert segmenter._labelled().embeds.shape == (3, 3, 16)
    np.testing.assert_allclose(segmenter._labelled().embeds[1], embeds[[1, 2, 4]], rtol=0, atol=TIE)
    for word in range(3):
        np.testing.assert_allclose(segmenter._labelled().embeds[[0, 2], word], embeds[[0, 3]], rtol=0, atol=TIE)

    # Asked one by one, a word is as similar to the picture as its label says at most.
    every.set_labels("a, b, c, d, e", embeddings=embeds)
    each = np.log([*every.classify(picture()).values()])
    whole = np.log([*segmenter.classify(picture()).values()])
    largest = np.array([each[0], max(each[1], each[2], each[4]), each[3]])
    np.testing.assert_allclose(whole - whole[0], largest - largest[0], rtol=0, atol=10 * TIE)

    result, details = segmenter(picture()), segmenter.details(picture())
    assert result.labels == ("cat", "couch", "dog")
    assert details.similarity.shape == (3, 32, 48)
    given = make(labels=None, background_labels=())
    given.set_labels(["cat", "couch", "dog"], embeddings=segmenter._labelled().embeds)
    assert (given(picture()).label_map != result.label_map).mean() <= TIED
    segmenter.set_labels("dog, cat")
    assert segmenter._labelled().embeds.shape == (2, 16)


def test_a_definition_has_the_voice_of_a_word(make):
    parts = make(labels=WORDS, background_labels=(), templates="{}", synonyms="max")._labelled().embeds[1]
    mean = make(labels=WORDS, background_labels=(), templates="{}")._labelled().embeds[1]
    np.testing.assert_allclose(mean, parts.sum(axis=0) / np.linalg.norm(parts.sum(axis=0)), rtol=0, atol=TIE)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scales": ()}, "scales must be different numbers above 0"),
        ({"scales": (1.0, 0.0)}, "scales must be different numbers above 0"),
        ({"scales": (1.0, 1.0)}, "scales must be different numbers above 0"),
        ({"scales": (float("nan"),)}, "scales must be different numbers above 0"),
        ({"synonyms": "least"}, "synonyms must be"),
        ({"refine": -1}, "refine must be a whole number of at least 0"),
        ({"refine_dilations": (0,)}, "refine_dilations must be different whole numbers"),
        ({"foreground": 1.5}, "foreground must be a number between 0 and 1"),
        # Other types.
        ({"scales": 1.5}, "scales must be .* got 1.5"),
        ({"scales": "0.75,1"}, "scales must be .* got '0.75,1'"),
        ({"scales": [1, None]}, r"scales must be .* got \[1, None\]"),
        ({"scales": np.ones((1, 1))}, "scales must be"),
        ({"refine": 2.5}, "refine must be .* got 2.5"),
        ({"refine": "3"}, "refine must be .* got '3'"),
        ({"refine": None}, "refine must be .* got None"),
        ({"refine_dilations": 4}, "refine_dilations must be .* got 4"),
        ({"refine_dilations": (1.5,)}, r"refine_dilations must be .* got \(1.5,\)"),
        ({"foreground": "0.8"}, "foreground must be .* got '0.8'"),
        ({"flip": "no"}, "flip must be True or False, got 'no'"),
        ({"normalize_prompts": None}, "normalize_prompts must be True or False, got None"),
        ({"templates": None}, "templates must be .* got None"),
        ({"labels": {"cat": None}}, "what else 'cat' is called"),
        ({"labels": 5}, "labels must be text"),
        ({"background": "0.9"}, "background must be .* got '0.9'"),
        ({"temperature": None}, "temperature must be a number above 0, got None"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"window": "16"}, "window must be a whole number .* got '16'"),
        ({"window": 16, "stride": 4.0}, "stride must be a whole number of at least 1, got 4.0"),
    ],
)
def test_arguments_that_cannot_be_used(make, bad, message):
    with pytest.raises(InputError, match=message):
        make(**bad)


def test_numbers_from_numpy(make):
    options = {"scales": np.array([1, 1.5], np.float32), "refine": np.int64(2), "refine_dilations": np.array([1, 2])}
    segmenter = make(**options, flip=np.True_, foreground=np.float32(0.3))
    assert (segmenter.scales, segmenter.refine, segmenter.refine_dilations) == ((1.0, 1.5), 2, (1, 2))
    plain = make(scales=(1.0, 1.5), refine=2, refine_dilations=(1, 2), flip=True, foreground=float(np.float32(0.3)))
    assert (segmenter(picture()).label_map != plain(picture()).label_map).mean() <= TIED


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scales": (1.0, 1.25), "foreground": 0.8}, marks=pytest.mark.slow),  # parts of the next
        {"flip": True, "scales": (1.0, 1.25), "refine": 5, "foreground": 0.8, "assignment": "hard", "background": 0.15},
        {"window": 32, "stride": 16, "shorter_side": 64, "top_k": 5, "refine": 3, "assignment": "hard"},
    ],
)
def test_both_backends_give_the_same_maps(demo, options):
    level, size = 1, (96, 160)
    image = Image.fromarray(make_scene(78, 0, level, size).image).resize((200, 120))
    words = [[Label(names[0], names[1:]) for names in some] for some in (LEVELS[level], BACKGROUNDS)]
    first, *others = (
        demo(name, "float64", labels=words[0], background_labels=words[1], **options)(image) for name in BACKENDS
    )
    assert len(np.unique(first.label_map)) > 1
    for other in others:
        np.testing.assert_array_equal(first.label_map, other.label_map)
        np.testing.assert_array_equal(first.group_map, other.group_map)
        assert first.group_labels == other.group_labels


def test_the_benchmark_measures_as_an_evaluation_does(demo):
    base = demo("torch")
    default, *others = mask_options.options_for(base)
    by_name = {option.name: option for option in others}
    foreground, flip = by_name["foreground 0.8"], by_name["flip"]
    assert foreground.joined(by_name["foreground 0.7"]) is None
    both = default.joined(foreground).joined(flip)
    assert (both.name, both.changes) == ("foreground 0.8; flip", {"foreground": 0.8, "flip": True})

    scenes = mask_options.scenes_of(["1"], 3, mask_options.CHOOSING_SEED)
    measured = mask_options.measure(base, [default, both], scenes)
    for found, changes in zip(measured, ({}, both.changes), strict=True):
        settings = replace(protocol_settings("native", "scenes:1"), **changes)
        expected = evaluate_segmentation(settings.segmenter(base, 8), scenes["1"]).mean_iou
        assert found.levels["1"] == pytest.approx(100 * expected)
        assert found.seconds > 0
    chosen = mask_options.best_combination(base, [default, flip], scenes)
    assert chosen.name in ("default", "flip")
