"""Keras alone: the forms of inputs, `fit` and its company, graphs, XLA, replicas, gradient
checkpointing."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import groupvit_tf
from groupvit_common.errors import InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.outputs import BaseModelOutputWithPooling
from groupvit_tf import TFGroupViTModel, TFGroupViTModelOutput, TFGroupViTTextModel, TFGroupViTVisionModel
from groupvit_tf.checkpoint import canonical_variables
from groupvit_tf.grouping import gumbel_noise_like
from groupvit_tf.layers import ACTIVATIONS, Attention, BatchNorm
from tests.support.models import smallest_config, smallest_inputs
from tests.support.paths import ROOT

Inputs = dict[str, np.ndarray]

# Two orders of summation, relative to the array's largest value. Training steps are compared in float64: batch norm
# over four rows enlarges rounding a thousandfold.
FLOAT32 = 1e-5
FLOAT64 = 1e-9


@pytest.fixture(scope="module")
def model() -> TFGroupViTModel:
    """The smallest model with all parts; tests that train it make their own."""
    keras.utils.set_random_seed(0)
    return TFGroupViTModel(smallest_config())


@pytest.fixture
def inputs() -> Inputs:
    return smallest_inputs()


def batches(inputs: Inputs, size: int = 4) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(inputs).batch(size, drop_remainder=True)


# -- inputs and outputs --


def test_every_documented_form_of_inputs(model: TFGroupViTModel, inputs: Inputs) -> None:
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    wanted = model(**inputs).logits_per_image.numpy()
    forms = {
        "dictionary": lambda: model(inputs),
        "dictionary with None": lambda: model({**inputs, "position_ids": None}),
        "dictionary and keyword": lambda: model({"input_ids": ids, "attention_mask": mask}, pixel_values=pixels),
        "list": lambda: model([ids, pixels, mask]),
        "tuple": lambda: model((ids, pixels, mask)),
        "positions": lambda: model(ids, pixels, mask),
        "an image and keywords": lambda: model(pixels, input_ids=ids, attention_mask=mask),
        "int32": lambda: model(ids.astype(np.int32), pixels, mask.astype(np.int32)),
        "tensors": lambda: model({name: tf.constant(array) for name, array in inputs.items()}),
        "float64 pixels": lambda: model(ids, pixels.astype(np.float64), mask),
        "lists of numbers": lambda: model(input_ids=ids.tolist(), pixel_values=pixels, attention_mask=mask.tolist()),
        "training": lambda: model(inputs, training=False),
        "tuple out": lambda: model(inputs, return_dict=False),
    }
    for name, call in forms.items():
        output = call()
        logits = output[0] if isinstance(output, tuple) else output.logits_per_image
        np.testing.assert_array_equal(logits, wanted, err_msg=name)


def test_towers_take_a_single_tensor(inputs: Inputs) -> None:
    config = smallest_config()
    text, vision = TFGroupViTTextModel(config.text_config), TFGroupViTVisionModel(config.vision_config)
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    np.testing.assert_array_equal(text(ids).pooler_output, text(input_ids=ids)[1])
    np.testing.assert_array_equal(text([ids, mask])[0], text({"input_ids": ids, "attention_mask": mask})[0])
    np.testing.assert_array_equal(text(ids.tolist()).pooler_output, text(ids).pooler_output)
    np.testing.assert_array_equal(vision(pixels).pooler_output, vision([pixels]).pooler_output)
    assert isinstance(vision(pixels), BaseModelOutputWithPooling)
    assert vision(pixels, output_attentions=True, return_dict=False)[-1][0].shape == (4, 4, 4)


def test_unknown_and_doubled_inputs_are_refused(model: TFGroupViTModel, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="takes no input 'labels'; its inputs are input_ids, pixel_values"):
        model({**inputs, "labels": inputs["input_ids"]})
    with pytest.raises(InputError, match="got 'input_ids' twice"):
        model(inputs, input_ids=inputs["input_ids"])
    with pytest.raises(InputError, match="takes at most 13 inputs, got 14"):
        model([inputs["input_ids"]] * 14)


def test_towers_alone_equal_the_towers_within(model: TFGroupViTModel, inputs: Inputs) -> None:
    towers = (TFGroupViTTextModel(model.config.text_config), TFGroupViTVisionModel(model.config.vision_config))
    whole = canonical_variables(model)
    for tower in towers:
        for name, variable in canonical_variables(tower).items():
            variable.assign(whole[name])
    out = model(inputs)
    pooled = towers[0](inputs["input_ids"], inputs["attention_mask"]).pooler_output
    np.testing.assert_array_equal(pooled, out.text_model_output.pooler_output)
    np.testing.assert_array_equal(towers[1](inputs["pixel_values"])[1], out.vision_model_output.pooler_output)


def test_features_as_transformers_4_and_5_return_them(model: TFGroupViTModel, inputs: Inputs) -> None:
    tensor = model.get_image_features(inputs["pixel_values"])
    record = model.get_image_features(inputs["pixel_values"], return_dict=True)
    np.testing.assert_array_equal(tensor, record.pooler_output)
    record = model.get_text_features(inputs["input_ids"], output_attentions=True, return_dict=True)
    np.testing.assert_array_equal(record.pooler_output, model.get_text_features(inputs["input_ids"]))
    assert len(record.attentions) == 1
    with pytest.raises(InputError, match="input_ids must lie between 0 and 29, got 31"):
        model.get_text_features(inputs["input_ids"] * 0 + 31)


def test_symbolic_inputs_make_a_functional_model(model: TFGroupViTModel, inputs: Inputs) -> None:
    symbols = {name: keras.Input(a.shape[1:], dtype=a.dtype.name, name=name) for name, a in inputs.items()}
    functional = keras.Model(symbols, model(symbols).logits_per_image)
    close(functional(inputs), model(inputs).logits_per_image)


def test_a_traced_function_returns_records_and_refuses_bad_input(model: TFGroupViTModel, inputs: Inputs) -> None:
    traced = tf.function(lambda given: model(given, output_segmentation=True))
    output, eager = traced(inputs), model(inputs, output_segmentation=True)
    assert type(output) is TFGroupViTModelOutput
    assert list(output) == list(eager)
    close(output.segmentation_logits, eager.segmentation_logits)
    for change, message in (
        ({"input_ids": np.zeros((4, 13), np.int64)}, "a text may have 1 to 12 tokens, got 13"),
        ({"pixel_values": inputs["pixel_values"][..., :9]}, "multiples of the patch size 8, got 16 x 9"),
    ):
        with pytest.raises(InputError, match=message):
            tf.function(lambda given: model(given))({**inputs, **change})
    sides_unknown = tf.TensorSpec((None, 3, None, None))
    with pytest.raises(InputError, match=r"known sides while a graph is traced.*such as \[None, 3, 16, 16\]"):
        tf.function(model.get_image_features).get_concrete_function(sides_unknown)


# -- fit and its company --


def loss_and_hits(model: TFGroupViTModel, inputs: Inputs) -> dict[str, float]:
    """Returns the expected result of `evaluate`, from the model's own outputs, in NumPy."""
    logits = model(inputs).logits_per_image.numpy().astype(np.float64)
    own = np.arange(len(logits))

    def cross_entropy(rows: np.ndarray) -> float:
        return float(np.mean(np.log(np.exp(rows).sum(axis=1)) - np.diag(rows)))

    return {
        "loss": (cross_entropy(logits) + cross_entropy(logits.T)) / 2,
        "image_to_text_top1": float((logits.argmax(axis=1) == own).mean()),
        "text_to_image_top1": float((logits.argmax(axis=0) == own).mean()),
    }


