"""Checkpoint directories: what is read, what is refused, what is written, by every backend."""

import functools
import importlib
import json
import random
import re
import shutil
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from groupvit_common.checkpoints.directory import compare_tensors, find_weights, parse_size, plan_shards, read_index
from groupvit_common.checkpoints.safetensors_file import array_info, read_arrays, read_header, write_arrays
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage import saving
from groupvit_torch import GroupViTModel
from tests.support.backends import Backend
from tests.support.fake_hub import FakeHub, point_to
from tests.support.models import random_checkpoint, smallest_config
from tests.support.paths import REFERENCE

CASES = REFERENCE / "transformers"
CASE = CASES / "three_stage"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a real checkpoint, to be damaged."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(CASE / name, target)
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint, with other numbers in every tensor, for tests that make several models of it."""
    return random_checkpoint(tmp_path_factory.mktemp("small") / "model", smallest_config())


@pytest.fixture
def lib(backend: Backend) -> ModuleType:
    """The backend's package: the same names in all."""
    return importlib.import_module(f"groupvit_{backend.name}")


@functools.cache
def loaded(lib: ModuleType) -> Any:
    """The model of `CASE`, made once: for tests that leave it as it is."""
    return lib.GroupViTModel.from_pretrained(CASE)


def text_part(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those of the text tower, which is made in a third of the time."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("text_model.")}


Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


def bits(source: Any) -> Bits:
    """Dtype, shape and bytes of every tensor of a model, a dictionary of PyTorch's tensors, or a weights file."""
    if isinstance(source, Path):
        source = load_file(source)
    if isinstance(source, torch.nn.Module):
        source = source.state_dict()
    if isinstance(source, dict):
        return {
            name: (
                str(t.dtype).removeprefix("torch."),
                tuple(t.shape),
                t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
            for name, t in source.items()
        }
    from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical

    # Keras counts batches in int32, files in int64.
    arrays = {name: to_canonical(kind(v), np.asarray(v)) for name, v in canonical_variables(source).items()}
    arrays = {name: a.astype(np.int64) if a.dtype == np.int32 else a for name, a in arrays.items()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


def change_scale(model: Any) -> None:
    """Gives the model a temperature that no checkpoint has."""
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            model.logit_scale.fill_(0.125)
    else:
        model.logit_scale.assign(0.125)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- headers --


def test_a_header_says_what_the_file_holds(tmp_path):
    arrays = {"a": np.zeros((2, 3), np.float16), "b": np.ones((), np.int64), "empty": np.zeros((0, 4), np.float32)}
    save_numpy(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors == {"a": ((2, 3), "F16"), "b": ((), "I64"), "empty": ((0, 4), "F32")}
    assert header.metadata == {"format": "np"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x10\x00", "truncated"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>" * 9, "web page"),
        (b"\n\n<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 222\n", "git lfs pull"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"PK\x03\x04" + b"\x00" * 100, "zip archive"),
        (b"\x80\x02}q\x00." + b"\x00" * 100, "pickle"),
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 100, "HDF5"),
        (b"\xff" * 100, "header would be"),
        (raw(b"{}", length=2**40), "header would be"),
        (raw(b"{}", length=3000), "truncated"),
        (raw(b"not json"), "cannot be read as JSON"),
        (raw(b"\xff\xfe{}"), "cannot be read as JSON"),
        (raw(b"[" * 100_000), "nested too deeply"),
        (raw(b'{"a": ' + b"1" * 5000 + b"}"), "digits"),
        (raw([]), "found an array"),
        (raw({"__metadata__": {"format": 1}}), "metadata"),
        (raw({"a": 1}), "makes no sense"),
        (raw({"a": {"dtype": "F32"}}), "makes no sense"),
        (raw({"a": entry(dtype="F33")}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(dtype=[])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(shape=[-2])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(shape=[2.0])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(shape=[True, 2])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(shape=[3])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(shape=[2**62] * 60)}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(offsets=[8, 0])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(offsets=[0, 4, 8])}, b"\0" * 8), "makes no sense"),
        (raw({"a": entry(offsets=[4, 12])}, b"\0" * 12), "starts at byte 4, expected 0"),
        (raw({"a": entry(), "b": entry()}, b"\0" * 8), "starts at byte 0, expected 8"),
        (raw({"a": entry()}, b"\0" * 7), r"truncated: its header announces 8 bytes of tensors and 7 are there"),
        (raw({"a": entry()}, b"\0" * 9), "1 bytes follow"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, says):
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_header_length_that_looks_like_text_is_read(tmp_path):
    """A header of 60 bytes makes the file begin with "<", one of 123 bytes with "{"."""
    for length in (60, 123):
        text = json.dumps({"a": entry()})
        (tmp_path / WEIGHTS).write_bytes(raw(text.ljust(length).encode(), b"\0" * 8))
        assert read_header(tmp_path / WEIGHTS).tensors == {"a": ((2,), "F32")}


def test_arrays_are_read_and_written_as_the_library_does(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "half": torch.linspace(-3, 3, 7).half(),
        "Brain": torch.linspace(-3, 3, 3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "count": torch.tensor(2**40),
        "müller": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    names = ["bytes", "scalar", *(name for name in tensors if name not in ("bytes", "scalar"))]
    arrays = dict(read_arrays(tmp_path / "theirs", names))
    assert {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()} == bits(tensors)
    strided = {**arrays, "müller": np.asfortranarray(arrays["müller"])}
    write_arrays(
        tmp_path / "ours", {n: array_info(a.shape, a.dtype.name) for n, a in arrays.items()}, strided.__getitem__
    )
    assert bits(tmp_path / "ours") == bits(tensors)
    assert read_header(tmp_path / "ours").metadata == {"format": "pt"}


def test_arrays_that_numpy_does_not_have(tmp_path):
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds a as F8_E4M3; .*F32"):
        list(read_arrays(tmp_path / WEIGHTS, ["a"]))


def test_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        read_header(tmp_path / WEIGHTS)


def test_every_truncation_is_an_error(directory):
    path = directory / WEIGHTS
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = {
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        len(content) - 1,
        *range(0, len(content), len(content) // 40),
    }
    for offset in sorted(offsets):
        path.write_bytes(content[:offset])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            GroupViTModel.from_pretrained(directory)


def test_damaged_headers_are_errors_or_harmless(directory):
    """Any byte of the header may be any other: the outcome is a clear error, or a model with the same tensors."""
    path = directory / WEIGHTS
    content = path.read_bytes()
    whole = load_file(path)
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(content)
        # The length and the start of the text get a share of their own: there are the decisions.
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(16 if trial % 3 == 0 else header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            model = GroupViTModel.from_pretrained(directory)
        except CheckpointError:
            refused += 1
        else:
            # Offsets and shapes are checked against each other; what is left is other metadata, or like tensors
            # swapped.
            assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in whole.items()}
    assert refused > 200


# -- directories --


def test_the_layout_of_another_framework_is_refused(directory):
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "tf"})
    with pytest.raises(CheckpointError, match=r"TensorFlow layout.*needs conversion"):
        find_weights(directory)


def test_a_file_without_metadata_is_read(lib, directory):
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors, directory / WEIGHTS)
    assert bits(lib.GroupViTTextModel.from_pretrained(directory)) == bits(text_part(tensors))


def test_shards_and_index_are_held_against_each_other(lib, tmp_path):
    model = loaded(lib)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    weights = find_weights(tmp_path)
    assert set(weights.tensors) == set(bits(model))
    index = json.loads((tmp_path / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))

    def refused(change: dict[str, str], says: str) -> None:
        (tmp_path / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(CheckpointError, match=says):
            lib.GroupViTModel.from_pretrained(tmp_path)

    refused({"ghost": shard}, "lacks 1 tensors .* puts there: ghost")
    refused({name: "model-00009-of-00009.safetensors"}, r"lacks 1 of the shards .*: model-00009-of-00009\.safetensors")
    for outside in (
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.bin",
    ):
        refused({name: outside}, "beside the index")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard} is truncated"):
        lib.GroupViTModel.from_pretrained(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the shards .* {re.escape(shard)}"):
        lib.GroupViTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\ud800"]
)
def test_a_broken_index(tmp_path, text):
    path = tmp_path / INDEX
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_index(path)


# -- comparing --


def test_comparing_lists_every_kind_of_difference():
    expected = {f"layer.{i}.weight": (2, 3) for i in range(9)}
    found = {**{f"other.{i}": (1,) for i in range(2)}, "layer.8.weight": (3, 2)}
    with pytest.raises(CheckpointError) as caught:
        compare_tensors(expected, found, source="file", model="Model")
    message = str(caught.value)
    assert "8 missing: layer.0.weight, layer.1.weight" in message
    assert "and 3 more" in message
    assert "2 unexpected: other.0, other.1" in message
    assert "layer.8.weight [3, 2] in the file, [2, 3] in the model" in message


def test_harmless_differences():
    expected = {"w": (1,), "bn.num_batches_tracked": ()}
    found = {"w": (1,), "text_model.embeddings.position_ids": (1, 77), "multi_label_logit_scale": ()}
    assert compare_tensors(expected, found, source="file") == ["w"]
    # What the model has is loaded.
    assert compare_tensors({"multi_label_logit_scale": ()}, found | {"w": (1,)}, source="f", prefix="multi") == [
        "multi_label_logit_scale"
    ]


# -- loading --


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.iterdir()))
def test_a_model_holds_what_the_file_holds(lib, case):
    model = lib.GroupViTModel.from_pretrained(CASES / case)
    assert bits(model) == bits(CASES / case / WEIGHTS)
    assert str(model.dtype).removeprefix("torch.") == "float32"
    parameters = [t for name, t in load_file(CASES / case / WEIGHTS).items() if not name.endswith(BUFFERS)]
    assert model.num_parameters() == sum(t.numel() for t in parameters)


