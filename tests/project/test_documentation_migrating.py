"""Every block of code in docs/migrating.md runs as it stands; the model of the hub is a small random one."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupvit_common.cli.command_line import main as command_line
from tests.support.models import random_checkpoint, smallest_config
from tests.support.paths import REFERENCE, ROOT
from tests.support.peers import make_checkpoint

# Keras asks its variables for arrays in a way that NumPy calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHELL = re.findall(r"```\n(.*?)```", re.sub(r"```python\n.*?```", "", PAGE, flags=re.DOTALL), re.DOTALL)


def test_the_page_has_the_blocks_that_are_run_here() -> None:
    assert [("groupvit_torch" in block, "groupvit_tf" in block) for block in PYTHON] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert len(SHELL) == 1


def test_blocks_for_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "hub", text_layers=1, depths=(1, 1, 0), groups=(6, 5))
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save("photo.jpg")
    variables: dict[str, Any] = {}
    exec(PYTHON[0].replace("nvidia/groupvit-gcc-yfcc", "hub"), variables)
    assert variables["outputs"].segmentation_logits.shape == (1, 2, 32, 32)
    assert variables["grouping"].shape == (1, 5, 32, 32)
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    exec(PYTHON[1], variables)
    assert variables["features"].shape == (1, 20)


@pytest.mark.slow  # Two conversions are proved in both frameworks; tests/conversion has each step.
def test_commands_for_tensorflow_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").symlink_to(REFERENCE / "transformers" / "legacy_eos" / "tf")
    for line in SHELL[0].splitlines():
        assert command_line(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "mine" / "model.safetensors").is_file()


def test_blocks_for_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_checkpoint(tmp_path / "mine", smallest_config())
    variables: dict[str, Any] = {}
    exec(PYTHON[2], variables)
    assert variables["again"].config.to_dict() == variables["model"].config.to_dict()
    assert variables["classifier"].output_shape == (None, 10)
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
