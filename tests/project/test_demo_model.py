"""The promises of the model card, checked on the files of the bundled model."""

import json
import math
import tomllib

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest
from groupvit_common.segmentation.predictor import DEMO_MODEL
from tests.support.paths import ROOT


def test_it_is_small_and_complete() -> None:
    config = GroupViTConfig.from_pretrained(DEMO_MODEL)
    learnt = [p for p in manifest(config).values() if p.kind not in ("running_mean", "running_var", "counter")]
    assert sum(math.prod(p.shape) for p in learnt) < 3_000_000
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 10_000_000
    assert config.segmentation_assignment == "soft"


def test_the_card_says_what_was_measured() -> None:
    first, measured = (json.loads((DEMO_MODEL / name).read_text()) for name in ("training-first.json", "training.json"))
    card = (DEMO_MODEL / "README.md").read_text()
    rows = {
        "**this model**": measured["mean_iou"],
        "its first part, at 96 pixels": first["mean_iou"],
        "its first part, seen at 128 pixels": measured["untrained_mean_iou"],
        "untrained": first["untrained_mean_iou"],
        "the most frequent class everywhere": measured["majority_mean_iou"],
    }
    for row, figures in rows.items():
        bold = "**" if row.startswith("**") else ""
        cells = " | ".join(f"{bold}{figures[level]}{bold}" for level in ("1", "2", "3"))
        assert f"| {row} | {cells} |" in card
    assert f"{first['minutes']} and {measured['minutes']} minutes" in card


def test_wheels_hold_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "demo_model/*" in settings["groupvit_common"]
    assert all(path.is_file() for path in DEMO_MODEL.iterdir())  # one level: what the pattern reaches
