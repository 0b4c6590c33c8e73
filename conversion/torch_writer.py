"""Files that `torch.load` reads, `weights_only=True` included, written without torch.

The zip format of PyTorch since 1.6 (see `conversion.torch_file`). Python's own pickler needs the classes that a pickle
names, so the calls of torch are put together opcode by opcode.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.pickle_records import STORAGE_DTYPES

# torch maps files into memory where the values of storages lie at multiples of it.
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
        content: the pickled state dict -> the pickled content of the file; see `dictionary` and `opcodes`.
        shapes: name -> shape and dtype (NumPy's name) of each tensor, in the order of the state dict.
        value: name -> the array.
    """
    tensors = {name: _tensor(str(index), *info) for index, (name, info) in enumerate(shapes.items())}
    state = dictionary(tensors, b"ccollections\nOrderedDict\n)R")
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
    # One date in all archives, so that equal weights give equal files.
    return zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))


def opcodes(value: Any) -> bytes:
    """Returns the opcodes of a value that Python can pickle, without the header and the end."""
    return pickle.dumps(value, 2)[2:-1]


def dictionary(items: Mapping[str, bytes], empty: bytes = b"}") -> bytes:
    """Returns the opcodes of a dictionary whose values are opcodes already; `empty`: those of an empty one."""
    return empty + b"(" + b"".join(opcodes(key) + item for key, item in items.items()) + b"u"


def _tensor(key: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """Returns the call of torch that makes a contiguous tensor of the storage `key`."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = b"(" + opcodes("storage") + f"ctorch\n{_STORAGES[dtype]}\n".encode()
    storage += opcodes(key) + opcodes("cpu") + opcodes(math.prod(shape)) + b"tQ"
    arguments = storage + opcodes(0) + opcodes(shape) + opcodes(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
