"""The log of a run: lines, records, event files; measures of the grouping."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.training.grouping_health import collapse_warning, grouping_measures
from groupvit_common.training.initial_model import matches
from groupvit_common.training.log import RECORDS_NAME, RunLog, _remove_later_records, duration
from tests.support.training import quiet, tiny


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / RECORDS_NAME).read_text().splitlines()]


def test_progress_in_a_line_and_a_record(tmp_path, monkeypatch):
    lines: list[str] = []
    now = [100.0]
    monkeypatch.setattr("groupvit_common.training.log.time.monotonic", lambda: now[0])
    log = RunLog(tiny(steps=100, batch_size=8), tmp_path, step=0, log=lines.append)
    now[0] += 20.0  # of 10 steps
    values = {"loss": 1.25, "learning_rate": 5e-4, "groups_in_use": 3.5, "gradient_norm": math.inf}
    log.progress(10, values, flops=3e9, peak=6e9)
    assert lines == [
        "step 10/100  loss 1.250  lr 0.0005  4 images/s  25% of peak  3.5 groups in use  3 min left",
    ]
    (record,) = records(tmp_path)
    assert record == {
        "step": 10, "loss": 1.25, "learning_rate": 5e-4, "groups_in_use": 3.5, "gradient_norm": "inf",
        "images_per_second": 4.0, "utilisation": 0.25,
    }  # fmt: skip
    now[0] += 50.0
    log.start(10)  # a measurement is nobody's step
    now[0] += 1.0
    log.progress(20, {"loss": 1.0}, flops=0, peak=0)
    assert lines[-1] == "step 20/100  loss 1.000  80 images/s  8 s left"


def test_records_of_steps_that_a_killed_run_takes_again_are_forgotten(tmp_path):
    log = RunLog(tiny(), tmp_path, step=0, log=quiet)
    for step in (1, 2, 3):
        log.record(step, {"loss": step})
    with (tmp_path / RECORDS_NAME).open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tiny(), tmp_path, step=2, log=quiet)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    RunLog(tiny(), tmp_path, step=0, log=quiet)
    assert records(tmp_path) == []


def test_tensorboard_reads_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tiny(tensorboard=True), tmp_path, step=0, log=quiet)
    for step in (1, 2):
        log.record(step, {"loss": step / 4})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tensors = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("loss")]
    assert tensors == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize(
    ("setting", "module"), [({"tensorboard": True}, "tensorboard.summary"), ({"wandb": "x"}, "wandb")]
)
def test_a_missing_package_is_named(setting, module, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=r"needs .*: pip install"):
        RunLog(tiny(**setting), tmp_path, step=0, log=quiet)


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    class Package:
        @staticmethod
        def init(**options: Any) -> Run:
            calls.append(options)
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Package)
    log = RunLog(tiny(wandb="mine"), tmp_path, step=0, log=quiet)
    log.record(3, {"loss": 0.5})
    log.close()
    assert calls[0]["project"] == "mine"
    assert calls[0]["config"]["run"]["wandb"] == "mine"
    assert calls[1:] == [(3, {"loss": 0.5}), "finish"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (600, "10 min"), (11_100, "3:05 h"), (183_600, "2 d 3 h"), (math.nan, "?")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# The grouping


def soft(labels: np.ndarray, groups: int) -> np.ndarray:
    """Labels `[B, S]` as an assignment `[B, G, S]` that is not quite hard."""
    return np.eye(groups)[labels].transpose(0, 2, 1) * 0.9 + 0.1 / groups


def test_a_grouping_that_tells_something():
    rng = np.random.default_rng(0)
    measures = grouping_measures(soft(rng.integers(4, size=(64, 256)), 4))
    assert measures["groups_in_use"] == 4
    assert measures["assignment_entropy"] > 0.98
    assert measures["map_likeness"] == pytest.approx(0.25, abs=0.02)
    assert collapse_warning(measures) == ""


def test_one_group_for_everything_is_a_collapse():
    measures = grouping_measures(soft(np.full((8, 16), 2), 4))
    assert measures == {"groups_in_use": 1.0, "assignment_entropy": 0.0, "map_likeness": 1.0}
    assert "1 groups hold all patches" in collapse_warning(measures)


def test_the_same_map_for_every_image_is_a_collapse():
    measures = grouping_measures(soft(np.tile(np.arange(16) % 4, (8, 1)), 4))
    assert measures["groups_in_use"] == 4
    assert "maps of different images are alike in 100% of the patches" in collapse_warning(measures)
    assert "map_likeness" not in grouping_measures(soft(np.zeros((1, 4), int), 2))
    assert "map_likeness" not in grouping_measures(soft(np.zeros((2, 4), int), 2), of_patches=False)


# Names


def test_names_of_parts():
    assert matches("text_model", "text_model.final_layer_norm.weight")
    assert matches("group_token", "vision_model.encoder.stages.0.group_token")
    assert matches("encoder.stages.0", "vision_model.encoder.stages.0.group_token")
    assert not matches("stages.1", "vision_model.encoder.stages.10.group_token")
    assert not matches("model", "text_model.x")


def test_lines_of_another_shape_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "nan"}\n'
    odd = [
        b"[1]",
        b"5",
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"loss": 1}',
        b"[" * 5000,
        b"\xff\xfe",
        b'{"step": NaN}',
        b"",
        b'{"step": -1}',
    ]
    path.write_bytes(good + b"\n".join(odd) + b'\n{"step": 3}\n{"step": 2}')
    _remove_later_records(path, 2)
    assert path.read_bytes() == good
    _remove_later_records(path, 0)
    assert path.read_bytes() == b""
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be resumed: Is a directory"):
        _remove_later_records(path, 2)
