"""Charts: what they show, in any script, with any number of classes, in the colours of paper or page."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from groupvit_common.evaluation.calibration import Point
from groupvit_common.evaluation.charts import confusion_svg, histogram_svg, save_calibration, save_confusion
from tests.support.paths import ROOT

BLUE = (8, 48, 107)
ODD = ["a name of many letters " * 5, "two\nlines", "\u732b", "$x^2$ <b>&", "a"]


def confusion(count):
    cells = np.zeros((count, count), np.int64)
    cells[0, 0] = 5
    return cells


@pytest.mark.parametrize("names", [["a"], ODD, [f"class {i}" for i in range(60)]], ids=["one", "odd", "many"])
def test_a_confusion_matrix_is_drawn_whole(names, tmp_path):
    """One cell is dark, whose row has all of its pixels there, and nothing is cut off."""
    save_confusion(names, confusion(len(names)), tmp_path / "confusion.png")
    drawn = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    dark = (np.abs(drawn.astype(int) - BLUE) < 3).all(axis=2)
    cell = max(10, min(32, 1200 // len(names)))
    assert dark.sum() > 0.4 * cell**2  # one cell, but for lines and its number
    assert np.ptp(np.nonzero(dark)[0]) <= cell
    for border in (drawn[:4], drawn[-4:], drawn[:, :4], drawn[:, -4:]):
        assert (border == 255).all()


def test_a_calibration_curve(tmp_path):
    curve = [Point(t, x / 10, t * x / 100) for t in (1.0, 2.0) for x in range(10)]
    save_calibration([*curve, Point(1.0, 0.99, float("nan"))], tmp_path / "curve.png")
    drawn = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (np.abs(drawn - colour) < 3).all(axis=2).sum() > 100


def parsed(svg):
    """The element, which must be well-formed and load nothing; its ids."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert not re.search(r"<style|<metadata|<script", svg)
    for target in re.findall(r'(?:href="|url\()([^")]*)', svg):
        assert target.startswith(("#", "data:image/png;base64,"))
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(set(ids)) == len(ids)
    for target in re.findall(r'(?:href="|url\()#([^")]*)', svg):
        assert target in ids
    return root, set(ids)


def test_charts_of_a_page_take_its_colours_and_describe_themselves():
    """Text stays text; ids of two charts differ; a chart is the same each time."""
    matrix, histogram = confusion_svg(ODD, confusion(5)), histogram_svg([0.11, 0.12, 0.97, 1.0], "mean IoU")
    (first, ids), (second, others) = parsed(matrix), parsed(histogram)
    assert not ids & others
    assert first.get("aria-label").startswith("Confusion matrix: ")
    assert second.get("aria-label") == "Number of images by mean IoU: 2 from 10% to 15%, 2 from 95% to 100%."
    texts = ["".join(each.itertext()).strip() for each in first.iter("{http://www.w3.org/2000/svg}text")]
    assert {"\u732b", "$x^2$ <b>&", "two\\nlines", "rows: true classes; columns: predicted classes"} <= set(texts)
    for svg in (matrix, histogram):
        assert "currentColor" in svg
        assert "#0101" not in svg
    assert "var(--chart)" in histogram
    assert matrix == confusion_svg(ODD, confusion(5))


def test_cells_of_a_page_are_as_strong_as_their_fractions():
    svg = confusion_svg(["a", "b"], np.array([[3, 1], [0, 0]]))
    (image,) = re.findall(r'"data:image/png;base64,([^"]*)"', svg)
    shades = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGBA"))[..., 3]
    assert sorted(shades.ravel().tolist()) == [0, 0, 127, 220]  # 255 times the roots of 0, 1/4 and 3/4, cut


def test_the_first_chart_is_drawn_in_silence(tmp_path):
    """matplotlib reports a folder that it cannot write to, and a cache of fonts that takes long to build."""
    program = """if True:
        import logging
        logging.basicConfig()
        from groupvit_common.evaluation.charts import histogram_svg
        assert histogram_svg([0.5], "mean IoU")
        assert logging.getLogger("matplotlib").level == logging.NOTSET
    """
    (tmp_path / "file").touch()
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
