"""`examples/onnxruntime_web` in headless Chromium: the page reads images and labels as Python does.

Programs that are made here by hand stand in for an exported model, which takes half a minute to write, but in the slow
test.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groupvit_common.data.scenes import make_scene
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.images import load_image
from groupvit_common.preprocessing.prompts import label_embedding, parse_labels
from groupvit_common.preprocessing.tokenizer import CLIPTokenizerFast
from tests.support.browser import serving
from tests.support.examples import example
from tests.support.paths import ROOT

RUNTIME = Path(sys.prefix) / "web"
LABELS = "red, orange, yellow, green, cyan, blue, purple, pink"
BACKGROUND = "grass, sand, water, bricks, wood, clouds"
ORIENTATION = 0x0112
TEXTS = [
    "cat", "  A  Photo\u00a0of a CAT.", "don't stop 'til 3:45pm!!", "Cafe\u0301 \u00ceLE \u01c5 \u0130stanbul",
    "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3", "\u4e2d\u6587 \u65e5\u672c", "\U0001f468\u200d\U0001f680 and \ufeff",
    "next\u0085line\u2028par", "x" * 300, "1234\u00bd\u00b2", "a_b-c/d\\e", "<|endoftext|> end", "''s", "",
]  # fmt: skip


@pytest.fixture(name="fill", scope="module")
def _fill():
    fill = example("onnxruntime_web/fill.py")
    if not all((RUNTIME / name).is_file() for name in fill.RUNTIME):
        pytest.skip(f"onnxruntime-web is not in {RUNTIME}: make browser")
    return fill


def write_onnx(path, inputs, nodes, output, constants=()):
    """Writes a program: inputs and the output are (name, type, axes), nodes (operator, inputs, output, attributes)."""
    from onnx import TensorProto, helper, numpy_helper, save

    infos = [helper.make_tensor_value_info(name, getattr(TensorProto, kind), axes) for name, kind, axes in inputs]
    out = helper.make_tensor_value_info(output[0], getattr(TensorProto, output[1]), output[2])
    made = [helper.make_node(kind, given, [result], **more) for kind, given, result, more in nodes]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    graph = helper.make_graph(made, "stand-in", infos, [out], values)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


IMAGES = ("images", "UINT8", ["B", "H", "W", 3])
LABEL_MAP = ("label_map", "INT32", ["B", "H", "W"])


@pytest.fixture(name="sites", scope="module")
def _sites(fill, tmp_path_factory):
    """The page with programs that stand in for a model: with labels inside, and with labels that are typed."""
    table = np.random.default_rng(0).standard_normal((640, 3)).astype(np.float32)
    root = tmp_path_factory.mktemp("sites")
    for name in ("inside", "typed", "empty"):
        (root / name).mkdir()
        for file in fill.PAGE:
            shutil.copy(ROOT / "examples" / "onnxruntime_web" / file, root / name)
        (root / name / "onnxruntime").symlink_to(RUNTIME)
        if name != "empty":
            (root / name / "model").mkdir()
    # A label that tells the values of all three channels.
    write_onnx(
        root / "inside/model/segmenter.onnx",
        [IMAGES],
        [
            ("Cast", ["images"], "wide", {"to": 6}),
            ("Mul", ["wide", "factors"], "parts", {}),
            ("ReduceSum", ["parts", "last"], "sums", {"keepdims": 0}),
            ("Mod", ["sums", "count"], "label_map", {}),
        ],
        LABEL_MAP,
        {"factors": np.int32([1, 5, 25]), "last": np.int64([-1]), "count": np.int32(251)},
    )
    write_onnx(
        root / "typed/model/segmenter.onnx",
        [IMAGES, ("text_embeds", "FLOAT", ["L", 3])],
        [
            ("Cast", ["images"], "wide", {"to": 1}),
            ("Transpose", ["text_embeds"], "across", {"perm": [1, 0]}),
            ("MatMul", ["wide", "across"], "similarity", {}),
            ("ArgMax", ["similarity"], "best", {"axis": -1, "keepdims": 0}),
            ("Cast", ["best"], "label_map", {"to": 6}),
        ],
        LABEL_MAP,
    )
    write_onnx(
        root / "typed/model/text_encoder.onnx",
        [("input_ids", "INT64", ["N", "T"]), ("attention_mask", "INT64", ["N", "T"])],
        [
            ("Gather", ["table", "input_ids"], "tokens", {"axis": 0}),
            ("Cast", ["attention_mask"], "mask", {"to": 1}),
            ("Unsqueeze", ["mask", "last"], "column", {}),
            ("Mul", ["tokens", "column"], "read", {}),
            ("ReduceSum", ["read", "second"], "sums", {"keepdims": 0}),
            ("LpNormalization", ["sums"], "text_embeds", {"axis": -1, "p": 2}),
        ],
        ("text_embeds", "FLOAT", ["N", 3]),
        {"table": table, "last": np.int64([-1]), "second": np.int64([1])},
    )
    shutil.copy(ROOT / "groupvit_common" / "demo_model" / "tokenizer.json", root / "typed/model")
    for name, labels in (("inside", [f"label {i}" for i in range(251)]), ("typed", None)):
        report = {"metadata": {"labels": labels, "max_tokens": 32}}
        (root / name / "model/export_report.json").write_text(json.dumps(report), encoding="utf-8")
        text = {"labels": "red", "background_labels": ""}
        (root / name / "model/labels.json").write_text(json.dumps(text), encoding="utf-8")
    with serving(root) as address:
        yield address, table, root


def segmented(page, path):
    """Chooses an image and returns the label map and the names that the page has for it."""
    page.evaluate("delete window.segmentation")
    page.set_input_files("#file", path)
    return shown(page)


def shown(page):
    page.wait_for_selector("#status[data-state=done], #status[data-state=fault]")
    found = page.evaluate("window.segmentation && { ...segmentation, labelMap: Array.from(segmentation.labelMap) }")
    assert found, page.inner_text("#status")
    return np.reshape(found["labelMap"], (found["height"], found["width"])), found["names"]


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory):
    """Images of several kinds: turned by EXIF, transparent, grey."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    image = Image.fromarray(make_scene(3, 1, 1, (96, 136)).image)
    image.save(folder / "scene.png")
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    # Without fewer samples of colour, which decoders may spread in different ways.
    image.save(folder / "turned.jpg", quality=95, subsampling=0, exif=turned)
    image.convert("L").save(folder / "grey.png")
    image.putalpha(Image.fromarray(rng.integers(0, 256, (96, 136), np.uint8)))
    image.save(folder / "transparent.png")
    (folder / "text.png").write_text("no image", encoding="utf-8")
    return folder