def test_a_torch_model_is_ready_for_use():
    model = GroupViTModel.from_pretrained(CASE)
    assert not model.training
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert model.device == torch.device("cpu")


def test_a_tower_takes_its_part_of_a_full_checkpoint(lib, small, tmp_path):
    whole = load_file(small / WEIGHTS)
    for cls, prefix in ((lib.GroupViTTextModel, "text_model."), (lib.GroupViTVisionModel, "vision_model.")):
        tower = cls.from_pretrained(small)
        part = {name: tensor for name, tensor in whole.items() if name.startswith(prefix)}
        assert bits(tower) == bits(part)
        tower.save_pretrained(tmp_path / prefix)
        assert bits(cls.from_pretrained(tmp_path / prefix)) == bits(part)
        assert json.loads((tmp_path / prefix / "config.json").read_text())["architectures"] == [cls.__name__]
        # The other way round there is nothing to fill the rest with.
        with pytest.raises(CheckpointError, match=f"one tower only: {cls.__name__}"):
            lib.GroupViTModel.from_pretrained(tmp_path / prefix, config=small)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_dtypes(lib, small, tmp_path, stored):
    model = lib.GroupViTModel.from_pretrained(small, torch_dtype="torch." + stored)
    assert str(model.dtype).removeprefix("torch.") == stored
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == stored
    there = load_file(tmp_path / WEIGHTS)
    assert all(there[name].dtype == torch.int64 for name in there if name.endswith("num_batches_tracked"))
    for dtype, expected in ((None, "float32"), ("auto", stored)):
        state = {n: t.to(getattr(torch, expected)) for n, t in text_part(there).items()}
        assert bits(lib.GroupViTTextModel.from_pretrained(tmp_path, dtype=dtype)) == bits(state)


