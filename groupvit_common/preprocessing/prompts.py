"""Labels to prompts: label lists with synonyms and definitions, and the sentence templates of CLIP practice.

A text encoder that was trained on captions scores "a photo of a cat." better than the bare word "cat", and the mean
over many such sentences better than one. A word is therefore the mean of the normalised embeddings of its prompts
(every template with it); a definition, a text of its own such as "an animal that barks", is used as it is. A label with
several of these is their mean, normalised again, or (`Combination` "max") is as similar to anything as the most similar
of them.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.reading import read_text

# Commas and bars as other scripts write them (full-width, ideographic, Arabic) separate as ours do.
_COMMAS, _BARS = ",，、،", "|｜"
# A definition in quotes, or a word in which quotes are letters as any other (a 12" record); and what separates it from
# the next.
_PIECE = re.compile(rf'\s*(?:"([^"]*)"\s*(?=[{_BARS}{_COMMAS}]|$)|([^{_BARS}{_COMMAS}]*))([{_BARS}{_COMMAS}]|$)')

# What people separate labels by instead of commas, where a text has no comma.
_OTHER_SEPARATOR = re.compile(r"[;；]|[\r\n]+")

# In a word, a quote that looks as if a definition began: after a space, or with another one at the end. After a digit
# it is inches.
_OPENS = re.compile(r'(?<=\s)"|(?<!\d)"(?=[^"]*"\s*$)')

MOST_LABELS = 65_535
"""Labels that a map of uint16 can tell apart, besides a background."""

Combination = Literal["mean", "max"]
Floats = npt.NDArray[np.floating[Any]]

# The eighty sentences with which CLIP's ImageNet figures are made (Radford et al. 2021, published in the notebook
# "Prompt Engineering for ImageNet"): 38 that come once with "a" and once with "the", and four that stand alone.
# The order carries no meaning: the embeddings are averaged.
_PAIRED = (
    "itap of * {}.",
    "art of * {}.",
    "graffiti of * {}.",
    "a sculpture of * {}.",
    "a rendering of * {}.",
    "a rendition of * {}.",
    "a tattoo of * {}.",
    "a drawing of * {}.",
    "a painting of * {}.",
    "a doodle of * {}.",
    "a sketch of * {}.",
    "a photo of * {}.",
    "a photo of * hard to see {}.",
    "a photo of * clean {}.",
    "a photo of * dirty {}.",
    "a photo of * cool {}.",
    "a photo of * nice {}.",
    "a photo of * weird {}.",
    "a photo of * large {}.",
    "a photo of * small {}.",
    "a bad photo of * {}.",
    "a good photo of * {}.",
    "a bright photo of * {}.",
    "a dark photo of * {}.",
    "a blurry photo of * {}.",
    "a cropped photo of * {}.",
    "a close-up photo of * {}.",
    "a pixelated photo of * {}.",
    "a low resolution photo of * {}.",
    "a jpeg corrupted photo of * {}.",
    "a black and white photo of * {}.",
    "* {} in a video game.",
    "* plastic {}.",
    "* embroidered {}.",
    "* origami {}.",
    "* toy {}.",
    "* plushie {}.",
    "* cartoon {}.",
)
_ALONE = ("itap of my {}.", "a photo of my {}.", "a photo of one {}.", "a photo of many {}.")

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "one": ("a photo of a {}.",),
    # The subset that the same notebook found by forward selection over the eighty.
    "seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "eighty": tuple(s.replace("*", article) for s in _PAIRED for article in ("a", "the")) + _ALONE,
}
"""Template sets by name. `{}` is where the word goes."""

_BY_NUMBER = {"1": "one", "7": "seven", "80": "eighty"}


def get_templates(choice: str | int | Path | Sequence[str]) -> tuple[str, ...]:
    """Template set by name ("one", "seven", "eighty") or size (1, 7, 80); one sentence with `{}`; a text file; or a
    list of sentences.

    A file has one sentence a line; blank lines and lines with `#` first are ignored.
    InputError for an unknown name, a file or list without sentences, or a sentence in which `{}` does not occur exactly
    once.
    """
    where = ""
    if isinstance(choice, (str, int, Path)):
        name = str(choice).strip()
        name = _BY_NUMBER.get(name, name)
        if name in TEMPLATE_SETS:
            return TEMPLATE_SETS[name]
        chosen: tuple[str, ...] = (name,)
        if "{}" not in name:
            if not os.path.isfile(name):  # noqa: PTH113 (any text, which may be too long for a name)
                raise InputError(
                    f"unknown template set {str(choice)!r}: use one, seven or eighty (or 1, 7, 80), a sentence with "
                    '{} where the label goes, such as "a photo of a {}.", or a text file with one such sentence a line'
                )
            chosen = tuple(line.strip() for line in _lines(name, "template"))
            where = f" in {name}"
    elif isinstance(choice, Iterable):
        chosen = tuple(choice)
    else:
        raise InputError(
            f"templates must be one, seven, eighty, a sentence, a text file or a list of sentences, got {choice!r}"
        )
    if not chosen:
        raise InputError(f'no templates{where}: give at least one, such as "a photo of a {{}}."')
    for template in chosen:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"a template needs {{}} exactly once, where the label goes, got {template!r}{where}")
    return chosen


@dataclass(frozen=True)
class Label:
    """A class: its name, synonyms, and definitions."""

    name: str
    synonyms: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    def prompts(self, templates: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """For each word every template with it, and each definition alone."""
        templates = tuple(templates)
        word_prompts = (tuple(template.replace("{}", word) for template in templates) for word in self.words)
        return (*word_prompts, *((definition,) for definition in self.definitions))


def parse_label(line: str) -> Label | None:
    """One label from `couch | sofa | "a seat for two"`: the name, synonyms, and in quotes definitions. None if nothing
    is there.

    Between them may be commas as well.
    """
    return _label((text, is_definition) for text, is_definition, _ in _pieces(line))


def parse_labels(labels: str | Iterable[str | Label] | Mapping[str, str | Iterable[str]]) -> tuple[Label, ...]:
    """Labels from one comma-separated string, from a sequence, or from a mapping.

    `"cat, couch | sofa, remote control"` is three labels; `|` separates synonyms, and a text in double quotes is a
    definition, which is used as it is, without the templates: `dog | puppy | "an animal that barks"`. In a sequence
    each entry is one label, and commas separate synonyms too, as in a label file: `["cat", "couch, sofa"]`; `Label`
    records are taken as they are. A mapping has for each name its synonyms and definitions:
    `{"dog": ["puppy", '"an animal that barks"'], "cat": []}`.
    InputError for an empty list, for a word that occurs twice (upper and lower case do not count as different, nor two
    codings of one letter), and for one string whose labels are separated by semicolons or line ends.
    """
    if isinstance(labels, str):
        label_pieces: list[list[tuple[str, bool]]] = [[]]
        for text, is_definition, separator in _pieces(labels):
            label_pieces[-1].append((text, is_definition))
            if separator and separator in _COMMAS:
                label_pieces.append([])
        parsed_labels = _checked([_label(pieces) for pieces in label_pieces])
        if (
            len(parsed_labels) == 1
            and not parsed_labels[0].definitions
            and (found := _OTHER_SEPARATOR.search(labels.strip()))
        ):
            raise InputError(
                "labels are separated by commas, not by "
                f"{repr(found[0].strip()) if found[0].strip() else 'line ends'}: write "
                f"{', '.join(filter(None, map(_tidy, _OTHER_SEPARATOR.split(labels))))!r}, or give a list or a label "
                "file where it is part of one"
            )
        return parsed_labels
    if isinstance(labels, Label):
        return _checked([labels])
    if isinstance(labels, Mapping):
        return parse_labels([_mapped(name, others) for name, others in labels.items()])
    if not isinstance(labels, Iterable):
        raise InputError(f'labels must be text such as "cat, couch | sofa", a list or a mapping, got {labels!r}')
    parsed: list[Label | None] = []
    for entry in labels:
        if not isinstance(entry, (str, Label)):
            raise InputError(f"a label must be text, got {type(entry).__name__}: {entry!r}")
        parsed.append(entry if isinstance(entry, Label) else parse_label(entry))
    return _checked(parsed)


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """Labels from a UTF-8 text file: one a line as `parse_label` takes it; blank lines and lines with `#` first
    ignored.

    InputError if the file cannot be read, holds no label, or repeats a word.
    """
    return _checked([parse_label(line) for line in _lines(path, "label")], f" in {path}")


def label_embedding(
    word_embeds: Sequence[Floats], combination: Combination = "mean", normalize_prompts: bool = True
) -> Floats:
    """Embeddings of a label's prompts, for each word or definition `[prompts, E]` -> `[K, E]`, each of length 1.

    "mean": K is 1, the mean over words and definitions of the mean over their prompts. "max": one for each word and
    definition, of which the most similar counts. `normalize_prompts`: see `average_embedding`.
    """
    if combination == "max":
        return np.stack([average_embedding(embeds, normalize_prompts) for embeds in word_embeds])
    if normalize_prompts:
        word_embeds = [embeds / np.linalg.norm(embeds, axis=-1, keepdims=True) for embeds in word_embeds]
    return average_embedding(np.stack([embeds.mean(axis=0) for embeds in word_embeds]), False)[None]


def average_embedding(prompt_embeds: Floats, normalize_prompts: bool = True) -> Floats:
    """`[prompts, E]`, any length -> `[E]` of length 1: the mean of the normalised prompts, normalised.

    Without `normalize_prompts` the prompts are averaged as they are, so that longer ones weigh more: the authors'
    evaluation.
    """
    if normalize_prompts:
        prompt_embeds = prompt_embeds / np.linalg.norm(prompt_embeds, axis=-1, keepdims=True)
    mean = prompt_embeds.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def _lines(path: str | Path, kind: str) -> list[str]:
    """Those of a UTF-8 text file that are neither blank nor begin with `#`."""
    try:
        text = read_text(Path(path))
    except CheckpointError as error:
        raise InputError(f"cannot read the {kind} file: {error}") from error
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _pieces(text: str) -> Iterator[tuple[str, bool, str]]:
    """Words and definitions of a text, each with whether it is a definition and the separator after it, "" at the
    end."""
    for piece in _PIECE.finditer(text):
        definition, word, separator = piece.groups()
        if definition is None and word.startswith('"'):
            raise InputError(f"a definition stands between double quotes, got {word.strip()}")
        opens = _OPENS.search(word) if definition is None else None
        if opens is not None and '"' in (rest := text[piece.start(2) + opens.end() :]):
            name, quoted = _tidy(word[: opens.start()]), rest[: rest.index('"')]
            raise InputError(f'put | before a definition: {name} | "{quoted}" instead of {name} "{quoted}"')
        yield _tidy(word if definition is None else definition), definition is not None, separator
        if not separator:
            return


def _label(pieces: Iterable[tuple[str, bool]]) -> Label | None:
    """The label of these words and definitions."""
    there = [(text, is_definition) for text, is_definition in pieces if text or is_definition]
    if not there:
        return None
    if there[0][1]:
        raise InputError(f'a definition needs a name before it, such as dog | "{there[0][0]}"')
    words = [text for text, is_definition in there if not is_definition]
    return Label(words[0], tuple(words[1:]), tuple(text for text, is_definition in there if is_definition))


def _mapped(name: str, others: str | Iterable[str]) -> str | Label:
    if not isinstance(name, str):
        raise InputError(f"a label must be text, got {type(name).__name__}: {name!r}")
    listed = [others] if isinstance(others, str) else list(others) if isinstance(others, Iterable) else [others]
    if not all(isinstance(other, str) for other in listed):
        raise InputError(
            f"what else {name!r} is called must be text or a list of texts, [] for nothing, got {others!r}"
        )
    label = parse_label(" | ".join([name, *listed]))
    if label is None:
        return ""
    # The name may be repeated among its words.
    return Label(label.name, tuple(word for word in label.synonyms if word != label.name), label.definitions)


def _tidy(word: str) -> str:
    return " ".join(word.split())


def _checked(parsed: list[Label | None], where: str = "") -> tuple[Label, ...]:
    labels = tuple(label for label in parsed if label is not None)
    if not labels:
        raise InputError(f'no labels{where}: give at least one, such as "cat, couch, remote control"')
    if len(labels) > MOST_LABELS:
        raise InputError(
            f"there are {len(labels):,} labels{where}: give at most {MOST_LABELS:,}, all that a label map can hold"
        )
    seen: set[str] = set()
    for word in (word for label in labels for word in (*label.words, *label.definitions)):
        # As the tokenizer reads it: in lower case, however its letters are coded.
        key = unicodedata.normalize("NFC", _tidy(word)).lower()
        if not key:
            raise InputError(f"an empty word among the labels{where}")
        if key in seen:
            raise InputError(f"the label {word!r} is given twice{where}: each word may stand once")
        seen.add(key)
    return labels
