"""Metrics against counting pixel by pixel and against cases worked out by hand."""

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.evaluation.metrics import (
    best_overlaps,
    class_accuracy,
    class_iou,
    confusion_matrix,
    group_counts,
    mean_accuracy,
    mean_iou,
    oracle_confusion,
    pixel_accuracy,
)


def test_confusion_counts_each_pixel_once():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 9, 7))
    truth[0, :3] = 255
    expected = np.zeros((4, 4), int)
    for t, p in zip(truth.flat, predicted.flat, strict=True):
        if t != 255:
            expected[t, p] += 1
    assert (confusion_matrix(truth, predicted, 4) == expected).all()


def test_confusion_of_images_adds_up_to_that_of_all():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 5, 8, 8)).astype(np.uint8)
    parts = sum(confusion_matrix(t, p, 3) for t, p in zip(truth, predicted, strict=True))
    assert (confusion_matrix(truth, predicted, 3) == parts).all()


def test_iou_against_sets_of_pixels():
    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(0, 3, (2, 20, 20))
    expected = [((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum() for c in range(3)]
    np.testing.assert_allclose(class_iou(confusion_matrix(truth, predicted, 3)), expected, rtol=1e-15)


def test_background_is_left_out_of_the_mean_but_its_errors_count():
    truth = np.array([[0, 0, 0, 0], [1, 1, 2, 2]])
    predicted = np.array([[0, 0, 1, 1], [1, 1, 2, 2]])
    confusion = confusion_matrix(truth, predicted, 3)
    assert class_iou(confusion).tolist() == [0.5, 0.5, 1.0]
    assert mean_iou(confusion, background=0) == 0.75


def test_absent_classes_do_not_count():
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 0, 1]), 5)
    assert np.isnan(class_iou(confusion)[2:]).all()
    assert mean_iou(confusion) == 1.0
    assert np.isnan(mean_iou(np.zeros((2, 2), np.int64)))


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "one shape"),
        (np.array([3]), np.array([0]), "truth holds label 3"),
        (np.array([0]), np.array([-1]), "prediction holds label -1"),
    ],
)
def test_what_cannot_be_counted_is_refused(truth, predicted, message):
    with pytest.raises(InputError, match=message):
        confusion_matrix(truth, predicted, 3)


def by_sets(truth, predicted, classes, ignore=255):
    """IoU, accuracy by class, pixel accuracy, all from sets of pixels: a second implementation."""
    pixels = {i for i, t in enumerate(truth.flat) if t != ignore}
    there = [{i for i in pixels if truth.flat[i] == c} for c in range(classes)]
    said = [{i for i in pixels if predicted.flat[i] == c} for c in range(classes)]
    nan = float("nan")
    iou = [len(t & s) / len(t | s) if t | s else nan for t, s in zip(there, said, strict=True)]
    accuracy = [len(t & s) / len(t) if t else nan for t, s in zip(there, said, strict=True)]
    right = sum(len(t & s) for t, s in zip(there, said, strict=True))
    return iou, accuracy, right / len(pixels) if pixels else nan


def mean_of(values):
    real = [value for value in values if value == value]
    return sum(real) / len(real) if real else float("nan")


def odd_cases():
    rng = np.random.default_rng(3)
    for classes in (1, 2, 5, 30):
        truth, predicted = rng.integers(0, classes, (2, 13, 11)).astype(np.uint8)
        yield classes, truth, predicted
        few = truth.copy()
        few[rng.random(few.shape) < 0.6] = 255
        yield classes, few, predicted
    yield 6, np.full((4, 4), 2, np.uint8), np.full((4, 4), 2, np.uint8)  # one class is all there is
    yield 6, np.full((4, 4), 2, np.uint8), np.full((4, 4), 3, np.uint8)  # nothing is right
    yield 6, np.full((4, 4), 255, np.uint8), np.full((4, 4), 3, np.uint8)  # everything is ignored
    yield 6, np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.uint8)


@pytest.mark.parametrize(("classes", "truth", "predicted"), list(odd_cases()))
def test_all_scores_against_sets_of_pixels(classes, truth, predicted):
    confusion = confusion_matrix(truth, predicted, classes)
    iou, accuracy, right = by_sets(truth, predicted, classes)
    close = {"rtol": 1e-14}
    np.testing.assert_allclose(class_iou(confusion), iou, **close)
    np.testing.assert_allclose(class_accuracy(confusion), accuracy, **close)
    np.testing.assert_allclose(pixel_accuracy(confusion), right, **close)
    np.testing.assert_allclose(mean_iou(confusion), mean_of(iou), **close)
    np.testing.assert_allclose(mean_accuracy(confusion), mean_of(accuracy), **close)
    np.testing.assert_allclose(mean_accuracy(confusion, background=0), mean_of(accuracy[1:]), **close)


def test_mean_accuracy_is_over_the_classes_there_mean_iou_over_those_said_too():
    confusion = confusion_matrix(np.array([0, 0]), np.array([0, 1]), 3)
    assert (mean_accuracy(confusion), mean_iou(confusion)) == (0.5, 0.25)


@pytest.mark.parametrize(("classes", "groups"), [(5, 3), (3, 8), (4, 4), (1, 1)])
def test_the_oracle_gives_each_group_its_best_label(classes, groups):
    rng = np.random.default_rng(4)
    truth = rng.integers(0, classes, (20, 15)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255
    group_map = rng.integers(0, groups, truth.shape)
    counts = group_counts(truth, group_map, classes, groups)

    named = np.zeros_like(group_map)
    for g in range(groups):
        inside = truth[(group_map == g) & (truth != 255)]
        named[group_map == g] = max(range(classes), key=lambda c: ((inside == c).sum(), -c)) if inside.size else 0
    np.testing.assert_array_equal(oracle_confusion(counts), confusion_matrix(truth, named, classes))

    expected = []
    for c in range(classes):
        mask = truth == c
        if mask.any():
            regions = [(group_map == g) & (truth != 255) for g in range(groups)]
            expected.append(max((mask & r).sum() / (mask | r).sum() for r in regions))
    np.testing.assert_allclose(best_overlaps(counts), expected, rtol=1e-14)


def test_groups_that_are_the_masks_are_perfect_and_split_ones_are_not():
    truth = np.repeat([[0, 1, 2, 255]], 4, axis=0)
    group_map = np.repeat([[7, 3, 1, 1]], 4, axis=0)
    counts = group_counts(truth, group_map, 3, 8)
    assert mean_iou(oracle_confusion(counts)) == 1.0
    assert best_overlaps(counts).tolist() == [1, 1, 1]
    group_map[:2, 1] = 5
    counts = group_counts(truth, group_map, 3, 8)
    assert mean_iou(oracle_confusion(counts)) == 1.0  # both halves have the right name,
    assert best_overlaps(counts, background=0).tolist() == [0.5, 1]  # but neither is the mask


def test_groups_of_nothing():
    counts = group_counts(np.full((3, 3), 255), np.zeros((3, 3), int), 4, 2)
    assert not oracle_confusion(counts).any()
    assert best_overlaps(counts).size == 0
    with pytest.raises(InputError, match="truth holds label 5, but 4 classes"):
        group_counts(np.array([5]), np.array([7]), 4, 8)