def test_rounding_is_pytorchs(lib, directory):
    """Halves of a float64: ties, values that two roundings get differently, too large and too small ones."""
    rng = np.random.default_rng(0)
    shape = load_file(directory / WEIGHTS)["text_model.embeddings.token_embedding.weight"].shape
    hard = np.concatenate(
        [[1 + 2**-11, 1 + 2**-11 + 2**-40, 1 + 2**-9, 7e4, 1e39, 1e-7, 1e-41], rng.standard_normal(shape.numel() - 7)]
    )
    tensors = load_file(directory / WEIGHTS)
    tensors["text_model.embeddings.token_embedding.weight"] = torch.from_numpy(hard.reshape(shape))
    save_file(tensors, directory / WEIGHTS)
    for dtype in ("half", "bfloat16"):
        expected = {
            n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in text_part(tensors).items()
        }
        assert bits(lib.GroupViTTextModel.from_pretrained(directory, dtype=dtype)) == bits(expected)


def test_settings_may_be_replaced_and_unknown_keywords_are_named(lib):
    model = lib.GroupViTModel.from_pretrained(
        CASE, output_attentions=True, low_cpu_mem_usage=True, use_safetensors=True
    )
    assert model.config.output_attentions is True
    with pytest.raises(InputError, match="knows no keyword 'reversion'"):
        lib.GroupViTModel.from_pretrained(CASE, reversion="main")
    with pytest.raises(InputError, match=r"use_safetensors=False.*only safetensors"):
        lib.GroupViTModel.from_pretrained(CASE, use_safetensors=False)
    with pytest.raises(InputError, match=r"from_tf=True.*conversion"):
        lib.GroupViTModel.from_pretrained(CASE, from_tf=True)
    for dtype in ("int64", np.int8, "float8", 16):
        with pytest.raises(InputError, match="dtype must be"):
            lib.GroupViTModel.from_pretrained(CASE, dtype=dtype)


