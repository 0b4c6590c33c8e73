"""Training with `fit`: a recipe -> captioned pictures -> checkpoints, on one device or as many as a strategy has.

    groupvit train scenes-demo --out DIR --backend tf

The same batches, schedule, rules and files as `groupvit_torch.train`, and either continues the other's run. Its parts serve scripts of
one's own: `Trainer` (what `fit` trains), `make_optimiser`, `Schedule`, the callbacks, and `groupvit_tf.data.dataset`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.training.checkpoints import MODEL, RESTORE_VALUES, Checkpoints, RunState, load, restoring
from groupvit_common.training.grouping_health import watch_grouping
from groupvit_common.training.initial_model import (
    MULTI_LABEL_SCALE,
    model_config,
    multi_label_scale,
    segmentation_assignment,
    trainable_names,
    wave_positions,
)
from groupvit_common.training.log import RunLog
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import Run, TrainResult
from groupvit_common.training.schedule import (
    assigns_hard,
    drop_path_rates,
    ema_decay_at,
    has_weight_decay,
    learning_rate_at,
)
from groupvit_common.training.start import start_run
from groupvit_common.training.validation import Evaluate
from groupvit_tf.checkpoint import canonical_variables, from_canonical, is_parameter, kind, to_canonical
from groupvit_tf.chunks import carried_back, encoded
from groupvit_tf.data import Feed, dataset, inputs
from groupvit_tf.distributed import Model, Place, Seeds, as_logs, gather, here, num_replicas, place_of, replica_sum
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
from groupvit_tf.predictor import Segmenter

Arrays = dict[str, NDArray[Any]]

_IMAGES_WATCHED = 32  # of whose grouping is measured
_AGREE_EVERY = 10  # steps after which several processes ask each other whether to stop


def train(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    resume: str | Path = "never",
    evaluate: Evaluate | None = None,
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes it to `out_dir`: weights, configuration, tokenizer, processor, `training.json`, `checkpoints/`.

    On all GPUs of the machine, or those of all workers that `TF_CONFIG` names, or in the scope of a strategy on its devices.

    Args:
        recipe: settings, or what `groupvit_common.training.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        resume: "never"; "auto": from the newest valid checkpoint in `out_dir` if there is one; or a checkpoint's path.
        evaluate: measures a `Segmenter` of the model now and then; held-out scenes are measured anyway in a run on scenes.
        log: receives one line at a time, on the first process.

    Raises:
        InputError: an unknown name, a directory that cannot be made, a setting that Keras has no way to follow, an unfinished run
            in `out_dir`.
        CheckpointError: a checkpoint that cannot be continued or started from, or no room for the last one.
        Interrupted: SIGTERM or Ctrl-C; where the run stands is saved.
        GroupViTError: losses or gradients stopped being numbers.
    """
    place = here()
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    _check(recipe, place)
    version = f"Keras {keras.__version__} on {keras.backend.backend()}"
    run = start_run(
        recipe,
        out_dir,
        seed=seed,
        log=log,
        backend=version,
        threads=os.cpu_count() or 1,
        rank=place.rank,
        world=place.world,
        resume=resume,
        evaluate=evaluate,
    )
    try:
        return _go(run, place)
    finally:
        run.close()


def _go(run: Run, place: Place) -> TrainResult:
    """One process of a run, from the first step to the last."""
    recipe = run.recipe
    keras.utils.set_random_seed(recipe.run.seed)
    with place.scope():
        model, scale = start_model(recipe, run.processor)
        trainer = Trainer(model, recipe, scale)
        trainer.compile(make_optimiser(trainer), jit_compile=recipe.run.compile or keras.backend.backend() == "jax")
    average = MeanWeights(trainer, partial(ema_decay_at, recipe)) if recipe.optimizer.ema_decay else None
    best = _Best(trainer, average)
    if run.resumed is not None:
        assert run.resumed_from is not None
        ranks = run.resumed.values["ranks"]
        seeds = ranks[run.rank].get("seeds", []) if len(ranks) == run.world else []
        with restoring(run.resumed_from):
            best.restore(run.resumed, run.resumed_from, run.step, seeds)
        trainer.assign_hard = assigns_hard(recipe, run.step)
    elif run.rank == 0:
        run.measure_untrained(best.segmenter(run.processor), trainer.model.num_parameters())
    feed = Feed(run.stream())
    progress = Progress(run, feed)
    saving = _Saving(run, feed, best, place, progress)
    callbacks = [progress, *([] if average is None else [average]), HardAssignment(recipe), saving]
    try:
        if not run.finished:
            with place.scope():
                batches = dataset(lambda: feed, recipe)
            steps = recipe.schedule.total_steps - run.step
            # Outside the scope: the model that is measured is no business of the other processes.
            with run.signal_handlers():
                trainer.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=callbacks)
    finally:
        feed.close()
        progress.close()
    return run.result()


def _check(recipe: Recipe, place: Place) -> None:
    """InputError for what this backend has no way to do."""
    settings = recipe.run
    if recipe.schedule.batch_size % place.replicas:
        raise InputError(
            f"schedule.batch_size must be a multiple of the number of devices, got {recipe.schedule.batch_size} for {place.replicas}"
        )
    if settings.compile and place.replicas > 1:
        raise InputError(
            "run.compile needs a single device with Keras: XLA does not compile a strategy's collectives; set it to false"
        )
    _check_chunks(recipe)


def _check_chunks(recipe: Recipe) -> None:
    backend = keras.backend.backend()
    if 0 < recipe.run.chunk_size < recipe.schedule.batch_size and backend != "tensorflow":
        raise InputError(
            f"run.chunk_size {recipe.run.chunk_size} asks for cached features, which Keras has on TensorFlow alone, not on "
            f"{backend}: set it to 0, with gradient_checkpointing=true for memory, or use KERAS_BACKEND=tensorflow"
        )


# The model and what it learns


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """The untrained model of a recipe, drawn from Keras's generator (`keras.utils.set_random_seed`)."""
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)), dtype=_policy(recipe))
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        model.vision_model.embeddings.position_embeddings.assign(waves[None])
    return model


