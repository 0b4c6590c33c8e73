"""Files of `torch.save`, read without torch and without executing anything.

A pickle is a program for a small stack machine. Here that machine has no door to Python: the opcodes, which the standard library's
`pickletools` takes apart, build numbers, texts, plain containers and descriptions of tensors; a class is only ever a name, an
instance of one an `Inert` record of what it was to be made of. Nothing could be executed; a file that asks for it is refused all
the same, whole and by the name of what it asks for, since other programs would do it:

- of Python itself, whatever is not in `_STANDARD` is refused as soon as it is named;
- so are packages that exist to run things (`_EXECUTORS`), and names that lead through a module to what it imported;
- of other packages, classes are inert data, and calling anything else is refused, but for the functions of torch and NumPy that
  put tensors, arrays and random generators together;
- what would make an object call something by itself (`__setstate__` among its attributes) is refused.

Work and memory are bounded by the file's real size: `_MAX_PICKLE` bytes of program, `_MAX_STEPS` steps, a tensor must lie
within the bytes that are there, and those that are read together are bounded by `claimed_bytes`.

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
from groupvit_common.errors import CheckpointError, InputError

# A model of a thousand tensors with its optimizer's state takes 100,000 steps and a megabyte.
_MAX_PICKLE = 64 << 20
_MAX_STEPS = 1_000_000
_SHOWN, _SHOWN_ITEMS = 40, 8  # how much of a file's text or list a message shows
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
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
# Types that no weights of this model have: known, so that a file can be passed by that has them, but not read.
_UNREAD_BYTES = {
    **dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint32", "qint32", "complex32"), 4),
    **dict.fromkeys(("uint64", "complex64"), 8),
    "uint16": 2,
    "complex128": 16,
}
# torch's names of dtypes, where a storage has none.
_TORCH_DTYPES = {
    **{name: name for name in (*_STORAGE_DTYPES.values(), *_UNREAD_BYTES)},
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, **_UNREAD_BYTES} | {
    name: np.dtype(name).itemsize for name in ("int64", "int32", "int16", "int8", "uint8", "bool")
}


def _names(modules: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, names in modules.items() for name in names.split())


# What pickles of data name of the standard library. Types and constants, but for the functions of `_SPECIAL_CALLS`.
_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
_STANDARD = _names(
    {
        "_codecs": "encode",
        "_operator": "getitem",
        "argparse": "Namespace",
        "array": "_array_reconstructor array",
        "builtins": "Ellipsis NotImplemented bool bytearray bytes complex dict float frozenset int list object range set slice str "
        "tuple type",
        "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque",
        "copyreg": "__newobj__ __newobj_ex__ _reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "operator": "getitem",
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,  # Python 3.13
        "random": "Random",
        "re": "_compile",
        "time": "struct_time",
        "types": "GenericAlias SimpleNamespace",
        "typing": "Any Callable ClassVar DefaultDict Deque Dict Final FrozenSet Generic Iterable Iterator List Literal Mapping "
        "MutableMapping MutableSequence Optional OrderedDict Sequence Set Tuple Type Union",
        "uuid": "UUID",
    }
)
# Calls that give data which is not looked at here: inert records.
_HARMLESS_CALLS = _STANDARD | _names(
    {
        "numpy": "dtype ndarray",
        **{f"numpy.{core}.multiarray": "_reconstruct scalar" for core in ("core", "_core")},
        **{f"numpy.{core}.numeric": "_frombuffer" for core in ("core", "_core")},
        "numpy.ma.core": "_mareconstruct",
        "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
        "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
        "torch": "device",
        "torch.serialization": "_get_layout",
    }
)
# Tensors of kinds that are not read here.
_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the meta device)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
}
# Python's own modules, those of earlier versions included.
_PYTHON = sys.stdlib_module_names | {
    "__builtin__", "asynchat", "asyncore", "cgi", "commands", "distutils", "imp", "lib2to3", "nntplib", "pipes", "smtpd", "telnetlib",
    "test",
}  # fmt: skip
# Packages and modules that exist to run, load or install what they are told.
_EXECUTORS = (
    "IPython", "_distutils_hack", "cloudpickle", "dill", "fabric", "invoke", "ipykernel", "joblib", "multiprocess", "numpy.distutils",
    "numpy.f2py", "numpy.testing", "paramiko", "pexpect", "pip", "pkg_resources", "plumbum", "psutil", "ptyprocess", "setuptools", "sh",
    "torch._dynamo", "torch._inductor", "torch.hub", "torch.multiprocessing", "torch.package", "torch.utils.bottleneck",
    "torch.utils.collect_env", "torch.utils.cpp_extension", "torch.utils.model_zoo",
)  # fmt: skip
# Names by which modules of any package have such classes of Python at hand.
_EXECUTING_CLASSES = ("CDLL", "Popen", "PyDLL", "Unpickler")
# Attributes that an unpickler calls if an object has them.
_CALLED_ATTRIBUTES = ("__setstate__", "add", "append", "extend")


class Global(NamedTuple):
    """A class, function or constant that a pickle names. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# No generated __repr__: objects may share parts in such a way that printing them would take for ever.
