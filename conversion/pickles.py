"""Files of `torch.save`, read without torch and without executing anything.

A pickle is a program for a small stack machine. Here that machine has no door to Python: the opcodes, which the standard library's
`pickletools` takes apart, build numbers, texts, plain containers and descriptions of tensors; a class is only ever a name, an
instance of one an `Inert` record of what it was to be made of. What is to be called and is no class, or is one of Python's own
that could do something, makes the whole file refused.

Work and memory are bounded by the file's real size: `_MAX_PICKLE` bytes of program, `_MAX_STEPS` steps, and a tensor must lie
within the bytes that are there.

The two formats (https://pytorch.org/docs/stable/notes/serialization.html): since 1.6 a zip archive with `NAME/data.pkl` and each
storage's bytes in `NAME/data/KEY`, uncompressed; before, five pickles in a row (magic number, protocol, system, object, keys of the
storages), then for each storage the number of its elements as a 64-bit integer and its bytes.
"""

import _compat_pickle  # what pickle itself translates names by
import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.magic import container
from groupvit_common.errors import CheckpointError

# A model of a thousand tensors with its optimizer's state takes 100,000 steps and a megabyte.
_MAX_PICKLE = 64 << 20
_MAX_STEPS = 1_000_000
_MAX_DIMENSIONS = 32  # NumPy's limit is 64, PyTorch has no tensors of more than a few

_STORAGE_DTYPES = {
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
}
# torch's names of dtypes, where a storage has none.
_TORCH_DTYPES = {
    **{name: name for name in _STORAGE_DTYPES.values()},
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2} | {
    name: np.dtype(name).itemsize for name in ("int64", "int32", "int16", "int8", "uint8", "bool")
}

# Python's own classes that are data and nothing else: instances become inert records like those of foreign classes.
_HARMLESS = frozenset(
    {
        "argparse.Namespace",
        "collections.Counter",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "decimal.Decimal",
        "fractions.Fraction",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "types.SimpleNamespace",
        "uuid.UUID",
        # How numbers and arrays of NumPy are pickled; neither is looked at here.
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.device",
    }
)


class Global(NamedTuple):
    """A class, function or constant that a pickle names. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """An object of a class that is not loaded: what it was to be made of."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


class Storage(NamedTuple):
    """A run of numbers: its key in the file, dtype (NumPy's name; "" where the tensor says it) and number of elements."""

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


class _Malformed(Exception):
    """A pickle that makes no sense."""


class _Refused(Exception):
    """A pickle that asks for what is not done; the text says what."""


