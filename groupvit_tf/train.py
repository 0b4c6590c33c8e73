"""A first training run with `fit`: a recipe -> captioned scenes -> a checkpoint directory with its measured quality.

    groupvit train scenes-demo --out DIR --backend tf

The same batches, schedule and rules as `groupvit_torch.train`. Its parts serve scripts of one's own: `ScenesTrainer` (what `fit`
trains), `make_optimiser`, `Schedule`, the callbacks `MeanWeights` and `HardAssignment`, and `groupvit_tf.data.dataset`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import InputError
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
from groupvit_tf.checkpoint import canonical_variables
from groupvit_tf.data import dataset
from groupvit_tf.layers import Projection, Tensor, batch_statistics
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


def train(
    recipe: Recipe | str,
    out_dir: str | Path,
    *,
    seed: int | None = None,
    resume: str = "never",
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes it to `out_dir`: weights, configuration, tokenizer, processor, `training.json`.

    Args:
        recipe: settings, or what `groupvit_common.recipe.get_recipe` takes: a name or a TOML file.
        seed: replaces the recipe's.
        resume: "never": a run with Keras is not continued.
        log: receives one line at a time.

    Raises:
        InputError: an unknown name, a directory that cannot be made, another `resume`.
        GroupViTError: the loss stopped being a number.
    """
    if resume != "never":
        raise InputError(f"a run with Keras cannot be continued; resume must be 'never', got {resume!r}")
    version = f"Keras {keras.__version__} on {keras.backend.backend()}"
    run = Run.begin(recipe, out_dir, seed=seed, log=log, backend=version, threads=os.cpu_count() or 1)
    recipe = run.recipe
    keras.utils.set_random_seed(recipe.run.seed)
    model = new_model(recipe, run.processor)
    learnt = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    mean = MeanWeights(model, partial(mean_decay_at, recipe))
    run.measure_untrained(_segmenter(mean.new_model(), run.processor), learnt)

    trainer = ScenesTrainer(model, recipe)
    trainer.compile(make_optimiser(trainer), jit_compile=False)
    trainer.fit(
        dataset(run.batches, recipe),
        steps_per_epoch=recipe.schedule.total_steps,
        shuffle=False,
        verbose=0,
        callbacks=[_Losses(run), mean, HardAssignment(recipe), _Saving(run, mean)],
    )
    return run.result()


# The parts of a run


