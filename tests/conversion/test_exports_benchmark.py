"""`groupvit benchmark`: programs in turn, medians, differences, and what fails beside what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from conversion.exports.benchmark import Measured, Row, benchmark, compare_rows, measure, table
from groupvit_common.cli import main
from groupvit_common.errors import InputError
from groupvit_common.segmentation.parts import PARTS
from tests.support.models import random_checkpoint, smallest_config
from tests.support.paths import ROOT


def test_programs_are_called_in_turn_and_the_median_counts():
    now, calls = [0.0], []

    def program(name: str, *seconds: float) -> Any:
        left = [0.0, 0.0, 0.0, *seconds]

        def run(inputs: Any) -> Any:
            calls.append(name)
            now[0] += left.pop(0)
            return {"text_embeds": buffer}

        return run

    def broken(inputs: Any) -> Any:
        raise ValueError("no such operator\nand a page of text")

    def breaks_later(inputs: Any) -> Any:
        later.append(1)
        return {} if len(later) < 5 else broken(inputs)

    buffer, later = np.ones((1, 2), np.float32), []  # type: ignore[var-annotated]
    runners = {"a": program("a", 0.003, 0.001, 0.002), "b": program("b", 1, 1, 9), "c": broken, "d": breaks_later}
    found = measure(runners, {}, 3, clock=lambda: now[0], pause=lambda seconds: None)
    buffer[:] = 7
    assert [*found] == ["a", "b", "c", "d"]
    assert found["c"] == found["d"] == "ValueError: no such operator"
    a, b = found["a"], found["b"]
    assert isinstance(a, Measured)
    assert isinstance(b, Measured)
    assert (a.milliseconds, b.milliseconds) == (pytest.approx(2), pytest.approx(1000))
    # A copy: a runtime may use its memory again.
    assert (a.outputs["text_embeds"] == 1).all()
    assert "".join(calls) == "aaabbb" + "ab" + "ba" + "ab"


def test_rows_compare_with_the_first_program_that_ran():
    maps = np.zeros((1, 4, 5), np.int32)
    scores = np.full((1, 4, 5), 0.5, np.float32)
    first = {"label_map": maps, "group_map": maps, "scores": scores}
    other = maps.copy()
    other[0, 0, 0] = 1
    found = {
        "PyTorch": "RuntimeError: no",
        "onnx": Measured(2.0, first),
        "openvino": Measured(3.0, first | {"label_map": other, "scores": scores + np.float32(0.001)}),
        "litert": Measured(1.0, first | {"scores": scores[:, :2]}),
    }
    rows = list(compare_rows(PARTS["segment"], "1 x 4 x 5", found))
    assert rows[0] == Row("PyTorch", "segmenter", "1 x 4 x 5", error="RuntimeError: no")
    assert [row.ratio for row in rows] == [None, 1.0, 1.5, 0.5]
    assert (rows[1].difference, rows[1].pixels) == (0, 0)
    assert rows[2].difference == pytest.approx(0.002, rel=1e-3)
    assert rows[2].pixels == 1 / 20
    assert rows[3].difference == float("inf")
    lines = list(table(rows))
    assert lines[0].split() == ["part", "inputs", "program", "on", "disk", "ms", "ratio", "difference", "pixels"]
    assert lines[2].split()[-5:] == ["openvino", "3.00", "1.50", "2.0e-03", "5.00%"]
    assert lines[-1] == "PyTorch segmenter 1 x 4 x 5: RuntimeError: no"
    assert list(table([Row("aoti", error="no compiler")])) == ["aoti: no compiler"]


def test_arguments_that_cannot_be_are_said_in_a_sentence(tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "model", smallest_config())

    def refused(message: str, formats: Any = (), **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            benchmark(checkpoint, formats, models=[], **options)

    refused("formats must be some of onnx, .* got 'coreml'", "onnx,coreml")
    refused("named once each, got onnx, onnx", ["onnx", "onnx"])
    refused("batches must be whole numbers from 1, got 0", batches=[0])
    refused("at least 1, got 0 and None", rounds=0)
    refused("sides of images must be multiples of 8 from 16, got 8x20", sizes=[(8, 20)])
    refused("parts must be some of", parts="images")
    for arguments, message in (
        (["--sizes", "224"], "a size is HEIGHTxWIDTH"),
        (["--models", "jax"], "models must be torch, tf"),
    ):
        with pytest.raises(SystemExit) if "--sizes" in arguments else nullcontext():
            assert main(["benchmark", str(checkpoint), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_format_of_the_bundled_model_is_in_the_table():
    """In a process of its own: TensorFlow takes a number of threads before it starts."""
    formats = ["onnx", "openvino", "torch-export", "aoti", "savedmodel", "litert"]
    done = subprocess.run(
        [sys.executable, "-m", "groupvit_common.cli", "benchmark", "demo", "--formats", ",".join(formats), "--sizes",
         "64x96", "--batch", "2", "--threads", "1", "--rounds", "1", "--json"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["program"] for row in rows] == ["PyTorch", "Keras", *formats]
    assert all(row["inputs"] == "2 x 64 x 96" for row in rows)
    # As an export's verification allows.
    assert max(row["difference"] for row in rows) < 1e-4
    assert max(row["pixels"] for row in rows) < 1e-3
