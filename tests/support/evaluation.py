"""What tests of evaluations share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from groupvit_common.evaluation.protocols import ProtocolSettings

WORDS = ["background", "cat", "couch", "dog", "sofa"]
SIZES = [(40, 56), (48, 40), (36, 36), (40, 56), (64, 40), (44, 44)]


def settings(**changes: Any) -> ProtocolSettings:
    """The paper's protocol for small images."""
    return ProtocolSettings(
        **{"background": 0.2, "assignment": "hard", "shorter_side": 32, "window": 32, "stride": 16, **changes}
    )


class Killed(Exception):
    """The end of a run."""


def stop_after(count: int) -> Callable[[int], None]:
    """Ends a run after so many images."""
    left = [count]

    def progress(_: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return progress