def new_model(recipe: Recipe, processor: GroupViTProcessor) -> GroupViTModel:
    """The untrained model of a recipe, drawn from Keras's generator (`keras.utils.set_random_seed`)."""
    policy = "float32" if recipe.run.precision == "float32" else f"mixed_{recipe.run.precision}"
    model = GroupViTModel(model_config(recipe, len(processor.tokenizer)), dtype=policy)
    settings = recipe.model
    if settings.position_amplitude:
        waves = wave_positions(settings.image_size // settings.patch_size, settings.width, settings.position_amplitude)
        model.vision_model.embeddings.position_embeddings.assign(waves[None])
    return model


class ScenesTrainer(keras.Model):
    """A model and a recipe's objective, for `fit` on batches of `groupvit_tf.data.dataset`: `compile` it without a loss.

    It trains `model` itself, which is used and saved as ever.
    """

    assign_hard: bool
    """Whether patches belong to one group each. Goes into the graph: `make_train_function(force=True)` after a change."""

    def __init__(self, model: GroupViTModel, recipe: Recipe) -> None:
        super().__init__(name="scenes_trainer", dtype=model.dtype_policy)
        self.model = model
        self.recipe = recipe
        self.assign_hard = assigns_hard(recipe, 0)
        # After each step, as the authors do.
        model.logit_scale.constraint = _at_most_largest_scale
        self.multi_label_logit_scale: Any = None
        if recipe.multi_label:
            self.multi_label_logit_scale = self.add_weight(
                shape=(),
                initializer=keras.initializers.Constant(float(model.logit_scale)),
                constraint=_at_most_largest_scale,
                name="multi_label_logit_scale",
            )
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Tensor]:
        """The embeddings that `compute_loss` compares."""
        forward = _paper_embeddings if self.recipe.objective.kind == "paper" else _groups_embeddings
        return forward(self.model, inputs, self.recipe, self.assign_hard, training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The recipe's objective of a batch `x` and its embeddings `y_pred`. Keras calls this."""
        scale = ops.exp(self.model.logit_scale)
        if self.recipe.objective.kind != "paper":
            return groups_objective(y_pred, x, scale, self.recipe)
        own = None if self.multi_label_logit_scale is None else ops.exp(self.multi_label_logit_scale)
        return paper_objective(y_pred, scale, own, self.recipe)


def _groups_embeddings(
    model: GroupViTModel, inputs: dict[str, Any], recipe: Recipe, hard: bool, training: bool
) -> dict[str, Tensor]:
    """Groups `[B, G, E]`, their soft assignment `[B, G, P]`, prompts `[W, E]` and, if wanted, ungrouped patches `[B, P, E]`."""
    _, stages = model.vision_model.run_stages(
        inputs["pixel_values"], gumbel_noise=_noise(recipe), assign_hard=hard, training=training
    )
    norm = model.vision_model.layernorm
    states = norm(stages[-1].segments)
    _, groups, width = states.shape
    flat = model.visual_projection(ops.reshape(states, (-1, width)), training=training)
    embeddings = {
        "groups": ops.reshape(flat, (-1, groups, flat.shape[-1])),
        "assignment": stages[0].assignment,
        "prompts": _texts(model, inputs["prompts"], training),
    }
    if recipe.objective.ungrouped_weight:
        embeddings["patches"] = _project(model.visual_projection, norm(stages[0].ungrouped))
    return embeddings


def groups_objective(
    embeddings: dict[str, Tensor], inputs: dict[str, Any], logit_scale: Tensor, recipe: Recipe
) -> Tensor:
    """Groups, and the patches before they are grouped, against the prompts of the batch (`groupvit_tf.loss`)."""

    def loss(embeds: Tensor, assignment: Tensor | None) -> Tensor:
        naming = patch_naming(group_prompt_logits(embeds, embeddings["prompts"], logit_scale), assignment)
        # Mixed images have lost parts of their objects: nothing is claimed there, since no word of theirs is in `named`.
        return recipe.objective.naming_weight * patch_naming_loss(
            naming, inputs["allowed"]
        ) + recipe.objective.claim_weight * prompt_claim_loss(naming, inputs["named"], recipe.objective.claim_patches)

    total = loss(embeddings["groups"], embeddings["assignment"])
    if recipe.objective.ungrouped_weight:
        total = total + recipe.objective.ungrouped_weight * loss(embeddings["patches"], None)
    return total


def _paper_embeddings(
    model: GroupViTModel, inputs: dict[str, Any], recipe: Recipe, hard: bool, training: bool
) -> dict[str, Tensor]:
    """Images and captions `[B, E]`, and M prompts of each caption `[B, M, E]`."""
    vision = model.vision_model(
        inputs["pixel_values"], gumbel_noise=_noise(recipe), assign_hard=hard, training=training
    )
    return {
        "images": model.visual_projection(vision.pooler_output, training=training),
        "captions": _texts(model, inputs["captions"], training),
        "prompts": ops.take(_texts(model, inputs["prompts"], training), inputs["of_caption"], axis=0),
    }


def paper_objective(
    embeddings: dict[str, Tensor], logit_scale: Tensor, multi_label_scale: Tensor | None, recipe: Recipe
) -> Tensor:
    """The paper's two losses on the pooled image; without the second one's temperature, the first alone."""
    images = embeddings["images"]
    loss = contrastive_loss(images, embeddings["captions"], logit_scale)
    if multi_label_scale is None:
        return loss
    multi_label = multi_label_contrastive_loss(images, embeddings["prompts"], multi_label_scale)
    return loss + recipe.objective.multi_label_weight * multi_label


def _texts(model: GroupViTModel, tokens: dict[str, Tensor], training: bool) -> Tensor:
    """Tokens `[N, T]` -> projected texts `[N, E]`."""
    return model.text_projection(model.text_model(**tokens, training=training).pooler_output, training=training)


def _noise(recipe: Recipe) -> list[Tensor] | None:
    """The noise of the recipe's one grouping block: None, which draws the paper's, or zeros for none at all."""
    return None if recipe.objective.gumbel else [np.zeros((1, 1, 1), np.float32)]


def _project(projection: Projection, x: Tensor) -> Tensor:
    """`[B, P, D]` -> `[B, P, E]` with the batch's own statistics, which batch norm does not keep: in use it only meets groups."""
    norm = projection.norm
    hidden = projection.hidden(x)
    wide = ops.cast(hidden, keras.backend.result_type(hidden.dtype, "float32"))
    mean, variance, _ = batch_statistics(ops.reshape(wide, (-1, norm.width)))
    normed = (wide - mean) * (ops.rsqrt(variance + norm.epsilon) * norm.gamma) + norm.beta
    return projection.output_layer(ops.relu(ops.cast(normed, hidden.dtype)))


def _at_most_largest_scale(log_scale: Tensor) -> Tensor:
    return ops.minimum(log_scale, math.log(MAX_LOGIT_SCALE))


# The optimiser


@keras.saving.register_keras_serializable(package="groupvit")
class AdamW(keras.optimizers.AdamW):
    """AdamW with PyTorch's arithmetic, so that a run may change frameworks midway.

    Three things differ from Keras's own: `epsilon` is added to the unbiased root of the second moment (in Keras to the biased
    one, 7 times smaller in the first step with `beta_2=0.98`); the global norm that clips has 1e-6 added; and gradients of
    embeddings are made dense first. Keras squares the parts of the gradient of a token that occurs several times, where the
    square of their sum is meant, in the norm and in the second moment.
    """

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        super().apply([None if grad is None else _dense(grad) for grad in grads], trainable_variables)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        if not self.global_clipnorm:
            clipped: list[Any] = super()._clip_gradients(grads)
            return clipped
        norm = ops.sqrt(ops.sum(ops.stack([ops.sum(ops.square(grad)) for grad in grads])))
        factor = ops.minimum(self.global_clipnorm / (norm + 1e-6), 1.0)
        return [grad * ops.cast(factor, grad.dtype) for grad in grads]

    def _apply_weight_decay(self, variables: Any) -> None:
        """Done in `update_step`."""

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        dtype = variable.dtype
        gradient, rate, step = (ops.cast(value, dtype) for value in (gradient, learning_rate, self.iterations + 1))
        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        self.assign_add(first, (gradient - first) * (1 - self.beta_1))
        self.assign_add(second, (ops.square(gradient) - second) * (1 - self.beta_2))
        # Not `cast`, which would round a Python number to float32 first.
        betas = [ops.convert_to_tensor(beta, dtype) for beta in (self.beta_1, self.beta_2)]
        of_first, of_second = (1 - ops.power(beta, step) for beta in betas)
        update = first / of_first / (ops.sqrt(second / of_second) + self.epsilon)
        if self.weight_decay and self._use_weight_decay(variable):
            update = update + variable * self.weight_decay
        self.assign_sub(variable, rate * update)


def _dense(gradient: Any) -> Tensor:
    """A gradient as a plain tensor: TensorFlow gives that of an embedding as slices, one for each time a row was used."""
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


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


def make_optimiser(trainer: ScenesTrainer) -> AdamW:
    """AdamW with the recipe's schedule and clipping, and weight decay where `decays` says so."""
    recipe = trainer.recipe
    optimiser = AdamW(
        Schedule.of(recipe),
        weight_decay=recipe.optimizer.weight_decay,
        beta_1=recipe.optimizer.betas[0],
        beta_2=recipe.optimizer.betas[1],
        epsilon=recipe.optimizer.epsilon,
        global_clipnorm=recipe.optimizer.clip_norm or None,
    )
    variables = canonical_variables(trainer.model)
    spared = [variable for name, variable in variables.items() if not decays(name, len(variable.shape))]
    if trainer.multi_label_logit_scale is not None:
        spared.append(trainer.multi_label_logit_scale)
    optimiser.exclude_from_weight_decay(spared)
    # Now, since `fit` would trace its graph a second time for variables made in the first.
    optimiser.build(trainer.trainable_variables)
    return optimiser


# Callbacks


class MeanWeights(keras.callbacks.Callback):
    """An exponential mean of a model's weights and batch-norm statistics over the steps of `fit`.

    Args:
        model: whose weights; it may be a part of what `fit` trains.
        decay_at: step 0, 1, ... -> what the mean keeps of itself, such as `partial(mean_decay_at, recipe)`.
    """

    def __init__(self, model: GroupViTModel, decay_at: Callable[[int], float]) -> None:
        super().__init__()
        self.of = model
        self.decay_at = decay_at
        self.means = {
            name: np.asarray(variable).astype(keras.backend.result_type(variable.dtype, "float32"))
            for name, variable in canonical_variables(model).items()
            if keras.backend.is_float_dtype(variable.dtype)
        }

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        share = 1.0 - self.decay_at(int(self.model.optimizer.iterations) - 1)
        variables = canonical_variables(self.of)
        for name, mean in self.means.items():
            mean += (np.asarray(variables[name]) - mean) * share

    def new_model(self) -> GroupViTModel:
        """A model with the mean weights, in float32."""
        model = GroupViTModel(self.of.config, dtype="float32")
        variables = canonical_variables(model)
        for name, mean in self.means.items():
            variables[name].assign(mean)
        return model


class HardAssignment(keras.callbacks.Callback):
    """Switches a `ScenesTrainer` from soft to hard assignment at the recipe's step; the graph is traced once more then."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        hard = assigns_hard(self.recipe, int(self.model.optimizer.iterations))
        if hard != self.model.assign_hard:
            self.model.assign_hard = hard
            self.model.make_train_function(force=True)


class _Losses(keras.callbacks.Callback):
    """Tells the run each step's loss. Before the other callbacks: a loss that is no number must not reach them."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()  # else Keras reports the mean of the steps so far

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.run.took_step(float(logs["loss"]))


class _Saving(keras.callbacks.Callback):
    """Measures and writes the mean model when the recipe says so and at the end."""

    def __init__(self, run: Run, mean: MeanWeights) -> None:
        super().__init__()
        self.run, self.mean = run, mean

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.evaluates_now():
            model = self.mean.new_model()
            self.run.save(model, _segmenter(model, self.run.processor))


def _segmenter(model: GroupViTModel, processor: GroupViTProcessor) -> Segmenter:
    return Segmenter(model, processor, batch_size=50)
