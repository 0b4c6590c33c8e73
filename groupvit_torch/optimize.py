"""Models made faster for inference: narrower dtypes, int8, compilation. Nothing here happens unless it is asked for.

`docs/speed.md` says what to expect.
"""

import copy
import shutil
import time
import warnings
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from groupvit_common.errors import InputError
from groupvit_common.model.optimization import (
    BOUND,
    OptimizationReport,
    Optimized,
    check_difference,
    check_request,
    choose_dtype,
    example_pixels,
    example_tokens,
    largest_difference,
)
from groupvit_torch.base import GroupViTPreTrainedModel
from groupvit_torch.grouping import AssignAttention
from groupvit_torch.model import GroupViTTextModel, GroupViTVisionModel

__all__ = ["Int8Linear", "features", "optimize"]

# The least scale of a row: one of zeros has none of its own.
_LEAST = 1e-30


def optimize(
    model: Any,
    *,
    dtype: str = "auto",
    compile: bool = False,
    quantize: str | None = None,
    example: Any = None,
    verify: bool | None = None,
    bound: float = BOUND,
) -> Optimized:
    """Returns a copy of a model made ready for inference, and a report: `fast, report = optimize(model)`.

    The model that is given stays as it is. The copy is in evaluation mode and without gradients.

    Args:
        model: a `GroupViTModel`, `GroupViTVisionModel` or `GroupViTTextModel`.
        dtype: "bfloat16", "float16" or "float32". "auto": bfloat16 where the CPU has instructions for it, on a GPU
            bfloat16 or float16, and else float32. One that is named is used wherever the model is; the report says
            where it is slow.
        compile: compile the image tower by `torch.compile`, with the weights as constants. It happens at the first call
            with images of a size and takes a minute or more on a CPU, for each size.
        quantize: "int8": the weights of linear layers as whole numbers of eight bits, inputs rounded as they come. On
            CPUs only. The assignment of patches to groups stays in float32.
        example: images `[B, C, H, W]` for `verify`; None: noise, always the same.
        verify: compare the features with the plain model's. None: where the model is quantized.
        bound: the largest accepted difference, relative to the largest feature.

    Raises:
        InputError: an argument that cannot be used, what this machine cannot do, or features beyond the bound.
    """
    if not isinstance(model, GroupViTPreTrainedModel):
        raise InputError(f"optimize takes a model of groupvit_torch, got {type(model).__name__}")
    device = model.device.type
    check_request(dtype, quantize, device)
    if compile:
        _check_compiler(model)
    begin = time.perf_counter()
    choice = choose_dtype("float32" if quantize else dtype, device, has_bfloat16=_has_bfloat16(device))
    reason = choice.reason
    fast = copy.deepcopy(model).eval().requires_grad_(False).to(getattr(torch, choice.dtype))
    if quantize:
        reason = f"{1 + _levels().bit_length()} bits of each input: {_LEVELS_REASON[_levels()]}"
        _quantize(fast)
    if compile:
        _compile(fast)
    difference = None
    if verify if verify is not None else quantize is not None:
        images = None if example is None else torch.as_tensor(example)
        difference = largest_difference(features(model, images), features(fast, images))
        check_difference(difference, bound, quantize or choice.dtype)
    seconds = time.perf_counter() - begin
    return Optimized(fast, OptimizationReport(choice.dtype, quantize, compile, reason, difference, seconds))


@torch.no_grad()
def features(model: Any, pixels: Tensor | None = None) -> list[npt.NDArray[np.float32]]:
    """Returns a model's features of images `[B, E]` and of texts `[N, E]`, as far as it has both, for a comparison.

    Args:
        pixels: `[B, C, H, W]`; None: noise.
    """
    found: list[Any] = []
    was_training = model.training
    model.eval()
    if not isinstance(model, GroupViTTextModel):
        config = model.config if isinstance(model, GroupViTVisionModel) else model.config.vision_config
        images = torch.from_numpy(example_pixels(config)) if pixels is None else pixels
        call = model if isinstance(model, GroupViTVisionModel) else model.get_image_features
        found.append(call(images.to(model.device)))
    if not isinstance(model, GroupViTVisionModel):
        config = model.config if isinstance(model, GroupViTTextModel) else model.config.text_config
        call = model if isinstance(model, GroupViTTextModel) else model.get_text_features
        found.append(call(torch.from_numpy(example_tokens(config)).to(model.device)))
    model.train(was_training)
    tensors = [each if isinstance(each, Tensor) else each["pooler_output"] for each in found]
    return [tensor.float().cpu().numpy() for tensor in tensors]


