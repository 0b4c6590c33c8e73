"""Runs that are stopped, killed, or find their disk full go on from the last checkpoint as if nothing had happened."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.paths import REFERENCE, ROOT

torch = pytest.importorskip("torch")

from groupvit_common.errors import CheckpointError, InputError  # noqa: E402
from groupvit_common.storage import locks  # noqa: E402
from groupvit_common.storage.locks import FolderLock  # noqa: E402
from groupvit_common.training import checkpoints as run_state  # noqa: E402
from groupvit_common.training.checkpoints import Checkpoints, RunState  # noqa: E402
from groupvit_common.training.recipe import get_recipe  # noqa: E402
from groupvit_common.training.run import Interrupted  # noqa: E402
from groupvit_common.training.start import start_run  # noqa: E402
from tests.support.backends import Backend  # noqa: E402
from tests.support.training import ON_CPU, PAPER, ends_alike, quiet, stopping_at, tiny, train, untraced  # noqa: E402

# Noise in the model, a mean of the weights, mixed pictures: all that a run draws and keeps.
RUN = {"gumbel": True, "hard_from": 0.0, "drop_path": 0.3, "ema_decay": 0.9, "evaluate_every": 3}
PAPER_RUN = {**RUN, **PAPER, "ema_decay": 0.0, "chunk_size": 3}


# Going on


@pytest.mark.parametrize(
    "settings",
    [RUN, {**PAPER_RUN, "precision": "bfloat16"}, {**PAPER_RUN, "precision": "float16", "chunk_size": 0, "steps": 16}],
    ids=["groups-mean", "paper-cached-bfloat16", "float16"],
)
def test_a_run_that_is_stopped_and_continued_ends_with_the_same_bits(settings, tmp_path):
    recipe = tiny(**settings, log_every=1)
    train(recipe, tmp_path / "whole", log=quiet)
    # The scale of float16's gradients falls at first, until they are small enough.
    last = recipe.schedule.total_steps - 2
    for step, number, name in ((2, signal.SIGTERM, "SIGTERM"), (last, signal.SIGINT, "SIGINT")):
        with pytest.raises(Interrupted, match=f"stopped by {name} at step {step}, saved; continue with --resume auto"):
            train(recipe, tmp_path / "parts", resume="auto", log=stopping_at(step, number))
    result = train(recipe, tmp_path / "parts", resume="auto", log=quiet)
    assert len(result.losses) == 2
    ends_alike(tmp_path / "whole", tmp_path / "parts")
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for one, other in zip(*records, strict=True):
        assert {k: v for k, v in one.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }
    measured = [json.loads((tmp_path / name / "training.json").read_text())["mean_iou"] for name in ("whole", "parts")]
    assert measured[0] == measured[1]
    assert measured[0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_an_earlier_version_began_resumes(backend: Backend, tmp_path):
    """With its recipe, noise, moments, EMA and records, it ends where that version ended it."""
    with tarfile.open(REFERENCE / "training" / f"{backend.name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    loop = importlib.import_module(f"groupvit_{backend.name}.train")
    with untraced(backend.name):
        loop.train(str(tmp_path / "recipe.toml"), tmp_path, resume="auto", log=quiet, **ON_CPU[backend.name])
    found, expected = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "expected.jsonl")
    )
    assert found[:3] == expected[:3]
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6, 6]
    for one, other in zip(found[3:], expected[3:], strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "learning_rate", "gradient_norm", "logit_scale"} & one.keys():
            # float32 on another processor, three steps on; with other noise a loss differs by a third.
            assert one[name] == pytest.approx(other[name], rel=0.02), name
    weights = load_file(tmp_path / "model.safetensors")
    for name, value in json.loads((tmp_path / "expected.json").read_text()).items():
        assert weights[name].flat[0] == pytest.approx(value, rel=1e-3), name


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    train(tiny(), tmp_path, log=quiet)
    before = (tmp_path / "model.safetensors").read_bytes()
    lines: list[str] = []
    result = train(tiny(), tmp_path, resume="auto", log=lines.append)
    assert result.losses == ()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    longer = train(tiny(steps=8), tmp_path, resume="auto", log=lines.append)
    assert len(longer.losses) == 2
    assert "schedule.steps was 6 before, now 8" in lines


def test_settings_that_are_newer_than_a_checkpoint_had_their_defaults(tmp_path, monkeypatch):
    train(tiny(weight_decay=0.1), tmp_path, log=quiet)
    read = run_state.load

    def older(path: Path) -> run_state.RunState:
        state = read(path)
        del state.values["recipe"]["objective"]["ungrouped_weight"], state.values["recipe"]["evaluation"]
        return state

    monkeypatch.setattr(run_state, "load", older)
    lines: list[str] = []
    train(tiny(weight_decay=0.2, steps=8), tmp_path, resume="auto", log=lines.append)
    assert [line for line in lines if " before, now " in line] == [
        "optimizer.weight_decay was 0.1 before, now 0.2",
        "schedule.steps was 6 before, now 8",
    ]


def test_an_unfinished_run_is_not_overwritten_by_accident(tmp_path):
    recipe = tiny(log_every=1)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path, log=stopping_at(2))
    with pytest.raises(InputError, match="holds an unfinished run at step 2: resume it with --resume auto"):
        train(recipe, tmp_path, log=quiet)
    path = tmp_path / "checkpoints" / "step-00000002"
    assert len(train(recipe, tmp_path / "elsewhere", resume=path, log=quiet).losses) == 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tiny(), tmp_path, log=quiet)
    with pytest.raises(CheckpointError, match=r"of another model than the recipe's: .* has another shape"):
        train(tiny(width=16), tmp_path, resume="auto", log=quiet)


def test_captioned_pictures_go_on_where_they_were(tmp_path):
    """With worker processes, in the middle of an epoch."""
    from PIL import Image

    from groupvit_common.data.captions.settings import DataSettings, SourceSettings
    from groupvit_common.training.settings import changed

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a dog and {number} cats on a red sofa")
    train(tiny(steps=2), tmp_path / "tokenizer", log=quiet)
    data = DataSettings(
        sources=(SourceSettings(kind="folder", path=str(pictures)),), image_size=48, prompts=2, rand_augment=0
    )
    recipe = changed(tiny(**PAPER, log_every=1), {"data": data, "tokenizer": str(tmp_path / "tokenizer"), "workers": 1})
    assert recipe.multi_label
    whole = train(recipe, tmp_path / "whole", log=quiet)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "parts", log=stopping_at(3))
    parts = train(recipe, tmp_path / "parts", resume="auto", log=quiet)
    assert parts.losses == whole.losses[3:]
    ends_alike(tmp_path / "whole", tmp_path / "parts")


def test_the_best_by_a_measure_of_ones_own_stays(tmp_path):
    """Its checkpoint, and what was measured, beside the scenes' mean IoU, of which it is the mean."""
    values = iter([100.0, 300.0, 200.0, 100.0, 0.0, 0.0])
    recipe = tiny(evaluate_every=1, save_every=1, keep=1)
    lines: list[str] = []
    train(recipe, tmp_path, log=lines.append, evaluate=lambda segmenter: {"mine": next(values)})
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000002", "step-00000006"]
    assert "step 2: mine 300" in lines
    assert json.loads((tmp_path / "training.json").read_text())["evaluated"] == {"mine": 0.0}


