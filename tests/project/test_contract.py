"""Promises about the packages themselves, each checked in a fresh interpreter."""

import ast
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

TWINS = ("groupvit_torch", "groupvit_tf")


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


def test_a_keras_user_sees_no_start_up_noise() -> None:
    """Import and a first computation write nothing to the terminal, and do not import PyTorch."""
    code = """
import groupvit_tf, numpy as np, sys
from tests.support.models import smallest_config, smallest_inputs
model = groupvit_tf.TFGroupViTModel(smallest_config())
model.compile("sgd", run_eagerly=True)
model.fit(smallest_inputs(), batch_size=4, verbose=0)
assert "torch" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "KERAS_"))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_import_that_fails_says_why_all_the_same() -> None:
    """What TensorFlow prints while it starts is shown, except the noise."""
    code = """
import os
from groupvit_common.tensorflow_logging import tensorflow_start_up
with tensorflow_start_up():
    os.write(2, b"I0000 00:00:1.1 1 port.cc:153] oneDNN custom operations are on.\\n")
    os.write(2, b"the disk is on fire\\n")
    raise ImportError("no such library")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "oneDNN" not in result.stderr
    assert "the disk is on fire" in result.stderr
    assert "no such library" in result.stderr


def test_the_two_backends_have_the_same_files_and_public_names() -> None:
    torch_files, tf_files = ({path.name for path in (ROOT / name).iterdir() if path.is_file()} for name in TWINS)
    assert torch_files == tf_files
    code = "import groupvit_torch as a, groupvit_tf as b; print(sorted(set(a.__all__) ^ set(b.__all__)))"
    assert all(name.startswith("TF") for name in ast.literal_eval(run(code)))