class Int8Linear(nn.Module):
    """A linear layer of eight-bit weights, one scale for each output; inputs are rounded as they come, one scale for
    each token.

    Products are summed as whole numbers, by oneDNN. Source of the scheme: Dettmers et al. 2022, LLM.int8(),
    "vector-wise quantization".
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_(min=_LEAST) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.levels = _levels()
        self.weight: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", (weight / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST).div_(self.levels)
        # Positive numbers lose what is behind the point: with the half that is added, they are rounded.
        whole = rows.div(scale).add_(self.levels + 0.5).to(torch.uint8)
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        y = _whole_product(whole, self.levels, self._packed, self.weight_scale).mul_(scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __getstate__(self) -> dict[str, Any]:
        # The packed weights have a form of oneDNN's own, which can neither be copied nor written.
        return {**vars(self), "_packed": None}


def _whole_product(rows: Tensor, zero: int, packed: Tensor, scale: Tensor) -> Tensor:
    """uint8 `[M, K]` of which `zero` stands for 0, packed int8 `[N, K]` -> float32 `[M, N]` times `scale` `[N]`."""
    no_shift = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, zero, packed, scale, no_shift, None, 1.0, 0, torch.float32, "none", [], ""
    )


# Steps on either side of zero into which inputs are divided.
_LEVELS_REASON = {
    127: "this CPU sums their products exactly",
    63: "without VNNI this CPU's sums of two products end at 16 bits",
}


@cache
def _levels() -> int:
    """Returns the number of steps on either side of zero that oneDNN multiplies exactly here.

    CPUs without VNNI add two products in 16 bits, which eight-bit inputs overflow.

    Raises:
        InputError: this PyTorch has no such function, or no number of steps is exact.
    """
    width = 64
    try:
        packed = torch.ops.onednn.qlinear_prepack(torch.full((width, width), 127, dtype=torch.int8), None)
        for levels in _LEVELS_REASON:
            rows = torch.full((2, width), 2 * levels, dtype=torch.uint8)
            product = _whole_product(rows, levels, packed, torch.ones(width))
            if bool((product == 127 * levels * width).all()):
                return levels
    except (AttributeError, RuntimeError) as error:
        raise InputError(
            f"quantize='int8' needs oneDNN, which this PyTorch lacks ({str(error).splitlines()[0]}): leave it out"
        ) from error
    raise InputError("quantize='int8' is not exact on this CPU: leave it out")


def _quantize(model: nn.Module) -> None:
    """Replaces the linear layers, but for those that assign patches to groups: a near tie there moves whole patches."""
    for module in list(model.modules()):
        if isinstance(module, AssignAttention):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def _has_bfloat16(device: str) -> bool:
    """Returns whether PyTorch has fast functions for bfloat16 on this kind of device, if the device has them."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or torch.backends.mkldnn.is_available()


def _check_compiler(model: Any) -> None:
    """Raises `InputError` where the image tower cannot be compiled."""
    if not hasattr(model, "vision_model"):
        raise InputError(f"compile=True compiles the image tower, and a {type(model).__name__} has none: leave it out")
    if model.device.type != "cpu":
        return
    from torch._inductor import config

    compilers = [name for name in (*_listed(config.cpp.cxx), "g++", "c++", "clang++", "cl") if name]
    if not any(shutil.which(name) for name in compilers):
        raise InputError("compile=True needs a C++ compiler such as g++ on this CPU, and there is none: leave it out")


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _compile(model: Any) -> None:
    """Has the image tower compiled when it is called. Names of tensors stay as they are."""
    options = {"freezing": True} if model.device.type == "cpu" else {}
    with warnings.catch_warnings():
        # PyTorch uses what it deprecates, in modules that are imported here.
        warnings.simplefilter("ignore", DeprecationWarning)
        model.vision_model.compile(dynamic=False, options=options)
