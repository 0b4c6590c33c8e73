"""What `keras.Model` offers: every public name and every argument either works as Keras says or is refused in one
sentence.

A name or an argument that a later Keras adds makes the first two tests fail: try it, then write it into the table.
"""

import inspect
import math
import os
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.encoding import BatchEncoding
from groupvit_tf import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_tf.data import known
from groupvit_tf.loss import symmetric_cross_entropy
from tests.support.models import smallest_config, smallest_inputs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

Inputs = dict[str, np.ndarray]

# A graph adds up in another order than eager operations do, in float32.
GRAPH = 1e-5

# Arguments of methods: those that are refused. All others are used in a test below.
REFUSED_ARGUMENTS = {
    "compile": {"loss", "loss_weights", "metrics", "weighted_metrics"},
    "fit": {"y", "class_weight"},
    "evaluate": {"y"},
    "train_on_batch": {"y", "class_weight"},
    "test_on_batch": {"y"},
    "export": {"input_signature"},
}
ARGUMENTS = {
    "compile": "optimizer loss loss_weights metrics weighted_metrics run_eagerly steps_per_execution jit_compile "
    "auto_scale_loss",
    "fit": "x y batch_size epochs verbose callbacks validation_split validation_data shuffle class_weight "
    "sample_weight "
    "initial_epoch steps_per_epoch validation_steps validation_batch_size validation_freq",
    "evaluate": "x y batch_size verbose sample_weight steps callbacks return_dict kwargs",
    "predict": "x batch_size verbose steps callbacks",
    "train_on_batch": "x y sample_weight class_weight return_dict",
    "test_on_batch": "x y sample_weight return_dict",
    "predict_on_batch": "x",
    "export": "filepath format verbose input_signature kwargs",
    "save": "filepath overwrite zipped kwargs",
    "save_weights": "filepath overwrite max_shard_size",
    "load_weights": "filepath skip_mismatch kwargs",
    "quantize": "mode config filters kwargs",
    "summary": "line_length positions print_fn expand_nested show_trainable layer_range",
    "get_layer": "name index",
}


@pytest.fixture(scope="module")
def model() -> GroupViTModel:
    keras.utils.set_random_seed(0)
    model = GroupViTModel(smallest_config())
    model.compile("sgd", run_eagerly=True)
    return model


@pytest.fixture
def inputs() -> Inputs:
    return smallest_inputs()


def symbols(inputs: Inputs) -> dict[str, Any]:
    return {name: keras.KerasTensor(array.shape, array.dtype.name) for name, array in inputs.items()}


def shapes(outputs: Any) -> set[tuple[int, ...]]:
    return {
        tuple(outputs[name].shape) for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
    }


def logits(model: Any, inputs: Inputs) -> np.ndarray:
    return np.asarray(model(inputs).logits_per_image)


def state(model: Any) -> tuple[list[Any], list[Any]]:
    return [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]


Case = tuple[GroupViTModel, Inputs, Path]