def test_when_a_checkpoint_is_due(tmp_path):
    run = start_run(tiny(save_every=4, save_minutes=30), tmp_path, log=quiet)
    run.step = 3
    assert not run.saves_now(29.0)
    assert run.saves_now(30.0)
    run.step = 4
    assert run.saves_now(0.0)
    run.step = 6
    assert run.saves_now(0.0)  # the last one


def test_a_rate_from_scratch_is_told_where_a_run_starts_from_a_checkpoint(tmp_path):
    for rate, told in ((1e-3, 1), (1e-5, 0)):
        lines: list[str] = []
        start_run(tiny(init_from="demo", image_size=64, learning_rate=rate), tmp_path, log=lines.append).close()
        assert sum("is for training from scratch, and this run starts from demo" in line for line in lines) == told


# What a checkpoint is


def test_both_backends_load_what_a_checkpoint_holds(backend: Backend, tmp_path):
    result = train(tiny(**PAPER), tmp_path, log=quiet)
    path = Checkpoints(result.directory).all()[-1] / "model"
    model = backend.load(path)
    ids, pixels = np.array([[527, 5, 529], [527, 9, 529]]), np.ones((2, 3, 48, 48), np.float32)
    ours = backend.call(model, input_ids=ids, pixel_values=pixels)["logits_per_image"]
    from groupvit_torch import GroupViTModel

    theirs = GroupViTModel.from_pretrained(tmp_path)(torch.from_numpy(ids), torch.from_numpy(pixels)).logits_per_image
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)  # float32 of two programs, logits up to 10
    from groupvit_common.preprocessing.processor import GroupViTProcessor

    GroupViTProcessor.from_pretrained(path)


