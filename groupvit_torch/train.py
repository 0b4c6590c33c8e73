"""A first training loop: a recipe -> captioned scenes -> a checkpoint directory with its measured quality.

    groupvit train scenes-demo --out DIR

One process on the CPU, the whole set in memory. Everything is drawn from the recipe's seed.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene
from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.image_processor import GroupViTImageProcessor
from groupvit_common.metrics import confusion_matrix, mean_iou
from groupvit_common.postprocess import MAX_LOGIT_SCALE
from groupvit_common.processor import GroupViTProcessor
from groupvit_common.prompts import Label
from groupvit_common.recipe import (
    Recipe,
    assigns_hard,
    decays,
    get_recipe,
    learning_rate_at,
    model_config,
    wave_positions,
)
from groupvit_common.tokenizer import CLIPTokenizer
from groupvit_torch.data import CaptionedImages, mix_halves, to_pixels
from groupvit_torch.loss import (
    contrastive_loss,
    group_prompt_logits,
    multi_label_contrastive_loss,
    patch_naming,
    patch_naming_loss,
    prompt_claim_loss,
)
from groupvit_torch.model import GroupViTModel
from groupvit_torch.predictor import Segmenter
from groupvit_torch.vision import Stage

TEXT_LENGTH = 32  # tokens: room for the longest caption of a scene
MEASURES_NAME = "training.json"


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


def train(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    save_every: int = 2500,
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes it to `out_dir`: weights, configuration, tokenizer, processor, `training.json`.

    Args:
        recipe: settings, or the name of a run in `groupvit_common.recipe.RECIPES`.
        seed: replaces the recipe's.
        save_every: steps between checkpoints on the way; each replaces the last. They are evaluated on held-out scenes.
        log: receives one line at a time.

    Raises:
        InputError: an unknown name, or a directory that cannot be made.
        GroupViTError: the loss stopped being a number.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    directory = Path(out_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory} for the model: {error}") from error

    start = time.monotonic()
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    log(f"making {recipe.scenes_per_level} scenes for each of the levels {', '.join(map(str, recipe.levels))}")
    pictures = {
        level: CaptionedImages.scenes(recipe.seed, recipe.scenes_per_level, level, recipe.image_size)
        for level in recipe.levels
    }
    processor = make_processor(recipe, [caption for level in recipe.levels for caption in pictures[level].captions])
    model = new_model(recipe, processor)
    untrained = evaluate(model.eval(), processor, recipe)
    log(f"{model.num_parameters() / 1e6:.2f} million parameters; untrained: {_percentages(untrained)}")

    mean_model = copy.deepcopy(model)
    optimiser = make_optimiser(model, recipe)
    losses: list[float] = []
    measured, majority = untrained, majority_mean_iou(recipe)
    for step, batch in enumerate(_batches(recipe, pictures, processor, rng)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(recipe, step)
        losses.append(train_step(model, optimiser, batch, recipe, hard=assigns_hard(recipe, step)))
        if not math.isfinite(losses[-1]):
            raise GroupViTError(
                f"the loss is {losses[-1]} at step {step + 1}: try a lower learning_rate than {recipe.learning_rate:g} or "
                f"bfloat16=False; what {directory} holds is from before"
            )
        _average(mean_model, model, min(recipe.ema_decay, step / (step + 10)))
        if (step + 1) % 100 == 0:
            minutes = (time.monotonic() - start) / 60
            log(f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-100:]):.3f}  {minutes:.1f} min")
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            measured = evaluate(mean_model, processor, recipe)
            minutes = (time.monotonic() - start) / 60
            log(f"step {step + 1}: {_percentages(measured)}  {minutes:.1f} min")
            mean_model.save_pretrained(directory)
            processor.save_pretrained(directory)
            _write_measures(directory / MEASURES_NAME, recipe, step + 1, measured, untrained, majority, minutes)
    return TrainResult(directory, measured, untrained, majority, tuple(losses), (time.monotonic() - start) / 60)


# The parts of a run


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step sees. B images, P patches, W the batch's different prompts.

    pixels: `[B, 3, H, W]`, possibly mixed; allowed: bool `[B, P, W]`, the words of each patch's caption; named: bool
    `[B, W]`, the words of each unmixed image's caption (no word where it is mixed); prompts: their tokens; captions: the
    tokens of the whole sentences; of_caption: `[B, M]`, M prompts of each caption. The last two only for the paper's losses.
    """

    pixels: Tensor
    allowed: Tensor
    named: Tensor
    prompts: Mapping[str, Tensor]
    captions: Mapping[str, Tensor] | None = None
    of_caption: Tensor | None = None


