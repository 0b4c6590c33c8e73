"""Files of torch.save are read as torch reads them, and nothing in them is ever executed."""

import argparse
import array
import collections
import contextlib
import importlib
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import types
import typing
import uuid
import zipfile
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion.pickle_records import Global, Inert, Tensor
from conversion.source import open_source
from conversion.torch_file import TorchFile, read_torch_file, tensors_within
from conversion.torch_writer import _tensor
from groupvit_common.errors import CheckpointError
from tests.support.paths import REFERENCE

torch = pytest.importorskip("torch")

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Foreign:
    """A class that no reader of a checkpoint has."""


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def save_program(path: Path, program: bytes, zipped: bool = True, header: tuple[Any, ...] = ()) -> Path:
    """A file whose pickle is `program`."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    else:
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + program + pickle.dumps([], 2))
    return path


# -- what torch wrote --------------------------------------------------------------------------------------------------


@FORMATS
def test_tensors_and_containers_come_back(tmp_path: Path, zipped: bool) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": x,
        "transposed": x.t(),
        "view": x[1:3, 2::2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(x.double()),
        "bool": x > 3,
        **{
            str(dtype).removeprefix("torch."): x.to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
        },
    }
    plain = [1, -(2**40), 2.5, None, True, "é", b"\0\xff", (1,), (1, (2, 3)), {"a": [1], 2: ()}, {1, 2}, frozenset("a")]
    content = {"tensors": collections.OrderedDict(tensors), "plain": plain, "size": x.shape}
    file = read_torch_file(save(tmp_path / "x.pt", content, zipped))
    assert file.content["plain"] == plain
    assert file.content["size"] == (4, 6)
    assert list(file.content["tensors"]) == list(tensors)
    for name, expected in tensors.items():
        record = file.content["tensors"][name]
        assert record.dtype == str(expected.dtype).removeprefix("torch.")
        array = file.read(record)
        assert array.dtype.name == record.dtype
        assert array.flags.c_contiguous
        assert array.shape == record.shape == tuple(expected.shape)
        np.testing.assert_array_equal(array.astype(np.float64), expected.detach().double().numpy())


@FORMATS
def test_other_classes_are_inert(tmp_path: Path, zipped: bool) -> None:
    odd = Foreign()
    odd.width = 7
    content = {"odd": odd, "class": Foreign, "when": datetime(2022, 3, 1), "numpy": np.float64(0.5), "x": torch.ones(2)}
    file = read_torch_file(save(tmp_path / "x.pt", content, zipped))
    found = file.content["odd"]
    assert isinstance(found, Inert)
    assert found.cls == Global(Foreign.__module__, "Foreign") == file.content["class"]
    assert found.state == {"width": 7}
    assert file.content["when"].cls == Global("datetime", "datetime")
    assert isinstance(file.content["numpy"], Inert)
    assert file.read(file.content["x"]).tolist() == [1.0, 1.0]


@FORMATS
def test_harmless_things_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    """Extras of training programs do not change how a file is read."""
    tensor = torch.ones(2)
    tensor.note = "a Python attribute"
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "too"
    beside = {
        "generators": [
            np.random.default_rng(0),
            np.random.RandomState(1),
            np.random.get_state(),
            torch.get_rng_state(),
        ],
        "random": random.Random(2),
        "annotations": [dict[str, int], typing.Dict[str, typing.List[int]], typing.Optional[int], type(None), int],  # noqa: UP006, UP045
        "arrays": [np.arange(3), np.ma.array([1]), np.zeros(1, [("a", "f4")]), np.bool_(True), array.array("d", [1.0])],
        "times": [datetime.now(UTC), timedelta(1), time.localtime()],
        "numbers": [Decimal(1), Fraction(1, 2), 1j, range(3), slice(1), uuid.uuid4(), b"", bytearray(b"x")],
        "namespaces": [argparse.Namespace(a=1), types.SimpleNamespace(a=1), Path("x"), re.compile("x")],
        "containers": [collections.Counter("a"), collections.deque([1]), collections.defaultdict(list, a=[1])],
        "torch": [torch.float8_e4m3fn, torch.device("cpu"), torch.strided, torch.Size([1])],
        "not read here": [
            torch.ones(2).to(torch.float8_e5m2),
            torch.ones(2, dtype=torch.complex64),
            torch.ones(2, dtype=torch.uint16),
            torch.eye(2).to_sparse(),
        ],
    }
    if not zipped:
        # The older format has no place for storages without a type.
        beside["not read here"] = beside["not read here"][1:2]
    content = {"model": {"a": tensor, "b": parameter}, **beside}
    path = save(tmp_path / "x.pt", content, zipped)
    source = open_source(path)
    assert {name: source.value(name).tolist() for name in source.tensors} == {"a": [1, 1], "b": [1, 1, 1]}
    assert source.others == tuple(beside)
    # Other protocols spell some of them in other ways.
    for protocol in range(2, 6):
        plain = {name: value for name, value in beside.items() if name not in ("not read here", "generators")}
        plain["generators"] = beside["generators"][:3]
        program = io.BytesIO(pickle.dumps(plain, protocol))
        read = read_torch_file(save_program(tmp_path / "y.pt", program.getvalue())).content
        assert list(read) == list(plain)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.nn.Linear(2, 2), r"holds an object of torch\.nn\.modules\.linear\.Linear, not a state dict"),
        ([torch.ones(1)], "holds .*, not a state dict"),
        ({1: torch.ones(1)}, "holds a dictionary with other keys than names, not a state dict"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.pt {says}"):
        open_source(save(tmp_path / "x.pt", content))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(2).to(torch.float8_e4m3fn), "holds logit_scale as float8_e4m3fn, a type that is not read here"),
        (torch.ones(2, dtype=torch.complex64), "holds logit_scale as complex64, a type that is not read here"),
        (torch.eye(2).to_sparse(), "holds logit_scale as a sparse tensor, a type that is not read here"),
        (torch.ones(1, device="meta"), r"holds logit_scale as a tensor without values \(of the meta device\), a type"),
        (Foreign(), r"'logit_scale' is an object of \S+\.Foreign, not a tensor"),
        (torch.nn.functional.relu, "'logit_scale' is torch.nn.functional.relu, not a tensor"),
    ],
)
def test_weights_that_are_not_read(tmp_path: Path, tensor: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.pt .*{says}"):
        open_source(save(tmp_path / "x.pt", {"ok": torch.ones(1), "logit_scale": tensor}))


def test_numbers_of_a_big_endian_machine(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x": torch.arange(3.0)})
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            archive.writestr(name, data)
    file = read_torch_file(path)
    assert file.read(file.content["x"]).tolist() == [0.0, 1.0, 2.0]


def test_the_authors_file_needs_nobodys_classes() -> None:
    """Neither torch nor OmegaConf is imported to read it, nor anything that the pickle names."""
    path = REFERENCE / "nvlabs" / "nv_three_stage" / "checkpoint.pth"
    code = f"""