# What works: name -> a use of it, which is true.
WORKS: dict[str, Callable[[GroupViTModel, Inputs, Path], Any]] = {
    "add_variable": lambda m, x, d: callable(m.add_variable),  # in `build` of a subclass: test_keras_files.py
    "add_weight": lambda m, x, d: callable(m.add_weight),
    "build": lambda m, x, d: m.build() is None and len(m.weights) == 103,
    "build_from_config": lambda m, x, d: m.build_from_config(m.get_build_config()) is None and len(m.weights) == 103,
    "call": lambda m, x, d: m.call(**x).logits_per_image.shape == (4, 4),
    "compile_from_config": lambda m, x, d: m.compile_from_config({"optimizer": "sgd", "run_eagerly": True}) is None,
    "compiled_loss": lambda m, x, d: float(warned(m.compiled_loss, None, m(x))) > 0,
    "compute_dtype": lambda m, x, d: m.compute_dtype == "float32",
    "compute_loss": lambda m, x, d: float(m.compute_loss(x, None, m(x))) > 0,
    "compute_mask": lambda m, x, d: m.compute_mask(x, None) is None,
    "compute_metrics": lambda m, x, d: set(m.compute_metrics(x, None, m(x))) >= {"loss", "image_to_text_top1"},
    "compute_output_spec": lambda m, x, d: callable(m.compute_output_spec),  # `symbolic_call` returns what it does
    "count_params": lambda m, x, d: (
        m.count_params() == m.num_parameters() + sum(math.prod(v.shape) for v in m.non_trainable_weights)
    ),
    "distribute_strategy": lambda m, x, d: m.distribute_strategy.num_replicas_in_sync == 1,
    "dtype": lambda m, x, d: m.dtype == "float32",
    "dtype_policy": lambda m, x, d: m.dtype_policy.name == "float32",
    "evaluate": lambda m, x, d: set(m.evaluate(x, verbose=0, return_dict=True)) >= {"loss", "image_to_text_top1"},
    "export": lambda m, x, d: callable(m.export),  # test_keras_files.py
    "fit": lambda m, x, d: m.fit(x, verbose=0).history["loss"][0] > 0,
    "from_config": lambda m, x, d: GroupViTModel.from_config(m.get_config()).config == m.config,
    "get_build_config": lambda m, x, d: isinstance(m.get_build_config(), dict),
    "get_compile_config": lambda m, x, d: m.get_compile_config()["run_eagerly"],
    "get_config": lambda m, x, d: m.get_config()["name"] == m.name,
    "get_layer": lambda m, x, d: m.get_layer("text_model") is m.get_layer(index=0),
    "get_metrics_result": lambda m, x, d: "loss" in m.get_metrics_result(),
    "get_state_tree": lambda m, x, d: set(m.get_state_tree()) >= {"trainable_variables", "optimizer_variables"},
    "set_state_tree": lambda m, x, d: m.set_state_tree(m.get_state_tree("numpy_array")) is None,
    "get_weights": lambda m, x, d: len(m.get_weights()) == len(m.weights),
    "set_weights": lambda m, x, d: m.set_weights(m.get_weights()) is None,
    "layers": lambda m, x, d: [layer.name for layer in m.layers][:2] == ["text_model", "vision_model"],
    "loss": lambda m, x, d: m.loss is None,
    "losses": lambda m, x, d: m.losses == [],
    "make_predict_function": lambda m, x, d: m.make_predict_function(force=True) is None,
    "make_test_function": lambda m, x, d: m.make_test_function(force=True) is None,
    "make_train_function": lambda m, x, d: m.make_train_function(force=True) is None,
    "metrics": lambda m, x, d: m.metrics[0].name == "loss",
    "metrics_names": lambda m, x, d: "image_to_text_top1" in m.metrics_names,
    "metrics_variables": lambda m, x, d: len(m.metrics_variables) == 6,
    "non_trainable_variables": lambda m, x, d: len(m.non_trainable_variables) > 0,
    "non_trainable_weights": lambda m, x, d: len(m.non_trainable_weights) == 6,
    "path": lambda m, x, d: m.path == m.name,
    "quantize": lambda m, x, d: callable(m.quantize),  # test_quantize.py
    "predict": lambda m, x, d: m.predict(x, verbose=0).logits_per_image.shape == (4, 4),
    "predict_on_batch": lambda m, x, d: m.predict_on_batch(BatchEncoding(x)).logits_per_image.shape == (4, 4),
    "predict_step": lambda m, x, d: m.predict_step((x,)).logits_per_image.shape == (4, 4),
    "reset_metrics": lambda m, x, d: m.reset_metrics() is None,
    "run_eagerly": lambda m, x, d: m.run_eagerly,
    "save": lambda m, x, d: m.save(d / "x.keras") is None and (d / "x.keras").stat().st_size > 0,
    "save_weights": lambda m, x, d: m.save_weights(d / "x.weights.h5") is None and (d / "x.weights.h5").exists(),
    "load_weights": lambda m, x, d: m.load_weights(d / "x.weights.h5") is None,
    "stateless_call": lambda m, x, d: m.stateless_call(*state(m), x)[0].logits_per_image.shape == (4, 4),
    "stateless_compute_loss": lambda m, x, d: (
        float(m.stateless_compute_loss(*state(m), [v.value for v in m.metrics_variables], x, None, m(x))[0]) > 0
    ),
    "summary": lambda m, x, d: all(word in summary(m) for word in (m.name, "(None, 8)", "(None, 12)", "(None, 6)")),
    "symbolic_call": lambda m, x, d: shapes(m.symbolic_call(symbols(x))) == {(4, 4), (4, 6)},
    "test_on_batch": lambda m, x, d: m.test_on_batch(x, return_dict=True)["loss"] > 0,
    "test_step": lambda m, x, d: "loss" in m.test_step((x,)),
    "to_json": lambda m, x, d: keras.models.model_from_json(m.to_json()).config == m.config,
    "train_on_batch": lambda m, x, d: m.train_on_batch(x, return_dict=True)["loss"] > 0,
    "train_step": lambda m, x, d: "loss" in m.train_step((x,)),
    "trainable": lambda m, x, d: m.trainable,
    "trainable_variables": lambda m, x, d: len(m.trainable_variables) == 97,
    "trainable_weights": lambda m, x, d: len(m.trainable_weights) == 97,
    "variable_dtype": lambda m, x, d: m.variable_dtype == "float32",
    "variables": lambda m, x, d: len(m.variables) >= len(m.weights),
    "weights": lambda m, x, d: len(m.weights) == 103,
}

