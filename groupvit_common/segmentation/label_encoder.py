"""Embeddings of labels: prompts through the tokenizer and the text tower, each label once."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import Label, get_templates, label_embedding
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.scores import Floats

# Prompts encoded at once, of similar lengths: each costs as much as the longest among them.
PROMPTS_AT_ONCE = 256
# Memory of the labels that are remembered: some 100,000 of one word each.
_MOST_BYTES = 128_000_000


class _Known(NamedTuple):
    """A label that was encoded: embeddings `[K, E]`, and of each of its words and definitions the tokens that the model
    reads."""

    embeds: Floats
    tokens: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Memory that is held, about: a token is 8 bytes, a label with its place some 300."""
        return self.embeds.nbytes + 8 * sum(map(len, self.tokens)) + 300


class KnownLabels:
    """Labels that were encoded, those used last, within a bound of memory. Threads and encoders may share it.

    `warns`: whether labels that are cut are warned of; a service, whose users see no warnings, does not.

    Args:
        most_bytes: the bound.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.warns = True
        self.nbytes = self.hits = self.misses = 0
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, keys: Sequence[Any]) -> list[_Known | None]:
        """Returns what is known of each key, None for nothing."""
        with self._lock:
            found = [self._known.get(key) for key in keys]
            for key, known in zip(keys, found, strict=True):
                if known is not None:
                    self._known.move_to_end(key)
            self.hits += len(keys) - found.count(None)
            self.misses += found.count(None)
            return found

    def add(self, keys: Sequence[Any], every: Sequence[_Known]) -> None:
        """Remembers these, and forgets what was used longest ago beyond the bound."""
        with self._lock:
            for key, known in zip(keys, every, strict=True):
                if key not in self._known:
                    self.nbytes += known.nbytes
                    self._known[key] = known
            while self.nbytes > self.most_bytes and self._known:
                self.nbytes -= self._known.popitem(last=False)[1].nbytes


class LabelEncoder:
    """Encodes labels with the prompts of the options, unless they are known.

    Args:
        tokenizer: of the model. context: the most tokens of a text that the model reads, its beginning and its end
            included.
        embed_texts: the tokenizer's arrays `[N, T]` -> embeddings `[N, E]`, of any length.
        options: of which the templates, and how prompts and synonyms are combined.
        known: the labels that were encoded, also with other options.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        context: int,
        embed_texts: Callable[[Mapping[str, npt.NDArray[np.int64]]], Floats],
        options: SegmentationOptions,
        known: KnownLabels | None = None,
    ) -> None:
        self._tokenizer, self._context, self._embed_texts, self._options = tokenizer, context, embed_texts, options
        # Of the sentences a digest, so that a label that is remembered holds no more than its own words.
        sentences = hashlib.sha256("\n".join(get_templates(options.templates)).encode()).digest()
        self._style = (sentences, options.synonyms, options.normalize_prompts)
        self._known = KnownLabels() if known is None else known

    def __call__(self, labels: Sequence[Label]) -> Floats:
        """Returns the labels' embeddings, `[L, E]`, or several of each, `[L, K, E]`.

        Raises:
            InputError: a label that the model cannot read, or labels that it reads alike.
        """
        keys = [(label, self._style) for label in labels]
        found = dict(zip(labels, self._known.find(keys), strict=True))
        new = [label for label, known in found.items() if known is None]
        encoded = dict(zip(new, self._encode(new), strict=True)) if new else {}
        known = [found[label] or encoded[label] for label in labels]
        self._known.add([(label, self._style) for label in encoded], list(encoded.values()))
        self._check_different(labels, known)
        words = max(len(each.embeds) for each in known)
        # Of a label with fewer words one stands for those it lacks: it cannot be more similar than itself.
        embeddings = np.stack(
            [each.embeds[[*range(len(each.embeds)), *[0] * (words - len(each.embeds))]] for each in known]
        )
        return embeddings[:, 0] if words == 1 else embeddings

    def embed(self, texts: Sequence[str]) -> Floats:
        """Returns the model's embeddings `[N, E]` of texts as they are, of any length; they are not remembered."""
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._context)["input_ids"]
        return self._embed_by_length(texts, [len(ids) for ids in rows])

    def _encode(self, labels: Sequence[Label]) -> list[_Known]:
        templates = get_templates(self._options.templates)
        prompts = [label.prompts(templates) for label in labels]
        texts = [text for label_prompts in prompts for word_prompts in label_prompts for text in word_prompts]
        cut_rows = self._tokenizer(texts, truncation=True, max_length=self._context)["input_ids"]
        read = self._read_tokens(labels, prompts, texts, cut_rows)
        embeddings = self._embed_by_length(texts, [len(ids) for ids in cut_rows])
        counts = [len(word_prompts) for label_prompts in prompts for word_prompts in label_prompts]
        word_embeds = iter(np.split(embeddings, np.cumsum(counts)[:-1]))
        encoded = []
        for label_prompts, tokens in zip(prompts, read, strict=True):
            embeds = [next(word_embeds) for _ in label_prompts]
            embedding = label_embedding(embeds, self._options.synonyms, self._options.normalize_prompts)
            # A copy: of one label, `embedding` may be a view of all.
            encoded.append(_Known(embedding.copy(), tokens))
        return encoded

    def _embed_by_length(self, texts: Sequence[str], lengths: Sequence[int]) -> Floats:
        """Returns the embeddings `[N, E]` of texts, in their order."""
        order = np.argsort(lengths, kind="stable")
        parts = [
            self._embed_texts(
                self._tokenizer(
                    [texts[row] for row in rows],
                    padding=True, truncation=True, max_length=self._context, return_tensors="np",
                )
            )
            for rows in np.split(order, range(PROMPTS_AT_ONCE, len(texts), PROMPTS_AT_ONCE))
        ]  # fmt: skip
        return np.concatenate(parts)[np.argsort(order)]

    def _read_tokens(
        self,
        labels: Sequence[Label],
        prompts: Sequence[Sequence[Sequence[str]]],
        texts: Sequence[str],
        cut_texts: Sequence[Sequence[int]],
    ) -> list[tuple[tuple[int, ...], ...]]:
        """For each label the tokens that the model reads of each word. Warns of words that are cut."""
        tokenizer, context = self._tokenizer, self._context
        rows = iter(tokenizer(texts)["input_ids"])
        cut_rows = iter(cut_texts)
        tokens = []
        for label, label_prompts in zip(labels, prompts, strict=True):
            words = (*label.words, *label.definitions)
            bare = tokenizer(list(words), add_special_tokens=False)["input_ids"]
            word_tokens = []
            for word, ids, word_prompts in zip(words, bare, label_prompts, strict=True):
                if not ids:
                    raise InputError(f"the label {word!r} has no letters or signs that the model knows: leave it out")
                longest = max(len(next(rows)) for _ in word_prompts)
                read = [next(cut_rows) for _ in word_prompts]
                if longest > context and self._known.warns:
                    warnings.warn(
                        f"the label {_short(word)} is too long: a prompt with it has {longest} tokens, of which the "
                        f"model reads {context}",
                        stacklevel=5,
                    )
                # Where nothing is cut, one prompt tells words apart as well as all.
                seen = read if longest > context else read[:1]
                word_tokens.append(tuple(token for ids in seen for token in ids))
            tokens.append(tuple(word_tokens))
        return tokens

    def _check_different(self, labels: Sequence[Label], known: Sequence[_Known]) -> None:
        """Refuses words that the model reads alike: it knows tokens, not codings of letters, and none beyond its
        context."""
        seen: dict[tuple[int, ...], str] = {}
        for label, each in zip(labels, known, strict=True):
            words = (*label.words, *label.definitions)
            for word, tokens in zip(words, each.tokens, strict=True):
                other = seen.setdefault(tokens, word)
                if other is not word:
                    raise InputError(
                        f"the labels {_short(other)} and {_short(word)} are the same to the model, which reads the "
                        "same tokens, at most "
                        f"{self._context} of each prompt: keep one of them, or make them differ earlier"
                    )


def _short(word: str) -> str:
    return repr(word if len(word) <= 60 else f"{word[:57]}...")
