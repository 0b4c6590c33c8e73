"""A stack machine that reads pickles and calls nothing.

A pickle is a program for a small stack machine. This machine has no door to Python. It takes the opcodes from the
standard library's `pickletools` and builds numbers, texts, plain containers and descriptions of tensors. A class is
only a name; an object of a class is an `Inert` record of its arguments. Nothing can be executed. A file that requests a
call is refused all the same, by the name of what it requests, since other programs would make that call:

- of Python itself, everything that is not in `_STANDARD` is refused as soon as it is named;
- so are packages that exist to run things (`_EXECUTORS`), and names that lead through a module to what it imported;
- of other packages, classes are inert data, and any other call is refused, except the functions of torch and NumPy that
  put tensors, arrays and random generators together;
- what would make an object call something by itself (`__setstate__` among its attributes) is refused.

Work is bounded by `MAX_PICKLE` bytes of program and `_MAX_STEPS` steps.
"""

import _compat_pickle  # what pickle itself translates names by
import io
import pickletools
import struct
import sys
from collections.abc import Callable
from typing import Any

from conversion.pickle_records import (
    OTHER_TENSORS,
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Global,
    Inert,
    Storage,
    Tensor,
    escaped,
    shown,
)

# A model of a thousand tensors with its optimizer's state takes 100,000 steps and a megabyte.
MAX_PICKLE = 64 << 20
_MAX_STEPS = 1_000_000
_MAX_DIMENSIONS = 32  # NumPy's limit is 64, PyTorch has no tensors of more than a few


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _names(modules: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, names in modules.items() for name in _words(names))


