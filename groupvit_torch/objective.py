"""The training objective: the model a recipe starts from, and its loss in three steps.

`encode` takes images and texts one by one through the towers, `embed` projects the features of a whole batch,
`compute_loss` compares the embeddings of all ranks. `groupvit_tf.objective` is cut at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.training.initial_model import (
    model_config,
    multi_label_scale,
    segmentation_assignment,
    trainable_names,
    wave_positions,
)
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.schedule import drop_path_rates
from groupvit_torch.data import Inputs, Tokens
from groupvit_torch.distributed import gather, num_replicas, project, replica_sum
from groupvit_torch.layers import EncoderLayer
from groupvit_torch.loss import (
    contrastive_loss,
    group_prompt_logits,
    multi_label_contrastive_loss,
    patch_naming,
    patch_naming_loss,
    prompt_claim_loss,
)
from groupvit_torch.model import GroupViTModel
from groupvit_torch.text import without_padding

Features = dict[str, Tensor]


# The model at the start


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """Returns the untrained model of a recipe, drawn from PyTorch's generator."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)))
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        with torch.no_grad():
            model.vision_model.embeddings.position_embeddings.copy_(torch.from_numpy(waves))
    return model


def start_model(recipe: Recipe, processor: GroupViTProcessor) -> tuple[GroupViTModel, float | None]:
    """Returns the model a run starts with, and the multi-label temperature of the checkpoint it comes from, if any."""
    source = recipe.model.init_from
    if not source:
        return new_model(recipe, processor), None
    model = GroupViTModel.from_pretrained(source)
    model.config.update({"segmentation_assignment": segmentation_assignment(recipe)})
    return resize_model(model, recipe.model.image_size), multi_label_scale(source)


@torch.no_grad()
def resize_model(model: GroupViTModel, image_size: int) -> GroupViTModel:
    """Returns the model for another image size, its position embeddings interpolated; itself if the size is its own."""
    settings = model.config.to_dict()
    if settings["vision_config"]["image_size"] == image_size:
        return model
    settings["vision_config"]["image_size"] = image_size
    resized = GroupViTModel(GroupViTConfig.from_dict(settings))
    state, side = model.state_dict(), image_size // model.config.vision_config.patch_size
    state["vision_model.embeddings.position_embeddings"] = model.vision_model.embeddings.positions(side, side)
    resized.load_state_dict(state)
    return resized.eval()


# The objective


class Replay(NamedTuple):
    """Rows of one tower that are encoded again, with the loss's gradients with respect to their features.

    touch: every parameter receives a gradient, zeros if need be, which data-parallel training waits for.
    """

    kind: str
    rows: Tensor | Tokens
    gradients: Mapping[str, Tensor]
    touch: bool