def make_processor(recipe: Recipe, captions: Sequence[str]) -> GroupViTProcessor:
    """A tokenizer learnt from captions and templates, and an image processor that keeps pictures of the trained size."""
    sentences = [template.format(caption) for template in recipe.templates for caption in captions[:2000]]
    tokenizer = CLIPTokenizer.train(sentences, recipe.vocab_size, model_max_length=TEXT_LENGTH)
    side = recipe.image_size
    images = GroupViTImageProcessor(size={"height": side, "width": side}, crop_size={"height": side, "width": side})
    return GroupViTProcessor(images, tokenizer)


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """The untrained model of a recipe, drawn from PyTorch's generator."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer), TEXT_LENGTH))
    if recipe.position_amplitude:
        waves = wave_positions(recipe.image_size // recipe.patch_size, recipe.width, recipe.position_amplitude)
        with torch.no_grad():
            model.vision_model.embeddings.position_embeddings.copy_(torch.from_numpy(waves))
    return model


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay where `decays` says so."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if decays(name, parameter.ndim) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def train_step(
    model: GroupViTModel, optimiser: torch.optim.Optimizer, batch: Batch, recipe: Recipe, hard: bool
) -> float:
    """One update; returns the loss."""
    model.train()
    with _fast_attention(recipe.bfloat16), torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
        loss = (paper_objective if recipe.objective == "paper" else groups_objective)(model, batch, recipe, hard)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
    return float(loss.detach())


def groups_objective(model: GroupViTModel, batch: Batch, recipe: Recipe, hard: bool) -> Tensor:
    """Groups, and the patches before they are grouped, against the prompts of the batch (`groupvit_torch.loss`)."""
    with _before_grouping(model) as captured:
        vision = model.vision_model(
            batch.pixels,
            output_attentions=True,
            gumbel_noise=None if recipe.gumbel else [torch.zeros(1, 1, 1)],
            assign_hard=hard,
        )
    groups = model.visual_projection(vision.last_hidden_state.flatten(0, 1)).unflatten(0, (len(batch.pixels), -1))
    prompts = model.text_projection(model.text_model(**batch.prompts).pooler_output)
    whole = batch.named.any(dim=1)  # mixed images have lost parts of their objects: nothing is claimed there

    def loss(logits: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(logits, assignment)
        return recipe.naming_weight * patch_naming_loss(
            naming, batch.allowed
        ) + recipe.claim_weight * prompt_claim_loss(naming[whole], batch.named[whole], recipe.claim_patches)

    patches = (
        _project(model.visual_projection, model.vision_model.layernorm(captured[0]))
        if recipe.ungrouped_weight
        else None
    )
    with torch.autocast("cpu", enabled=False):
        scale = model.logit_scale.exp()
        total = loss(group_prompt_logits(groups, prompts, scale), vision.attentions[0].float())
        if patches is not None:
            total = total + recipe.ungrouped_weight * loss(group_prompt_logits(patches, prompts, scale), None)
        return total


@contextmanager
def _before_grouping(model: GroupViTModel) -> Iterator[list[Tensor]]:
    """Collects the segments `[B, P, D]` that enter the first grouping block."""
    captured: list[Tensor] = []
    stage = cast(Stage, model.vision_model.encoder.stages[0])
    assert stage.downsample is not None, "a recipe's model groups in its first stage"
    hook = stage.downsample.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        hook.remove()


def _project(projection: nn.Sequential, x: Tensor) -> Tensor:
    """`[B, P, D]` -> `[B, P, E]` with the batch's own statistics, which batch norm does not keep: in use it only meets groups."""
    first, norm, activation, last = projection
    assert isinstance(norm, nn.BatchNorm1d)
    hidden = first(x).flatten(0, 1)
    hidden = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return last(activation(hidden)).unflatten(0, x.shape[:2])


def paper_objective(model: GroupViTModel, batch: Batch, recipe: Recipe, hard: bool) -> Tensor:
    """The paper's two losses on the pooled image."""
    assert batch.captions is not None
    assert batch.of_caption is not None
    noise = None if recipe.gumbel else [torch.zeros(1, 1, 1)]
    vision = model.vision_model(batch.pixels, gumbel_noise=noise, assign_hard=hard)
    images = model.visual_projection(vision.pooler_output)
    texts = model.text_projection(model.text_model(**batch.captions).pooler_output)
    prompts = model.text_projection(model.text_model(**batch.prompts).pooler_output)
    scale = model.logit_scale.exp()
    with torch.autocast("cpu", enabled=False):
        return contrastive_loss(images, texts, scale) + multi_label_contrastive_loss(
            images, prompts[batch.of_caption], scale
        )


def evaluate(model: GroupViTModel, processor: GroupViTProcessor, recipe: Recipe) -> dict[int, float]:
    """Mean IoU in percent for each level of the recipe's held-out scenes, background left out of the mean.

    Measured through `Segmenter`, as a user would get it: the level's classes with their synonyms are the labels, the names of
    the backgrounds are background labels.
    """
    segmenter = Segmenter(model, processor, batch_size=50)
    return {
        level: 100.0 * mean_iou(scene_confusion(segmenter, held_out_scenes(recipe, level)), background=0)
        for level in recipe.levels
    }


