"""Every format in and out: files of other programs, round trips, refusals, and the state after a failure."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conversion import convert as conversion_convert
from conversion.checkpoint import locate, read
from conversion.formats import nvlabs
from conversion.names import EXTRA, entries
from conversion.registry import FILE_ENDINGS, FORMATS, TARGETS
from conversion.source import Info, Opened, Piece, open_source
from conversion.torch_file import read_torch_file
from conversion.verify import deciding_settings
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from tests.support.backends import Backend
from tests.support.models import random_checkpoint, smallest_config
from tests.support.paths import REFERENCE

CASE = REFERENCE / "transformers" / "legacy_eos"
NVLABS = REFERENCE / "nvlabs"
NVLABS_CASES = ("nv_three_stage", "nv_two_stage")

# Largest difference over the array's largest value: the same program in float32, other orders of summation (as in
# test_parity.py).
FLOAT32 = 1e-5
GRADIENT = 1e-4

Arrays = dict[str, np.ndarray]

# What is verified has tests of its own (test_verify.py); these hold the files against others.
convert = partial(conversion_convert.convert, verify=False)
DESTINATIONS = {
    "native": "native",
    "transformers-tf": "tf",
    "transformers-tf-safetensors": "tf-safetensors",
    "pytorch": "bin",
    "nvlabs": "x.pth",
    "keras": "x.keras",
    "keras-weights": "x.weights.h5",
}


def values(path: Path, **options: Any) -> Arrays:
    checkpoint = read(path, **options)
    return {name: checkpoint.value(name) for name in checkpoint.tensors}


def assert_same(actual: Arrays, expected: Arrays) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


# -- files of other programs -------------------------------------------------------------------------------------------


# Keras's own conversion of variables to arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("bin", "pytorch"),
        ("tf", "transformers-tf"),
        ("tf_safetensors", "transformers-tf-safetensors"),
        (".", "safetensors"),
    ],
)
def test_transformers_files_hold_the_same_model(tmp_path: Path, folder: str, kind: str) -> None:
    assert open_source(CASE / folder).format == kind
    done = convert(CASE / folder, tmp_path / "x")
    expected, actual = load_file(CASE / "model.safetensors"), load_file(tmp_path / "x" / "model.safetensors")
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if "tf" in kind and name.endswith("num_batches_tracked"):
            assert actual[name] == 0  # TensorFlow counts none
        else:
            assert actual[name].tobytes() == value.tobytes(), name
    assert any("counters are 0" in note for note in done.notes) == ("tf" in kind)
    config = GroupViTConfig.from_pretrained(tmp_path / "x")
    original = GroupViTConfig.from_pretrained(CASE)
    assert (config.text_config, config.vision_config) == (original.text_config, original.vision_config)


@pytest.mark.parametrize("case", NVLABS_CASES)
def test_the_authors_checkpoints_give_their_values(tmp_path: Path, backend: Backend, case: str) -> None:
    convert(NVLABS / case / "checkpoint.pth", tmp_path / "x")
    model = backend.load(tmp_path / "x")
    with np.load(NVLABS / case / "expected.npz") as archive:
        expected = dict(archive)
    texts = expected["text"] if expected["text"].ndim == 3 else expected["text"][:, None]
    pixels = expected["pixel_values"]
    vision = backend.call(model, pixel_values=pixels, input_ids=texts[:, 0], output_attentions=True).vision_model_output
    actual = {
        "image_x": backend.features(model, "image", pixel_values=pixels),
        "text_x": backend.features(model, "text", input_ids=texts[:, 0]),
        **{f"soft_assignment_{index}": value for index, value in enumerate(vision.attentions)},
    }
    if texts.shape[1] > 1:
        prompts = backend.features(model, "text", input_ids=texts[:, 1:].reshape(-1, texts.shape[-1]))
        actual["text_multi_label_x"] = prompts.reshape(*texts[:, 1:].shape[:2], -1)
    classes = expected["class_text"]
    embeds = backend.features(model, "text", input_ids=classes.reshape(-1, classes.shape[-1]))
    # The authors' rule: the mean of the templates' features as they are, then normalised.
    actual["class_embedding"] = unit(embeds.reshape(*classes.shape[:2], -1).mean(axis=1))
    assert set(actual) == {name for name in expected if "loss" not in name and not name.startswith("grad.")} - {
        "pixel_values",
        "text",
        "class_text",
        "image_feat",
    }
    for name, value in actual.items():
        assert np.abs(value - expected[name]).max() <= FLOAT32 * np.abs(expected[name]).max(), name


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("case", NVLABS_CASES)
def test_the_authors_losses_and_gradients(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    from groupvit_torch import GroupViTModel
    from groupvit_torch.loss import contrastive_loss, multi_label_contrastive_loss

    convert(NVLABS / case / "checkpoint.pth", tmp_path / "x")
    model = GroupViTModel.from_pretrained(tmp_path / "x")
    stored = values(tmp_path / "x")
    with np.load(NVLABS / case / "expected.npz") as archive:
        expected = dict(archive)
    texts = torch.from_numpy(expected["text"])
    texts = texts if texts.ndim == 3 else texts[:, None]
    images = model.get_image_features(torch.from_numpy(expected["pixel_values"]))
    words = model.get_text_features(texts.flatten(0, 1)).unflatten(0, texts.shape[:2])
    losses = {"contrastive_loss": contrastive_loss(images, words[:, 0], model.logit_scale.exp())}
    gradients = {}
    if "multi_label_loss" in expected:
        scale = torch.tensor(stored[EXTRA], requires_grad=True)
        losses["multi_label_loss"] = multi_label_contrastive_loss(images, words[:, 1:], scale.exp())
        gradients[EXTRA] = scale
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert abs(loss.item() - expected[name]) <= FLOAT32 * abs(expected[name]), name
    gradients = {name: tensor.grad.numpy() for name, tensor in {**dict(model.named_parameters()), **gradients}.items()}
    # The authors' names and layout, by the table that converts weights.
    from conversion.names import from_parts

    config = GroupViTConfig.from_pretrained(tmp_path / "x")
    largest = max(np.abs(value).max() for name, value in expected.items() if name.startswith("grad."))
    compared = 0
    for entry in entries(nvlabs.NAMING, config, EXTRA in stored):
        if f"grad.{entry.foreign}" not in expected:
            continue
        actual, wanted = from_parts(entry, gradients.__getitem__), expected[f"grad.{entry.foreign}"]
        # Some are zero by mathematics (of biases before a softmax or a norm): what is left there is rounding.
        limit = GRADIENT * max(np.abs(wanted).max(), 1e-3 * largest)
        assert np.abs(actual - wanted).max() <= limit, entry.foreign
        compared += 1
    assert compared == sum(name.startswith("grad.") for name in expected)


@pytest.mark.parametrize("case", NVLABS_CASES)
def test_what_is_written_for_the_authors_code_is_theirs(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    original = read_torch_file(NVLABS / case / "checkpoint.pth")
    convert(NVLABS / case / "checkpoint.pth", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "x.pth", "nvlabs")
    written = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    state = written["model"]
    assert {n: (tuple(t.shape), str(t.dtype)) for n, t in state.items()} == {
        name: (tensor.shape, f"torch.{tensor.dtype}") for name, tensor in original.content["model"].items()
    }
    for name, tensor in original.content["model"].items():
        assert state[name].numpy().tobytes() == original.read(tensor).tobytes(), name
    image = written["config"]["model"]["img_encoder"]
    assert image["num_heads"] == [
        GroupViTConfig.from_pretrained(tmp_path / "native").vision_config.num_attention_heads
    ] * len(image["depths"])


def test_the_authors_settings_and_tensors_must_agree(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = read_torch_file(NVLABS / "nv_two_stage" / "checkpoint.pth")
    state = {name: torch.from_numpy(file.read(tensor)) for name, tensor in file.content["model"].items()}

    def refused(says: str, weights: Any = state, **image: Any) -> None:
        torch.save({"model": weights, "config": {"model": {"img_encoder": image}}}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / "x.pth")

    refused("does not say how many attention heads")  # 36 wide
    refused("embed_dim = 384, its tensors 36", num_heads=4, embed_dim=384)
    refused(r"depths = \[1, 1\], its tensors \[2, 1\]", num_heads=4, depths=[1, 1])
    refused("different widths", num_heads=4, embed_factors=[1, 2])
    refused("different numbers of heads", num_heads=[4, 6])
    refused("multiple of num_attention_heads", num_heads=5)
    short = {name: value for name, value in state.items() if name != "img_encoder.layers.0.blocks.1.attn.qkv.bias"}
    refused("1 missing: img_encoder.layers.0.blocks.1.attn.qkv.bias", short, num_heads=4)
    refused(
        r"no tensor img_encoder\.patch_embed\.proj\.weight", {"img_encoder.pos_embed": state["img_encoder.pos_embed"]}
    )
    torch.save({"model": state, "config": {"model": {"img_encoder": {"num_heads": 4}}}}, tmp_path / "x.pth")
    assert_same(values(tmp_path / "x.pth"), values(NVLABS / "nv_two_stage" / "checkpoint.pth"))
    config = read(NVLABS / "nv_two_stage" / "checkpoint.pth").config
    torch.save(state, tmp_path / "x.pth")
    assert read(tmp_path / "x.pth", config=config).config == config


# -- round trips -------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> GroupViTConfig:
    """Small models; half of them such as the authors' code has."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    authors = draw(st.booleans())
    stages = number(1, 3)
    tokens = [number(1, 5) for _ in range(stages - 1)] + [0]
    heads, patch = number(1, 2), number(1, 3)
    width = heads * number(2, 4)
    text_width = 64 if authors else 6
    vocabulary = number(5, 9)
    return GroupViTConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width if authors else number(1, 5),
            "num_hidden_layers": number(1 if authors else 0, 2),
            "num_attention_heads": 1 if authors else 3,
            "max_position_embeddings": number(1, 4),
            "eos_token_id": vocabulary - 1,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width if authors else number(1, 9),
            "depths": [number(0, 2) for _ in range(stages)],
            "num_group_tokens": tokens,
            "num_output_groups": [*tokens[:-1], 1],
            "num_attention_heads": heads,
            "image_size": patch * number(1, 3),
            "patch_size": patch,
            "hidden_act": "gelu" if authors else "relu",
        },
        projection_dim=number(1, 4),
        projection_intermediate_dim=number(1, 4),
    )  # fmt: skip


