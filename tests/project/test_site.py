"""The documentation's site has every page, and the reference every public name."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.md"))
IDENTIFIERS = [name for page in API for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_every_page_is_in_the_navigation_once() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(pages_of(site["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def module_of(name: str) -> tuple[Path, str]:
    """The file of the module that a dotted name is in, and what is left of the name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file, ".".join(parts[end:])
    raise AssertionError(f"no module holds {name}")


@pytest.mark.parametrize("name", IDENTIFIERS)
def test_the_reference_names_what_is_there_and_explains_it(name: str) -> None:
    file, rest = module_of(name)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if not rest:
        assert ast.get_docstring(tree)
        return
    kinds = (ast.ClassDef, ast.FunctionDef)
    documented = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, kinds)}
    assert documented.get(rest), f"{file} has no documented {rest}"


@pytest.mark.parametrize(
    "room", ["segmentation", "segmentation.adapters", "preprocessing", "drawing", "training", "evaluation"]
)
def test_what_a_room_exports_is_in_the_reference(room: str) -> None:
    package = f"groupvit_common.{room}"
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi").read_text(encoding="utf-8")
    exported = [f"{package}{module}.{name}" for module, name in re.findall(r"^from (\.\S+) import (\w+)", stub, re.M)]
    assert exported
    shown = {*IDENTIFIERS, *(name for name in exported if name.rpartition(".")[0] in IDENTIFIERS)}
    assert [name for name in exported if name not in shown and not is_alias(name)] == []


def is_alias(name: str) -> bool:
    """`GroupViTProcessor = CLIPProcessor`: another name of what is shown."""
    file, rest = module_of(name)
    return re.search(rf"^{rest} = \w+$", file.read_text(encoding="utf-8"), re.M) is not None
