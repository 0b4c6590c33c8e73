"""Labels and sentences of a request: texts alone, never names of files."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import TEMPLATE_SETS, Label, get_templates, parse_labels
from groupvit_common.serving.problems import Problem
from groupvit_common.serving.settings import ServeSettings

_MOST_CHARACTERS = 100_000
_MOST_TEMPLATES, _TEMPLATE_LENGTH = 100, 500
# Of all prompts or texts of a request: they go through the tokenizer whole, while others wait for the model.
_MOST_READ = 250_000
# Spaces of any kind separate words; every other control character is a mistake, or worse.
_SPACES = frozenset("\t\n\r")


def read_labels(
    labels: str | list[str] | None, background_labels: str | list[str] | None, settings: ServeSettings
) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """Returns the labels and the background labels of a request, the server's where it has none.

    Raises:
        Problem: there are too many, or too long ones. InputError: they cannot be used.
    """
    if not labels:
        if not settings.default_labels:
            raise InputError('no labels: give "labels", such as "cat, couch, remote control"')
        labels = settings.default_labels
        background_labels = background_labels or settings.default_background_labels
    parsed = parse_labels(_checked(labels, settings))
    behind = parse_labels(_checked(background_labels, settings)) if background_labels else ()
    words = [word for label in (*parsed, *behind) for word in (*label.words, *label.definitions)]
    if len(words) > settings.max_labels:
        raise _too_many(len(words), settings)
    longest = max(words, key=len)
    if len(longest) > settings.max_label_length:
        raise Problem(
            422, "label_too_long",
            f"a label has {len(longest)} characters: {settings.max_label_length} are the most",
        )  # fmt: skip
    return parsed, behind


def read_templates(templates: str | list[str] | None) -> tuple[str, ...] | None:
    """Returns the sentences of a request; None for none.

    Raises:
        Problem: there are too many, or one is neither the name of a set nor a sentence with {}.
    """
    if templates is None:
        return None
    if isinstance(templates, str):
        name = templates.strip()
        if name in TEMPLATE_SETS or name in ("1", "7", "80"):
            return get_templates(name)
        templates = [name]
    if not templates or len(templates) > _MOST_TEMPLATES or any("{}" not in each for each in templates):
        raise Problem(
            422, "unusable",
            f"templates must be one, seven, eighty, or 1 to {_MOST_TEMPLATES} sentences with {{}} in each",
        )  # fmt: skip
    for each in templates:
        _check_text(each, "a template", _TEMPLATE_LENGTH)
    return get_templates(tuple(templates))


def check_texts(texts: list[str], settings: ServeSettings) -> None:
    """Raises `Problem` for too many texts, or one that is too long or empty."""
    if not texts or len(texts) > settings.max_labels:
        raise Problem(422, "unusable", f"texts must be 1 to {settings.max_labels:,} texts, got {len(texts):,}")
    for text in texts:
        _check_text(text, "a text", 10 * settings.max_label_length)
    _check_read(sum(map(len, texts)), "texts")


def check_prompts(labels: Iterable[Label], templates: tuple[str, ...], settings: ServeSettings) -> None:
    """Raises `Problem` where words times sentences, or their characters, are more than the bound."""
    words = [word for label in labels for word in (*label.words, *label.definitions)]
    count = len(templates) * len(words)
    if count > settings.max_prompts:
        raise Problem(
            422, "too_many_prompts",
            f"the labels with these templates make {count:,} prompts: {settings.max_prompts:,} are the most",
        )  # fmt: skip
    _check_read(len(templates) * sum(map(len, words)) + len(words) * sum(map(len, templates)), "labels and templates")


def _check_read(count: int, what: str) -> None:
    if count > _MOST_READ:
        raise Problem(
            422, "too_much_text",
            f"the {what} make {count:,} characters to read: {_MOST_READ:,} are the most, so give fewer or shorter ones",
        )  # fmt: skip


def _checked(given: str | list[str], settings: ServeSettings) -> str | list[str]:
    """Returns a text of labels that may be parsed."""
    pieces = [given] if isinstance(given, str) else given
    if len(pieces) > settings.max_labels:
        raise _too_many(len(pieces), settings)
    separators = sum(piece.count(",") + piece.count("|") + piece.count("\n") for piece in pieces)
    if separators > 2 * settings.max_labels:
        raise _too_many(separators, settings)
    if sum(map(len, pieces)) > _MOST_CHARACTERS:
        raise Problem(422, "too_many_labels", f"the labels have more than {_MOST_CHARACTERS:,} characters")
    for piece in pieces:
        _check_text(piece, "a label", _MOST_CHARACTERS)
    return given


def _check_text(text: str, what: str, length: int) -> None:
    if len(text) > length:
        raise Problem(422, "unusable", f"{what} has {len(text):,} characters: {length:,} are the most")
    for sign in text:
        if unicodedata.category(sign) in ("Cc", "Cs") and sign not in _SPACES:
            raise Problem(422, "unusable", f"{what} has a control character, U+{ord(sign):04X}: leave it out")


def _too_many(count: int, settings: ServeSettings) -> Problem:
    return Problem(422, "too_many_labels", f"there are {count:,} labels: give at most {settings.max_labels:,}")
