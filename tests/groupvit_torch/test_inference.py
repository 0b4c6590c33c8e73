"""A Transformer layer in inference has the values of its modules, which are called where somebody would notice."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from groupvit_common.model.config import GroupViTConfig, GroupViTVisionConfig
from groupvit_torch import GroupViTModel
from groupvit_torch import linear as linear_module
from groupvit_torch.attention import causal_bias
from groupvit_torch.attention import forced as attention_by
from groupvit_torch.inference import encoder_layer
from groupvit_torch.layers import MLP, Attention, EncoderLayer
from groupvit_torch.linear import forced
from tests.support.models import smallest_config, smallest_inputs

# Values up to 4, sums of up to 512 products in another order (seen: 3e-6); half precision: a few of its steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}
LIBRARIES = ["PyTorch", *(["oneDNN"] if linear_module._has_onednn(torch.float32) else [])]


def new_layer(bias: bool = True) -> EncoderLayer:
    """A layer that is wide enough for oneDNN."""
    config = GroupViTVisionConfig(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    torch.manual_seed(0)
    layer = EncoderLayer(config).eval()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.05)
    for part in () if bias else layer.modules():
        if isinstance(part, nn.Linear):
            part.bias = None
    return layer


@pytest.fixture
def layer() -> EncoderLayer:
    return new_layer()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that were computed the short way, time after time."""
    found: list[Any] = []

    def noted(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(layer)
        return encoder_layer(layer, *args, **kwargs)

    monkeypatch.setattr("groupvit_torch.layers.encoder_layer", noted)
    return found


def own_way(layer: EncoderLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), forced("PyTorch"):
        patch.setattr("groupvit_torch.layers.is_plain_layer", lambda *_: False)
        return layer(x, *args, **kwargs)[0]


def is_right(layer: EncoderLayer, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(layer(x)[0], own_way(layer, x), atol=TOLERANCE[x.dtype], rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_the_modules(
    x: torch.Tensor, calls: list[Any], library: Any, dtype: torch.dtype, bias: bool
) -> None:
    if library == "oneDNN" and not linear_module._has_onednn(dtype):
        pytest.skip("oneDNN does not multiply in this dtype here")
    layer, x = new_layer(bias).to(dtype), x.to(dtype)
    mask = torch.zeros(2, 1, 1, 20, dtype=dtype)
    mask[0, ..., 15:] = -30.0
    before = x.clone()
    cases: list[tuple[Any, ...]] = [(x,), (x, mask), (x, None, causal_bias(x, x)), (x, mask, causal_bias(x, x))]
    for case in cases:
        for is_causal in (False, True):
            with torch.no_grad(), forced(library):
                (found,) = layer(*case, is_causal=is_causal)
            wanted = own_way(layer, *case, is_causal=is_causal)
            torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=0)
    assert len(calls) == 2 * len(cases)
    # What comes in is not written to.
    assert torch.equal(x, before)


@pytest.mark.parametrize("library", LIBRARIES)
def test_portions_views_and_single_tokens(
    layer: EncoderLayer, x: torch.Tensor, calls: list[Any], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "ROWS", 9 / torch.get_num_threads())
    for each in (x, x[:, :-3], x.transpose(0, 1), x[:1, :1], x[:, :, :].expand(2, 20, 256)):
        before = each.clone()
        with torch.no_grad(), forced(library):
            (found,) = layer(each)
        assert found.shape == each.shape
        torch.testing.assert_close(found, own_way(layer, each), atol=TOLERANCE[x.dtype], rtol=0)
        assert torch.equal(each, before)
    assert len(calls) == 5
    with torch.no_grad():
        assert layer(x[:0])[0].shape == (0, 20, 256)
    assert len(calls) == 5


PARTS = [
    "self_attn", "self_attn.q_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp", "mlp.fc1", "mlp.fc2",
]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_watched_or_replaced_are_called(
    layer: EncoderLayer, x: torch.Tensor, calls: list[Any], name: str
) -> None:
    part, seen = layer.get_submodule(name), set[str]()
    hooks = [
        part.register_forward_hook(lambda *_: seen.add("after")),
        part.register_forward_pre_hook(lambda *_: seen.add("before")),
    ]
    assert is_right(layer, x)
    for hook in hooks:
        assert is_right(layer, x)
        hook.remove()

    def own(*args: Any, **kwargs: Any) -> Any:
        seen.add("own")
        return type(part).forward(part, *args, **kwargs)

    # As accelerate does it, and as `compile` does.
    for place in ("forward", "_compiled_call_impl"):
        seen.discard("own")
        setattr(part, place, own)
        assert is_right(layer, x)
        delattr(part, place)
        assert "own" in seen
    assert is_right(layer, part.train() and x)
    part.eval().__class__ = type("Replaced", (type(part),), {})
    assert is_right(layer, x)
    assert not calls
    assert seen == {"after", "before", "own"}


def test_what_else_takes_the_modules_own_way(layer: EncoderLayer, x: torch.Tensor, calls: list[Any]) -> None:
    assert layer(x)[0].requires_grad
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert frozen(x.clone().requires_grad_())[0].requires_grad
    with torch.no_grad():
        assert len(layer(x, output_attentions=True)) == 2
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        parameters = {name: value.detach() for name, value in layer.named_parameters()}
        torch.func.functional_call(layer, parameters, (x,))
        # The fused kernel has no rule for it.
        with attention_by("plain"):
            mapped = torch.func.vmap(lambda each: layer(each[None])[0][0])(x)
        torch.testing.assert_close(mapped, own_way(layer, x), atol=TOLERANCE[x.dtype], rtol=0)
        hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
        layer(x)
        hook.remove()
        layer.to("meta")(x.to("meta"))
    assert not calls
    # Frozen layers are plain with gradients switched on, too.
    assert torch.equal(frozen(x)[0], encoder_layer(frozen, x))
    assert calls == [frozen]


def test_another_activation(x: torch.Tensor, calls: list[Any]) -> None:
    config = GroupViTVisionConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, hidden_act="quick_gelu"
    )
    assert is_right(EncoderLayer(config).eval(), x)
    assert len(calls) == 1


def step(layer: EncoderLayer) -> None:
    layer.self_attn.k_proj.weight.data.mul_(-3)


def swap(layer: EncoderLayer) -> None:
    layer.self_attn.v_proj.weight = nn.Parameter(layer.self_attn.v_proj.weight.detach() * 2)


def write(layer: EncoderLayer) -> None:
    layer.self_attn.q_proj.weight.detach().numpy()[:] = 0.0


def write_bias(layer: EncoderLayer) -> None:
    layer.self_attn.v_proj.bias.detach().numpy()[:] = 5.0


@pytest.mark.skipif("oneDNN" not in LIBRARIES, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("change", [step, swap, write, write_bias])
def test_queries_keys_and_values_are_packed_anew(
    layer: EncoderLayer, x: torch.Tensor, change: Callable[[EncoderLayer], None]
) -> None:
    with forced("oneDNN"):
        assert is_right(layer, x)
        packed = linear_module._packed[layer.self_attn]
        assert is_right(layer, x)
        # Also where weights are requested, which takes the modules' own way.
        with torch.no_grad():
            layer(x, output_attentions=True)
        assert linear_module._packed[layer.self_attn] is packed
        with torch.no_grad():
            before = layer(x)[0]
            change(layer)
            assert not torch.allclose(layer(x)[0], before, atol=1e-2)
        assert is_right(layer, x)
        assert layer.self_attn in linear_module._packed
        with torch.no_grad():
            layer.train()(x)
        assert layer.self_attn not in linear_module._packed


@pytest.mark.filterwarnings("ignore:.*(deprecated|will be removed).*")
def test_programs_of_the_model() -> None:
    """`torch.compile` and dynamic quantization of PyTorch find the layers that they look for."""
    torch.manual_seed(0)
    model = GroupViTModel(smallest_config()).eval()
    given = {name: torch.from_numpy(array) for name, array in smallest_inputs().items()}
    with torch.no_grad():
        wanted = model(**given)
        compiled = torch.compile(model, backend="eager")(**given)
        # Eight bits of each weight: a hundredth of the largest value, in each of a few layers.
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        assert not any(type(part) is nn.Linear for part in quantized.modules())
        texts = quantized(**given).text_embeds
    torch.testing.assert_close(compiled.logits_per_image, wanted.logits_per_image, atol=1e-4, rtol=0)
    torch.testing.assert_close(texts, wanted.text_embeds, atol=0.1, rtol=0)
    assert not torch.equal(texts, wanted.text_embeds)


def test_the_model_takes_the_short_way(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GroupViTModel(tiny_config).double().eval()
    given = {name: torch.from_numpy(array) for name, array in tiny_inputs.items()}
    given["pixel_values"] = given["pixel_values"].double()
    with torch.no_grad():
        found = model(**given)
        layers = [part for part in model.modules() if type(part) is EncoderLayer]
        assert len(layers) == len(calls)
        monkeypatch.setattr("groupvit_torch.layers.is_plain_layer", lambda *_: False)
        wanted = model(**given)
    torch.testing.assert_close(found.logits_per_image, wanted.logits_per_image, atol=1e-11, rtol=0)  # up to 14
    assert {type(layer.self_attn) for layer in layers} == {Attention}
    assert {type(layer.mlp) for layer in layers} == {MLP}


@pytest.mark.parametrize("library", LIBRARIES)
def test_many_tokens(layer: EncoderLayer, calls: list[Any], library: Any) -> None:
    """Only oneDNN gains by the short way of many tokens."""
    x = torch.randn(2, 257, 256)
    with torch.no_grad(), forced(library):
        (found,) = layer(x)
        assert len(calls) == (library == "oneDNN")
        layer(x[:, :256])
        assert len(calls) == 1 + (library == "oneDNN")
    torch.testing.assert_close(found, own_way(layer, x), atol=TOLERANCE[x.dtype], rtol=0)