def _policy(recipe: Recipe) -> str:
    return "float32" if recipe.run.precision == "float32" else f"mixed_{recipe.run.precision}"


def start_model(recipe: Recipe, processor: GroupViTProcessor) -> tuple[GroupViTModel, float | None]:
    """The model that a run starts with, and its multi-label temperature if it comes from a checkpoint that has one."""
    source = recipe.model.init_from
    if not source:
        return new_model(recipe, processor), None
    model = GroupViTModel.from_pretrained(source, dtype=_policy(recipe))
    model.config.update({"segmentation_assignment": segmentation_assignment(recipe)})
    return at_size(model, recipe.model.image_size), multi_label_scale(source)


def at_size(model: GroupViTModel, image_size: int) -> GroupViTModel:
    """The model for another image size, its position embeddings interpolated for good; itself where the size is its own."""
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


Features = dict[str, Tensor]


class Trainer(Model):
    """A model and a recipe's objective, for `fit` on batches of `groupvit_tf.data.dataset`: `compile` it without a loss.

    It trains `model` itself, which is used and saved as ever. A step reports, beside `loss`, `gradient_norm` before clipping and
    `skipped`: 1 if the loss or the gradient was no number, in which case nothing has changed, batch norm's statistics included.

    In two halves: `encode` looks at images and texts one by one, `embed` and the loss at a whole batch. With the recipe's
    `run.chunk_size`, the towers have so many images of a replica in memory at a time (TensorFlow only).

    Args:
        multi_label_scale: logarithm of the multi-label loss's own temperature factor at the start; None: that of the model.

    Raises:
        InputError: a `run.chunk_size` on another backend of Keras.
    """

    assign_hard: bool
    """Whether patches belong to one group each. Goes into the graph: `make_train_function(force=True)` after a change."""

    def __init__(self, model: GroupViTModel, recipe: Recipe, multi_label_scale: float | None = None) -> None:
        super().__init__(name="trainer", dtype=model.dtype_policy)
        _check_chunks(recipe)
        self.model = model
        self.recipe = recipe
        self.assign_hard = assigns_hard(recipe, 0)
        # After each step, as the authors do.
        model.logit_scale.constraint = _at_most_largest_scale
        self.multi_label_logit_scale: Any = None
        if recipe.multi_label:
            start = _number(model.logit_scale) if multi_label_scale is None else multi_label_scale
            self.multi_label_logit_scale = self.add_weight(
                shape=(),
                dtype=model.variable_dtype,
                initializer=keras.initializers.Constant(start),
                constraint=_at_most_largest_scale,
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
        _freeze(self)

    def named_variables(self) -> dict[str, keras.Variable]:
        """The variables under the names of a checkpoint's files."""
        named = canonical_variables(self.model)
        return (
            named
            if self.multi_label_logit_scale is None
            else {**named, MULTI_LABEL_SCALE: self.multi_label_logit_scale}
        )

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Tensor]:
        """The embeddings that `compute_loss` compares."""
        features: Features = {}
        for which, rows in self.rows(inputs).items():
            features |= self.encode(which, rows, training)
        return self.embed(features, inputs, training)

    def rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What goes through the towers: "images" `[B, 3, H, W]`, tokens `[N, T]` of "captions" and "prompts" if the objective looks at any.

        Prompts of their own `[B, M, T]` are B * M texts.
        """
        objective, rows = self.recipe.objective, {"images": inputs["pixel_values"]}
        if objective.has_paper_losses:
            rows["captions"] = inputs["captions"]
        if not self.recipe.needs_prompts:
            return rows
        if _shares_prompts(inputs):
            rows["prompts"] = inputs["prompts"]
        else:
            count, each, length = ops.shape(inputs["prompts"]["input_ids"])
            rows["prompts"] = {
                name: ops.reshape(ids, (count * each, length)) for name, ids in inputs["prompts"].items()
            }
        return rows

    def encode(self, which: str, rows: Any, training: bool = False) -> Features:
        """What a tower makes of some `rows`, before the projections.

        Images: `images` `[B, D]`, or for the objective "groups": `groups` `[B, G, D]`, `assignment` `[B, G, P]`, `patches` `[B, P, D]`, and
        `images` for the paper's losses. Texts: `captions` or `prompts` `[N, D]`.
        """
        if which != "images":
            return {which: self.model.text_model(**rows, training=training).pooler_output}
        tower, objective = self.model.vision_model, self.recipe.objective
        noise = _noise(self.model, self.recipe)
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
        """The embeddings of a whole batch from the features of all its rows."""
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
        """The recipe's objective of a batch `x` and its embeddings `y_pred`: this replica's share of it. Keras calls this.

        The strategy adds the replicas' losses, and their gradients, up to those of the whole batch.
        """
        scale = ops.exp(self.model.logit_scale)
        own = None if self.multi_label_logit_scale is None else ops.exp(self.multi_label_logit_scale)
        objective = self.recipe.objective
        if objective.kind == "paper":
            return paper_objective(y_pred, scale, own, self.recipe) / num_replicas()
        loss = groups_objective(y_pred, x, scale, self.recipe)
        if objective.paper_weight:
            # A temperature of their own, since the model's is that of groups.
            first = self.recipe.mixed_images
            loss = loss + objective.paper_weight * paper_objective(
                y_pred, scale if own is None else own, own, self.recipe, first=first
            )
        return loss / num_replicas()

    def train_step(self, *arguments: Any) -> Any:
        """A step that leaves no trace if it is not taken. Keras calls this."""
        if keras.backend.backend() == "jax":
            return self._pure_step(*arguments)
        adamw = _adamw(self)
        if adamw is None:
            return self._step(*arguments)
        statistics = [(variable, ops.copy(variable)) for variable in self._statistics()]
        before = ops.copy(adamw.taken)
        logs = self._step(*arguments)
        taken = ops.greater(adamw.taken, before)
        for variable, value in statistics:
            variable.assign(ops.where(taken, variable, value))
        return logs | as_logs(_verdict(taken, adamw.gradient_norm))

    def _step(self, data: Any) -> dict[str, Any]:
        """The step of TensorFlow: Keras's own, or one with cached features."""
        inputs, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        chunk, images = self.recipe.run.chunk_size, inputs["pixel_values"]
        # A strategy's data sets leave sizes open.
        count = images.shape[0] or self.recipe.schedule.batch_size // num_replicas()
        if not 0 < chunk < count:
            logs: dict[str, Any] = super().train_step(data)
            return logs
        embeddings, loss, gradients = self._cached_gradients(inputs, chunk)
        self._loss_tracker.update_state(loss * num_replicas(), sample_weight=ops.shape(images)[0])
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(inputs, y, embeddings, sample_weight)

    def _cached_gradients(self, inputs: dict[str, Any], chunk: int) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        """Embeddings, loss, and what Keras's step would have as gradients (of the scaled loss), with the towers' activations of `chunk`
        images in memory at a time, or of as many texts as there are to so many images.

        Three passes (Gao et al. 2021, "GradCache"): the features of all rows, without a tape; the loss of all of them and its gradient with
        respect to each; every piece once more, from the seeds that it had, to carry that gradient on. Batch norm is in the projections,
        which come after the features and see all of them, in the second pass only. So nothing is approximate.
        """
        import tensorflow as tf

        variables, seeds = self.trainable_variables, _seeds(self)
        rows, sizes = self.rows(inputs), _sizes(inputs, chunk)
        first_seeds = [ops.copy(seed) for seed in seeds]
        features: Features = {}
        names: dict[str, list[str]] = {}
        for which, part in rows.items():
            found = encoded(partial(self.encode, which, training=True), part, sizes[which], features)
            features |= found
            names[which] = list(found)
        last_seeds = [ops.copy(seed) for seed in seeds]
        with tf.GradientTape() as tape:
            tape.watch(features)
            embeddings = self.embed(features, inputs, training=True)
            loss = self.compute_loss(inputs, None, embeddings, training=True)
            scaled = self.optimizer.scale_loss(loss)
        of_features, of_variables = tape.gradient(scaled, (features, variables))
        gradients = {
            id(v): gradient for v, gradient in zip(variables, of_variables, strict=True) if gradient is not None
        }
        for seed, value in zip(seeds, first_seeds, strict=True):
            seed.assign(value)
        for which, part in rows.items():
            tower = self.model.vision_model if which == "images" else self.model.text_model
            learnt = tower.trainable_variables
            own = {name: of_features[name] for name in names[which] if of_features[name] is not None}
            again = partial(self.encode, which, training=True)
            sums = carried_back(again, part, sizes[which], own, learnt, list(gradients.values()))
            for variable, gradient in zip(learnt, sums, strict=True):
                if gradient is not None:
                    gradients[id(variable)] = gradients.get(id(variable), 0) + gradient
        for seed, value in zip(seeds, last_seeds, strict=True):
            seed.assign(value)
        return embeddings, loss, [gradients.get(id(variable)) for variable in variables]

    def _pure_step(self, state: Any, data: Any) -> Any:
        """The step of JAX, which is given all variables' values and returns the new ones."""
        logs, after = super().train_step(state, data)
        adamw = _adamw(self)
        if adamw is None:
            return logs, after
        at = {id(variable): place for place, variable in enumerate(self.optimizer.variables)}
        count = at[id(adamw.taken)]
        taken = after[2][count] > state[2][count]
        changed = {id(variable) for variable in self._statistics()}
        fixed = [
            ops.where(taken, new, old) if id(variable) in changed else new
            for variable, new, old in zip(self.non_trainable_variables, after[1], state[1], strict=True)
        ]
        norm = after[2][at[id(adamw.gradient_norm)]]
        return logs | _verdict(taken, norm), (after[0], fixed, *after[2:])

    def _statistics(self) -> list[Any]:
        """What batch norms keep."""
        return [v for name, v in canonical_variables(self.model).items() if not is_parameter(name)]


