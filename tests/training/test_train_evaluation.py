"""Segmentation sets of a recipe, measured while it trains."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.errors import InputError
from groupvit_common.evaluation.calibration import calibrate
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.protocols import protocol_settings
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.segmentation.predictor import DEMO_MODEL
from groupvit_common.training.checkpoints import Checkpoints, load
from groupvit_common.training.recipe import get_recipe
from groupvit_common.training.run import Run
from groupvit_common.training.settings import changed, to_toml
from groupvit_common.training.start import start_run
from groupvit_common.training.validation import open_evaluation
from tests.support.backends import BACKENDS, Backend
from tests.support.training import quiet, tiny, untraced

PICTURES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as a set of one's own, whose background has no words."""
    root = tmp_path_factory.mktemp("set")
    for part in ("images", "masks"):
        (root / part).mkdir()
    for index in range(PICTURES):
        scene = make_scene(9, index, 1, (48, 48))
        Image.fromarray(scene.image).save(root / "images" / f"{index}.png")
        Image.fromarray(scene.mask).save(root / "masks" / f"{index}.png")
    names = ["background", *(", ".join(names) for names in LEVELS[1])]
    (root / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    return root


def measured(model: Path, folder: Path, backend: Backend, **options: Any) -> dict[str, float]:
    """What `groupvit evaluate` says of a model, in percent."""
    (data,) = open_sets(f"folder:{folder}", limit=options.pop("limit", None))
    settings = replace(protocol_settings("native", "folder"), **options)
    result = evaluate_segmentation(settings.segmenter(segmenter_of(model, backend), 8), data)
    assert result is not None
    return {f"{name}/folder": 100 * value for name, value in result.scores().items()}


def train(backend: Backend) -> Any:
    return importlib.import_module(f"groupvit_{backend.name}.train").train


def segmenter_of(model: Path, backend: Backend) -> Any:
    return importlib.import_module(f"groupvit_{backend.name}").Segmenter.from_pretrained(model, device="cpu")


# In Keras a run measures in tests/groupvit_tf/test_train.py, and sets are measured in the test below.
@pytest.mark.parametrize("backend", ["torch", pytest.param("tf", marks=pytest.mark.slow)], indirect=True)
def test_a_run_measures_the_recipes_sets(backend, folder, tmp_path):
    """Every so many steps, as `groupvit evaluate` would; and the sets count for which checkpoint is the best."""
    lines: list[str] = []
    recipe = tiny(
        **{"evaluation.data": (f"folder:{folder}",), "evaluation.limit": 3, "evaluation.protocol": "native"},
        **{"evaluation.background": 0.3, "evaluate_every": 1, "save_every": 1, "ema_decay": 0.5, "steps": 2},
    )  # fmt: skip
    with untraced(backend.name):
        train(backend)(recipe, tmp_path, log=lines.append)

    expected = measured(tmp_path, folder, backend, background=0.3, limit=3)
    assert expected["mean_iou/folder"] > 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "mean_iou/folder" in record]
    assert [record["step"] for record in records] == [1, 2]
    for name, value in expected.items():
        # What is counted are pixels; in Keras the weights were in the layout of training.
        assert records[-1][name] == pytest.approx(value, abs=1e-9), name
    said = [line for line in lines if "folder" in line and "mean IoU" in line]
    assert len(said) == 2
    assert "3 images" in said[0]
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["sets"] == {name: round(value, 1) for name, value in expected.items()}
    state = load(Checkpoints(tmp_path).all()[-1])
    assert state.measure == pytest.approx(np.mean([records[-1]["mean_iou/level_1"], expected["mean_iou/folder"]]))


def test_processes_share_the_pictures(backend, folder, tmp_path):
    """Two that hold the same model come to what one comes to; the first one tells."""
    recipe = tiny(**{"evaluation.data": (f"folder:{folder}",), "evaluation.protocol": "native"})
    model = tmp_path / "model"
    train(BACKENDS["torch"]())(recipe, model, log=quiet)
    segmenter = segmenter_of(model, backend)
    sent: list[Any] = []

    def run(rank: int, every: Any) -> Run:
        run = start_run(recipe, tmp_path / "shared", log=quiet, rank=rank, world=2)
        assert run.measures_here
        run.measure_and_save(lambda directory: None, segmenter, SimpleNamespace(rank=rank, world=2, all=every))
        return run

    def send(value: Any) -> list[Any]:
        sent.append(json.loads(json.dumps(value)))
        return [None, value]

    second = run(1, send)
    assert second.validation.sets == {}
    failure, numbers = sent
    assert (failure, numbers[3]) == ("", 2)  # pictures
    first = run(0, lambda value: [value, sent.pop(0)])
    assert first.validation.sets == pytest.approx(measured(model, folder, backend), abs=1e-9)