def test_devices():
    with pytest.raises(InputError, match=r"the device .gpu. cannot be used"):
        GroupViTModel.from_pretrained(CASE, device="gpu")
    assert GroupViTModel.from_pretrained(CASE, device_map={"": "cpu"}).device.type == "cpu"


def test_a_configuration_of_ones_own(lib, directory):
    config = lib.GroupViTConfig.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        lib.GroupViTModel.from_pretrained(directory)
    before = config.to_dict()
    loaded = lib.GroupViTModel.from_pretrained(directory, config=config).config
    assert loaded is not config
    assert loaded.vision_config == config.vision_config
    assert config.to_dict() == before
    assert config.name_or_path == ""
    # A tower takes its part of a full configuration.
    assert isinstance(lib.GroupViTTextModel.from_pretrained(directory, config=config).config, lib.GroupViTTextConfig)


def test_a_configuration_that_does_not_fit_the_weights(lib, directory):
    settings = json.loads((directory / "config.json").read_text())
    settings["text_config"]["vocab_size"] += 1
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"1 of another shape: text_model\.embeddings\.token_embedding\.weight"):
        lib.GroupViTModel.from_pretrained(directory)
    settings["text_config"]["num_attention_heads"] = 7
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        lib.GroupViTModel.from_pretrained(directory)


