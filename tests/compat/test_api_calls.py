"""Single calls answer as with transformers 4.49, in type and value; tests/compat/calls.py lists them."""

from pathlib import Path
from typing import Any

import pytest

from tests.compat import calls
from tests.support import peers
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calls") / "model"
    peers.make_checkpoint(folder, **peers.MODELS["groupvit_torch"])
    return calls.answers("groupvit_torch", str(folder))


RECORDED = peers.recorded(peers.CALLS)


@pytest.mark.parametrize("call", calls.listed())
def test_a_call_answers_as_with_transformers(answers: dict[str, Any], call: str) -> None:
    _, wanted = calls.DIFFERENT.get(call, ("", RECORDED[call]))
    assert not list(peers.differences(answers[call], wanted))


def test_every_call_has_an_answer_of_transformers() -> None:
    assert list(RECORDED) == calls.listed()
    assert not [call for call, answer in RECORDED.items() if isinstance(answer, dict) and "error" in answer]


def test_calls_that_differ_are_listed() -> None:
    page = Path(ROOT, "docs", "differences.md").read_text(encoding="utf-8")
    for call, (what, _) in calls.DIFFERENT.items():
        assert call in calls.listed()
        assert f"\n| {what} |" in page, call
