"""Nouns of captions and the prompts made of them."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_common.data.captions.nouns import _tagger, nouns_of
from groupvit_common.data.captions.samples import SampleMaker
from groupvit_common.data.captions.settings import DataSettings, SourceSettings
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import TEMPLATE_SETS
from tests.data.test_stream import PROCESSOR


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("two dogs are playing with a frisbee on the beach", ("dogs", "frisbee", "beach")),
        ("A young woman in a red coat waits at the bus station.", ("woman", "coat", "bus", "station")),
        ("football player runs with the ball during a match", ("football", "player", "ball", "match")),
        ("vector illustration of a cat sleeping under the moon", ("vector", "illustration", "cat", "moon")),
        ("Sunset over the harbour of Lisbon", ("Sunset", "harbour", "Lisbon")),
        ("the dog 's collar and the cat's whiskers", ("dog", "collar", "cat", "whiskers")),
        ("a dog and another dog and a T-shirt", ("dog", "T-shirt")),
        ("it isn't what we saw", ()),
        ("42 !!! ... # <3", ()),
        ("日本の猫", ()),
        ("", ()),
    ],
)
def test_nouns(caption: str, nouns: tuple[str, ...]) -> None:
    assert nouns_of(caption) == nouns


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_has_nouns_or_none(caption: str) -> None:
    joined = caption.replace("’", "'")
    assert all(noun in joined for noun in nouns_of(caption))


def test_endless_captions_and_words_are_cut_short() -> None:
    """The tagger's time grows with the square of a word's length: this would take hours."""
    assert nouns_of("zq" * 500_000) == ()
    assert nouns_of("tree " * 100_000) == ("tree",)


def test_without_the_tagger_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupvit_common.data.captions.nouns.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "HanTa", raising=False)
    from groupvit_common.data.captions.nouns import check_tagger

    with pytest.raises(
        InputError, match=r"need the package HanTa: pip install 'groupvit\[data\]' \(or set prompts to 0\)$"
    ):
        check_tagger()


def test_a_tagger_with_other_tags_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from HanTa.HanoverTagger import HanoverTagger

    monkeypatch.setattr(HanoverTagger, "tag_sent", lambda self, words, taglevel: ["CD", "NNS"])
    with pytest.raises(InputError, match="this version of the package HanTa has other tags"):
        _tagger.__wrapped__()


def prompts(caption: str, count: int, seed: int, templates: str | tuple[str, ...] = "eighty") -> list[str]:
    source = SourceSettings(kind="folder", path="somewhere")
    chosen = DataSettings(sources=(source,), prompts=count, templates=templates)
    return SampleMaker(chosen, PROCESSOR).prompts(caption, np.random.default_rng(seed))


def test_prompts_are_different_nouns_in_templates() -> None:
    caption = "a cat and a dog on a couch beside a lamp"
    seen = set()
    for seed in range(200):
        made = prompts(caption, 3, seed, ("{}",))
        assert len(set(made)) == 3
        seen.update(made)
    assert seen == {"cat", "dog", "couch", "lamp"}


def test_every_template_has_its_turn() -> None:
    seen = {prompts("a cat", 1, seed)[0] for seed in range(1500)}
    # Each of eighty with 1 - (79/80)^1500: one missing in 6 million tries.
    assert seen == {template.replace("{}", "cat") for template in TEMPLATE_SETS["eighty"]}


@pytest.mark.parametrize(("caption", "nouns"), [("a cat on a couch", 2), ("so nice", 0)])
def test_the_caption_fills_up(caption: str, nouns: int) -> None:
    made = prompts(caption, 3, 0)
    assert made[nouns:] == [caption] * (3 - nouns)
    assert caption not in made[:nouns]


def test_no_prompts() -> None:
    assert prompts("a cat", 0, 0) == []