def _adamw(module: Any) -> AdamW | None:
    found = getattr(module.optimizer, "inner_optimizer", module.optimizer)
    return found if isinstance(found, AdamW) else None


def _model_of(module: GroupViTModel | Trainer) -> GroupViTModel:
    return module.model if isinstance(module, Trainer) else module


def _named(module: GroupViTModel | Trainer) -> dict[str, keras.Variable]:
    """The variables under the names of a checkpoint's files."""
    return module.named_variables() if isinstance(module, Trainer) else canonical_variables(module)


def _verdict(taken: Tensor, norm: Tensor) -> dict[str, Tensor]:
    norm = ops.where(taken, norm, ops.full_like(norm, math.nan))
    return {"gradient_norm": norm, "skipped": 1.0 - ops.cast(taken, "float32")}


def _freeze(trainer: Trainer) -> None:
    """Leaves out of training what the recipe says."""
    named = {name: variable for name, variable in trainer.named_variables().items() if is_parameter(name)}
    wanted = trainable_names(named, trainer.recipe.model)
    for name, variable in named.items():
        if name not in wanted:
            variable.trainable = False


def _shares_prompts(inputs: Mapping[str, Any]) -> bool:
    """Whether the prompts are a scene batch's words `[W, T]`, each once, the same on every replica; else each caption has its own."""
    return "prompts" in inputs and len(inputs["prompts"]["input_ids"].shape) == 2


def _sizes(inputs: Mapping[str, Any], chunk: int) -> dict[str, Any]:
    """How many rows go through a tower with so many images; None: all at once."""
    sizes: dict[str, Any] = {"images": chunk, "captions": chunk, "prompts": None}
    if "prompts" in inputs and not _shares_prompts(inputs):
        sizes["prompts"] = chunk * ops.shape(inputs["prompts"]["input_ids"])[1]
    return sizes


