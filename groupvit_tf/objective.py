"""The training objective: the model a recipe starts from, and its loss in three steps.

`encode` takes images and texts one by one through the towers, `embed` projects the features of a whole batch,
`compute_loss` compares the embeddings of all replicas. `groupvit_torch.objective` is cut at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.training.initial_model import (
    MULTI_LABEL_SCALE,
    model_config,
    multi_label_scale,
    segmentation_assignment,
    trainable_names,
    wave_positions,
)
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.schedule import assigns_hard, drop_path_rates
from groupvit_tf.checkpoint import canonical_variables, is_parameter
from groupvit_tf.distributed import Model, Seeds, gather, num_replicas, replica_sum
from groupvit_tf.init import without_initial_values
from groupvit_tf.layers import DropPath, Tensor, mean, wide_dtype
from groupvit_tf.loss import (
    contrastive_loss,
    group_prompt_logits,
    multi_label_contrastive_loss,
    patch_naming,
    patch_naming_loss,
    prompt_claim_loss,
)
from groupvit_tf.model import GroupViTModel

Features = dict[str, Tensor]


# The model at the start


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """Returns the untrained model of a recipe, drawn from Keras's generator (`keras.utils.set_random_seed`)."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)), dtype=_policy(recipe))
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        model.vision_model.embeddings.position_embeddings.assign(waves[None])
    return model


def _policy(recipe: Recipe) -> str:
    return "float32" if recipe.run.precision == "float32" else f"mixed_{recipe.run.precision}"


def start_model(recipe: Recipe, processor: GroupViTProcessor) -> tuple[GroupViTModel, float | None]:
    """Returns the model a run starts with, and the multi-label temperature of the checkpoint it comes from, if any."""
    source = recipe.model.init_from
    if not source:
        return new_model(recipe, processor), None
    model = GroupViTModel.from_pretrained(source, dtype=_policy(recipe))
    model.config.update({"segmentation_assignment": segmentation_assignment(recipe)})
    return resize_model(model, recipe.model.image_size), multi_label_scale(source)


def resize_model(model: GroupViTModel, image_size: int) -> GroupViTModel:
    """Returns the model for another image size, its position embeddings interpolated; itself if the size is its own."""
    settings = model.config.to_dict()
    if settings["vision_config"]["image_size"] == image_size:
        return model
    settings["vision_config"]["image_size"] = image_size
    side = image_size // model.config.vision_config.patch_size
    with without_initial_values():
        resized = GroupViTModel(GroupViTConfig.from_dict(settings), dtype=model.dtype_policy)
    values = canonical_variables(model)
    for name, variable in canonical_variables(resized).items():
        positions = name == "vision_model.embeddings.position_embeddings"
        variable.assign(model.vision_model.embeddings.positions(side, side) if positions else values[name])
    return resized


# The objective


