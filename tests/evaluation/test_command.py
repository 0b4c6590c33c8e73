"""The command `groupvit evaluate`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from groupvit_common import cli
from groupvit_common.cli import evaluate
from groupvit_common.cli.command_line import build_parser
from groupvit_common.cli.terminal import BAD_INPUT
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.protocols import protocol_settings
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.preprocessing.prompts import parse_labels
from groupvit_common.segmentation.predictor import DEMO_MODEL
from tests.support.backends import BACKENDS
from tests.support.evaluation import SIZES, WORDS, settings
from tests.support.paths import ROOT


def run_cli(capsys, *arguments):
    code = cli.main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_the_command_measures_writes_and_resumes(capsys, checkpoint, bases, folder, tmp_path, backend):
    options = [
        "--data",
        f"folder:{folder}",
        "--model",
        checkpoint,
        "--backend",
        backend,
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--limit",
        "2",
    ]
    knobs = ["--background", "0.2", "--shorter-side", "32", "--window", "32", "--top-k", "none", "--save-predictions"]
    code, out, err = run_cli(capsys, *options, *knobs)
    assert (code, err) == (0, "")
    assert "mean IoU" in out
    assert "protocol paper" in out
    record = json.loads((tmp_path / "results.json").read_text())
    (data,) = open_sets(f"folder:{folder}", limit=2)
    expected = evaluate_segmentation(settings(normalize_prompts=False).segmenter(bases(backend), 8), data)
    assert {name: record[name] for name in expected.scores()} == expected.scores()
    assert [each["name"] for each in record["classes"]] == WORDS
    assert record["settings"]["stride"] is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "confusion.csv", "confusion.png", "journal-0.jsonl", "predictions",
    }  # fmt: skip

    code, out, _ = run_cli(capsys, *options, *knobs, "--json")
    again = json.loads(out)
    assert again["images_per_second"] is None
    assert again["mean_iou"] == record["mean_iou"]
    code, _, err = run_cli(capsys, *options)
    assert code == BAD_INPUT
    assert "holds another evaluation" in err


def test_other_weights_under_the_same_name_are_noticed(capsys, monkeypatch, checkpoint, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(checkpoint, tmp_path / name)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    changed = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    options = ["--data", "scenes:1", "--limit", 1, "--model", "demo", "--backend", "torch", "--out", tmp_path / "out"]
    monkeypatch.setattr("groupvit_common.checkpoints.hub.DEMO_MODEL", tmp_path / "a")
    assert run_cli(capsys, *options)[0] == 0
    # The same weights in a newer file go on.
    (tmp_path / "a" / "model.safetensors").touch()
    assert run_cli(capsys, *options)[0] == 0
    monkeypatch.setattr("groupvit_common.checkpoints.hub.DEMO_MODEL", tmp_path / "b")
    code, _, err = run_cli(capsys, *options)
    assert code == BAD_INPUT
    assert "holds another evaluation (weights was" in err


def test_the_command_measures_several_sets_and_calibrates(capsys, tmp_path):
    code, out, _ = run_cli(
        capsys, "--data", "scenes:1", "scenes:3", "--limit", 2, "--model", "demo", "--out", tmp_path, "--json"
    )
    assert code == 0
    assert [json.loads(line)["set"] for line in out.splitlines()] == ["scenes:1", "scenes:3"]
    assert (tmp_path / "scenes-1" / "results.json").is_file()
    calibration = ["--data", "scenes:1", "--limit", 2, "--model", "demo", "--calibrate", "--out", tmp_path]
    code, _, err = run_cli(capsys, *calibration)
    assert code == BAD_INPUT
    assert "--calibrate needs --split" in err
    code, out, _ = run_cli(capsys, *calibration, "--split", 5, "--thresholds", "0.1,0.5", "--temperatures", "1,2")
    assert code == 0
    assert "best: --temperature" in out
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert len(record["curve"]) == 4
    assert record["best"]["mean_iou"] == max(point["mean_iou"] for point in record["curve"])


def test_one_set_that_cannot_be_measured_ends_no_others(capsys, checkpoint, folder, tmp_path):
    """A set with a damaged image; one with a name that is not UTF-8, whose run is resumed."""
    sets = [shutil.copytree(folder, tmp_path / name) for name in ("bad", "good")]
    damaged = sets[0] / "images" / "3.png"  # the first is looked at when the set is opened
    damaged.write_bytes(damaged.read_bytes()[:-60])
    for kind in ("images", "masks"):
        try:
            (sets[1] / kind / "0.png").rename(sets[1] / kind / "caf\udce9.png")
        except (OSError, UnicodeError):
            pytest.skip("this file system takes no such name")
    out_dir = tmp_path / "out"
    options = ["--data", *(f"folder:{path}" for path in sets), "--model", checkpoint, "--out", out_dir, "--json"]
    options += ["--protocol", "native", "--shorter-side", 32]
    records = []
    for _ in range(2):
        code, out, err = run_cli(capsys, *options)
        assert code == 1
        (line,) = err.splitlines()
        assert line.startswith("groupvit: error: folder")
        assert "3.png" in line
        records.append(json.loads(out))
    assert records[0]["images"] == records[1]["images"] == len(SIZES)
    assert records[0]["mean_iou"] == records[1]["mean_iou"]


def test_the_command_classifies(capsys, checkpoint, classes):
    code, out, _ = run_cli(capsys, "--data", f"imagenet:{classes}", "--model", checkpoint, "--backend", "torch")
    assert code == 0
    assert "top-1" in out
    assert "12 images" in out


def test_the_background_by_words(capsys, checkpoint, torch_base, folder):
    options = ["--data", f"folder:{folder}", "--model", checkpoint, "--backend", "torch", "--device", "cpu", "--json"]
    code, out, _ = run_cli(
        capsys, *options, "--background-labels", "wall, remote control", "--window", "none", "--shorter-side", 32
    )
    record = json.loads(out)
    assert code == 0
    assert record["settings"]["background"] is None
    assert record["settings"]["window"] is None
    (data,) = open_sets(f"folder:{folder}")
    plain = settings(background=None, window=None, stride=None, top_k=5, normalize_prompts=False)
    expected = evaluate_segmentation(
        plain.segmenter(torch_base, 8), data, background_labels=parse_labels("wall, remote control")
    )
    assert record["mean_iou"] == expected.mean_iou


def test_options_for_better_masks(capsys, demo):
    options = ["--data", "scenes:1", "--limit", 2, "--model", "demo", "--backend", "torch", "--device", "cpu", "--json"]
    masks = ["--flip", "--scales", "1,1.5", "--refine", 2, "--refine-dilations", "1,3"]
    masks += ["--foreground", 0.7, "--synonyms", "max"]
    code, out, _ = run_cli(capsys, *options, *masks)
    assert code == 0
    record = json.loads(out)
    chosen = {"flip": True, "scales": (1.0, 1.5), "refine": 2, "refine_dilations": (1, 3)}
    chosen |= {"foreground": 0.7, "synonyms": "max"}
    assert {name: record["settings"][name] for name in chosen} == {
        **chosen, "scales": [1.0, 1.5], "refine_dilations": [1, 3],
    }  # fmt: skip
    (data,) = open_sets("scenes:1", limit=2)
    expected = evaluate_segmentation(replace(protocol_settings("native", data.kind), **chosen).segmenter(demo, 8), data)
    assert record["mean_iou"] == expected.mean_iou


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "voc:/nowhere", "--model", "no/such"], "there is no folder /nowhere"),
        (["--data", "voc"], "voc needs the folder"),
        (["--data", "imagenet"], "imagenet needs the folder"),
        (["--data", "scenes", "--save-predictions"], "--save-predictions needs --out"),
        (["--data", "scenes", "--templates", "nine"], "unknown template set"),
        (["--data", "scenes:1", "--limit", "1", "--model", "demo", "--window", "3"], "multiple of the patch size"),
    ],
)
def test_bad_requests_are_reported_in_one_line(capsys, arguments, message):
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out) == (BAD_INPUT, "")
    assert message in err
    assert err.count("\n") == 1


def test_images_of_more_pixels_are_refused(capsys, checkpoint, folder, classes):
    for data in (f"folder:{folder}", f"imagenet:{classes}"):
        arguments = ("--data", data, "--model", checkpoint, "--device", "cpu", "--backend", "torch")
        code, out, err = run_cli(capsys, *arguments, "--max-pixels", 100)
        assert (code, out) == (BAD_INPUT, "")
        assert "pixels" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("bad", ["1,0", "2,2", "1.5", ""])
def test_bad_dilations(capsys, bad):
    with pytest.raises(SystemExit):
        run_cli(capsys, "--data", "scenes", "--refine-dilations", bad)
    assert "--refine-dilations" in capsys.readouterr().err


def test_keras_does_not_run_in_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run_cli(capsys, "--data", "scenes:1", "--model", "demo", "--backend", "tf")
    assert code == BAD_INPUT
    assert "several processes evaluate together in PyTorch only" in err


def test_the_page_about_evaluation_says_what_works(capsys):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(program.replace("limit=20", "limit=4"), {})
    assert capsys.readouterr().out.startswith("scenes:1 0.7")
    commands = re.findall(r"evaluate( --data .*)", page)
    assert len(commands) > 4
    for command in commands:
        options = build_parser().parse_args(["evaluate", *shlex.split(command.split("`")[0], comments=True)])
        assert options.run is evaluate._run


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_scenes_are_measured_as_training_measured_them(capsys, backend):
    """The bundled model's record holds percentages with one digit."""
    expected = json.loads((DEMO_MODEL / "training.json").read_text())["mean_iou"]
    code, out, _ = run_cli(capsys, "--data", "scenes", "--model", "demo", "--backend", backend, "--json")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [round(100 * record["mean_iou"], 1) for record in records] == [expected[level] for level in "123"]


@pytest.mark.slow
def test_torchrun_measures_as_one_process_does(capsys, tmp_path):
    arguments = ["--data", "scenes:1", "--limit", "9", "--model", "demo", "--backend", "torch", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    done = subprocess.run(
        [*command, "groupvit_common.cli", "evaluate", *arguments, "--out", str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    together = json.loads(line)
    _, out, _ = run_cli(capsys, *arguments)
    alone = json.loads(out)
    assert together["processes"] == 2
    assert together["images"] == 9
    assert together["classes"] == alone["classes"]
    assert together["mask_jaccard"] == alone["mask_jaccard"]