def test_a_picture_that_cannot_be_read_costs_a_measurement_and_no_run(folder, tmp_path):
    """What was measured before is not told again as if it were of now, and what is measured without it is no measure
    of the best."""
    mine = tmp_path / "set"
    shutil.copytree(folder, mine)
    names = [f"folder:{mine}", f"folder:{folder}"]
    recipe = tiny(
        **{"evaluation.data": tuple(names), "evaluation.protocol": "native", "evaluate_every": 3, "save_every": 3}
    )
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "mean IoU, %; 5 images" in line:
            (mine / "images" / "2.png").write_bytes(b"no picture")

    result = train(BACKENDS["torch"]())(recipe, tmp_path / "run", log=log)
    assert len(result.losses) == 6
    (told,) = [line for line in lines if "not measured" in line]
    assert re.match(r"step 6: folder:.*/set is not measured, training continues: .*2\.png", told)
    sets = json.loads((tmp_path / "run" / "training.json").read_text())["sets"]
    assert {name.partition("/")[2] for name in sets} == {names[1]}
    checkpoints = Checkpoints(tmp_path / "run")
    assert [load(path).measure is None for path in checkpoints.all()] == [False, True]


@pytest.mark.parametrize("what", [evaluate_segmentation, calibrate])
def test_what_one_process_cannot_read_ends_all(what, folder, tmp_path):
    """In the same words, where the others would wait for its numbers."""
    mine = tmp_path / "set"
    shutil.copytree(folder, mine)
    (mine / "masks" / "1.png").write_bytes(b"no picture")
    (data,) = open_sets(f"folder:{mine}")
    group, gathered = threading.Barrier(2), [["", ""] for _ in range(9)]

    def evaluate(rank: int) -> str:
        calls = iter(gathered)

        def every(value: Any) -> list[Any]:
            values = next(calls)
            values[rank] = value
            group.wait(timeout=60)
            return values

        segmenter = segmenter_of(DEMO_MODEL, BACKENDS["torch"]())
        place = SimpleNamespace(rank=rank, world=2, all=every)
        with pytest.raises(InputError) as failure:
            what(protocol_settings("native", "folder").segmenter(segmenter, 8), data, process=place)
        return str(failure.value)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(evaluate, range(2))
    assert first == second
    assert "1.png" in first


def test_a_set_that_is_not_there_is_told_before_anything_is_made(backend, tmp_path):
    recipe = tiny(**{"evaluation.data": (f"voc:{tmp_path / 'VOC2012'}",)})
    with pytest.raises(InputError, match=r"there is no folder .*VOC2012"):
        train(backend)(recipe, tmp_path / "run", log=quiet)
    assert not (tmp_path / "run").exists()


def test_settings(folder, tmp_path):
    recipe = tiny(**{"evaluation.data": ("scenes:2", f"folder:{folder}", "folder:x"), "evaluation.background": 0.5})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert get_recipe(path).evaluation == recipe.evaluation
    with pytest.raises(InputError, match=r"evaluation\.data names scenes:2 twice"):
        tiny(**{"evaluation.data": ("scenes:2", "scenes:2")})
    with pytest.raises(InputError, match=r"evaluation\.background must lie between 0 and 1, got 2"):
        tiny(**{"evaluation.background": 2.0})
    with pytest.raises(InputError, match=r"evaluation\.limit must be at least 0"):
        tiny(**{"evaluation.limit": -1})
    with pytest.raises(InputError, match=r"evaluation\.protocol"):
        tiny(**{"evaluation.protocol": "mine"})


def test_names_and_thresholds(folder):
    """Sets of one kind are told apart; a threshold is for sets that have use for one."""
    from groupvit_common.training.validation import open_evaluation

    one, other = f"folder:{folder}", f"folder:{folder}/../{folder.name}"
    settings = tiny(**{"evaluation.data": (one, other, "scenes"), "evaluation.background": 0.5, "evaluation.limit": 2})
    opened = open_evaluation(settings.evaluation)
    assert [name for name, _, _ in opened] == [one, other, "scenes:1", "scenes:2", "scenes:3"]
    assert [how.background for _, _, how in opened] == [0.5, 0.5, None, None, None]
    assert [how.window for _, _, how in opened] == [448, 448, None, None, None]
    assert all(len(data) == 2 for _, data, _ in opened)
    assert len(opened[2][1].background_labels) == len(BACKGROUNDS)


def test_a_threshold_is_for_sets_with_a_background(folder, tmp_path):
    """One that has none, and scenes, whose background has words, are opened without."""
    for part in ("images", "masks"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "classes.txt").write_text("\n".join(names[0] for names in (("ground",), *LEVELS[1])), encoding="utf-8")
    recipe = changed(tiny(), {"evaluation.data": (f"folder:{folder}", f"folder:{tmp_path}", "scenes:1")})
    thresholds = [how.background for _, _, how in open_evaluation(recipe.evaluation)]
    assert thresholds == [0.95, None, None]
    recipe = changed(recipe, {"evaluation.background": 0.4, "evaluation.protocol": "native"})
    assert [how.background for _, _, how in open_evaluation(recipe.evaluation)] == [0.4, None, None]