def round_trips(config: GroupViTConfig, seed: int, extra: bool, order: list[str], verify: bool) -> None:
    """native -> all formats, each from the one before, in any order, each with its own configuration."""
    with tempfile.TemporaryDirectory() as folder:
        native = random_checkpoint(Path(folder) / "source", config, seed, extra)
        expected = values(native)
        assert (EXTRA in expected) == extra
        path = native
        authors = config.vision_config.hidden_act == "gelu"
        for to in order:
            if to == "nvlabs" and not authors:
                with pytest.raises(
                    InputError, match=r"the authors' code, .*, has no model with vision_config\.hidden_act"
                ):
                    convert(path, Path(folder) / "x.pth", "nvlabs")
                continue
            target = "keras" if to.startswith("keras") else to
            done = convert(path, Path(folder) / DESTINATIONS[to], target, verify=verify)
            assert [note for note in done.notes if "no tokenizer" not in note] == []
            path = done.destination
            found = read(path)
            assert_same({name: found.value(name) for name in found.tensors}, expected)
            assert deciding_settings(found.config) == deciding_settings(config)
        files = sorted(item.name for item in Path(folder).iterdir())
        assert not [name for name in files if name.startswith(".")]


CASES = {
    "config": configs(),
    "seed": st.integers(0, 2**32),
    "extra": st.booleans(),
    "order": st.permutations(sorted(DESTINATIONS)),
}


