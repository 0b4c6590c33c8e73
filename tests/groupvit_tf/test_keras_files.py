"""Keras's own files: `.keras`, `.weights.h5`, dtype policies, SavedModels.

Checkpoints of both backends: test_checkpoint.py.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from groupvit_common.checkpoints.directory import find_weights
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.layout import canonical_name
from groupvit_common.model.parameters import manifest
from groupvit_tf import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_tf.checkpoint import canonical_variables, from_canonical, kind, to_canonical
from tests.support.models import random_checkpoint, smallest_config, smallest_inputs, tiny_config
from tests.support.paths import REFERENCE

# Keras reads variables in a way that NumPy 2 calls outdated; Python shows users no such warnings from within libraries.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# Relative to the largest value. A graph adds up in another order than eager operations do, and in float32.
GRAPH_TOLERANCE = 1e-5


def values(model: Any) -> dict[str, bytes]:
    return {name: np.asarray(variable).tobytes() for name, variable in canonical_variables(model).items()}


def policies(model: Any) -> set[str]:
    return {layer.dtype_policy.name for layer in model._flatten_layers() if layer.weights}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other numbers in every tensor."""
    return random_checkpoint(tmp_path_factory.mktemp("case") / "model", smallest_config())


# -- names and layout --


@pytest.fixture(scope="module")
def tiny() -> GroupViTModel:
    """A model of three stages, whose values are for the tests to change."""
    return GroupViTModel(tiny_config())


def test_variables_have_the_names_and_shapes_of_the_manifest(tiny):
    for model in (
        tiny,
        GroupViTTextModel(smallest_config().text_config),
        GroupViTVisionModel(smallest_config().vision_config),
    ):
        expected = manifest(model.config)
        variables = canonical_variables(model)
        assert set(variables) == set(expected)
        for name, variable in variables.items():
            array = np.asarray(variable)
            assert to_canonical(expected[name].kind, array).shape == expected[name].shape
            assert to_canonical(kind(variable), array).shape == expected[name].shape


def test_the_layout_of_kernels():
    dense, conv = np.arange(6).reshape(2, 3), np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(to_canonical("dense", dense), dense.T)
    assert to_canonical("conv", conv)[1, 2, 0, 1] == conv[0, 1, 2, 1]
    for name, array in (("dense", dense), ("conv", conv), ("norm", dense), ("token", conv)):
        np.testing.assert_array_equal(from_canonical(name, to_canonical(name, array)), array)
    assert canonical_name("text_projection/1/moving_variance") == "text_projection.1.running_var"


def test_names_do_not_depend_on_what_the_model_is_part_of(tiny_config):
    class Outer(keras.layers.Layer):
        def build(self, input_shape: Any = None) -> None:
            self.inner = GroupViTTextModel(tiny_config.text_config, name="mine")

    outer = Outer()
    outer.build()
    assert set(canonical_variables(outer.inner)) == set(manifest(tiny_config.text_config))


# -- dtypes --


@pytest.mark.parametrize("policy", ["mixed_bfloat16", keras.DTypePolicy("mixed_float16"), tf.bfloat16, np.float64])
def test_policies(case, policy):
    model = GroupViTTextModel.from_pretrained(case, dtype=policy)
    expected = keras.dtype_policies.get(policy)
    assert policies(model) == {expected.name}
    assert model.dtype == expected.variable_dtype


@pytest.mark.parametrize("policy", ["int8_from_float32", "mixed_float8", keras.DTypePolicy("int32"), object()])
def test_what_is_no_policy_for_a_model(case, policy):
    with pytest.raises(InputError, match=r"dtype must be .*mixed_bfloat16"):
        GroupViTTextModel.from_pretrained(case, dtype=policy)


def test_the_global_policy_holds_where_none_is_given(case, tiny_config):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert policies(GroupViTTextModel(tiny_config.text_config)) == {"mixed_bfloat16"}
        assert policies(GroupViTTextModel.from_pretrained(case)) == {"mixed_bfloat16"}
        assert policies(GroupViTTextModel.from_pretrained(case, dtype="auto")) == {"float32"}
    finally:
        keras.config.set_dtype_policy(before)


# -- arguments that transformers' TensorFlow classes have --


def test_arguments_of_transformers(case, tmp_path):
    model = GroupViTTextModel.from_pretrained(case, from_pt=True, device_map="auto")
    with pytest.raises(InputError, match=r"device='cuda': Keras places the variables"):
        GroupViTTextModel.from_pretrained(case, device="cuda")
    with pytest.raises(InputError, match="call export"):
        model.save_pretrained(tmp_path, saved_model=True)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, saved_model=False, version=1, signatures=None)