def test_the_page_reads_images_as_python_does(sites, files, pages):
    page = pages.open(f"{sites[0]}/inside/")
    page.wait_for_selector("#status[data-state=ready]")
    assert page.inner_text("#fixed").startswith("Labels: label 0, label 1, ")
    assert page.is_hidden("#typed")
    # Of WebGL, which alone reads transparent pixels: Chromium remarks that reading takes time.
    pages.allow("GPU stall due to ReadPixels")
    for name in ("scene.png", "turned.jpg", "grey.png", "transparent.png"):
        label_map, _ = segmented(page, files / name)
        wanted = np.asarray(load_image(files / name)).astype(int) @ [1, 5, 25] % 251
        np.testing.assert_array_equal(label_map, wanted, err_msg=name)
    value, count = max(enumerate(np.bincount(wanted.ravel())), key=lambda pair: pair[1])
    assert page.locator("#legend li").first.inner_text().split("\n") == [
        f"label {value}", f"{100 * count / wanted.size:.1f} %",
    ]  # fmt: skip
    page.set_input_files("#file", files / "text.png")
    page.wait_for_selector("#status[data-state=fault]")
    assert "cannot read the file as an image" in page.inner_text("#status")


def test_labels_are_typed(sites, files, pages):
    address, table, _ = sites
    page = pages.open(f"{address}/typed/")
    page.wait_for_selector("#status[data-state=ready]")
    assert page.input_value("#labels") == "red"
    page.set_input_files("#file", files / "scene.png")
    page.wait_for_selector("#status[data-state=done]")
    typed, background = "cat, couch | sofa, Grass | lawn, red", "grass, a blue sky"
    page.fill("#labels", typed)
    page.fill("#background", background)
    page.press("#background", "Enter")
    page.wait_for_selector("#status[data-state=done]")
    label_map, names = shown(page)
    assert names == ["background", "cat", "couch", "red"]

    tokenizer = CLIPTokenizerFast.from_pretrained("demo")
    every = parse_labels("cat, couch | sofa, Grass | lawn, red, a blue sky")
    embeds = []
    for label in every:
        sums = [
            np.sum([table[ids] for ids in tokenizer(list(texts))["input_ids"]], axis=1)
            for texts in label.prompts(["a photo of a {}."])
        ]
        embeds.append(label_embedding([each / np.linalg.norm(each) for each in sums], "mean", True)[0])
    similarity = np.asarray(load_image(files / "scene.png"), np.float32) @ np.array(embeds).T
    best = np.sort(similarity, axis=-1)
    # Of two labels within float32's rounding of sums of three products either may be the best.
    clear = best[..., -1] - best[..., -2] > 1e-3
    assert clear.mean() > 0.9
    wanted = np.array([1, 2, 0, 3, 0])[similarity.argmax(-1)]
    np.testing.assert_array_equal(label_map[clear], wanted[clear])

    for labels, sentence in (
        ("", "Type at least one label"),
        ("cat, dog | cat", "“cat” is there twice"),
        ("cat, Cat", "“cat” is there twice"),
        ('dog | "an animal"', "leave the quotes out"),
    ):
        page.fill("#background", "")
        page.fill("#labels", labels)
        page.click("#apply")
        page.wait_for_selector("#status[data-state=fault], #status[data-state=done]")
        assert sentence in page.inner_text("#status")
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_tokenizer_has_the_ids_of_pythons(sites, pages):
    """The bundled model's, and CLIP's own where it is."""
    address, _, root = sites
    page = pages.open(f"{address}/empty/index.html")
    for name in filter(None, ("demo", os.environ.get("GROUPVIT_CLIP_TOKENIZER"))):
        tokenizer = CLIPTokenizerFast.from_pretrained(name)
        (root / "tokenizer.json").write_text(tokenizer.file_texts()["tokenizer.json"], encoding="utf-8")
        found = page.evaluate(
            """async (texts) => {
                const { Tokenizer } = await import("./tokenizer.js");
                const content = await (await fetch("../tokenizer.json", { cache: "no-store" })).json();
                const tokenizer = new Tokenizer(content, 32);
                return texts.map((text) => tokenizer.encode(text));
            }""",
            TEXTS,
        )
        wanted = tokenizer(TEXTS, truncation=True, max_length=32)["input_ids"]
        for text, ids, each in zip(TEXTS, wanted, found, strict=True):
            assert each == list(ids), text
    # This page has no model, and says so.
    page.wait_for_selector("#status[data-state=fault]")
    assert page.inner_text("#status") == "model/export_report.json is missing: fill this folder as README.md says."
    pages.allow("404")