# Without shrinking, which takes minutes: the models are small as they are.
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(**CASES)
def test_round_trips_change_no_bit(config: GroupViTConfig, seed: int, extra: bool, order: list[str]) -> None:
    round_trips(config, seed, extra, order, verify=False)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(**CASES)
def test_many_round_trips_change_no_bit(config: GroupViTConfig, seed: int, extra: bool, order: list[str]) -> None:
    round_trips(config, seed, extra, order, verify=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config(), dtype=dtype)
    expected = values(source)
    for to, name in (("pytorch", "bin"), ("keras", "x.keras"), ("native", "native"), ("transformers-tf", "tf")):
        if (to, dtype) == ("transformers-tf", "bfloat16"):
            with pytest.raises(InputError, match="have no bfloat16"):
                convert(source, tmp_path / name, to)
            assert not (tmp_path / name).exists()
        else:
            assert_same(values(convert(source, tmp_path / name, to).destination), expected)
    assert read(tmp_path / "native").dtype == dtype
    assert json.loads((tmp_path / "native" / "config.json").read_text())["torch_dtype"] == dtype


def test_casting_is_that_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = random_checkpoint(tmp_path / "source", smallest_config(), dtype="float64")
    for dtype in ("float32", "float16", "bfloat16"):
        for name, value in values(source).items():
            cast = values(source, dtype=dtype)[name] if name == "logit_scale" else None
            if cast is not None:
                wanted = torch.from_numpy(value).float().to(getattr(torch, dtype)).double().item()
                assert float(cast) == wanted
    large = values(source) | {"logit_scale": np.asarray(1e6)}
    save_file(large, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="values in logit_scale that are too large for float16"):
        convert(source, tmp_path / "x", dtype="float16")


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("native", "model.safetensors"),
        ("pytorch", "pytorch_model.bin"),
        ("transformers-tf", "tf_model.h5"),
        ("transformers-tf-safetensors", "model.safetensors"),
    ],
)
def test_shards_that_are_written(tmp_path: Path, to: Any, name: str) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config(), extra=True)
    done = convert(source, tmp_path / "x", to, max_shard_size="4KB")
    index = json.loads((tmp_path / "x" / f"{name}.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    stem, suffix = name.split(".")
    assert shards[1] == f"{stem}-00002-of-{len(shards):05d}.{suffix}"
    assert {file.name for file in done.files} == {
        *shards, f"{name}.index.json", "config.json", "conversion_report.json"
    }  # fmt: skip
    assert index["metadata"]["total_size"] <= sum((tmp_path / "x" / shard).stat().st_size for shard in shards)
    assert_same(values(tmp_path / "x"), values(source))


def test_shards_of_other_programs(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config())
    convert(source, tmp_path / "bin", "pytorch")
    torch = pytest.importorskip("torch")
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    names, weight_map = sorted(state), {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in chosen}, tmp_path / "bin" / shard)
        weight_map |= dict.fromkeys(chosen, shard)
    index = tmp_path / "bin" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(values(tmp_path / "bin"), values(source))
    assert_same(values(index), values(source))
    (tmp_path / "bin" / shard).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the shards"):
        read(index)
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../../etc/passwd.bin"}}))
    with pytest.raises(CheckpointError, match=r"no index of \.bin files beside it"):
        read(index)


# -- what other programs read ------------------------------------------------------------------------------------------


def layout(path: Path) -> dict[str, Any]:
    """Paths, shapes and dtypes of an HDF5 file, with the model's instance number left out."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name.replace("tf_group_vi_t_model_2", "tf_group_vi_t_model")] = item.shape, item.dtype

        file.visititems(visit)
        for place in ("/", "groupvit", "top_level_model_weights"):
            for name, value in file[place].attrs.items():
                if not name.endswith(".num_batches_tracked"):
                    texts = [
                        str(text).replace("tf_group_vi_t_model_2", "tf_group_vi_t_model")
                        for text in np.atleast_1d(value)
                    ]
                    found[f"{place}@{name}"] = sorted(texts)
    return found  # fmt: skip


def test_tensorflow_files_are_laid_out_as_transformers_lays_them_out(tmp_path: Path) -> None:
    convert(CASE / "model.safetensors", tmp_path / "tf", "transformers-tf")
    assert layout(tmp_path / "tf" / "tf_model.h5") == layout(CASE / "tf" / "tf_model.h5")
    with h5py.File(tmp_path / "tf" / "tf_model.h5") as ours, h5py.File(CASE / "tf" / "tf_model.h5") as theirs:
        for name in theirs["groupvit"].attrs["weight_names"]:
            mine = name.replace("tf_group_vi_t_model_2", "tf_group_vi_t_model")
            np.testing.assert_array_equal(ours["groupvit"][mine], theirs["groupvit"][name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keras_loads_what_is_written(tmp_path: Path, dtype: str) -> None:
    keras = pytest.importorskip("keras")
    from groupvit_tf import GroupViTModel
    from groupvit_tf.checkpoint import canonical_variables, from_canonical, kind

    config = smallest_config()
    source = random_checkpoint(tmp_path / "source", config, extra=True, dtype=dtype)
    convert(source, tmp_path / "x.keras", "keras")
    convert(source, tmp_path / "x.weights.h5", "keras")
    loaded, filled = keras.models.load_model(tmp_path / "x.keras"), GroupViTModel(config, dtype=dtype)
    filled.load_weights(tmp_path / "x.weights.h5")
    assert loaded.config.to_dict() == read(source).config.to_dict()
    expected = values(source)
    for model in (loaded, filled):
        assert model.dtype_policy.name == dtype
        for name, variable in canonical_variables(model).items():
            wanted = from_canonical(kind(variable), expected[name])
            np.testing.assert_array_equal(np.asarray(variable).astype(np.float64), wanted.astype(np.float64), name)


def test_what_keras_wrote_after_training_is_read(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    from groupvit_tf import GroupViTModel
    from tests.support.models import smallest_inputs

    model = GroupViTModel(smallest_config())
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), run_eagerly=True)
    model.fit(smallest_inputs(), batch_size=4, verbose=0)
    model.save(tmp_path / "x.keras")
    model.save_weights(tmp_path / "x.weights.h5")
    model.save_pretrained(tmp_path / "native")
    for name in ("x.keras", "x.weights.h5"):
        assert_same(values(tmp_path / name, config=smallest_config()), values(tmp_path / "native"))
    assert read(tmp_path / "x.keras").config == model.config


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = random_checkpoint(tmp_path / "source", smallest_config(), dtype="bfloat16")
    convert(source, tmp_path / "bin", "pytorch")
    path = tmp_path / "bin" / "pytorch_model.bin"
    state, mapped = torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)
    for name, value in values(source).items():
        for tensor in (state[name], mapped[name]):
            assert str(tensor.dtype) == f"torch.{value.dtype.name}"
            np.testing.assert_array_equal(tensor.double().numpy(), value.astype(np.float64))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_no_framework_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("h5py", "torch", "tensorflow", "keras", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from conversion.convert import convert
case, out = Path({str(CASE)!r}), Path({str(tmp_path)!r})
convert(case / "bin", out / "a")
del sys.modules["h5py"]  # the formats of TensorFlow and Keras are HDF5
convert(case / "tf", out / "b")
convert(out / "a", out / "c", "transformers-tf")
convert(out / "a", out / "d.keras", "keras")
convert(out / "a", out / "e", "pytorch")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REFERENCE.parents[1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_directory_must_hold_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; it has no files"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path / "nothing")
    shutil.copy(CASE / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json beside it"):
        read(tmp_path)
    shutil.copy(CASE / "bin" / "pytorch_model.bin", tmp_path)
    with pytest.raises(CheckpointError, match=r"2 checkpoints, model\.safetensors, pytorch_model\.bin: name the file"):
        read(tmp_path)
    assert read(tmp_path / "pytorch_model.bin", config=CASE).source.format == "pytorch"


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    shutil.copy(CASE / "config.json", tmp_path)
    tensors = load_file(CASE / "model.safetensors")
    path = tmp_path / "model.safetensors"

    def refused(says: str, changed: Arrays, **options: Any) -> None:
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=says):
            convert(tmp_path, tmp_path / "x", **options)
        assert not (tmp_path / "x").exists()

    refused("1 left over: head.weight", tensors | {"head.weight": np.zeros(2)})
    refused("1 missing: logit_scale", {name: value for name, value in tensors.items() if name != "logit_scale"})
    refused(r"1 of another shape: logit_scale \[1\] in the file, \[\] expected", tensors | {"logit_scale": np.ones(1)})
    refused("logit_scale as int64, expected floating", tensors | {"logit_scale": np.asarray(1)})
    refused("NaN or infinite values in logit_scale", tensors | {"logit_scale": np.asarray(np.nan, np.float32)})
    wrong = GroupViTConfig.from_pretrained(CASE)
    wrong.vision_config.depths = [1, 1, 2]
    refused("missing: vision_model.encoder.stages.2.layers.1", tensors, config=wrong)
    name = "text_model.final_layer_norm.weight"
    less = {key: value for key, value in tensors.items() if key != name} | {"head.weight": np.zeros(2)}
    refused("1 missing.*1 left over", less)
    done = convert(tmp_path, tmp_path / "x", allow_missing=["head.*", "*.final_layer_norm.weight"])
    assert done.notes[:-1] == [f"{name} was missing and has a default value now"]
    assert values(tmp_path / "x")[name].tolist() == [1.0] * len(tensors[name])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"to": "onnx"}, InputError, "converted to one of native, .*got 'onnx'"),
        ({"to": "keras"}, InputError, r"ends in \.keras or \.weights\.h5, not 'x'"),
        ({"to": "nvlabs"}, InputError, r"ends in \.pth"),
        ({"dtype": "int8"}, InputError, "dtype must be"),
        ({"max_shard_size": "big"}, InputError, "max_shard_size"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        convert(CASE / "model.safetensors", tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []
    assert "native" in TARGETS


def test_what_is_there_is_replaced_only_if_asked_for_and_only_by_something_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = random_checkpoint(tmp_path / "x", smallest_config(), 1)
    (tmp_path / "x.keras").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def unchanged() -> bool:
        return before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for to, name in (("native", "x"), ("keras", "x.keras")):
        with pytest.raises(CheckpointError, match="is there already; pass overwrite"):
            convert(CASE / "bin", tmp_path / name, to)
        assert unchanged()
    (tmp_path / "y.keras").mkdir()
    with pytest.raises(InputError, match=r"keras is a file, and .* is a directory"):
        convert(CASE / "bin", tmp_path / "y.keras", "keras", overwrite=True)
    with pytest.raises(InputError, match="holds the source itself"):
        convert(old, old, overwrite=True)

    def broken(done: int, total: int) -> None:
        assert done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    for to, name in (("native", "x"), ("transformers-tf", "x"), ("pytorch", "x"), ("keras", "x.keras")):
        with pytest.raises(KeyboardInterrupt):
            convert(CASE / "bin", tmp_path / name, to, overwrite=True, progress=broken)
        assert unchanged()
    # The last moment: the new directory is complete, and cannot be given its name, where the two are not exchanged at
    # once.
    monkeypatch.setattr("conversion.destination._exchanged", lambda one, other: False)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, to) if ".old" in f"{path}{to}" else fail())
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(CASE / "bin", tmp_path / "x", overwrite=True)
    monkeypatch.undo()
    assert unchanged()

    convert(CASE / "bin", tmp_path / "x", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "conversion_report.json",
        "model.safetensors",
    ]
    convert(CASE / "bin", tmp_path / "x.keras", "keras", overwrite=True)
    assert_same(values(tmp_path / "x"), values(CASE / "bin"))
    assert_same(values(tmp_path / "x.keras"), values(CASE / "bin"))


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """--overwrite of somebody's folder must not empty it."""
    home = tmp_path / "home"
    (home / ".git").mkdir(parents=True)
    (home / "thesis.txt").write_text("years")
    for to in ("native", "savedmodel"):
        with pytest.raises(InputError, match=r"home holds what no conversion writes \(\.git, thesis\.txt\)"):
            convert(CASE / "bin", home, to, overwrite=True)
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "link.keras").symlink_to(home / "thesis.txt")
    for name, to in (("link", "native"), ("link.keras", "keras")):
        with pytest.raises(InputError, match="is a symbolic link, which is not replaced"):
            convert(CASE / "bin", tmp_path / name, to, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years"
    # Nor of a folder of checkpoints, nor of a model with a page of its own.
    for name in ("a.pth", "b.keras", "README.md", "variables"):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / name).write_bytes(b"mine")
        with pytest.raises(InputError, match=rf"models holds what no conversion writes \({name}\)"):
            convert(CASE / "bin", tmp_path / "models", overwrite=True)
        shutil.rmtree(tmp_path / "models")
    (tmp_path / "empty").mkdir()
    convert(CASE / "bin", tmp_path / "empty", overwrite=True)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the authors' code, .*, has no model"):
        convert(random_checkpoint(tmp_path / "source", smallest_config()), tmp_path / "a" / "b" / "x.pth", "nvlabs")
    for name in ("x" * 300, "x" * 250):
        with pytest.raises(CheckpointError, match=r"cannot be written: File name too long"):
            convert(CASE / "bin", tmp_path / name)
        with pytest.raises(CheckpointError):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config\.json/x cannot be written"):
        convert(CASE / "bin", tmp_path / "source" / "config.json" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("moment", [0.2, 0.8])
def test_a_conversion_that_the_system_ends_clears_up(tmp_path: Path, moment: float) -> None:
    """SIGTERM while the weights are written; the old file stays."""
    (tmp_path / "x.keras").write_bytes(b"mine")
    code = f"""
import os, signal
from conversion.writing import Job
from groupvit_common.cli import main
value = Job.value
def killed(job, name):
    if job.done >= {moment} * job.total:
        os.kill(os.getpid(), signal.SIGTERM)
    return value(job, name)
Job.value = killed
main(["convert", {str(CASE / "bin")!r}, {str(tmp_path / "x.keras")!r}, "--to", "keras", "--overwrite", "--no-verify"])
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REFERENCE.parents[1], capture_output=True).returncode == 143
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.keras", b"mine")]


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """A model of 60 MB, the largest tensor 6 MB, through every format: far below the size of the weights."""
    config = GroupViTConfig(
        text_config={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "vocab_size": 3000,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "eos_token_id": 2999,
        },
        vision_config={"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "image_size": 64},
    )
    source = random_checkpoint(tmp_path / "source", config)
    weights = sum(path.stat().st_size for path in source.iterdir())
    assert weights > 60e6
    code = f"""
import resource
from pathlib import Path
from conversion.convert import convert
import h5py, ml_dtypes
out = Path({str(tmp_path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = "source"
names = {{"pytorch": "bin", "transformers-tf": "tf", "keras": "x.keras", "nvlabs": "x.pth", "native": "n"}}
for to, name in names.items():
    convert(out / source, out / name, to, verify=False)
    source = name
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REFERENCE.parents[1], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < weights / 2


def test_every_row_of_the_registry_has_its_module() -> None:
    for spec in FORMATS:
        functions = ["write"] if spec.container == "directory" else ["detect", "read", "write"]
        assert all(callable(getattr(spec.code, name)) for name in functions), spec.name
        assert not spec.program or callable(spec.code.program_values)
        assert spec.container == "directory" or spec.code.NAMING.towers


def test_a_container_of_a_new_row_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.new").write_bytes(b"new")
    monkeypatch.setattr("conversion.magic.container", lambda path: "new")
    with pytest.raises(CheckpointError, match=r"x\.new is a new file, but of no format that is read here"):
        open_source(tmp_path / "x.new")
    piece = Piece({"weight": Info((1,), "float32")}, lambda name: np.ones(1, np.float32))
    code = SimpleNamespace(detect=lambda files: True, read=lambda files: Opened([piece]), NAMING=nvlabs.NAMING)
    monkeypatch.setattr("conversion.source.FORMATS", (*FORMATS, SimpleNamespace(name="n", container="new", code=code)))
    source = open_source(tmp_path / "x.new")
    assert (source.format, source.value("weight").tolist()) == ("n", [1.0])


def test_names_of_files_are_never_looked_for_on_the_hub() -> None:
    for ending in FILE_ENDINGS:
        assert locate(f"folder/x{ending}") == Path(f"folder/x{ending}")


def test_no_save_changes_the_source_while_it_is_read(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    source = random_checkpoint(tmp_path / "source", smallest_config())
    descriptor = os.open(source, os.O_RDONLY)
    seen = []

    def try_to_lock(_: object) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(True)

    convert(source, tmp_path / "x", opened=try_to_lock)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    assert seen == [True]


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    for to, name in (("native", "n"), ("keras", "x.keras"), ("transformers-tf", "tf"), ("pytorch", "bin")):
        seen: list[tuple[int, int]] = []
        convert(CASE, tmp_path / name, to, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert len(seen) > 100
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1]


def test_tokenizer_and_processor_go_along(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config())
    (source / "merges.txt").write_text("a b")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "other.txt").write_text("no")
    for to in ("native", "transformers-tf", "pytorch"):
        done = convert(source, tmp_path / to, to)
        assert (tmp_path / to / "merges.txt").read_text() == "a b"
        assert (tmp_path / to / "preprocessor_config.json").exists()
        assert not (tmp_path / to / "other.txt").exists()
        (note,) = done.notes
        assert note.startswith("with it: preprocessor_config.json, merges.txt, which cannot be used as they are: ")


def test_a_processor_from_elsewhere(tmp_path: Path) -> None:
    from groupvit_common.preprocessing.processor import GroupViTProcessor
    from groupvit_common.segmentation.predictor import DEMO_MODEL

    config = smallest_config().to_dict()
    config["text_config"] |= {"vocab_size": 640, "bos_token_id": 638, "eos_token_id": 639}
    source = random_checkpoint(tmp_path / "source", GroupViTConfig.from_dict(config))
    assert "there is no tokenizer" in convert(source, tmp_path / "x").notes[-1]
    done = convert(source, tmp_path / "x", processor=DEMO_MODEL, overwrite=True)
    assert done.notes[-1].startswith("with it: preprocessor_config.json, ")
    assert "cannot be used" not in done.notes[-1]
    assert GroupViTProcessor.from_pretrained(tmp_path / "x")(text=["red"])["input_ids"]
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "y", processor=tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has 640 tokens, and the model knows \d+"):
        convert(NVLABS / "nv_two_stage" / "checkpoint.pth", tmp_path / "y", processor=DEMO_MODEL)
    with pytest.raises(InputError, match="keras has no place for a tokenizer"):
        convert(source, tmp_path / "y.keras", "keras", processor=DEMO_MODEL)
    assert not (tmp_path / "y").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "shards"),
    [
        ("x.keras", "keras", None),
        ("x.weights.h5", "keras", None),
        ("x/tf_model.h5", "transformers-tf", None),
        ("x/model.safetensors", "native", None),
        ("x/model.safetensors", "transformers-tf-safetensors", None),
        ("x/model.safetensors.index.json", "native", "4KB"),
        ("x/pytorch_model.bin.index.json", "pytorch", "4KB"),
    ],
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str, to: Any, shards: str | None) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config())
    convert(source, tmp_path / name.partition("/")[0], to, max_shard_size=shards)
    path, rng = tmp_path / name, random.Random(3)
    whole = path.read_bytes()
    for end in sorted({0, 1, 7, 40, 100, 600, *(rng.randrange(len(whole)) for _ in range(5))}):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=path.name):
            values(path, config=smallest_config())
    for _ in range(8):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 4, 30))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 0xFF, rng.randrange(256)))
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            values(path, config=smallest_config())


