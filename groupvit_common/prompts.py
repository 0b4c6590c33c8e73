"""Words to prompts: label lists with synonyms, and the sentence templates of CLIP practice.

A text encoder that learnt from captions scores "a photo of a cat." better than the bare word "cat", and the mean over
many such sentences better than one. One label is therefore the mean of the normalised embeddings of all its prompts
(every template times every synonym), normalised again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError

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


def get_templates(choice: str | int | Sequence[str]) -> tuple[str, ...]:
    """Template set by name ("one", "seven", "eighty") or size (1, 7, 80); one sentence with `{}`; or a list of such.

    InputError for an unknown name, an empty list, or a sentence in which `{}` does not occur exactly once.
    """
    if isinstance(choice, (str, int)):
        name = str(choice).strip()
        name = _BY_NUMBER.get(name, name)
        if name in TEMPLATE_SETS:
            return TEMPLATE_SETS[name]
        if "{}" not in name:
            raise InputError(
                f"unknown template set {choice!r}: use one, seven or eighty (or 1, 7, 80), or a sentence with {{}} "
                'where the label goes, such as "a photo of a {}."'
            )
        chosen: tuple[str, ...] = (name,)
    else:
        chosen = tuple(choice)
    if not chosen:
        raise InputError('no templates: give at least one, such as "a photo of a {}."')
    for template in chosen:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"a template needs {{}} exactly once, where the label goes, got {template!r}")
    return chosen


@dataclass(frozen=True)
class Label:
    """A class to look for: the name to show and other words that mean the same."""

    name: str
    synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    def prompts(self, templates: Iterable[str]) -> tuple[str, ...]:
        """Every word in every template."""
        return tuple(template.replace("{}", word) for word in self.words for template in templates)


def parse_label(line: str) -> Label | None:
    """One label from `"couch, sofa"`: the first word is the name, the others are synonyms. None if nothing is there."""
    words = tuple(w for w in (_tidy(part) for part in line.split(",")) if w)
    return Label(words[0], words[1:]) if words else None


def parse_labels(labels: str | Iterable[str | Label]) -> tuple[Label, ...]:
    """Labels from one comma-separated string, or from a sequence.

    `"cat, couch, remote control"` is three labels. In a sequence each entry is one label, and commas separate synonyms
    as in a label file: `["cat", "couch, sofa"]`; `Label` records are taken as they are.
    InputError for an empty list and for a word that occurs twice (upper and lower case do not count as different).
    """
    if isinstance(labels, str):
        return _checked([parse_label(part) for part in labels.split(",")])
    if isinstance(labels, Label):
        return _checked([labels])
    parsed: list[Label | None] = []
    for entry in labels:
        if not isinstance(entry, (str, Label)):
            raise InputError(f"a label must be text, got {type(entry).__name__}: {entry!r}")
        parsed.append(entry if isinstance(entry, Label) else parse_label(entry))
    return _checked(parsed)


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """Labels from a UTF-8 text file: one a line, synonyms after commas; blank lines and lines with `#` first ignored.

    InputError if the file cannot be read, holds no label, or repeats a word.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise InputError(f"cannot read the label file {path}: {reason}") from error
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return _checked([parse_label(line) for line in lines], f" in {path}")


def average_embedding(
    prompt_embeds: npt.NDArray[np.float32] | npt.NDArray[np.float64], normalize_prompts: bool = True
) -> npt.NDArray[np.float32] | npt.NDArray[np.float64]:
    """`[prompts, E]`, any length -> `[E]` of length 1: the mean of the normalised prompts, normalised.

    Without `normalize_prompts` the prompts are averaged as they are, so that longer ones weigh more: the authors' evaluation.
    """
    if normalize_prompts:
        prompt_embeds = prompt_embeds / np.linalg.norm(prompt_embeds, axis=-1, keepdims=True)
    mean = prompt_embeds.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def _tidy(word: str) -> str:
    return " ".join(word.split())


def _checked(parsed: list[Label | None], where: str = "") -> tuple[Label, ...]:
    labels = tuple(label for label in parsed if label is not None)
    if not labels:
        raise InputError(f'no labels{where}: give at least one, such as "cat, couch, remote control"')
    seen: set[str] = set()
    for word in (word for label in labels for word in label.words):
        key = _tidy(word).casefold()
        if not key:
            raise InputError(f"an empty word among the labels{where}")
        if key in seen:
            raise InputError(f"the label {word!r} is given twice{where}: each word may stand once")
        seen.add(key)
    return labels