def write(checkpoints: Checkpoints, step: int, measure: float | None = None) -> Path:
    values = {
        "recipe": {}, "finished": False, "bad_steps": 0, "minutes": 1.0, "untrained": {},
        "measured": {"1": float("nan")},
        "scaler": {}, "ranks": [{"data": {"step": step}}], "step": step,
    }  # fmt: skip
    state = RunState(step, values, {"x": np.arange(step)}, measure)
    return checkpoints.save(state, lambda directory: (directory / "weights").write_bytes(bytes(1000)) and None)


def test_the_last_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, measure in enumerate((None, 1.0, 5.0, 2.0, None, float("nan"), 3.0), 1):
        write(checkpoints, step, measure)
    assert [path.name for path in checkpoints.all()] == ["step-00000003", "step-00000006", "step-00000007"]
    state = run_state.load(checkpoints.all()[0])
    assert (state.step, state.measure, state.values["step"]) == (3, 5.0, 3)
    np.testing.assert_array_equal(state.arrays["x"], np.arange(3))
    write(Checkpoints(tmp_path, keep=1, keep_best=False), 8)
    assert [path.name for path in checkpoints.all()] == ["step-00000008"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state", "half-state", "version"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, tmp_path):
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, log=lines.append)
    good, bad = write(checkpoints, 1), write(checkpoints, 2)
    file = bad / ("state.json" if "state" in damage or damage == "version" else "model/weights")
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "remove":
        file.unlink()
    elif damage == "half-state":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "version":
        import zlib

        text = content.split(b" ", 1)[1].rstrip(b"\n").replace(b'"version": 1', b'"version": 99')
        file.write_bytes(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")
    else:
        file.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert checkpoints.newest() == good
    assert len(lines) == 1
    assert "skipping a damaged checkpoint" in lines[0]
    with pytest.raises(CheckpointError):
        run_state.load(bad)
    # The same step again takes its place.
    assert write(checkpoints, 2) == bad
    assert checkpoints.newest() == bad


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a checkpoint's state and makes its checksum right."""
    file = path / "state.json"
    content = json.loads(file.read_bytes().partition(b" ")[2])
    text = json.dumps(change(content) or content)
    file.write_text(f"{zlib.crc32(text.encode()):08x} {text}\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("values") and None,
        lambda content: content.pop("measure"),
        lambda content: content.update(values=[]),
        lambda content: content.update(files={}),
        lambda content: content.update(files={"../../other": [1, 1]}),
        lambda content: content.update(files={"model/weights": 5}),
        lambda content: content["files"].pop("state.safetensors") and None,
        lambda content: content.update(step=1),
        lambda content: content.update(step=True),
        lambda content: content.update(version="2"),
        lambda content: content.update(measure="good"),
        lambda content: content["values"].pop("ranks") and None,
        lambda content: content["values"].update(bad_steps=-1),
        lambda content: content["values"].update(finished="no"),
        lambda content: content["values"].update(measured={"x": 1.0}),
        lambda content: content["values"].update(ranks=[]),
        lambda content: content["values"].update(ranks=[{"data": 5}]),
        lambda content: [content],
        lambda content: "text",
    ],
)
def test_a_state_of_another_content_is_passed_over_too(change, tmp_path):
    """Its checksum is right."""
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    good, bad = (write(checkpoints, step) for step in (1, 2))
    forge(bad, change)
    assert run_state.find(tmp_path, "auto", log=lines.append) == good
    assert len(lines) == 1
    assert lines[0].startswith("skipping a damaged checkpoint: ")
    with pytest.raises(InputError, match="unfinished run at step 1"):
        run_state.find(tmp_path, "never", log=quiet)
    with pytest.raises(CheckpointError):
        run_state.find(tmp_path, bad)
    # Where there is no other, a run stops, and what there is stays.
    forge(good, lambda content: content.pop("values") and None)
    for resume in ("auto", "never"):
        with pytest.raises(
            CheckpointError, match=r"none of the 2 checkpoints in .* can be resumed, and none was removed"
        ):
            train(tiny(), tmp_path, resume=resume, log=quiet)
    assert checkpoints.all() == [good, bad]


