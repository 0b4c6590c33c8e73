"""safetensors files: headers that are checked against the file's size, and tensors one at a time.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header, data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groupvit_common.checkpoints.dtypes import STORED_BITS, STORED_DTYPES, numpy_dtype
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.json_text import parse_json

# What transformers knows PyTorch's layout by.
PYTORCH_METADATA = {"format": "pt"}
# Some 60,000 tensors, a hundred times the largest model's; the library's own limit of 100 MB costs gigabytes.
_MAX_HEADER_BYTES = 8 << 20
_STORED_AS = {name: stored for stored, name in STORED_DTYPES.items()}

# First bytes of files that end up under the name of a weights file, and what they are.
_NO_WEIGHTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves; run `git lfs pull` in its repository"),
    (b"<", "a web page or XML, not weights; the download was answered by an error or login page: download it again"),
    (b"{", "a JSON text, not weights"),
    (b"[", "a JSON text, not weights"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
)
# The same of weights in other formats.
_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (PyTorch's pickle format), not safetensors; `groupvit convert` reads it"),
    (b"\x80\x02", "a Python pickle, not safetensors; `groupvit convert` reads those of PyTorch"),
    (b"\x89HDF", "an HDF5 file (TensorFlow's .h5), not safetensors; `groupvit convert` reads it"),
)


class TensorInfo(NamedTuple):
    """A stored tensor: shape, and dtype under safetensors' name ("F32", "BF16", "I64", ...)."""

    shape: tuple[int, ...]
    dtype: str


class Header(NamedTuple):
    """A safetensors file's header: tensors by name, where each begins, and free metadata such as `format`."""

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]  # bytes from the beginning of the file
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Returns the header of a safetensors file, checked against the file's size; no tensor is read.

    Raises:
        CheckpointError: the file cannot be read, is something else, or is damaged; names the file and the cause.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            _refuse_impostor(path, size, start)
            length = int.from_bytes(start[:8], "little")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file of a model: its header would be {length} bytes long, and "
                    f"{_MAX_HEADER_BYTES} are the most that is read"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it announces a header of {length} bytes "
                    f"and is {size} bytes long; download or copy it again"
                )
            file.seek(8)
            text = file.read(length)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _parse_header(path, text, size)


def describe_impostor(start: bytes, magics: tuple[tuple[bytes, str], ...] = _NO_WEIGHTS) -> str | None:
    """Returns what a file is that begins so and holds no weights, in words for an error; None if it may hold some."""
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t")
    return next((meaning for magic, meaning in magics if text.startswith(magic)), None)


def _refuse_impostor(path: Path, size: int, start: bytes) -> None:
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes); download or copy it again")
    meaning = describe_impostor(start, (*_NO_WEIGHTS, *_OTHER_FORMATS))
    # A length that happens to begin with such a byte has eight bytes that are no text.
    if meaning is not None and not _plausible_length(start, size):
        raise CheckpointError(f"{path} is {meaning}")
    if len(start) < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are no safetensors file; download or copy it again")


def _plausible_length(start: bytes, size: int) -> bool:
    return len(start) > 8 and int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{"


def _parse_header(path: Path, text: bytes, size: int) -> Header:
    data_start = 8 + len(text)
    data_bytes = size - data_start
    damaged = f"{path} is damaged or not a safetensors file"
    content = parse_json(text, f"the header of {path}")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{damaged}: its metadata is no table of texts")
    tensors, spans = {}, []
    for name, entry in content.items():
        info, span = _parse_entry(entry)
        if info is None or span is None:
            raise CheckpointError(f"{damaged}: the entry of tensor {name!r} makes no sense")
        tensors[name] = info
        spans.append((*span, name))
    end = 0
    for begin, after, name in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{damaged}: tensor {name!r} starts at byte {begin}, expected {end}")
        end = after
    if end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header announces {end} bytes of tensors and {data_bytes} are there; "
            "download or copy it again"
        )
    if end < data_bytes:
        raise CheckpointError(f"{damaged}: {data_bytes - end} bytes follow the last tensor")
    return Header(tensors, {name: data_start + begin for begin, _, name in spans}, metadata)


def _parse_entry(entry: object) -> tuple[TensorInfo, tuple[int, int]] | tuple[None, None]:
    """Returns one tensor's header entry, or (None, None) if it is malformed or contradicts itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return None, None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_BITS or not _is_sizes(shape) or not _is_sizes(offsets):
        return None, None
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * STORED_BITS[dtype]:
        return None, None
    return TensorInfo(tuple(shape), dtype), (offsets[0], offsets[1])


def _is_sizes(value: object) -> bool:
    # The bound keeps products of damaged numbers small; no file has 2**63 bytes.
    return isinstance(value, list) and len(value) < 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_arrays(path: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors `names` of a safetensors file, one at a time, in their stored dtypes (bfloat16: that of
    `ml_dtypes`).

    Raises:
        CheckpointError: the file cannot be read, or holds one of them in a dtype that NumPy does not have.
    """
    array = np.empty(0)

    def memory(name: str, info: TensorInfo) -> np.ndarray:
        nonlocal array
        if info.dtype not in STORED_DTYPES:
            raise CheckpointError(f"{path} holds {name} as {info.dtype}; {', '.join(STORED_DTYPES)} can be read")
        array = np.empty(info.shape, numpy_dtype(STORED_DTYPES[info.dtype]))
        return array.reshape(-1).view(np.uint8)

    for name in read_into(path, names, memory):
        yield name, array


def read_into(path: Path, names: Iterable[str], memory: Callable[[str, TensorInfo], np.ndarray]) -> Iterator[str]:
    """Yields the name of each of the tensors `names` once its bytes are in memory, in the order of the file.

    Args:
        memory: name, shape and dtype -> the bytes `[n]` to be filled.

    Raises:
        CheckpointError: the file cannot be read.
    """
    header = read_header(path)
    try:
        with path.open("rb") as file:
            for name in sorted(names, key=header.starts.__getitem__):
                content = memory(name, header.tensors[name])
                file.seek(header.starts[name])
                if file.readinto(content.data) != content.nbytes:
                    raise CheckpointError(f"{path} is truncated: it ends within {name}")
                yield name
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def array_info(shape: Iterable[int], dtype: str) -> TensorInfo:
    """Returns how a tensor of NumPy's dtype name is stored. Raises `InputError` for a dtype that cannot be."""
    if dtype not in _STORED_AS:
        raise InputError(f"a tensor of dtype {dtype} cannot be saved; {', '.join(_STORED_AS)} can")
    return TensorInfo(tuple(shape), _STORED_AS[dtype])


def stored_bytes(info: TensorInfo) -> int:
    """Returns the bytes that a tensor takes in a file."""
    return math.prod(info.shape) * STORED_BITS[info.dtype] // 8


def write_arrays(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = PYTORCH_METADATA,
) -> None:
    """Writes a safetensors file with one tensor in memory at a time; the library needs all, twice.

    Args:
        tensors: name -> shape and dtype.
        value: name -> the array, of that shape and dtype or as its bytes.
        metadata: the file's; by it transformers knows whose layout the tensors have.
    """
    # As the library: widest dtypes first, so that tensors start at multiples of their element's size; then by name.
    widest_first = list(STORED_DTYPES)
    order = sorted(tensors, key=lambda name: (widest_first.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + stored_bytes(tensors[name])
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = bytes_of(value(name))
            assert content.nbytes == stored_bytes(tensors[name]), name
            file.write(content.data)


def bytes_of(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array as they are stored."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
