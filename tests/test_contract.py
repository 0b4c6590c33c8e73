"""Promises about the packages themselves, each checked in a fresh interpreter."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import groupvit_common",
        "import pkgutil, importlib, groupvit_common\n"
        "for m in pkgutil.walk_packages(groupvit_common.__path__, 'groupvit_common.'): importlib.import_module(m.name)",
        "from groupvit_common.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "every-module", "help"],
)
def test_common_imports_no_framework(code: str) -> None:
    loaded = run(code + "\nimport sys; print([m for m in ('torch', 'tensorflow', 'keras', 'jax') if m in sys.modules])")
    assert loaded.splitlines()[-1] == "[]"


def test_help_imports_nothing_heavy() -> None:
    # Help must answer at once: what it imports is the cause that can be tested without a clock.
    heavy = ("numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "tqdm")
    code = f"""
from groupvit_common.cli import main
try: main(['--help'])
except SystemExit: pass
import sys; print([m for m in {heavy} if m in sys.modules])"""
    assert run(code).splitlines()[-1] == "[]"


def test_the_torch_package_imports_no_other_framework() -> None:
    loaded = run("import groupvit_torch, sys; print([m for m in ('tensorflow', 'keras', 'jax') if m in sys.modules])")
    assert loaded.strip() == "[]"