def test_a_damaged_checkpoint_takes_no_valid_ones_place(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    first, second = write(checkpoints, 1), write(checkpoints, 2)
    (second / "model" / "weights").write_bytes(b"cut off")
    third = write(checkpoints, 3)
    assert checkpoints.all() == [first, third]
    # Gone back to an earlier step, a run leaves the later ones behind.
    again = write(checkpoints, 2)
    assert checkpoints.all() == [first, again]


def test_states_that_only_the_stream_can_judge_are_one_sentence(tmp_path):
    train(tiny(), tmp_path, log=quiet)
    (path,) = Checkpoints(tmp_path).all()
    forge(path, lambda content: content["values"].update(ranks=[{"data": {"step": 1}}]))
    with pytest.raises(
        CheckpointError,
        match=r"step-00000006 cannot be resumed: its state is not what training writes \(KeyError: 'rng'\)",
    ):
        train(tiny(steps=8), tmp_path, resume="auto", log=quiet)
    forge(path, lambda content: content["values"].update(ranks=[{"data": None, "random": [5]}]))
    with pytest.raises(CheckpointError, match="its state is not what training writes"):
        train(tiny(steps=8), tmp_path, resume="auto", log=quiet)


def test_two_trainings_in_one_folder(tmp_path):
    run = start_run(tiny(), tmp_path, log=quiet)
    message = (
        f"another training writes into {tmp_path} \\(process {os.getpid()} on .*\\): "
        "wait for its end, or choose another folder"
    )
    for resume in ("never", "auto"):
        with pytest.raises(InputError, match=message):
            train(tiny(), tmp_path, resume=resume, log=quiet)
    start_run(tiny(), tmp_path, log=quiet, rank=1, world=2)  # one of the same run
    run.close()
    assert not list(tmp_path.glob(".*.lock"))
    # A run that fails lets others in.
    for _ in range(2):
        with pytest.raises(InputError, match="no parameter is called"):
            train(tiny(freeze=("nothing",)), tmp_path, log=quiet)


def test_a_lock_ends_with_its_process(tmp_path):
    script = f"""
from pathlib import Path
from groupvit_common.storage.locks import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}), ".lock", "run")
print(1, flush=True)
input()"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InputError, match=f"another run writes into .* \\(process {process.pid} on "):
        FolderLock(tmp_path, ".lock", "run")
    process.kill()
    process.communicate()
    FolderLock(tmp_path, ".lock", "run").release()


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to("mine.txt")
    lock = FolderLock(tmp_path, ".lock", "run")
    with pytest.raises(InputError, match="another run writes into"):
        FolderLock(tmp_path, ".lock", "run")
    lock.release()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", refuse)
    lines: list[str] = []
    FolderLock(tmp_path, ".lock", "training", lines.append).release()
    assert lines == [f"{tmp_path} is on a file system without locks: make sure that no other training writes there"]
    FolderLock(tmp_path / "nowhere", ".lock", "training", lines.append).release()


def test_what_a_killed_process_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)
    (checkpoints.folder / ".step-00000002.abc" / "model").mkdir(parents=True)
    assert len(checkpoints.all()) == 1
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


def test_a_folder_without_checkpoints_begins(tmp_path):
    assert run_state.find(tmp_path, "auto") is None
    assert run_state.find(tmp_path, "never") is None
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere to resume: give never, auto"):
        run_state.find(tmp_path, tmp_path / "nowhere")


def test_another_number_of_processes_continues_from_the_epochs_beginning(tmp_path):
    run = start_run(tiny(), tmp_path, log=quiet)
    ranks = [{"data": {"epoch": epoch, "step": 4}} for epoch in (3, 2)]
    assert run._data_state(ranks) == {"epoch": 3, "step": 4}  # scenes: every process draws the same
    run.recipe = get_recipe("gcc-yfcc-30e")
    assert run._data_state(ranks) == {"epoch": 2}
    run.world = 2
    assert run._data_state(ranks) == {"epoch": 3, "step": 4}


# Full disks and kills, in a process of their own


@pytest.mark.slow  # saving and its order are killed and filled up in tests/model/test_saving.py
@pytest.mark.parametrize("kills", [24])
def test_full_disks_and_kills_change_no_weight(kills, tmp_path):
    """No file may grow beyond a limit: checkpoints fail halfway, training continues, and later ones succeed.

    SIGKILL at random moments and while a checkpoint is being written; now and then the newest one is truncated besides.
    """
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_training", tmp_path, str(kills)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])

    assert answer["full_disk"]["failed"]
    assert answer["full_disk"]["left"] == []
    ends_alike(tmp_path / "not full", tmp_path / "full")

    assert answer["kills"]["kills"] == kills
    assert answer["kills"]["while_writing"] >= kills // 4
    assert answer["kills"]["truncated"] >= 1
    ends_alike(tmp_path / "whole", tmp_path / "killed")
