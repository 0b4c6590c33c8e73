"""Linear layers in inference on a CPU: which library multiplies, and in what portions.

Elsewhere (gradients, GPUs, compilers, layers that were replaced or have hooks) layers are called as they are. Results
are those of the layers but for rounding.

- **Library.** PyTorch's linears go to MKL in float32, which on some CPUs has half of oneDNN's speed (AMD Zen 5: 206 and
  421 GFLOP/s; equal on Intel and on Zen 3), and in bfloat16 to oneDNN, with weights that are brought into its layout at
  each call (Intel with AMX: 300 of 730 GFLOP/s). oneDNN with weights packed once also adds residual branches, applies
  GELU and multiplies queries, keys and values at once. It is used where one measurement in the process, of what a
  vision layer multiplies, finds it at least `WORTH_IT` times as fast; `chosen()` says what was found. Of 60
  measurements of one thread on a busy Zen 3, 58 were below 1.1 and two above (1.11, 1.13); with several threads on a
  busy machine they say little.
- **Packed weights** are as large as the weights again (float32, default configuration: 113 MB for the vision tower, 38
  MB for the text tower). They live outside the layers, so that copies and files know nothing of them, until the layer
  goes or is called in training mode. They are packed anew when the weight is another tensor or was written to. PyTorch
  counts writes, but not those through `weight.data` or a NumPy array; those show in a sample of the values in which
  every row and column has one.
- **Portions.** An MLP is computed some rows at a time, its GELU in place, so that what lies between its layers stays in
  the cache and in the same memory: 0.8-0.9 of the time for 8 or 32 images on Zen 3.

Shapes: `[..., D]`; M the smaller of a weight's two sizes.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn import functional as F

Library = Literal["PyTorch", "oneDNN"]
Activation = Callable[[Tensor], Tensor]

WORTH_IT = 1.1
# Smaller products are over before a library makes a difference.
LEAST_ROWS, LEAST_WEIGHTS = 32, 2**16
# Rows of an MLP at a time, for each thread.
ROWS = 1024
_SLOPE = 1.702


class Choice(NamedTuple):
    """A library, and the time of PyTorch's over the time of oneDNN's."""

    library: Library
    ratio: float


class _Packed(NamedTuple):
    """Packed weights, the keys and values of what they were made of, and views that show these values now."""

    key: tuple[Any, ...]
    views: list[Tensor]
    samples: list[Tensor]
    weight: Tensor


_lock = RLock()
_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()
_choices: dict[torch.dtype, Choice] = {}
_forced: list[Library] = []


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Returns `module(x)`; module: a linear layer, or whatever took its place."""
    if torch.compiler.is_compiling() or _is_settled(x.dtype):
        return module(x)
    if module.training:
        _packed.pop(module, None)
    return _product(module, x) if _is_plain(x, module) else module(x)


def linears(owner: nn.Module, modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Returns `module(x)` of each of the layers that `owner` has; oneDNN multiplies them at once."""
    if torch.compiler.is_compiling() or _is_settled(x.dtype):
        return [module(x) for module in modules]
    if owner.training:
        _packed.pop(owner, None)
    return products(owner, modules, x) if _is_plain(x, *modules) else [linear(module, x) for module in modules]


def mlp(fc1: nn.Module, activation: Activation, fc2: nn.Module, x: Tensor) -> Tensor:
    """Returns `fc2(activation(fc1(x)))`."""
    if not (_is_plain(x, fc1, fc2) and x.is_contiguous() and x.numel()):
        return fc2(activation(fc1(x)))
    found = [_product(fc2, _hidden(fc1, activation, rows)) for rows in _portions(x.flatten(0, -2))]
    return (found[0] if len(found) == 1 else torch.cat(found)).view(*x.shape[:-1], -1)


def chosen() -> dict[str, Choice]:
    """Returns the library of each dtype that was measured in this process, by the dtype's name."""
    return {str(dtype).removeprefix("torch."): choice for dtype, choice in _choices.items()}


@contextmanager
def forced(library: Library) -> Iterator[None]:
    """Computes with this library within where there is a choice; for tests and measurements."""
    _forced.append(library)
    try:
        yield
    finally:
        _forced.pop()


# What nobody sees


def is_plain_call(x: Tensor) -> bool:
    """Returns whether a computation of `x` now is seen by its values alone, whatever the layers."""
    if torch.compiler.is_compiling() or is_tracing() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad):
        return False
    every = torch.nn.modules.module
    return not (every._global_forward_hooks or every._global_forward_pre_hooks)


def is_plain_module(module: Any, kind: type[nn.Module]) -> bool:
    """Returns whether calling a module in evaluation is what its class says, and nothing else."""
    if type(module) is not kind or module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    return module._compiled_call_impl is None and "forward" not in module.__dict__


