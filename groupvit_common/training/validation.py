"""Measures the model during training: on validation scenes, on the recipe's segmentation sets, by a function of the
caller."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene
from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.processes import ProcessInfo
from groupvit_common.evaluation.protocols import ProtocolSettings, default_protocol, protocol_settings
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.training.log import duration
from groupvit_common.training.recipe import EvaluationSettings, Recipe

_BATCH_SIZE = 8  # images or windows of a segmentation set

Evaluate = Callable[[Any], Mapping[str, float]]
"""A segmenter of the current model -> measures by name, higher is better; their mean decides which checkpoint is the
best."""


class Validation:
    """Measures a run's model and keeps what was measured last.

    Attributes:
        scenes, untrained: level -> mean IoU in percent, of the model and of the untrained one; empty for a run on other
        data.
        sets: "measure/name" -> percent, for the recipe's segmentation sets.
        custom: the measures of the caller's `evaluate`.

    Raises:
        InputError: a segmentation set that is not there.
    """

    def __init__(self, recipe: Recipe, evaluate: Evaluate | None, log: Callable[[str], None]) -> None:
        self.recipe, self.evaluate, self.log = recipe, evaluate, log
        self.opened = open_evaluation(recipe.evaluation)
        self.scenes: dict[int, float] = {}
        self.untrained: dict[int, float] = {}
        self.sets: dict[str, float] = {}
        self.custom: dict[str, float] = {}

    @cached_property
    def majority(self) -> dict[int, float]:
        """Level -> mean IoU in percent of the most frequent class everywhere; empty for a run on other data."""
        return majority_mean_iou(self.recipe) if self.recipe.data is None else {}

    def measure_untrained(self, segmenter: BaseSegmenter) -> str:
        """Measures the model before the first step; returns a line about it, empty for a run on other data."""
        if self.recipe.data is not None:
            return ""
        self.scenes = self.untrained = scene_mean_iou(segmenter, self.recipe)
        return f"{'at the start' if self.recipe.model.init_from else 'untrained'}: {_in_words(self.untrained)}"

    def measure_scenes(self, segmenter: BaseSegmenter, step: int, minutes: float) -> None:
        """Measures validation scenes, and what the caller measures: on the first process alone."""
        if self.recipe.data is None:
            self.scenes = scene_mean_iou(segmenter, self.recipe)
            self.log(f"step {step}: {_in_words(self.scenes)}  {minutes:.1f} min")
        if self.evaluate is not None:
            self.custom = dict(self.evaluate(segmenter))
            self.log(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in self.custom.items())}")

    def measure_sets(self, segmenter: BaseSegmenter, process: ProcessInfo | None, step: int) -> None:
        """Measures segmentation sets. Each process segments its part of the images, the first one adds up, exactly."""
        for name, data, settings in self.opened:
            started = time.monotonic()
            self.sets = {key: value for key, value in self.sets.items() if key.partition("/")[2] != name}
            try:
                result = evaluate_segmentation(settings.segmenter(segmenter, _BATCH_SIZE), data, process=process)
            except InputError as error:
                # On every process alike. Days of training are worth more than one measurement.
                self.log(f"step {step}: {name} is not measured, training continues: {error}")
                continue
            if result is None:
                continue
            scores = {f"{measure}/{name}": 100 * value for measure, value in result.scores().items()}
            self.sets |= {key: value for key, value in scores.items() if math.isfinite(value)}
            self.log(
                f"step {step}: {name} {scores[f'mean_iou/{name}']:.1f} "
                f"(mean IoU, %; {result.images} images, {duration(time.monotonic() - started)})"
            )

    def latest(self) -> dict[str, float]:
        """Returns what was measured last, by the names that records have."""
        return {f"mean_iou/level_{level}": value for level, value in self.scenes.items()} | self.sets | self.custom

    def score(self) -> float | None:
        """Returns the mean of mean IoUs and of the caller's measures, by which the best checkpoint is chosen.

        None without any, or without one of the sets: the mean of the others could not be compared.
        """
        names = [f"mean_iou/{name}" for name, _, _ in self.opened]
        if not all(name in self.sets for name in names):
            return None
        found = [*self.scenes.values(), *(self.sets[name] for name in names), *self.custom.values()]
        return float(np.mean(found)) if found else None

    def record(self) -> dict[str, Any]:
        """Returns the measures as `training.json` has them."""
        return {
            "mean_iou": _rounded(self.scenes),
            "untrained_mean_iou": _rounded(self.untrained),
            "majority_mean_iou": _rounded(self.majority),
            "evaluated": self.custom,
            "sets": {name: round(value, 1) for name, value in self.sets.items()},
        }


def open_evaluation(settings: EvaluationSettings) -> list[tuple[str, SegmentationSet, ProtocolSettings]]:
    """Opens the segmentation sets of a recipe; returns each with its name in records and its evaluation settings.

    Raises:
        InputError: no such set, or files that are missing.
    """
    opened = []
    for spelled in settings.data:
        kind = spelled.partition(":")[0]
        protocol = default_protocol(kind) if settings.protocol == "usual" else settings.protocol
        how = protocol_settings(protocol, kind)
        for data in open_sets(spelled, split=settings.split or None, limit=settings.limit or None, names=how.names):
            # As in `groupvit evaluate`: a threshold where there is a background without labels of its own.
            threshold = how.background if settings.background is None else settings.background
            by_threshold = data.has_background and not data.background_labels
            if by_threshold and threshold is None:
                raise InputError(f"{spelled} has a background class: give evaluation.background, a threshold for it")
            opened.append((spelled, data, replace(how, background=threshold if by_threshold else None)))
    kinds = [data.kind for _, data, _ in opened]
    return [(spelled if kinds.count(data.kind) > 1 else data.kind, data, how) for spelled, data, how in opened]


def scene_mean_iou(segmenter: BaseSegmenter, recipe: Recipe) -> dict[int, float]:
    """Returns level -> mean IoU in percent of the recipe's validation scenes, the background left out of the mean.

    Measured as users segment: the level's classes with their synonyms are the labels, the backgrounds' names the
    background labels.
    """
    return {
        level: 100.0 * mean_iou(scene_confusion(segmenter, validation_scenes(recipe, level)), background=0)
        for level in recipe.scenes.levels
    }


def validation_scenes(recipe: Recipe, level: int) -> tuple[Scene, ...]:
    """Returns the scenes of a level that the recipe never trains on."""
    return _scenes(recipe.scenes.held_out_seed, recipe.scenes.held_out_scenes, level, recipe.scene_size)


@lru_cache(maxsize=8)
def _scenes(seed: int, count: int, level: int, side: int) -> tuple[Scene, ...]:
    return tuple(make_scene(seed, index, level, (side, side)) for index in range(count))


def majority_mean_iou(recipe: Recipe) -> dict[int, float]:
    """Returns the mean IoU that `scene_mean_iou` would find for the most frequent class of each level everywhere."""
    result = {}
    for level in recipe.scenes.levels:
        masks = np.stack([scene.mask for scene in validation_scenes(recipe, level)])
        classes = len(LEVELS[level]) + 1
        most = 1 + int(np.bincount(masks.ravel(), minlength=classes)[1:].argmax())
        confusion = confusion_matrix(masks, np.full_like(masks, most), classes, ignore_index=None)
        result[level] = 100.0 * mean_iou(confusion, background=0)
    return result


def scene_confusion(segmenter: BaseSegmenter, scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """Returns the confusion matrix of scenes of one level: rows are the masks, columns the predictions; 0 is
    background."""
    classes = LEVELS[scenes[0].level]
    segmenter.set_labels([Label(names[0], names[1:]) for names in classes], [Label(n[0], n[1:]) for n in BACKGROUNDS])
    confusion = np.zeros((len(classes) + 1,) * 2, np.int64)
    results = segmenter.iter(Image.fromarray(scene.image) for scene in scenes)
    for scene, result in zip(scenes, results, strict=True):
        confusion += confusion_matrix(scene.mask, result.label_map, len(classes) + 1, ignore_index=None)
    return confusion


def _in_words(measured: Mapping[int, float]) -> str:
    return ", ".join(f"level {level} {value:.1f}" for level, value in measured.items()) + " (mean IoU, %)"


def _rounded(measured: Mapping[int, float]) -> dict[str, float]:
    return {str(level): round(value, 1) for level, value in measured.items()}
