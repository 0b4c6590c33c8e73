"""What a training run on captioned scenes is made of besides the framework: its data, its measures, its files.

A backend's `train` makes a `Run`, feeds the model with its batches, tells it each step's loss and gives it the model to save.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.data.captioned import Batch, CaptionedImages, batches
from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene
from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.image_processor import GroupViTImageProcessor
from groupvit_common.metrics import confusion_matrix, mean_iou
from groupvit_common.processor import GroupViTProcessor
from groupvit_common.prompts import Label
from groupvit_common.recipe import Recipe, get_recipe
from groupvit_common.settings import changed, to_table
from groupvit_common.tokenizer import CLIPTokenizer

MEASURES_NAME = "training.json"


class Segmenter(Protocol):
    """What measuring needs of either backend's `Segmenter`."""

    def set_labels(self, labels: Any, background_labels: Any = ..., /) -> Any: ...

    def iter(self, images: Iterable[Any], /) -> Iterator[Any]: ...


class Model(Protocol):
    """What saving needs of either backend's model."""

    def save_pretrained(self, directory: Path, /) -> Any: ...


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `mean_iou`: level -> mean IoU of the held-out scenes, in percent, beside that of the untrained model and of
    the most frequent class everywhere; `losses`: one a step."""

    directory: Path
    mean_iou: dict[int, float]
    untrained_mean_iou: dict[int, float]
    majority_mean_iou: dict[int, float]
    losses: tuple[float, ...]
    minutes: float


@dataclass
class Run:
    """One run: what it trains on, where it writes, what it has measured so far. Made by `begin`.

    backend: name and version of the framework, threads: how many it computes with; both only for the record.
    """

    recipe: Recipe
    directory: Path
    pictures: Mapping[int, CaptionedImages]
    processor: GroupViTProcessor
    backend: str
    threads: int
    log: Callable[[str], None]
    started: float
    majority: dict[int, float]
    untrained: dict[int, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        recipe: Recipe | str,
        out_dir: str | Path,
        *,
        seed: int | None = None,
        log: Callable[[str], None] = print,
        backend: str = "",
        threads: int = 0,
    ) -> Run:
        """Makes the folder, the scenes and the tokenizer. InputError: an unknown recipe, or a folder that cannot be made."""
        recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        recipe = recipe if seed is None else changed(recipe, {"run.seed": seed})
        directory = Path(out_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {directory} for the model: {error}") from error
        started = time.monotonic()
        scenes = recipe.scenes
        log(f"making {scenes.scenes_per_level} scenes for each of the levels {', '.join(map(str, scenes.levels))}")
        pictures = {
            level: CaptionedImages.scenes(recipe.run.seed, scenes.scenes_per_level, level, recipe.model.image_size)
            for level in scenes.levels
        }
        captions = [caption for level in scenes.levels for caption in pictures[level].captions]
        processor = make_processor(recipe, captions)
        majority = majority_mean_iou(recipe)
        return cls(recipe, directory, pictures, processor, backend, threads, log, started, majority)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def batches(self) -> Iterator[Batch[NDArray[Any]]]:
        """The run's batches, the same for the same seed whatever the backend."""
        return batches(self.recipe, self.pictures, self.processor, np.random.default_rng(self.recipe.run.seed))

    def measure_untrained(self, segmenter: Segmenter, parameters: int) -> None:
        """`parameters`: how many numbers the model learns."""
        self.measured = self.untrained = measure(segmenter, self.recipe)
        self.log(f"{parameters / 1e6:.2f} million parameters; untrained: {percentages(self.untrained)}")

    def took_step(self, loss: float) -> None:
        """Notes a step's loss. GroupViTError: it is no number, and going on would only spoil what was saved."""
        self.losses.append(loss)
        step = len(self.losses)
        if not math.isfinite(loss):
            raise GroupViTError(
                f"the loss is {loss} at step {step}: try a lower learning_rate than {self.recipe.optimizer.learning_rate:g} or "
                f"precision float32; what {self.directory} holds is from before"
            )
        every = self.recipe.run.log_every
        if step % every == 0:
            mean = np.mean(self.losses[-every:])
            self.log(f"step {step}/{self.recipe.schedule.total_steps}  loss {mean:.3f}  {self.minutes:.1f} min")

    def save(self, model: Model, segmenter: Segmenter) -> None:
        """Measures a model through a segmenter that holds it, and writes it with its processor and its measures."""
        step = len(self.losses)
        self.measured = measure(segmenter, self.recipe)
        self.log(f"step {step}: {percentages(self.measured)}  {self.minutes:.1f} min")
        model.save_pretrained(self.directory)
        self.processor.save_pretrained(self.directory)
        record = {
            "recipe": to_table(self.recipe),
            "steps": step,
            "minutes": round(self.minutes, 1),
            "backend": self.backend,
            "threads": self.threads,
            "mean_iou": _rounded(self.measured),
            "untrained_mean_iou": _rounded(self.untrained),
            "majority_mean_iou": _rounded(self.majority),
        }
        path = self.directory / MEASURES_NAME
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def result(self) -> TrainResult:
        return TrainResult(
            self.directory, self.measured, self.untrained, self.majority, tuple(self.losses), self.minutes
        )


