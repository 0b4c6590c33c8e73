"""Proof that two checkpoints are the same model, reports, `inspect`, and the three commands."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.checkpoint import read
from conversion.convert import convert
from conversion.describe import describe
from conversion.formats import native as native_format
from conversion.hdf5 import CONFIG_ATTRIBUTE
from conversion.outputs import sample_inputs
from conversion.report import REPORT_NAME
from conversion.verify import relative, verify
from conversion.writing import Job
from groupvit_common.cli import main
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from tests.conversion.test_convert import CASE, NVLABS, assert_same, values
from tests.support.models import random_checkpoint, smallest_config
from tests.support.paths import REFERENCE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# What float64 differs by between frameworks, in models as small as these; the default tolerance is 1e-9.
FLOAT64 = 1e-12


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A model with other numbers in every tensor, about as large as in trained ones."""
    directory = random_checkpoint(tmp_path / "native", smallest_config(), extra=True)
    change(directory, lambda arrays: {n: a if "running" in n or a.ndim < 2 else a / 4 for n, a in arrays.items()})
    return directory


def change(directory: Path, function: Any) -> None:
    path = directory / "model.safetensors"
    save_file(
        {name: np.array(value, order="C") for name, value in function(load_file(path)).items()}, path, {"format": "pt"}
    )


def edited(source: Path, directory: Path, name: str, function: Any) -> Path:
    """A copy with one tensor changed."""
    shutil.copytree(source, directory)
    change(directory, lambda arrays: {**arrays, name: function(arrays[name]).astype(arrays[name].dtype)})
    return directory


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["bin", "tf"])
def test_files_of_transformers_are_the_same_model(other: str) -> None:
    result = verify(CASE, CASE / other)
    assert result.passed
    assert result.backends == ["PyTorch", "PyTorch" if other == "bin" else "Keras"]
    assert (result.tensors, result.differing, result.rounded, result.notes, result.settings) == (198, [], 0, [], [])
    assert 0 <= result.largest <= FLOAT64
    assert result.pixels_alike == 1.0
    names = [row.name for row in result.rows]
    assert len(names) == len(set(names)) == 14  # three stages, two groupings, two text layers
    assert all(row.largest > 0 for row in result.rows)


def test_both_tensorflow_files_of_transformers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.verify.installed", lambda backend: False)
    result = verify(CASE / "tf", CASE / "tf_safetensors", config=CASE)
    assert (result.passed, result.tensors, result.differing) == (True, 198, [])


def test_the_outputs_compared_are_those_of_a_plain_call() -> None:
    """The rows' largest values are those of a plain call."""
    torch = pytest.importorskip("torch")
    from groupvit_torch import GroupViTModel

    model = GroupViTModel.from_pretrained(CASE, dtype="float64")
    inputs = {name: torch.from_numpy(value) for name, value in sample_inputs(model.config).items()}
    with torch.no_grad():
        outputs = model(**inputs, output_segmentation=True)
    rows = {row.name: row.largest for row in verify(CASE, CASE).rows}
    assert rows["logits"] == pytest.approx(outputs.logits_per_image.abs().max().item(), rel=FLOAT64)
    assert rows["segmentation logits"] == pytest.approx(outputs.segmentation_logits.abs().max().item(), rel=FLOAT64)


