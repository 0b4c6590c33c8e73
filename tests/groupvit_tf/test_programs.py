"""Eager calls that are seen again run as graphs: with the same numbers, and only where nothing else can tell."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from groupvit_tf import GroupViTModel, programs
from groupvit_tf.text import Embedding
from tests.support.models import smallest_config, smallest_inputs

pytestmark = pytest.mark.usefixtures("rewritten_graphs")

# Two orders of summation.
FLOAT32 = 1e-6
INPUTS = smallest_inputs()
PIXELS, IDS = INPUTS["pixel_values"], INPUTS["input_ids"]


@pytest.fixture(scope="module")
def shared() -> GroupViTModel:
    keras.utils.set_random_seed(0)
    return GroupViTModel(smallest_config())


@pytest.fixture
def model(shared: GroupViTModel) -> GroupViTModel:
    """The model without any programs."""
    for tower in (shared.text_model, shared.vision_model):
        vars(tower).pop("_programs", None)
    return shared


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the towers that were traced."""
    trace = programs._program
    names: list[str] = []

    def spy(tower: Any, *arguments: Any) -> Any:
        names.append(tower.name)
        return trace(tower, *arguments)

    monkeypatch.setattr(programs, "_program", spy)
    return names


def eagerly(call: Callable[[], Any]) -> Any:
    tf.config.run_functions_eagerly(True)
    try:
        return call()
    finally:
        tf.config.run_functions_eagerly(False)


def same(call: Callable[[], Any]) -> None:
    np.testing.assert_allclose(call(), eagerly(call), atol=FLOAT32, rtol=0)


def test_the_third_call_is_traced_and_any_number_of_rows_shares_it(model: GroupViTModel, traces: list[str]) -> None:
    def images(rows: int) -> Any:
        return model.get_image_features(PIXELS[:rows])

    def texts(rows: int) -> Any:
        return model.get_text_features(tf.constant(IDS[:rows]))

    for call, name in ((images, "vision_model"), (texts, "text_model")):
        traces.clear()
        for rows in (1, 4):
            call(rows)
        assert traces == []
        for rows in (1, 2, 4):
            same(partial(call, rows))
        assert traces == [name]


def test_the_full_model_and_its_record(model: GroupViTModel, traces: list[str]) -> None:
    def call() -> Any:
        return model(INPUTS, return_loss=True, output_segmentation=True)

    wanted = eagerly(call)
    for _ in range(programs.CALLS_BEFORE_TRACING + 2):
        found = call()
        tf.nest.map_structure(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5, rtol=0), found, wanted
        )
        assert found.text_model_output.keys() == wanted.text_model_output.keys()
    assert sorted(traces) == ["text_model", "vision_model"]


def traced(model: GroupViTModel) -> None:
    for _ in range(programs.CALLS_BEFORE_TRACING + 1):
        model.get_image_features(PIXELS)
        model.get_text_features(IDS)


def test_what_changes_is_seen_at_once(model: GroupViTModel, traces: list[str]) -> None:
    traced(model)
    assert sorted(traces) == ["text_model", "vision_model"]

    def both() -> Any:
        return np.concatenate([model.get_image_features(PIXELS), model.get_text_features(IDS)])

    before = both()
    bias = model.vision_model.layernorm.beta
    bias.assign_add(tf.ones_like(bias))
    assert not np.allclose(both()[:4], before[:4], atol=1e-3)
    same(both)
    assert len(traces) == 2

    layer = model.vision_model.encoder.stages[0].layers[0]
    activation = layer.mlp.activation
    layer.mlp.activation = keras.ops.tanh
    same(both)
    layer.mlp.activation = activation
    old = model.get_input_embeddings()
    model.set_input_embeddings(Embedding(30, 8, name="token_embedding"))
    same(both)
    model.set_input_embeddings(old)
    same(both)
    assert len(traces) == 2

    eos = model.config.text_config.eos_token_id
    traced(model)
    model.config.text_config.eos_token_id = int(IDS[0, 0])
    same(both)
    model.config.text_config.eos_token_id = eos


def test_code_of_others_is_called_each_time(traces: list[str]) -> None:
    model = GroupViTModel(smallest_config())
    seen = []

    class Own(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            seen.append(x)
            return x

    patches = model.vision_model.embeddings
    patches._tracker.unlock()
    patches.dropout = Own()
    for _ in range(5):
        model.get_image_features(PIXELS)
    assert len(seen) == 5
    layer = model.text_model.final_layer_norm
    call = layer.call
    layer.call = lambda x: seen.append(x) or call(x)
    for _ in range(5):
        model.get_text_features(IDS)
    assert len(seen) == 10
    assert all(hasattr(x, "numpy") for x in seen)
    assert traces == []


def test_calls_that_a_graph_would_do_otherwise_are_eager(model: GroupViTModel, traces: list[str]) -> None:
    pixels = tf.constant(PIXELS)
    values = [variable.value for variable in model.variables]
    mapping = list(zip(model.variables, values, strict=True))

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(pixels)
            total = tf.reduce_sum(model.get_image_features(pixels) ** 2)
        return tape.gradient(total, pixels)

    graph = tf.function(lambda x: model.get_image_features(x), autograph=False)
    for _ in range(4):
        assert gradient().shape == pixels.shape
        model.get_image_features(PIXELS, training=True)
        eagerly(lambda: model.get_image_features(PIXELS))
        with keras.StatelessScope(state_mapping=mapping):
            model.get_image_features(pixels)
        with tf.distribute.OneDeviceStrategy("CPU:0").scope():
            model.get_image_features(PIXELS)
        graph(pixels)
        model(INPUTS, gumbel_noise=[np.zeros((4, 4, 4), np.float32)])
    assert "vision_model" not in traces


def test_a_tower_keeps_few_programs(model: GroupViTModel, traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 1)
    monkeypatch.setattr(programs, "CALLS_BEFORE_TRACING", 0)
    for side in (16, 8, 16):
        same(partial(model.get_image_features, PIXELS[:, :, :side]))
    assert len(traces) == 3
    assert len(vars(model.vision_model)["_programs"]._programs) == 1


def test_threads_share_a_program(model: GroupViTModel, traces: list[str]) -> None:
    wanted = model.get_image_features(PIXELS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model.get_image_features(PIXELS), range(12)):
            np.testing.assert_allclose(found, wanted, atol=FLOAT32, rtol=0)
    assert traces == ["vision_model"]


def test_copies_of_programs_are_empty(model: GroupViTModel) -> None:
    traced(model)
    for found in (model.vision_model, model.text_model):
        kept = vars(found)["_programs"]
        assert len(kept._programs) == 1
        assert len(copy.deepcopy(kept)._programs) == 0
        assert len(pickle.loads(pickle.dumps(kept))._programs) == 0
