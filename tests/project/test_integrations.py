"""`examples/` for other programs, and the Dockerfile: against the real packages where they are installed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from groupvit_common.cli.command_line import build_parser
from groupvit_common.data.scenes import make_scene
from groupvit_common.errors import InputError
from groupvit_torch import Segmenter, pipeline
from tests.support.examples import example
from tests.support.paths import ROOT

LABELS = "red, green, blue, yellow"
BACKGROUND = "grass, sand, water"


@pytest.fixture(name="image", scope="module")
def _image():
    return Image.fromarray(make_scene(2022, 0, 1, (96, 128)).image)


@pytest.fixture(name="segmenter", scope="module")
def _segmenter():
    return Segmenter.from_pretrained("demo")


# -- a Gradio Space --


@pytest.fixture(name="space", scope="module")
def _space(segmenter):
    space = example("space/app.py")
    space.segmenter = lambda: segmenter
    return space


def test_the_space_shows_the_masks_of_the_segmenter(space, image, segmenter):
    (shown, masks), colours = space.segment(np.asarray(image), LABELS, BACKGROUND, 0.0)
    wanted = segmenter.with_labels(LABELS, BACKGROUND)(image)
    np.testing.assert_array_equal(shown, np.asarray(image))
    assert masks
    for mask, name in masks:
        assert name != "background"
        np.testing.assert_array_equal(mask, wanted.mask(name))
    assert sum(mask.sum() for mask, _ in masks) == (wanted.label_map > 0).sum()
    assert all(re.fullmatch("#[0-9a-f]{6}", colours[name]) for _, name in masks)
    with pytest.raises(InputError, match="Choose a photo"):
        space.segment(None, LABELS, "", 0.0)
    with pytest.raises(InputError, match="label"):
        space.segment(np.asarray(image), "", "", 0.0)


def test_the_space_is_a_page(space):
    pytest.importorskip("gradio")
    assert any(getattr(each, "label", None) == "Photo" for each in space.page().blocks.values())


def test_the_space_tells_the_hub_how_it_is_run():
    header = (ROOT / "examples/space/README.md").read_text(encoding="utf-8").split("---\n")[1]
    about = dict(line.split(": ", 1) for line in header.splitlines())
    assert about["sdk"] == "gradio"
    assert (ROOT / "examples/space" / about["app_file"]).is_file()
    # The hub refuses more.
    assert len(about["short_description"]) <= 60


# -- an inference endpoint --


@pytest.fixture(name="handler", scope="module")
def _handler():
    return example("inference_endpoint/handler.py").EndpointHandler("demo")


def encoded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_the_endpoint_answers_as_the_pipeline(handler, image):
    labels = ["red", "green", "blue"]
    wanted = pipeline("zero-shot-image-segmentation", model="demo")(image, labels, background_labels="grass, sand")
    parameters = {"candidate_labels": labels, "background_labels": "grass, sand"}
    text = encoded(image)
    for data in (
        {"inputs": image, "parameters": parameters},
        {"inputs": base64.b64decode(text), "parameters": parameters},
        {"inputs": text, "parameters": parameters},
        {"inputs": f"data:image/png;base64,{text}", "parameters": {**parameters, "candidate_labels": "red,green,blue"}},
        {"inputs": {"image": text, **parameters}},
    ):
        found = json.loads(json.dumps(handler(data)))
        assert [each["label"] for each in found] == [each["label"] for each in wanted]
        for each, one in zip(found, wanted, strict=True):
            assert each["score"] == pytest.approx(one["score"])
            mask = Image.open(io.BytesIO(base64.b64decode(each["mask"])))
            np.testing.assert_array_equal(np.asarray(mask), np.asarray(one["mask"]))


@pytest.mark.parametrize(
    ("inputs", "parameters", "sentence"),
    [
        ("/etc/passwd", {"candidate_labels": ["a"]}, "no base64 text"),
        ("https://example.org/photo.png", {"candidate_labels": ["a"]}, "no base64 text"),
        ("AAAA", {"candidate_labels": ["a"]}, "no supported image format"),
        (b"%PDF-1.4", {"candidate_labels": ["a"]}, "PDF"),
        (None, {"candidate_labels": ["a"]}, "must be base64 text, bytes or a PIL image, got NoneType"),
        (b"", {}, "candidate_labels are missing"),
        (b"", {"candidate_labels": [1]}, '"candidate_labels" must be a list of texts or one text, got'),
        (b"", {"candidate_labels": ["a"] * 2000}, "has 2000 labels, expected at most 1000"),
        (b"", {"candidate_labels": "a" + "|a" * 2000}, "has 2001 labels, expected at most 1000"),
        (b"", {"background_labels": ["a" * 200_000]}, "is too long: expected at most 100000 characters"),
        (b"", {"candidate_labels": "a", "templates": "/etc/passwd"}, "'templates' is no parameter here"),
        (b"", {"candidate_labels": "a", "hypothesis_template": "/etc/passwd"}, "a template needs {} exactly once"),
        (b"", ["cat"], '"parameters" must be an object, got list'),
    ],
)  # fmt: skip
def test_a_bad_request_to_the_endpoint_gets_a_sentence(handler, inputs, parameters, sentence):
    with pytest.raises(InputError) as caught:
        handler({"inputs": inputs, "parameters": parameters})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_request_without_inputs_gets_a_sentence(handler):
    with pytest.raises(InputError, match='a request needs "inputs"'):
        handler({"image": "AAAA"})


# -- Label Studio --

CONFIG = """<View>
  <Image name="photo" value="$picture"/>
  <BrushLabels name="what" toName="photo">
    <Label value="Red" predicted_values="red, crimson"/><Label value="Green"/><Label value="background"/>
  </BrushLabels>