def test_inputs_are_those_of_a_seed() -> None:
    config = GroupViTConfig.from_pretrained(CASE)
    inputs, again, other = sample_inputs(config, 1), sample_inputs(config, 1), sample_inputs(config, 2)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, again[name])
    assert (inputs["pixel_values"] != other["pixel_values"]).all()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # The configuration is an early one: the end of text is the largest id, which comes once.
    end = config.text_config.vocab_size - 1
    assert ((ids == end).sum(axis=1) == 1).all()
    assert (ids.argmax(axis=1) + 1 == mask.sum(axis=1)).all()
    assert len(set(mask.sum(axis=1))) == len(ids)


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.stages.0.layers.0.mlp.fc1.bias",
        "visual_projection.1.running_var",
        "logit_scale",
        # No text of the sample need hold every word.
        "text_model.embeddings.token_embedding.weight",
    ],
)
def test_one_changed_number_is_found(tmp_path: Path, native: Path, name: str) -> None:
    def nudge(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.reshape(-1)[-3:] *= 1.001
        return changed

    result = verify(native, edited(native, tmp_path / "changed", name, nudge))
    assert [tensor.name for tensor in result.differing] == [name]
    assert 1e-9 < result.differing[0].relative < 2e-3
    assert not result.passed
    assert result.largest >= result.differing[0].relative
    assert verify(native, tmp_path / "changed", tolerance=1.0).passed


def test_a_setting_that_matters_is_found_by_what_it_does(tmp_path: Path, native: Path) -> None:
    shutil.copytree(native, tmp_path / "other")
    config = json.loads((native / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 0.01
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    result = verify(native, tmp_path / "other")
    assert result.settings == ["vision_config.layer_norm_eps: 1e-05 | 0.01"]
    assert not result.differing
    assert not result.passed
    rows = {row.name: row.difference for row in result.rows}
    assert rows["text features"] == 0
    assert rows["image features"] > 0


def test_the_configuration_that_was_written_is_the_one_that_is_verified(
    tmp_path: Path, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Job.config_text
    monkeypatch.setattr(
        Job, "config_text", lambda job: text(job).replace('"hidden_act": "gelu"', '"hidden_act": "relu"')
    )
    with pytest.raises(CheckpointError, match=r"configuration: vision_config\.hidden_act: \"gelu\" \| \"relu\""):
        convert(native, tmp_path / "x")


def test_a_configuration_of_the_other_side(tmp_path: Path, native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of Keras's own `save_weights` have none."""
    monkeypatch.setattr("conversion.verify.installed", lambda backend: False)
    weights = convert(native, tmp_path / "x.weights.h5", verify=False).destination
    with h5py.File(weights, "a") as file:
        del file.attrs[CONFIG_ATTRIBUTE]
    assert verify(native, weights).passed
    assert verify(weights, native).passed
    assert verify(weights, weights, config=native).passed
    with pytest.raises(CheckpointError, match=r"pass a configuration \(--config\)"):
        verify(weights, weights)


def test_a_model_without_groups(tmp_path: Path) -> None:
    config = smallest_config().to_dict()
    config["vision_config"] |= {"depths": [1], "num_group_tokens": [0], "num_output_groups": [1]}
    source = random_checkpoint(tmp_path / "source", GroupViTConfig.from_dict(config))
    done = convert(source, tmp_path / "x.keras", "keras").verification
    assert done is not None
    assert done.passed
    assert done.pixels_alike is None
    for model in backends():
        with pytest.raises(InputError, match=r"without group tokens \(num_group_tokens \[0\]\) has no segmentation"):
            model.from_pretrained(source)(**sample_inputs(read(source).config), output_segmentation=True)


def backends() -> list[Any]:
    import groupvit_tf
    import groupvit_torch

    return [groupvit_torch.GroupViTModel, groupvit_tf.GroupViTModel]


def test_a_configuration_that_asks_for_no_end_of_layers(native: Path) -> None:
    config = json.loads((native / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1000
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has 1001 layers, and there are \d+ tensors in it"):
        read(native)


def test_types_that_a_target_does_not_have(tmp_path: Path, native: Path) -> None:
    change(native, lambda arrays: {n: a.astype(np.float16) if a.ndim == 2 else a for n, a in arrays.items()})
    with pytest.raises(InputError, match=r"one type for all its numbers, and there are float16, float32: pass dtype"):
        convert(native, tmp_path / "x.keras", "keras")
    for to, name in (("keras", "x.weights.h5"), ("pytorch", "bin"), ("native", "x"), ("transformers-tf", "tf")):
        convert(native, tmp_path / name, to, verify=False)
        assert_same(values(tmp_path / name), values(native))
    with pytest.raises(InputError, match="a SavedModel computes in float32: leave dtype"):
        convert(native, tmp_path / "saved", "savedmodel", dtype="float16")
    with pytest.raises(InputError, match="keras is never in shards: leave max_shard_size"):
        convert(native, tmp_path / "x.keras", "keras", max_shard_size="1MB")


def test_models_of_different_sizes(native: Path) -> None:
    result = verify(native, CASE)
    assert not result.passed
    assert not result.rows
    assert "vision_config.hidden_size: 12 | 24" in result.settings
    assert list(result.lines())[-1] == "NOT the same model: they are of different sizes"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_told_and_not_held_against_the_result(tmp_path: Path, native: Path, dtype: str) -> None:
    result = convert(native, tmp_path / "x", dtype=dtype).verification
    assert result is not None
    assert result.passed
    assert result.largest <= FLOAT64
    assert result.rounded_to == [dtype]
    assert result.rounded == result.tensors - 2  # all but the counters
    assert all(row.rounding > 0 for row in result.rows)
    # And from the other side: the wider one is still the one that is rounded.
    back = verify(tmp_path / "x", native)
    assert back.passed
    assert [row.rounding for row in back.rows] == pytest.approx([row.rounding for row in result.rows], rel=1e-6)
    widened = convert(tmp_path / "x", tmp_path / "wide", dtype="float64").verification
    assert widened is not None
    assert widened.rounded_to == [dtype]


def test_two_narrow_types(tmp_path: Path, native: Path) -> None:
    """Neither holds the other: B is taken to come from A."""
    convert(native, tmp_path / "half", dtype="float16", verify=False)
    convert(tmp_path / "half", tmp_path / "brain", dtype="bfloat16")
    assert verify(tmp_path / "half", tmp_path / "brain").passed
    assert not verify(tmp_path / "brain", tmp_path / "half").passed


def test_infinite_and_missing_numbers_are_no_small_difference() -> None:
    assert relative(math.nan, 1.0) == math.inf
    assert relative(0.0, 0.0) == 0.0
    assert relative(1e-30, 0.0) > 0


def test_arguments_that_cannot_be_used(tmp_path: Path, native: Path) -> None:
    with pytest.raises(InputError, match="tolerance must be a number from 0, got nan"):
        verify(native, native, tolerance=math.nan)
    with pytest.raises(InputError, match="seed must not be negative, got -1"):
        verify(native, native, seed=-1)
    with pytest.raises(InputError, match="the source has no name"):
        describe("")
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(native, tmp_path / "nothing")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(InputError, match="two SavedModels have no configuration"):
        verify(tmp_path / "saved", tmp_path / "saved")
    with pytest.raises(CheckpointError, match="is a TensorFlow SavedModel, a program whose weights have no names"):
        convert(tmp_path / "saved", tmp_path / "x")


@pytest.mark.slow
def test_a_saved_model_is_compared_by_its_outputs(tmp_path: Path, native: Path) -> None:
    pytest.importorskip("tensorflow")
    done = convert(native, tmp_path / "saved", "savedmodel").verification
    assert done is not None
    assert done.passed
    assert {row.name for row in done.rows} == {"image features", "text features", "segmentation logits"}
    # float32 against float32.
    assert 0 < done.largest < 1e-4
    name = "visual_projection.3.weight"
    other = edited(native, tmp_path / "changed", name, lambda array: array * np.linspace(0.5, 2, len(array))[:, None])
    assert not verify(other, tmp_path / "saved").passed
    assert describe(tmp_path / "saved").format == "savedmodel"


# -- conversions that are verified -------------------------------------------------------------------------------------


def test_a_report_lies_beside_the_result(tmp_path: Path) -> None:
    source = NVLABS / "nv_two_stage" / "checkpoint.pth"
    done = convert(source, tmp_path / "x")
    assert done.report == tmp_path / "x" / REPORT_NAME
    report = json.loads(done.report.read_text())
    for side, folder, names in (
        ("source", source.parent, ["checkpoint.pth"]),
        ("result", tmp_path / "x", ["config.json", "model.safetensors"]),
    ):
        assert list(report[side]["files"]) == names
        for name, file in report[side]["files"].items():
            content = (folder / name).read_bytes()
            assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (report["source"]["format"], report["result"]["format"]) == ("nvlabs", "native")
    assert report["verification"]["passed"] is True
    assert report["verification"]["rows"][0]["name"] == "image embeddings"
    assert report["versions"]["numpy"] == np.__version__
    assert GroupViTConfig.from_dict(report["config"]) == read(source).config
    # Files of one folder: each has its report.
    for name in ("a.pth", "b.pth"):
        convert(tmp_path / "x", tmp_path / name, "nvlabs", verify=False)
    convert(tmp_path / "x", tmp_path / "a.pth", "nvlabs", verify=False, overwrite=True)
    reports = {path.name: json.loads(path.read_text())["result"]["path"] for path in tmp_path.glob("*.json")}
    assert reports == {"conversion_report.json": "a.pth", "b.pth.conversion_report.json": "b.pth"}


def test_a_result_that_is_another_model_is_not_kept(
    tmp_path: Path, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer with a mistake that its own reader shares would pass every check but this one."""
    writer = native_format.write

    def mistaken(job: Any, path: Path) -> None:
        writer(job, path)
        change(path, lambda arrays: {**arrays, "logit_scale": arrays["logit_scale"] * 2})

    monkeypatch.setattr(native_format, "write", mistaken)
    with pytest.raises(
        CheckpointError, match=r"is not the same model as its source.*1 of \d+ differ, most logit_scale"
    ):
        convert(native, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]
    convert(native, tmp_path / "x", verify=False)


@pytest.mark.parametrize("name", ["x", "x.keras", "x.weights.h5", "bin"])
def test_results_are_read_by_the_programs_that_they_are_for(
    tmp_path: Path, native: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors, torch.load and Keras load what is verified: a mistaken reader of this package is found."""
    to: Any = {"x": "native", "bin": "pytorch"}.get(name, "keras")
    convert(native, tmp_path / name, to, verify=False)
    checkpoint = read(tmp_path / name)
    true_value = checkpoint.value
    monkeypatch.setattr(checkpoint, "value", lambda name: true_value(name) * 2)
    result = verify(native, checkpoint)
    assert "read by this package alone" not in str(result.notes)
    assert result.differing
    # The outputs come from the other program's reading.
    assert all(row.relative <= FLOAT64 for row in result.rows)


@pytest.mark.parametrize(
    ("blocked", "backends"),
    [
        (("torch",), ["Keras", "Keras"]),
        (("tensorflow", "keras"), ["PyTorch", "PyTorch"]),
        (("torch", "tensorflow", "keras"), []),
    ],
)
def test_with_one_framework_or_none(
    tmp_path: Path, native: Path, monkeypatch: pytest.MonkeyPatch, blocked: tuple[str, ...], backends: list[str]
) -> None:
    convert(native, tmp_path / "tf", "transformers-tf", verify=False)
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    done = convert(tmp_path / "tf", tmp_path / "x").verification
    assert done is not None
    assert done.passed
    assert done.tensors
    assert done.backends == backends
    assert ("no outputs were computed" in str(done.notes)) == (not backends)


def test_without_a_framework_the_settings_decide(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "tensorflow", "keras"):
    sys.modules[name] = None
from conversion.convert import convert
assert convert({str(CASE / "tf")!r}, {str(tmp_path / "x")!r}).verification.passed
import pathlib
config = pathlib.Path({str(tmp_path / "x" / "config.json")!r})
config.write_text(config.read_text().replace("quick_gelu", "relu"))
from conversion.verify import verify
other = verify({str(CASE)!r}, {str(tmp_path / "x")!r})
assert other.settings and not other.passed, other
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REFERENCE.parents[1])


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_is() -> None:
    result = describe(NVLABS / "nv_three_stage" / "checkpoint.pth")
    assert result.format == "nvlabs"
    assert {"optimizer", "lr_scheduler", "epoch 3", "config"} <= set(result.others)
    torch = pytest.importorskip("torch")
    from groupvit_torch import GroupViTModel

    with torch.device("meta"):
        model = GroupViTModel(GroupViTConfig.from_dict(result.config or {}))
    assert result.parameters == model.num_parameters() == sum(result.parts.values())
    stages = [sum(p.numel() for p in stage.parameters()) for stage in model.vision_model.encoder.stages]
    assert [result.parts[f"image stage {number}"] for number in (1, 2, 3)] == stages
    assert result.parts["text embeddings"] == sum(p.numel() for p in model.text_model.embeddings.parameters())
    assert set(result.temperatures) == {"contrastive", "multi-label"}
    assert result.batch_norm == "statistics present, 0 steps"
    assert result.warnings == []
    assert "16 -> 8 groups" in (result.architecture or "")


def test_warnings_about_a_checkpoint(tmp_path: Path, native: Path) -> None:
    def warned(**changes: Any) -> list[str]:
        directory = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(native, directory)
        change(directory, lambda arrays: {n: v for n, v in {**arrays, **changes}.items() if v is not None})
        return describe(directory).warnings

    assert warned() == []
    weight = load_file(native / "model.safetensors")["text_projection.0.weight"]
    holed = weight.copy()
    holed[0, :2] = np.nan, np.inf
    assert warned(**{"text_projection.0.weight": holed}) == [
        "NaN or infinite values in text_projection.0.weight (2 of 80)"
    ]
    assert warned(**{"text_projection.0.weight": 0 * weight}) == ["nothing but zeros in text_projection.0.weight"]
    assert warned(**{"text_projection.0.weight": weight.astype(np.float16)}) == [
        "floating-point numbers of several types: float32, float16"
    ]
    (missing,) = warned(**{"text_projection.0.weight": None})
    assert "1 missing: text_projection.0.weight" in missing
    (left_over,) = warned(head=weight)
    assert "1 left over: head" in left_over
    (buffers,) = warned(**{"text_model.embeddings.position_ids": np.arange(12)[None]})
    assert "transformers before 4.31" in buffers
    (scale,) = warned(logit_scale=np.float32(5.0))
    assert scale == "logit_scale is beyond 100, where training clamps it"
    initial = {}
    for name, value in load_file(native / "model.safetensors").items():
        if "running" in name:
            initial[name] = np.full_like(value, float(name.endswith("var")))
    assert warned(**initial) == ["batch norms have the statistics of an untrained model"]
    (negative,) = warned(**{"visual_projection.1.running_var": -np.ones(10, np.float32)})
    assert negative == "negative variances in visual_projection.1.running_var"


def test_a_checkpoint_without_configuration_is_described_as_far_as_it_goes(tmp_path: Path, native: Path) -> None:
    shutil.copy(native / "model.safetensors", tmp_path)
    result = describe(tmp_path / "model.safetensors")
    assert result.config is None
    assert "pass one" in result.warnings[0]
    assert result.parts["text_model"] > 0
    assert describe(tmp_path / "model.safetensors", config=native).warnings == []


# -- commands ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands(tmp_path: Path, native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    code, out, err = run(capsys, "convert", native, tmp_path / "x.keras", "--to", "keras")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (code, err) == (0, "")
    assert f"source: {native}: safetensors in PyTorch's layout" in out
    assert "PyTorch against Keras in float64" in out
    assert "\nthe same model: the largest relative difference is" in out
    assert f"report: {tmp_path / REPORT_NAME}" in out
    # Names in a file are no commands for a terminal.
    change(native, lambda arrays: {**arrays, "a\x1b[31mb\r": np.zeros((2, 2), np.float32)})
    code, out, err = run(capsys, "inspect", native)
    assert "a\\x1b[31mb\\r" in out
    assert "\x1b" not in out + err
    change(native, lambda arrays: {name: value for name, value in arrays.items() if "31mb" not in name})

    shutil.copytree(native, tmp_path / "copy")
    code, out, _ = run(capsys, "verify", native, tmp_path / "copy")
    assert code == 0
    assert f"all {len(read(native).tensors)} equal to the last bit" in out
    changed = edited(native, tmp_path / "changed", "logit_scale", lambda value: value * 2)
    code, out, _ = run(capsys, "verify", native, changed, "--json")
    assert code == 1
    found = json.loads(out)
    assert (found["passed"], [tensor["name"] for tensor in found["differing"]]) == (False, ["logit_scale"])

    code, out, _ = run(capsys, "inspect", tmp_path / "x.keras")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'x.keras'}: a Keras model (.keras)\n")
    assert out.endswith("warnings: none\n")
    code, out, _ = run(capsys, "inspect", native, "--json")
    assert json.loads(out) == json.loads(json.dumps(describe(native).to_dict()))


def test_the_commands_say_what_is_wrong(tmp_path: Path, native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    for command in (("convert", tmp_path / "page.pth", tmp_path / "x"), ("inspect", tmp_path / "page.pth")):
        code, out, err = run(capsys, *command)
        assert (code, out) == (3, "")
        assert err.count("\n") == 1
        assert "page.pth is a web page" in err
    code, out, err = run(capsys, "convert", native, tmp_path / "x", "--to", "nvlabs")
    assert (code, out) == (2, "")
    assert "ends in .pth" in err
    code, _, err = run(capsys, "convert", native, native)
    assert code == 3
    assert "is there already; pass overwrite (--overwrite)" in err
    code, _, err = run(capsys, "convert", native, tmp_path / "x", "--max-shard-size", "much")
    assert code == 2
    assert "max_shard_size must be" in err
    assert not (tmp_path / "x").exists()


def test_python_m_conversion_is_the_same(tmp_path: Path, native: Path) -> None:
    def module(*arguments: object) -> str:
        command = [sys.executable, "-m", "conversion", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=REFERENCE.parents[1]).stdout

    assert "not verified" in module(native, tmp_path / "x", "--no-verify")
    assert verify(native, tmp_path / "x").passed
    assert module("inspect", tmp_path / "x").endswith("warnings: none\n")