# -- a file ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchFile:
    """What a file of `torch.save` holds. `content` is made of plain values, `Inert`, `Global` and `Tensor`."""

    path: Path
    content: Any
    big_endian: bool
    # Storage key -> where its bytes begin in the file and how many there are.
    spans: dict[str, tuple[int, int]]

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor of this file, contiguous, in its stored dtype (bfloat16: that of `ml_dtypes`).

        Raises:
            CheckpointError: the file can no longer be read.
        """
        item = _ITEM_BYTES[tensor.dtype]
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


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of this name, bfloat16 included."""
    if name == "bfloat16":
        # NumPy has no such type; the package that adds it comes with TensorFlow and with JAX.
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def read_torch_file(path: Path) -> TorchFile:
    """Reads what `torch.save` wrote into `path`, but for the tensors' values.

    Raises:
        CheckpointError: the file cannot be read, is something else, is damaged, or its pickle asks for a call.
    """
    kind = container(path)
    if kind not in ("zip", "torch-legacy"):
        meaning = {"hdf5": "an HDF5 file", "safetensors": "a safetensors file"}[kind]
        raise CheckpointError(f"{path} is {meaning}, not one of torch.save")
    try:
        file = _read_zip(path) if kind == "zip" else _read_legacy(path)
        _check_tensors(file)
        return file
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(
            f"{path} is refused: its pickle {error}, which weights have no need of. Nothing of it was executed; "
            "do not load this file elsewhere unless you trust where it is from"
        ) from None
    except _Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; download or copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def zip_members(path: Path) -> dict[str, tuple[int, int]]:
    """The members of an uncompressed zip archive: name -> where its bytes begin in the file and how many there are.

    Raises:
        CheckpointError: the archive is damaged, compressed, encrypted, or speaks of more bytes than are there.
    """
    damaged = f"{path} is truncated or a damaged zip archive; download or copy it again"
    members: dict[str, tuple[int, int]] = {}
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise CheckpointError(
                        f"{path} has compressed or encrypted parts ({info.filename!r}), as neither PyTorch nor Keras writes them: "
                        "repack it as a zip archive without compression"
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
        # Seeking before the beginning, where the directory says nonsense, is an error of the system.
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
            raise _Malformed(f"its {name} is {length} bytes long, more than the {limit} of any model")
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(length)

    order = member(f"{root}byteorder", 16) if f"{root}byteorder" in members else b"little"
    if order not in (b"little", b"big"):
        raise _Malformed(f"it says {order!r} of the order of bytes")
    content = _Machine().run(io.BytesIO(member(programs[0], _MAX_PICKLE)))
    prefix = f"{root}data/"
    spans = {name.removeprefix(prefix): span for name, span in members.items() if name.startswith(prefix)}
    return TorchFile(path, content, order == b"big", spans)


def _read_legacy(path: Path) -> TorchFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        programs = io.BytesIO(file.read(_MAX_PICKLE))
        machine = _Machine()
        _magic, protocol, system = (machine.run(programs) for _ in range(3))
        if protocol != 1001 or not isinstance(system, dict):
            raise _Malformed(f"its header says protocol {protocol!r}, 1001 is known")
        content = machine.run(programs)
        keys = machine.run(programs)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _Malformed("its list of storages is none")
        position, spans = programs.tell(), {}
        for key in keys:
            storage = machine.storages.get(key)
            if storage is None or not storage.dtype:
                raise _Malformed(f"it holds a storage {key[:200]!r} of unknown type")
            file.seek(position)
            count, length = int.from_bytes(file.read(8), "little"), storage.elements * _ITEM_BYTES[storage.dtype]
            if count != storage.elements:
                raise _Malformed(f"storage {key!r} has {count} elements, expected {storage.elements}")
            spans[key] = position + 8, length
            position += 8 + length
            if position > size:
                raise _Malformed(f"it is truncated within the storage {key!r}")
    return TorchFile(path, content, system.get("little_endian") is False, spans)


def _check_tensors(file: TorchFile) -> None:
    """Every tensor within reach must lie within its storage, and every storage be there in full."""
    for tensor in tensors_within(file.content):
        storage = tensor.storage
        if storage.key not in file.spans:
            raise _Malformed(f"it lacks the bytes of storage {storage.key!r}")
        item = _ITEM_BYTES[tensor.dtype]
        stored = file.spans[storage.key][1]
        if storage.dtype and stored != storage.elements * item:
            raise _Malformed(f"storage {storage.key!r} has {stored} bytes, expected {storage.elements * item}")
        if (tensor.offset + _extent(tensor.shape, tensor.strides)) * item > stored:
            raise _Malformed(f"a tensor of shape {list(tensor.shape)} reaches beyond its storage {storage.key!r}")
        if math.prod(tensor.shape) * item > stored:
            raise _Malformed(
                f"a tensor of shape {list(tensor.shape)} repeats the elements of its storage {storage.key!r}"
            )


def tensors_within(content: Any) -> Iterable[Tensor]:
    """All tensors that are reachable from a pickle's content, each once."""
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
    """How many elements a view spans, from its first to its last."""
    if not all(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


# -- the machine ----------------------------------------------------------------------------------------------------------

_MARK = object()


class _Machine:
    """Runs pickles one after the other; `storages` are all that their tensors speak of."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.steps = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        """The value of the pickle at the file's position, which is left behind it."""
        self.stack, self.memo = [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self._spend(1)
                if opcode.name == "STOP":
                    return self.stack.pop()
                if opcode.name in _PUSHES:
                    self.stack.append(argument)
                elif opcode.name not in _IGNORED:
                    action = _ACTIONS.get(opcode.name)
                    if action is None:
                        raise _Refused(f"uses the opcode {opcode.name}")
                    action(self, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise _Malformed(f"its pickle makes no sense ({type(error).__name__}: {str(error)[:100]})") from None
        raise _Malformed("its pickle has no end")

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise _Malformed(f"its pickle takes more than the {_MAX_STEPS} steps of any model")

    # Containers

    def _pop_mark(self) -> list[Any]:
        """Takes what lies above the topmost mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _Malformed("its pickle has no mark where one is needed")
        self._spend(len(self.stack) - at)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _tuple(self, n: int) -> None:
        if len(self.stack) < n:
            raise _Malformed("its pickle takes values that are not there")
        values = tuple(self.stack[len(self.stack) - n :])
        del self.stack[len(self.stack) - n :]
        self.stack.append(values)

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.elements
        if isinstance(target, set):
            target.update(_key(value) for value in values)
        elif isinstance(target, list):
            target += values
        else:
            raise _Malformed(f"its pickle adds elements to a {type(target).__name__}")

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict) or len(values) % 2:
            raise _Malformed(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _dict(self) -> None:
        values = self._pop_mark()
        self.stack.append({})
        self._set_items(values)

    def _append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _push_set(self, values: list[Any]) -> None:
        self.stack.append(frozenset(_key(value) for value in values))

    # Names and objects

    def _global(self, argument: str) -> None:
        # Names are shown to the user.
        if len(argument) > 200 or not argument.isprintable():
            raise _Malformed("its pickle names a class by what is no name")
        module, _, name = argument.partition(" ")
        # Pickles of protocol 2 and less carry Python 2's names: subprocess.Popen is commands.Popen there.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        self.stack.append(Global(_compat_pickle.IMPORT_MAPPING.get(module, module), name))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Malformed("its pickle names a class by something that is no text")
        self._global(f"{module} {name}")

    def _new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(self._instance(cls, args))

    def _new_object_ex(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self._instance(cls, (*args, keywords)))

    def _instance(self, cls: Any, args: Any) -> Any:
        """`cls.__new__(cls, *args)`, which is a plain container or an inert record."""
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise _Malformed("its pickle makes an object of something that is no class")
        make = _CONTAINERS.get(str(cls))
        return make(self, ()) if make is not None else Inert(cls, args)

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, args))

    def _object(self) -> None:
        function, *args = self._pop_mark()
        self.stack.append(self._call(function, tuple(args)))

    def _inst(self, argument: str) -> None:
        args = tuple(self._pop_mark())
        self._global(argument)
        self.stack.append(self._call(self.stack.pop(), args))

    def _call(self, function: Any, args: Any) -> Any:
        """`function(*args)` where that is data; nothing is called."""
        if not isinstance(function, Global):
            raise _Refused(f"tries to call an object ({type(function).__name__})")
        if not isinstance(args, tuple):
            raise _Malformed(f"its pickle calls {function} with a {type(args).__name__}")
        name = str(function)
        if name in ("copyreg._reconstructor", "copyreg.__newobj__") and args:
            return self._instance(args[0], args[1:])
        for table in (_CONTAINERS, _REBUILDERS):
            if name in table:
                return table[name](self, args)
        ours = function.module.partition(".")[0] in sys.stdlib_module_names
        # By custom a class begins with a capital; a function that is not known here may be anything.
        is_class = function.name.rpartition(".")[2][:1].isupper()
        if name in _HARMLESS or (is_class and not ours):
            return Inert(function, args)
        raise _Refused(f"tries to call {name}")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        # Attributes of a dictionary or tensor, such as `_metadata` of a state dict, say nothing about the weights.
        elif not isinstance(target, dict | list | set | Tensor):
            raise _Malformed(f"its pickle gives a {type(target).__name__} a state")

    # Tensors

    def _persistent(self) -> None:
        entry = self.stack.pop()
        if (
            not isinstance(entry, tuple)
            or len(entry) not in (5, 6)
            or entry[0] != "storage"
            or not isinstance(entry[1], Global)
            or not isinstance(entry[2], str)
            or len(entry[2]) > 200
            or not _is_size(entry[4])
        ):
            raise _Malformed("it speaks of a storage in another way than PyTorch")
        if len(entry) == 6 and entry[5] is not None:
            raise _Malformed("it holds views of storages, as PyTorch before 0.4 wrote them")
        cls, key, elements = entry[1], entry[2], entry[4]
        if cls.name == "UntypedStorage":
            dtype = ""
        elif cls.module.partition(".")[0] == "torch" and cls.name in _STORAGE_DTYPES:
            dtype = _STORAGE_DTYPES[cls.name]
        else:
            raise _Malformed(f"it holds numbers of a type that is not known here ({cls})")
        storage = Storage(key, dtype, elements)
        if self.storages.setdefault(key, storage) != storage:
            raise _Malformed(f"it speaks of storage {key!r} in two ways")
        self.stack.append(storage)

    def _tensor(self, args: tuple[Any, ...], dtype: str = "") -> Tensor:
        if len(args) < 4:
            raise _Malformed("it describes a tensor incompletely")
        storage, offset, shape, strides = args[:4]
        if (
            not isinstance(storage, Storage)
            or not _is_size(offset)
            or not isinstance(shape, tuple)
            or not isinstance(strides, tuple)
            or len(shape) != len(strides)
            or len(shape) > _MAX_DIMENSIONS
            or not all(map(_is_size, (*shape, *strides)))
        ):
            raise _Malformed("it describes a tensor that cannot be")
        dtype = dtype or storage.dtype
        if not dtype or (storage.dtype and storage.dtype != dtype):
            raise _Malformed("it describes a tensor without a dtype, or with two")
        return Tensor(storage, dtype, offset, shape, strides)

    def _tensor_v3(self, args: tuple[Any, ...]) -> Tensor:
        # (storage, offset, size, stride, requires_grad, hooks, dtype): of dtypes without a storage class of their own.
        dtype = args[6] if len(args) > 6 else None
        if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in _TORCH_DTYPES:
            raise _Malformed(f"it holds numbers of a type that is not known here ({dtype})")
        return self._tensor(args, _TORCH_DTYPES[dtype.name])

    def _parameter(self, args: tuple[Any, ...]) -> Tensor:
        if not args or not isinstance(args[0], Tensor):
            raise _Malformed("it describes a parameter that is no tensor")
        return args[0]

    def _mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """`OrderedDict(pairs)`, or without arguments."""
        result: dict[Any, Any] = {}
        pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
        self._spend(len(pairs))
        for key, value in pairs:
            result[_key(key)] = value
        return result

    def _default_mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """`defaultdict(factory)`: the factory is of no use without calls."""
        return {}

    def _bytes(self, args: tuple[Any, ...]) -> bytes:
        """`_codecs.encode(text, "latin1")`, which is how protocol 2 spells bytes."""
        if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
            raise _Malformed("its pickle spells bytes in another way than Python")
        # A copy of the text, which may stand in the file once.
        self._spend(len(args[0]) // 16)
        return args[0].encode("latin1")

    def _elements(self, args: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        values = args[0] if args else ()
        if not isinstance(values, list | tuple | set | frozenset):
            raise _Malformed(f"its pickle makes a container of a {type(values).__name__}")
        self._spend(len(values))
        return tuple(values)


def _key(value: Any) -> Any:
    """A dictionary's key. Nested tuples and huge integers are not taken: they can be made to cost hours of hashing."""
    parts = value if isinstance(value, tuple) and not isinstance(value, Global) else (value,)
    for part in parts:
        known = isinstance(part, str | bytes | float | bool | Global | Inert | Tensor) or part is None
        if not known and not (isinstance(part, int) and abs(part) < 1 << 63):
            raise _Malformed(f"its pickle uses a {type(part).__name__} as a key")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


# Opcodes that push their argument, and those that change nothing here.
_PUSHES = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_IGNORED = frozenset(("PROTO", "FRAME", "READONLY_BUFFER"))
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine._pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(set()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine._pop_mark())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine._pop_mark()),
    "DICT": lambda machine, _: machine._dict(),
    "FROZENSET": lambda machine, _: machine._push_set(machine._pop_mark()),
    "APPEND": lambda machine, _: machine._append(),
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "ADDITEMS": lambda machine, _: machine._extend(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._set_item(),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_mark()),
    **{
        name: lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1])
        for name in ("PUT", "BINPUT", "LONG_BINPUT")
    },
    **{
        name: lambda machine, index: machine.stack.append(machine.memo[index])
        for name in ("GET", "BINGET", "LONG_BINGET")
    },
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "GLOBAL": lambda machine, argument: machine._global(argument),
    "STACK_GLOBAL": lambda machine, _: machine._stack_global(),
    "NEWOBJ": lambda machine, _: machine._new_object(),
    "NEWOBJ_EX": lambda machine, _: machine._new_object_ex(),
    "REDUCE": lambda machine, _: machine._reduce(),
    "OBJ": lambda machine, _: machine._object(),
    "INST": lambda machine, argument: machine._inst(argument),
    "BUILD": lambda machine, _: machine._build(),
    "BINPERSID": lambda machine, _: machine._persistent(),
}
_CONTAINERS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _Machine._mapping,
    "collections.defaultdict": _Machine._default_mapping,
    "builtins.dict": _Machine._mapping,
    "builtins.list": lambda machine, args: list(machine._elements(args)),
    "builtins.tuple": _Machine._elements,
    "builtins.set": lambda machine, args: {_key(value) for value in machine._elements(args)},
    "builtins.frozenset": lambda machine, args: frozenset(_key(value) for value in machine._elements(args)),
    "torch.Size": _Machine._elements,
    "_codecs.encode": _Machine._bytes,
}
_REBUILDERS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _Machine._tensor,
    "torch._utils._rebuild_tensor_v2": _Machine._tensor,
    "torch._utils._rebuild_tensor_v3": _Machine._tensor_v3,
    "torch._utils._rebuild_parameter": _Machine._parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine._parameter,
}
