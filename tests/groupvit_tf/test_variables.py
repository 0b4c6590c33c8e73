"""Variables that are made quickly are those that Keras makes."""

import keras
import numpy as np
import pytest

from groupvit_tf import GroupViTModel
from groupvit_tf import variables as made
from groupvit_tf.variables import ZEROS, quick_variables
from tests.support.models import smallest_config


@pytest.fixture(scope="module")
def model() -> GroupViTModel:
    keras.utils.set_random_seed(3)
    return GroupViTModel(smallest_config(), name="quick")


def test_values_and_names_are_those_of_keras(model: GroupViTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    keras.utils.set_random_seed(3)
    monkeypatch.setattr(made, "_is_plain", lambda: False)
    plain = GroupViTModel(smallest_config(), name="quick")
    for quick, variable in zip(model.weights, plain.weights, strict=True):
        assert quick.path == variable.path
        assert quick.value.name == variable.value.name  # TensorFlow's, which a SavedModel has
        assert (quick.dtype, quick.trainable) == (variable.dtype, variable.trainable)
        np.testing.assert_array_equal(quick, variable)


def test_a_variable_that_changes_leaves_those_of_its_shape(model: GroupViTModel) -> None:
    layer = model.text_model.encoder.layers[0]
    biases = [layer.self_attn.q_proj.bias, layer.self_attn.k_proj.bias, layer.self_attn.v_proj.bias]
    biases[0].assign_add(np.ones(biases[0].shape, "float32"))
    biases[1].value.scatter_nd_update([[0]], [5.0])
    assert [float(np.sum(bias)) for bias in biases] == [biases[0].shape[0], 5.0, 0.0]
    for bias in biases:
        bias.assign(np.zeros(bias.shape))


def test_shared_constants_are_of_one_block_alone() -> None:
    assert ZEROS((2,), "float32") is not ZEROS((2,), "float32")
    with quick_variables():
        assert ZEROS((2,), "float32") is ZEROS((2,), "float32")
        assert ZEROS((2,), "float16").dtype == "float16"
    assert ZEROS((2,), "float32") is not ZEROS((2,), "float32")
