"""Habits of transformers' BatchEncoding: from tokens to words, characters and sequences of the text, and back.

What a question is about is kept by the `tokenizers` library in an `Encoding` per text; here it is found and asked.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Self, cast

from tokenizers import Encoding

from groupvit_common.compat.features import NamedInputs
from groupvit_common.errors import InputError


class TensorType(StrEnum):
    """Kinds of tensors; a keyword takes a member or its value."""

    PYTORCH = "pt"
    TENSORFLOW = "tf"
    NUMPY = "np"


class PaddingStrategy(StrEnum):
    LONGEST = "longest"
    MAX_LENGTH = "max_length"
    DO_NOT_PAD = "do_not_pad"


class TruncationStrategy(StrEnum):
    ONLY_FIRST = "only_first"
    ONLY_SECOND = "only_second"
    LONGEST_FIRST = "longest_first"
    DO_NOT_TRUNCATE = "do_not_truncate"


class CharSpan(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` to `end` (exclusive) of an encoding."""

    start: int
    end: int


class EncodingHabits(NamedInputs):
    """A dictionary of model inputs that still knows how they came from the text.

    `encoding[0]` is the `tokenizers.Encoding` of the first text. Methods that take `batch_or_..._index` are called with
    one index (of the first text) or with two (of a text, and within it), as in transformers.
    """

    _encodings: list[Encoding] | None
    _padding: dict[str, Any] | None
    _n_sequences: int | None

    def __init__(
        self,
        data: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(data or (), **fields)
        self._encodings = [encoding] if isinstance(encoding, Encoding) else None if encoding is None else list(encoding)
        self._padding = None
        self._n_sequences = n_sequences
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> Self:
        raise NotImplementedError

    def __getitem__(self, item: Any) -> Any:
        """Returns the value of a name, the encoding of a text's number, or for a slice: the encodings of those texts,
        or without any the slice of each value."""
        if isinstance(item, str):
            return super().__getitem__(item)
        if self._encodings is not None:
            return cast(list[Encoding], self.encodings)[item]
        if isinstance(item, slice):
            return {name: value[item] for name, value in self.items()}
        raise KeyError(f"{item!r}: expected a name; these are inputs without encodings of texts")

    def copy(self) -> Self:
        copied = type(self)(self)
        copied.__dict__.update(self.__dict__)
        return copied

    @property
    def encodings(self) -> list[Encoding] | None:
        """The `tokenizers.Encoding` of each text, padded as the inputs are; None if they came from no text."""
        if self._padding is not None and self._encodings is not None:
            padding, self._padding = self._padding, None
            for encoding in self._encodings:
                encoding.pad(**padding)
        return self._encodings

    @property
    def is_fast(self) -> bool:
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs of texts, None if unknown."""
        if self._n_sequences is None and self._encodings:
            return self._encodings[0].n_sequences
        return self._n_sequences

    def _of(self, batch_index: int) -> Encoding:
        encodings = self.encodings
        if not encodings:
            raise InputError("these inputs have no encodings of texts; call the tokenizer on the texts to have them")
        return encodings[batch_index]

    def _find(self, first: int, second: int | None) -> tuple[Encoding, int]:
        """Returns the encoding and the index in it that one or two indices mean."""
        return (self._of(0), first) if second is None else (self._of(first), second)

    def _find_token(self, first: int, second: int | None) -> tuple[Encoding, int]:
        encoding, index = self._find(first, second)
        return encoding, index + len(encoding) if index < 0 else index

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._of(batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns for each token 0 or 1, the text of a pair; None for special tokens."""
        return self._of(batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns for each token the number of its word; None for special tokens."""
        return self._of(batch_index).word_ids

    words = word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._find_token(batch_or_token_index, token_index)
        return encoding.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._find_token(batch_or_token_index, token_index)
        return encoding.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, index = self._find(batch_or_token_index, token_index)
        span = encoding.token_to_chars(index)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        encoding, index = self._find_token(batch_or_word_index, word_index)
        span = encoding.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        encoding, index = self._find(batch_or_word_index, word_index)
        span = encoding.word_to_chars(index, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, index = self._find(batch_or_char_index, char_index)
        return encoding.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, index = self._find(batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)
