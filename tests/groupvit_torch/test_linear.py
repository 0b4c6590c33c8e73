"""Linear layers have the same values from either library, and packed weights are never old ones."""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from groupvit_torch import linear as module
from groupvit_torch.linear import chosen, forced, linear, mlp

# float32: sums of 256 products of values around 1 in another order (seen: 2e-5).
FLOAT32 = 2e-4

pytestmark = pytest.mark.skipif(not module._has_onednn(torch.float32), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def packed() -> Iterator[list[nn.Module]]:
    """The layers that were packed, time after time."""
    found: list[nn.Module] = []
    before, module._packed = module._packed, type(module._packed)()
    reorder = module._sample

    def spy(weight: Any) -> Any:
        found.append(weight)
        return reorder(weight)

    module._sample = spy
    yield found
    module._packed, module._sample = before, reorder


def layers() -> tuple[nn.Linear, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(256, 512).eval(), nn.Linear(512, 256).eval(), torch.randn(2, 40, 256)


def onednn(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), forced("oneDNN"):
        return linear(layer, x)


def is_right(layer: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(onednn(layer, x), layer(x), atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(512, 256), (256, 512), (256, 256)])
def test_values_are_those_of_the_layer(packed: list[Any], rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(columns, rows, bias=bias).eval(), torch.randn(3, 40, columns)
    for shape in ((120, columns), (3, 40, columns)):
        assert onednn(layer, x.view(shape)).shape == (*shape[:-1], rows)
    assert len(packed) == 1
    assert is_right(layer, x)
    assert is_right(layer, x.transpose(0, 1))


@pytest.mark.parametrize("library", ["PyTorch", "oneDNN"])
@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_an_mlp_in_portions(library: Any, activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, x = layers()
    monkeypatch.setattr(module, "ROWS", 33 / torch.get_num_threads())
    with torch.no_grad():
        wanted = second(activation(first(x)))
        with forced(library):
            found = mlp(first, activation, second, x)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, atol=FLOAT32, rtol=0)


def test_no_row_is_an_mlp_of_no_row() -> None:
    first, second, x = layers()
    with torch.no_grad(), forced("oneDNN"):
        assert mlp(first, F.gelu, second, x[:0]).shape == (0, 40, 256)
        assert linear(first, x[:0]).shape == (0, 40, 512)


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def assign(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def step(layer: nn.Linear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.ones(1, 256)).sum().backward()
    optimizer.step()


def swap_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + 1


def swap_values(layer: nn.Linear) -> None:
    layer.weight.data.copy_(layer.weight.data + 1)


def write_row(layer: nn.Linear) -> None:
    layer.weight.detach().numpy()[300] = 5.0


def write_column(layer: nn.Linear) -> None:
    layer.weight.data[:, 100] = 5.0


def write_one(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[1, 0] = 50.0


def another_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def with_bias(layer: nn.Linear) -> None:
    layer.bias.data += 1


CHANGES: list[Callable[[nn.Linear], None]] = [
    load, assign, step, swap_data, swap_values, write_row, write_column, write_one, another_parameter, with_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_was_changed_is_packed_anew(change: Callable[[nn.Linear], None]) -> None:
    layer, _, x = layers()
    before = onednn(layer, x)
    change(layer)
    assert not torch.allclose(onednn(layer, x), before, atol=1e-2)
    assert is_right(layer, x)


def test_training_drops_what_was_packed(packed: list[Any]) -> None:
    layer, _, x = layers()
    onednn(layer, x)
    assert layer in module._packed
    torch.testing.assert_close(onednn(layer.train(), x), layer(x).detach(), atol=0, rtol=0)
    assert layer not in module._packed
    onednn(layer.eval(), x)
    assert len(packed) == 2


def test_what_was_packed_goes_with_the_layer_and_into_no_copy() -> None:
    layer, _, x = layers()
    before = len(pickle.dumps(layer))
    onednn(layer, x)
    assert len(pickle.dumps(layer)) == before
    other = copy.deepcopy(layer)
    assert other not in module._packed
    other.weight.data.mul_(2)
    assert is_right(other, x)
    assert is_right(layer, x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert len(module._packed) == 2
    del layer, other
    gc.collect()
    assert not module._packed


def test_layers_that_are_watched_or_replaced_are_called(packed: list[Any]) -> None:
    first, second, x = layers()
    called: list[str] = []

    class Replaced(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append("replaced")
            return super().forward(x)

    replaced = Replaced(256, 512).eval()
    onednn(replaced, x)
    hook = first.register_forward_hook(lambda *_: called.append("hook"))
    onednn(first, x)
    with torch.no_grad(), forced("oneDNN"):
        mlp(first, F.gelu, second, x)
    hook.remove()
    before = first.register_forward_pre_hook(lambda *_: called.append("before"))
    onednn(first, x)
    before.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append("global"))
    onednn(first, x)
    everywhere.remove()
    first.forward = lambda x: called.append("forward") or x  # type: ignore[method-assign, func-returns-value]
    onednn(first, x)
    del first.forward
    assert called == ["replaced", "hook", "hook", "before", "global", "forward"]
    parametrized = nn.utils.parametrizations.weight_norm(copy.deepcopy(first)).eval()
    assert is_right(parametrized, x)
    assert not packed


def test_what_needs_pytorch_gets_it(packed: list[Any]) -> None:
    layer, _, x = layers()
    with forced("oneDNN"):
        # Gradients of the layer or of its input.
        assert linear(layer, x).requires_grad
        frozen = copy.deepcopy(layer).requires_grad_(False)
        assert linear(frozen, x.clone().requires_grad_()).requires_grad
        with torch.no_grad():
            mapped = torch.func.vmap(lambda row: linear(layer, row))(x)
            torch.testing.assert_close(mapped, layer(x), atol=FLOAT32, rtol=0)
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(layer, x).dtype is torch.bfloat16
            assert linear(layer.to("meta"), x.to("meta")).is_meta
        frozen_gradient = torch.func.grad(lambda x: linear(frozen, x).sum())(x)
        torch.testing.assert_close(frozen_gradient, frozen.weight.sum(0).expand_as(x), atol=FLOAT32, rtol=0)
        small = nn.Linear(16, 16).eval()
        onednn(small, torch.zeros(99, 16))
        onednn(frozen, x[0, :3])
        onednn(nn.Linear(300, 256).eval(), torch.zeros(99, 300))
    assert not packed
    assert module._measured(torch.float64) == ("PyTorch", 0.0)


def test_inference_mode_before_and_after(packed: list[Any]) -> None:
    layer, _, x = layers()
    with torch.inference_mode(), forced("oneDNN"):
        inside = linear(layer, x)
        made_there = nn.Linear(256, 512).eval()
        torch.testing.assert_close(linear(made_there, x), made_there(x))
    torch.testing.assert_close(onednn(layer, x), inside, atol=0, rtol=0)
    assert len(packed) == 1
    layer(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_programs_hold_the_layers_themselves(packed: list[Any]) -> None:
    first, second, x = layers()

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mlp(self.first, F.gelu, self.second, x) + linear(self.second, self.first(x))

    block = MLP().eval()
    with torch.no_grad(), forced("oneDNN"):
        wanted = block(x)
        del packed[:]
        module._packed.clear()
        traced = torch.jit.trace(block, (x,), check_trace=False)
        exported = torch.export.export(block, (x,))
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        for program in (traced, exported.module(), compiled):
            torch.testing.assert_close(program(x), wanted, atol=FLOAT32, rtol=0)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "aten.linear.default" in targets
    assert not any("mkldnn" in program for program in (*targets, str(traced.inlined_graph)))
    assert not packed


def test_threads_pack_once(packed: list[Any]) -> None:
    layer, _, x = layers()
    wanted = layer(x).detach()
    found: list[torch.Tensor] = []

    def compute() -> None:
        with torch.no_grad():
            found.extend(linear(layer, x) for _ in range(5))

    with forced("oneDNN"):
        threads = [threading.Thread(target=compute) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20
    assert all(torch.allclose(one, wanted, atol=FLOAT32, rtol=0) for one in found)
    assert len(packed) == 1


@pytest.mark.parametrize(("ratio", "library"), [(1.12, "oneDNN"), (1.08, "PyTorch")])
def test_the_library_is_measured_once(
    packed: list[Any], monkeypatch: pytest.MonkeyPatch, ratio: float, library: str
) -> None:
    times: list[Any] = []
    monkeypatch.setattr(module, "_choices", {})
    monkeypatch.setattr(module, "_ratio_of_times", lambda *functions: times.append(functions) or ratio)
    layer, _, x = layers()
    random = torch.random.get_rng_state()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(linear(layer, x), layer(x), atol=FLOAT32, rtol=0)
    assert chosen() == {"float32": (library, ratio)}
    assert torch.equal(torch.random.get_rng_state(), random)
    assert len(packed) == (library == "oneDNN")
    # What is measured is the same computation.
    ((plain, onednn),) = times
    with torch.no_grad():
        torch.testing.assert_close(plain(), onednn(), rtol=1e-4, atol=1e-3)


def test_times_are_taken_in_turns() -> None:
    calls: list[int] = []
    ratio = module._ratio_of_times(lambda: calls.append(1), lambda: calls.append(2), turns=2, budget=9.0)
    assert calls == [1, 2] * 3
    assert ratio > 0


def test_both_figures_of_a_measurement_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lucky turn of the one library or an unlucky one of the other changes no choice."""

    def ratio(seconds: list[float], budget: float = 9.0) -> float:
        left = iter(seconds)
        monkeypatch.setattr(module, "_seconds", lambda _: next(left))
        return module._ratio_of_times(lambda: None, lambda: None, turns=4, budget=budget)

    assert ratio([0.010, 0.010] * 3 + [0.010, 0.005]) == 1.0
    assert ratio([0.020, 0.010] * 3 + [0.010, 0.010]) == 1.0
    assert ratio([0.012, 0.010] * 4) == pytest.approx(1.2)
    # Slow machines end after half of the turns.
    assert ratio([0.120, 0.100] * 2, budget=0.1) == pytest.approx(1.2)
