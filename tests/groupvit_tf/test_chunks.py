"""Cached features in Keras (`run.chunk_size`): the steps of the plain batch, in bounded memory."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from groupvit_common.errors import InputError  # noqa: E402
from groupvit_common.training.recipe import Recipe  # noqa: E402
from groupvit_common.training.scene_batches import SceneBatches  # noqa: E402
from groupvit_common.training.settings import changed  # noqa: E402
from groupvit_common.training.start import first_captions, make_processor  # noqa: E402
from groupvit_tf import data as D  # noqa: E402
from groupvit_tf import train as K  # noqa: E402
from groupvit_tf.chunks import cached_backward, chunk_sizes, random_state, set_random_state  # noqa: E402
from groupvit_tf.model import GroupViTModel  # noqa: E402
from groupvit_tf.optimizer import adamw_of  # noqa: E402
from tests.groupvit_tf.test_train import Arrays, fit, furthest, state  # noqa: E402
from tests.support.replicas import BATCH, SETTINGS, captions_recipe, small_config  # noqa: E402
from tests.support.training import PAPER, Captions, scenes_of, tiny  # noqa: E402

EXACT = 1e-10  # float64, relative to the largest value: the same sums in another order
STEPS = 1e-8  # float64: AdamW magnifies the rounding of gradients
HALF = 0.03  # bfloat16 has 8 bits, and a matrix is multiplied in other pieces

NOISY = {"gumbel": True, "drop_path": 0.4, "depths": (2, 0)}


def task_of(name: str, count: int = 1, **changes: Any) -> tuple[Recipe, list[Any]]:
    """A recipe, without noise unless asked for, and batches: pictures with prompts of their own, scenes by either
    objective or both."""
    if name == "captions":
        return captions_recipe(**changes), list(islice(Captions(BATCH), count))
    own: dict[str, Any] = {
        "scenes": dict(PAPER),
        "groups": {"paper_weight": 0.0},
        "groups-paper": {"paper_weight": 0.5},
    }[name]
    recipe = tiny(**SETTINGS, **own)
    pictures = {1: scenes_of()}
    batches = SceneBatches(recipe, pictures, make_processor(recipe, first_captions(pictures, 16)))
    return changed(recipe, changes), list(islice(batches, count))


def trainer_of(recipe: Recipe, dtype: str = "float64", dropout: float = 0.0, adamw: bool = True) -> K.Trainer:
    """adamw: False: with SGD, which has no moments to make, where no step is taken."""
    keras.utils.set_random_seed(3)
    config = small_config()
    config.vision_config.depths = list(recipe.model.depths)
    config.text_config.attention_dropout = config.vision_config.dropout = dropout
    trainer = K.Trainer(GroupViTModel(config, dtype=dtype), recipe)
    optimizer = K.make_optimizer(trainer) if adamw else keras.optimizers.SGD()
    trainer.compile(optimizer, run_eagerly=True, jit_compile=False)
    return trainer


def gradients_of(trainer: K.Trainer, inputs: dict[str, Any], chunk: int, keeping: bool = False) -> tuple[float, Arrays]:
    """Loss and gradients with cached features; of the plain batch with chunk=0; keeping: of the pieces, all of them on
    one tape."""
    variables = trainer.trainable_variables
    if chunk and not keeping:
        _, loss, gradients = cached_backward(trainer, inputs, chunk)
    else:
        with tf.GradientTape() as tape:
            loss = trainer.compute_loss(inputs, None, in_pieces(trainer, inputs, chunk or BATCH))
        gradients = tape.gradient(loss, variables)
    names = {id(variable): name for name, variable in trainer.named_variables().items()}
    return float(loss), {
        names[id(v)]: np.asarray(tf.convert_to_tensor(g))
        for v, g in zip(variables, gradients, strict=True)
        if g is not None
    }


def in_pieces(trainer: K.Trainer, inputs: dict[str, Any], chunk: int) -> dict[str, Any]:
    """The embeddings of a batch whose rows pass the towers in pieces, the odd ones first, with all activations kept."""
    features: dict[str, Any] = {}
    for which, rows in trainer.rows(inputs).items():
        size = chunk_sizes(inputs, chunk)[which]
        found: list[dict[str, Any]] = []
        count = len(tf.nest.flatten(rows)[0])
        ends = [count] if size is None else list(range((count - 1) % size + 1, count + 1, size))
        for begin, end in zip([0, *ends], ends, strict=False):
            part = tf.nest.map_structure(lambda x, begin=begin, end=end: x[begin:end], rows)
            found.append(trainer.encode(which, part, training=True))
        features |= {name: tf.concat([f[name] for f in found], axis=0) for name in found[0]}
    return trainer.embed(features, inputs, training=True)


def inputs_of(recipe: Recipe, batch: Any) -> dict[str, Any]:
    return tf.nest.map_structure(tf.convert_to_tensor, D.inputs(batch, recipe))


def seeds(trainer: K.Trainer) -> list[list[int]]:
    return [np.asarray(seed).tolist() for seed in random_state(trainer)]


# The others are parts of these two.
@pytest.mark.parametrize(
    "task", ["captions", "groups-paper", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scenes", "groups"))]
)
def test_cached_features_have_the_gradients_of_the_plain_batch(task):
    recipe, (batch,) = task_of(task)
    inputs, trainer = inputs_of(recipe, batch), trainer_of(recipe, adamw=False)
    before = {name: np.asarray(variable) for name, variable in trainer.named_variables().items()}
    loss, expected = gradients_of(trainer, inputs, 0)
    statistics = state(trainer)
    for name, variable in trainer.named_variables().items():
        variable.assign(before[name])
    again, found = gradients_of(trainer, inputs, 3)
    assert again == pytest.approx(loss, rel=EXACT)
    assert furthest(found, expected) < EXACT
    # Batch norm saw the whole batch, once.
    assert furthest(state(trainer), statistics) < EXACT
    assert int(trainer.model.visual_projection.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("task", [pytest.param("captions", marks=pytest.mark.slow), "groups-paper"])
def test_cached_features_see_the_same_noise_twice(task):
    """Gumbel noise, dropped paths and dropout: the gradients are those of one pass with all activations kept."""
    recipe, (batch,) = task_of(task, **NOISY)
    inputs = inputs_of(recipe, batch)
    trainer = trainer_of(recipe, dropout=0.2, adamw=False)
    before = random_state(trainer)
    loss, found = gradients_of(trainer, inputs, 5)
    after = seeds(trainer)
    assert after != [np.asarray(seed).tolist() for seed in before]
    # The loss with other noise, then the noise of before once more.
    noise = in_pieces(trainer, inputs, 5)
    assert abs(float(trainer.compute_loss(inputs, None, noise)) - loss) > 1e-3 * abs(loss)
    set_random_state(before, trainer)
    _, expected = gradients_of(trainer, inputs, 5, keeping=True)
    assert furthest(found, expected) < EXACT
    assert seeds(trainer) == after


def test_steps_with_cached_features_are_those_of_the_plain_batch():
    """A batch that is not finite leaves no trace. With clipping, and with a frozen tower."""
    recipe, batches = task_of("captions", 2, clip_norm=1.0, freeze=("text_model", "text_projection"))
    batches[0].pixel_values[0, 0, 0, 0] = np.nan
    ends, losses = [], []
    for chunk in (0, 5):
        trainer = trainer_of(changed(recipe, {"chunk_size": chunk}))
        losses.append(fit(trainer, batches))
        assert int(trainer.optimizer.taken) == 1
        ends.append(state(trainer))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)  # Keras reports float32
    assert np.isnan(losses[0]).tolist() == [True, False]
    assert furthest(ends[1], ends[0]) < STEPS


class Watched:
    """Takes down when a tower is given how many rows, and when their gradient has come back to its first layers, as a
    graph comes to it; forces no order."""

    def __init__(self, trainer: K.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        encode, model = trainer.encode, trainer.model

        def watched(which: str, rows: Any, training: bool = False) -> dict[str, Any]:
            tensors = tf.nest.flatten(rows)
            tensors[0] = self.note("", tensors[0])
            return encode(which, tf.nest.pack_sequence_as(rows, tensors), training)

        monkeypatch.setattr(trainer, "encode", watched)
        for tower in (model.vision_model, model.text_model):
            monkeypatch.setattr(tower.embeddings, "call", self.back(tower.embeddings.call))

    def note(self, sign: str, x: Any) -> Any:
        def write(value: np.ndarray) -> np.ndarray:
            self.events.append(f"{sign}{len(value)}")
            return value

        seen = tf.numpy_function(write, [x], x.dtype, stateful=False)
        seen.set_shape(x.shape)
        return seen

    def back(self, call: Any) -> Any:
        through = tf.custom_gradient(lambda x: (tf.identity(x), lambda gradient: self.note("-", gradient)))

        def watched(*arguments: Any, **options: Any) -> Any:
            return through(call(*arguments, **options))

        return watched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings"),
    [("groups", {}), ("captions", {"gradient_checkpointing": True, "depths": (2, 0)})],
)
def test_a_graph_computes_piece_after_piece(task, settings, monkeypatch):
    """Twice each, and back once, before the next begins; the numbers, and the noise, are those of eager code. Layers
    that are computed again in the backward pass change nothing."""
    recipe, (batch,) = task_of(task, 1, **{**NOISY, "depths": (1, 0), **settings})
    inputs = inputs_of(recipe, batch)
    eager = trainer_of(changed(recipe, {"gradient_checkpointing": False}), adamw=False)
    expected = [gradients_of(eager, inputs, 3) for _ in range(2)]
    trainer = trainer_of(recipe, adamw=False)
    watched = Watched(trainer, monkeypatch)
    # The graph does not know how many images there are.
    signature = tf.nest.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), inputs)
    traced = tf.function(lambda given: cached_backward(trainer, given, 3)[1:], input_signature=[signature])
    names = {id(variable): name for name, variable in trainer.named_variables().items()}
    for loss, gradients in expected:
        found, tensors = traced(inputs)
        assert float(found) == pytest.approx(loss, rel=EXACT)
        each = zip(trainer.trainable_variables, tensors, strict=True)
        assert furthest({names[id(v)]: np.asarray(g) for v, g in each if g is not None}, gradients) < EXACT
    assert seeds(trainer) == seeds(eager)
    assert furthest(state(trainer), state(eager)) < EXACT
    texts = [2, 3, 3, 6, 9, 9] if task == "captions" else [len(batch.prompts["input_ids"])]
    pieces = [2, 3, 3, *texts]
    back = [event for rows in pieces for event in (f"{rows}", f"-{rows}")]
    assert watched.events == [*map(str, pieces), *back] * 2


# In float64 their steps are those of the plain batch, above; float16 follows.
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_cached_features_in_half_precision(precision):
    recipe, batches = task_of("groups-paper", 1, precision=precision)
    results = []
    for chunk in (0, 3):
        trainer = trainer_of(changed(recipe, {"chunk_size": chunk}), f"mixed_{precision}")
        if precision == "float16":
            trainer.optimizer.dynamic_scale.assign(2.0)  # the gradient's norm is a thousand
        (loss,) = fit(trainer, batches)
        adamw = adamw_of(trainer.optimizer)
        assert int(adamw.taken) == 1
        results.append((loss, float(adamw.gradient_norm)))
    np.testing.assert_allclose(*results, rtol=HALF)


def test_a_gradient_that_float16_cannot_hold_lowers_its_scale_and_leaves_no_trace():
    recipe, batches = task_of("captions", 1, precision="float16", chunk_size=3)
    trainer = trainer_of(recipe, "mixed_float16")
    trainer.optimizer.dynamic_scale.assign(2.0**40)
    before = state(trainer)
    (loss,) = fit(trainer, batches)
    assert np.isfinite(loss)
    assert float(trainer.optimizer.dynamic_scale) == 2.0**39
    after = state(trainer)
    assert all((after[name] == value).all() for name, value in before.items())


def test_other_backends_of_keras_refuse(monkeypatch, tmp_path):
    recipe = captions_recipe(chunk_size=3)
    model = GroupViTModel(small_config())
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refused = r"run.chunk_size 3 asks .* TensorFlow alone, not on jax: set it to 0"
    with pytest.raises(InputError, match=refused):
        K.Trainer(model, recipe)
    with pytest.raises(InputError, match=refused):
        K.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
