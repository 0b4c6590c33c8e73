"""Programs of examples/ as modules."""

import importlib.util
from typing import Any

from tests.support.paths import ROOT


def example(name: str) -> Any:
    """Loads a file of examples/, named from there."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
