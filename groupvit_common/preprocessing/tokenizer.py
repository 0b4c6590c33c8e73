"""Text -> token ids: CLIP's byte-pair tokenizer, with the ids and the files of transformers' fast CLIP tokenizer.

A text is normalised (Unicode NFC, white space to one space, lower case), cut into words by CLIP's pattern, each word's
bytes are merged by the learned pairs, and the ids stand between the start-of-text and the end-of-text token. The
`tokenizers` library does the work; this module configures it, and reads and writes the five files of the hub.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, processors

from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, resolve
from groupvit_common.errors import CheckpointError, InputError, short
from groupvit_common.preprocessing.encoding import (
    HARMLESS_TOKENIZER_KEYWORDS,
    SECRETS,
    BatchEncoding,
    check_keywords,
    check_return_tensors,
    check_text,
    check_texts,
    to_tensors,
)
from groupvit_common.preprocessing.vocabulary import (
    END_OF_TEXT,
    END_OF_WORD,
    START_OF_TEXT,
    learn_vocabulary,
    library_errors,
    read_tokenizer_file,
    read_vocabulary,
)
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import read_lock, write_texts

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = [TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE]

# The context length of every published CLIP and GroupViT: what a vocabulary without a tokenizer_config.json gets.
CLIP_CONTEXT_LENGTH = 77
# transformers writes 1e30 for "no limit"; anything above this is taken so.
_NO_LIMIT = 10**20

# Letters, a digit, a sign, and bytes that only a whole alphabet has.
_PROBE = "a \u00e9\u4e2d 1!"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = (*_SPECIAL_NAMES, "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
# transformers' clean-up of decoded English, in its order: what is removed is the space in front.
_SPACED_PUNCTUATION = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class CLIPTokenizer:
    """CLIP's tokenizer, from its vocabulary files; also exported as `AutoTokenizer` and `CLIPTokenizerFast`.

    `CLIPTokenizer(vocab_file, merges_file)`, or `tokenizer_file=` a tokenizer.json; `from_pretrained` takes a directory
    or a hub name. Attributes: `bos_token`, `eos_token`, `unk_token`, `pad_token` (strings; `pad_token` may be None),
    their `..._id`, `model_max_length`, `padding_side` and `truncation_side` ("right" or "left").

    Keys of a file that are not settings here are kept in `extra` and written back by `save_pretrained`. Keywords of a
    caller
    never are: unknown ones are refused, and settings of transformers' tokenizers (`errors`, `do_lower_case`, ...) are
        accepted
    with the values that CLIP's tokenizer has anyway.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        *,
        tokenizer_file: str | Path | None = None,
        tokenizer_object: Tokenizer | None = None,
        bos_token: Any = START_OF_TEXT,
        eos_token: Any = END_OF_TEXT,
        unk_token: Any = END_OF_TEXT,
        pad_token: Any = END_OF_TEXT,
        model_max_length: int = CLIP_CONTEXT_LENGTH,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        extra: Mapping[str, Any] | None = None,
        **harmless: Any,
    ) -> None:
        valid = ("vocab_file", "merges_file", "tokenizer_file", "tokenizer_object", *_SETTINGS, "extra")
        check_keywords("tokenizer", harmless, valid, HARMLESS_TOKENIZER_KEYWORDS)
        specials = dict(zip(_SPECIAL_NAMES, (bos_token, eos_token, unk_token, pad_token), strict=True))
        contents = _check_settings(
            {
                **specials,
                "model_max_length": model_max_length,
                "padding_side": padding_side,
                "truncation_side": truncation_side,
            }
        )
        self.bos_token: str = contents["bos_token"]
        self.eos_token: str = contents["eos_token"]
        self.unk_token: str = contents["unk_token"] or self.eos_token
        self.pad_token: str | None = contents["pad_token"]
        self.model_max_length = int(model_max_length)
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.extra = dict(extra or {})

        if tokenizer_object is None and tokenizer_file is None and (vocab_file is None or merges_file is None):
            raise InputError(
                "a tokenizer needs vocab_file and merges_file, or tokenizer_file; see also from_pretrained"
            )
        with library_errors(tokenizer_file or vocab_file or "the tokenizer"):
            if tokenizer_object is not None:
                self._backend = tokenizer_object
            elif tokenizer_file is not None:
                self._backend = read_tokenizer_file(Path(tokenizer_file), self.unk_token)
            elif vocab_file is not None and merges_file is not None:
                self._backend = read_vocabulary(Path(vocab_file), Path(merges_file), self.unk_token)
            self._add_special_tokens(specials)
            # Each call cuts and pads itself: the backend's settings are shared state, and files may carry some.
            self._backend.no_truncation()
            self._backend.no_padding()
            # What does not fit together within a file shows in use only.
            self._backend.encode(_PROBE)

    # -- files --

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> Self:
        """Returns the tokenizer in a directory or a hub repository: `tokenizer.json`, or `vocab.json` with
        `merges.txt`.

        `tokenizer_config.json` and `special_tokens_map.json` are read where they exist; keywords such as
        `model_max_length` override them, and unknown ones are refused. `use_fast`, `trust_remote_code` and their like
        are accepted for code written for transformers; they change nothing. Others are those of
        `groupvit_common.checkpoints.hub.HubLocation`.
        Raises `CheckpointError` when a file is missing or cannot be used.
        """
        check_keywords("tokenizer", settings, (*_SETTINGS, *HUB_KEYWORDS), HARMLESS_TOKENIZER_KEYWORDS)
        location = HubLocation.take(settings)
        with read_lock(resolve(name_or_path, patterns=TOKENIZER_FILES, location=location)) as held:
            return cls.of_directory(held, settings)

    @classmethod
    def of_directory(cls, directory: Path, settings: Mapping[str, Any]) -> Self:
        """Returns the tokenizer of a local directory; see `from_pretrained`."""
        from_files = _read_settings(directory)
        arguments = {name: value for name, value in from_files.items() if name in _SETTINGS} | dict(settings)
        # A harmless keyword of the caller replaces the file's.
        arguments["extra"] = {name: value for name, value in from_files.items() if name not in arguments}
        try:
            _check_settings(from_files)
        except InputError as error:
            raise CheckpointError(f"{directory / TOKENIZER_CONFIG_FILE} cannot be used: {error}") from error
        tokenizer_file, vocab_file, merges_file = (directory / name for name in TOKENIZER_FILES[:3])
        if tokenizer_file.is_file():
            arguments["tokenizer_file"] = tokenizer_file
        elif vocab_file.is_file() and merges_file.is_file():
            arguments |= {"vocab_file": vocab_file, "merges_file": merges_file}
        else:
            missing = [path.name for path in (vocab_file, merges_file) if not path.is_file()]
            raise CheckpointError(
                f"no tokenizer in {directory}: it has neither {TOKENIZER_FILE} nor {' and '.join(missing)}; "
                f"expected {TOKENIZER_FILE}, or {VOCAB_FILE} with {MERGES_FILE}"
            )
        return cls(**arguments)

    def save_pretrained(self, save_directory: str | Path) -> list[Path]:
        """Writes the five files from which this class and transformers (4.x, 5.x) load the same tokenizer; returns
        their paths."""
        return write_texts(Path(save_directory), self.file_texts())

    def file_texts(self) -> dict[str, str]:
        """Returns the texts of the files that `save_pretrained` writes, by name."""
        backend = json.loads(self._backend.to_str())
        # "a b" instead of ["a", "b"]: tokenizers before 0.20 (transformers before 4.45) reads nothing else.
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
        backend["model"]["merges"] = merges
        vocab = backend["model"]["vocab"]

        added = {index: _flags(token) for index, token in self._backend.get_added_tokens_decoder().items()}
        flags = {
            token["content"]: {key: value for key, value in token.items() if key != "special"}
            for token in added.values()
        }
        specials = {name: getattr(self, name) for name in _SPECIAL_NAMES}
        config = (
            self.extra
            | specials
            | {
                "added_tokens_decoder": {str(index): token for index, token in added.items()},
                "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
                "model_max_length": self.model_max_length,
                "padding_side": self.padding_side,
                "processor_class": "CLIPProcessor",
                "tokenizer_class": "CLIPTokenizer",
                "truncation_side": self.truncation_side,
            }
        )
        # A token that the user set after loading has no flags of its own.
        special_map = {name: flags.get(content, content) for name, content in specials.items() if content is not None}
        # One line for the big vocabulary: indented, it is a third longer.
        return {
            TOKENIZER_FILE: json.dumps(backend, ensure_ascii=False),
            VOCAB_FILE: json.dumps(vocab, ensure_ascii=False),
            MERGES_FILE: "\n".join(["#version: 0.2", *merges]) + "\n",
            TOKENIZER_CONFIG_FILE: json_text(config),
            SPECIAL_TOKENS_FILE: json_text(special_map),
        }

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, model_max_length: int = CLIP_CONTEXT_LENGTH, **settings: Any
    ) -> Self:
        """Learns a byte-pair vocabulary from captions, laid out as CLIP's: the same captions always give the same one.

        First the 256 bytes, then the 256 bytes that end a word (so that no text is unknown), then the merged pairs by
        the order in which they were learned, last the start-of-text and the end-of-text token (ids `vocab_size - 2`,
        `vocab_size - 1`): the end token has the largest id, as pooling in early checkpoints needs.

        `vocab_size` is at least 514. Few captions may offer fewer pairs than requested: `len(tokenizer)` is the size
        reached.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        for caption in captions:
            check_text(caption)
        if not captions:
            raise InputError("a tokenizer cannot be trained on an empty list of captions")
        backend = learn_vocabulary(captions, vocab_size)
        return cls(tokenizer_object=backend, model_max_length=model_max_length, **settings)

    def _add_special_tokens(self, specials: Mapping[str, Any]) -> None:
        """Makes each special token one that the text may contain and that `skip_special_tokens` skips."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for name, value in specials.items():
            content = getattr(self, name)
            if content is None or content in known:
                continue
            given = value if isinstance(value, Mapping) else {}
            flags = {key: bool(given[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in given}
            # transformers finds CLIP's tokens in the normalised text ("<|ENDOFTEXT|>" is one), others as written.
            flags.setdefault("normalized", content in (START_OF_TEXT, END_OF_TEXT))
            self._backend.add_special_tokens([AddedToken(content, special=True, **flags)])
            known.add(content)
        if self._backend.post_processor is None:
            start, end = (self.bos_token, self.bos_token_id), (self.eos_token, self.eos_token_id)
            self._backend.post_processor = processors.RobertaProcessing(
                end, start, trim_offsets=False, add_prefix_space=False
            )

    # -- vocabulary --

    @property
    def bos_token_id(self) -> int:
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        return self._id_of(self.eos_token)

    @property
    def unk_token_id(self) -> int:
        return self._id_of(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else self._id_of(self.pad_token)

    @property
    def all_special_tokens(self) -> list[str]:
        """Returns the distinct special tokens."""
        return list(dict.fromkeys(token for name in _SPECIAL_NAMES if (token := getattr(self, name)) is not None))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        return [self._id_of(token) for token in self.all_special_tokens]

    @property
    def vocab_size(self) -> int:
        """Tokens of the byte-pair vocabulary, without those added to it; `len()` counts all."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Returns every token -> its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Returns token -> id, or a list of them; a token that the vocabulary lacks has the id of the unknown token."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Returns id -> token, or a list of them (any array or tensor of integers)."""
        array = _as_ids(ids)
        if array.ndim == 0:
            return self._token_of(int(array))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._token_of(index) for index in array.ravel().tolist() if index not in skipped]

    def _id_of(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise InputError(f"{token!r} is not in this vocabulary of {len(self)} tokens")
        return index

    def _token_of(self, index: int) -> str:
        token = self._backend.id_to_token(index) if index >= 0 else None
        if token is None:
            raise InputError(f"{index} is not the id of a token; this vocabulary has {len(self)} tokens")
        return token

    # -- text to ids --

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
        padding_side: str | None = None,
    ) -> BatchEncoding:
        """Returns the token ids of one text or a list of texts.

        Args:
            text: a string, or a list, tuple, NumPy array, or column of a table (pandas, Arrow, polars) of strings.
            padding: True or "longest" (to the longest text of the batch), "max_length" (to `max_length`, or
                `model_max_length` without one), False.
            truncation: True cuts to `max_length` (or `model_max_length`) and keeps the end token; False never cuts.
                Left out, a `max_length` without padding cuts too, as with transformers.
            return_tensors: None (lists of integers), "np", "pt" (int64) or "tf" (int32): `[N, T]`, also for a single
                string.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding), `[N, T]` or lists. A text longer than the
            model's context is returned as it is when not truncated.
        """
        check_return_tensors(return_tensors)
        single = isinstance(text, str)
        texts = check_texts(text)
        pad_mode = _mode(
            "padding", padding, {True: "longest", False: "", None: "", "do_not_pad": ""}, ("longest", "max_length")
        )
        if truncation is None:
            truncation = max_length is not None and not pad_mode
        cut = {True: "cut", False: "", "longest_first": "cut", "only_first": "cut", "do_not_truncate": ""}
        cut_mode = _mode("truncation", truncation, cut, ())
        limit = self._limit(max_length, add_special_tokens, wanted=bool(cut_mode) or pad_mode == "max_length")

        encodings = self._encode(texts, add_special_tokens, limit if cut_mode else None)
        rows = [encoding.ids for encoding in encodings]
        masks = [[1] * len(row) for row in rows]
        if pad_mode:
            width = limit if pad_mode == "max_length" and limit is not None else max(map(len, rows))
            if pad_mode == "longest" or limit is not None:
                side = self.padding_side if padding_side is None else padding_side
                _check_side("padding_side", side)
                masks = [_pad(mask, width, 0, side) for mask in masks]
                rows = [_pad(row, width, self._padding_id(), side) for row in rows]

        fields = {"input_ids": rows} | ({"attention_mask": masks} if return_attention_mask else {})
        if return_tensors is not None:
            lengths = sorted({len(row) for row in rows})
            if len(lengths) > 1:
                raise InputError(
                    f"texts of {lengths[0]} to {lengths[-1]} tokens cannot share one tensor; pass padding=True, "
                    "and truncation=True where some are longer than the model's context"
                )
            arrays = {name: np.asarray(value, dtype=np.int64) for name, value in fields.items()}
            return BatchEncoding({name: to_tensors(array, return_tensors) for name, array in arrays.items()})
        return BatchEncoding({name: value[0] if single else value for name, value in fields.items()})

    def encode(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Returns the token ids of one text; keywords as in a call."""
        return self(text, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Returns the tokens of one text as strings; `</w>` ends a word."""
        return self._encode([check_text(text)], add_special_tokens, None)[0].tokens

    def _limit(self, max_length: int | None, add_special_tokens: bool, *, wanted: bool) -> int | None:
        """Returns the number of tokens to cut or pad to; None where neither the call nor the tokenizer sets a limit."""
        if max_length is not None:
            least = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 1
            if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < least:
                raise InputError(f"max_length must be an integer of at least {least} tokens, got {max_length!r}")
            return int(max_length)
        if self.model_max_length < _NO_LIMIT:
            return self.model_max_length
        if wanted:
            warnings.warn(
                "this tokenizer's model_max_length sets no limit: nothing is cut or padded to it; pass max_length",
                stacklevel=3,
            )
        return None

    def _encode(self, texts: list[str], add_special_tokens: bool, limit: int | None) -> list[Encoding]:
        try:
            encodings = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"a text cannot be encoded as UTF-8 ({error}): remove its lone surrogates") from error
        if limit is None:
            return encodings
        for position, encoding in enumerate(encodings):
            if len(encoding) > limit:
                encodings[position] = self._encode_cut(texts[position], add_special_tokens, limit)
        return encodings

    def _encode_cut(self, text: str, add_special_tokens: bool, limit: int) -> Encoding:
        """Returns one text's tokens, cut so that they and the special tokens around them are `limit`."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        room = limit - (self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0)
        encoding.truncate(room, direction=self.truncation_side)
        return self._backend.post_process(encoding, add_special_tokens=add_special_tokens)

    def _padding_id(self) -> int:
        index = self.pad_token_id
        if index is None:
            raise InputError(
                "this tokenizer has no padding token; set tokenizer.pad_token (CLIP pads with its eos_token)"
            )
        return index

    # -- ids to text --

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Returns the text of one row of ids (an id, a list, an array or a tensor): lower case, a space after each
        word.

        `clean_up_tokenization_spaces` removes the space before punctuation; None: as in the tokenizer's files.
        """
        array = _as_ids(token_ids)
        if array.ndim > 1:
            raise InputError(f"decode takes one row of ids, got shape {array.shape}; batch_decode takes several")
        ids = array.ravel().tolist()
        if ids and min(ids) < 0:
            raise InputError(f"{min(ids)} is not the id of a token; this vocabulary has {len(self)} tokens")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        text = text.replace(END_OF_WORD, " ").strip()
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        if clean:
            for spaced, plain in _SPACED_PUNCTUATION:
                text = text.replace(spaced, plain)
        return text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """`decode` of each row of a list of lists, an array or a tensor."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def __repr__(self) -> str:
        limit = self.model_max_length if self.model_max_length < _NO_LIMIT else None
        return (
            f"{type(self).__name__}(tokens={len(self)}, model_max_length={limit}, padding_side={self.padding_side!r})"
        )


AutoTokenizer = CLIPTokenizer
CLIPTokenizerFast = CLIPTokenizer


def _read_settings(directory: Path) -> dict[str, Any]:
    """Returns the settings and further keys of tokenizer_config.json, special_tokens_map.json and tokenizer.json."""
    config_file, map_file = directory / TOKENIZER_CONFIG_FILE, directory / SPECIAL_TOKENS_FILE
    settings = read_json(config_file) if config_file.is_file() else {}
    if "added_tokens_decoder" in settings:
        # Written by transformers 4.34 to 4.x: complete, the flags of each token stand in this table.
        table = settings.pop("added_tokens_decoder")
        entries = (
            [token for token in table.values() if isinstance(token, Mapping)] if isinstance(table, Mapping) else []
        )
        if (
            not isinstance(table, Mapping)
            or len(entries) != len(table)
            or not all(isinstance(token.get("content"), str) for token in entries)
        ):
            raise CheckpointError(
                f"{config_file} cannot be used: added_tokens_decoder must give each token's content and flags"
            )
        flags = {token["content"]: token for token in entries}
        settings |= {
            name: flags.get(settings[name], settings[name])
            for name in _SPECIAL_NAMES
            if isinstance(settings.get(name), str)
        }
    elif map_file.is_file():
        special_map = read_json(map_file)  # older: this file has the last word
        settings |= {name: special_map[name] for name in _SPECIAL_NAMES if name in special_map}
    for name in ("vocab_file", "merges_file", "tokenizer_file", "tokenizer_object", "name_or_path", *SECRETS):
        settings.pop(name, None)
    return settings


def _content(name: str, value: Any) -> Any:
    """Returns a special token's text, from a string, an AddedToken or its dictionary in JSON; None stays None."""
    content = value.get("content") if isinstance(value, Mapping) else getattr(value, "content", value)
    if not (content is None or (isinstance(content, str) and content)):
        raise InputError(f"{name} must be a non-empty string, got {short(value)}")
    return content


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens' texts. Raises `InputError` for settings that cannot be used."""
    contents = {name: _content(name, settings[name]) for name in _SPECIAL_NAMES if name in settings}
    if not (contents.get("bos_token", START_OF_TEXT) and contents.get("eos_token", END_OF_TEXT)):
        raise InputError("bos_token and eos_token cannot be left out: the text tower reads its result at the end token")
    length = settings.get("model_max_length", CLIP_CONTEXT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int | float) or not 2 <= length < math.inf:
        raise InputError(f"model_max_length must be a number of at least 2 tokens, got {short(length)}")
    for name in ("padding_side", "truncation_side"):
        _check_side(name, settings.get(name, "right"))
    return contents


def _flags(token: AddedToken) -> dict[str, Any]:
    """Returns an added token as transformers' files have it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _check_side(name: str, side: Any) -> None:
    if side not in ("right", "left"):
        raise InputError(f"{name} must be 'right' or 'left', got {short(side)}")


def _mode(name: str, value: Any, meanings: Mapping[Any, str], names: tuple[str, ...]) -> str:
    """Returns one of the modes of `padding` or `truncation`; "" is off."""
    if isinstance(value, bool | str | None):
        if value in meanings:
            return meanings[value]
        if value in names:
            return str(value)
    allowed = ", ".join(repr(choice) for choice in (*meanings, *names) if choice is not None)
    raise InputError(f"{name} must be one of {allowed}, got {value!r}")


def _pad(row: list[int], width: int, value: int, side: str) -> list[int]:
    filling = [value] * (width - len(row))
    return row + filling if side == "right" else filling + row


def _as_ids(ids: Any) -> np.ndarray[Any, Any]:
    """Returns ids of any kind (integer, list, array, tensor on any device) as an int64 array."""
    array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids must be integers, got {array.dtype if array.dtype != object else 'a ragged list'}")
    return array.astype(np.int64)
