"""Files that `torch.load` reads, `weights_only=True` included, written without torch.

The zip format of PyTorch since 1.6 (see `conversion.torch_file`): the pickle is put together opcode by opcode, because Python's own
pickler wants the classes that it names to be there.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.pickle_records import STORAGE_DTYPES

# Of the values: torch maps files into memory where storages lie at multiples of it.
_ALIGNMENT = 64
_STORAGES = {dtype: storage for storage, dtype in STORAGE_DTYPES.items()}


def write_torch_file(
    path: Path,
    content: Callable[[bytes], bytes],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a state dict, one tensor in memory at a time.

    Args:
        content: the pickled state dict -> what the file holds, pickled too; see `dictionary` and `plain`.
        shapes: name -> shape and dtype (NumPy's name) of each tensor, in the order of the state dict.
        value: name -> the array.
    """
    state = _dictionary(
        {name: _tensor(str(index), *shape_and_dtype) for index, (name, shape_and_dtype) in enumerate(shapes.items())},
        b"ccollections\nOrderedDict\n)R",
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_member("data.pkl"), b"\x80\x02" + content(state) + b".")
        archive.writestr(_member("byteorder"), b"little")
        for index, (name, (shape, dtype)) in enumerate(shapes.items()):
            array = value(name)
            assert array.shape == shape, name
            assert array.dtype.name == dtype, name
            member = _member(f"data/{index}")
            start = archive.start_dir + 30 + len(member.filename)
            padding = -(start + 4) % _ALIGNMENT
            member.extra = b"FB" + struct.pack("<H", padding) + b"\0" * padding
            flat = np.ascontiguousarray(array).reshape(-1)
            with archive.open(member, "w", force_zip64=False) as file:
                file.write(flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data)
        archive.writestr(_member("version"), b"3\n")


def _member(name: str) -> zipfile.ZipInfo:
    # The date of all files in archives that are to be the same for the same weights.
    return zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))


def dictionary(items: Mapping[str, bytes]) -> bytes:
    """The opcodes of a dictionary whose values are opcodes already."""
    return _dictionary(items, b"}")


def plain(value: Any) -> bytes:
    """The opcodes of None, booleans, numbers, texts, lists, tuples and dictionaries."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return b"](" + b"".join(map(plain, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(plain, value)) + b"t"
    assert isinstance(value, dict), type(value)
    return _dictionary({key: plain(item) for key, item in value.items()}, b"}")


def _dictionary(items: Mapping[str, bytes], empty: bytes) -> bytes:
    return empty + b"(" + b"".join(_text(key) + item for key, item in items.items()) + b"u"


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tensor(key: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """The call of torch that makes a contiguous tensor of the storage `key`."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = (
        b"(" + _text("storage") + f"ctorch\n{_STORAGES[dtype]}\n".encode() + _text(key) + _text("cpu")
        + _integer(math.prod(shape)) + b"tQ"
    )  # fmt: skip
    arguments = storage + _integer(0) + plain(shape) + plain(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