@dataclass(eq=False, repr=False)
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


def other_tensor(value: Any) -> str | None:
    """What kind of tensor this object is that is not read here; None if it is no tensor."""
    return _OTHER_TENSORS.get(str(value.cls)) if isinstance(value, Inert) else None


def shown(value: Any) -> str:
    """A value from a file for a message: short, escaped, and at once, whatever it is made of."""
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
    """A text from a file as a message shows it: on one line, without control characters, cut."""
    return repr(text[:limit])[1:-1] + "..." * (len(text) > limit)


class _Malformed(Exception):
    """A pickle that makes no sense."""


class _Refused(Exception):
    """A pickle that asks for what is not done; the text says what."""


class _Unread(Exception):
    """A pickle of something that is not read here; the text says what."""


# -- a file ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchFile:
    """What a file of `torch.save` holds. `content` is made of plain values, `Inert`, `Global` and `Tensor`."""

    path: Path
    content: Any
    big_endian: bool
    # Storage key -> where its bytes begin in the file and how many there are.
    spans: dict[str, tuple[int, int]]

    def cost(self, tensor: Tensor) -> int:
        """Returns the bytes that reading a tensor takes: those of its values, or those between its first and last in the file."""
        return max(math.prod(tensor.shape), _extent(tensor.shape, tensor.strides)) * _ITEM_BYTES[tensor.dtype]

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor of this file, contiguous, in its stored dtype (bfloat16: that of `ml_dtypes`).

        Raises:
            CheckpointError: the file can no longer be read, or the type is none that is read here.
        """
        if tensor.dtype in _UNREAD_BYTES:
            raise CheckpointError(f"{self.path} holds numbers as {tensor.dtype}, a type that is not read here")
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


def claimed_bytes(path: Path) -> int:
    """Returns how many bytes all the tensors to be read from a file may take together.

    Tensors may share a storage (parts of a fused one, tied weights) and repeat one number (`expand`), so that they take more than the
    file has. Without a bound a small file could ask for any amount of memory and time.
    """
    return 16 * path.stat().st_size + (64 << 20)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of this name, bfloat16 included."""
    if name == "bfloat16":
        # NumPy has no such type; the package that adds it comes with TensorFlow and with JAX.
        try:
            import ml_dtypes
        except ImportError as error:
            raise InputError("bfloat16 takes the package ml_dtypes: pip install ml_dtypes") from error

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
    except _Unread as error:
        raise CheckpointError(f"{path} {error}, a type that is not read here") from None
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
                        f"{path} has compressed or encrypted parts ({shown(info.filename)}), as neither PyTorch nor Keras writes them: "
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
            raise _Malformed(f"its {escaped(name)} is {length} bytes long, more than the {limit} of any model")
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
            raise _Malformed(f"its header says protocol {shown(protocol)}, 1001 is known")
        content = machine.run(programs)
        keys = machine.run(programs)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _Malformed("its list of storages is none")
        position, spans = programs.tell(), {}
        for key in keys:
            storage = machine.storages.get(key)
            if storage is None or not storage.dtype:
                raise _Malformed(f"it holds a storage {shown(key)} of unknown type")
            file.seek(position)
            count, length = int.from_bytes(file.read(8), "little"), storage.elements * _ITEM_BYTES[storage.dtype]
            if count != storage.elements:
                raise _Malformed(f"storage {shown(key)} has {count} elements, expected {storage.elements}")
            spans[key] = position + 8, length
            position += 8 + length
            if position > size:
                raise _Malformed(f"it is truncated within the storage {shown(key)}")
    return TorchFile(path, content, system.get("little_endian") is False, spans)