def test_evaluate_and_predict_say_what_the_model_says(model: TFGroupViTModel, inputs: Inputs) -> None:
    model.compile()
    measured = model.evaluate(batches(inputs), verbose=0, return_dict=True)
    assert measured == pytest.approx(loss_and_hits(model, inputs), rel=FLOAT32)
    outputs = model.predict(batches(inputs), verbose=0)
    assert type(outputs) is TFGroupViTModelOutput
    close(outputs.image_embeds, model(inputs).image_embeds)


def test_fit_learns_from_every_kind_of_data(inputs: Inputs) -> None:
    model = TFGroupViTModel(smallest_config())
    # The optimizer with the fewest operations, untraced: sizes of batches differ.
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    first, numbers = loss_and_hits(model, inputs)["loss"], []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
            numbers.append(logs["loss"])

    def generator():
        for _ in range(2):
            yield inputs

    data = {
        "data set": {"x": batches(inputs).repeat(2)},
        "generator": {"x": generator(), "steps_per_epoch": 2, "validation_data": generator(), "validation_steps": 1},
        "split": {"x": inputs, "batch_size": 2, "validation_split": 0.5},
    }
    for name, given in data.items():
        before = len(numbers)
        history = model.fit(**given, verbose=0, callbacks=[Count()]).history
        assert len(numbers) - before == (1 if name == "split" else 2), name
        assert set(history) >= {"loss", "image_to_text_top1", "text_to_image_top1"}, name
        assert ("val_loss" in history) == (name in ("generator", "split")), name
    assert loss_and_hits(model, inputs)["loss"] < first


