"""Starts a training run: anew, from a checkpoint's weights, or where an earlier process stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.hub import resolve
from groupvit_common.data.scenes import Scene, make_scene
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import PROCESSOR_FILES, GroupViTProcessor, missing_parts
from groupvit_common.preprocessing.tokenizer import CLIPTokenizerFast
from groupvit_common.storage.locks import FolderLock
from groupvit_common.storage.saving import write_files, write_text
from groupvit_common.training.checkpoints import find, load
from groupvit_common.training.initial_model import with_checkpoint_model
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import Run
from groupvit_common.training.scene_batches import TrainingScenes
from groupvit_common.training.settings import changed, read_settings, to_table, to_toml
from groupvit_common.training.validation import Evaluate, Validation

RECIPE_NAME = "recipe.toml"
LOCK_NAME = ".training.lock"

FROM_SCRATCH = 5e-4
"""Learning rates above this are for training from scratch."""

_FINETUNE_RATE = 1.6e-5  # the recipe finetune's
_TOKENIZER_CAPTIONS = 2000  # that a tokenizer is trained on


def start_run(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    log: Callable[[str], None] = print,
    backend: str = "",
    threads: int = 0,
    rank: int = 0,
    world: int = 1,
    resume: str | Path = "never",
    evaluate: Evaluate | None = None,
) -> Run:
    """Makes the folder and the processor, and finds the checkpoint to resume. Locks the folder until `Run.close`.

    Args:
        recipe: settings, or what `get_recipe` takes.
        seed: replaces the recipe's.
        backend, threads: name and version of the framework and its number of threads, for `training.json`.
        resume: "never"; "auto", from the newest valid checkpoint in the folder if there is one; or a checkpoint's path.
        evaluate: measures the model, besides validation scenes and the recipe's sets.

    Raises:
        InputError: an unknown recipe, a folder that cannot be made, one in which another training writes, one with an
            unfinished run that is not to be resumed, a segmentation set that is not there.
        CheckpointError: a checkpoint that cannot be resumed, a tokenizer or model to start from that cannot be found.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else changed(recipe, {"run.seed": seed})
    log = log if rank == 0 else lambda line: None
    if recipe.schedule.batch_size % world:
        raise InputError(
            "schedule.batch_size must be a multiple of the number of processes, "
            f"got {recipe.schedule.batch_size} for {world}"
        )
    if recipe.model.init_from:
        recipe = with_checkpoint_model(recipe, GroupViTConfig.from_pretrained(recipe.model.init_from))
    validation = Validation(recipe, evaluate, log)
    if recipe.data is None:
        for level in recipe.scenes.levels:  # a size that scenes cannot have is refused before there is a folder
            make_scene(recipe.run.seed, 0, level, (recipe.scene_size, recipe.scene_size))
    directory, started = Path(out_dir), time.monotonic()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory} for the model: {error}") from error
    # The first process locks for all.
    lock = FolderLock(directory, LOCK_NAME, "training", log) if rank == 0 else None
    try:
        path = find(directory, resume, log=log)
        scenes = training_scenes(recipe) if recipe.data is None else {}
        processor = start_processor(recipe, scenes)
        run = Run(
            recipe,
            directory,
            processor,
            validation,
            log,
            started,
            scenes=scenes,
            backend=backend,
            threads=threads,
            rank=rank,
            world=world,
            lock=lock,
        )
        if path is not None:
            _resume(run, path)
        elif is_too_fast(recipe):
            log(
                f"optimizer.learning_rate {recipe.optimizer.learning_rate:g} is for training from scratch, and this "
                f"run starts from {recipe.model.init_from}: its training may be undone; the recipe finetune has "
                f"{_FINETUNE_RATE:g}"
            )
        if rank == 0:
            run.checkpoints.clean()
            if path is None:
                run.checkpoints.clear()
            write_files(directory, {RECIPE_NAME: lambda file: write_text(file, to_toml(recipe))})
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return run


def is_too_fast(recipe: Recipe) -> bool:
    """Returns whether a run starts from a checkpoint with a learning rate that soon undoes the checkpoint's
    training."""
    return bool(recipe.model.init_from) and recipe.optimizer.learning_rate > FROM_SCRATCH


