"""Data types of tensors: one table of their names, and one rounding between them.

Names are NumPy's ("float32", "bfloat16", "int64", ...), which PyTorch and Keras share. NumPy itself has no bfloat16:
the package `ml_dtypes` adds it, and comes with TensorFlow and JAX.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from groupvit_common.errors import InputError

FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOAT_ALIASES = {"double": "float64", "float": "float32", "half": "float16"}

# safetensors' names -> NumPy's, widest first, of the types that models use.
STORED_DTYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
# Bits per element of all of safetensors' types.
STORED_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def float_dtype(value: object) -> str | None:
    """Returns the name of the floating-point dtype that a framework's dtype or its name stands for, else None."""
    name = str(value).removeprefix("torch.")
    name = FLOAT_ALIASES.get(name, name)
    return name if name in FLOATS else None


def numpy_dtype(name: str) -> np.dtype:
    """Returns NumPy's dtype of this name. Raises `InputError` for bfloat16 without `ml_dtypes`."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise InputError("bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns an array in another dtype with PyTorch's rounding; itself if it has that dtype.

    float64 becomes a 16-bit type by way of float32. Numbers that are too large become infinite.
    """
    with np.errstate(over="ignore"):
        if dtype in ("float16", "bfloat16") and array.dtype == np.float64:
            array = array.astype(np.float32)
        return array.astype(numpy_dtype(dtype), copy=False)


def most_common_float(elements: Iterable[tuple[str, int]]) -> str:
    """Returns the floating-point dtype of most elements, float32 if there are none.

    Args:
        elements: dtype and number of elements of each tensor.
    """
    counts = dict.fromkeys(FLOATS, 0)
    for dtype, count in elements:
        if dtype in counts:
            counts[dtype] += count
    return max(counts, key=lambda dtype: (counts[dtype], dtype == "float32"))
