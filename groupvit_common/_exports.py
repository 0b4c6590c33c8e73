"""Names that a package exports: those of its `__init__.pyi`, each imported when it is first used."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and `__dir__` of a package. The list is not read before a name of it is asked for.

    A submodule is an attribute too, as after an import of all of them.

    Args:
        package: its `__name__`.
        file: its `__file__`; the list lies beside it.
    """

    @cache
    def origins() -> dict[str, tuple[str, str]]:
        return _origins(package, Path(file).with_suffix(".pyi"))

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(origins())
        if not name.startswith("__"):
            if name in origins():
                module, attribute = origins()[name]
                # With a list, a submodule is imported too.
                value = getattr(__import__(module, fromlist=[attribute]), attribute)
                # Found at once from now on.
                setattr(sys.modules[package], name, value)
                return value
            if importlib.util.find_spec(f"{package}.{name}") is not None:
                return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(origins())


def _origins(package: str, stub: Path) -> dict[str, tuple[str, str]]:
    """Returns exported name -> module and name there, of the lines `from module import name as exported`."""
    import ast

    return {
        alias.asname or alias.name: (f"{package}.{node.module}" if node.level else str(node.module), alias.name)
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