def has_plain_parameters(module: Any, dtype: torch.dtype) -> bool:
    """Returns whether weight and bias are parameters of this dtype in memory, of which no gradient is wanted."""
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return False
    for tensor in (parameters["weight"], parameters["bias"]):
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter or tensor.dtype is not dtype or tensor.device.type != "cpu":
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return True


def _is_plain(x: Tensor, *modules: nn.Module) -> bool:
    return is_plain_call(x) and all(
        is_plain_module(module, nn.Linear) and has_plain_parameters(module, x.dtype) for module in modules
    )


# Products, of layers that are plain


def products(owner: nn.Module, modules: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Returns `module(x)` of each of the linear layers that `owner` has."""
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules]
    if not _uses_onednn(x, *weights) or any(bias is None for bias in biases):
        return [_product(module, x) for module in modules]
    y = _onednn(x, _packed_weight(owner, *weights), torch.cat(biases))
    return list(y.split([len(weight) for weight in weights], dim=-1))


def sum_with_product(x: Tensor, module: Any, inputs: Tensor, *, in_place: bool = False) -> Tensor:
    """Returns `x + module(inputs)` `[rows, D]`; in_place: the memory of `x` may be used."""
    packed = _packed_weight(module, module.weight) if _uses_onednn(inputs, module.weight) else None
    return _sum(x, inputs, module.weight, module.bias, packed, in_place)


def sum_with_mlp(x: Tensor, fc1: Any, activation: Activation, fc2: Any, inputs: Tensor) -> Tensor:
    """Returns `x + fc2(activation(fc1(inputs)))` `[rows, D]`, and may use the memory of `x`."""
    found = [
        sum_with_product(rows, fc2, _hidden(fc1, activation, part), in_place=True)
        for rows, part in zip(_portions(x), _portions(inputs), strict=True)
    ]
    if len(found) == 1:
        return found[0]
    return x if found[0].data_ptr() == x.data_ptr() else torch.cat(found)


def _portions(rows: Tensor) -> tuple[Tensor, ...]:
    # At least half a portion each.
    return rows.chunk(max(1, round(len(rows) / (ROWS * torch.get_num_threads()))))


def _hidden(fc1: Any, activation: Activation, x: Tensor) -> Tensor:
    if activation is F.gelu:
        return _product(fc1, x, "gelu")
    hidden = _product(fc1, x)
    return _quick_gelu_(hidden) if activation is quick_gelu else activation(hidden)


def quick_gelu(x: Tensor) -> Tensor:
    """Returns `x sigmoid(1.702 x)`, the activation of CLIP's texts."""
    return x * torch.sigmoid(_SLOPE * x)


def _quick_gelu_(x: Tensor) -> Tensor:
    """`quick_gelu`, written over its input: three new tensors cost more than the arithmetic."""
    return F.silu(x.mul_(_SLOPE), inplace=True).mul_(1 / _SLOPE)


def _product(module: Any, x: Tensor, activation: str = "none") -> Tensor:
    if _uses_onednn(x, module.weight):
        return _onednn(x, _packed_weight(module, module.weight), module.bias, activation)
    return _pytorch(x, module.weight, module.bias, activation)


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation == "none" else torch.ops.aten.gelu_(y)


def _onednn(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    # GELU's algorithm "none" is the one with erf.
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")


def _sum(
    x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, in_place: bool = False
) -> Tensor:
    """Returns `x + inputs @ weight.T + bias`, with the packed weight if there is one."""
    if packed is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, x, packed, bias, "add")
    if x.dtype not in (torch.float32, torch.float64):
        # Where sums are rounded to few bits, the product is summed first.
        return F.linear(inputs, weight, bias).add_(x)
    # The product is added where the sum is to lie. Elsewhere, `addmm` copies what it adds to.
    if bias is not None:
        x, in_place = (x.add_(bias) if in_place else x + bias), True
    return x.addmm_(inputs, weight.t()) if in_place else torch.addmm(x, inputs, weight.t())


# Packed weights


def _uses_onednn(x: Tensor, *weights: Tensor) -> bool:
    return all(_is_large(x, weight) for weight in weights) and library(x.dtype) == "oneDNN"


def _is_large(x: Tensor, weight: Tensor) -> bool:
    smaller, larger = sorted(weight.shape)
    rows = x.numel() // x.shape[-1]
    sizes = rows >= LEAST_ROWS and weight.numel() >= LEAST_WEIGHTS
    # `_sample` needs whole squares; tensors made in inference mode do not count writes.
    return sizes and larger % smaller == 0 and weight.is_contiguous() and not weight.is_inference()


def _packed_weight(owner: nn.Module, *weights: Tensor) -> Tensor:
    """Returns the weights below each other, packed."""
    key = tuple((weight.data_ptr(), weight._version, weight.dtype, weight.shape) for weight in weights)
    with _lock:
        found = _packed.get(owner)
        # The views keep the memory, so that no other tensor may come to the same place.
        if found is None or found.key != key or not all(map(torch.equal, found.samples, found.views)):
            with torch.inference_mode(False), torch.no_grad():
                views = [_sample(weight) for weight in weights]
                whole = torch.cat([weight.detach() for weight in weights]) if weights[1:] else weights[0].detach()
                packed = torch.ops.mkldnn._reorder_linear_weight(whole)
                found = _packed[owner] = _Packed(key, views, [view.clone() for view in views], packed)
        return found.weight


def _sample(weight: Tensor) -> Tensor:
    """Returns the diagonals of the squares that a weight consists of, `[squares, M]`: a view."""
    rows, columns = weight.shape
    side = min(rows, columns)
    step = side * columns if rows > columns else side
    return weight.detach().as_strided((weight.numel() // side**2, side), (step, columns + 1))


# The library


def library(dtype: torch.dtype) -> Library:
    """Returns the library that multiplies in this dtype, after a measurement if there was none."""
    if _forced:
        return _forced[-1]
    if dtype not in _choices:
        with _lock:
            if dtype not in _choices:
                _choices[dtype] = _measured(dtype)
    return _choices[dtype].library


def _is_settled(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch is known to be the library; a dictionary is looked up sooner than a layer examined."""
    known = _choices.get(dtype)
    return known is not None and known.library == "PyTorch" and not _forced


def _measured(dtype: torch.dtype) -> Choice:
    """Measures the products of a vision layer with both libraries: some 100 ms."""
    if not _has_onednn(dtype):
        return Choice("PyTorch", 0.0)
    with torch.inference_mode(False), torch.no_grad():
        ratio = _ratio_of_times(*_contestants(dtype))
    return Choice("oneDNN" if ratio >= WORTH_IT else "PyTorch", ratio)


def _contestants(dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Returns the products of a vision layer for half of an image's tokens, by PyTorch and by oneDNN."""

    # No random numbers: the program's generator stays as it is.
    def numbers(rows: int, columns: int) -> Tensor:
        return torch.linspace(-1, 1, rows * columns).view(rows, columns).to(dtype)

    x, width, bias = numbers(128, 384), 384, torch.zeros(1536, dtype=dtype)
    q, k, v, out, first, second = (numbers(*shape) for shape in [(width, width)] * 4 + [(1536, width), (width, 1536)])
    pack = torch.ops.mkldnn._reorder_linear_weight
    packed = [pack(weight) for weight in (torch.cat([q, k, v]), out, first, second)]

    def by_pytorch() -> Tensor:
        values = [_pytorch(x, weight, bias[:width]) for weight in (q, k, v)][-1]
        y = _sum(x, values, out, bias[:width], None)
        return _sum(y, _pytorch(y, first, bias, "gelu"), second, bias[:width], None, in_place=True)

    def by_onednn() -> Tensor:
        values = _onednn(x, packed[0], bias[: 3 * width])[:, -width:]
        y = _sum(x, values, out, bias[:width], packed[1])
        return _sum(y, _onednn(y, packed[2], bias, "gelu"), second, bias[:width], packed[3])

    return by_pytorch, by_onednn


def _ratio_of_times(one: Callable[[], Any], other: Callable[[], Any], turns: int = 8, budget: float = 0.08) -> float:
    """Returns the time of the one over the time of the other, the lower of two figures, so that chance alone does not
    favour the other: least by least time, and the middle of the ratios of turns.

    Args:
        turns: fewer once `budget` seconds are over, but half of them.
    """
    one(), other()
    times: list[tuple[float, float]] = []
    while len(times) < turns // 2 or (len(times) < turns and sum(map(sum, times)) < budget):
        times.append((_seconds(one), _seconds(other)))
    least, of_other = (min(column) for column in zip(*times, strict=True))
    return min(least / of_other, statistics.median(a / b for a, b in times))


def _seconds(function: Callable[[], Any]) -> float:
    # What other programs take from the CPU does not count, where one thread computes; Windows counts steps of 16 ms.
    alone = torch.get_num_threads() == 1 and sys.platform != "win32"
    clock = time.thread_time if alone else time.perf_counter
    start = clock()
    function()
    return clock() - start


def _has_onednn(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN multiplies in this dtype on this CPU, and PyTorch has the operations."""
    operations = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(operations, name) for name in names)):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and operations._is_mkldnn_bf16_supported())
