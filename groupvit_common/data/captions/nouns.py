"""The nouns of a caption, by a part-of-speech tagger that carries its model in its package."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from groupvit_common.errors import InputError

# As in the tagger's training data: "is" and "n't"; words with their hyphens; "dog" and "'s"; single signs.
_WORDS = re.compile(r"[^\W_]+?(?=n't\b)|n't\b|[^\W_]+(?:-[^\W_]+)*|'[^\W_]+|[^\w\s]")
_MOST_WORDS = 200  # of a caption
_LONGEST = 30  # letters of a word: the tagger's time grows with their square
_LETTERS = re.compile(r"[^\W\d_]{2}")
_NOUNS = ("NN0", "NN1", "NN2", "NP0")  # the British National Corpus's tags of common nouns and names


def check_tagger() -> None:
    """Raises InputError if the tagger is not installed."""
    if find_spec("HanTa") is None:
        raise InputError(
            "prompts about the nouns of captions need the package HanTa: "
            "pip install 'groupvit[data]' (or set prompts to 0)"
        )


@cache
def _tagger() -> Any:
    check_tagger()
    from HanTa.HanoverTagger import HanoverTagger

    tagger = HanoverTagger("morphmodel_en.pgz")
    # Earlier versions had other tags; silently, no caption would have nouns.
    if tagger.tag_sent(["two", "dogs"], taglevel=0) != ["CRD", "NN2"]:
        raise InputError("this version of the package HanTa has other tags: pip install 'HanTa==1.2.1'")
    return tagger


def nouns_of(caption: str) -> tuple[str, ...]:
    """Returns the different nouns of an English caption as they are spelled in it, in their order."""
    words = [word for word in _WORDS.findall(caption.replace("’", "'"))[:_MOST_WORDS] if len(word) <= _LONGEST]
    if not words:
        return ()
    tags = _tagger().tag_sent(words, taglevel=0)
    found = (word for word, tag in zip(words, tags, strict=True) if tag in _NOUNS and _LETTERS.search(word))
    return tuple(dict.fromkeys(found))