class Objective(nn.Module):
    """A model and what a recipe trains it for.

    Args:
        multi_label_scale: logarithm of the multi-label loss's own temperature factor at the start; None: that of the
            model.
    """

    def __init__(self, model: GroupViTModel, recipe: Recipe, multi_label_scale: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.multi_label_logit_scale: nn.Parameter | None = None
        if recipe.multi_label:
            start = float(model.logit_scale.detach()) if multi_label_scale is None else multi_label_scale
            self.multi_label_logit_scale = nn.Parameter(torch.tensor(start, device=model.device, dtype=model.dtype))
        layers = [layer for stage in model.vision_model.encoder.stages for layer in cast(Any, stage).layers]
        for layer, rate in zip(layers, drop_path_rates(recipe, len(layers)), strict=True):
            cast(EncoderLayer, layer).drop_path = rate
        if recipe.run.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        named = {name.removeprefix("model."): parameter for name, parameter in self.named_parameters()}
        wanted = trainable_names(named, recipe.model)
        for name, parameter in named.items():
            parameter.requires_grad_(name in wanted)

    def named_variables(self) -> dict[str, Tensor]:
        """Returns the tensors by the names of a checkpoint's files."""
        return {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by canonical name."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> Objective:
        """As `nn.Module.train`, but a batch norm with no trainable parameter keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def forward(
        self, inputs: Inputs | None, hard: bool, replay: Replay | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the loss of a batch, and the soft assignments of its images.

        With `replay` instead of inputs, a scalar whose gradients are those of the loss that flow through the replayed
        rows.
        """
        if replay is not None:
            return self._surrogate(replay, hard), ()
        assert inputs is not None
        features: Features = {}
        assignments: tuple[Tensor, ...] = ()
        for kind, rows in self.rows(inputs).items():
            found, own = self.encode(kind, rows, hard)
            features |= found
            assignments = assignments or own
        return self.compute_loss(self.embed(features, inputs), inputs), assignments

    def _surrogate(self, replay: Replay, hard: bool) -> Tensor:
        features, _ = self.encode(replay.kind, replay.rows, hard)
        parts = [
            (features[name] * gradient).sum(dtype=torch.promote_types(gradient.dtype, torch.float32))
            for name, gradient in replay.gradients.items()
            if features[name].requires_grad
        ]
        if replay.touch:
            parts += [parameter.sum() * 0.0 for parameter in self.parameters() if parameter.requires_grad]
        return sum(parts, torch.zeros((), device=self.model.device))

    def rows(self, inputs: Inputs) -> dict[str, Tensor | Tokens]:
        """Returns the towers' inputs: "images" `[B, 3, H, W]`, tokens `[N, T]` of "captions" and "prompts" if used."""
        rows: dict[str, Tensor | Tokens] = {"images": inputs.pixels}
        if inputs.captions is not None:
            rows["captions"] = inputs.captions
        if inputs.prompts is not None and self.recipe.needs_prompts:
            rows["prompts"] = inputs.prompts
        return rows

    def encode(self, kind: str, rows: Tensor | Tokens, hard: bool) -> tuple[Features, tuple[Tensor, ...]]:
        """Takes rows of one kind through their tower.

        Returns:
            The features before the projections. Images: `images` `[B, D]`, or for the objective "groups": `groups`
            `[B, G, D]`, `assignment` `[B, G, P]`, `patches` `[B, P, D]`, and `images` for the paper's losses. Texts:
            `captions` or `prompts` `[N, D]`. And the soft assignments of images.
        """
        with self.precision():
            if kind != "images":
                return {kind: self._encode_texts(cast(Tokens, rows))}, ()
            tower, objective = self.model.vision_model, self.recipe.objective
            noise = None if objective.gumbel else _no_noise(self.model)
            _, stages = tower.run_stages(cast(Tensor, rows), gumbel_noise=noise, assign_hard=hard)
            groups = tower.layernorm(stages[-1].segments)
            assignments = tuple(stage.assignment for stage in stages if stage.assignment is not None)
            features = {"images": groups.mean(dim=1)} if objective.has_paper_losses else {}
            if objective.kind == "paper":
                return features, assignments
            features |= {"groups": groups, "assignment": assignments[0]}
            if objective.ungrouped_weight:
                features["patches"] = tower.layernorm(stages[0].ungrouped)
            return features, assignments

    def _encode_texts(self, tokens: Tokens) -> Tensor:
        tower = self.model.text_model
        texts: tuple[Tensor, Tensor | None] = (tokens["input_ids"], tokens["attention_mask"])
        # A GPU would wait for the ids, and a compiler make a program for each length.
        if texts[0].device.type == "cpu" and not self.recipe.run.compile:
            texts = without_padding(tower.config, *texts, only_pooled=True)[:2]
        return cast(Tensor, tower(*texts, return_dict=True).pooler_output)

    def embed(self, features: Features, inputs: Inputs) -> Features:
        """Returns the embeddings of a whole batch from the features of all its rows."""
        project = _paper_embeddings if self.recipe.objective.kind == "paper" else _groups_embeddings
        with self.precision():
            return project(self.model, features, inputs, self.recipe)

    def compute_loss(self, embeddings: Features, inputs: Inputs) -> Tensor:
        """Returns the recipe's loss of a batch: the mean over ranks is the loss of the global batch."""
        with torch.autocast(self.model.device.type, enabled=False):
            own = self.multi_label_logit_scale
            objective = self.recipe.objective
            if objective.kind == "paper":
                scale = self.model.logit_scale.exp()
                return paper_objective(embeddings, inputs, scale, None if own is None else own.exp(), self.recipe)
            loss = groups_objective(embeddings, inputs, self.model.logit_scale.exp(), self.recipe)
            if objective.paper_weight:
                # A temperature of their own, since the model's is that of groups.
                scale = (self.model.logit_scale if own is None else own).exp()
                own_scale, first = None if own is None else own.exp(), self.recipe.mixed_images
                paper = paper_objective(embeddings, inputs, scale, own_scale, self.recipe, first=first)
                loss = loss + objective.paper_weight * paper
            return loss

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Computes in the recipe's precision. One context a pass: autocast reuses weights cast without gradients."""
        device, precision = self.model.device.type, self.recipe.run.precision
        if precision == "float32":
            yield
            return
        with torch.autocast(device, getattr(torch, precision)):
            yield

    @torch.no_grad()
    def limit_scales(self) -> None:
        """Clips both temperatures' factors to 100, as the authors' code does. Called after each step."""
        for scale in (self.model.logit_scale, self.multi_label_logit_scale):
            if scale is not None:
                scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _no_noise(model: GroupViTModel) -> list[Tensor]:
    """Returns zeros for each grouping block: None would draw the paper's noise."""
    blocks = sum(count > 0 for count in model.config.vision_config.num_group_tokens)
    return [torch.zeros(1, 1, 1, device=model.device)] * blocks


# Embeddings


def _groups_embeddings(model: GroupViTModel, features: Features, inputs: Inputs, recipe: Recipe) -> Features:
    """Returns groups `[B, G, E]`, soft assignment `[B, G, P]`, prompts `[W, E]`; if used, ungrouped patches
    `[B, P, E]`, and images and captions `[B, E]` for the paper's losses."""
    embeddings = {
        "groups": _projected(model, features["groups"]),
        "assignment": features["assignment"],
        "prompts": project(model.text_projection, features["prompts"], together=False),
    }
    # Batch norms keep nothing but groups and prompts, which is all that they meet in use.
    if recipe.objective.ungrouped_weight:
        embeddings["patches"] = _projected(model, features["patches"], keep=False)
    if recipe.objective.paper_weight:
        embeddings["images"] = project(model.visual_projection, features["images"], keep=False)
        embeddings["captions"] = project(model.text_projection, features["captions"], keep=False)
    return embeddings


def _projected(model: GroupViTModel, states: Tensor, keep: bool = True) -> Tensor:
    """`[B, P, D]` -> `[B, P, E]`."""
    return project(model.visual_projection, states.flatten(0, 1), keep=keep).unflatten(0, states.shape[:2])


def _paper_embeddings(model: GroupViTModel, features: Features, inputs: Inputs, recipe: Recipe) -> Features:
    """Returns images and captions `[B, E]`, and prompts `[W, E]`."""
    captions = features["captions"]
    embeddings = {"images": project(model.visual_projection, features["images"])}
    if not recipe.needs_prompts:
        return embeddings | {"captions": project(model.text_projection, captions)}
    if inputs.shared_prompts:
        embeddings["captions"] = project(model.text_projection, captions)
        return embeddings | {"prompts": project(model.text_projection, features["prompts"], together=False)}
    # Captions and prompts are one batch of texts, as in the authors' code.
    count = len(captions)
    texts = project(model.text_projection, torch.cat([captions, features["prompts"]]))
    return embeddings | {"captions": texts[:count], "prompts": texts[count:]}


# Losses of embeddings


def groups_objective(embeddings: Features, inputs: Inputs, logit_scale: Tensor, recipe: Recipe) -> Tensor:
    """Compares groups, and the patches before they are grouped, with the prompts of the batch (`groupvit_torch.loss`).

    The mean over ranks is the loss of the global batch.
    """
    settings = recipe.objective
    assert inputs.named is not None
    assert inputs.allowed is not None
    named, allowed = inputs.named, inputs.allowed
    whole = named.any(dim=1)  # mixed images have lost parts of their objects: nothing is claimed there
    claims = named[whole]
    # A claim counts as much on every rank, wherever there are more of them.
    share: float | Tensor = 1.0
    if num_replicas() > 1:
        count = claims.sum().to(torch.promote_types(embeddings["groups"].dtype, torch.float32))
        share = count * num_replicas() / replica_sum(count).clamp(min=1)

    def loss(embeds: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(group_prompt_logits(embeds, embeddings["prompts"], logit_scale), assignment)
        claim = prompt_claim_loss(naming[whole], claims, settings.claim_patches)
        return settings.naming_weight * patch_naming_loss(naming, allowed) + settings.claim_weight * share * claim

    total = loss(embeddings["groups"], embeddings["assignment"])
    if settings.ungrouped_weight:
        total = total + settings.ungrouped_weight * loss(embeddings["patches"], None)
    return total


def paper_objective(
    embeddings: Features,
    inputs: Inputs,
    logit_scale: Tensor,
    multi_label_scale: Tensor | None,
    recipe: Recipe,
    *,
    first: int = 0,
) -> Tensor:
    """Computes the paper's two losses on the pooled image, over all ranks; the second one if it has a temperature.

    Args:
        first: of the global batch, how many images to leave out.
    """
    images, captions = gather(embeddings["images"])[first:], gather(embeddings["captions"])[first:]
    loss = contrastive_loss(images, captions, logit_scale)
    if multi_label_scale is None:
        return loss
    own = gather(embeddings["prompts"][inputs.of_caption])[first:]  # [B, M, E]
    return loss + recipe.objective.multi_label_weight * multi_label_contrastive_loss(images, own, multi_label_scale)