def test_missing_and_foreign_tensors(lib, directory):
    tensors = load_file(directory / WEIGHTS)
    scale = tensors.pop("logit_scale")
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="1 missing: logit_scale"):
        lib.GroupViTModel.from_pretrained(directory)
    save_file({"img_encoder.pos_embed": scale}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="authors' original code"):
        lib.GroupViTModel.from_pretrained(directory)
    save_file({**tensors, "logit_scale": torch.tensor(3)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"logit_scale as I64, expected float32"):
        lib.GroupViTModel.from_pretrained(directory)


def test_old_files_load(lib, directory):
    """Position ids stored (transformers before 4.31), no batch counters (files that come from TensorFlow)."""
    tensors = {n: t for n, t in load_file(directory / WEIGHTS).items() if not n.endswith("num_batches_tracked")}
    tensors["text_model.embeddings.position_ids"] = torch.arange(4)[None]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    state = bits(lib.GroupViTModel.from_pretrained(directory))
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert len(counters) == 2
    assert all(state[name] == ("int64", (), bytes(8)) for name in counters)


def test_the_file_may_go_while_the_model_lives(lib, directory):
    model = lib.GroupViTTextModel.from_pretrained(directory)
    expected = load_file(CASE / WEIGHTS)
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(0)
    assert bits(model) == bits(text_part(expected))


def test_loading_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    GroupViTModel.from_pretrained(CASE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_is_not_made_from_a_name(lib):
    with pytest.raises(InputError, match="takes a GroupViTConfig, got str; use from_pretrained"):
        lib.GroupViTModel("org/name")


# -- sharding --


def test_shards_keep_the_order_and_the_limit():
    sizes = {"a": 4, "b": 4, "c": 12, "d": 1, "e": 9, "f": 1}
    shards = plan_shards(sizes, 10)
    assert [shard.tensors for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert [shard.file_name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert plan_shards(sizes, "1KB") == [(WEIGHTS, list(sizes))]


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 kb", 1500), ("2GiB", 2**31)]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, 1.5, None, "", "5", "GB", "-1GB", "5 PB", "0KB"])
def test_impossible_sizes(size):
    with pytest.raises(InputError, match="max_shard_size"):
        parse_size(size)


# -- saving --


def test_saving_gives_back_every_bit_and_the_names_of_transformers(lib, tmp_path):
    model = loaded(lib)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert bits(tmp_path / WEIGHTS) == bits(CASE / WEIGHTS)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["GroupViTModel"]
    assert settings["model_type"] == "groupvit"
    assert settings["torch_dtype"] == "float32"
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_sharded_saving(lib, tmp_path):
    model = loaded(lib)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(len(value) for _, _, value in bits(model).values())
    assert bits(lib.GroupViTModel.from_pretrained(tmp_path)) == bits(model)


def test_a_directory_never_holds_two_models(lib, tmp_path):
    model = loaded(lib)
    kept = tmp_path / "adapter.safetensors"
    kept.write_bytes(b"someone else's")
    for size in ("200KB", "500KB", "5GB", "200KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        found = find_weights(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} - {"config.json", INDEX, kept.name} == {p.name for p in found.files}
        assert (tmp_path / INDEX).exists() == (len(found.files) > 1)
    assert kept.read_bytes() == b"someone else's"


@pytest.mark.parametrize("failing", ["model-00002-of-00005.safetensors", "config.json"])
def test_a_save_that_fails_leaves_the_old_checkpoint(lib, directory, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    model = lib.GroupViTModel.from_pretrained(directory)
    change_scale(model)
    flush = saving.flush

    def full_disk(path: Path) -> None:
        if failing in path.name:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(saving, "flush", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        model.save_pretrained(directory, max_shard_size="200KB")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_saving_over_the_file_that_was_loaded(lib, directory):
    model = lib.GroupViTModel.from_pretrained(directory)
    change_scale(model)
    model.save_pretrained(directory)
    assert bits(lib.GroupViTModel.from_pretrained(directory)) == bits(model)


def test_shared_and_strided_tensors_are_written(tmp_path):
    model = GroupViTModel.from_pretrained(CASE)
    layers = model.vision_model.encoder.stages[0].layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    layers[0].mlp.fc2.weight = torch.nn.Parameter(layers[0].mlp.fc2.weight.detach().T.contiguous().T)
    model.save_pretrained(tmp_path)
    assert bits(GroupViTModel.from_pretrained(tmp_path)) == bits(model)


def test_arguments_of_saving(lib, tmp_path):
    model = loaded(lib)
    with pytest.raises(InputError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path, private=True)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_other_tensors_may_be_saved_in_place_of_a_torch_models(tmp_path):
    model = GroupViTModel.from_pretrained(CASE)
    with pytest.raises(CheckpointError, match="missing: logit_scale"):
        model.save_pretrained(tmp_path, state_dict={n: t for n, t in model.state_dict().items() if n != "logit_scale"})
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=state)
    assert bits(tmp_path / WEIGHTS) == bits(state)


def test_a_subclass_is_saved_under_the_name_that_others_know(lib, tmp_path):
    class Mine(lib.GroupViTTextModel):
        pass

    Mine(lib.GroupViTTextConfig.from_pretrained(CASE)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GroupViTTextModel"]


def test_from_the_hub_and_back(lib, tmp_path, monkeypatch):
    files = {name: (CASE / name).read_bytes() for name in ("config.json", WEIGHTS)}
    with FakeHub() as server:
        point_to(server.url, monkeypatch)
        server.add("org/name", files)
        where = {"cache_dir": tmp_path / "cache", "token": server.write_token}
        model = lib.GroupViTTextModel.from_pretrained("org/name", **where)
        assert bits(model) == bits(text_part(load_file(CASE / WEIGHTS)))
        model.push_to_hub("org/copy", token=server.write_token, max_shard_size="20KB")
        assert bits(lib.GroupViTTextModel.from_pretrained("org/copy", **where)) == bits(model)
        model.save_pretrained(tmp_path / "third", push_to_hub=True, token=server.write_token, revision="dev")
        assert (tmp_path / "third" / WEIGHTS).is_file()
        assert bits(lib.GroupViTTextModel.from_pretrained("me/third", revision="dev", **where)) == bits(model)
        huggingface_hub.close_session()


# -- the rest --


def test_gradient_checkpointing_is_switched_for_all_parts(lib):
    model = loaded(lib)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = model.modules() if isinstance(model, torch.nn.Module) else model._flatten_layers(include_self=False)
    flags = [part.gradient_checkpointing for part in parts if hasattr(part, "gradient_checkpointing")]
    assert len(flags) == 1 + len(model.config.vision_config.depths)
    assert all(flags)
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_trainable_parameters_are_counted(lib):
    model = loaded(lib)
    if isinstance(model, torch.nn.Module):
        freeze = model.text_model.requires_grad_
    else:
        freeze = functools.partial(setattr, model.text_model, "trainable")
    text = lib.GroupViTTextModel.from_pretrained(CASE).num_parameters()
    freeze(False)
    try:
        assert model.num_parameters(only_trainable=True) == model.num_parameters() - text
    finally:
        freeze(True)


# -- from one backend to the other --


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [("torch", "tf", dtype) for dtype in ("float32", "float16", "bfloat16", "float64")] + [("tf", "torch", "float32")],
)
def test_a_round_trip_through_the_other_backend_keeps_every_bit(small, tmp_path, first, second, dtype):
    first, second = (importlib.import_module(f"groupvit_{name}").GroupViTModel for name in (first, second))
    case, size = (CASE, "300KB") if dtype == "float32" else (small, "4KB")
    first.from_pretrained(case, dtype=dtype).save_pretrained(tmp_path / "a", max_shard_size=size)
    second.from_pretrained(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b", max_shard_size=size)
    first.from_pretrained(tmp_path / "b", dtype="auto").save_pretrained(tmp_path / "c")
    assert len(list((tmp_path / "a").iterdir())) > 4
    # The files themselves are the same, config.json too.
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    whole = {
        name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t
        for name, t in load_file(case / WEIGHTS).items()
    }
    assert bits(tmp_path / "c" / WEIGHTS) == bits(whole)