# What is refused: name -> a use of it, and what the sentence says. Keras's own sentences where the name has no meaning
# for any model of this kind.
REFUSED: dict[str, tuple[Callable[[GroupViTModel, Inputs], Any], str]] = {
    "add_loss": (lambda m, x: m.add_loss(1.0), "can only be called from inside"),
    "add_metric": (lambda m, x: m.add_metric(1), "add_metric"),
    "compile": (lambda m, x: m.compile(loss="mse"), "cannot be compiled with loss, since it returns a record"),
    "compute_output_shape": (lambda m, x: m.compute_output_shape((4, 5)), "compute_output_shape"),
    "input": (lambda m, x: m.input, "has no defined input"),
    "output": (lambda m, x: m.output, "has no defined output"),
    "quantized_build": (lambda m, x: m.quantized_build(None, "int8"), "quantized_build"),
}

# Switches and hooks of Keras that mean the same for every model, and parts of what is used above.
INHERITED = {
    "compiled_metrics",
    "distribute_reduction_method",
    "get_quantization_layer_structure",
    "input_dtype",
    "input_spec",
    "jit_compile",
    "load_own_variables",
    "quantization_mode",
    "quantized_call",
    "rematerialized_call",
    "save_own_variables",
    "supports_masking",
}


def warned(function: Callable[..., Any], *args: Any) -> Any:
    with pytest.warns(UserWarning, match="deprecated"):
        return function(*args)


def summary(model: Any) -> str:
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    return "\n".join(lines)


def test_the_table_names_all_that_a_keras_model_has() -> None:
    has = {name for name in dir(keras.Model) if not name.startswith("_")}
    written = WORKS.keys() | REFUSED.keys() | INHERITED
    assert has == written, (
        f"Keras {keras.__version__} adds {sorted(has - written)} and lacks {sorted(written - has)}: try each, then "
        "mend the table"
    )


@pytest.mark.parametrize("method", ARGUMENTS)
def test_the_table_names_all_arguments(method: str) -> None:
    has = set(inspect.signature(getattr(keras.Model, method)).parameters) - {"self"}
    written = set(ARGUMENTS[method].split())
    assert has == written, (
        f"keras.Model.{method} takes {sorted(has ^ written)} otherwise: try each, then mend the table"
    )