def _groups_embeddings(
    model: GroupViTModel, features: Features, inputs: dict[str, Any], recipe: Recipe, training: bool
) -> dict[str, Tensor]:
    """Groups `[B, G, E]`, their soft assignment `[B, G, P]`, prompts `[W, E]`; if wanted, ungrouped patches `[B, P, E]`, and for the paper's
    losses what `_paper_embeddings` has."""
    embeddings = {
        "groups": _projected(model, features["groups"], training),
        "assignment": features["assignment"],
        "prompts": model.text_projection(features["prompts"], training=training, together=False),
    }
    # Batch norms keep nothing but groups and prompts, which is all that they meet in use.
    if recipe.objective.ungrouped_weight:
        embeddings["patches"] = _projected(model, features["patches"], training, keep=False)
    if recipe.objective.paper_weight:
        embeddings |= {
            "images": model.visual_projection(features["images"], training=training, keep=False),
            "captions": model.text_projection(features["captions"], training=training, keep=False),
            "own_prompts": ops.take(embeddings["prompts"], inputs["of_caption"], axis=0),
        }
    return embeddings


def _projected(model: GroupViTModel, states: Tensor, training: bool, keep: bool = True) -> Tensor:
    """`[B, P, D]` -> `[B, P, E]`."""
    _, count, width = states.shape
    flat = model.visual_projection(ops.reshape(states, (-1, width)), training=training, keep=keep)
    return ops.reshape(flat, (-1, count, flat.shape[-1]))


def groups_objective(
    embeddings: dict[str, Tensor], inputs: dict[str, Any], logit_scale: Tensor, recipe: Recipe
) -> Tensor:
    """Groups, and the patches before they are grouped, against the prompts of the batch (`groupvit_tf.loss`).

    The mean over replicas is the loss of the whole batch.
    """
    settings = recipe.objective
    # A claim counts as much on every replica, wherever there are more of them.
    share = 1.0
    if num_replicas() > 1:
        count = ops.sum(ops.cast(inputs["named"], wide_dtype(embeddings["groups"].dtype)))
        share = count * num_replicas() / ops.maximum(replica_sum(count), 1.0)

    def loss(embeds: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(group_prompt_logits(embeds, embeddings["prompts"], logit_scale), assignment)
        # Mixed images have lost parts of their objects: nothing is claimed there, since no word of theirs is in `named`.
        claim = prompt_claim_loss(naming, inputs["named"], settings.claim_patches)
        return (
            settings.naming_weight * patch_naming_loss(naming, inputs["allowed"])
            + settings.claim_weight * share * claim
        )

    total = loss(embeddings["groups"], embeddings["assignment"])
    if settings.ungrouped_weight:
        total = total + settings.ungrouped_weight * loss(embeddings["patches"], None)
    return total


def _paper_embeddings(
    model: GroupViTModel, features: Features, inputs: dict[str, Any], recipe: Recipe, training: bool
) -> dict[str, Tensor]:
    """Images and captions `[B, E]`, and M prompts of each caption, "own_prompts" `[B, M, E]`."""
    captions = features["captions"]
    embeddings = {"images": model.visual_projection(features["images"], training=training)}
    if not recipe.needs_prompts:
        return embeddings | {"captions": model.text_projection(captions, training=training)}
    if _shares_prompts(inputs):
        embeddings["captions"] = model.text_projection(captions, training=training)
        prompts = model.text_projection(features["prompts"], training=training, together=False)
        return embeddings | {"own_prompts": ops.take(prompts, inputs["of_caption"], axis=0)}
    # Captions and prompts are one batch of texts, as in the authors' code.
    count, each, _ = ops.shape(inputs["prompts"]["input_ids"])
    texts = model.text_projection(ops.concatenate([captions, features["prompts"]]), training=training)
    own = ops.reshape(texts[count:], (-1, each, texts.shape[-1]))
    return embeddings | {"captions": texts[:count], "own_prompts": own}


def paper_objective(
    embeddings: dict[str, Tensor],
    logit_scale: Tensor,
    multi_label_scale: Tensor | None,
    recipe: Recipe,
    *,
    first: int = 0,
) -> Tensor:
    """The paper's two losses on the pooled image, over all replicas; without the second one's temperature, the first alone.

    first: of the whole batch, how many images to leave out.
    """
    images, captions = _everywhere(embeddings["images"])[first:], _everywhere(embeddings["captions"])[first:]
    loss = contrastive_loss(images, captions, logit_scale)
    if multi_label_scale is None:
        return loss
    multi_label = multi_label_contrastive_loss(
        images, _everywhere(embeddings["own_prompts"])[first:], multi_label_scale
    )
    return loss + recipe.objective.multi_label_weight * multi_label


def _everywhere(x: Tensor) -> Tensor:
    """The rows of all replicas, float32 at least."""
    return gather(ops.cast(x, wide_dtype(x.dtype)))


def _noise(model: GroupViTModel, recipe: Recipe) -> list[Tensor] | None:
    """The noise of the grouping blocks: None, which draws the paper's, or zeros for none at all."""
    blocks = sum(count > 0 for count in model.config.vision_config.num_group_tokens)
    return None if recipe.objective.gumbel else [np.zeros((1, 1, 1), np.float32)] * blocks


def _number(variable: Any) -> Any:
    """The number that a variable holds, on whichever replica."""
    return np.asarray(variable).item()


def _at_most_largest_scale(log_scale: Tensor) -> Tensor:
    return ops.minimum(log_scale, math.log(MAX_LOGIT_SCALE))


# The optimiser


@keras.saving.register_keras_serializable(package="groupvit")
class AdamW(keras.optimizers.AdamW):
    """AdamW with PyTorch's arithmetic, so that a run may change frameworks midway.

    Five things differ from Keras's own:
    - `epsilon` is added to the unbiased root of the second moment (in Keras to the biased one, 7 times smaller in the first step
      with `beta_2=0.98`); the global norm that clips has 1e-6 added.
    - Gradients of embeddings are made dense first. Keras squares the parts of the gradient of a token that occurs several times,
      where the square of their sum is meant, in the norm and in the second moment.
    - Under a strategy, gradients are added up over the replicas before they are clipped; Keras clips each replica's own.
    - A gradient that is no number, or that of a loss that is none, changes nothing: neither weights nor moments.
    - Steps that were left out do not count in the bias correction, but do in the learning rate's schedule.

    Variables `taken`: steps that were not left out; `gradient_norm`: of the last step's gradient before clipping.
    """

    adds_replicas = True
    """False: the gradients that come are sums over the replicas already."""

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self.taken = self.add_variable((), dtype="int", aggregation="only_first_replica", name="taken")
        self.gradient_norm = self.add_variable((), aggregation="only_first_replica", name="gradient_norm")

    def scale_loss(self, loss: Tensor) -> Tensor:
        return super().scale_loss(_or_no_number(loss))

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply(added_up(grads) if self.adds_replicas else grads, trainable_variables)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        # Done in `apply`, before clipping. Keras calls this after it.
        return grads_and_vars

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        norm = ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(grad)) for grad in grads])))
        taken = ops.isfinite(norm)
        self.taken.assign_add(ops.cast(taken, self.taken.dtype))
        self.gradient_norm.assign(ops.cast(norm, self.gradient_norm.dtype))
        factor = ops.ones_like(norm)
        if self.global_clipnorm:
            factor = ops.minimum(self.global_clipnorm / (norm + 1e-6), factor)
        else:
            grads = super()._clip_gradients(grads)
        # So that each of them says by itself whether this step is taken (`update_step`).
        factor = ops.where(taken, factor, ops.full_like(factor, math.nan))
        return [grad * ops.cast(factor, grad.dtype) for grad in grads]

    def _apply_weight_decay(self, variables: Any) -> None:
        """Done in `update_step`."""

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        dtype = variable.dtype
        gradient, rate, step = (ops.cast(value, dtype) for value in (gradient, learning_rate, self.taken))
        taken = ops.isfinite(gradient)

        def change(value: Tensor) -> Tensor:
            return ops.where(taken, value, ops.zeros_like(value))

        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        self.assign_add(first, change((gradient - first) * (1 - self.beta_1)))
        self.assign_add(second, change((ops.square(gradient) - second) * (1 - self.beta_2)))
        # Not `cast`, which would round a Python number to float32 first.
        betas = [ops.convert_to_tensor(beta, dtype) for beta in (self.beta_1, self.beta_2)]
        of_first, of_second = (1 - ops.power(beta, step) for beta in betas)
        update = first / of_first / (ops.sqrt(second / of_second) + self.epsilon)
        if self.weight_decay and self._use_weight_decay(variable):
            update = update + variable * self.weight_decay
        self.assign_sub(variable, change(rate * update))