def test_a_folder_that_cannot_be_filled_gets_a_sentence(fill, tmp_path):
    with pytest.raises(InputError, match="is there already: name a new folder"):
        fill.fill(tmp_path, "demo")
    with pytest.raises(InputError, match=r"has no ort\.wasm\.bundle\.min\.mjs: name the folder dist"):
        fill.fill(tmp_path / "deep" / "site", "demo", runtime=tmp_path)
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_the_bundled_model_segments_in_the_page_as_in_python(inside, fill, files, pages, tmp_path):
    from groupvit_torch import Segmenter

    site = tmp_path / "site"
    fill.fill(site, "demo", LABELS, BACKGROUND, inside=inside, runtime=RUNTIME)
    segmenter = Segmenter.from_pretrained("demo", labels=LABELS, background_labels=BACKGROUND)
    pages.allow("GPU stall due to ReadPixels")
    with serving(site) as address:
        page = pages.open(address)
        page.wait_for_selector("#status[data-state=ready]")
        # One is of the model's own size, the others are resized.
        Image.fromarray(make_scene(3, 1, 1, (128, 168)).image).save(files / "own.png")
        Image.fromarray(make_scene(3, 2, 1, (301, 200)).image).save(files / "tall.png")
        for name in ("own.png", "tall.png", "scene.png", "turned.jpg", "grey.png", "transparent.png"):
            label_map, names = segmented(page, files / name)
            wanted = segmenter(files / name)
            assert tuple(names) == tuple(wanted.labels)
            assert label_map.shape == wanted.label_map.shape
            # Rounding may move a pixel between two groups.
            assert (label_map != wanted.label_map).mean() <= 1e-4, name