# What pickles of data name of the standard library: types and constants, and the functions of `_SPECIAL_CALLS`.
_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
_STANDARD = _names(
    {
        "_codecs": "encode",
        "_operator": "getitem",
        "argparse": "Namespace",
        "array": "_array_reconstructor array",
        "builtins": "Ellipsis NotImplemented bool bytearray bytes complex dict float frozenset int list object range "
        "set slice str tuple type",
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
        "typing": "Any Callable ClassVar DefaultDict Deque Dict Final FrozenSet Generic Iterable Iterator List Literal "
        "Mapping MutableMapping MutableSequence Optional OrderedDict Sequence Set Tuple Type Union",
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
# Python's own modules, those of earlier versions included.
_PYTHON = sys.stdlib_module_names | _words(
    "__builtin__ asynchat asyncore cgi commands distutils imp lib2to3 nntplib pipes smtpd telnetlib test"
)
# Packages and modules that exist to run, load or install things.
_EXECUTORS = _words(
    "IPython _distutils_hack cloudpickle dill fabric invoke ipykernel joblib multiprocess numpy.distutils numpy.f2py "
    "numpy.testing paramiko pexpect pip pkg_resources plumbum psutil ptyprocess setuptools sh torch._dynamo "
    "torch._inductor torch.hub torch.multiprocessing torch.package torch.utils.bottleneck torch.utils.collect_env "
    "torch.utils.cpp_extension torch.utils.model_zoo"
)
# Names by which modules of any package have such classes of Python at hand.
_EXECUTING_CLASSES = ("CDLL", "Popen", "PyDLL", "Unpickler")
# Attributes that an unpickler calls if an object has them.
_CALLED_ATTRIBUTES = ("__setstate__", "add", "append", "extend")


class Malformed(Exception):
    """A pickle that makes no sense."""


class Refused(Exception):
    """A pickle that requests what is not done; the text names it."""


class Unread(Exception):
    """A pickle of something that is not read here; the text names it."""


_MARK = object()


class Machine:
    """Runs pickles one after the other. `storages` are all that their tensors refer to."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.steps = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        """Returns the value of the pickle at the file's position, which moves to its end."""
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
                        raise Refused(f"uses the opcode {opcode.name}")
                    action(self, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise Malformed(f"its pickle makes no sense ({type(error).__name__}: {escaped(str(error), 100)})") from None
        raise Malformed("its pickle has no end")

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise Malformed(f"its pickle takes more than the {_MAX_STEPS} steps of any model")

    # Containers

    def _pop_mark(self) -> list[Any]:
        """Pops what lies above the topmost mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Malformed("its pickle has no mark where one is needed")
        self._spend(len(self.stack) - at)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _tuple(self, n: int) -> None:
        if len(self.stack) < n:
            raise Malformed("its pickle takes values that are not there")
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
            raise Malformed(f"its pickle adds elements to a {type(target).__name__}")

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict) or len(values) % 2:
            raise Malformed(f"its pickle sets items of a {type(target).__name__}")
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
            raise Malformed("its pickle names a class by what is no name")
        module, _, name = argument.partition(" ")
        # Pickles of protocol 2 and less carry Python 2's names: subprocess.Popen is commands.Popen there.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        found = Global(_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        if not _is_data(found):
            raise Refused(f"requests {found}")
        self.stack.append(found)

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Malformed("its pickle names a class by something that is no text")
        self._global(f"{module} {name}")

    def _new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(self._instance(cls, args))

    def _new_object_ex(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise Malformed("its pickle makes an object of something that is no class")
        self.stack.append(self._instance(cls, (*args, keywords)))

    def _instance(self, cls: Any, args: Any) -> Any:
        """Returns a plain container or an inert record for `cls.__new__(cls, *args)`."""
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise Malformed("its pickle makes an object of something that is no class")
        name = str(cls)
        if name in _SPECIAL_CALLS:
            raise Refused(f"tries to make an object of {name}")
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
        """Returns a record of `function(*args)` where that is data; nothing is called."""
        if not isinstance(function, Global):
            raise Refused(f"tries to call an object ({type(function).__name__})")
        if not isinstance(args, tuple):
            raise Malformed(f"its pickle calls {function} with a {type(args).__name__}")
        name = str(function)
        for table in (_SPECIAL_CALLS, _CONTAINERS, _REBUILDERS):
            if name in table:
                return table[name](self, args)
        # By custom a class begins with a capital; a function that is not known here may be anything.
        if name in _HARMLESS_CALLS or name in OTHER_TENSORS or _is_capital(function.name.rpartition(".")[2]):
            return Inert(function, args)
        raise Refused(f"tries to call {name}")

    def _reconstructed(self, args: tuple[Any, ...]) -> Any:
        """Reads `_reconstructor(cls, base, state)`, `__newobj__(cls, *args)`, `__newobj_ex__(cls, args, keywords)`."""
        return self._instance(args[0] if args else None, args[1:])

    def _type_of(self, args: tuple[Any, ...]) -> Inert:
        """Reads `type(value)`, as the type of None is pickled; with more arguments it makes a class."""
        if len(args) != 1:
            raise Refused("tries to make a class by builtins.type")
        return Inert(Global("builtins", "type"), args)

    def _generic(self, args: tuple[Any, ...]) -> Inert:
        """Reads `getitem(typing.Dict, (str, int))`, as annotations are pickled."""
        if not args or not isinstance(args[0], Global) or args[0].module != "typing":
            raise Refused("tries to call operator.getitem")
        return Inert(Global("operator", "getitem"), args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Global):
            raise Refused(f"tries to change {target} itself")
        # Attributes, and for a class with slots two dictionaries of them.
        for attributes in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            for name in _CALLED_ATTRIBUTES if isinstance(attributes, dict) else ():
                if isinstance(attributes.get(name), Global | Inert):
                    raise Refused(f"tries to have {shown(attributes[name])} called as an object's {name}")
        if isinstance(target, Inert):
            target.state = state
        # Attributes of a dictionary or tensor, such as `_metadata` of a state dict, say nothing about the weights.
        elif not isinstance(target, dict | list | set | Tensor):
            raise Malformed(f"its pickle gives a {type(target).__name__} a state")

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
            raise Malformed("it describes a storage in another way than PyTorch")
        if len(entry) == 6 and entry[5] is not None:
            raise Malformed("it holds views of storages, as PyTorch before 0.4 wrote them")
        cls, key, elements = entry[1], entry[2], entry[4]
        if cls.name == "UntypedStorage":
            dtype = ""
        elif cls.module.partition(".")[0] == "torch" and cls.name in STORAGE_DTYPES:
            dtype = STORAGE_DTYPES[cls.name]
        else:
            raise Unread(f"holds numbers as {cls}")
        storage = Storage(key, dtype, elements)
        if self.storages.setdefault(key, storage) != storage:
            raise Malformed(f"it describes storage {shown(key)} in two ways")
        self.stack.append(storage)

    def _tensor(self, args: tuple[Any, ...], dtype: str = "") -> Tensor:
        if len(args) < 4:
            raise Malformed("it describes a tensor incompletely")
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
            raise Malformed("it describes a tensor that cannot be")
        dtype = dtype or storage.dtype
        if not dtype or (storage.dtype and storage.dtype != dtype):
            raise Malformed("it describes a tensor without a dtype, or with two")
        return Tensor(storage, dtype, offset, shape, strides)

    def _tensor_v3(self, args: tuple[Any, ...]) -> Tensor:
        # (storage, offset, size, stride, requires_grad, hooks, dtype): of dtypes without a storage class of their own.
        dtype = args[6] if len(args) > 6 else None
        if not isinstance(dtype, Global):
            raise Malformed(f"it describes a tensor of type {shown(dtype)}")
        if dtype.module != "torch" or dtype.name not in TORCH_DTYPES:
            raise Unread(f"holds numbers as {dtype}")
        return self._tensor(args, TORCH_DTYPES[dtype.name])

    def _parameter(self, args: tuple[Any, ...]) -> Tensor:
        if not args or not isinstance(args[0], Tensor):
            raise Malformed("it describes a parameter that is no tensor")
        return args[0]

    def _tensor_with_type(self, args: tuple[Any, ...]) -> Any:
        """Reads `_rebuild_from_type_v2(function, type, args, state)`: a tensor with attributes or of another class."""
        function, arguments = args[0] if args else None, args[2] if len(args) > 2 else None
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Malformed("it describes a tensor with attributes incompletely")
        name = str(function)
        if name in OTHER_TENSORS:
            return Inert(function, arguments)
        rebuild = _REBUILDERS.get(name)
        if rebuild is None or rebuild is Machine._tensor_with_type:
            raise Refused(f"tries to call {name}")
        return rebuild(self, arguments)

    def _mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """Reads `OrderedDict(pairs)`, or without arguments."""
        result: dict[Any, Any] = {}
        pairs = args[0] if args and isinstance(args[0], list | tuple | dict) else ()
        self._spend(len(pairs))
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            result[_key(key)] = value
        return result

    def _default_mapping(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """Reads `defaultdict(factory)`; the factory is of no use without calls."""
        return {}

    def _bytes(self, args: tuple[Any, ...]) -> bytes:
        """Reads `_codecs.encode(text, "latin1")`, the bytes of protocol 2."""
        if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
            raise Malformed("its pickle spells bytes in another way than Python")
        # A copy of the text, which may stand in the file once.
        self._spend(len(args[0]) // 16)
        return args[0].encode("latin1")

    def _elements(self, args: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        values = args[0] if args else ()
        if not isinstance(values, list | tuple | set | frozenset):
            raise Malformed(f"its pickle makes a container of a {type(values).__name__}")
        self._spend(len(values))
        return tuple(values)


def _is_data(found: Global) -> bool:
    """Returns whether a pickle of data may name this."""
    name = str(found)
    if found.module.partition(".")[0] in _PYTHON:
        return name in _STANDARD
    if any(f"{name}.".startswith(f"{module}.") for module in _EXECUTORS):
        return False
    # Classes within classes; anything else with dots leads through a module to what it imported: torch.serialization,
    # os.system.
    *outer, last = found.name.split(".")
    return all(map(_is_capital, outer)) and last not in _EXECUTING_CLASSES and (not outer or _is_capital(last))


def _is_capital(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _key(value: Any) -> Any:
    """Returns a dictionary's key; refuses nested tuples and huge integers, whose hashing can be made to cost hours."""
    parts = value if isinstance(value, tuple) and not isinstance(value, Global) else (value,)
    for part in parts:
        known = isinstance(part, str | bytes | float | bool | Global | Inert | Tensor) or part is None
        if not known and not (isinstance(part, int) and abs(part) < 1 << 63):
            raise Malformed(f"its pickle uses a {type(part).__name__} as a key")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


# Opcodes that push their argument, and those that change nothing here.
_PUSHES = _words(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
_IGNORED = _words("PROTO FRAME READONLY_BUFFER")
_ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
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
_CONTAINERS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": Machine._mapping,
    "collections.defaultdict": Machine._default_mapping,
    "builtins.dict": Machine._mapping,
    "builtins.list": lambda machine, args: list(machine._elements(args)),
    "builtins.tuple": Machine._elements,
    "builtins.set": lambda machine, args: {_key(value) for value in machine._elements(args)},
    "builtins.frozenset": lambda machine, args: frozenset(_key(value) for value in machine._elements(args)),
    "torch.Size": Machine._elements,
}
# The containers that have their elements as soon as there is one.
_FILLED_WHEN_MADE = ("builtins.tuple", "builtins.frozenset", "torch.Size")
# Functions of Python that may only be called in one way, and make no objects by NEWOBJ.
_SPECIAL_CALLS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "_codecs.encode": Machine._bytes,
    "_operator.getitem": Machine._generic,
    "builtins.type": Machine._type_of,
    "copyreg.__newobj__": Machine._reconstructed,
    "copyreg.__newobj_ex__": Machine._reconstructed,
    "copyreg._reconstructor": Machine._reconstructed,
    "operator.getitem": Machine._generic,
}
_REBUILDERS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": Machine._tensor,
    "torch._utils._rebuild_tensor_v2": Machine._tensor,
    "torch._utils._rebuild_tensor_v3": Machine._tensor_v3,
    "torch._utils._rebuild_parameter": Machine._parameter,
    "torch._utils._rebuild_parameter_with_state": Machine._parameter,
    "torch._tensor._rebuild_from_type": Machine._tensor_with_type,
    "torch._tensor._rebuild_from_type_v2": Machine._tensor_with_type,
}