def _check_tensors(file: TorchFile) -> None:
    """Every tensor within reach must lie within its storage, and every storage be there in full."""
    limit = claimed_bytes(file.path)
    for tensor in tensors_within(file.content):
        storage = tensor.storage
        if storage.key not in file.spans:
            raise _Malformed(f"it lacks the bytes of storage {shown(storage.key)}")
        item = _ITEM_BYTES[tensor.dtype]
        stored = file.spans[storage.key][1]
        if storage.dtype and stored != storage.elements * item:
            raise _Malformed(f"storage {shown(storage.key)} has {stored} bytes, expected {storage.elements * item}")
        if (tensor.offset + _extent(tensor.shape, tensor.strides)) * item > stored:
            raise _Malformed(f"a tensor of shape {list(tensor.shape)} reaches beyond its storage {shown(storage.key)}")
        # A few numbers repeated (`expand`) are no fault; more than anybody has memory for are.
        if math.prod(tensor.shape) * item > max(stored, limit):
            raise _Malformed(
                f"a tensor of shape {list(tensor.shape)} repeats the elements of its storage {shown(storage.key)}"
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
            raise _Malformed(
                f"its pickle makes no sense ({type(error).__name__}: {escaped(str(error), 100)})"
            ) from None
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
        found = Global(_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        if not _is_data(found):
            raise _Refused(f"asks for {found}")
        self.stack.append(found)

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
        if not isinstance(args, tuple):
            raise _Malformed("its pickle makes an object of something that is no class")
        self.stack.append(self._instance(cls, (*args, keywords)))

    def _instance(self, cls: Any, args: Any) -> Any:
        """`cls.__new__(cls, *args)`, which is a plain container or an inert record."""
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise _Malformed("its pickle makes an object of something that is no class")
        name = str(cls)
        if name in _SPECIAL_CALLS:
            raise _Refused(f"tries to make an object of {name}")
        make = _CONTAINERS.get(name)
        if make is None:
            return Inert(cls, args)
        return make(self, args if name in _FILLED_WHEN_MADE else ())

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
        for table in (_SPECIAL_CALLS, _CONTAINERS, _REBUILDERS):
            if name in table:
                return table[name](self, args)
        # By custom a class begins with a capital; a function that is not known here may be anything.
        if name in _HARMLESS_CALLS or name in _OTHER_TENSORS or _is_capital(function.name.rpartition(".")[2]):
            return Inert(function, args)
        raise _Refused(f"tries to call {name}")

    def _reconstructed(self, args: tuple[Any, ...]) -> Any:
        """`_reconstructor(cls, base, state)`, `__newobj__(cls, *args)`, `__newobj_ex__(cls, args, keywords)`."""
        return self._instance(args[0] if args else None, args[1:])

    def _type_of(self, args: tuple[Any, ...]) -> Inert:
        """`type(value)`, as the type of None is pickled; with more arguments it makes a class."""
        if len(args) != 1:
            raise _Refused("tries to make a class by builtins.type")
        return Inert(Global("builtins", "type"), args)

    def _generic(self, args: tuple[Any, ...]) -> Inert:
        """`getitem(typing.Dict, (str, int))`, as annotations are pickled."""
        if not args or not isinstance(args[0], Global) or args[0].module != "typing":
            raise _Refused("tries to call operator.getitem")
        return Inert(Global("operator", "getitem"), args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Global):
            raise _Refused(f"tries to change {target} itself")
        # Attributes, and for a class with slots two dictionaries of them.
        for attributes in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            for name in _CALLED_ATTRIBUTES if isinstance(attributes, dict) else ():
                if isinstance(attributes.get(name), Global | Inert):
                    raise _Refused(f"tries to have {shown(attributes[name])} called as an object's {name}")
        if isinstance(target, Inert):
            target.state = state
        # Attributes of a dictionary or tensor, such as `_metadata` of a state dict, say nothing about the weights.
        elif not isinstance(target, dict | list | set | Tensor):
            raise _Malformed(f"its pickle gives a {type(target).__name__} a state")

    # Tensors

    def _persistent(self) -> None:
        entry = self.stack.pop()
        # A class with its source text, as files before 1.6 have those of modules.
        if isinstance(entry, tuple) and len(entry) == 4 and entry[0] == "module" and isinstance(entry[1], Global):
            self.stack.append(entry[1])
            return
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
            raise _Unread(f"holds numbers as {cls}")
        storage = Storage(key, dtype, elements)
        if self.storages.setdefault(key, storage) != storage:
            raise _Malformed(f"it speaks of storage {shown(key)} in two ways")
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
        if not isinstance(dtype, Global):
            raise _Malformed(f"it describes a tensor of type {shown(dtype)}")
        if dtype.module != "torch" or dtype.name not in _TORCH_DTYPES:
            raise _Unread(f"holds numbers as {dtype}")
        return self._tensor(args, _TORCH_DTYPES[dtype.name])

    def _parameter(self, args: tuple[Any, ...]) -> Tensor:
        if not args or not isinstance(args[0], Tensor):
            raise _Malformed("it describes a parameter that is no tensor")
        return args[0]

    def _tensor_with_type(self, args: tuple[Any, ...]) -> Any:
        """`_rebuild_from_type_v2(function, type, args, state)`: a tensor with attributes, or of a class derived from it."""
        function, arguments = args[0] if args else None, args[2] if len(args) > 2 else None
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise _Malformed("it describes a tensor with attributes incompletely")
        name = str(function)
        if name in _OTHER_TENSORS:
            return Inert(function, arguments)
        rebuild = _REBUILDERS.get(name)
        if rebuild is None or rebuild is _Machine._tensor_with_type:
            raise _Refused(f"tries to call {name}")
        return rebuild(self, arguments)

    def _mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """`OrderedDict(pairs)`, or without arguments."""
        result: dict[Any, Any] = {}
        pairs = args[0] if args and isinstance(args[0], list | tuple | dict) else ()
        self._spend(len(pairs))
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
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


def _is_data(found: Global) -> bool:
    """Whether a pickle of data may name this."""
    name = str(found)
    if found.module.partition(".")[0] in _PYTHON:
        return name in _STANDARD
    if any(f"{name}.".startswith(f"{module}.") for module in _EXECUTORS):
        return False
    # Classes within classes; anything else with dots leads through a module to what it imported: torch.serialization, os.system.
    *outer, last = found.name.split(".")
    return all(map(_is_capital, outer)) and last not in _EXECUTING_CLASSES and (not outer or _is_capital(last))


def _is_capital(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


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
}
# The containers that have their elements as soon as there is one.
_FILLED_WHEN_MADE = ("builtins.tuple", "builtins.frozenset", "torch.Size")
# Functions of Python that may only be called in one way, and make no objects by NEWOBJ.
_SPECIAL_CALLS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "_codecs.encode": _Machine._bytes,
    "_operator.getitem": _Machine._generic,
    "builtins.type": _Machine._type_of,
    "copyreg.__newobj__": _Machine._reconstructed,
    "copyreg.__newobj_ex__": _Machine._reconstructed,
    "copyreg._reconstructor": _Machine._reconstructed,
    "operator.getitem": _Machine._generic,
}
_REBUILDERS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _Machine._tensor,
    "torch._utils._rebuild_tensor_v2": _Machine._tensor,
    "torch._utils._rebuild_tensor_v3": _Machine._tensor_v3,
    "torch._utils._rebuild_parameter": _Machine._parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine._parameter,
    "torch._tensor._rebuild_from_type": _Machine._tensor_with_type,
    "torch._tensor._rebuild_from_type_v2": _Machine._tensor_with_type,
}
