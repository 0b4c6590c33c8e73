"""The project's language: the field's terms, and docstrings that say what a thing is or does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("groupvit_common", "groupvit_torch", "groupvit_tf", "conversion", "benchmarks")
QUESTIONS = ("What", "Whether", "Where", "How", "Which", "Who")
# What the project once said -> the term that a search engine finds.
TERMS = {
    r"pictures?": "image",
    r"learnt": "trainable, or learned",
    r"optimiser": "optimizer",
    r"there and back|carried back": "forward and backward pass",
    r"is no number|are no numbers": "is not finite",
    r"steps? left out": "skipped step",
    r"mean weights|MeanWeights": "exponential moving average (EMA)",
    r"heeding": "signal handlers",
    r"Tally": "StreamStats",
    r"down and across": "rows, columns; height, width",
    r"held-out scenes|made scenes": "validation scenes, synthetic scenes",
    r"true \\ said": "true \\ predicted",
}
# Spellings of documented names, and of keys in files, that stay.
KEPT = re.compile(r'make_optimiser|held_out|^MeanWeights = EMA|"MeanWeights"|a picture of \{\}')


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def test_docstrings_say_what_a_thing_is():
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if text.split(" ", 1)[0] in QUESTIONS:
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_the_terms_are_the_fields():
    words = re.compile("|".join(rf"\b(?:{term})\b" for term in TERMS))
    found = []
    for path in [*sources(), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if (match := words.search(line)) and not KEPT.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)