def test_what_works(model: GroupViTModel, inputs: Inputs, tmp_path: Path) -> None:
    for name, use in WORKS.items():
        assert use(model, inputs, tmp_path), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(model: GroupViTModel, inputs: Inputs, name: str) -> None:
    use, says = REFUSED[name]
    with pytest.raises((InputError, ValueError, AttributeError, NotImplementedError), match=says) as caught:
        use(model, inputs)
    assert "\n" not in str(caught.value)


def test_arguments_of_fit_and_evaluate(model: GroupViTModel, inputs: Inputs, tmp_path: Path) -> None:
    """All that are not refused, over several calls."""
    model.compile(optimizer="sgd", run_eagerly=True, jit_compile=False, auto_scale_loss=True, steps_per_execution=1)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=9)
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True)
    history = model.fit(
        x=inputs,
        batch_size=2,
        epochs=4,
        initial_epoch=2,
        verbose=0,
        callbacks=[stop, best],
        shuffle=True,
        steps_per_epoch=1,
        sample_weight=np.ones(4),
        validation_data=(inputs, None, np.ones(4)),
        validation_steps=1,
        validation_batch_size=4,
        validation_freq=[3, 4],
    ).history
    assert (len(history["loss"]), len(history["val_loss"])) == (2, 2)
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert logits(loaded, inputs).shape == (4, 4)
    split = model.fit(inputs, batch_size=2, validation_split=0.5, verbose=0, epochs=1).history
    assert "val_loss" in split
    for data in ((inputs, {}), tf.data.Dataset.from_tensors(inputs)):
        assert "val_loss" in model.fit(inputs, validation_data=data, verbose=0).history
    found = model.evaluate(x=inputs, batch_size=4, verbose=0, steps=1, callbacks=[], return_dict=True)
    assert found["loss"] == pytest.approx(
        float(model.compute_loss(inputs, None, model(inputs), training=False)), rel=GRAPH
    )
    out = model.predict(x=inputs, batch_size=4, verbose=0, steps=1, callbacks=[])
    np.testing.assert_allclose(out.logits_per_image, logits(model, inputs), rtol=GRAPH)
    model.save(tmp_path / "plain", zipped=False, overwrite=True)
    model.save_weights(tmp_path / "m.weights.json", max_shard_size=1)
    model.load_weights(tmp_path / "m.weights.json", skip_mismatch=False)
    assert "TextEmbeddings" in str(model.get_layer(name="text_model", index=None).embeddings)
    model.summary(
        line_length=80, positions=None, print_fn=lambda *_, **__: None, expand_nested=True, show_trainable=True
    )


def test_arguments_that_are_refused(model: GroupViTModel, inputs: Inputs, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"y": np.zeros(4), "class_weight": {0: 1.0}, "input_signature": []}
    for method, names in REFUSED_ARGUMENTS.items():
        assert names <= set(ARGUMENTS[method].split())
        for name in names:
            first = () if method == "compile" else (tmp_path / "m",) if method == "export" else (inputs,)
            with pytest.raises(InputError) as caught:
                getattr(model, method)(*first, **{name: wrong.get(name, ["mse"])})
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
    tower = GroupViTVisionModel(smallest_config().vision_config)
    tower.compile(run_eagerly=True)
    with pytest.raises(InputError, match="has no loss to train with"):
        tower.fit(inputs["pixel_values"], verbose=0)
    for wrong_shape in (np.ones(3), np.ones((4, 2))):
        with pytest.raises(InputError, match="sample_weight must have one number for each of the 4 pairs"):
            model.fit(inputs, sample_weight=wrong_shape, verbose=0)


