"""Scaled dot-product attention, and the rule which kernel computes it.

The two kernels give the same numbers but for rounding:

- "fused": `scaled_dot_product_attention`, which never holds the weights of all queries at once. On a GPU, PyTorch
  chooses among its flash and efficient kernels; `is_causal` lets it leave out what no query sees.
- "plain": two matrix products and a softmax between them.

The rule (`kernel`) is fixed by device, dtype, gradients and kind of CPU, never by a clock: a training run that is
resumed has the bits of one that was not. What it rests on, time of plain over time of fused, one core (2026-11; Intel,
Zen 5: a whole training step; Zen 3: the attention of 1 / 8 images with 260 tokens):

| CPU | float32 | float32, gradients | bfloat16 | bfloat16, gradients |
|---|---|---|---|---|
| Intel with AMX | | 1.1 | | 0.5-0.7 |
| AMD Zen 5 (AVX512) | | 0.9 | | |
| AMD Zen 3 (AVX2) | 1.4 / 2.2 | 1.2 / 1.2 | 11 / 18 | 2.2 / 1.9 |

In half precision with gradients, the fused kernel's backward pass costs most where a CPU multiplies matrices in it, and
plain matrix products where it does not. Kernels that know what causal is take 0.9 of the time of those that are told by
a bias (0.83-0.92 for 77 tokens, Zen 3).

Shapes: q `[B, heads, S, D / heads]`, k and v `[B, heads, S', D / heads]` (legend in docs/architecture.md).
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.jit._trace import is_tracing
from torch.nn import functional as F

Kernel = Literal["fused", "plain"]
_CPU_INFO = Path("/proc/cpuinfo")
_forced: list[Kernel] = []


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Returns the values that each query attends to `[B, heads, S, D / heads]`, by the kernel of the rule.

    Args:
        bias: broadcastable to `[B, heads, S, S']`, added to the logits.
        is_causal: query i attends to keys 0 to i alone, besides what the bias does.
        dropout: the rate at which weights are dropped.
    """
    if kernel(q, k, v) == "plain":
        return F.dropout(attention_weights(q, k, bias, is_causal=is_causal), dropout) @ v
    if bias is not None and is_causal:
        bias, is_causal = bias + causal_bias(q, k), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=is_causal)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Returns the weights `[B, heads, S, S']`, which sum to 1 over the keys; arguments as in `attention`."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if is_causal:
        logits = logits + causal_bias(q, k)
    return logits.softmax(dim=-1)


def causal_bias(q: Tensor, k: Tensor) -> Tensor:
    """Returns `[S, S']`: the dtype's lowest number where a key comes after the query, else 0."""
    shape = (q.shape[-2], k.shape[-2])
    return torch.full(shape, torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """Returns which kernel computes `attention` of these."""
    if torch.compiler.is_compiling() or is_tracing():
        # Compilers have kernels of their own for what is written as the fused one; a trace is the same with gradients
        # and without.
        return "fused"
    if _forced:
        return _forced[-1]
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return "fused"
    if not (q.requires_grad or k.requires_grad or v.requires_grad):
        return "fused"
    return _kernel_of_training(q.dtype)


@contextmanager
def forced(name: Kernel) -> Iterator[None]:
    """Computes with this kernel within, whatever the rule says; for tests and measurements, in one thread."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _kernel_of_training(dtype: torch.dtype) -> Kernel:
    """Returns the kernel with gradients on this CPU."""
    if dtype is torch.bfloat16:
        return "plain" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fused"
    if dtype is torch.float16:
        return "plain" if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "fused"
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "plain" if dtype is torch.float32 and has_avx512 and "AMD" in cpu_vendor() else "fused"


@cache
def cpu_vendor() -> str:
    """Returns the name that the CPU's maker has in it, "GenuineIntel" or "AuthenticAMD"; "" if unknown."""
    try:
        with _CPU_INFO.open(encoding="ascii", errors="replace") as file:
            lines = file.read(4096).splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "vendor_id":
            return value.strip()
    # Windows: "AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD".
    return platform.processor().rpartition(", ")[2]
