"""Linear layers in inference on a CPU: which library multiplies, and in what portions.

Elsewhere (gradients, GPUs, compilers, layers that were replaced or have hooks) layers are called as they are. Results
are those of the layers but for rounding.

- **Library.** PyTorch's linears go to MKL in float32, which on some CPUs has half of oneDNN's speed (AMD Zen 5: 206 and
  421 GFLOP/s; equal on Intel and on Zen 3), and in bfloat16 to oneDNN, with weights that are brought into its layout at
  each call (Intel with AMX: 300 of 730 GFLOP/s). oneDNN with weights packed once is used where one measurement in the
  process, of an MLP of the vision tower's size, finds it at least `WORTH_IT` times as fast; `chosen()` says what was
  found.
- **Packed weights** are as large as the weights again (float32, default configuration: 113 MB for the vision tower, 38
  MB for the text tower). They live outside the layers, so that copies and files know nothing of them, until the layer
  goes or is called in training mode. They are packed anew when the weight is another tensor or was written to. PyTorch
  counts writes, but not those through `weight.data` or a NumPy array; those show in a sample of the values in which
  every row and column has one.
- **Portions.** An MLP is computed some rows at a time, its GELU in place, so that what lies between its layers stays in
  the cache and in the same memory: 0.8-0.9 of the time for 8 or 32 images on Zen 3.

Shapes: `[..., D]`; M the smaller of a weight's two sizes.
"""

import time
from collections.abc import Callable, Iterator
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

WORTH_IT = 1.25
# Smaller products are over before a library makes a difference.
LEAST_ROWS, LEAST_WEIGHTS = 32, 2**16
# Rows of an MLP at a time, for each thread.
ROWS = 1024


class Choice(NamedTuple):
    """A library, and the time of PyTorch's over the time of oneDNN's."""

    library: Library
    ratio: float


class _Packed(NamedTuple):
    """A packed weight, the key and values of what it was made of, and a view that shows these values now."""

    key: tuple[Any, ...]
    view: Tensor
    sample: Tensor
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
    return _product(module, x, "none") if _is_plain_inference(x, module) else module(x)


def mlp(fc1: nn.Module, activation: Activation, fc2: nn.Module, x: Tensor) -> Tensor:
    """Returns `fc2(activation(fc1(x)))`."""
    if not (_is_plain_inference(x, fc1, fc2) and x.is_contiguous() and x.numel()):
        return fc2(activation(fc1(x)))

    def computed(rows: Tensor) -> Tensor:
        if activation is F.gelu:
            return _product(fc2, _product(fc1, rows, "gelu"), "none")
        return _product(fc2, activation(_product(fc1, rows, "none")), "none")

    rows = x.flatten(0, -2)
    # At least half a portion each.
    parts = rows.chunk(max(1, round(len(rows) / (ROWS * torch.get_num_threads()))))
    return (computed(rows) if len(parts) == 1 else torch.cat([computed(part) for part in parts])).view(
        *x.shape[:-1], -1
    )


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


def _is_plain_inference(x: Tensor, *modules: nn.Module) -> bool:
    """Returns whether nothing sees how linear layers are computed, but by their values."""
    if torch.compiler.is_compiling() or is_tracing() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad):
        return False
    every = torch.nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return False
    return all(_is_plain(module, x.dtype) for module in modules)


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    if module.training:
        return False
    if "forward" in module.__dict__ or "weight" not in module._parameters or "bias" not in module._parameters:
        return False
    tensors = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wants_gradients and all(
        type(tensor) is nn.Parameter and tensor.dtype is dtype and tensor.device.type == "cpu" for tensor in tensors
    )


def _product(module: Any, x: Tensor, activation: Literal["none", "gelu"]) -> Tensor:
    weight = module.weight
    if _is_large(x, weight) and _library(x.dtype) == "oneDNN":
        return _onednn(x, _packed_weight(module, weight), module.bias, activation)
    y = F.linear(x, weight, module.bias)
    return y if activation == "none" else torch.ops.aten.gelu_(y)


def _onednn(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    # GELU's algorithm "none" is the one with erf.
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")


# Packed weights


def _is_large(x: Tensor, weight: Tensor) -> bool:
    smaller, larger = sorted(weight.shape)
    rows = x.numel() // x.shape[-1]
    sizes = rows >= LEAST_ROWS and weight.numel() >= LEAST_WEIGHTS
    # `_sample` needs whole squares; tensors made in inference mode do not count writes.
    return sizes and larger % smaller == 0 and weight.is_contiguous() and not weight.is_inference()


def _packed_weight(module: nn.Module, weight: Tensor) -> Tensor:
    key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
    with _lock:
        found = _packed.get(module)
        # The view keeps the memory, so that no other tensor may come to the same place.
        if found is None or found.key != key or not torch.equal(found.sample, found.view):
            with torch.inference_mode(False), torch.no_grad():
                view = _sample(weight)
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
                found = _packed[module] = _Packed(key, view, view.clone(), packed)
        return found.weight


def _sample(weight: Tensor) -> Tensor:
    """Returns the diagonals of the squares that a weight consists of, `[squares, M]`: a view."""
    rows, columns = weight.shape
    side = min(rows, columns)
    step = side * columns if rows > columns else side
    return weight.detach().as_strided((weight.numel() // side**2, side), (step, columns + 1))


# The library


def _library(dtype: torch.dtype) -> Library:
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
    """Measures the MLP of a vision layer with both libraries: some 60 ms."""
    if not _has_onednn(dtype):
        return Choice("PyTorch", 0.0)
    with torch.inference_mode(False), torch.no_grad():
        # No random numbers: the program's generator stays as it is.
        x = torch.linspace(-1, 1, 192 * 384).to(dtype).view(192, 384)
        first, second = (torch.linspace(-1, 1, 384 * 1536).to(dtype).view(shape) for shape in ((1536, -1), (384, -1)))
        bias = torch.zeros(1536, dtype=dtype)
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (first, second)]

        def plain() -> Tensor:
            return F.linear(torch.ops.aten.gelu_(F.linear(x, first, bias)), second, bias[:384])

        def onednn() -> Tensor:
            return _onednn(_onednn(x, packed[0], bias, "gelu"), packed[1], bias[:384], "none")

        ratio = _ratio_of_times(plain, onednn)
    return Choice("oneDNN" if ratio >= WORTH_IT else "PyTorch", ratio)


def _ratio_of_times(one: Callable[[], Any], other: Callable[[], Any], rounds: int = 3) -> float:
    """Returns the least time of the one over the least time of the other, in turns."""
    least = [float("inf")] * 2
    for number in range(rounds + 1):
        for index, function in enumerate((one, other)):
            start = time.perf_counter()
            function()
            if number:
                least[index] = min(least[index], time.perf_counter() - start)
    return least[0] / least[1]


def _has_onednn(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN multiplies in this dtype on this CPU, and PyTorch has the operations."""
    operations = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(operations, name) for name in names)):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and operations._is_mkldnn_bf16_supported())