@pytest.mark.usefixtures("rewritten_graphs")
@pytest.mark.parametrize(
    "jit_compile",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # XLA compiles for half a minute
)
def test_a_compiled_step_is_the_eager_step(inputs: Inputs, jit_compile: bool) -> None:
    """SGD for two steps with given noise, then a pair alone, which is left out: a graph, also one that XLA compiles,
    against eager."""
    pairs = tf.data.Dataset.from_tensor_slices({**inputs, "gumbel_noise": (given_noise(),)})
    data = pairs.repeat(3).take(9).batch(4)
    results = []
    for options in ({"run_eagerly": True}, {"jit_compile": jit_compile}):
        keras.utils.set_random_seed(1)
        model = TFGroupViTModel(smallest_config(), dtype="float64")
        model.compile(keras.optimizers.SGD(2.0**-7), **options)
        with pytest.warns(UserWarning, match="batches of a single pair were skipped"):
            model.fit(data, verbose=0)
        assert int(model.optimizer.iterations) == 2
        results.append(canonical_variables(model))
    eager, compiled = results
    for name, variable in eager.items():
        close(compiled[name], variable, name, FLOAT64)


def test_gradient_accumulation_is_the_mean_of_its_batches(inputs: Inputs) -> None:
    """One accumulated update equals SGD by hand on the mean of two batches' gradients."""
    halves = [{name: array[i : i + 2] for name, array in inputs.items()} for i in (0, 2)]
    noise = [(given_noise()[i : i + 2],) for i in (0, 2)]
    keras.utils.set_random_seed(1)
    model = TFGroupViTModel(smallest_config(), dtype="float64")
    start = [tf.identity(v) for v in model.trainable_variables]
    gradients = []
    for half, half_noise in zip(halves, noise, strict=True):
        with tf.GradientTape() as tape:
            loss = model(half, gumbel_noise=half_noise, training=True, return_loss=True).loss
        gradients.append([tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)])
    model.compile(keras.optimizers.SGD(0.125, gradient_accumulation_steps=2), run_eagerly=True)
    for half, half_noise in zip(halves, noise, strict=True):
        model.train_on_batch({**half, "gumbel_noise": half_noise})
    for variable, before, first, second in zip(model.trainable_variables, start, *gradients, strict=True):
        close(variable, before - 0.125 * (first + second) / 2, variable.path, FLOAT64)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fit_in_mixed_precision(inputs: Inputs, policy: str) -> None:
    keras.utils.set_random_seed(0)
    model = TFGroupViTModel(smallest_config(), dtype=policy)
    assert model(inputs).image_embeds.dtype == policy.removeprefix("mixed_")
    model.compile(keras.optimizers.SGD(1e-2), run_eagerly=True)
    # Keras scales the loss where float16's small gradients would vanish.
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    if scaled:
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(2.0)  # that of the start is too large for some steps
    before = model.logit_scale.numpy()
    losses = model.fit(batches(inputs), verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert model.logit_scale.dtype == "float32"
    assert model.logit_scale.numpy() != before


def test_a_loss_of_ones_own_is_used(inputs: Inputs) -> None:
    vision = TFGroupViTVisionModel(smallest_config().vision_config)
    pooled = vision(inputs["pixel_values"]).pooler_output
    inner = keras.Model(symbol := keras.Input((3, 16, 16)), vision(symbol).pooler_output)
    inner.compile(loss="mse", run_eagerly=True)
    assert inner.evaluate(inputs["pixel_values"], pooled, verbose=0) == pytest.approx(0, abs=1e-10)


def test_bad_data_is_refused_by_fit(inputs: Inputs) -> None:
    model = TFGroupViTModel(smallest_config())
    model.compile(run_eagerly=True)
    with pytest.raises(InputError, match="pixel_values is missing"):
        model.fit({"input_ids": inputs["input_ids"]})
    with pytest.raises(InputError, match="must lie between 0 and 29, got 77"):
        model.fit({**inputs, "input_ids": inputs["input_ids"] * 0 + 77})
    with pytest.raises(InputError, match="got 4 images and 2 texts"):
        model.evaluate(
            (
                (({**inputs, "input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"][:2]}),)
                for _ in range(1)
            ),
            verbose=0,
        )
    with pytest.raises(InputError, match="at least 2 images and 2 texts in a batch, got 1"):
        model.fit(inputs, batch_size=1, verbose=0)
    model.config.update({"return_dict": False})
    with pytest.raises(InputError, match="leave return_dict of the configuration at True"):
        model.evaluate(batches(inputs), verbose=0)