@keras.saving.register_keras_serializable(package="groupvit")
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's scaling of float16's loss around `AdamW`, right under a strategy too: whether gradients can be held is asked of their sum
    over the replicas, not of each replica's own, so that all of them answer alike."""

    def __init__(self, inner_optimizer: AdamW, initial_scale: float = 2.0**16, **options: Any) -> None:
        super().__init__(inner_optimizer, initial_scale=initial_scale, **options)
        inner_optimizer.adds_replicas = False

    def scale_loss(self, loss: Tensor) -> Tensor:
        return super().scale_loss(_or_no_number(loss))

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply(added_up(grads), trainable_variables)


def _or_no_number(loss: Tensor) -> Tensor:
    """The loss to take gradients of: a finite gradient of a loss that is none would be no reason to take a step."""
    return loss * ops.where(ops.isfinite(loss), ops.ones_like(loss), ops.full_like(loss, math.nan))


def added_up(gradients: Any) -> list[Any]:
    """Gradients as plain tensors, their sum over the replicas: TensorFlow gives that of an embedding as slices, one for each time a
    row was used."""
    if keras.backend.backend() != "tensorflow":
        return list(gradients)
    import tensorflow as tf

    return [None if gradient is None else replica_sum(tf.convert_to_tensor(gradient)) for gradient in gradients]


@keras.saving.register_keras_serializable(package="groupvit")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A recipe's learning rate: a table of `learning_rate_at`, since a graph could not compute the very same numbers.

    Args:
        rates: of each step in order; the last one stays.
    """

    def __init__(self, rates: Any) -> None:
        self.rates = np.asarray(rates, np.float64)

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        return cls([learning_rate_at(recipe, step) for step in range(recipe.schedule.total_steps)])

    def __call__(self, step: Tensor) -> Tensor:
        table = ops.convert_to_tensor(self.rates.astype(keras.config.floatx()))
        return ops.take(table, ops.minimum(ops.cast(step, "int32"), len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        return {"rates": self.rates.tolist()}


def make_optimiser(trainer: Trainer) -> AdamW | LossScale:
    """AdamW with the recipe's schedule and clipping, weight decay where `has_weight_decay` says so, and the loss scaled for float16."""
    recipe = trainer.recipe
    optimiser = AdamW(
        Schedule.of(recipe),
        weight_decay=recipe.optimizer.weight_decay,
        beta_1=recipe.optimizer.betas[0],
        beta_2=recipe.optimizer.betas[1],
        epsilon=recipe.optimizer.epsilon,
        global_clipnorm=recipe.optimizer.clip_norm or None,
    )
    named = trainer.named_variables()
    spared = [v for name, v in named.items() if v.trainable and not has_weight_decay(name, len(v.shape))]
    optimiser.exclude_from_weight_decay(spared)
    whole = LossScale(optimiser) if trainer.compute_dtype == "float16" else optimiser
    # Now, since `fit` would trace its graph a second time for variables made in the first.
    whole.build(trainer.trainable_variables)
    return whole


# Callbacks


class MeanWeights(keras.callbacks.Callback):
    """An exponential mean of a model's weights and batch-norm statistics over the steps of `fit`.

    Args:
        model: whose weights: a `GroupViTModel`, which may be a part of what `fit` trains, or a `Trainer`.
        decay_at: step 0, 1, ... -> what the mean keeps of itself, such as `partial(ema_decay_at, recipe)`.
    """

    def __init__(self, model: GroupViTModel | Trainer, decay_at: Callable[[int], float]) -> None:
        super().__init__()
        self.of = _model_of(model)
        self.decay_at = decay_at
        named = _named(model)
        self.variables = {name: v for name, v in named.items() if keras.backend.is_float_dtype(v.dtype)}
        self.counters = {name: v for name, v in named.items() if name not in self.variables}
        self.means = {
            name: keras.Variable(np.asarray(v).astype(wide_dtype(v.dtype)), trainable=False, dtype=wide_dtype(v.dtype))
            for name, v in self.variables.items()
        }
        self._move = self._moved
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._move = tf.function(self._moved)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        optimizer = self.model.optimizer
        if not (logs or {}).get("skipped"):
            self._move(np.float64(1.0 - self.decay_at(_number(optimizer.iterations) - 1)))

    def _moved(self, share: Any) -> None:
        """Towards the weights as they are, by this share."""
        for name, average in self.means.items():
            value = ops.cast(self.variables[name], average.dtype)
            average.assign(average + (value - average) * ops.cast(share, average.dtype))

    def arrays(self) -> Arrays:
        """Everything by canonical name, as files have it."""
        return _arrays({**self.means, **self.counters}, self.variables)

    def new_model(self) -> GroupViTModel:
        """A model with the mean weights, in float32."""
        return GroupViTModel.from_arrays(self.of.config, self.arrays(), dtype="float32")