import sys
from pathlib import Path
from conversion.torch_file import read_torch_file, tensors_within
file = read_torch_file(Path({str(path)!r}))
assert str(file.content["config"].cls) == "omegaconf.dictconfig.DictConfig"
assert sum(file.read(tensor).size for tensor in tensors_within(file.content)) > 100_000
assert not {{"torch", "omegaconf", "tensorflow", "keras"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REFERENCE.parents[1])


# -- what attackers write ----------------------------------------------------------------------------------------------


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@FORMATS
@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        (os.system, ("touch hacked",), f"requests {os.name}.system"),
        (eval, ("open('hacked', 'w')",), "requests builtins.eval"),
        (exec, ("open('hacked', 'w')",), "requests builtins.exec"),
        (open, ("hacked", "w"), r"requests _?io\.open"),
        (subprocess.Popen, (("touch", "hacked"),), "requests subprocess.Popen"),
        (getattr, ("x", "upper"), "requests builtins.getattr"),
        (pickle.loads, (b"N.",), "requests _?pickle.loads"),
        (torch.load, ("hacked",), "tries to call torch.serialization.load"),
        (torch.hub.load, ("hacked", "x"), "requests torch.hub.load"),
        (Path.touch, (Path("hacked"),), "requests builtins.getattr"),
        (type, ("X", (), {}), "tries to make a class"),
    ],
)
def test_calls_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, function: Any, args: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_program(tmp_path / "x.pt", pickle.dumps({"x": Calls(function, *args)}, 2), zipped)
    with pytest.raises(CheckpointError, match=f"x.pt is refused: its pickle {says}"):
        read_torch_file(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("program", "says", "runs"),
    [
        (b"cbuiltins\nbytes\n(cbuiltins\nmap\n(cos\nsystem\n(Vtouch hacked\nlt\x81t\x81", "builtins.map", True),
        (b"cargparse\nNamespace\n)\x81(V__setstate__\ncos\nsystem\ndbVtouch hacked\nb", "os.system", True),
        (b"(Vtouch hacked\nios\nsystem\n", "os.system", True),
        (b"(cos\nsystem\nVtouch hacked\no", "os.system", True),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch hacked\x85R", "os.system", True),
        (
            b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c\x0ctouch hacked\x85R",
            "torch.serialization.os",
            True,
        ),
        (b"csubprocess\nPopen\n((Vtouch\nVhacked\nlt\x81", "subprocess.Popen", False),
        (b"cos\nsystem\n", "os.system", False),
    ],
)
def test_a_state_dict_after_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes, says: str, runs: bool
) -> None:
    """`runs`: Python's own unpickler does what is asked for, and goes on to the dictionary."""
    monkeypatch.chdir(tmp_path)
    program += b"0}."
    with pytest.raises(CheckpointError, match=f"x.pt is refused: its pickle requests {says}"):
        read_torch_file(save_program(tmp_path / "x.pt", program))
    assert not (tmp_path / "hacked").exists()
    assert pickle.loads(program) == {}
    assert (tmp_path / "hacked").exists() == runs


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"cos\nsystem\n(S'a'\ntR(S'b'\ntR.", "requests os.system"),
        (b"cposix\nsystem\n.", "requests posix.system"),
        (b"ccommands\ngetoutput\n.", "requests subprocess.getoutput"),
        (b"ccopyreg\n__newobj__\n(csubprocess\nPopen\ntR.", "requests subprocess.Popen"),
        (b"ccopyreg\n__newobj__\n(cbuiltins\ntype\ntR.", "tries to make an object of builtins.type"),
        (b"coperator\ngetitem\n(}K\x01tR.", "tries to call operator.getitem"),
        (b"cbuiltins\ntype\n(Vx\n)}t\x81.", "tries to make an object of builtins.type"),
        (b"cpip._internal.cli.main\nMain\n(Vx\ntR.", "requests pip._internal.cli.main.Main"),
        (b"cnumpy.f2py\nRun\n)R.", "requests numpy.f2py.Run"),
        (b"cfoo.tools\nPopen\n)R.", "requests foo.tools.Popen"),
        (b"cfoo\nrun\n)R.", "tries to call foo.run"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(cfoo\nrun\ncfoo\nBar\n)}tR.", "tries to call foo.run"),
        (
            b"cfoo\nBar\n)\x81}(V__setstate__\ncfoo\nrun\nub.",
            "tries to have foo.run called as an object's __setstate__",
        ),
        (b"cfoo\nBar\n)\x81N}(Vappend\ncfoo\nrun\nu\x86b.", "tries to have foo.run called as an object's append"),
        (b"ccollections\nOrderedDict\n)R}(V__setstate__\ncfoo\nrun\nub.", "tries to have foo.run called"),
        (b"cfoo\nBar\n}b.", "tries to change foo.Bar itself"),
        (b"}(S'b'\ntR.", r"tries to call an object \(dict\)"),
        (b"cfoo\nBar\n)R)R.", r"tries to call an object \(Inert\)"),
        (b"\x82\x01.", "uses the opcode EXT1"),
        (b"Pos.system\n.", "uses the opcode PERSID"),
        (b"\x97.", "uses the opcode NEXT_BUFFER"),
    ],
)
def test_hand_made_programs_are_refused(tmp_path: Path, program: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.pt is refused: its pickle {says}"):
        read_torch_file(save_program(tmp_path / "x.pt", program))


@pytest.mark.parametrize(
    "module", ["builtins", "functools", "importlib", "operator", "os", "pickle", "pathlib", "types", "typing"]
)
def test_of_python_itself_only_data_can_be_named(tmp_path: Path, module: str) -> None:
    """Types of numbers, texts and containers; and functions that may only be called in one way."""
    allowed = set()
    for name, value in vars(importlib.import_module(module)).items():
        with contextlib.suppress(CheckpointError):
            read_torch_file(save_program(tmp_path / "x.pt", f"c{module}\n{name}\n.".encode()))
            allowed.add(name)
            assert not callable(value) or isinstance(value, type) or module == "typing" or name == "getitem", name
    assert len(allowed) <= 25
    assert (module in ("builtins", "operator", "pathlib", "types", "typing")) == bool(allowed)


def hash_bomb() -> bytes:
    """((((), ()), ((), ())), ...) as a key: 2^64 steps to hash."""
    return b"}" + b")" + b"2\x86" * 64 + b"NsN."


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"N",
        b".",
        b"0.",
        b"t.",
        b"R.",
        b"q\x01.",
        b"h\x01.",
        b"(" * 1000 + b"b.",
        b"\x80\x02" + b"]" * 10 + b"a" * 20 + b".",
        b"r\xff\xff\xff\xff.",  # memo index without a value
        b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x.",  # 4 EB of bytes announced
        b"\x8b\xff\xff\xff\x7f\x01.",  # a number of 2 GB announced
        b"X\xff\xff\xff\x7fabc.",  # a text of 2 GB announced
        b"I" + b"9" * 10_000 + b"\n.",
        hash_bomb(),
        b"(" + b"]" * 600_000 + b"t.",  # too many steps
        b"N" * 1_000_001 + b".",
        b"cx\n" + b"y" * 1000 + b"\n.",
        b"cx\n\x1b[2J\n.",
    ],
    ids=range(20),
)
def test_senseless_programs_are_damaged_files(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged: .*download or copy it again"):
        read_torch_file(save_program(tmp_path / "x.pt", program))


def test_deep_nesting_is_no_trouble(tmp_path: Path) -> None:
    depth = 100_000
    file = read_torch_file(save_program(tmp_path / "x.pt", b"]" * depth + b"a" * (depth - 1) + b"."))
    assert list(tensors_within(file.content)) == []


class Record:
    """Pickled as torch pickles a tensor, with whatever numbers."""

    def __init__(self, shape: Any, strides: Any, offset: Any = 0, elements: Any = 6, key: Any = "0") -> None:
        self.storage = "storage", torch.FloatStorage, key, "cpu", elements
        self.view = offset, shape, strides, False, collections.OrderedDict()


def save_record(path: Path, record: Record, data: bytes = b"\0" * 24) -> Path:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return item if isinstance(item, tuple) and item[:1] == ("storage",) else None

        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, Record):
                return torch._utils._rebuild_tensor_v2, (item.storage, *item.view)
            return NotImplemented

    program = io.BytesIO()
    Pickler(program, 2).dump({"x": record})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/data/0", data)
    return path


