"""Metrics against counting pixel by pixel and against cases worked out by hand."""

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.metrics import class_iou, confusion_matrix, mean_iou


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
