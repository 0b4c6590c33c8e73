"""Programs written for transformers answer as they do with transformers 4.49, after their import lines are changed.

What they answered is in tests/reference/compat; `make test-peers` runs both sides anew (tests/support/peers.py).
"""

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.support import peers

# They are programs of users: torch warns of TorchScript, TensorFlow of what programs leave open.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    peers.make_inputs(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in peers.names() if name not in peers.WITH_TRANSFORMERS])
def test_a_program_answers_as_with_transformers(inputs: Path, name: str) -> None:
    answer = peers.run_program(name, peers.package_of(name), inputs)
    assert not list(peers.differences(answer, peers.recorded(name), peers.relative_tolerance(name)))


def test_tensorflow_besides_the_programs(inputs: Path) -> None:
    import groupvit_tf

    model = groupvit_tf.TFGroupViTModel.from_pretrained(inputs / "groupvit_tf")
    processor = groupvit_tf.AutoProcessor.from_pretrained(inputs / "groupvit_tf")
    pixels = np.arange(2 * 40 * 40 * 3).reshape(2, 40, 40, 3).astype(np.uint8)
    outputs = model(**processor(text=["a", "b"], images=list(pixels), return_tensors="tf"), return_loss=True)
    # transformers 4.49: (1,), (1,), TFGroupViTModel, 57061.
    assert outputs.loss.shape == model.groupvit.logit_scale.shape == ()
    assert (type(model).__name__, model.num_parameters()) == ("GroupViTModel", 56949)


def test_programs_name_transformers_alone() -> None:
    for name in peers.names():
        code = (peers.PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
        assert "groupvit_" not in code, name
        changed = peers.with_new_imports(code, peers.package_of(name))
        imported = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(changed))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert "groupvit_" in str(imported), name
        assert "transformers" not in str(imported), name


def test_answers_are_compared_exactly_but_for_rounding() -> None:
    wanted = {"ids": [1, 2], "score": 1.5, "name": "a", "yes": True, "none": None}
    assert not list(peers.differences({**wanted, "score": 1.5 * (1 + 1e-6)}, wanted))
    for other in (
        {"ids": [1, 3]},
        {"ids": [1]},
        {"score": 1.501},
        {"score": 2},
        {"name": "b"},
        {"yes": 1},
        {"more": 1},
    ):
        assert len(list(peers.differences({**wanted, **other}, wanted))) == 1, other
    assert list(peers.differences({}, {"score": float("nan")}))
    assert list(peers.differences({"score": float("nan")}, {"score": 1.0}))
