"""Tests and paths that the documentation names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "conversion", "docs", "examples", "groupvit_common", "groupvit_tf", "groupvit_torch", "tests")
DIFFERENCES = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
# Of a file and perhaps a test in it; a test alone is in the file named before it.
NAMED = re.compile(r"`(?:(?:tests/)?(\w+/test_\w+\.py))?(?:::)?(test_\w+)?`")


def test_every_difference_names_a_test_that_exists() -> None:
    file = ""
    for line in DIFFERENCES.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        named = [match.groups() for match in NAMED.finditer(line) if any(match.groups())]
        if line.startswith("| ") and cells[0] != "what":
            assert named or cells[-1].strip("| ") == "the same", f"no test holds {cells[0]}"
        for path, test in named:
            file = path or file
            code = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert test is None or f"def {test}(" in code, f"{file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    if page.name == "differences.md":
        # Its tests are named from the folder of tests.
        paths = [path for path in paths if "/test_" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