def make_processor(recipe: Recipe, captions: Sequence[str]) -> GroupViTProcessor:
    """A tokenizer learnt from captions and templates, and an image processor that keeps pictures of the trained size."""
    sentences = [template.format(caption) for template in recipe.scenes.templates for caption in captions[:2000]]
    tokenizer = CLIPTokenizer.train(sentences, recipe.model.vocab_size, model_max_length=recipe.model.text_length)
    side = recipe.model.image_size
    images = GroupViTImageProcessor(size={"height": side, "width": side}, crop_size={"height": side, "width": side})
    return GroupViTProcessor(images, tokenizer)


def measure(segmenter: Segmenter, recipe: Recipe) -> dict[int, float]:
    """Mean IoU in percent for each level of the recipe's held-out scenes, background left out of the mean.

    Measured as a user would get it: the level's classes with their synonyms are the labels, the names of the backgrounds are
    background labels.
    """
    return {
        level: 100.0 * mean_iou(scene_confusion(segmenter, held_out_scenes(recipe, level)), background=0)
        for level in recipe.scenes.levels
    }


def held_out_scenes(recipe: Recipe, level: int) -> list[Scene]:
    """The scenes of a level that the recipe never trains on."""
    size = (recipe.model.image_size, recipe.model.image_size)
    return [
        make_scene(recipe.scenes.held_out_seed, index, level, size) for index in range(recipe.scenes.held_out_scenes)
    ]


def majority_mean_iou(recipe: Recipe) -> dict[int, float]:
    """What `measure` would say of a model that calls every pixel of a level by its most frequent class."""
    result = {}
    for level in recipe.scenes.levels:
        masks = np.stack([scene.mask for scene in held_out_scenes(recipe, level)])
        classes = len(LEVELS[level]) + 1
        most = 1 + int(np.bincount(masks.ravel(), minlength=classes)[1:].argmax())
        confusion = confusion_matrix(masks, np.full_like(masks, most), classes, ignore_index=None)
        result[level] = 100.0 * mean_iou(confusion, background=0)
    return result


def scene_confusion(segmenter: Segmenter, scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """Confusion matrix of scenes of one level: rows the masks, columns what the segmenter says; 0 is background."""
    classes = LEVELS[scenes[0].level]
    segmenter.set_labels([Label(names[0], names[1:]) for names in classes], [Label(n[0], n[1:]) for n in BACKGROUNDS])
    confusion = np.zeros((len(classes) + 1,) * 2, np.int64)
    results = segmenter.iter(Image.fromarray(scene.image) for scene in scenes)
    for scene, result in zip(scenes, results, strict=True):
        confusion += confusion_matrix(scene.mask, result.label_map, len(classes) + 1, ignore_index=None)
    return confusion


def percentages(measured: Mapping[int, float]) -> str:
    return ", ".join(f"level {level} {value:.1f}" for level, value in measured.items()) + " (mean IoU, %)"


def _rounded(measured: Mapping[int, float]) -> dict[str, float]:
    return {str(level): round(value, 1) for level, value in measured.items()}
