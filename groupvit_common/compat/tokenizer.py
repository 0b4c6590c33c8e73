"""Habits of transformers' tokenizers: encoding of ids, padding, training, old names.

`TokenizerHabits` is a base of `preprocessing.tokenizer.CLIPTokenizer`, which has the vocabulary and encodes texts.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from groupvit_common.checkpoints.hub import push
from groupvit_common.compat.chat import NoChat
from groupvit_common.compat.special_tokens import ADDITIONAL, SpecialTokens, renamed_token
from groupvit_common.errors import InputError
from groupvit_common.storage.saving import write_texts

# The clean-up of decoded English, in its order: what is removed is the space in front.
_SPACED_PUNCTUATION = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class TokenizerHabits(SpecialTokens, NoChat):
    """Methods and attributes of transformers' tokenizers beside encoding and decoding texts."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
    }
    # Settings of other models' tokenizers, as CLIP's has them.
    add_prefix_space = False
    errors = "replace"
    init_inputs = ()
    slow_tokenizer_class: Any = None
    can_save_slow_tokenizer = True
    pad_token_type_id = 0
    verbose = False

    # Of a tokenizer that is not told otherwise.
    model_input_names: list[str] = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side: str = "right"
    truncation_side: str = "right"

    # Of the class that derives from this one.
    batch_encoding: ClassVar[type[Any]]
    model_max_length: int
    vocab_size: Any
    is_fast: bool
    clean_up_tokenization_spaces: bool
    name_or_path: str
    save_pretrained: Any
    file_texts: Any
    init_kwargs: dict[str, Any]
    extra: dict[str, Any]
    _lengths: Any

    # -- vocabulary --

    @property
    def vocab(self) -> dict[str, int]:
        """Every token -> its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def encoder(self) -> dict[str, int]:
        """Token -> id of the byte-pair vocabulary, without added tokens."""
        return self._backend.get_vocab(with_added_tokens=False)

    @property
    def decoder(self) -> Any:
        """Id -> token of the byte-pair vocabulary."""
        return {index: token for token, index in self.encoder.items()}

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library beneath."""
        return self._backend

    _tokenizer = backend_tokenizer

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._backend.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=False)

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt; returns their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        texts, names = self.file_texts(), [self.vocab_files_names[name] for name in ("vocab_file", "merges_file")]
        return tuple(map(str, write_texts(Path(save_directory), {prefix + name: texts[name] for name in names})))

    # -- ids with special tokens --

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns `<start> A <end>`, for a pair `<start> A <end> <end> B <end>`."""
        start, end = [self.bos_token_id], [self.eos_token_id]
        second = [] if token_ids_1 is None else [*end, *token_ids_1, *end]
        return [*start, *token_ids_0, *end, *second]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns zeros: CLIP has no types of tokens."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for special tokens, 0 for others: of ids that have them, or of what
        `build_inputs_with_special_tokens` makes of ids without."""
        if not already_has_special_tokens:
            second = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1), 1]
            return [1, *[0] * len(token_ids_0), 1, *second]
        if token_ids_1 is not None:
            raise InputError("ids that have their special tokens are one list; leave token_ids_1 out")
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Returns a text's ids, those of the second text of a pair, and the ids that were cut off; `stride` is the
        number of kept ids that are repeated before the latter. Of a pair that is cut by "longest_first" nothing is
        listed as cut off."""
        strategy = getattr(truncation_strategy, "value", truncation_strategy)
        if num_tokens_to_remove <= 0 or strategy == "do_not_truncate":
            return ids, pair_ids, []
        left = self.truncation_side == "left"

        def cut(row: list[int], number: int, overlap: int = 0) -> tuple[list[int], list[int]]:
            if number <= 0:
                return row, []
            window = min(len(row), number + overlap)
            return (row[number:], row[:window]) if left else (row[:-number], row[-window:])

        if strategy == "longest_first" and pair_ids is not None:
            difference = len(ids) - len(pair_ids)
            alone = min(abs(difference), num_tokens_to_remove)
            half = (num_tokens_to_remove - alone) // 2
            rest = num_tokens_to_remove - alone - half
            first, second = (alone + half, rest) if difference > 0 else (half, alone + rest)
            return cut(ids, first)[0], cut(pair_ids, second)[0], []
        row = ids if strategy != "only_second" else pair_ids
        if row is None or len(row) <= num_tokens_to_remove:
            raise InputError(
                f"truncation={strategy!r} cannot remove {num_tokens_to_remove} tokens from a text of "
                f"{len(row or ())}; pass a larger max_length or another truncation"
            )
        kept, overflowing = cut(row, num_tokens_to_remove, stride)
        return (ids, kept, overflowing) if strategy == "only_second" else (kept, pair_ids, overflowing)

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        prepend_batch_axis: bool = False,
        split_special_tokens: bool = False,
        **old_names: Any,
    ) -> Any:
        """Returns the inputs of a model for ids without special tokens, as a call does for a text; keywords as there.

        `overflowing_tokens` and `num_truncated_tokens` are those that were cut off, with `return_overflowing_tokens`.
        """
        ids, pair_ids = list(ids), None if pair_ids is None else list(pair_ids)
        pair = pair_ids is not None
        if return_offsets_mapping:
            raise InputError("ids have no offsets in a text; call the tokenizer on the text for offset_mapping")
        if return_token_type_ids and not add_special_tokens:
            raise InputError("return_token_type_ids needs add_special_tokens=True")
        lengths = self._lengths(
            padding, truncation, max_length, add_special_tokens, pair, stride, pad_to_multiple_of, padding_side,
            **old_names,
        )  # fmt: skip
        if return_overflowing_tokens and pair and lengths.truncation == "longest_first":
            raise InputError(
                "of a pair that is cut by 'longest_first' no overflowing tokens are known; pass truncation='only_first'"
            )
        special = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
        surplus = len(ids) + len(pair_ids or ()) + special - (lengths.limit or 0)
        fields: dict[str, Any] = {}
        first, second, overflowing = self.truncate_sequences(
            ids, pair_ids, surplus, lengths.truncation or "do_not_truncate", stride
        )
        if return_overflowing_tokens:
            fields |= {"overflowing_tokens": overflowing, "num_truncated_tokens": surplus}
        build = self.build_inputs_with_special_tokens
        fields["input_ids"] = build(first, second) if add_special_tokens else [*first, *(second or ())]
        total = len(fields["input_ids"])
        if return_token_type_ids or (return_token_type_ids is None and "token_type_ids" in self.model_input_names):
            fields["token_type_ids"] = [0] * total
        if return_special_tokens_mask:
            mask = self.get_special_tokens_mask(first, second) if add_special_tokens else [0] * total
            fields["special_tokens_mask"] = mask
        with_mask = (
            "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask
        )
        if lengths.padding or with_mask:
            fields = dict(
                self.pad(fields, lengths.padding or False, lengths.limit, pad_to_multiple_of, padding_side, with_mask)
            )
        if return_length:
            fields["length"] = len(fields["input_ids"])
        return self.batch_encoding(fields, tensor_type=return_tensors, prepend_batch_axis=prepend_batch_axis)

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> Any:
        """Returns inputs filled up to one length; keywords as in a call.

        Args:
            encoded_inputs: the inputs of one text, of several, or a list of inputs of one text each (as a `collate_fn`
                gets them); of lists, arrays or tensors, whose kind is the result's unless `return_tensors` says.
        """
        if isinstance(encoded_inputs, list | tuple) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            inputs = {name: [each[name] for each in encoded_inputs] for name in encoded_inputs[0]}
        elif isinstance(encoded_inputs, Mapping):
            inputs = dict(encoded_inputs)
        else:
            raise InputError(f"pad takes inputs or a list of inputs, got {type(encoded_inputs).__name__}")
        main = self.model_input_names[0]
        if main not in inputs:
            raise InputError(f"inputs to pad need {main!r}, got {', '.join(inputs) or 'none'}")
        if inputs[main] is None or len(inputs[main]) == 0:
            return self.batch_encoding(inputs | ({"attention_mask": []} if return_attention_mask else {}))
        kind = _tensor_kind(inputs[main][0])
        if kind is not None:
            return_tensors = return_tensors or kind
            inputs = {name: _plain(value) for name, value in inputs.items()}

        single = not isinstance(inputs[main][0], list | tuple)
        columns = {name: [value] for name, value in inputs.items()} if single else inputs
        count = len(columns[main])
        if any(len(column) != count for column in columns.values()):
            raise InputError(f"inputs of {count} texts must all have {count} rows")
        lengths = self._lengths(padding, None, max_length, False, False, 0, pad_to_multiple_of, padding_side)
        width = lengths.width([len(row) for row in columns[main]])
        with_mask = (
            "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask
        )
        if with_mask and "attention_mask" not in columns:
            columns = columns | {"attention_mask": [[1] * len(row) for row in columns[main]]}
        if width is not None:
            fillings = {main: self._padding_id(), "token_type_ids": 0, "special_tokens_mask": 1}
            fillings |= {"attention_mask": 0} if with_mask else {}
            for name in fillings.keys() & columns.keys():
                columns[name] = [pad_row(list(row), width, fillings[name], lengths.side) for row in columns[name]]
        result = {name: column[0] if single else column for name, column in columns.items()}
        return self.batch_encoding(result, tensor_type=return_tensors)

    def _padding_id(self) -> int:
        index = self.pad_token_id
        if index is None:
            raise InputError(
                "this tokenizer has no padding token; set tokenizer.pad_token (CLIP pads with its eos_token)"
            )
        return int(index)

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns a tokenizer like this one with a vocabulary learned from texts (or batches of texts).

        As in transformers the special tokens come first, then bytes, then merged pairs. `CLIPTokenizer.train` lays a
        vocabulary out as CLIP's.

        Args:
            length: the number of texts, unused but for a progress bar.
            new_special_tokens: further special tokens.
            special_tokens_map: new names of special tokens by their old ones.
            kwargs: of `tokenizers.trainers.BpeTrainer`.
        """
        renamed = special_tokens_map or {}
        specials: list[Any] = [
            renamed_token(token, renamed.get(token.content, token.content))
            for token in self.added_tokens_decoder.values()
            if token.special
        ]
        content = json.loads(self.file_texts()["tokenizer.json"]) | {"added_tokens": [], "post_processor": None}
        content["model"] |= {"vocab": {}, "merges": []}
        unknown = content["model"].get("unk_token")
        content["model"]["unk_token"] = renamed.get(unknown, unknown)
        learner = Tokenizer.from_str(json.dumps(content))
        options = {
            "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
            "end_of_word_suffix": content["model"]["end_of_word_suffix"],
            "continuing_subword_prefix": content["model"]["continuing_subword_prefix"],
            "special_tokens": [*specials, *(new_special_tokens or ())],
        }
        learner.train_from_iterator(text_iterator, BpeTrainer(vocab_size=vocab_size, **options | kwargs), length=length)
        settings = {name: value for name, value in self.init_kwargs.items() if name not in self.extra} | {
            name: renamed_token(value, renamed.get(value.content, value.content))
            for name, value in self.special_tokens_map_extended.items()
            if isinstance(value, AddedToken)
        }
        if new_special_tokens:
            settings[ADDITIONAL] = [*self.additional_special_tokens, *new_special_tokens]
        kind: Any = type(self)
        return kind(**settings | {"tokenizer_object": learner})

    # -- old names of a call --

    def encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A call with one text or pair."""
        return self(text, text_pair, None, None, *args, **kwargs)  # type: ignore[operator]

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, *args: Any, **kwargs: Any) -> Any:
        """A call with several texts or pairs."""
        return self(batch_text_or_text_pairs, None, None, None, *args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def as_target_tokenizer(self) -> Iterator[None]:
        """Does nothing: CLIP encodes targets as it does texts."""
        yield

    def __repr__(self) -> str:
        added = "".join(f"\n\t{index}: {token!r}," for index, token in self.added_tokens_decoder.items())
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, is_fast={self.is_fast}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map}, "
            f"clean_up_tokenization_spaces={self.clean_up_tokenization_spaces}, added_tokens_decoder={{{added}\n}}\n)"
        )

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Returns decoded English without the spaces before punctuation."""
        for spaced, plain in _SPACED_PUNCTUATION:
            out_string = out_string.replace(spaced, plain)
        return out_string

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload tokenizer", **options: Any) -> str:
        """Sends the tokenizer's files to a model repository; `options` and errors as
        `groupvit_common.checkpoints.hub.push`."""
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return push(directory, repo_id, commit_message=commit_message, **options)


PreTrainedTokenizerBase = TokenizerHabits


def pad_row(row: list[int], width: int, value: int, side: str) -> list[int]:
    """Returns a row filled up to `width`."""
    filling = [value] * (width - len(row))
    return row + filling if side == "right" else filling + row


def _tensor_kind(value: Any) -> str | None:
    """Returns "pt", "tf" or "np" for a tensor or an array (or one of a row's), None for a Python value."""
    for kind, package in (("pt", "torch"), ("tf", "tensorflow"), ("np", "numpy")):
        if type(value).__module__.partition(".")[0] == package:
            return kind
    return None


def _plain(value: Any) -> Any:
    """Returns tensors and arrays, also those in a list, as Python values."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "numpy") and not hasattr(value, "tolist"):
        value = value.numpy()  # TensorFlow
    return value.tolist() if hasattr(value, "tolist") else value