def test_weights_of_pairs_are_those_of_the_loss(model: GroupViTModel, inputs: Inputs) -> None:
    weights = np.array([3.0, 0.0, 0.5, 1.0], np.float32)
    similarities = logits(model, inputs).astype(np.float64)

    def cross_entropy(rows: np.ndarray) -> np.ndarray:
        return np.log(np.exp(rows).sum(axis=1)) - np.diag(rows)

    pairs = (cross_entropy(similarities) + cross_entropy(similarities.T)) / 2
    wanted = pytest.approx(float((weights * pairs).mean()), rel=GRAPH)
    triples = tf.data.Dataset.from_tensors((inputs, {}, weights))
    assert float(symmetric_cross_entropy(similarities, weights)) == wanted
    assert model.evaluate(inputs, sample_weight=weights, verbose=0, return_dict=True)["loss"] == wanted
    assert model.evaluate(triples, verbose=0, return_dict=True)["loss"] == wanted
    assert model.test_on_batch(inputs, sample_weight=weights[:, None], return_dict=True)["loss"] == wanted
    torch = pytest.importorskip("torch")
    from groupvit_torch.loss import symmetric_cross_entropy as twin

    assert float(twin(torch.from_numpy(similarities), torch.from_numpy(weights))) == wanted
    before = [np.array(variable) for variable in model.trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    model.fit(inputs, sample_weight=np.zeros(4), verbose=0)
    for variable, value in zip(model.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


# -- forms of data --


class Batches(keras.utils.PyDataset):
    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def test_every_form_of_data(model: GroupViTModel, inputs: Inputs) -> None:
    encoding, other = BatchEncoding(inputs), UserDict(inputs)
    lists = {name: array.tolist() for name, array in inputs.items()}
    wanted = logits(model, inputs)
    data: dict[str, Callable[[], Any]] = {
        "encoding": lambda: encoding,
        "encoding of lists": lambda: BatchEncoding(lists),
        "another mapping": lambda: other,
        "list": lambda: [inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]],
        "generator": lambda: (batch for batch in (encoding, encoding)),
        "iterator": lambda: iter([encoding]),
        "PyDataset": lambda: Batches([encoding]),
        "PyDataset of tuples": lambda: Batches([(other, {})]),
        "tf.data": lambda: tf.data.Dataset.from_tensors(encoding),
        "tf.data with empty targets": lambda: tf.data.Dataset.from_tensors((encoding, {})),
    }
    for kind in ("uint8", "bool", "int32", "int64"):
        mask = inputs["attention_mask"].astype(kind)
        data[f"{kind} mask"] = lambda mask=mask: {**inputs, "attention_mask": mask}
    for name, make in data.items():
        np.testing.assert_allclose(
            model.predict(make(), steps=1, verbose=0).logits_per_image, wanted, rtol=GRAPH, err_msg=name
        )
    model.compile("sgd", run_eagerly=True)
    for name in ("PyDataset", "tf.data with empty targets"):
        assert np.isfinite(model.fit(data[name](), steps_per_epoch=1, verbose=0).history["loss"]).all(), name


def test_a_loader_of_pytorch(model: GroupViTModel, inputs: Inputs) -> None:
    torch = pytest.importorskip("torch")
    samples = [{name: torch.from_numpy(array[i]) for name, array in inputs.items()} for i in range(4)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    found = model.predict(loader, verbose=0).image_embeds
    np.testing.assert_allclose(
        found, model(inputs).image_embeds, rtol=1e-4, atol=1e-6
    )  # batches of two instead of four
    model.compile("sgd", run_eagerly=True)
    assert len(model.fit(loader, epochs=2, verbose=0).history["loss"]) == 2
    assert type(loader) is torch.utils.data.DataLoader
    whole = {name: torch.from_numpy(array) for name, array in inputs.items()}
    assert model.predict(whole, verbose=0).logits_per_image.shape == (4, 4)


def test_a_data_set_is_taken_as_it_is_where_it_can_be(inputs: Inputs) -> None:
    data = tf.data.Dataset.from_tensors(inputs)
    assert known(data) is data


# -- batches of a single pair --


def five(inputs: Inputs) -> Inputs:
    return {name: np.concatenate([array, array[:1]]) for name, array in inputs.items()}


def fresh(**options: Any) -> GroupViTModel:
    keras.utils.set_random_seed(3)
    model = GroupViTModel(smallest_config())
    model.compile(**{"optimizer": keras.optimizers.SGD(1e-2, momentum=0.9), **options})
    return model


def test_a_last_batch_of_one_pair_is_left_out(inputs: Inputs) -> None:
    """The run is that without the pair, in the bits of weights, moments and reported figures (graphs and XLA:
    test_model.py)."""
    without, model = fresh(run_eagerly=True), fresh(run_eagerly=True)
    data = tf.data.Dataset.from_tensor_slices(five(inputs)).batch(2)
    wanted = without.fit(data.take(2), verbose=0).history
    with pytest.warns(UserWarning, match="batches of a single pair were skipped in training"):
        history = model.fit(data, verbose=0).history
    assert history == wanted
    assert int(model.optimizer.iterations) == 2
    assert int(model.visual_projection.norm.num_batches_tracked) == 2
    assert all(np.isfinite(np.asarray(variable)).all() for variable in model.weights)
    for mine, theirs in zip(model.variables, without.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=mine.path)
    # In evaluation a batch of one is a batch.
    assert model.evaluate(data, verbose=0, return_dict=True)["loss"] >= 0
    assert model.predict({name: array[:1] for name, array in inputs.items()}, verbose=0).loss is None


def test_arrays_whose_last_batch_is_one_pair(inputs: Inputs) -> None:
    model = fresh(run_eagerly=True)
    with pytest.warns(UserWarning, match="skipped"):
        model.fit(five(inputs), batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 1


def test_nothing_but_single_pairs_is_refused(inputs: Inputs) -> None:
    model = fresh(run_eagerly=True)
    one = {name: array[:1] for name, array in inputs.items()}
    for fit in (
        lambda: model.fit(inputs, batch_size=1),
        lambda: model.fit(one),
        lambda: model.train_on_batch(one),
        lambda: model.fit(tf.data.Dataset.from_tensors(one), verbose=0),
        lambda: model(one, training=True),
    ):
        with pytest.raises(InputError, match="at least 2 images and 2 texts in a batch, got 1"):
            fit()


def test_pytorch_refuses_a_pair_alone_in_the_same_words(inputs: Inputs) -> None:
    torch = pytest.importorskip("torch")
    from groupvit_torch import GroupViTModel as Twin

    one = {name: torch.from_numpy(array[:1]) for name, array in inputs.items()}
    twin = Twin(smallest_config())
    with pytest.raises(InputError, match="at least 2 images and 2 texts in a batch, got 1"):
        twin.train()(**one)
    assert twin.eval()(**one).logits_per_image.shape == (1, 1)


# -- models around ours --


@keras.saving.register_keras_serializable("tests")
class Around(keras.Model):
    """Ours and a layer beside it that Keras builds by calling it."""

    def __init__(self, inner: GroupViTModel | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.inner = GroupViTModel(smallest_config()) if inner is None else inner
        self.head = keras.layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.head(self.inner(x).image_embeds)


def around(inputs: Inputs, inner: GroupViTModel | None = None) -> Any:
    model = Around(inner)
    model(inputs)
    return model


def functional(inputs: Inputs) -> Any:
    given = {name: keras.Input(array.shape[1:], dtype=array.dtype.name, name=name) for name, array in inputs.items()}
    return keras.Model(given, keras.layers.Dense(3)(GroupViTModel(smallest_config())(given).image_embeds))


def sequential(inputs: Inputs) -> Any:
    @keras.saving.register_keras_serializable("tests")
    class Pooled(GroupViTVisionModel):
        def call(self, pixel_values: Any, training: bool | None = None) -> Any:
            return super().call(pixel_values, training=training).pooler_output

    return keras.Sequential([keras.Input((3, 16, 16)), Pooled(smallest_config().vision_config), keras.layers.Dense(3)])


@pytest.mark.parametrize("make", [around, functional, sequential])
def test_models_around_ours_come_back_from_a_file(
    make: Callable[[Inputs], Any], inputs: Inputs, tmp_path: Path
) -> None:
    model = make(inputs)
    given: Any = inputs["pixel_values"] if make is sequential else inputs
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(given), model(given))
    if make is functional:
        np.testing.assert_array_equal(np.shape(keras.models.clone_model(model)(given)), (4, 3))
    if make is sequential:
        model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
        assert "mae" in model.fit(given, np.zeros((4, 3)), sample_weight=np.ones(4), verbose=0).history


def test_a_checkpoint_of_tensorflow_holds_all_weights(inputs: Inputs, tmp_path: Path) -> None:
    inner = fresh(), fresh()
    for one, two in (inner, tuple(around(inputs, model) for model in inner)):
        for variable in two.weights:
            variable.assign(variable + 1)
        path = tf.train.Checkpoint(model=one).write(str(tmp_path / "checkpoint"))
        tf.train.Checkpoint(model=two).read(path).assert_existing_objects_matched()
        for mine, theirs in zip(one.weights, two.weights, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=mine.path)
    shorter = GroupViTTextModel(smallest_config().text_config)
    path = tf.train.Checkpoint(model=shorter).write(str(tmp_path / "checkpoint"))
    config = smallest_config().text_config
    config.num_hidden_layers = 2
    with pytest.raises(AssertionError):
        tf.train.Checkpoint(model=GroupViTTextModel(config)).read(path).assert_existing_objects_matched()


# -- configurations from files --


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": 1, "outputs": 1},
        {"layers": [], "input_layers": [], "output_layers": []},
        {"config": None},
        {"config": 3},
        {"dtype": {"class_name": "Lambda", "config": {}}},
        {"dtype": 7},
        {"dtype": {"config": {"name": "int8_from_float32"}}},
        {"name": ["x"]},
        {"trainable": {"": "no"}},
        {"self": 1},
        {"_x": 1},
    ],
)
def test_a_configuration_of_another_shape_is_refused_and_leaves_no_trace(
    model: GroupViTModel, change: dict[str, Any]
) -> None:
    bases = GroupViTModel.__mro__
    config = {"module": "groupvit_tf.model", "class_name": "GroupViTModel", "registered_name": "groupvit>GroupViTModel"}
    for load in (
        GroupViTModel.from_config,
        lambda settings: keras.saving.deserialize_keras_object({**config, "config": settings}),
    ):
        with pytest.raises(InputError) as caught:
            load({**model.get_config(), **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="takes no argument 'inputs'"):
        GroupViTModel(smallest_config(), inputs=1, outputs=1)
    assert GroupViTModel.__mro__ == bases


def test_a_backend_of_keras_that_is_neither_tensorflow_nor_jax() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import groupvit_tf"],
        capture_output=True, text=True, check=False, env={**os.environ, "KERAS_BACKEND": "torch"},
    )  # fmt: skip
    assert result.stderr.splitlines()[-1].endswith(
        "groupvit_tf runs on Keras's backends tensorflow and jax, and Keras is set to 'torch': set "
        "KERAS_BACKEND=tensorflow in the "
        "environment, or use groupvit_torch"
    )


def test_columns_of_tables_are_texts() -> None:
    from groupvit_common.preprocessing.encoding import check_texts

    column = SimpleNamespace(tolist=lambda: ["a", "b"])
    arrow = SimpleNamespace(to_pylist=lambda: ["a", "b"])
    for texts in (["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), column, arrow):
        assert check_texts(texts) == ["a", "b"]
    assert check_texts(np.array("a")) == ["a"]
    for wrong, says in (
        (np.array(["a", float("nan")], object), "text 1 of the list must be a string, got float: it is missing"),
        (["a", None], "got NoneType: it is missing"),
        ({"a": 1}, "got dict"),
        (np.zeros((2, 2)), "images are passed as images="),
        (b"a", "decode bytes first"),
    ):
        with pytest.raises(InputError, match=says):
            check_texts(wrong)