def training_scenes(recipe: Recipe) -> dict[int, TrainingScenes]:
    """Returns level -> its training scenes."""
    settings, side = recipe.scenes, recipe.scene_size
    shares = {"single_share": settings.single_share, "close_up_share": settings.close_up_share}

    def make(level: int, number: int) -> Scene:
        return make_scene(recipe.run.seed, number, level, (side, side), **shares)

    return {
        level: TrainingScenes(partial(make, level), settings.scenes_per_level, level, side) for level in settings.levels
    }


def first_captions(scenes: Mapping[int, TrainingScenes], count: int) -> list[str]:
    """Returns the first `count` captions of all levels together, the first level's first."""
    captions: list[str] = []
    for level in scenes.values():
        captions += level.take(range(min(count - len(captions), len(level))))[1]
    return captions


# Resuming


def _resume(run: Run, path: Path) -> None:
    """Brings a run to the step of a checkpoint; reports settings that have changed since."""
    run.resumed, run.resumed_from = load(path), path
    values = run.resumed.values
    run.step, run.bad_steps = run.resumed.step, values["bad_steps"]
    run.started -= 60 * values["minutes"]
    run.validation.untrained, run.validation.scenes = (
        {int(level): math.nan if value is None else value for level, value in values[name].items()}
        for name in ("untrained", "measured")
    )
    run.log(f"resuming from {path} at step {run.step}")
    for name, old, new in _differences(_with_new_defaults(values["recipe"]), to_table(run.recipe)):
        run.log(f"{name} was {old!r} before, now {new!r}")


def _with_new_defaults(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a checkpoint's recipe with the defaults of settings added since; unchanged if it has settings that are
    gone."""
    try:
        return to_table(read_settings(Recipe, table))
    except InputError:
        return table


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other


# The processor


def start_processor(recipe: Recipe, scenes: Mapping[int, TrainingScenes]) -> GroupViTProcessor:
    """Returns the processor of a run: of the checkpoint or tokenizer that the recipe names, else one trained on scenes.

    Its images have the recipe's size.
    """
    settings = recipe.model
    if not (settings.init_from or settings.tokenizer):
        if recipe.data is not None:
            raise InputError(
                "model.tokenizer is empty, and a tokenizer is trained only on synthetic scenes; name one, such as "
                '"nvidia/groupvit-gcc-yfcc"'
            )
        return make_processor(recipe, first_captions(scenes, _TOKENIZER_CAPTIONS))
    processor = _named_processor(settings.init_from, settings.tokenizer)
    if not settings.init_from:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, settings.text_length)
    images, side = processor.image_processor, settings.image_size
    if images.crop_size != {"height": side, "width": side}:
        size = {"height": side, "width": side} if "height" in images.size else {"shortest_edge": side}
        given = {**images.to_dict(), "size": size, "crop_size": {"height": side, "width": side}}
        processor.image_processor = GroupViTImageProcessor.from_dict(given)
    return processor


def make_processor(recipe: Recipe, captions: Sequence[str]) -> GroupViTProcessor:
    """Returns a tokenizer trained on captions and templates, and an image processor for the recipe's image size."""
    sentences = [t.format(caption) for t in recipe.scenes.templates for caption in captions]
    tokenizer = CLIPTokenizerFast.train(sentences, recipe.model.vocab_size, model_max_length=recipe.model.text_length)
    side = {"height": recipe.model.image_size, "width": recipe.model.image_size}
    return GroupViTProcessor(GroupViTImageProcessor(size=side, crop_size=side), tokenizer)


def _named_processor(init_from: str, tokenizer: str) -> GroupViTProcessor:
    """Returns that of the checkpoint to start from or, where it has none or none is named, of `model.tokenizer`."""
    lacking = ""
    if init_from:
        directory = resolve(init_from, patterns=(CONFIG_NAME, *PROCESSOR_FILES))
        if not (lacking := missing_parts(directory)):
            return GroupViTProcessor.from_pretrained(directory)
    remedy = (
        "name a folder or a model on the hub that has a tokenizer and an image processor in the setting model.tokenizer"
    )
    if lacking and not tokenizer:
        raise CheckpointError(f"{init_from} has {lacking}: {remedy}")
    try:
        return GroupViTProcessor.from_pretrained(tokenizer)
    except CheckpointError as error:
        lacking = f"{init_from} has {lacking}, and " if lacking else ""
        raise CheckpointError(f"{lacking}model.tokenizer cannot be used ({error}): {remedy}") from error