def test_records_as_torch_writes_them(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    file = read_torch_file(save_record(tmp_path / "x.pt", Record((2, 2), (1, 3), 1), data))
    assert isinstance(file.content["x"], Tensor)
    assert file.read(file.content["x"]).tolist() == [[1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (Record((7,), (1,)), "reaches beyond its storage"),
        (Record((6,), (1,), 1), "reaches beyond its storage"),
        (Record((2, 3), (100, 1)), "reaches beyond its storage"),
        (Record((1 << 40,), (1,)), "reaches beyond its storage"),
        (Record((1 << 40, 1 << 40), (0, 0)), "repeats the elements"),
        (Record((2, 3), (-3, 1)), "cannot be"),
        (Record((2, 3), (1,)), "cannot be"),
        (Record((2.0, 3), (3, 1)), "cannot be"),
        (Record((1 << 60,), (1,)), "cannot be"),
        (Record((1,) * 40, (1,) * 40), "cannot be"),
        (Record((6,), (1,), elements=1 << 40), "has 24 bytes, expected"),
        (Record((6,), (1,), elements=-1), "another way than PyTorch"),
        (Record((6,), (1,), key="1"), "lacks the bytes of storage '1'"),
        (Record((6,), (1,), key=1), "another way than PyTorch"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, record: Record, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_torch_file(save_record(tmp_path / "x.pt", record))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N." + b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(tmp_path / "x.pt")


# -- what is shown -----------------------------------------------------------------------------------------------------


TENSOR = b"(Vok\n" + _tensor("0", (2,), "float32") + b"d"
HUGE = b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000


def nested(levels: int, once: bytes = b"]", more: bytes = b"](%s2e") -> bytes:
    """A value that holds the one below it twice: 2^levels parts to print."""
    program = once
    for _ in range(levels):
        program = more % program
    return program


INERT = b"cfoo\nBar\n)\x81", b"cfoo\nBar\n%s2\x86\x81"


@pytest.mark.parametrize(
    ("key", "value", "shows"),
    [
        (b"Vepoch\n", b"K\x07", "epoch 7"),
        (b"Vepoch\n", HUGE, "epoch an integer of 39999 bits"),
        (b"Vepoch\n", b"V" + b"x" * 100_000 + b"\n", "epoch"),
        (b"Vep\x1b[2Joch\n", b"V\\u000d\x1b[31m\\ud800\n", r"ep\x1b[2Joch \r\x1b[31m\ud800"),
        (b"V" + b"x" * 100_000 + b"\n", b"N", "x" * 40 + "..."),
        (nested(40, *INERT), b"N", "an object of foo.Bar"),
        (nested(2000, b"cfoo\nBar\n)\x81", b"cfoo\nBar\n%s\x85\x81"), b"N", "an object of foo.Bar"),
        (b"Vloop\n", b"]q\x01h\x01a", "loop"),
    ],
)
def test_what_is_beside_the_weights_is_shown_in_short(tmp_path: Path, key: bytes, value: bytes, shows: str) -> None:
    program = b"(Vmodel\n" + TENSOR + key + value + b"d."
    with zipfile.ZipFile(path := tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", b"\0" * 8)
    assert open_source(path).others == (shows,)


@pytest.mark.parametrize(
    ("value", "shows"),
    [
        (b"V" + b"x" * 100_000 + b"\n", "'" + "x" * 40 + "'..."),
        (HUGE, "an integer of 39999 bits"),
        (nested(40), r"[a list, a list]"),
        (nested(40, *INERT), "an object of foo.Bar"),
        (b"(" + HUGE * 10 + b"l", "[" + "an integer of 39999 bits, " * 8 + "...]"),
        (b"V\x1b[2J\n", r"'\x1b[2J'"),
    ],
)
def test_errors_are_short_whatever_is_in_the_file(tmp_path: Path, value: bytes, shows: str) -> None:
    """Values at every place of a file whose value a message shows."""
    header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001))
    (tmp_path / "x.pt").write_bytes(header[: -len(pickle.dumps(1001, 2))] + value + b"." + b"}." * 3)
    with pytest.raises(CheckpointError, match=re.escape(f"x.pt is damaged: its header has protocol {shows}, 1001")):
        read_torch_file(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=re.escape(f"'x' is {shows}, not a tensor")):
        open_source(save_program(tmp_path / "x.pt", b"(Vx\n" + value + b"d."))
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x02tQ"
    program = b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89}" + value + b"tR."
    with pytest.raises(CheckpointError, match=re.escape(f"describes a tensor of type {shows};")):
        read_torch_file(save_program(tmp_path / "x.pt", program))


@pytest.mark.parametrize("name", ["a\x1b[31mred", "a\r\nb", "a\ud800b", "x" * 100_000, "\u202etxt"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="a tensor cannot be called '") as caught:
        open_source(save(tmp_path / "x.pt", {name: torch.ones(1)}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"error": "not found"}', "JSON text"),
        (b"Entry not found", "a text, not weights; it begins with 'Entry not found'"),
        (b"\0" * 100, "begins with zeros"),
        (b"\x1f\x8b\x08\0\0", "gzip"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file"),
        (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
        (pickle.dumps({"x": 1}, 2), "a Python pickle, but none that torch.save wrote"),
        (b"\xde\xad\xbe\xef" * 9, "begins with de ad be ef"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.pt .*{says}"):
        read_torch_file(tmp_path / "x.pt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_torch_file(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_torch_file(tmp_path)


def test_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        read_torch_file(tmp_path / "x.pt")


def real_file(path: Path, zipped: bool) -> bytes:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return save(path, {"model": module.state_dict(), "config": Foreign(), "epoch": 3}, zipped).read_bytes()


def everything(file: TorchFile) -> list[np.ndarray]:
    return [file.read(tensor) for tensor in tensors_within(file.content)]


@FORMATS
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    whole = real_file(path, zipped)
    # Nothing but the list of storages and their bytes stands at a legacy file's end: every cut is noticed there, too.
    for end in {*range(0, len(whole), 41), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            everything(read_torch_file(path))


@FORMATS
def test_a_file_damaged_anywhere_is_read_or_refused(tmp_path: Path, zipped: bool) -> None:
    """No crash, no other exception, no hang; bytes of values may of course be anything."""
    path, rng = tmp_path / "x.pt", random.Random(5)
    whole = real_file(path, zipped)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 30))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            everything(read_torch_file(path))
