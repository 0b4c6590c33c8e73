"""The programs in `examples/`: alone with a runtime, they segment as `Segmenter` does."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT

EXAMPLES = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert"}
LABELS = "red, orange, yellow, green, cyan, blue, purple, pink, grass, sand, water, bricks, wood, clouds"
BACKGROUND = "grass, sand, water, bricks, wood, clouds"


def path_of(to: str) -> Path:
    return ROOT / "examples" / f"{to}_segment.py"


def loaded(path: Path) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize("to", EXAMPLES)
def test_an_example_is_short_and_imports_its_runtime_alone(to):
    text = path_of(to).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in imports for name in [getattr(node, "module", None) or node.names[0].name]}
    assert names - set(sys.stdlib_module_names) == {EXAMPLES[to], "numpy", "PIL"}


@pytest.mark.slow
@pytest.mark.parametrize("to", EXAMPLES)
def test_an_example_segments_as_the_segmenter_does(to, tmp_path, capsys):
    from conversion.exports.export import export
    from groupvit_common.data.scenes import make_scene
    from groupvit_torch import Segmenter

    export(
        "demo", tmp_path / "out", to, parts="segment", preprocess=True, labels=LABELS, background_labels=BACKGROUND,
        verify=False,
    )  # fmt: skip
    photo, overlay = tmp_path / "scene.png", tmp_path / "overlay.png"
    Image.fromarray(make_scene(3, 1, 1, (150, 201)).image).save(photo)
    example = loaded(path_of(to))
    label_map, names = example.segment(tmp_path / "out", Image.open(photo))
    wanted = Segmenter.from_pretrained("demo", labels=LABELS, background_labels=BACKGROUND)(Image.open(photo))
    assert tuple(names) == tuple(wanted.labels)
    assert label_map.shape == wanted.label_map.shape
    # One value in ten thousand of the resized photo is one step of 255 away: pixels between two groups may change.
    assert (label_map != wanted.label_map).mean() < 1e-3

    example.main([str(tmp_path / "out"), str(photo), str(overlay)])
    printed = dict(line.split("% ")[::-1] for line in capsys.readouterr().out.splitlines())
    shares = {name.strip(): float(share) for name, share in printed.items()}
    assert set(shares) == set(names)
    assert shares["background"] == pytest.approx(100 * (label_map == 0).mean(), abs=0.06)
    drawn, source = np.asarray(Image.open(overlay)), np.asarray(Image.open(photo))
    untouched = (drawn == source).all(-1)
    # Names are written over the corner.
    assert untouched[label_map == 0].mean() > 0.8
    assert not untouched[label_map > 0].any()


@pytest.mark.slow
def test_ray_divides_a_folder_among_actors(tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is large, and not in the dev extra")
    pytest.importorskip("ray.data", reason="needs pandas: pip install 'ray[data]'", exc_type=ImportError)
    from groupvit_common.data.scenes import make_scene
    from groupvit_torch import Segmenter

    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(5):
        Image.fromarray(make_scene(3, index, 1, (64, 80)).image).save(photos / f"{index}.png")
    (photos / "text.png").write_text("hello")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    example = loaded(ROOT / "examples" / "ray_batch.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
        try:
            example.main([str(photos), str(tmp_path / "out"), "--labels", LABELS, "--model", "demo"])
        finally:
            ray.shutdown()
    assert "5 of 6 images are in" in capsys.readouterr().out.splitlines()[-1]
    segmenter = Segmenter.from_pretrained("demo", labels=LABELS, device="cpu")
    for index in range(5):
        label_map = np.asarray(Image.open(tmp_path / "out" / f"{index}.png_labels.png"))
        assert (label_map == segmenter(photos / f"{index}.png").label_map).mean() > 0.999


def test_an_example_says_which_export_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda path: session))
    about = {"groupvit": json.dumps({"preprocess": False, "labels": ["red"]})}
    session = SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=about))
    with pytest.raises(SystemExit, match="with --preprocess and --labels"):
        loaded(path_of("onnx")).segment(tmp_path, Image.new("RGB", (64, 64)))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler")
def test_the_program_in_c_plus_plus_segments_as_the_segmenter_does(tmp_path):
    import torch

    from conversion.exports.export import export
    from groupvit_common.data.scenes import make_scene
    from groupvit_torch import Segmenter

    build, photo, labels = tmp_path / "build", tmp_path / "scene.ppm", tmp_path / "labels.pgm"
    subprocess.run(
        ["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, f"-DTORCH_DIR={torch.__path__[0]}"], check=True
    )
    subprocess.run(["cmake", "--build", build], check=True)
    export(
        "demo", tmp_path / "out", "aoti", parts="segment", preprocess=True, labels=LABELS, background_labels=BACKGROUND,
        verify=False,
    )  # fmt: skip
    image = make_scene(3, 1, 1, (150, 201)).image
    Image.fromarray(image).save(photo)
    package = tmp_path / "out" / "segmenter.pt2"
    printed = subprocess.run([build / "segment", package, photo, labels], check=True, capture_output=True, text=True)
    wanted = Segmenter.from_pretrained("demo", labels=LABELS, background_labels=BACKGROUND)(image).label_map
    found = np.asarray(Image.open(labels))
    assert found.shape == wanted.shape
    # One value in ten thousand of the resized photo is one step of 255 away: pixels between two groups may change.
    assert (found != wanted).mean() < 1e-3
    assert printed.stdout.startswith(f"0: {100 * (found == 0).mean():.3f}"[:6])

    labels.unlink()
    Image.fromarray(image).save(tmp_path / "scene.png")
    refused = subprocess.run(
        [build / "segment", package, tmp_path / "scene.png", labels], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "is not a binary PPM" in refused.stderr
    assert not labels.exists()
