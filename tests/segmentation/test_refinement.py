"""Pixel-adaptive refinement: NumPy and PyTorch against a loop over pixels that follows the definition, and its
properties."""

import tracemalloc

import numpy as np
import pytest
import torch

from groupvit_common.segmentation import refinement
from groupvit_torch import label_maps as torch_segmentation

# Sums in another order, in float64; scores are of size 1.
FLOAT64 = 1e-12
FLOAT32 = 1e-5


class Torch:
    @staticmethod
    def refine(scores, picture, *options):
        return torch_segmentation.refine(torch.from_numpy(scores), torch.from_numpy(picture), *options).numpy()

    @staticmethod
    def pixel_affinity(picture, *options):
        return torch_segmentation.pixel_affinity(torch.from_numpy(picture), *options).numpy()


@pytest.fixture(params=[refinement, Torch], ids=["numpy", "torch"])
def ops(request):
    return request.param


def refined_pixel_by_pixel(scores, picture, times, dilations):
    """The definition, one pixel after the other."""
    _, height, width = picture.shape

    def around(y, x, middle):
        """The places of the 3 x 3 of every dilation, with the middle or without."""
        for d in dilations:
            for dy in (-d, 0, d):
                for dx in (-d, 0, d):
                    if middle or dy or dx:
                        yield min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            own = picture[:, y, x]
            s = np.array([picture[:, j, i] for j, i in around(y, x, True)]).std(axis=0, ddof=1)
            k = [-np.mean(np.abs(own - picture[:, j, i]) / (1e-8 + 0.1 * s)) for j, i in around(y, x, False)]
            e = np.exp(np.array(k) - max(k))
            weights[y, x] = e / e.sum()
    for _ in range(times):
        scores = np.stack(
            [
                [
                    sum(a * scores[:, j, i] for a, (j, i) in zip(weights[y, x], around(y, x, False), strict=True))
                    for x in range(width)
                ]
                for y in range(height)
            ]
        ).transpose(2, 0, 1)
    return scores


def blocks(rng, size):
    """A picture of flat blocks with a little noise: edges, and places that are nearly alike."""
    coarse = rng.random((3, 4, 4)).repeat(-(-size[0] // 4), axis=1).repeat(-(-size[1] // 4), axis=2)
    return coarse[:, : size[0], : size[1]] + 0.01 * rng.standard_normal((3, *size))


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4), (3, 12), (2, 1000)])
@pytest.mark.parametrize("size", [(9, 13), (1, 5), (12, 8)])
def test_against_a_loop_over_pixels(ops, monkeypatch, size, dilations):
    rng = np.random.default_rng(size[0])
    # Strips of a few rows, and the last one shorter.
    monkeypatch.setattr(refinement, "_STRIP_VALUES", 5 * 4 * size[1])
    scores, picture = rng.random((4, *size)), blocks(rng, size)
    expected = refined_pixel_by_pixel(scores, picture, 3, dilations)
    np.testing.assert_allclose(ops.refine(scores, picture, 3, dilations), expected, rtol=0, atol=FLOAT64)
    single = ops.refine(scores.astype(np.float32), picture, 3, dilations)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=FLOAT32)


def test_numpy_and_torch_agree_on_a_larger_picture():
    """And labels are refined one by one, however many there are."""
    rng = np.random.default_rng(4)
    scores, picture = rng.random((refinement.LABELS_AT_ONCE + 3, 70, 90)), blocks(rng, (70, 90))
    refined = refinement.refine(scores, picture)
    np.testing.assert_allclose(Torch.refine(scores, picture), refined, rtol=0, atol=FLOAT64)
    for label in (0, refinement.LABELS_AT_ONCE, len(scores) - 1):
        some = slice(label, label + 1)
        np.testing.assert_allclose(refinement.refine(scores[some], picture), refined[some], rtol=0, atol=FLOAT64)


def test_on_a_picture_of_one_colour_it_is_the_mean_of_the_neighbours(ops):
    scores = np.random.default_rng(0).random((2, 11, 12))
    picture = np.full((3, 11, 12), 0.3)
    steps = [(d * y, d * x) for d in (1, 3) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    around = np.mean([scores[:, 5 + y, 6 + x] for y, x in steps], axis=0)
    np.testing.assert_allclose(ops.refine(scores, picture, 1, (1, 3))[:, 5, 6], around, rtol=0, atol=FLOAT64)


def test_scores_that_are_alike_everywhere_stay(ops):
    rng = np.random.default_rng(1)
    scores = np.broadcast_to(rng.random((3, 1, 1)), (3, 20, 30)).copy()
    np.testing.assert_allclose(ops.refine(scores, blocks(rng, (20, 30))), scores, rtol=0, atol=FLOAT64)


def test_a_border_that_is_off_moves_to_the_edge_of_the_picture(ops):
    picture = np.zeros((3, 24, 40))
    picture[:, :, 20:] = 1.0
    picture += 0.01 * np.random.default_rng(2).standard_normal(picture.shape)
    scores = np.zeros((2, 24, 40))
    # Three pixels beyond the edge.
    scores[0, :, :23], scores[1, :, 23:] = 1.0, 1.0
    best = ops.refine(scores, picture).argmax(axis=0)
    np.testing.assert_array_equal(best, np.broadcast_to(np.arange(40) >= 20, (24, 40)))


def test_scores_are_means_and_their_sum_stays(ops):
    rng = np.random.default_rng(3)
    scores = rng.dirichlet(np.ones(4), (15, 18)).transpose(2, 0, 1).copy()
    refined = ops.refine(scores, blocks(rng, (15, 18)))
    assert refined.min() >= scores.min()
    assert refined.max() <= scores.max()
    np.testing.assert_allclose(refined.sum(axis=0), 1, rtol=FLOAT64)
    np.testing.assert_array_equal(ops.refine(scores, blocks(rng, (15, 18)), 0), scores)


def test_normalised_pixels_serve_as_well_as_colours(ops):
    rng = np.random.default_rng(5)
    picture = blocks(rng, (16, 16))
    factor, summand = rng.uniform(2, 5, (3, 1, 1)), rng.normal(size=(3, 1, 1))
    one, other = ops.pixel_affinity(picture), ops.pixel_affinity(picture * factor + summand)
    np.testing.assert_allclose(one.sum(axis=0), 1, rtol=FLOAT64)
    # The 1e-8 beside a standard deviation of 0.001 and more.
    np.testing.assert_allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("labels", [21, 120])
def test_memory_of_a_photo(labels):
    """300 x 300: the kernel is 16 MiB in float32, once more while it is made; the result is as large as the scores, and
    those of some labels are there twice more."""
    rng = np.random.default_rng(0)
    scores, picture = rng.random((labels, 300, 300), dtype=np.float32), rng.random((3, 300, 300), dtype=np.float32)
    tracemalloc.start()
    refinement.refine(scores, picture, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kernel = 8 * len(refinement.DILATIONS) * 300 * 300 * 4
    assert peak < scores.nbytes + 2 * kernel + 3 * min(labels, refinement.LABELS_AT_ONCE) * 300 * 300 * 4
