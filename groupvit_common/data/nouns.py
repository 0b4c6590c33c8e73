"""The nouns of a caption, by a part-of-speech tagger that carries its model in its package."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from groupvit_common.errors import InputError

_WORDS = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]")
_NOUNS = ("NN0", "NN1", "NN2", "NP0")  # the British National Corpus's tags of common nouns and names


def check_tagger() -> None:
    """InputError if the tagger is not installed."""
    if find_spec("HanTa") is None:
        raise InputError(
            "prompts about the nouns of captions need the package HanTa: pip install 'groupvit[data]' (or set prompts to 0)"
        )


@cache
def _tagger() -> Any:
    check_tagger()
    from HanTa.HanoverTagger import HanoverTagger

    return HanoverTagger("morphmodel_en.pgz")


def nouns_of(caption: str) -> tuple[str, ...]:
    """The different nouns of an English caption as they stand in it, in their order."""
    words = _WORDS.findall(caption)
    if not words:
        return ()
    tagged = _tagger().tag_sent(words)
    return tuple(dict.fromkeys(word for word, _, tag in tagged if tag in _NOUNS and any(map(str.isalpha, word))))
