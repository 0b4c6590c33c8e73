"""A first training loop: a recipe -> captioned scenes -> a checkpoint directory with its measured quality.

    groupvit train scenes-demo --out DIR

One process on the CPU, the whole set in memory. Everything is drawn from the recipe's seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from groupvit_common.data.captioned import Batch
from groupvit_common.postprocess import MAX_LOGIT_SCALE
from groupvit_common.processor import GroupViTProcessor
from groupvit_common.recipe import (
    Recipe,
    assigns_hard,
    decays,
    learning_rate_at,
    mean_decay_at,
    model_config,
    wave_positions,
)
from groupvit_common.training import Run, TrainResult
from groupvit_torch.data import tensor_batches
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
        recipe: settings, or what `groupvit_common.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        save_every: steps between checkpoints on the way; each replaces the last. They are evaluated on held-out scenes.
        log: receives one line at a time.

    Raises:
        InputError: an unknown name, or a directory that cannot be made.
        GroupViTError: the loss stopped being a number.
    """
    version = f"PyTorch {torch.__version__}"
    run = Run.begin(recipe, out_dir, seed=seed, log=log, backend=version, threads=torch.get_num_threads())
    recipe = run.recipe
    torch.manual_seed(recipe.run.seed)
    model = new_model(recipe, run.processor)
    run.measure_untrained(_segmenter(model, run.processor), model.num_parameters())

    mean_model = copy.deepcopy(model)
    optimiser = make_optimiser(model, recipe)
    for step, batch in enumerate(tensor_batches(run.batches())):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(recipe, step)
        run.took_step(train_step(model, optimiser, batch, recipe, hard=assigns_hard(recipe, step)))
        _average(mean_model, model, mean_decay_at(recipe, step))
        if (step + 1) % save_every == 0 or step + 1 == recipe.schedule.total_steps:
            run.save(mean_model, _segmenter(mean_model, run.processor))
    return run.result()


# The parts of a run


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """The untrained model of a recipe, drawn from PyTorch's generator."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)))
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        with torch.no_grad():
            model.vision_model.embeddings.position_embeddings.copy_(torch.from_numpy(waves))
    return model


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay where `decays` says so."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if decays(name, parameter.ndim) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.optimizer.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.optimizer.learning_rate, betas=recipe.optimizer.betas)


def train_step(
    model: GroupViTModel, optimiser: torch.optim.Optimizer, batch: Batch[Tensor], recipe: Recipe, hard: bool
) -> float:
    """One update; returns the loss."""
    model.train()
    with (
        _fast_attention(recipe.run.precision != "float32"),
        torch.autocast("cpu", torch.bfloat16, enabled=recipe.run.precision != "float32"),
    ):
        loss = (paper_objective if recipe.objective.kind == "paper" else groups_objective)(model, batch, recipe, hard)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
    return float(loss.detach())


def groups_objective(model: GroupViTModel, batch: Batch[Tensor], recipe: Recipe, hard: bool) -> Tensor:
    """Groups, and the patches before they are grouped, against the prompts of the batch (`groupvit_torch.loss`)."""
    with _before_grouping(model) as captured:
        vision = model.vision_model(
            batch.pixels,
            output_attentions=True,
            gumbel_noise=_noise(recipe),
            assign_hard=hard,
        )
    groups = model.visual_projection(vision.last_hidden_state.flatten(0, 1)).unflatten(0, (len(batch.pixels), -1))
    prompts = model.text_projection(model.text_model(**batch.prompts).pooler_output)
    whole = batch.named.any(dim=1)  # mixed images have lost parts of their objects: nothing is claimed there

    def loss(logits: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(logits, assignment)
        return recipe.objective.naming_weight * patch_naming_loss(
            naming, batch.allowed
        ) + recipe.objective.claim_weight * prompt_claim_loss(
            naming[whole], batch.named[whole], recipe.objective.claim_patches
        )

    patches = (
        _project(model.visual_projection, model.vision_model.layernorm(captured[0]))
        if recipe.objective.ungrouped_weight
        else None
    )
    with torch.autocast("cpu", enabled=False):
        scale = model.logit_scale.exp()
        total = loss(group_prompt_logits(groups, prompts, scale), vision.attentions[0])
        if patches is not None:
            total = total + recipe.objective.ungrouped_weight * loss(group_prompt_logits(patches, prompts, scale), None)
        return total


def _noise(recipe: Recipe) -> list[Tensor] | None:
    """The noise of the recipe's one grouping block: None, which draws the paper's, or zeros for none at all."""
    return None if recipe.objective.gumbel else [torch.zeros(1, 1, 1)]


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


def paper_objective(model: GroupViTModel, batch: Batch[Tensor], recipe: Recipe, hard: bool) -> Tensor:
    """The paper's two losses on the pooled image."""
    assert batch.captions is not None
    assert batch.of_caption is not None
    vision = model.vision_model(batch.pixels, gumbel_noise=_noise(recipe), assign_hard=hard)
    images = model.visual_projection(vision.pooler_output)
    texts = model.text_projection(model.text_model(**batch.captions).pooler_output)
    prompts = model.text_projection(model.text_model(**batch.prompts).pooler_output)
    scale = model.logit_scale.exp()
    with torch.autocast("cpu", enabled=False):
        return contrastive_loss(images, texts, scale) + multi_label_contrastive_loss(
            images, prompts[batch.of_caption], scale
        )


def _segmenter(model: GroupViTModel, processor: GroupViTProcessor) -> Segmenter:
    return Segmenter(model, processor, batch_size=50)


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