class HardAssignment(keras.callbacks.Callback):
    """Switches a `Trainer` from soft to hard assignment at the recipe's step; the graph is traced once more then."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        hard = assigns_hard(self.recipe, _number(self.model.optimizer.iterations))
        if hard != self.model.assign_hard:
            self.model.assign_hard = hard
            self.model.make_train_function(force=True)


class Progress(keras.callbacks.Callback):
    """Takes a run's steps down: where it stands, what was left out, lines and records (`metrics.jsonl`, TensorBoard, Weights & Biases).

    The first of a run's callbacks. Raises GroupViTError when as many steps were left out as the recipe allows, their last batch saved.
    """

    def __init__(self, run: Run, feed: Feed) -> None:
        super().__init__()
        self.run, self.feed = run, feed
        self.records = RunLog(run.recipe, run.directory, step=run.step, log=run.log) if run.rank == 0 else None
        self.recent: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        run, trainer = self.run, self.model
        arrays = inputs(self.feed.done(), run.recipe)
        loss, norm, skipped = (float(logs[name]) for name in ("loss", "gradient_norm", "skipped"))
        trainer.reset_metrics()  # else Keras reports the mean of the steps so far
        scaling = trainer.optimizer if isinstance(trainer.optimizer, LossScale) else None
        if not skipped:
            run.record_step(loss)
            self.recent.append(loss)
        elif _overflowed(trainer.optimizer, loss):
            # Keras does not count such a step.
            run.record_step(loss)
        else:
            run.record_skipped_step(loss, norm, _flat(arrays))
        if scaling is not None:
            scaling.inner_optimizer.iterations.assign(run.step)
        if run.step % run.recipe.run.log_every == 0 or run.finished:
            self._tell(trainer, arrays, norm)

    def _tell(self, trainer: Trainer, arrays: dict[str, Any], norm: float) -> None:
        if self.records is None:
            return
        run = self.run
        values = {
            "loss": float(np.mean(self.recent)) if self.recent else math.nan,
            "learning_rate": learning_rate_at(run.recipe, run.step - 1),
            "gradient_norm": norm,
            "logit_scale": math.exp(_number(trainer.model.logit_scale)),
            "bad_steps": run.bad_steps,
        }
        if trainer.multi_label_logit_scale is not None:
            values[MULTI_LABEL_SCALE] = math.exp(_number(trainer.multi_label_logit_scale))
        if isinstance(trainer.optimizer, LossScale):
            values["gradient_scale"] = _number(trainer.optimizer.dynamic_scale)
        measures, warnings = _watch_grouping(trainer.model, arrays["pixel_values"][:_IMAGES_WATCHED])
        values |= measures
        self.records.progress(run.step, values, flops=0.0, peak=0.0)
        for warning in warnings:
            run.log(f"step {run.step}: {warning}")
        self.recent.clear()

    def measured(self) -> None:
        """Records what the run has just measured."""
        if self.records is not None:
            self.records.record(self.run.step, self.run.validation.latest())
            self.records.start(self.run.step)

    def resume(self) -> None:
        """Time counts again from here."""
        if self.records is not None:
            self.records.start(self.run.step)

    def close(self) -> None:
        if self.records is not None:
            self.records.close()


def _overflowed(optimizer: Any, loss: float) -> bool:
    """Of a step that was left out: whether float16 could not hold the gradient at its scale, which is no fault of the batch."""
    return isinstance(optimizer, LossScale) and math.isfinite(loss) and _number(optimizer.dynamic_scale) > 1.0


def _watch_grouping(model: GroupViTModel, pixel_values: Any) -> tuple[dict[str, float], list[str]]:
    """Measures of every grouping block on some images, and warnings (`watch_grouping`)."""
    seen = model.vision_model(ops.convert_to_tensor(pixel_values), output_attentions=True).attentions
    return watch_grouping(np.asarray(ops.cast(assignment, "float32")) for assignment in seen)


def _flat(arrays: Mapping[str, Any], before: str = "") -> Arrays:
    """Nested arrays under names such as "captions.input_ids"."""
    found: Arrays = {}
    for name, value in arrays.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


class _Saving(keras.callbacks.Callback):
    """Measures the model and writes it when the recipe says so, and checkpoints then and when a signal asks for one."""

    def __init__(self, run: Run, feed: Feed, best: _Best, place: Place, progress: Progress) -> None:
        super().__init__()
        self.run, self.feed, self.best, self.place, self.progress = run, feed, best, place, progress
        self.last = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        run = self.run
        if run.evaluates_now() and run.measures_here:
            run.measure_and_save(self.best, self.best.segmenter(run.processor), self.place)
            self.progress.measured()
        stop, late = self._agree(run.stop_signal, (time.monotonic() - self.last) / 60)
        saved = self._save(self.model) if stop or run.saves_now(late) else False
        if stop and not run.finished:
            raise run.interrupted(stop, saved)

    def _agree(self, stop: int, minutes: float) -> tuple[int, float]:
        """A signal that any process received, and the first one's minutes since the last checkpoint: the same for all."""
        if self.place.world == 1:
            return stop, minutes
        if self.run.step % _AGREE_EVERY and not self.run.finished:
            return 0, 0.0
        answers = self.place.all([stop, minutes])
        return max(answer[0] for answer in answers), answers[0][1]

    def _save(self, trainer: Trainer) -> bool:
        own = {"data": self.feed.state_dict(), "seeds": _seed_values(trainer)}
        ranks = self.place.all(own)
        self.last = time.monotonic()
        if self.run.rank:
            return True
        arrays, values = self.best.state()
        saved = self.run.save_checkpoint(self.best.save_pretrained, arrays, values, ranks)
        self.progress.resume()
        return saved


