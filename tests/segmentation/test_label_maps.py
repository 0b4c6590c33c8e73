"""Group similarities -> label maps: the authors' evaluation as reference, NumPy, PyTorch and Keras against each
other."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from groupvit_common.errors import InputError
from groupvit_common.model.resample import resize_matrix
from groupvit_common.segmentation import label_maps, windows
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_tf import label_maps as keras_segmentation
from groupvit_torch import label_maps as torch_segmentation
from tests.support import paths, scores

# What the authors' own code gives for small random models (labels scored by two softmaxes, the 5 most likely labels of
# the image kept, hard groups). The inputs are the group and image embeddings and soft assignments of the same weights.
REFERENCE = paths.REFERENCE / "nvlabs_segmentation.npz"
# The reference was computed in float32; affinities lie in 0..1 after a softmax of logits up to 100.
FLOAT32_AFFINITY = 5e-6
FLOAT64 = 1e-12

SIZES = ["three_stage/64x64", "three_stage/64x96", "three_stage/80x64",
         "two_stage/64x64", "two_stage/64x128", "two_stage/96x64"]  # fmt: skip
PATCH = {"three_stage": 8, "two_stage": 16}
# Background or not, threshold.
SETTINGS = [(1, 0.95), (1, 0.35), (0, 0.95)]


def to_torch(x):
    return torch.from_numpy(np.asarray(x))


def to_keras(x):
    return keras.ops.convert_to_tensor(x)


class NumPy:
    """The functions under test, arrays in and out."""

    grouping_map = staticmethod(scores.grouping_map)
    label_affinity = staticmethod(scores.label_affinity)
    image_probabilities = staticmethod(scores.image_probabilities)
    pixel_labels = staticmethod(label_maps.pixel_labels)

    @classmethod
    def label_pixels(cls, affinity, grouping, size, *, assignment=None, threshold=None, is_background=None):
        """One view of an image as a whole; nothing of the pixels is needed."""
        view = label_maps.View(affinity[None], grouping[None])
        options = SegmentationOptions(assignment=assignment, background=threshold)
        is_background = [False] * affinity.shape[1] if is_background is None else is_background
        return cls.pixel_labels([view], np.zeros((3, 1, 1)), size, options, is_background)

    @staticmethod
    def interpolated_strips(maps, size):
        return ((slice(y, y + 1), row[:, None]) for y, row in enumerate(windows.interpolated_rows(maps, size)))


class Torch(NumPy):
    @staticmethod
    def grouping_map(assignments, grid):
        return torch_segmentation.grouping_map([to_torch(a) for a in assignments], grid).numpy()

    @staticmethod
    def label_affinity(groups, labels, scale, image=None, *others):
        image = None if image is None else to_torch(image)
        scale = torch.tensor(scale, dtype=torch.float64)
        return torch_segmentation.label_affinity(to_torch(groups), to_torch(labels), scale, image, *others).numpy()

    @staticmethod
    def image_probabilities(image, labels, scale):
        scale = torch.tensor(scale, dtype=torch.float64)
        return torch_segmentation.image_probabilities(to_torch(image), to_torch(labels), scale).numpy()

    @staticmethod
    def pixel_labels(views, *others):
        views = [replace(view, affinity=to_torch(view.affinity), grouping=to_torch(view.grouping)) for view in views]
        return torch_segmentation.pixel_labels(views, *others)

    @staticmethod
    def interpolated_strips(maps, size):
        return ((rows, strip.numpy()) for rows, strip in torch_segmentation.interpolated_strips(to_torch(maps), size))


class Keras(NumPy):
    """Keras leaves the pixels to NumPy."""

    @staticmethod
    def grouping_map(assignments, grid):
        return np.asarray(keras_segmentation.grouping_map([to_keras(a) for a in assignments], grid))

    @staticmethod
    def label_affinity(groups, labels, scale, image=None, *others):
        image = None if image is None else to_keras(image)
        groups, labels, scale = map(to_keras, (groups, labels, np.float64(scale)))
        return np.asarray(keras_segmentation.label_affinity(groups, labels, scale, image, *others))

    @staticmethod
    def image_probabilities(image, labels, scale):
        return np.asarray(keras_segmentation.image_probabilities(*map(to_keras, (image, labels, np.float64(scale)))))


@pytest.fixture(params=[NumPy, Torch, Keras], ids=["numpy", "torch", "keras"])
def ops(request):
    return request.param


@pytest.fixture(params=[NumPy, Torch, "tensors"], ids=["numpy", "torch", "tensors"])
def pixel_ops(request, monkeypatch):
    if request.param == "tensors":  # as on an accelerator
        monkeypatch.setattr(torch_segmentation, "_suits_numpy", lambda *_: False)
        return Torch
    return request.param


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def random_image(seed=0, groups=6, labels=5, grid=(7, 9)):
    """Affinity `[G, L]` and grouping map `[G, h, w]` of one image."""
    rng = np.random.default_rng(seed)
    grouping = scores.softmax(rng.normal(size=(*grid, groups)) * 3).transpose(2, 0, 1)
    return scores.softmax(rng.normal(size=(groups, labels)) * 3), np.ascontiguousarray(grouping)


# The authors' evaluation


@pytest.mark.parametrize(("background", "threshold"), SETTINGS)
@pytest.mark.parametrize("case", SIZES)
def test_label_maps_equal_the_authors(ops, reference, case, background, threshold):
    model, size_name = case.split("/")
    height, width = map(int, size_name.split("x"))
    expected = reference[f"{case}/bg{background}_th{threshold}"]
    assignments = [reference[f"{case}/assignment_{i}"] for i in range(2) if f"{case}/assignment_{i}" in reference]
    grouping = ops.grouping_map(assignments, (height // PATCH[model], width // PATCH[model]))
    affinity = ops.label_affinity(
        reference[f"{case}/group_embeds"][None],
        reference[f"{model}/label_embeds"].astype(np.float64),
        float(reference[f"{model}/logit_scale"]),
        reference[f"{case}/image_embeds"],
        5,
    )
    pixels = ops.label_pixels(affinity[0], grouping[0], (height, width), threshold=threshold if background else None)

    np.testing.assert_array_equal(pixels.label_map, expected.argmax(axis=0))
    ours = affinity[0][pixels.group_map].transpose(2, 0, 1)
    np.testing.assert_allclose(ours, expected[background:], rtol=0, atol=FLOAT32_AFFINITY)


# Properties and plain second computations


def test_grouping_map_holds_a_distribution_for_each_patch(ops):
    rng = np.random.default_rng(0)
    first = scores.softmax(rng.normal(size=(2, 15, 6))).transpose(0, 2, 1)
    second = scores.softmax(rng.normal(size=(2, 6, 4))).transpose(0, 2, 1)
    maps = ops.grouping_map([first, second], (3, 5))
    np.testing.assert_allclose(maps.sum(axis=1), 1, rtol=FLOAT64)
    np.testing.assert_allclose(maps[1, 2, 1, 3], second[1, 2] @ first[1, :, 8], rtol=FLOAT64)
    np.testing.assert_array_equal(ops.grouping_map([first], (3, 5)), first.reshape(2, 6, 3, 5))


def test_affinity_without_top_k_is_the_squared_probability(ops):
    rng = np.random.default_rng(0)
    groups, labels = rng.normal(size=(2, 4, 8)), rng.normal(size=(5, 8))
    affinity = ops.label_affinity(groups, labels, 20.0)
    np.testing.assert_allclose(np.sqrt(affinity).sum(axis=-1), 1, rtol=FLOAT64)
    # A group of the same direction as a label is all that label's.
    sure = ops.label_affinity(3 * labels[None], labels, 100.0)
    assert (sure[0].argmax(axis=-1) == np.arange(5)).all()
    for k in (5, 6):
        np.testing.assert_array_equal(ops.label_affinity(groups, labels, 20.0, groups[:, 0], k), affinity)


def test_top_k_keeps_the_labels_most_similar_to_the_image(ops):
    rng = np.random.default_rng(1)
    groups, labels, images = rng.normal(size=(2, 4, 8)), rng.normal(size=(6, 8)), rng.normal(size=(2, 8))
    affinity = ops.label_affinity(groups, labels, 10.0, images, 2)
    kept = ops.image_probabilities(images, labels, 10.0).argsort(axis=-1)[:, -2:]
    for b in range(2):
        assert set(np.flatnonzero(affinity[b].any(axis=0))) == set(kept[b])
        among_all = np.sqrt(ops.label_affinity(groups[b : b + 1], labels, 10.0))[0]
        among_kept = np.sqrt(ops.label_affinity(groups[b : b + 1], labels[kept[b]], 10.0))[0]
        np.testing.assert_allclose(affinity[b][:, kept[b]], among_all[:, kept[b]] * among_kept, rtol=FLOAT64)


def test_logit_scale_is_at_most_100(ops):
    rng = np.random.default_rng(2)
    groups, labels = rng.normal(size=(1, 4, 8)), rng.normal(size=(5, 8))
    np.testing.assert_array_equal(ops.label_affinity(groups, labels, 250.0), ops.label_affinity(groups, labels, 100.0))
    np.testing.assert_array_equal(
        ops.image_probabilities(groups[0], labels, 250.0), ops.image_probabilities(groups[0], labels, 100.0)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_divides_the_bounded_scale(ops, temperature):
    rng = np.random.default_rng(3)
    groups, labels = rng.normal(size=(2, 4, 8)), rng.normal(size=(5, 8))
    affinity = ops.label_affinity(groups, labels, 20.0, groups[:, 0], 3, temperature)
    np.testing.assert_array_equal(affinity, ops.label_affinity(groups, labels, 20.0 / temperature, groups[:, 0], 3))
    surer = ops.label_affinity(groups, labels, 250.0, None, None, 0.5)
    np.testing.assert_allclose(surer, twice_as_sure(ops.label_affinity(groups, labels, 250.0)), rtol=FLOAT64)


def twice_as_sure(affinity):
    """Squared probabilities at a scale -> those at twice the scale."""
    squared = affinity.copy()
    return (squared / squared.sum(axis=-1, keepdims=True)) ** 2


@pytest.mark.parametrize("n_in", [1, 2, 7, 28])
@pytest.mark.parametrize("n_out", [1, 2, 3, 5, 28, 29, 500])
def test_taps_are_the_resize_matrix_without_its_zeros(n_in, n_out):
    first, second, t = windows.linear_taps(n_in, n_out)
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    np.add.at(matrix, (rows, first), 1 - t)
    np.add.at(matrix, (rows, second), t)
    np.testing.assert_allclose(matrix, resize_matrix(n_in, n_out, "bilinear"), rtol=0, atol=FLOAT64)


def test_resized_maps_are_pytorchs():
    maps = np.random.default_rng(4).normal(size=(2, 3, 7, 9))
    expected = F.interpolate(torch.from_numpy(maps), size=(50, 33), mode="bilinear", align_corners=False)
    resized = keras_segmentation.resize_bilinear(to_keras(maps), (50, 33))
    np.testing.assert_allclose(resized, expected, rtol=0, atol=FLOAT64)


def test_of_equally_similar_labels_the_first_stay(ops):
    rng = np.random.default_rng(5)
    groups, label, image = rng.normal(size=(1, 4, 8)), rng.normal(size=8), rng.normal(size=(1, 8))
    affinity = ops.label_affinity(groups, np.stack([label] * 5), 10.0, image, 2)
    assert np.flatnonzero(affinity[0].any(axis=0)).tolist() == [0, 1]


@pytest.mark.parametrize("size", [(50, 70), (7, 9), (1, 1), (3, 200), (200, 1)])
@pytest.mark.parametrize("strip_values", [1, 1000, 1 << 21])
def test_strips_are_the_whole_interpolation(pixel_ops, monkeypatch, size, strip_values):
    monkeypatch.setattr(windows, "STRIP_VALUES", strip_values)
    maps = np.random.default_rng(0).normal(size=(6, 7, 9))
    whole = F.interpolate(torch.from_numpy(maps)[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    parts = list(pixel_ops.interpolated_strips(maps, size))
    covered = np.concatenate([np.arange(rows.start, rows.stop) for rows, _ in parts])
    np.testing.assert_array_equal(covered, np.arange(size[0]))
    assert all(strip[:, 1:].size <= strip_values for _, strip in parts)
    np.testing.assert_allclose(np.concatenate([s for _, s in parts], axis=1), whole, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("threshold", [None, 0.4, 0.99])
@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_label_pixels_against_the_plain_computation_at_full_resolution(pixel_ops, assignment, threshold):
    affinity, grouping = random_image()
    hidden = [False, True, False, False, True]
    pixels = pixel_ops.label_pixels(
        affinity, grouping, (55, 64), assignment=assignment, threshold=threshold, is_background=hidden
    )

    full = F.interpolate(torch.from_numpy(grouping)[None], size=(55, 64), mode="bilinear", align_corners=False)[0]
    group_map = full.numpy().argmax(axis=0)
    weights = np.eye(6)[group_map] if assignment == "hard" else full.numpy().transpose(1, 2, 0)
    plain = weights @ affinity
    expected = np.array([1, 0, 2, 3, 0])[plain.argmax(axis=-1)]
    if threshold is not None:
        expected[plain.max(axis=-1) < min(threshold, affinity.max())] = 0
    np.testing.assert_array_equal(pixels.group_map, group_map)
    np.testing.assert_array_equal(pixels.label_map, expected)
    assert pixels.label_map.dtype == np.uint8


def test_threshold_leaves_the_surest_group(pixel_ops):
    affinity, grouping = random_image()
    pixels = pixel_ops.label_pixels(affinity, grouping, (40, 40), threshold=1.0)
    surest = affinity.max(axis=1).argmax()
    assert np.flatnonzero(pixels.group_values).tolist() == [surest]
    np.testing.assert_array_equal(pixels.label_map > 0, pixels.group_map == surest)


def test_without_background_labels_are_numbered_from_zero(pixel_ops):
    affinity, grouping = random_image(labels=2)
    assert set(np.unique(pixel_ops.label_pixels(affinity, grouping, (20, 20)).label_map)) == {0, 1}
    assert set(np.unique(pixel_ops.label_pixels(affinity, grouping, (20, 20), threshold=0.0).label_map)) == {1, 2}


def test_many_labels_and_groups_need_sixteen_bits(pixel_ops):
    affinity, grouping = random_image(groups=300, labels=400, grid=(3, 3))
    pixels = pixel_ops.label_pixels(affinity, grouping, (30, 20))
    assert pixels.label_map.dtype == pixels.group_map.dtype == np.uint16
    np.testing.assert_array_equal(pixels.label_map, affinity.argmax(axis=1)[pixels.group_map])
    with pytest.raises(InputError, match="65536"):
        label_maps.index_dtype(70_000)


def test_ties_go_to_the_first_and_what_is_not_finite_wins(pixel_ops):
    even = np.full((3, 2, 2), 1 / 3)
    affinity = np.array([[0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.3, 0.4, 0.3]])
    for assignment in ("hard", "soft"):
        pixels = pixel_ops.label_pixels(affinity, even, (6, 5), assignment=assignment)
        assert not pixels.group_map.any()
        assert (pixels.label_map == 1).all()
    broken = even.copy()
    broken[1] = np.nan
    assert (pixel_ops.label_pixels(affinity, broken, (6, 5)).group_map == 1).all()


# Labels of several words


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_label_of_several_words_is_as_similar_as_the_most_similar_of_them(ops, top_k):
    rng = np.random.default_rng(8)
    groups, images, words = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 8)), rng.normal(size=(5, 3, 8))

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def largest(x):
        return np.einsum("...e,lke->...lk", unit(x), unit(words)).max(axis=-1)

    of_groups, of_images = largest(groups), largest(images)
    among_all = scores.softmax(20 * of_groups)
    kept = np.argsort(np.argsort(-of_images, axis=-1), axis=-1) < (top_k or 5)
    among_kept = scores.softmax(np.where(kept[:, None], 20 * of_groups, -np.inf))
    np.testing.assert_allclose(
        ops.label_affinity(groups, words, 20.0, images, top_k), among_all * among_kept, rtol=0, atol=FLOAT64
    )
    np.testing.assert_allclose(
        ops.image_probabilities(images, words, 20.0), scores.softmax(20 * of_images), rtol=0, atol=FLOAT64
    )
    # Words that repeat another change nothing.
    np.testing.assert_allclose(
        ops.image_probabilities(images, words[:, [0, 1, 2, 1]], 20.0),
        ops.image_probabilities(images, words, 20.0),
        rtol=FLOAT64,
    )


# 2 views of 4 groups each, or 4 windows.
@pytest.mark.parametrize(
    "options",
    [
        {"flip": True},
        {"flip": True, "background": 0.2},
        {"flip": True, "assignment": "soft"},
        {"refine": 2},
        {"flip": True, "refine": 2, "foreground": 0.4},
        {"window": 8, "stride": 4},
        {"window": 8, "stride": 4, "background": 0.2, "assignment": "hard"},
        {"window": 8, "stride": 4, "assignment": "soft", "flip": True},
        # No sum over groups: stays with labels.
        {"flip": True, "assignment": "soft", "background": 0.2},
    ],
)
def test_scores_of_many_labels_come_from_those_of_fewer_groups(pixel_ops, monkeypatch, options):
    rng = np.random.default_rng(0)
    chosen, side, labels = SegmentationOptions(**options), (12, 16), 70
    seen = windows.Windows.over(side, 8, 4) if chosen.window else None
    count, grid = (1, (6, 8)) if seen is None else (len(seen), (4, 4))
    views = []
    for mirrored in [False, True] if chosen.flip else [False]:
        affinity = torch.softmax(to_torch(3 * rng.normal(size=(count, 4, labels))), -1).square().numpy()
        grouping = torch.softmax(to_torch(6 * rng.normal(size=(count, 4, *grid))), 1).numpy()
        views.append(label_maps.View(affinity, grouping, seen, mirrored))
    pixels, is_background = rng.normal(size=(3, *side)), [number < 30 for number in range(labels)]
    resized: list[int] = []

    def counting(view_scores):
        def counted(view, *others):
            resized.append(label_maps.channel_count(view, chosen))
            return view_scores(view, *others)

        return counted

    for module in (label_maps, torch_segmentation):
        monkeypatch.setattr(module, "view_scores", counting(module.view_scores))
    fewer = pixel_ops.pixel_labels(views, pixels, (25, 30), chosen, is_background)
    is_linear = not (chosen.assignment == "soft" and chosen.background)
    assert set(resized) == {4 * count if is_linear else labels + 1}
    for module in (label_maps, torch_segmentation):
        monkeypatch.setattr(module, "groups_are_fewer", lambda *_: False)
    every = pixel_ops.pixel_labels(views, pixels, (25, 30), chosen, is_background)
    np.testing.assert_array_equal(fewer.label_map, every.label_map)
    np.testing.assert_array_equal(fewer.group_map, every.group_map)
    np.testing.assert_array_equal(fewer.group_values, every.group_values)
