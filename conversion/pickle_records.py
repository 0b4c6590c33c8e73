"""Records of what pickles describe: classes, objects, storages and tensors; and values of files in messages."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from groupvit_common.checkpoints.dtypes import FLOAT_ALIASES

_SHOWN, _SHOWN_ITEMS = 40, 8  # how much of a file's text or list a message shows

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
# Types that no weights of this model have: known, so that a file can be passed by that has them, but not read.
UNREAD_BYTES = {
    **dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint32", "qint32", "complex32"), 4),
    **dict.fromkeys(("uint64", "complex64"), 8),
    "uint16": 2,
    "complex128": 16,
}
# torch's names of dtypes, where a storage has none.
TORCH_DTYPES = {
    **{name: name for name in (*STORAGE_DTYPES.values(), *UNREAD_BYTES)},
    **FLOAT_ALIASES,
    "long": "int64",
    "int": "int32",
    "short": "int16",
}
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, **UNREAD_BYTES} | {
    name: np.dtype(name).itemsize for name in ("int64", "int32", "int16", "int8", "uint8", "bool")
}

# Tensors of kinds that are not read here.
OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the meta device)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
}


class Global(NamedTuple):
    """A class, function or constant that a pickle names. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# No generated __repr__: objects may share parts in such a way that printing them would take for ever.
@dataclass(eq=False, repr=False)
class Inert:
    """An object of a class that is not loaded: its arguments, state and items."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


class Storage(NamedTuple):
    """A run of numbers: key in the file, dtype (NumPy's name; "" where tensors have their own), number of elements."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def other_tensor(value: Any) -> str | None:
    """Returns the kind of a tensor that is not read here; None for any other value."""
    return OTHER_TENSORS.get(str(value.cls)) if isinstance(value, Inert) else None


def shown(value: Any) -> str:
    """Returns a value from a file as a message shows it: short and escaped, whatever it is made of."""
    if isinstance(value, list | tuple) and not isinstance(value, Global | Storage):
        items = [_shown(item) for item in value[:_SHOWN_ITEMS]] + ["..."] * (len(value) > _SHOWN_ITEMS)
        return f"[{', '.join(items)}]"
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN]) + "..." * (len(value) > _SHOWN)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, Inert):
        return other_tensor(value) or f"an object of {value.cls}"
    return f"a {type(value).__name__}"


def escaped(text: str, limit: int = 40) -> str:
    """Returns a text from a file as a message shows it: cut, on one line, without control characters."""
    return repr(text[:limit])[1:-1] + "..." * (len(text) > limit)
