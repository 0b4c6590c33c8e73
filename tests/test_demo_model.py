"""What the model card and the issue of a small bundled model promise, read off the files."""

import json
import math
import tomllib
from pathlib import Path

from groupvit_common.config import GroupViTConfig
from groupvit_common.parameters import manifest
from groupvit_common.predictor import DEMO_MODEL

ROOT = Path(__file__).parent.parent


def test_it_is_small_and_complete() -> None:
    config = GroupViTConfig.from_pretrained(DEMO_MODEL)
    learnt = [p for p in manifest(config).values() if p.kind not in ("running_mean", "running_var", "counter")]
    assert sum(math.prod(p.shape) for p in learnt) < 3_000_000
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 8_000_000
    assert config.segmentation_assignment == "soft"


def test_the_card_says_what_was_measured() -> None:
    measured = json.loads((DEMO_MODEL / "training.json").read_text())
    card = (DEMO_MODEL / "README.md").read_text()
    for row, name in (("**this model**", "mean_iou"), ("the same, untrained", "untrained_mean_iou")):
        figures = measured[name]
        bold = "**" if row.startswith("**") else ""
        cells = " | ".join(f"{bold}{figures[level]}{bold}" for level in ("1", "2", "3"))
        assert f"| {row} | {cells} |" in card
    assert f"{measured['minutes']} minutes" in card
    assert measured["minutes"] < 60


def test_wheels_hold_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "demo_model/*" in settings["groupvit_common"]
    assert all(path.is_file() for path in DEMO_MODEL.iterdir())  # one level: what the pattern reaches
