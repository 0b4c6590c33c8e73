"""The page about an evaluation: what it says against the results, and that it needs nothing from elsewhere."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from groupvit_common import cli
from groupvit_common.cli.terminal import BAD_INPUT
from groupvit_common.drawing.palette import label_colours
from groupvit_common.errors import InputError
from groupvit_common.evaluation.classification import evaluate_classification
from groupvit_common.evaluation.datasets.classification import open_classification_set
from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.journal import line_of
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.page import PAGE, _by_turns, _oracle_is_bound, write_page
from groupvit_common.evaluation.protocols import ProtocolSettings
from groupvit_common.evaluation.report import record_of, write_results
from groupvit_common.evaluation.run import RunOptions
from groupvit_common.evaluation.segmentation import evaluate_segmentation

# Without an end tag.
VOID = {"meta", "img", "br", "input", "link"}
# JPEG of flat colours, blurred at edges.
JPEG = 40
EVIL = '</script>("&1")'


class Page(HTMLParser):
    """Checks that tags close in order; keeps rows of tables, images by their alt texts, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.images, self.attributes, self.text, self.scripts = [], [], {}, [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += attrs.items()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            kind, data = attrs["src"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
            assert image.size == (int(attrs["width"]), int(attrs["height"]))
            self.images[attrs["alt"]] = np.asarray(image).astype(int)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append((self.open[-1], data))
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def rows(self, first):
        """Rows of the table whose first title is `first`, without it."""
        return next(table[1:] for table in self.tables if table[0][0] == first)

    @property
    def order(self):
        """Names of images as they come."""
        return [alt.removeprefix("image: ") for alt in self.images if alt.startswith("image: ")]


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    # Nothing is loaded: no address but in data URIs, and none in styles and scripts.
    for name, value in page.attributes:
        assert name != "href"
        assert name != "src" or value.startswith("data:")
    assert [tag for tag, _ in page.scripts] == ["style", "script"]
    assert not any(re.search(r"https?:|url\(|@import|import\(|fetch", code) for _, code in page.scripts)
    assert "default-src 'none'; img-src data:" in text
    assert "prefers-color-scheme: dark" in page.scripts[0][1]
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images with a cat-coloured half; names and classes that must not be taken for HTML."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    (folder / "classes.txt").write_text(f"background\nred\nblue\n{EVIL}\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    for i in range(6):
        mask = np.zeros((40, 60), np.uint8)
        mask[:, 30:] = 1 + i % 2
        mask[:5] = 255
        pixels = rng.integers(90, 130, (40, 60, 3), dtype=np.uint8)
        pixels[mask == 1] = (220, 20, 20)
        pixels[mask == 2] = (20, 20, 220)
        name = f"a&b<{i}>"
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def evaluated(folder, demo, tmp_path_factory):
    """A set, the segmenter that it was measured with, and the folder of the results."""
    out = tmp_path_factory.mktemp("results")
    (data,) = open_sets(f"folder:{folder}")
    settings = ProtocolSettings(background=0.5)
    segmenter = settings.segmenter(demo, 4)
    result = evaluate_segmentation(segmenter, data, RunOptions(folder=out))
    write_results(
        result, record_of(result, {"model": "a <model>", "settings": {"background": 0.5, "window": None}}), out
    )
    return data, segmenter, out


def test_a_page_says_what_the_results_say(evaluated):
    data, segmenter, out = evaluated
    path = write_page(out, data, lambda image: segmenter(image).label_map, count=2)
    assert path == out / PAGE
    page, record = read(path), json.loads((out / "results.json").read_text(encoding="utf-8"))
    said = "".join(page.text)
    assert f"{record['mean_iou']:.1%}" in said
    assert "a <model>" in said

    def share(value):
        return "–" if value is None else f"{value:.1%}"

    assert page.rows("class") == [
        [each["name"], share(each["iou"]), share(each["accuracy"]), share(each["oracle_iou"]), f"{each['pixels']:,}"]
        for each in record["classes"]
    ]
    assert page.rows("class")[3][0] == EVIL

    confusions = {s.name: confusion_matrix(s.mask(), segmenter(s.image()).label_map, 4) for s in data}
    ious = {name: mean_iou(confusion) for name, confusion in confusions.items()}
    ranked = sorted(ious, key=lambda name: (ious[name], name))
    assert [row[:2] for row in page.rows("image")] == [[name, f"{ious[name]:.1%}"] for name in ranked]
    assert page.order == [*ranked[:2], ranked[-1], ranked[-2]]

    total = sum(confusions.values())
    wrong = sorted(
        ((total[i, j], i, j) for i in range(4) for j in range(4) if i != j and total[i, j]), key=lambda w: -w[0]
    )
    assert [row[3] for row in page.rows("true")] == [f"{pixels:,}" for pixels, _, _ in wrong]
    for (pixels, i, j), row in zip(wrong, page.rows("true"), strict=True):
        assert row[:3] == [data.classes[i], data.classes[j], f"{pixels / total[i].sum():.1%}"]


def test_images_show_truth_and_errors(evaluated):
    data, _, out = evaluated
    name = data[0].name

    def half_wrong(image):
        label_map = np.zeros((40, 60), np.uint8)
        label_map[:, 30:] = 2 if np.asarray(image)[20, 50, 2] > 100 else 1
        label_map[20:, :10] = 3
        return label_map

    page = read(write_page(out, data, half_wrong, count=6))
    # Enlarged five times, since it is small.
    truth, found, wrong = (page.images[f"{kind}: {name}"] for kind in ("truth", "prediction", "errors"))
    assert truth.shape == (200, 300, 3)
    red = label_colours(data.classes[1:])[0].astype(int)
    for shown in (truth, found):
        np.testing.assert_allclose(shown[120, 225], 0.6 * red + 0.4 * np.array([220, 20, 20]), atol=JPEG)
    is_red = (wrong[..., 0] - wrong[..., 1]) > 100
    assert is_red[110:190, 5:40].mean() > 0.95
    assert not is_red[:, 70:].any()
    assert not is_red[:90].any()


def test_without_a_model_truths_are_shown(evaluated):
    data, _, out = evaluated
    page = read(write_page(out, data, count=1))
    assert {alt.split(":")[0] for alt in page.images} == {"image", "truth"}
    assert len(page.images) == 4


def test_results_that_are_not_there_or_of_another_set(evaluated, tmp_path, folder):
    data, _, out = evaluated
    with pytest.raises(InputError, match=r"no results\.json in"):
        write_page(tmp_path, data)
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        write_page(tmp_path, data)
    with pytest.raises(InputError, match=r"holds results of folder .*, not of scenes:1"):
        write_page(out, open_sets("scenes:1", limit=1)[0])


def test_a_line_that_was_cut_off_is_passed_over(evaluated, tmp_path):
    data, _, out = evaluated
    for name in ("results.json", "journal-0.jsonl"):
        (tmp_path / name).write_text((out / name).read_text(encoding="utf-8"), encoding="utf-8")
    lines = (tmp_path / "journal-0.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "journal-0.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:9], encoding="utf-8")
    assert len(read(write_page(tmp_path, data)).rows("image")) == 3


def test_a_page_about_a_classification(demo, tmp_path):
    words = ["red", "blue", EVIL]
    for i, word in enumerate(words):
        folder = tmp_path / "set" / "val" / f"c{i}"
        folder.mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (64, 64), (250 - 100 * i, 20, 20 + 110 * i)).save(folder / f"{word[0]}{j}.png")
    (tmp_path / "set" / "classes.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    data = open_classification_set(str(tmp_path / "set"))
    result = evaluate_classification(ProtocolSettings().segmenter(demo, 2), data, RunOptions(folder=tmp_path / "out"))
    write_results(result, record_of(result, {}), tmp_path / "out")
    page = read(write_page(tmp_path / "out", data))
    record = result.scores()
    assert f"{record['top1']:.1%}" in page.text
    assert [row[0] for row in page.rows("class")] == words
    assert [row[3] for row in page.rows("class")] == ["2", "2", "2"]
    assert len(page.order) == 6
    missed = 6 - round(6 * record["top1"])
    assert missed
    assert sum(int(row[2]) for row in page.rows("true")) == missed

    # Had the model said other things: red is right, blue its second word, the third its last.
    journal = tmp_path / "out" / "journal-0.jsonl"
    head, *records = journal.read_text(encoding="utf-8").splitlines()
    said = {0: [0, 1, 2], 1: [2, 1, 0], 2: [1, 0, 2]}
    changed = [
        line_of({"name": record["name"], "truth": record["truth"], "best": said[record["truth"]]})
        for record in map(json.loads, records)
    ]
    journal.write_text("\n".join([head, *changed]) + "\n", encoding="utf-8")
    page = read(write_page(tmp_path / "out", data, count=3))
    assert [name.split("/")[0] for name in page.order] == ["c2", "c2", "c1", "c0", "c0"]
    assert page.rows("true") == [[EVIL, "blue", "2"], ["blue", EVIL, "2"]]


def test_every_class_has_its_turn():
    classes = {"a": 4, "b": 4, "c": 2, "d": 4, "e": 2, "f": 9}
    assert _by_turns(classes) == ["a", "c", "f", "b", "e", "d"]


def test_the_command_writes_a_page(tmp_path, capsys):
    run = ["evaluate", "--data", "scenes:1", "--limit", "3", "--model", "demo", "--device", "cpu", "--html"]
    assert cli.main(run) == BAD_INPUT
    assert "--html needs --out DIR" in capsys.readouterr().err
    assert cli.main([*run, "--out", str(tmp_path)]) == 0
    page = read(tmp_path / PAGE)
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert f"{record['mean_iou']:.1%}" in page.text
    assert sorted(page.order) == ["000000", "000001", "000002"]
    assert {alt.split(":")[0] for alt in page.images} == {"image", "truth", "prediction", "errors"}


@pytest.mark.parametrize(
    ("changes", "is_bound"),
    [
        ({}, True),
        ({"assignment": "soft"}, False),
        ({"window": 32, "stride": 16}, False),
        ({"flip": True}, False),
        ({"scales": [1.0, 1.5]}, False),
        ({"scales": [1.5]}, True),
        ({"refine": 2}, False),
        ({"refine_dilations": [1]}, True),
        ({"foreground": 0.8}, False),
        ({"names": "set", "top_k": 5, "background": 0.5, "templates": "seven", "shorter_side": 64}, True),
    ],
)
def test_the_oracle_is_called_a_bound_only_for_masks_of_hard_groups(changes, is_bound):
    settings = {"assignment": "hard", "window": None, "flip": False, "scales": [1.0], "refine": 0, "foreground": None}
    assert _oracle_is_bound({**settings, **changes}) == is_bound
    # Options that a record from before them lacks have their defaults.
    assert _oracle_is_bound({"assignment": "hard", **changes}) == is_bound
    # Settings that nobody noted promise nothing.
    assert not _oracle_is_bound({})