def test_a_model_is_loaded_and_saved_under_a_strategy(case, tmp_path):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = GroupViTTextModel.from_pretrained(case)
    model.save_pretrained(tmp_path)
    assert values(GroupViTTextModel.from_pretrained(tmp_path)) == values(GroupViTTextModel.from_pretrained(case))


# -- .keras and .weights.h5 --


@pytest.mark.parametrize(
    ("cls", "policy"),
    [(GroupViTModel, "mixed_bfloat16"), (GroupViTTextModel, "float64"), (GroupViTVisionModel, "bfloat16")],
)
def test_a_keras_file_brings_back_the_model(case, tmp_path, cls, policy):
    model = cls.from_pretrained(case, dtype=policy)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is cls
    assert loaded.config == model.config
    assert loaded.name == model.name
    assert policies(loaded) == {policy}
    assert values(loaded) == values(model)


@pytest.mark.parametrize("cls", [GroupViTModel, GroupViTTextModel, GroupViTVisionModel])
def test_a_weights_file_fills_a_model_of_the_same_configuration(case, tmp_path, cls):
    model = cls.from_pretrained(case)
    model.save_weights(tmp_path / "x.weights.h5")
    fresh = cls(model.config)
    assert values(fresh) != values(model)
    fresh.load_weights(tmp_path / "x.weights.h5")
    assert values(fresh) == values(model)


def test_the_paths_of_a_weights_file_stay_what_they_are(tmp_path, tiny):
    """Files that people have are keyed by the names of Python attributes and classes, and by the order of variables."""
    names = {}
    for number, (name, variable) in enumerate(canonical_variables(tiny).items()):
        variable.assign(np.full(variable.shape, number))
        names[number] = name
    tiny.save_weights(tmp_path / "x.weights.h5")
    found = {}

    def visit(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[path] = names[int(np.asarray(item).flat[0])]

    with h5py.File(tmp_path / "x.weights.h5") as file:
        file.visititems(visit)
    golden = (REFERENCE / "keras_weights_paths.tsv").read_text().splitlines()
    assert found == dict(line.split("\t") for line in golden)


def test_a_model_that_was_trained_goes_on(tmp_path):
    model, batch = GroupViTModel(smallest_config()), smallest_inputs()
    model.text_model.trainable = False
    model.text_model.final_layer_norm.trainable = True
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), run_eagerly=True)
    model.fit(batch, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert values(loaded) == values(model)
    assert [v.path for v in loaded.trainable_variables] == [v.path for v in model.trainable_variables]
    assert int(loaded.optimizer.iterations) == 1
    assert [np.asarray(v).tobytes() for v in loaded.optimizer.variables] == [
        np.asarray(v).tobytes() for v in model.optimizer.variables
    ]
    # A file keeps no state of random generators.
    generators = [
        [layer.seed_generator for layer in m._flatten_layers() if getattr(layer, "seed_generator", None) is not None]
        for m in (model, loaded)
    ]
    assert generators[0]
    for mine, theirs in zip(*generators, strict=True):
        theirs.state.assign(mine.state)
    losses = [m.fit(batch, batch_size=4, shuffle=False, verbose=0).history["loss"] for m in (model, loaded)]
    assert losses[0] == losses[1]
    assert values(loaded) == values(model)


def test_what_is_frozen_stays_frozen():
    model = GroupViTModel(smallest_config())
    model.vision_model.trainable = False
    model.vision_model.encoder.stages[0].trainable = True
    model.visual_projection.norm.trainable = False
    copy = GroupViTModel.from_config(model.get_config())
    assert [v.trainable for v in copy.weights] == [v.trainable for v in model.weights]
    assert 0 < copy.num_parameters(only_trainable=True) == model.num_parameters(only_trainable=True)
    assert copy.num_parameters(only_trainable=True) < copy.num_parameters()


def test_a_class_of_ones_own_is_found_again(tmp_path, tiny_config):
    class WithHead(GroupViTTextModel):
        def __init__(self, config: Any, labels: int = 2, **options: Any) -> None:
            self.labels = labels
            super().__init__(config, **options)

        def build(self, input_shape: Any = None) -> None:
            super().build(input_shape)
            self.head = keras.layers.Dense(self.labels, name="head")
            self.head.build((None, self.config.hidden_size))
            self.unused = keras.layers.Dense(1)  # never built

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "labels": self.labels}

    model = WithHead(tiny_config.text_config, labels=3)
    model.save(tmp_path / "model.keras")
    assert values(keras.models.load_model(tmp_path / "model.keras")) == values(model)
    # Its own weights are in a checkpoint too, under their paths.
    model.save_pretrained(tmp_path)
    assert find_weights(tmp_path).tensors["head.weight"].shape == (3, tiny_config.text_config.hidden_size)


