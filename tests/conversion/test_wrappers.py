"""State dicts of training programs: prefixes, keys, several models, entries that are no weights, shared storages."""

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from conversion.checkpoint import read
from conversion.convert import convert
from conversion.describe import describe
from conversion.source import open_source
from conversion.verify import verify
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from tests.conversion.test_convert import values
from tests.support.backends import Backend
from tests.support.models import random_checkpoint, smallest_config

# Keras's own conversion of variables to arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

State = dict[str, Any]


@pytest.fixture(scope="module")
def config() -> GroupViTConfig:
    return smallest_config()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, config: GroupViTConfig) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("wrappers") / "native", config)


@pytest.fixture(scope="module")
def state(native: Path) -> State:
    return {name: torch.from_numpy(value) for name, value in values(native).items()}


def prefixed(state: State, *prefixes: str) -> State:
    return {prefix + name: value for prefix in prefixes for name, value in state.items()}


def doubled(state: State) -> State:
    return {name: value * 2 if value.is_floating_point() else value for name, value in state.items()}


def within(name: str) -> str:
    """Activation checkpointing of each layer."""
    return re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name)


def notes_of(path: Path, content: Any, state: State, config: GroupViTConfig, **options: Any) -> list[str]:
    """Returns the notes of reading; the tensors must be those of `state`."""
    torch.save(content, path)
    checkpoint = read(path, config=config, **options)
    assert set(checkpoint.tensors) == set(state)
    for name, value in state.items():
        assert checkpoint.value(name).tobytes() == value.numpy().tobytes(), name
    return list(checkpoint.source.choice.notes)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "_forward_module.module._orig_mod.",
        "model.",
        "net.module.backbone.",
        "groupvit.",
    ],
)
def test_prefixes_are_taken_off_and_told(tmp_path: Path, state: State, config: GroupViTConfig, prefix: str) -> None:
    notes = notes_of(tmp_path / "x.pth", prefixed(state, prefix), state, config)
    assert notes == [f"prefix {prefix!r} of {len(state)} tensors removed"]


@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_of_all_kinds(tmp_path: Path, state: State, config: GroupViTConfig, zipped: bool) -> None:
    path = tmp_path / "x.pth"

    def notes(content: Any, **options: Any) -> list[str]:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        checkpoint = read(path, config=config, **options)
        assert all(checkpoint.value(name).tobytes() == value.numpy().tobytes() for name, value in state.items())
        return list(checkpoint.source.choice.notes)

    wrapped = {within(f"module.{name}"): value for name, value in state.items()}
    count = sum("_checkpoint" in name for name in wrapped)
    assert notes(wrapped) == [
        f"prefix 'module.' of {len(state) - count} tensors removed",
        f"'module' and '_checkpoint_wrapped_module' within the names of {count} tensors removed",
    ]
    # Lightning, DeepSpeed, timm, averages of weights, precision libraries, and a dictionary that has all in one.
    lightning = {
        "epoch": 1, "pytorch-lightning_version": "2.4.0", "optimizer_states": [],
        "state_dict": prefixed(state, "model."),
        "hyper_parameters": {"lr": 1e-4},
    }  # fmt: skip
    assert notes(lightning) == [f"prefix 'model.' of {len(state)} tensors removed"]
    assert notes({"module": state, "optimizer": None, "ds_version": "0.14"}) == ["read from 'module'"]
    assert notes({"state_dict_ema": state, "epoch": 3}) == ["read from 'state_dict_ema'"]
    averaged = {**prefixed(state, "module."), "n_averaged": torch.tensor(5)}
    assert notes(averaged)[1:] == ["left out: n_averaged"]
    assert notes({**state, "_extra_state": None, "epoch": 3}) == ["left out: _extra_state, epoch"]
    # An optimizer's tensors may be called as the model's.
    assert notes({"model": state, "optimizer": {"master": doubled(state)}}) == []
    # One and the same state dict under two keys is one model.
    assert notes({"model": state, "model_ema": state}) == []
    # Numbers repeated, turned, with gradients.
    repeated = {"model": state, "class_weights": torch.ones(1).expand(150)}
    assert notes(repeated) == []
    turned = {
        name: torch.nn.Parameter(value.T.contiguous().T) if value.ndim == 2 else value for name, value in state.items()
    }
    assert notes(turned) == []