# Callbacks for scripts of one's own


class Evaluation(keras.callbacks.Callback):
    """Measures the model every so many steps, through a `Segmenter` that holds it: `measured` has the last measures by name, which are
    also added to the step's logs, for the callbacks that follow.

    Args:
        measure: more being better, so that their mean can tell which checkpoint is the best.
        average: the mean weights that are to be measured instead.
    """

    def __init__(
        self,
        measure: Evaluate,
        processor: GroupViTProcessor,
        *,
        every: int = 1000,
        average: MeanWeights | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.measure, self.processor, self.every, self.average, self.log = measure, processor, every, average, log
        self.measured: dict[str, float] = {}
        self.step = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        module = self.model
        step = _number(module.optimizer.iterations)
        if step % self.every == 0:
            self.measured = dict(self.measure(_Best(module, self.average).segmenter(self.processor)))
            self.step = step
            self.log(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in self.measured.items())}")
            if logs is not None:
                logs.update(self.measured)


class GroupingMeasures(keras.callbacks.Callback):
    """Adds to a step's logs, every so many, whether the grouping of some images tells anything
    (`groupvit_common.training.grouping_health.watch_grouping`), for the callbacks that follow, such as Keras's `TensorBoard`; says when it does not.

    Args:
        pixel_values: `[B, 3, H, W]`, some 32 images.
    """

    def __init__(self, pixel_values: Any, *, every: int = 100, log: Callable[[str], None] = print) -> None:
        super().__init__()
        self.pixel_values, self.every, self.log = pixel_values, every, log

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        module = self.model
        step = _number(module.optimizer.iterations)
        if step % self.every == 0:
            measures, warnings = _watch_grouping(_model_of(module), self.pixel_values)
            for warning in warnings:
                self.log(f"step {step}: {warning}")
            if logs is not None:
                logs.update(measures)


class StopOnBadSteps(keras.callbacks.Callback):
    """Ends `fit` when so many steps came to a loss or gradient that is no number; `bad_steps` counts them."""

    def __init__(self, most: int = 10, *, log: Callable[[str], None] = print) -> None:
        super().__init__()
        self.most, self.log = most, log
        self.bad_steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        logs = logs or {}
        # The mean of several steps is no number from the first one on that is none; `skipped` is of this step.
        loss = float(logs.get("loss", 0.0))
        bad = logs["skipped"] if "skipped" in logs else not math.isfinite(loss)
        if bad and not _overflowed(self.model.optimizer, loss):
            self.bad_steps += 1
            self.log(f"a loss or gradient is no number ({self.bad_steps} of at most {self.most} steps)")
            if self.bad_steps >= self.most:
                self.model.stop_training = True


