"""The calibration curve against evaluations."""

import math

import pytest

from groupvit_common.errors import InputError
from groupvit_common.evaluation.calibration import Point, best_point, calibrate
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from tests.support.evaluation import settings


def test_the_curve_is_that_of_evaluations(torch_base, folder):
    """Label maps for thresholds are those of the thresholds in either backend: tests/segmentation/test_segmenter.py."""
    (data,) = open_sets(f"folder:{folder}", limit=4)
    segmenter = settings(temperature=2.0).segmenter(torch_base, 2)
    curve = calibrate(segmenter, data, [0.05, 0.3], [1.0, 3.0])
    assert segmenter.options.temperature == 2.0
    assert [(p.temperature, p.threshold) for p in curve] == [(1, 0.05), (1, 0.3), (3, 0.05), (3, 0.3)]
    for point in curve:
        chosen = settings(background=point.threshold, temperature=point.temperature).segmenter(torch_base, 2)
        assert point.mean_iou == evaluate_segmentation(chosen, data).mean_iou
    assert len({point.mean_iou for point in curve}) > 1
    assert best_point(curve).mean_iou == max(point.mean_iou for point in curve)


def test_a_threshold_is_background_enough_for_a_foreground(torch_base, folder):
    (data,) = open_sets(f"folder:{folder}", limit=2)
    options = {"foreground": 0.4, "window": None, "stride": None}
    segmenter = settings(background=None, **options).segmenter(torch_base, 2)
    curve = calibrate(segmenter, data, [0.05, 0.3])
    for point in curve:
        chosen = settings(background=point.threshold, **options).segmenter(torch_base, 2)
        assert point.mean_iou == evaluate_segmentation(chosen, data).mean_iou
    assert segmenter.options.background is None
    with pytest.raises(InputError, match="foreground weighs labels against a background"):
        segmenter(data[0].image())


def test_the_best_of_a_curve_with_gaps():
    points = [Point(1, 0.1, math.nan), Point(1, 0.2, 0.5), Point(1, 0.3, 0.5)]
    assert best_point(points).threshold == 0.2


@pytest.mark.parametrize(("what", "bad"), [("thresholds", [1.5]), ("temperatures", [0.0])])
def test_what_cannot_be_tried(torch_base, folder, what, bad):
    with pytest.raises(InputError, match=what):
        calibrate(settings().segmenter(torch_base, 2), open_sets(f"folder:{folder}")[0], **{what: bad})
