"""The requests that `optimize` takes, its choices and its report: the same for both backends.

Backends add what touches tensors: `groupvit_torch.optimize`, `groupvit_tf.optimize`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from groupvit_common.checkpoints.dtypes import float_dtype
from groupvit_common.errors import InputError
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTTextConfig, GroupViTVisionConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = (None, "int8")
# The largest difference of features, relative to the largest feature, with which a quantized model is of use.
BOUND = 0.15

# Instructions that multiply a dtype fast: the name of a flag in /proc/cpuinfo, and what people call it.
_INSTRUCTIONS = {
    "bfloat16": {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"},
    "float16": {"amx_fp16": "AMX-FP16", "avx512_fp16": "AVX512-FP16"},
}
# What is seen without a measurement: docs/speed.md has the tables.
_USUAL_DIFFERENCE = {"bfloat16": "1 to 4%", "float16": "0.1 to 1%"}


@dataclass(frozen=True)
class OptimizationReport:
    """The result of `optimize` in words and numbers; `str()` is one line.

    Attributes:
        dtype: of the weights that are not quantized, and of what layers hand on.
        quantize: "int8", or None.
        compiled: whether the image tower is compiled, at its first call with images of a size.
        reason: why.
        difference: the largest difference of features between the model and the plain one, relative to the largest
            feature; None: not measured.
        seconds: of preparation, by the clock.
    """

    dtype: str
    quantize: str | None
    compiled: bool
    reason: str
    difference: float | None
    seconds: float

    @property
    def is_plain(self) -> bool:
        """True for a model that computes what it computed before."""
        return self.quantize is None and self.dtype == "float32" and not self.compiled

    def __str__(self) -> str:
        what = f"{self.quantize or self.dtype}{', compiled' if self.compiled else ''} ({self.reason})"
        if self.is_plain:
            return f"{what}: as without optimization"
        if self.difference is not None:
            cost = f"features differ by up to {self.difference:.1%} of the largest, measured"
        elif self.dtype in _USUAL_DIFFERENCE:
            cost = f"features differ by {_USUAL_DIFFERENCE[self.dtype]} of the largest"
        else:
            cost = "features differ by rounding"
        return f"{what}: {cost}; prepared in {self.seconds:.1f} s"


class Optimized(NamedTuple):
    """The result of `optimize`."""

    model: Any
    report: OptimizationReport


class Choice(NamedTuple):
    """A dtype, and why it is chosen."""

    dtype: str
    reason: str


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the names of this CPU's instructions as Linux lists them; elsewhere none are known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.split())


def optimization_request(dtype: Any, *, fast: bool) -> dict[str, Any] | None:
    """Returns the keywords of `optimize` for a user's `dtype` and `fast`; None: nothing is to be optimized."""
    if dtype == "int8":
        return {"quantize": "int8"}
    if not fast:
        return None
    return {"dtype": "auto" if dtype is None else float_dtype(dtype) or dtype}


def check_request(dtype: object, quantize: object, device: str) -> None:
    """Raises `InputError` for what `optimize` cannot be asked for.

    Args:
        device: the kind of the model's device: "cpu", or another.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quantize not in QUANTIZATIONS:
        raise InputError(f"quantize must be None or 'int8', got {quantize!r}")
    if quantize is None:
        return
    if dtype not in ("auto", "float32"):
        raise InputError(f"quantize='int8' computes the rest in float32: leave dtype={dtype!r} out, or quantize")
    if device != "cpu":
        raise InputError(f"quantize='int8' is for CPUs, and the model is on {device}: choose dtype='bfloat16' there")


def choose_dtype(wanted: str, device: str, *, has_bfloat16: bool = True, flags: frozenset[str] | None = None) -> Choice:
    """Returns the dtype to compute in, and why.

    Args:
        wanted: one of `DTYPES`. "auto" is a narrower dtype where the device computes it faster, else float32.
        device: "cpu", "mps" (Apple's), or another accelerator.
        has_bfloat16: of an accelerator; of a CPU: whether the framework has a library for it.
        flags: of the CPU, `cpu_flags()` if None.
    """
    if device == "cpu":
        known = cpu_flags() if flags is None else flags
        names = _INSTRUCTIONS["bfloat16" if wanted == "auto" else wanted] if wanted != "float32" else {}
        found = next((name for flag, name in names.items() if flag in known and has_bfloat16), None)
        if wanted == "auto":
            if found is None:
                return Choice("float32", "this CPU has no instructions for bfloat16, AMX or AVX512-BF16")
            return Choice("bfloat16", f"this CPU has {found}")
        if wanted == "float32":
            return Choice(wanted, "as requested")
        if found is None:
            return Choice(wanted, f"as requested, slower than float32: this CPU lacks {' and '.join(names.values())}")
        return Choice(wanted, f"as requested, and this CPU has {found}")
    if wanted != "auto":
        return Choice(wanted, "as requested")
    # Apple's older chips lack bfloat16, as do NVIDIA's.
    return Choice("bfloat16" if has_bfloat16 and device != "mps" else "float16", f"the model is on {device}")


def example_pixels(config: GroupViTVisionConfig) -> npt.NDArray[np.float32]:
    """Returns two images of noise `[2, C, H, W]`, always the same, for a comparison of features."""
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def example_tokens(config: GroupViTTextConfig) -> npt.NDArray[np.int64]:
    """Returns two short texts `[2, T]` of random tokens, always the same."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(8, config.max_position_embeddings)))
    # A legacy model pools at the largest id.
    end = config.vocab_size - 1 if config.eos_token_id == LEGACY_EOS_TOKEN_ID else config.eos_token_id
    ids[:, -1] = end
    return ids


def largest_difference(
    plain: Sequence[npt.NDArray[np.floating[Any]]], fast: Sequence[npt.NDArray[np.floating[Any]]]
) -> float:
    """Returns the largest difference of features, of each kind relative to its largest; infinite where one is NaN."""
    worst = 0.0
    for before, after in zip(plain, fast, strict=True):
        largest = float(np.abs(before).max())
        found = float(np.abs(before - after).max()) / largest if largest else float(np.abs(after).max())
        worst = max(worst, found if np.isfinite(found) else np.inf)
    return worst


def check_difference(difference: float, bound: float, what: str) -> None:
    """Raises `InputError` for features that differ by more than the bound; `what`: the dtype or quantization."""
    if difference > bound:
        raise InputError(
            f"{what} changes this model's features by up to {difference:.1%} of the largest, more than the bound of "
            f"{bound:.0%}: use a wider dtype, or accept it with bound=..."
        )