class Checkpoint(keras.callbacks.Callback):
    """Checkpoints of `fit` in the folder `checkpoints/` of a directory: whole or not there, checked when they are read, the last and the
    best kept; each has a `model/` that `from_pretrained` of either backend loads. `restore` goes on from the newest valid one.

    What `fit` trains is a `Trainer` or a `GroupViTModel`, compiled with `AdamW` of this module. Last of the callbacks.

    Args:
        every: steps; minutes: since the last one; 0: not. keep: how many of the newest stay.
        processor: saved with the model. feed: the data, whose place is saved. average: mean weights, which are then the model that
            is saved. evaluation: whose measures decide which is the best, which also stays.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int = 1000,
        minutes: float = 0.0,
        keep: int = 3,
        processor: GroupViTProcessor | None = None,
        feed: Feed | None = None,
        average: MeanWeights | None = None,
        evaluation: Evaluation | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.checkpoints = Checkpoints(Path(directory), keep=keep, log=log, required=RESTORE_VALUES)
        self.every, self.minutes, self.log = every, minutes, log
        self.processor, self.feed, self.average, self.evaluation = processor, feed, average, evaluation
        self.last = time.monotonic()
        self.saved = -1

    def restore(self, module: GroupViTModel | Trainer) -> int:
        """Brings what `fit` trains, compiled, to the newest valid checkpoint; how many steps it had taken, 0 if there is none.

        The data is brought there too if the feed has not begun. CheckpointError where there are checkpoints and none is valid.
        """
        self.checkpoints.clean()
        path = self.checkpoints.newest_of_any()
        if path is None:
            return 0
        state = load(path)
        if not module.optimizer.built:
            module.optimizer.build(module.trainable_variables)
        place, ranks = _place(module), state.values["ranks"]
        own = ranks[place.rank] if len(ranks) == place.world else {"seeds": [], "data": None}
        with restoring(path):
            _Best(module, self.average).restore(state, path, state.step, own["seeds"])
            if self.feed is not None and own["data"] is not None:
                self.feed.load_state_dict(own["data"])
        self.log(f"continuing from {path} at step {state.step}")
        return state.step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        module = self.model
        if self.feed is not None:
            self.feed.done()
        step = _number(module.optimizer.iterations)
        late = bool(self.minutes) and _place(module).any((time.monotonic() - self.last) / 60 >= self.minutes)
        if late or (self.every and step % self.every == 0):
            try:
                self._save(module, step)
            except CheckpointError as error:
                self.log(f"{error}; the run goes on")

    def on_train_end(self, logs: Any = None) -> None:
        module = self.model
        step = _number(module.optimizer.iterations)
        if step != self.saved:
            self._save(module, step)

    def _save(self, module: GroupViTModel | Trainer, step: int) -> None:
        place, best, evaluation = _place(module), _Best(module, self.average), self.evaluation
        own = {"seeds": _seed_values(module), "data": None if self.feed is None else self.feed.state_dict()}
        ranks = place.all(own)
        self.last = time.monotonic()
        if place.rank:
            self.saved = step
            return
        arrays, values = best.state()
        values |= {"ranks": ranks}
        measure = None
        if evaluation is not None and evaluation.step == step:
            measure = float(np.mean(list(evaluation.measured.values())))

        def write(directory: Path) -> None:
            best.save_pretrained(directory)
            if self.processor is not None:
                self.processor.save_pretrained(directory)

        path = self.checkpoints.save(RunState(step, values, arrays, measure), write)
        self.saved = step
        self.log(f"step {step}: saved {path}")


# What a checkpoint holds


class _Best:
    """The weights of a training that are measured and saved: their mean where there is one. The multi-label temperature is beside them in
    the file; loading ignores it."""

    def __init__(self, module: GroupViTModel | Trainer, average: MeanWeights | None) -> None:
        self.module, self.average = module, average

    def arrays(self) -> Arrays:
        return _arrays(_named(self.module)) if self.average is None else self.average.arrays()

    def save_pretrained(self, directory: Path) -> None:
        _model_of(self.module).save_pretrained(directory, state_dict=self.arrays())

    def segmenter(self, processor: GroupViTProcessor) -> Segmenter:
        model = GroupViTModel.from_arrays(_model_of(self.module).config, self.arrays(), dtype="float32")
        return Segmenter(model, processor, batch_size=50)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """What goes into a checkpoint besides: the optimizer's state, the weights where their mean is the model; under the names, and in
        the layout, of `groupvit_torch.train`."""
        adamw, variables = _adamw(self.module), _named(self.module)
        if adamw is None:
            raise InputError(
                "a checkpoint that can be continued needs groupvit_tf.train.AdamW as the optimizer, got "
                f"{type(self.module.optimizer).__name__}"
            )
        arrays: Arrays = {}
        for name, variable, moments in _moments(adamw, variables):
            for key, moment in moments.items():
                arrays[f"optimizer.{key}.{name}"] = to_canonical(kind(variable), np.asarray(moment))
            arrays[f"optimizer.step.{name}"] = np.asarray(adamw.taken).astype(np.float32)
        if self.average is not None:
            arrays |= {f"weights.{name}": array for name, array in _arrays(variables).items()}
        return arrays, {"scaler": _scaler_state(self.module.optimizer)}

    def restore(self, state: RunState, directory: Path, steps: int, seeds: Sequence[Any]) -> None:
        """Everything as it was after the step of a checkpoint.

        Args:
            directory: of the checkpoint; steps: taken by then, those that were left out too; seeds: of this process, as `_seeds` was.
        """
        saved = {
            name: np.array(array)
            for path, names in find_weights(directory / MODEL).files.items()
            for name, array in read_arrays(path, names)
        }
        weights = {n.removeprefix("weights."): a for n, a in state.arrays.items() if n.startswith("weights.")} or saved
        variables, optimizer, adamw = _named(self.module), self.module.optimizer, _adamw(self.module)
        _load(variables, variables, weights)
        if self.average is not None:
            _load(self.average.means, variables, saved)
        assert adamw is not None
        for name, variable, moments in _moments(adamw, variables):
            for key, moment in moments.items():
                array = state.arrays.get(f"optimizer.{key}.{name}")
                if array is not None:
                    moment.assign(from_canonical(kind(variable), np.array(array)))
        taken = [int(array) for name, array in state.arrays.items() if name.startswith("optimizer.step.")]
        adamw.taken.assign(max(taken, default=0))
        adamw.iterations.assign(steps)
        scaler = state.values["scaler"]
        if isinstance(optimizer, LossScale) and scaler:
            optimizer.dynamic_scale.assign(scaler["scale"])
            optimizer.step_counter.assign(scaler["_growth_tracker"])
        # A run of PyTorch has none: noise goes on anew.
        for variable, seed in zip(_seeds(self.module), seeds, strict=False):
            variable.assign(np.array(seed, variable.dtype))


def _place(module: Any) -> Place:
    return Place(0, 1) if keras.backend.backend() != "tensorflow" else place_of(module.distribute_strategy)


def _moments(adamw: AdamW, variables: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Of each variable that is learnt: name, variable, its moments under PyTorch's names."""
    names = {id(variable): name for name, variable in variables.items()}
    for variable in adamw._trainable_variables:
        index = adamw._get_variable_index(variable)
        yield (
            names[id(variable)],
            variable,
            {"exp_avg": adamw._momentums[index], "exp_avg_sq": adamw._velocities[index]},
        )


def _arrays(variables: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> Arrays:
    """Values as files have them. like: the variables whose kind says how they are laid out."""
    found = {}
    for name, variable in variables.items():
        array = np.asarray(variable)
        array = array.astype(np.int64) if array.dtype.kind == "i" else array
        found[name] = to_canonical(kind((like or {}).get(name, variable)), array)
    return found


def _load(variables: Mapping[str, Any], like: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
    found = {name: from_canonical(kind(like[name]), np.array(weights[name])) for name in variables if name in weights}
    missing = [name for name in variables if name not in weights and name != MULTI_LABEL_SCALE]
    shapes = [name for name, array in found.items() if tuple(array.shape) != tuple(variables[name].shape)]
    if missing or shapes:
        raise CheckpointError(
            f"the checkpoint is of another model than the recipe's: {(missing or shapes)[0]} "
            f"{'is missing' if missing else 'has another shape'}"
        )
    for name, array in found.items():
        variables[name].assign(array.astype(variables[name].dtype))


def _seeds(module: Any) -> list[keras.Variable]:
    """The states of all that draws random numbers in training, in an order that does not change."""
    return [variable for variable in module.non_trainable_variables if variable.name == "seed_generator_state"]


def _seed_values(module: Any) -> list[list[int]]:
    return [np.asarray(seed).tolist() for seed in _seeds(module)]


def _scaler_state(optimizer: Any) -> dict[str, Any]:
    """What PyTorch's `GradScaler` keeps."""
    if not isinstance(optimizer, LossScale):
        return {}
    return {
        "scale": _number(optimizer.dynamic_scale),
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": optimizer.dynamic_growth_steps,
        "_growth_tracker": _number(optimizer.step_counter),
    }