class Objective(Model):
    """A model and what a recipe trains it for.

    Args:
        multi_label_scale: logarithm of the multi-label loss's own temperature factor at the start; None: that of the
            model.
    """

    assign_hard: bool
    """Whether each patch is assigned to one group. After a change, `make_train_function(force=True)` traces it anew."""

    def __init__(self, model: GroupViTModel, recipe: Recipe, multi_label_scale: float | None = None) -> None:
        super().__init__(name="trainer", dtype=model.dtype_policy)
        self.model = model
        self.recipe = recipe
        self.assign_hard = assigns_hard(recipe, 0)
        # After each step, as the authors do.
        model.logit_scale.constraint = _limit_scale
        self.multi_label_logit_scale: Any = None
        if recipe.multi_label:
            start = np.asarray(model.logit_scale).item() if multi_label_scale is None else multi_label_scale
            self.multi_label_logit_scale = self.add_weight(
                shape=(),
                dtype=model.variable_dtype,
                initializer=keras.initializers.Constant(start),
                constraint=_limit_scale,
                name=MULTI_LABEL_SCALE,
            )
        layers = [layer for stage in model.vision_model.encoder.stages for layer in stage.layers]
        rates = drop_path_rates(recipe, len(layers))
        self.drop_path_seeds = Seeds() if any(rates) else None
        for layer, rate in zip(layers, rates, strict=True):
            layer.drop_path = DropPath(rate, self.drop_path_seeds) if rate else None
        if recipe.run.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.built = True
        named = {name: variable for name, variable in self.named_variables().items() if is_parameter(name)}
        wanted = trainable_names(named, recipe.model)
        for name, variable in named.items():
            if name not in wanted:
                variable.trainable = False

    def named_variables(self) -> dict[str, keras.Variable]:
        """Returns the variables by the names of a checkpoint's files."""
        named = canonical_variables(self.model)
        own = self.multi_label_logit_scale
        return named if own is None else {**named, MULTI_LABEL_SCALE: own}

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Returns the embeddings that `compute_loss` compares."""
        features: Features = {}
        for kind, rows in self.rows(inputs).items():
            features |= self.encode(kind, rows, training)
        return self.embed(features, inputs, training)

    def rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the towers' inputs: "images" `[B, 3, H, W]`, tokens `[N, T]` of "captions" and "prompts" if used.

        Prompts of their own `[B, M, T]` are B * M texts.
        """
        rows = {"images": inputs["pixel_values"]}
        if self.recipe.objective.has_paper_losses:
            rows["captions"] = inputs["captions"]
        if self.recipe.needs_prompts:
            prompts = inputs["prompts"]
            if not shares_prompts(inputs):
                count, each, length = ops.shape(prompts["input_ids"])
                prompts = {name: ops.reshape(ids, (count * each, length)) for name, ids in prompts.items()}
            rows["prompts"] = prompts
        return rows

    def encode(self, kind: str, rows: Any, training: bool = False) -> Features:
        """Takes rows of one kind through their tower.

        Returns:
            The features before the projections. Images: `images` `[B, D]`, or for the objective "groups": `groups`
            `[B, G, D]`, `assignment` `[B, G, P]`, `patches` `[B, P, D]`, and `images` for the paper's losses. Texts:
            `captions` or `prompts` `[N, D]`.
        """
        if kind != "images":
            return {kind: self.model.text_model(**rows, return_dict=True, training=training).pooler_output}
        tower, objective = self.model.vision_model, self.recipe.objective
        noise = None if objective.gumbel else _no_noise(self.model)
        _, stages = tower.run_stages(rows, gumbel_noise=noise, assign_hard=self.assign_hard, training=training)
        groups = tower.layernorm(stages[-1].segments)
        features = {"images": mean(groups, axis=1)} if objective.has_paper_losses else {}
        if objective.kind == "paper":
            return features
        features |= {"groups": groups, "assignment": stages[0].assignment}
        if objective.ungrouped_weight:
            features["patches"] = tower.layernorm(stages[0].ungrouped)
        return features

    def embed(self, features: Features, inputs: dict[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Returns the embeddings of a whole batch from the features of all its rows."""
        project = _paper_embeddings if self.recipe.objective.kind == "paper" else _groups_embeddings
        return project(self.model, features, inputs, self.recipe, training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Returns this replica's part of a batch's loss, from inputs `x` and embeddings `y_pred`. Keras calls it.

        The strategy sums the replicas' losses, and their gradients, to those of the global batch.
        """
        own = None if self.multi_label_logit_scale is None else ops.exp(self.multi_label_logit_scale)
        objective = self.recipe.objective
        scale = ops.exp(self.model.logit_scale)
        if objective.kind == "paper":
            return paper_objective(y_pred, x, scale, own, self.recipe) / num_replicas()
        loss = groups_objective(y_pred, x, scale, self.recipe)
        if objective.paper_weight:
            # A temperature of their own, since the model's is that of groups.
            scale, first = scale if own is None else own, self.recipe.mixed_images
            paper = paper_objective(y_pred, x, scale, own, self.recipe, first=first)
            loss = loss + objective.paper_weight * paper
        return loss / num_replicas()


Trained = GroupViTModel | Objective
"""What `fit` trains."""


def model_of(module: Trained) -> GroupViTModel:
    """Returns the model in what `fit` trains."""
    return module.model if isinstance(module, Objective) else module


def variables_of(module: Trained) -> dict[str, keras.Variable]:
    """Returns the variables by the names of a checkpoint's files."""
    return module.named_variables() if isinstance(module, Objective) else canonical_variables(module)


def shares_prompts(inputs: Mapping[str, Any]) -> bool:
    """True if prompts are a scene batch's words `[W, T]`, the same on every replica; else each caption has its own."""
    return "prompts" in inputs and len(inputs["prompts"]["input_ids"].shape) == 2


def _no_noise(model: GroupViTModel) -> list[Tensor]:
    """Returns zeros for each grouping block: None would draw the paper's noise."""
    blocks = sum(count > 0 for count in model.config.vision_config.num_group_tokens)
    return [np.zeros((1, 1, 1), np.float32)] * blocks


def _limit_scale(log_scale: Tensor) -> Tensor:
    return ops.minimum(log_scale, math.log(MAX_LOGIT_SCALE))


# Embeddings


def _groups_embeddings(
    model: GroupViTModel, features: Features, inputs: dict[str, Any], recipe: Recipe, training: bool
) -> Features:
    """Returns groups `[B, G, E]`, soft assignment `[B, G, P]`, prompts `[W, E]`; if used, ungrouped patches
    `[B, P, E]`, and images and captions `[B, E]` for the paper's losses."""
    embeddings = {
        "groups": _projected(model, features["groups"], training),
        "assignment": features["assignment"],
        "prompts": model.text_projection(features["prompts"], training=training, together=False),
    }
    # Batch norms keep nothing but groups and prompts, which is all that they meet in use.
    if recipe.objective.ungrouped_weight:
        embeddings["patches"] = _projected(model, features["patches"], training, keep=False)
    if recipe.objective.paper_weight:
        embeddings["images"] = model.visual_projection(features["images"], training=training, keep=False)
        embeddings["captions"] = model.text_projection(features["captions"], training=training, keep=False)
    return embeddings


def _projected(model: GroupViTModel, states: Tensor, training: bool, keep: bool = True) -> Tensor:
    """`[B, P, D]` -> `[B, P, E]`."""
    _, count, width = states.shape
    flat = model.visual_projection(ops.reshape(states, (-1, width)), training=training, keep=keep)
    return ops.reshape(flat, (-1, count, flat.shape[-1]))


def _paper_embeddings(
    model: GroupViTModel, features: Features, inputs: dict[str, Any], recipe: Recipe, training: bool
) -> Features:
    """Returns images and captions `[B, E]`, and prompts: shared `[W, E]`, or M of each caption `[B, M, E]`."""
    captions = features["captions"]
    embeddings = {"images": model.visual_projection(features["images"], training=training)}
    if not recipe.needs_prompts:
        return embeddings | {"captions": model.text_projection(captions, training=training)}
    if shares_prompts(inputs):
        embeddings["captions"] = model.text_projection(captions, training=training)
        prompts = model.text_projection(features["prompts"], training=training, together=False)
        return embeddings | {"prompts": prompts}
    # Captions and prompts are one batch of texts, as in the authors' code.
    count, each, _ = ops.shape(inputs["prompts"]["input_ids"])
    texts = model.text_projection(ops.concatenate([captions, features["prompts"]]), training=training)
    prompts = ops.reshape(texts[count:], (-1, each, texts.shape[-1]))
    return embeddings | {"captions": texts[:count], "prompts": prompts}


# Losses of embeddings


def groups_objective(embeddings: Features, inputs: dict[str, Any], logit_scale: Tensor, recipe: Recipe) -> Tensor:
    """Compares groups, and the patches before they are grouped, with the prompts of the batch (`groupvit_tf.loss`).

    The mean over replicas is the loss of the global batch.
    """
    settings = recipe.objective
    # Mixed images have lost parts of their objects: nothing is claimed there, since no word of theirs is in `named`.
    claims = inputs["named"]
    # A claim counts as much on every replica, wherever there are more of them.
    share = 1.0
    if num_replicas() > 1:
        count = ops.sum(ops.cast(claims, wide_dtype(embeddings["groups"].dtype)))
        share = count * num_replicas() / ops.maximum(replica_sum(count), 1.0)

    def loss(embeds: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(group_prompt_logits(embeds, embeddings["prompts"], logit_scale), assignment)
        claim = prompt_claim_loss(naming, claims, settings.claim_patches)
        naming_loss = patch_naming_loss(naming, inputs["allowed"])
        return settings.naming_weight * naming_loss + settings.claim_weight * share * claim

    total = loss(embeddings["groups"], embeddings["assignment"])
    if settings.ungrouped_weight:
        total = total + settings.ungrouped_weight * loss(embeddings["patches"], None)
    return total


def paper_objective(
    embeddings: Features,
    inputs: dict[str, Any],
    logit_scale: Tensor,
    multi_label_scale: Tensor | None,
    recipe: Recipe,
    *,
    first: int = 0,
) -> Tensor:
    """Computes the paper's two losses on the pooled image, over all replicas; the second one if it has a temperature.

    Args:
        first: of the global batch, how many images to leave out.
    """
    images, captions = _everywhere(embeddings["images"])[first:], _everywhere(embeddings["captions"])[first:]
    loss = contrastive_loss(images, captions, logit_scale)
    if multi_label_scale is None:
        return loss
    own = embeddings["prompts"]  # [B, M, E], or [W, E] that are shared
    own = ops.take(own, inputs["of_caption"], axis=0) if shares_prompts(inputs) else own
    own = _everywhere(own)[first:]
    return loss + recipe.objective.multi_label_weight * multi_label_contrastive_loss(images, own, multi_label_scale)


def _everywhere(x: Tensor) -> Tensor:
    """The rows of all replicas, float32 at least."""
    return gather(ops.cast(x, wide_dtype(x.dtype)))
