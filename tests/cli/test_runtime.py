"""What commands share, where no command shows it."""

import gc
import importlib
import sys
import types

import pytest

from groupvit_common.cli import runtime


def test_garbage_is_not_collected_while_a_framework_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    collects: list[bool] = []

    def imported(name: str) -> types.ModuleType:
        collects.append(gc.isenabled())
        return types.ModuleType(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    monkeypatch.setattr(runtime, "installed_backends", lambda: ["torch"])
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    frozen = gc.get_freeze_count()
    runtime.backend_module(None, "predictor")
    assert gc.get_freeze_count() == frozen  # nothing new to leave out
    monkeypatch.delitem(sys.modules, "torch")
    try:
        runtime.backend_module(None, "predictor")
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
    assert collects == [True, False]
    assert gc.isenabled()