def test_values_in_other_files_are_not_fetched(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config())
    convert(source, tmp_path / "x.weights.h5", "keras")
    (tmp_path / "secret").write_bytes(b"\0" * 100)
    with h5py.File(tmp_path / "x.weights.h5", "a") as file:
        name = "layers/projection/output_layer/vars/1"
        del file[name]
        file.create_dataset(name, (6,), "f4", external=[(str(tmp_path / "secret"), 0, 24)])
    with pytest.raises(CheckpointError, match="are in another file"):
        read(tmp_path / "x.weights.h5", config=smallest_config())
    with h5py.File(tmp_path / "x.weights.h5", "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(CASE / "tf" / "tf_model.h5"), "/groupvit")
    with pytest.raises(CheckpointError, match=f"the values of {name} are in another file"):
        read(tmp_path / "x.weights.h5", config=smallest_config())


def test_a_shape_that_lies(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", smallest_config())
    convert(source, tmp_path / "x.weights.h5", "keras")
    with h5py.File(tmp_path / "x.weights.h5", "a") as file:
        del file["vars/0"]
        file.create_dataset("vars/0", (1 << 40,), "f4", chunks=(1024,))
    with pytest.raises(CheckpointError, match="fewer bytes than its shape"):
        read(tmp_path / "x.weights.h5", config=smallest_config())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"config.json": "{"}, "config.json of .* cannot be read as JSON"),
        ({"config.json": '{"class_name": "Sequential"}'}, "holds a Sequential"),
        ({"config.json": '{"class_name": "GroupViTModel"}'}, "has no configuration"),
        ({}, "has no config.json"),
    ],
)
def test_other_keras_files(tmp_path: Path, content: dict[str, str], says: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for name, text in {**content, "model.weights.h5": ""}.items():
            archive.writestr(name, text)
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path / "x.keras")