# -- SavedModels --


def close(actual: np.ndarray, expected: Any) -> bool:
    expected = np.asarray(expected)
    return (
        actual.shape == expected.shape and np.abs(actual - expected).max() <= GRAPH_TOLERANCE * np.abs(expected).max()
    )


# A process that has TensorFlow alone. Keras is there too, because TensorFlow imports it.
_FOREIGN = """
import sys
import numpy as np
import tensorflow as tf

directory, inputs, outputs = sys.argv[1:]
given = np.load(inputs)
model = tf.saved_model.load(directory)
images = model.image_features(given["pixel_values"])
texts = model.text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
segments = model.signatures["segment"](pixel_values=tf.constant(given["pixel_values"]), **texts)
assert not [name for name in sys.modules if name.startswith("groupvit")]
np.savez(outputs, **images, **texts, **segments)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupViTModel, dict[str, np.ndarray], Path]:
    """A model, inputs for it, and its SavedModel."""
    model, batch = GroupViTModel(smallest_config()), smallest_inputs()
    batch["pixel_values"] = batch["pixel_values"][:3]  # as many images and texts as one likes
    directory = tmp_path_factory.mktemp("exported") / "saved"
    model.export(directory)
    return model, batch, directory


def check_answers(model: Any, batch: dict[str, np.ndarray], answers: Any) -> None:
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert close(answers["image_features"], model.get_image_features(batch["pixel_values"]))
    assert close(answers["text_features"], model.get_text_features(**texts))
    expected = model(**batch, output_segmentation=True).segmentation_logits
    assert answers["segmentation_logits"].shape == (3, 4, 16, 16)
    assert close(answers["segmentation_logits"], expected)


@pytest.mark.usefixtures("rewritten_graphs")
def test_a_saved_model_answers_the_same(exported):
    model, batch, directory = exported
    loaded = tf.saved_model.load(directory)
    images = loaded.image_features(batch["pixel_values"])
    texts = loaded.text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    segments = loaded.signatures["segment"](pixel_values=tf.constant(batch["pixel_values"]), **texts)
    check_answers(model, batch, {name: value.numpy() for name, value in {**images, **texts, **segments}.items()})


@pytest.mark.slow
def test_a_saved_model_answers_the_same_without_this_package(exported, tmp_path):
    model, batch, directory = exported
    np.savez(tmp_path / "in.npz", **batch)
    arguments = [str(directory), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", _FOREIGN, *arguments], cwd=tmp_path, check=True, capture_output=True)
    check_answers(model, batch, np.load(tmp_path / "out.npz"))


def test_towers_as_saved_models(tmp_path):
    config, batch = smallest_config(), smallest_inputs()
    vision = GroupViTVisionModel(config.vision_config)
    pixels = batch["pixel_values"][:, :, :8, :]
    vision.export(tmp_path / "vision", image_size=(8, 16))
    loaded = tf.saved_model.load(tmp_path / "vision")
    served = loaded.serve(pixels)
    expected = vision(pixels)
    assert set(served) == {"last_hidden_state", "pooler_output"}
    assert all(close(value.numpy(), expected[name]) for name, value in served.items())

    text = GroupViTTextModel(config.text_config, dtype="float64")
    text.export(tmp_path / "text")
    loaded = tf.saved_model.load(tmp_path / "text")
    inputs = {name: tf.constant(batch[name], tf.int32) for name in ("input_ids", "attention_mask")}
    assert close(loaded.signatures["serving_default"](**inputs)["pooler_output"].numpy(), text(**inputs).pooler_output)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "onnx"}, "format must be 'tf_saved_model', got 'onnx'"),
        ({"input_signature": []}, "no 'input_signature'"),
        ({"image_size": 50}, "multiples of the patch size"),
        ({"image_size": "64"}, r"integer or \(height, width\)"),
    ],
)
def test_exports_that_are_refused(case, tmp_path, options, says):
    model = GroupViTVisionModel.from_pretrained(case)
    with pytest.raises(InputError, match=says):
        model.export(tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def test_an_export_that_cannot_be_written(case, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        GroupViTTextModel.from_pretrained(case).export(tmp_path / "file" / "saved")
