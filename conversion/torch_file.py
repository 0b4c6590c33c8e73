"""Files of `torch.save`, read without torch and without executing anything (see `conversion.pickle_machine`).

Memory is bounded by the file's real size: a tensor must lie within the bytes of the file, and `claimed_bytes` bounds
those that are read together.

There are two formats (https://pytorch.org/docs/stable/notes/serialization.html). Since PyTorch 1.6 it is a zip archive
with `NAME/data.pkl` and each storage's bytes in `NAME/data/KEY`, uncompressed. Before, it is five pickles in a row
(magic number, protocol, system, object, keys of the storages), then for each storage the number of its elements as a
64-bit integer and its bytes.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.magic import container
from conversion.pickle_machine import MAX_PICKLE, Machine, Malformed, Refused, Unread
from conversion.pickle_records import ITEM_BYTES, UNREAD_BYTES, Inert, Tensor, escaped, shown
from groupvit_common.checkpoints.dtypes import numpy_dtype
from groupvit_common.errors import CheckpointError


@dataclass(frozen=True)
class TorchFile:
    """A file of `torch.save`. `content` is made of plain values, `Inert`, `Global` and `Tensor`."""

    path: Path
    content: Any
    big_endian: bool
    # Storage key -> offset and number of its bytes in the file.
    spans: dict[str, tuple[int, int]]

    def cost(self, tensor: Tensor) -> int:
        """Returns the bytes that reading a tensor takes: its values, or the range in the file that they span."""
        return max(math.prod(tensor.shape), _extent(tensor.shape, tensor.strides)) * ITEM_BYTES[tensor.dtype]

    def read(self, tensor: Tensor) -> np.ndarray:
        """Returns the values of a tensor, contiguous, in its stored dtype (bfloat16: that of `ml_dtypes`).

        Raises:
            CheckpointError: the file can no longer be read, or its dtype is not supported.
        """
        if tensor.dtype in UNREAD_BYTES:
            raise CheckpointError(f"{self.path} holds numbers as {tensor.dtype}, a type that is not read here")
        item = ITEM_BYTES[tensor.dtype]
        begin = self.spans[tensor.storage.key][0] + tensor.offset * item
        extent = _extent(tensor.shape, tensor.strides)
        raw = np.empty(extent, f"u{item}")
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                # An array without elements has no buffer to fill.
                if extent and file.readinto(raw.view(np.uint8).data) != raw.nbytes:
                    raise CheckpointError(f"{self.path} is truncated; download or copy it again")
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if self.big_endian:
            raw.byteswap(inplace=True)
        # The tensor was checked against its storage: every element lies within `raw`.
        strided = np.lib.stride_tricks.as_strided(raw, tensor.shape, [stride * item for stride in tensor.strides])
        return np.ascontiguousarray(strided).reshape(tensor.shape).view(numpy_dtype(tensor.dtype))


def claimed_bytes(path: Path) -> int:
    """Returns the number of bytes that all tensors of a file may take together.

    Tensors may share a storage (parts of a fused one, tied weights) and repeat one number (`expand`), so they may take
    more than the file has. Without a bound a small file could request any amount of memory and time.
    """
    return 16 * path.stat().st_size + (64 << 20)


def read_torch_file(path: Path) -> TorchFile:
    """Reads what `torch.save` wrote into `path`, except the tensors' values.

    Raises:
        CheckpointError: the file cannot be read, is something else, is damaged, or its pickle requests a call.
    """
    kind = container(path)
    if kind not in ("zip", "torch-legacy"):
        meaning = "an HDF5 file" if kind == "hdf5" else f"a {kind} file"
        raise CheckpointError(f"{path} is {meaning}, not one of torch.save")
    try:
        file = _read_zip(path) if kind == "zip" else _read_legacy(path)
        _check_tensors(file)
        return file
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(
            f"{path} is refused: its pickle {error}, which weights do not need. Nothing of it was executed; "
            "do not load this file elsewhere unless you trust where it is from"
        ) from None
    except Unread as error:
        raise CheckpointError(f"{path} {error}, a type that is not read here") from None
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; download or copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def zip_members(path: Path) -> dict[str, tuple[int, int]]:
    """Returns the members of an uncompressed zip archive: name -> offset and number of its bytes in the file.

    Raises:
        CheckpointError: the archive is damaged, compressed, encrypted, or claims more bytes than the file has.
    """
    damaged = f"{path} is truncated or a damaged zip archive; download or copy it again"
    members: dict[str, tuple[int, int]] = {}
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise CheckpointError(
                        f"{path} has compressed or encrypted parts ({shown(info.filename)}), as neither PyTorch nor "
                        "Keras writes them: repack it as a zip archive without compression"
                    )
                # The bytes follow a header of fixed length, the name and the extra field: PKWARE's APPNOTE, 4.3.7.
                file.seek(info.header_offset)
                header = file.read(30)
                if len(header) < 30 or header[:4] != b"PK\x03\x04":
                    raise CheckpointError(damaged)
                begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
                if begin + info.file_size > size:
                    raise CheckpointError(damaged)
                members[info.filename] = begin, info.file_size
    except CheckpointError:
        raise
    # A mutated directory makes the standard library's reader fail in many ways.
    except (zipfile.BadZipFile, ValueError, OverflowError, struct.error, EOFError, RuntimeError, IndexError) as error:
        raise CheckpointError(damaged) from error
    except OSError as error:
        # Seeking before the beginning, where the directory is damaged, is an error of the system.
        raise CheckpointError(damaged if error.errno == 22 else f"{path} cannot be read: {error}") from error
    return members


def _read_zip(path: Path) -> TorchFile:
    members = zip_members(path)
    programs = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        what = "a TorchScript program" if any(name.endswith("/constants.pkl") for name in members) else "a zip archive"
        raise CheckpointError(f"{path} is {what}, not a file of torch.save: it has {len(programs)} members data.pkl")
    root = programs[0].removesuffix("data.pkl")

    def member(name: str, limit: int) -> bytes:
        begin, length = members[name]
        if length > limit:
            raise Malformed(f"its {escaped(name)} is {length} bytes long, more than the {limit} of any model")
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(length)

    order = member(f"{root}byteorder", 16) if f"{root}byteorder" in members else b"little"
    if order not in (b"little", b"big"):
        raise Malformed(f"its byte order is {order!r}")
    content = Machine().run(io.BytesIO(member(programs[0], MAX_PICKLE)))
    prefix = f"{root}data/"
    spans = {name.removeprefix(prefix): span for name, span in members.items() if name.startswith(prefix)}
    return TorchFile(path, content, order == b"big", spans)


def _read_legacy(path: Path) -> TorchFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        programs = io.BytesIO(file.read(MAX_PICKLE))
        machine = Machine()
        _magic, protocol, system = (machine.run(programs) for _ in range(3))
        if protocol != 1001 or not isinstance(system, dict):
            raise Malformed(f"its header has protocol {shown(protocol)}, 1001 is known")
        content = machine.run(programs)
        keys = machine.run(programs)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Malformed("its list of storages is none")
        position, spans = programs.tell(), {}
        for key in keys:
            storage = machine.storages.get(key)
            if storage is None or not storage.dtype:
                raise Malformed(f"it holds a storage {shown(key)} of unknown type")
            file.seek(position)
            count, length = int.from_bytes(file.read(8), "little"), storage.elements * ITEM_BYTES[storage.dtype]
            if count != storage.elements:
                raise Malformed(f"storage {shown(key)} has {count} elements, expected {storage.elements}")
            spans[key] = position + 8, length
            position += 8 + length
            if position > size:
                raise Malformed(f"it is truncated within the storage {shown(key)}")
    return TorchFile(path, content, system.get("little_endian") is False, spans)


def _check_tensors(file: TorchFile) -> None:
    """Refuses tensors that reach beyond their storage, and storages that are not in the file in full."""
    limit = claimed_bytes(file.path)
    for tensor in tensors_within(file.content):
        storage = tensor.storage
        if storage.key not in file.spans:
            raise Malformed(f"it lacks the bytes of storage {shown(storage.key)}")
        item = ITEM_BYTES[tensor.dtype]
        stored = file.spans[storage.key][1]
        if storage.dtype and stored != storage.elements * item:
            raise Malformed(f"storage {shown(storage.key)} has {stored} bytes, expected {storage.elements * item}")
        if (tensor.offset + _extent(tensor.shape, tensor.strides)) * item > stored:
            raise Malformed(f"a tensor of shape {list(tensor.shape)} reaches beyond its storage {shown(storage.key)}")
        # A few numbers repeated (`expand`) are no fault; more than anybody has memory for are.
        if math.prod(tensor.shape) * item > max(stored, limit):
            raise Malformed(
                f"a tensor of shape {list(tensor.shape)} repeats the elements of its storage {shown(storage.key)}"
            )


def tensors_within(content: Any) -> Iterator[Tensor]:
    """Yields all tensors that are reachable from a pickle's content, each once."""
    seen, stack = set(), [content]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        elif isinstance(value, Inert):
            stack += (value.args, value.state, value.items, value.elements)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of elements that a view spans, from its first to its last."""
    if not all(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
