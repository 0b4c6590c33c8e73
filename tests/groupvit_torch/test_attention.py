"""The kernels of attention are the same function, whichever the rule chooses."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupvit_common.model.config import GroupViTConfig
from groupvit_torch import GroupViTModel
from groupvit_torch import attention as module
from groupvit_torch.attention import attention, attention_weights, cpu_vendor, forced, kernel

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def fresh_rule() -> Any:
    yield
    module._kernel_of_training.cache_clear()
    cpu_vendor.cache_clear()


def heads(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Heads as the layers make them: views of `[B, S, D]`."""
    batch, count, length, width = shape
    return torch.randn(batch, length, count, width, dtype=dtype).transpose(1, 2).requires_grad_()


def reference(q: Any, k: Any, v: Any, bias: Any, is_causal: bool) -> np.ndarray:
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias.double().numpy()
    if is_causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


# float64: rounding of sums; float32: seen 5e-7; half precision: a few of its steps at values around 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.04, torch.float16: 0.005}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["fused", "plain"])
@pytest.mark.parametrize(
    ("keys", "bias", "is_causal"),
    [(7, None, False), (5, None, False), (7, None, True), (7, "padding", False), (7, "padding", True)],
)
def test_kernels_have_the_values_of_the_definition(
    dtype: torch.dtype, name: Any, keys: int, bias: Any, is_causal: bool
) -> None:
    torch.manual_seed(1)
    q, k, v = (heads(2, 3, length, 4, dtype=dtype) for length in (7, keys, keys))
    if bias:
        bias = torch.zeros(2, 1, 1, 7, dtype=dtype)
        bias[0, ..., 4:] = -30.0
    with forced(name):
        assert kernel(q, k, v) == name
        found = attention(q, k, v, bias, is_causal=is_causal)
    assert found.dtype == dtype
    wanted = reference(q, k, v, bias, is_causal)
    np.testing.assert_allclose(found.detach().double().numpy(), wanted, atol=TOLERANCE[dtype], rtol=0)
    weights = attention_weights(q, k, bias, is_causal=is_causal)
    np.testing.assert_allclose((weights @ v).detach().double(), wanted, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_kernels_have_the_same_gradients(is_causal: bool) -> None:
    torch.manual_seed(2)
    inputs = [heads(2, 2, 6, 4) for _ in range(3)]
    bias = torch.randn(2, 1, 1, 6, dtype=torch.float64)
    upstream = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    gradients = []
    for name in ("fused", "plain"):
        with forced(name):
            found = attention(*inputs, bias, is_causal=is_causal)
        gradients.append(torch.autograd.grad(found, inputs, upstream))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["fused", "plain"])
def test_dropout_keeps_the_mean(name: Any) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    with forced(name):
        drawn = torch.stack([attention(q, k, v, dropout=0.25) for _ in range(4000)])
        whole = attention(q, k, v)
    assert not torch.equal(drawn[0], drawn[1])
    # Five standard errors of 4,000 samples.
    error = (drawn.mean(0) - whole).abs() / (drawn.std(0) / 4000**0.5)
    assert error.max() < 5
    # Weights w are dropped one by one and scaled: the variance is a / (1 - a) * sum of (w v)^2.
    wanted = 0.25 / 0.75 * attention_weights(q, k).square() @ v.square()
    assert (drawn.var(0) / wanted - 1).abs().max() < 0.2


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype, grad: bool = True) -> str:
        q = torch.zeros(1, 1, 2, 2, dtype=dtype, requires_grad=grad)
        return kernel(q, q, q)

    supported = {"bf16": True, "fp16": False}
    for name in supported:
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda name=name: supported[name])
    for vendor, capability, float32 in [
        ("GenuineIntel", "AVX512", "fused"),
        ("AuthenticAMD", "AVX512", "plain"),
        ("AuthenticAMD", "AVX2", "fused"),
        ("", "DEFAULT", "fused"),
    ]:
        monkeypatch.setattr(module, "cpu_vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        module._kernel_of_training.cache_clear()
        assert chosen(torch.float32) == float32
        assert chosen(torch.float32, grad=False) == "fused"
        assert chosen(torch.float64) == "fused"
        assert chosen(torch.bfloat16) == "plain"
        assert chosen(torch.bfloat16, grad=False) == "fused"
        assert chosen(torch.float16) == "fused"
        with torch.no_grad():
            assert chosen(torch.bfloat16) == "fused"
    on_gpu = torch.zeros(1, 1, 2, 2, device="meta", requires_grad=True)
    assert kernel(on_gpu, on_gpu, on_gpu) == "fused"


def test_the_vendor_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> str:
        cpu_vendor.cache_clear()
        return cpu_vendor()

    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 1\n" * 9, encoding="ascii")
    monkeypatch.setattr(module, "_CPU_INFO", info)
    assert found() == "AuthenticAMD"
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path)
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel")
    assert found() == "GenuineIntel"
    monkeypatch.setattr("platform.processor", lambda: "")
    assert found() == ""


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_training_step_is_the_same_with_either(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray], precision: torch.dtype | None
) -> None:
    """Under autocast queries are bfloat16, whatever the parameters are."""
    torch.manual_seed(0)
    # Evaluation: nothing is drawn.
    model = GroupViTModel(tiny_config).eval()
    if precision is None:
        model.double()
    given = {name: torch.from_numpy(array) for name, array in tiny_inputs.items()}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    losses, gradients = [], []
    for name in ("fused", "plain"):
        model.zero_grad()
        with forced(name), torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = model(**given, return_loss=True).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    # bfloat16 has three digits.
    assert losses[0] == pytest.approx(losses[1], rel=1e-12 if precision is None else 0.01)
    if precision is None:
        # In units of the largest: one near 0 is what is left of a sum of large terms.
        largest = max(gradient.abs().max().item() for gradient in gradients[1])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12 * max(1, largest), rtol=0)