def held_out_scenes(recipe: Recipe, level: int) -> list[Scene]:
    """The scenes of a level that the recipe never trains on."""
    size = (recipe.image_size, recipe.image_size)
    return [make_scene(recipe.held_out_seed, index, level, size) for index in range(recipe.held_out_scenes)]


def majority_mean_iou(recipe: Recipe) -> dict[int, float]:
    """What `evaluate` would say of a model that calls every pixel of a level by its most frequent class."""
    result = {}
    for level in recipe.levels:
        masks = np.stack([scene.mask for scene in held_out_scenes(recipe, level)])
        classes = len(LEVELS[level]) + 1
        most = 1 + int(np.bincount(masks.ravel(), minlength=classes)[1:].argmax())
        confusion = confusion_matrix(masks, np.full_like(masks, most), classes, ignore_index=None)
        result[level] = 100.0 * mean_iou(confusion, background=0)
    return result


def scene_confusion(segmenter: Segmenter, scenes: Sequence[Scene]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Confusion matrix of scenes of one level: rows the masks, columns what the segmenter says; 0 is background."""
    classes = LEVELS[scenes[0].level]
    segmenter.set_labels([Label(names[0], names[1:]) for names in classes], [Label(n[0], n[1:]) for n in BACKGROUNDS])
    confusion = np.zeros((len(classes) + 1,) * 2, np.int64)
    results = segmenter.iter(Image.fromarray(scene.image) for scene in scenes)
    for scene, result in zip(scenes, results, strict=True):
        confusion += confusion_matrix(scene.mask, result.label_map, len(classes) + 1, ignore_index=None)
    return confusion


def _batches(
    recipe: Recipe, pictures: Mapping[int, CaptionedImages], processor: GroupViTProcessor, rng: np.random.Generator
) -> Iterator[Batch]:
    """The batches of a run: levels in turn, so that words of other levels are never taken for wrong answers."""
    images = processor.image_processor

    def tokens(texts: Sequence[str]) -> Mapping[str, Tensor]:
        encoded: Mapping[str, Tensor] = processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return encoded

    prompts = {
        (level, template): tokens([template.format(word) for word in pictures[level].words])
        for level in recipe.levels
        for template in recipe.templates
    }
    for step in range(recipe.steps):
        level = recipe.turns[step % len(recipe.turns)]
        batch_images, numbers = pictures[level].draw(rng, recipe.batch_size)
        pixels = to_pixels(batch_images, images.image_mean, images.image_std)
        named = torch.from_numpy(pictures[level].named[numbers])
        template = recipe.templates[int(rng.integers(len(recipe.templates)))]
        present = named.any(dim=0)
        named = named[:, present]
        words = {key: value[present] for key, value in prompts[level, template].items()}
        if recipe.objective == "paper":
            captions = tokens([pictures[level].captions[number] for number in numbers])
            chances = named.float()
            of_caption = torch.multinomial(chances, min(recipe.paper_prompts, int(chances.sum(dim=1).min())))
            yield Batch(pixels, named[:, None], named, words, captions, of_caption)
        else:
            pixels, allowed = mix_halves(pixels, named, recipe.mixed_share, recipe.patch_size, rng)
            named = named.clone()
            named[: int(recipe.batch_size * recipe.mixed_share)] = False
            yield Batch(pixels, allowed, named, words)


@contextmanager
def _fast_attention(bfloat16: bool) -> Iterator[None]:
    """Plain attention in bfloat16: for 288 tokens on a CPU, half the time of the fused kernel, forward and backward."""
    if not bfloat16:
        yield
        return
    switch = torch.backends.cuda
    before = switch.fp16_bf16_reduction_math_sdp_allowed()
    switch.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        switch.allow_fp16_bf16_reduction_math_sdp(before)


@torch.no_grad()
def _average(mean_model: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the mean of the weights (and of batch norm's statistics) towards the model's."""
    means, values = mean_model.state_dict(), model.state_dict()
    floating = [name for name, value in values.items() if value.is_floating_point()]
    torch._foreach_lerp_([means[name] for name in floating], [values[name] for name in floating], 1.0 - decay)


def _percentages(measured: Mapping[int, float]) -> str:
    return ", ".join(f"level {level} {value:.1f}" for level, value in measured.items()) + " (mean IoU, %)"


def _write_measures(
    path: Path,
    recipe: Recipe,
    step: int,
    measured: Mapping[int, float],
    untrained: Mapping[int, float],
    majority: Mapping[int, float],
    minutes: float,
) -> None:
    record = {
        "recipe": asdict(recipe),
        "steps": step,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "mean_iou": {str(level): round(value, 1) for level, value in measured.items()},
        "untrained_mean_iou": {str(level): round(value, 1) for level, value in untrained.items()},
        "majority_mean_iou": {str(level): round(value, 1) for level, value in majority.items()},
    }
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