def test_an_hdf5_file_of_something_else(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["temperature"] = 20.0
    with pytest.raises(CheckpointError, match=r"neither transformers' tf_model\.h5 nor Keras 3's"):
        read(tmp_path / "x.h5")


# -- with others -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import huggingface_hub

    from tests.support.fake_hub import FakeHub, point_to

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with FakeHub() as server:
        point_to(server.url, monkeypatch)
        yield server
        huggingface_hub.close_session()


def test_a_source_on_the_hub(tmp_path: Path, hub: Any) -> None:
    config, safe = ((CASE / name).read_bytes() for name in ("config.json", "model.safetensors"))
    pickled, h5 = (CASE / "bin" / "pytorch_model.bin").read_bytes(), (CASE / "tf" / "tf_model.h5").read_bytes()
    common = {"config.json": config, "merges.txt": b"a b"}
    hub.add("org/all", {**common, "model.safetensors": safe, "pytorch_model.bin": pickled, "tf_model.h5": h5})
    hub.add("org/bin", {**common, "pytorch_model.bin": pickled, "tf_model.h5": h5})
    hub.add("org/old", {**common, "old/deep/tf_model.h5": h5, "old/deep/config.json": config, "README.md": b"#"})
    hub.add("org/pth", {"a.pth": (NVLABS / "nv_two_stage" / "checkpoint.pth").read_bytes()})
    hub.add("org/two", {"a.pth": b"", "b.pth": b""})

    def source_of(name: str) -> tuple[str, str]:
        checkpoint = read(name)
        return checkpoint.source.format, checkpoint.source.files[0].name

    convert("org/all", tmp_path / "x")
    assert_same(values(tmp_path / "x"), values(CASE))
    assert (tmp_path / "x" / "merges.txt").read_text() == "a b"
    assert source_of("org/all") == ("safetensors", "model.safetensors")
    assert not list((tmp_path / "cache").rglob("*.bin"))  # nothing that is not needed is fetched
    assert source_of("org/bin") == ("pytorch", "pytorch_model.bin")
    assert source_of("org/all/tf_model.h5") == ("transformers-tf", "tf_model.h5")
    assert source_of("org/old/old/deep/tf_model.h5") == ("transformers-tf", "tf_model.h5")
    assert source_of("org/pth") == ("nvlabs", "a.pth")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints \(a\.pth, b\.pth\): name .* as org/two/a\.pth"):
        read("org/two")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(README\.md, config\.json, merges\.txt\)"):
        read("org/old")
    with pytest.raises(CheckpointError, match="no repository of that name"):
        read("org/nothing")
    with pytest.raises(CheckpointError, match=r"'org/bin'.* has no revision 'v9'"):
        read("org/bin", revision="v9")


def test_shards_on_the_hub_and_a_cache_without_network(
    tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    for to in ("pytorch", "native"):
        convert(CASE, tmp_path / to, to, max_shard_size="60KB")
        files = {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()}
        hub.add(f"org/{to}", files)
        assert len(read(f"org/{to}").source.files) > 2
        assert_same(values(f"org/{to}"), values(CASE))
    hub.take_requests()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(values("org/pytorch"), values(CASE))
    assert hub.take_requests() == []
    with pytest.raises(CheckpointError, match="downloads are off"):
        read("org/other")


@pytest.mark.parametrize(("name", "to"), [("x", "native"), ("x.keras", "keras"), ("x.pth", "nvlabs")])
def test_a_result_is_sent_to_the_hub(
    tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, name: str, to: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    source = NVLABS / "nv_two_stage" / "checkpoint.pth"
    done = convert(source, tmp_path / name, to, push="me/converted")
    assert done.address
    assert "me/converted" in done.address
    assert_same(values("me/converted"), values(source))
    repository = hub.repositories["me/converted"]
    sent = repository.commits[repository.branches["main"]]
    assert sent["conversion_report.json"] == done.report.read_bytes()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"x.* is complete, but 'nobody/x' could not be sent"):
        convert(source, tmp_path / name, to, push="nobody/x", overwrite=True)
    assert_same(values(tmp_path / name), values(source))


@pytest.mark.slow
def test_a_saved_model(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    from groupvit_tf import GroupViTModel

    source = random_checkpoint(tmp_path / "source", smallest_config())
    convert(source, tmp_path / "saved", "savedmodel")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    actual = loaded.image_features(pixels)["image_features"].numpy()
    expected = np.asarray(GroupViTModel.from_pretrained(source).get_image_features(pixels))
    assert np.abs(actual - expected).max() <= FLOAT32 * np.abs(expected).max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
@pytest.mark.parametrize("to", ["native", "pytorch"])
def test_transformers_loads_what_is_written(tmp_path: Path, to: Any, shards: str) -> None:
    """Runs where transformers is installed, which the suite does not need."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    convert(CASE / "bin", tmp_path / "x", to, max_shard_size=shards)
    model, info = transformers.GroupViTModel.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(info.values())
    with np.load(CASE / "expected.npz") as expected, torch.no_grad():
        names = ("input_ids", "attention_mask", "pixel_values")
        logits = model.eval()(**{name: torch.from_numpy(expected[name]) for name in names}).logits_per_image.numpy()
        assert np.abs(logits - expected["logits_per_image"]).max() <= FLOAT32 * np.abs(logits).max()


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
@pytest.mark.parametrize("to", ["transformers-tf", "transformers-tf-safetensors"])
def test_tensorflow_transformers_loads_what_is_written(tmp_path: Path, to: Any, shards: str) -> None:
    """Runs where transformers 4 is installed with a TensorFlow that it supports."""
    model_class = getattr(pytest.importorskip("transformers"), "TFGroupViTModel", None)
    if model_class is None or getattr(model_class, "_backends", None):
        pytest.skip("this transformers has no TensorFlow")
    convert(CASE / "bin", tmp_path / "x", to, max_shard_size=shards)
    model, info = model_class.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(info.values())
    with np.load(CASE / "expected.npz") as expected:
        names = ("input_ids", "attention_mask", "pixel_values")
        logits = model(**{name: expected[name] for name in names}).logits_per_image.numpy()
        assert np.abs(logits - expected["logits_per_image"]).max() <= FLOAT32 * np.abs(logits).max()