</View>"""
# What Label Studio's own tools make of it.
PARSED = {
    "what": {
        "type": "BrushLabels", "to_name": ["photo"], "inputs": [{"type": "Image", "value": "picture"}],
        "labels": ["Red", "Green", "background"],
        "labels_attrs": {"Red": {"value": "Red", "predicted_values": "red, crimson"}, "Green": {}, "background": {}},
    }
}  # fmt: skip


@pytest.fixture(name="label_studio")
def _label_studio(monkeypatch, segmenter):
    """The backend's module; without label-studio-ml, over a class with what it uses of it."""
    if importlib.util.find_spec("label_studio_ml") is None:
        stub, base = types.ModuleType("label_studio_ml.model"), types.ModuleType("label_studio_ml")
        stub.LabelStudioMLBase = type(  # type: ignore[attr-defined]
            "LabelStudioMLBase", (), {"__init__": lambda self, label_config: None, "parsed_label_config": PARSED}
        )
        monkeypatch.setitem(sys.modules, "label_studio_ml", base)
        monkeypatch.setitem(sys.modules, "label_studio_ml.model", stub)
    module = example("label_studio/model.py")
    module.segmenter = lambda: segmenter
    return module


def test_label_studio_gets_brush_labels_by_its_names(label_studio, image, segmenter, tmp_path, monkeypatch):
    from groupvit_common.segmentation.adapters import to_label_studio

    monkeypatch.setattr(label_studio.GroupViTBackend, "get_local_path", lambda self, url: url, raising=False)
    image.save(tmp_path / "photo.png")
    backend = label_studio.GroupViTBackend(label_config=CONFIG)
    tasks = [
        {"id": 1, "data": {"picture": str(tmp_path / "photo.png")}},
        {"id": 2, "data": {"picture": str(tmp_path / "missing.png")}},
    ]
    found, missing = backend.predict(tasks)
    wanted = segmenter.with_labels(["Red, crimson", "Green", "background"])(image)
    assert found["result"] == to_label_studio(wanted, from_name="what", to_name="photo")
    assert {region["value"]["brushlabels"][0] for region in found["result"]} <= {"Red", "Green"}
    assert 0 <= found["score"] <= 1
    assert json.loads(json.dumps(found)) == found
    assert missing["result"] == []


def test_a_configuration_without_brush_labels_gets_a_sentence(label_studio):
    with pytest.raises(InputError, match="no <BrushLabels> on an <Image>"):
        label_studio.brush_labels({"box": PARSED["what"] | {"type": "RectangleLabels"}})
    with pytest.raises(InputError, match="has no labels"):
        label_studio.brush_labels({"what": PARSED["what"] | {"labels": []}})


def test_the_configuration_is_what_label_studio_makes_of_it(label_studio):
    tools = pytest.importorskip("label_studio_sdk._extensions.label_studio_tools.core.label_config")
    assert label_studio.brush_labels(tools.parse_config(CONFIG)) == label_studio.brush_labels(PARSED)


# -- FiftyOne --


TARGETS = {1: "red", 2: "green", 3: "blue", 4: "yellow"}


def test_a_fiftyone_model_returns_the_label_maps(image, segmenter):
    fiftyone = pytest.importorskip("fiftyone")
    chosen = segmenter.with_labels(LABELS, BACKGROUND)
    model = example("fiftyone_segment.py").SegmenterModel(chosen)
    assert isinstance(model, fiftyone.core.models.Model)
    assert (model.media_type, model.ragged_batches, model.transforms, model.preprocess) == ("image", False, None, False)
    images = [np.asarray(image), np.asarray(image.resize((96, 128)))]
    with model:
        labels = [model.predict(images[0]), *model.predict_all(images)]
    for label, each in zip(labels, [images[0], *images], strict=True):
        assert isinstance(label, fiftyone.Segmentation)
        np.testing.assert_array_equal(label.mask, chosen(each).label_map)
    assert model.mask_targets == TARGETS


def test_a_fiftyone_data_set_is_segmented(image, segmenter, tmp_path):
    fiftyone = pytest.importorskip("fiftyone")
    try:
        dataset = fiftyone.Dataset()
    except fiftyone.core.config.FiftyOneConfigError as error:
        pytest.skip(str(error))
    for name, size in (("a", (128, 96)), ("b", (96, 128))):
        image.resize(size).save(tmp_path / f"{name}.png")
        dataset.add_sample(fiftyone.Sample(filepath=str(tmp_path / f"{name}.png")))
    chosen = segmenter.with_labels(LABELS, BACKGROUND)
    example("fiftyone_segment.py").apply(dataset, chosen, batch_size=2)
    for sample in dataset:
        np.testing.assert_array_equal(sample.groupvit.mask, chosen(sample.filepath).label_map)
    assert dataset.mask_targets["groupvit"] == TARGETS
    dataset.delete()


# -- the Dockerfile --


def test_the_dockerfile_copies_what_is_there_and_runs_without_root():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for word in line.split()[:-1]]
    assert {"groupvit_common", "groupvit_torch", "groupvit_tf", "conversion"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    assert re.search(r"^USER [1-9]\d*$", text, re.M)
    program, *arguments = json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.M)[0])
    options = build_parser().parse_args(arguments)
    assert (program, arguments[0], options.host) == ("groupvit", "serve", "0.0.0.0")
    assert f"127.0.0.1:{options.port}/healthz" in re.findall(r"^HEALTHCHECK .+$", text, re.M)[0]
    extras = re.findall(r"'\.\[([\w,]+)\]'", text)[0].split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
