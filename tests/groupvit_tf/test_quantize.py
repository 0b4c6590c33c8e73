"""`quantize` of the three models: what it changes, how little the answers differ, and files."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from groupvit_common.checkpoints.hub import DEMO_MODEL
from groupvit_common.errors import InputError
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_tf import GroupViTModel, GroupViTTextModel, GroupViTVisionModel, Segmenter
from groupvit_tf.grouping import AssignAttention
from groupvit_tf.layers import Dense
from groupvit_tf.optimize import optimize
from groupvit_tf.text import Embedding
from tests.support.models import smallest_config, smallest_inputs

# Keras copies variables in an older way than NumPy 2 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

INPUTS = smallest_inputs()
# Weights in 255 or 15 steps, and rounding in several layers after one another.
CLOSE = {"int8": 0.05, "int4": 0.2}


@pytest.fixture(scope="module")
def model() -> GroupViTModel:
    keras.utils.set_random_seed(0)
    return GroupViTModel(smallest_config())


@pytest.fixture(scope="module")
def wanted(model: GroupViTModel) -> np.ndarray:
    return embeds(model)


def quantized(model: GroupViTModel, *arguments: Any, **options: Any) -> GroupViTModel:
    copy = GroupViTModel.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    copy.quantize(*arguments, **options)
    return copy


def embeds(model: Any) -> np.ndarray:
    return np.asarray(model(INPUTS).image_embeds)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_answers_nearly_the_same_and_is_saved(
    model: GroupViTModel, wanted: np.ndarray, mode: str, tmp_path: Path
) -> None:
    copy = quantized(model, mode)
    found = embeds(copy)
    assert 0 < np.abs(found - wanted).max() < CLOSE[mode] * np.abs(wanted).max()
    layers = copy._flatten_layers()
    assigning = [part for layer in layers if isinstance(layer, AssignAttention) for part in layer._flatten_layers()]
    for layer in layers:
        if isinstance(layer, Dense | Embedding):
            assert layer.quantization_mode == (None if layer in assigning else mode)
    copy.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(embeds(other), found)
    copy.save_weights(tmp_path / "model.weights.h5")
    other.visual_projection.hidden._kernel.assign(keras.ops.zeros_like(other.visual_projection.hidden._kernel))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(embeds(other), found)
    with pytest.raises(InputError, match="save the model before it is quantized"):
        copy.save_pretrained(tmp_path)


def test_towers_filters_and_settings() -> None:
    config = smallest_config()
    vision = GroupViTVisionModel(config.vision_config)
    before = np.asarray(vision(INPUTS["pixel_values"]).pooler_output)
    vision.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None), filters="fc1")
    layer = vision.vision_model.encoder.stages[0].layers[0]
    assert (layer.mlp.fc1.quantization_mode, layer.mlp.fc2.quantization_mode) == ("int8", None)
    after = np.asarray(vision(INPUTS["pixel_values"]).pooler_output)
    np.testing.assert_allclose(after, before, atol=CLOSE["int8"] * np.abs(before).max())
    again = GroupViTVisionModel.from_config(vision.get_config())
    again.set_weights(vision.get_weights())
    np.testing.assert_array_equal(again(INPUTS["pixel_values"]).pooler_output, after)
    with pytest.raises(InputError, match="fc1 is quantized already, to int8: load the model anew"):
        vision.quantize("int8")
    text = GroupViTTextModel(config.text_config)
    text.quantize("int8", filters=lambda layer: isinstance(layer, keras.layers.Embedding))
    assert text.get_input_embeddings().quantization_mode == "int8"
    assert text(INPUTS["input_ids"]).pooler_output.shape == (4, 8)


def test_eager_programs_see_it() -> None:
    tower = GroupViTVisionModel(smallest_config().vision_config)
    for _ in range(4):
        plain = np.asarray(tower(INPUTS["pixel_values"]).pooler_output)
    tower.quantize("int8", filters="fc1")
    assert np.abs(np.asarray(tower(INPUTS["pixel_values"]).pooler_output) - plain).max() > 1e-5


@pytest.mark.parametrize("mode", ["float8", "gptq", "awq", "int9", None])
def test_other_modes_are_refused(model: GroupViTModel, mode: str | None) -> None:
    with pytest.raises(ValueError, match=r"quantized to int8|GPTQConfig|AWQConfig|Invalid quant|must provide"):
        model.quantize(mode)


def test_half_precision(model: GroupViTModel) -> None:
    half = GroupViTTextModel(smallest_config().text_config, dtype="float16")
    with pytest.raises(ValueError, match="float16"):
        half.quantize("int8")
    narrow = GroupViTTextModel(smallest_config().text_config, dtype="bfloat16")
    narrow.quantize("int8")
    assert narrow(INPUTS["input_ids"]).pooler_output.dtype == "bfloat16"


@pytest.mark.parametrize(
    "wrong",
    [
        {"nowhere": {"class_name": "Int8QuantizationConfig"}},
        {"text_model/final_layer_norm": {"class_name": "Int8QuantizationConfig"}},
        {"visual_projection/0": {"class_name": "Lambda", "config": {}}},
        {"visual_projection/0": 3},
        {"visual_projection/0": {"class_name": "Int8QuantizationConfig", "module": "keras.quantizers", "config": 7}},
        7,
    ],
)
def test_settings_of_a_file_that_do_not_fit(model: GroupViTModel, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"save the model again") as caught:
        GroupViTModel.from_config({**model.get_config(), "quantization": wrong})
    assert "\n" not in str(caught.value)


def test_the_report_says_what_it_costs(model: GroupViTModel) -> None:
    fast, report = optimize(model, quantize="int8")
    assert "slower than float32" in str(report)
    assert report.difference == pytest.approx(0, abs=CLOSE["int8"])
    plain, small = (sum(np.asarray(variable).nbytes for variable in each.weights) for each in (model, fast))
    assert small < 0.7 * plain  # the smallest model has many biases


def test_labels_of_the_bundled_model() -> None:
    """Scenes of the bundled model, whose labels are hardly changed."""
    data = open_sets("scenes", limit=2)[0]
    plain = Segmenter.from_pretrained(DEMO_MODEL, labels=data.labels, background_labels=data.background_labels)
    images = [sample.image() for sample in data]
    wanted = [result.label_map for result in plain(images)]
    plain.model.quantize("int8")
    narrow = Segmenter(plain.model, plain.processor, labels=data.labels, background_labels=data.background_labels)
    equal = np.mean([(one == other.label_map).mean() for one, other in zip(wanted, narrow(images), strict=True)])
    # 98.7% and more of the pixels on 40 scenes of each level in PyTorch.
    assert equal > 0.97