def test_two_replicas_are_one_device_with_the_whole_batch(tmp_path: Path) -> None:
    """Two logical CPUs under MirroredStrategy, in a process of its own: devices are divided before TensorFlow
    starts."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.replicas", str(tmp_path), "plain", "one", "mirrored"],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = (dict(np.load(tmp_path / f"{name}-0-plain.npz")) for name in ("one", "mirrored"))
    # Relative, in float64, where nothing but another order of summation is left; losses and shares are reported in
    # float32, whose last bit may be another.
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-6)
    for name, value in one.items():
        assert np.abs(two[name] - value).max() <= 1e-11 * max(np.abs(value).max(), 1.0), name


# -- gradients, noise, layers --


def test_gradient_checkpointing_changes_no_gradient(inputs: Inputs) -> None:
    """Also with dropout in the attention: what is dropped is dropped again when a layer is computed a second time."""
    settings = {"attention_dropout": 0.5}
    config = smallest_config()
    for part in (config.text_config, config.vision_config):
        part.update(settings)
    model = TFGroupViTModel(config, dtype="float64")
    noise = [given_noise()]
    seeds = [layer.seed_generator for layer in model._flatten_layers() if isinstance(layer, Attention)]
    gradients = []
    for enable in (False, True):
        for number, seed in enumerate(seeds):
            seed.state.assign([number, 7])
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enable
        with tf.GradientTape() as tape:
            loss = model(inputs, gumbel_noise=noise, training=True, return_loss=True).loss
        gradients.append([tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    for variable, plain, saving in zip(model.trainable_variables, *gradients, strict=True):
        np.testing.assert_allclose(saving, plain, atol=1e-12, err_msg=variable.path)  # float64 rounding


def test_training_draws_noise_and_evaluation_does_not(model: TFGroupViTModel, inputs: Inputs) -> None:
    def first_stage(training: bool) -> np.ndarray:
        tower = model.vision_model(inputs["pixel_values"], output_hidden_states=True, training=training)
        return tower.hidden_states[1].numpy()

    assert not np.array_equal(first_stage(True), first_stage(True))
    np.testing.assert_array_equal(first_stage(False), first_stage(False))


def test_gumbel_noise_has_the_right_distribution() -> None:
    keras.utils.set_random_seed(0)
    noise = gumbel_noise_like(tf.zeros(200_000, tf.float64)).numpy()
    # Mean: Euler's constant; variance: pi^2 / 6. Five standard errors of 200,000 samples.
    assert noise.mean() == pytest.approx(0.5772, abs=5 * 1.2825 / 200_000**0.5)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    half = gumbel_noise_like(tf.zeros(1000, tf.float16))
    assert half.dtype == tf.float16
    assert np.isfinite(half.numpy()).all()


def test_batch_norm_counts_and_keeps_the_unbiased_variance() -> None:
    norm = BatchNorm(3)
    norm.build()
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    norm(x, training=True)
    np.testing.assert_allclose(norm.moving_mean, 0.1 * x.mean(axis=0), rtol=1e-5)  # float32
    np.testing.assert_allclose(norm.moving_variance, 0.9 + 0.1 * x.var(axis=0, ddof=1), rtol=1e-5)
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_documented_activation(name: str) -> None:
    from groupvit_torch.layers import ACTIVATIONS as OURS

    torch = pytest.importorskip("torch")
    x = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(ACTIVATIONS[name](tf.constant(x)), OURS[name](torch.from_numpy(x)), atol=1e-12)


def test_initial_values_follow_the_documented_scheme() -> None:
    keras.utils.set_random_seed(0)
    config = GroupViTConfig(
        vision_config={"depths": [1, 1, 1]}, text_config={"num_hidden_layers": 2, "vocab_size": 999}
    )
    state = canonical_variables(TFGroupViTModel(config))

    def std(name: str) -> float:
        return float(np.std(state[name]))

    # Thousands of samples each: a few percent of sampling error. (Truncation at 2, not at 2 std, leaves 0.02 as it is.)
    close_to = {"rel": 0.05}
    stage, layer = "vision_model.encoder.stages.0", "text_model.encoder.layers.1"
    assert std(f"{stage}.layers.0.mlp.fc1.weight") == pytest.approx(0.02, **close_to)
    assert std(f"{stage}.downsample.assign.q_proj.weight") == pytest.approx(0.02, **close_to)
    assert std(f"{stage}.group_token") == pytest.approx(0.02, **close_to)
    assert std("vision_model.embeddings.position_embeddings") == pytest.approx(0.02, **close_to)
    patches = "vision_model.embeddings.patch_embeddings.projection"
    assert std(f"{patches}.weight") == pytest.approx((3 * 16 * 16) ** -0.5 / 3**0.5, **close_to)
    assert std("text_model.embeddings.token_embedding.weight") == pytest.approx(0.02, **close_to)
    assert std("text_model.embeddings.position_embedding.weight") == pytest.approx(0.01, **close_to)
    assert std(f"{layer}.self_attn.q_proj.weight") == pytest.approx(256**-0.5, **close_to)
    assert std(f"{layer}.self_attn.out_proj.weight") == pytest.approx(256**-0.5 * 4**-0.5, **close_to)
    assert std(f"{layer}.mlp.fc1.weight") == pytest.approx(512**-0.5, **close_to)
    assert std("visual_projection.0.weight") == pytest.approx(384**-0.5 / 3**0.5, **close_to)
    for name in (f"{stage}.layers.0.mlp.fc1.bias", f"{layer}.mlp.fc1.bias", "vision_model.layernorm.bias"):
        assert not np.any(state[name])
    assert float(state["logit_scale"].numpy()) == pytest.approx(2.6592)


def test_names_without_the_prefix_are_the_same_classes() -> None:
    for name in groupvit_tf.__all__:
        if name.startswith("TF"):
            assert getattr(groupvit_tf, name) is getattr(groupvit_tf, name.removeprefix("TF"))


def given_noise() -> np.ndarray:
    return np.random.default_rng(5).gumbel(size=(4, 4, 4))


def close(actual, wanted, name: str = "", tolerance: float = FLOAT32) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape, name
    limit = tolerance * max(float(np.abs(wanted).max()), 1e-2)  # what is near zero has no scale of its own
    assert float(np.abs(actual - wanted).max()) <= limit, name