def test_an_expanded_weight(tmp_path: Path, state: State, config: GroupViTConfig) -> None:
    name = "text_model.final_layer_norm.weight"
    ones = torch.ones(1).expand(state[name].shape)
    assert notes_of(tmp_path / "x.pth", {**state, name: ones}, {**state, name: ones.contiguous()}, config) == []


def test_several_models_in_a_file(tmp_path: Path, native: Path, state: State, config: GroupViTConfig) -> None:
    other = doubled(state)
    path = tmp_path / "x.pth"
    torch.save({"model": prefixed(state, "module."), "model_ema": other, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"2 models, 'model', 'model_ema': choose one with key \(--key NAME\)"):
        read(path, config=config)
    with pytest.raises(CheckpointError, match=r"no model 'ema'; there is 'model', 'model_ema'"):
        read(path, config=config, key="ema")
    assert read(path, config=config, key="model_ema").value("logit_scale") == other["logit_scale"].numpy()
    described = describe(path, config=config)
    assert (described.model, described.models) == ("model", ["model", "model_ema"])
    assert any("model_ema (--key NAME)" in line for line in described.lines())
    assert described.warnings == []
    assert verify(path, native, config=config, key="model").passed
    # In one state dict, one of them with no prefix at all.
    torch.save({"state_dict": {**prefixed(state, "student."), **prefixed(other, "teacher.module.")}}, path)
    with pytest.raises(CheckpointError, match=r"'state_dict\.student', 'state_dict\.teacher'"):
        read(path, config=config)
    for key in ("state_dict.teacher", "teacher"):
        chosen = read(path, config=config, key=key)
        assert chosen.value("logit_scale") == other["logit_scale"].numpy()
        assert any(note.startswith("left out: student.") for note in chosen.source.choice.notes)
    torch.save({**state, **prefixed(other, "teacher.")}, path)
    assert read(path, config=config, key=".").value("logit_scale") == state["logit_scale"].numpy()


def test_what_is_beside_the_model_is_accounted_for(tmp_path: Path, state: State, config: GroupViTConfig) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(3)}}, path)
    with pytest.raises(CheckpointError, match=r"1 left over: loss\.weight"):
        read(path, config=config)
    read(path, config=config, allow_missing=["loss.*"])
    assert "left out: loss.weight" in read(path, config=config, key="state_dict").source.choice.notes
    torch.save({**prefixed(state, "model."), "logit_scale": torch.ones(())}, path)
    with pytest.raises(CheckpointError, match=r"another tensor of this name .*--key model\)"):
        read(path, config=config)
    torch.save({**state, **prefixed(state, "module.")}, path)
    with pytest.raises(CheckpointError, match="one tensor twice"):
        read(path, config=config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "an optimizer's state and no model's",
        ),
        ({"module": {"text_model.x": torch.empty(0)}, "ds_version": "0.14"}, "zero_to_fp32.py"),
        ({"model": torch.nn.Linear(2, 2), "epoch": 3}, "'model' is an object of torch.nn.modules.linear.Linear"),
        (torch.nn.Linear(2, 2), "holds an object of torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: Any, says: str, zipped: bool) -> None:
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        open_source(tmp_path / "x.pth")


def test_storages_that_are_shared_cost_no_more_than_the_file_justifies(tmp_path: Path) -> None:
    base = torch.zeros(1 << 20)
    torch.save({f"text_model.{n}": base[n:] for n in range(40)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"its 40 tensors would take .* bytes of storages that they share"):
        open_source(tmp_path / "x.pth")
    # Two numbers each, at both ends.
    torch.save({f"text_model.{n}": base[n :: (1 << 20) - 41] for n in range(40)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="storages that they share"):
        open_source(tmp_path / "x.pth")
    torch.save({f"text_model.{n}": part for n, part in enumerate(base.chunk(64))}, tmp_path / "x.pth")
    assert len(open_source(tmp_path / "x.pth").tensors) == 64


def test_folders_of_training_programs(tmp_path: Path, state: State, config: GroupViTConfig) -> None:
    config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model_fsdp.bin")
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "scaler.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ):
        torch.save({}, tmp_path / name)
    assert set(read(tmp_path).tensors) == set(state)
    (tmp_path / "pytorch_model_fsdp.bin").rename(tmp_path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="format_utils dcp_to_torch"):
        read(tmp_path)
    (tmp_path / "step" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="one of which may be meant: inner"):
        read(tmp_path / "step")


def test_wrappers_in_safetensors(tmp_path: Path, backend: Backend, state: State, config: GroupViTConfig) -> None:
    config.save_pretrained(tmp_path / "a")
    arrays = {f"module._orig_mod.{name}": value.numpy() for name, value in state.items()}
    save_file(arrays, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"prefix 'module\._orig_mod\.'.*groupvit convert"):
        backend.load(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", verify=False)
    assert done.notes[0] == f"prefix 'module._orig_mod.' of {len(state)} tensors removed"
    assert values(tmp_path / "b").keys() == state.keys()


def test_a_model_within_another_of_keras(tmp_path: Path, native: Path, state: State, config: GroupViTConfig) -> None:
    keras = pytest.importorskip("keras")
    from groupvit_tf import GroupViTModel

    class Outer(keras.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = GroupViTModel.from_pretrained(native)
            self.head = keras.layers.Dense(2)
            self.head.build((None, 3))

    model = Outer()
    model.build(())
    model.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(CheckpointError, match="2 left over: head/vars/0, head/vars/1"):
        read(tmp_path / "x.weights.h5", config=config)
    checkpoint = read(tmp_path / "x.weights.h5", config=config, key="backbone")
    assert checkpoint.source.choice.notes[0] == f"prefix 'backbone/' of {len(state)} tensors removed"
    assert all(checkpoint.value(name).tobytes() == value.numpy().tobytes() for name, value in state.items())


# -- HDF5 within bounds ------------------------------------------------------------------------------------------------

_PLACE = "layers/projection/hidden/vars/0"


@pytest.fixture(scope="module")
def weights(native: Path) -> bytes:
    path = native.parent / "x.weights.h5"
    convert(native, path, verify=False)
    return path.read_bytes()


def _nested(file: Any) -> None:
    for _ in range(200):
        file = file.create_group("g")


def _wide(file: Any) -> None:
    group = h5py.h5g.create(file.id, b"wide")
    for number in range(20_001):
        h5py.h5o.link(file.id, group, str(number).encode())


def _replaced(**options: Any) -> Any:
    def change(file: Any) -> None:
        shape = file[_PLACE].shape
        del file[_PLACE]
        file.create_dataset(_PLACE, **{"shape": shape, "dtype": "f4"} | options)

    return change


def _opaque(file: Any) -> None:
    shape = file[_PLACE].shape
    del file[_PLACE]
    kind = h5py.h5t.create(h5py.h5t.OPAQUE, 7)
    kind.set_tag(b"NUMPY:<f4")
    h5py.h5d.create(file.id, _PLACE.encode(), kind, h5py.h5s.create_simple(shape))


def _virtual(file: Any) -> None:
    shape = file[_PLACE].shape
    del file[_PLACE]
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", shape)
    file.create_virtual_dataset(_PLACE, layout)


def _attributes(file: Any) -> None:
    for number in range(1_001):
        file.attrs[str(number)] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_nested, "groups in one another"),
        (_wide, "more than 20000 objects"),
        (_attributes, "attributes, and models have a few"),
        (lambda file: file.attrs.create("x.num_batches_tracked", "1" * 1000), "longer than 500"),
        (lambda file: file.__setitem__("layers/x", h5py.ExternalLink("/etc/passwd", "/")), "in another file"),
        (_virtual, "in another file"),
        (_opaque, "contradicts itself"),
        (_replaced(shape=(1 << 15, 1 << 15), chunks=(64, 64), compression="gzip"), "compressed or filtered"),
        (_replaced(shuffle=True), "compressed or filtered"),
        (_replaced(), "fewer bytes than its shape"),
        (_replaced(shape=(2, 2), maxshape=(None, None), chunks=(1 << 14, 1 << 14)), "fewer bytes than its shape"),
        (_replaced(dtype=h5py.string_dtype()), "object, a type that is not read"),
        (_replaced(dtype=h5py.ref_dtype), "object, a type that is not read"),
        (_replaced(dtype=np.dtype([("a", "f4")])), "a type that is not read"),
        (lambda file: file.__setitem__("layers/\x1b[31m/vars/0", np.zeros(3, "f4")), "cannot be called"),
    ],
)
def test_hdf5_files_are_bounded(tmp_path: Path, weights: bytes, change: Any, says: str) -> None:
    path = tmp_path / "x.weights.h5"
    path.write_bytes(weights)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(CheckpointError, match=says):
        read(path)


def test_hdf5_links_in_a_circle(tmp_path: Path, weights: bytes, state: State) -> None:
    path = tmp_path / "x.weights.h5"
    path.write_bytes(weights)
    with h5py.File(path, "r+") as file:
        file["layers/all"] = file["/"]
        file["layers/soft"] = h5py.SoftLink("/layers/text_tower")
        # Two ways into each group: 2**40 ways in all.
        group = file.create_group("a0")
        for number in range(40):
            below = file.create_group(f"a{number + 1}")
            group["left"] = group["right"] = below
            group = below
        file.attrs.create("x.num_batches_tracked", np.array(["int64 1"] * 5, object), dtype=h5py.string_dtype())
    assert values(path).keys() == state.keys()


# -- destinations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "says"),
    [
        (
            "m.onnx",
            None,
            r"no format that is written here ends in \.onnx; name a directory, or a file that ends in \.keras",
        ),
        ("z.h5", None, r"ends in \.h5: Keras's weights end in \.weights\.h5"),
        ("w.bin", None, "pytorch_model.bin into a directory"),
        ("v.SafeTensors", None, "native writes model.safetensors into a directory"),
        ("t.pt", None, r"the authors' format ends in \.pth"),
        ("s.ckpt", None, r"the authors' format ends in \.pth"),
        ("model.tflite", None, r"ends in \.tflite"),
        ("model.xml", None, r"ends in \.xml"),
        ("x.tar.gz", None, r"ends in \.gz"),
        ("m.pth", "native", r"native is a directory, and 'm\.pth' ends as a file does: .* for nvlabs"),
        ("m.bin", "pytorch", "pytorch is a directory"),
        ("m.pth", "keras", r"keras is a file: give it a name that ends in \.keras or \.weights\.h5"),
        ("m.keras", "nvlabs", r"ends in \.pth, not"),
    ],
)
def test_destinations_of_another_format_are_refused(
    tmp_path: Path, native: Path, name: str, to: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        convert(native, tmp_path / name, to, verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("x.keras", "keras"),
        ("y.weights.h5", "keras-weights"),
        ("groupvit-4.5", "safetensors"),
        ("v1.2.model", "safetensors"),
        ("x.onnx/", "safetensors"),
    ],
)
def test_the_format_is_said_by_the_ending(tmp_path: Path, native: Path, name: str, form: str) -> None:
    done = convert(native, f"{tmp_path}/{name}", verify=False)
    assert done.format == open_source(done.destination).format == form
    assert done.destination.is_dir() == (form == "safetensors")
