"""Training keeps less, and its gradients keep their bits."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from groupvit_common.model.config import GroupViTConfig
from groupvit_torch.layers import EncoderLayer


@pytest.fixture
def layer(tiny_config: GroupViTConfig) -> EncoderLayer:
    torch.manual_seed(0)
    return EncoderLayer(tiny_config.vision_config)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupvit_torch.layers.recomputed", lambda y, function: nullcontext())


def gradients(layer: EncoderLayer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_gradients_keep_their_bits(
    layer: EncoderLayer, x: torch.Tensor, autocast: bool, hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hook:
        layer.layer_norm1.register_forward_hook(lambda module, inputs, output: output * 2)
        layer.mlp.fc1.register_forward_hook(lambda module, inputs, output: output + 1)

    def computed() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)[0]
        return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    found = computed()
    kept_as_it_is(monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, computed(), strict=True))


def test_what_is_kept(layer: EncoderLayer, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the norms' outputs, 32 wide, nor GELU's, 48 wide."""

    def sizes() -> list[int]:
        """Of tensors that the backward pass is handed, by the memory they lie in."""
        seen: dict[int, torch.Tensor] = {}
        waiting, graph = [layer(x)[0].grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in graph:
                continue
            graph.add(node)
            for name in dir(node):
                value = getattr(node, name) if name.startswith("_raw_saved_") else None
                data = getattr(value, "data", None)
                if isinstance(data, torch.Tensor):
                    seen[data.untyped_storage().data_ptr()] = data
            waiting += [function for function, _ in node.next_functions]
        return sorted(value.numel() for value in seen.values())

    fewer = sizes()
    kept_as_it_is(monkeypatch)
    more = sizes()
    rows = 2 * 9
    assert sum(more) - sum(fewer) == rows * (32 + 32 + 48)


def test_backward_of_the_backward(layer: EncoderLayer, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> torch.Tensor:
        from groupvit_torch.attention import forced

        # The fused kernel has no second derivative.
        with forced("plain"):
            (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.mlp.fc1.weight)[0]

    found = second()
    kept_as_it_is(monkeypatch)
    torch.testing.assert_close(found, second())


def test_others_that_decide_what_is_kept(layer: EncoderLayer, x: torch.Tensor) -> None:
    wanted = gradients(layer, x)
    packed: list[Any] = []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor.detach(), lambda tensor: tensor):
        y = layer(x)[0]
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert any(tensor.numel() == 2 * 9 * 48 for tensor in packed)
    y = checkpoint(layer, x, use_reentrant=False)[0]
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_functions_of_the_layer(layer: EncoderLayer, x: torch.Tensor) -> None:
    parameters = dict(layer.named_parameters())

    def total(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x.detach(),))[0].square().sum()

    found = torch.func.grad(total)(parameters)
    for name, wanted in zip(parameters, gradients(layer, x)[1:], strict=True):
        torch.testing.assert_close(found[name], wanted)
