"""Int8 layers and compilation in PyTorch."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from groupvit_common.errors import InputError
from groupvit_torch import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.grouping import AssignAttention
from groupvit_torch.optimize import Int8Linear, optimize
from tests.support.models import smallest_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GroupViTModel(smallest_config()).eval()


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,), (0, 24)])
def test_an_int8_layer_multiplies_whole_numbers(shape):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(24, 10)
    layer, x = Int8Linear(linear), torch.randn(shape, generator=generator)
    weight = linear.weight.detach().numpy()
    scale = np.abs(weight).max(axis=1) / 127
    whole = np.rint(weight / scale[:, None])
    np.testing.assert_array_equal(layer.weight.numpy(), whole)
    rows = x.numpy().reshape(-1, 24)
    step = np.abs(rows).max(axis=1, keepdims=True) / layer.levels
    expected = (np.rint(rows / step) @ whole.T) * step * scale + linear.bias.detach().numpy()
    # float32 products of exact sums.
    np.testing.assert_allclose(layer(x).numpy(), expected.reshape(*shape[:-1], 10), rtol=1e-4, atol=1e-5)


def test_seven_bits_are_exact_on_every_cpu(monkeypatch):
    monkeypatch.setattr("groupvit_torch.optimize._levels", lambda: 63)
    linear = nn.Linear(64, 32, bias=False)
    nn.init.ones_(linear.weight)
    # The largest sums there are: 16 bits would overflow with one bit more.
    torch.testing.assert_close(Int8Linear(linear)(torch.ones(3, 64)), torch.full((3, 32), 64.0))


def test_rows_of_zeros_give_the_bias():
    linear = nn.Linear(8, 4)
    torch.testing.assert_close(Int8Linear(linear)(torch.zeros(2, 8)), linear.bias.detach().expand(2, 4))


def test_a_quantized_model_computes_nearly_the_same_and_is_not_saved(model, tmp_path):
    fast, report = optimize(model, quantize="int8")
    assert report.quantize == "int8"
    assert 0 < report.difference < 0.15
    layers = {type(layer) for layer in fast.vision_model.modules()}
    assert Int8Linear in layers
    # Near ties are decided in float32.
    assert all(type(layer.q_proj) is nn.Linear for layer in fast.modules() if isinstance(layer, AssignAttention))
    with pytest.raises(InputError, match="save the model before it is quantized"):
        fast.save_pretrained(tmp_path)


def test_a_quantized_model_is_copied_and_pickled(model):
    fast, _ = optimize(model, quantize="int8")
    pixels = torch.ones(1, 3, 16, 16)
    expected = fast.get_image_features(pixels)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(again.get_image_features(pixels), expected, rtol=0, atol=0)


def test_towers_are_optimized_by_themselves():
    config = smallest_config()
    for tower in (GroupViTVisionModel(config.vision_config), GroupViTTextModel(config.text_config)):
        fast, report = optimize(tower, dtype="bfloat16", verify=True)
        assert fast.dtype == torch.bfloat16
        assert report.difference is not None


def test_a_narrow_model_is_saved_and_loaded(model, tmp_path):
    fast, _ = optimize(model, dtype="bfloat16")
    fast.save_pretrained(tmp_path)
    again = GroupViTModel.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_image_tower_is_one_graph(model):
    graphs = []

    def noted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pixels = torch.ones(1, 3, 16, 16)
    compiled = torch.compile(model.vision_model, backend=noted, fullgraph=True, dynamic=False)
    with torch.no_grad():
        result = compiled(pixels, output_attentions=True, return_dict=True)
        expected = model.vision_model(pixels, output_attentions=True, return_dict=True)
    assert len(graphs) == 1
    torch.testing.assert_close(result.pooler_output, expected.pooler_output)


def test_compilation_needs_a_tower_of_images_and_a_compiler(model, monkeypatch):
    with pytest.raises(InputError, match="has none: leave it out"):
        optimize(GroupViTTextModel(smallest_config().text_config), compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        optimize(model, compile=True)


def test_a_compiled_model_keeps_its_names(model, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    fast, report = optimize(model, dtype="float32", compile=True)
    assert report.compiled
    assert list(fast.state_dict()) == list(model.state_dict())
