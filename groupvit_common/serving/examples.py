"""The examples of the page."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def page_examples() -> list[dict[str, Any]]:
    """Returns the examples, each with the address of its image."""
    listed = files("groupvit_common.serving").joinpath("page", "examples.json")
    if not listed.is_file():
        return []
    examples: list[dict[str, Any]] = json.loads(listed.read_text(encoding="utf-8"))
    return [{**example, "url": f"page/{example['file']}"} for example in examples]
