"""Text -> token ids: CLIP's byte-pair tokenizer, with the ids and the files of transformers' CLIP tokenizers.

A text is normalised (Unicode NFC, white space to one space, lower case), cut into words by CLIP's pattern, each word's
bytes are merged by the learned pairs, and the ids stand between the start-of-text and the end-of-text token. The
`tokenizers` library does the work; this module configures it. Names and keywords that are transformers' alone are in
`groupvit_common.compat.tokenizer`.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenizers import AddedToken, Tokenizer, processors

from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, resolve
from groupvit_common.compat.special_tokens import ADDITIONAL, SPECIAL_TOKENS, renamed_token
from groupvit_common.compat.tokenizer import TokenizerHabits
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.encoding import (
    BatchEncoding,
    as_ids,
    as_plain,
    check_inputs,
    check_keywords,
    check_return_tensors,
    check_text,
)
from groupvit_common.preprocessing.lengths import Lengths, encode_texts, fields_of_encodings, lengths_of_call
from groupvit_common.preprocessing.tokenizer_files import (
    CLIP_CONTEXT_LENGTH,
    HARMLESS_SAVING,
    MERGES_FILE,
    PUSH_KEYWORDS,
    SETTINGS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    VOCAB_FILE,
    added_token,
    check_settings,
    file_texts,
    known_settings,
    read_settings,
)
from groupvit_common.preprocessing.vocabulary import (
    END_OF_TEXT,
    END_OF_WORD,
    START_OF_TEXT,
    add_cleaning,
    ftfy_of_environment,
    learn_vocabulary,
    library_errors,
    mapped_text,
    read_tokenizer_file,
    read_vocabulary,
    without_cleaning,
)
from groupvit_common.storage.saving import read_lock, write_texts

# Letters, a digit, a sign, and bytes that only a whole alphabet has.
_PROBE = "a \u00e9\u4e2d 1!"
__all__ = ["AddedToken", "AutoTokenizer", "CLIPTokenizer", "CLIPTokenizerFast"]

_AS_THEY_ARE = Lengths()
_OLD_CALL_NAMES = ("truncation_strategy", "pad_to_max_length")


class CLIPTokenizer(TokenizerHabits):
    """CLIP's tokenizer, from its vocabulary files, with the ids of transformers 4's `CLIPTokenizer`.

    `CLIPTokenizer(vocab_file, merges_file)`, or `tokenizer_file=` a tokenizer.json; `from_pretrained` takes a directory
    or a hub name. Attributes: `bos_token`, `eos_token`, `unk_token`, `pad_token` and others that transformers has
    (strings or None), their `..._id`, `model_max_length`, `padding_side` and `truncation_side` ("right" or "left").

    Before anything else a text is cleaned: with ftfy where it is installed, as the texts that CLIP and GroupViT learned
    from; otherwise control and format characters are left out and each Chinese character is a word. Ids differ for
    such characters only from those of `CLIPTokenizerFast`, which processors use and which cleans nothing.

    Keys of a file that are not settings here are kept in `extra` and written back by `save_pretrained`. Keywords of a
    caller never are: unknown ones are refused, and settings of transformers' tokenizers (`errors`, `do_lower_case`,
    ...) are accepted with the values that CLIP's tokenizer has anyway.
    """

    batch_encoding = BatchEncoding
    is_fast = False
    fix_text: Callable[[str], str] | None = None
    _cleans: ClassVar[bool] = True

    def __init__(
        self,
        vocab_file: str | Path | Mapping[str, int] | None = None,
        merges_file: str | Path | Sequence[Any] | None = None,
        tokenizer_file: str | Path | None = None,
        *,
        tokenizer_object: Tokenizer | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        extra: Mapping[str, Any] | None = None,
        name_or_path: str = "",
        **settings: Any,
    ) -> None:
        """Settings are keywords: special tokens (`bos_token`, ..., `additional_special_tokens`; strings or
        AddedTokens), `model_max_length`, `padding_side`, `truncation_side`, `clean_up_tokenization_spaces` (of decoded
        text), `split_special_tokens`, `model_input_names`."""
        vocab_file, merges_file = settings.pop("vocab", vocab_file), settings.pop("merges", merges_file)
        valid = ("vocab_file", "merges_file", "tokenizer_file", "tokenizer_object", *SETTINGS, "extra")
        settings = known_settings("tokenizer", settings, valid)
        specials = {
            "bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        } | {name: settings[name] for name in (*SPECIAL_TOKENS, ADDITIONAL) if name in settings}  # fmt: skip
        contents = check_settings(settings | specials)
        self._special_tokens_map = dict.fromkeys(SPECIAL_TOKENS) | contents
        self._special_tokens_map["unk_token"] = contents["unk_token"] or contents["eos_token"]
        self.model_max_length = int(settings.get("model_max_length") or CLIP_CONTEXT_LENGTH)
        self.padding_side = settings.get("padding_side", self.padding_side)
        self.truncation_side = settings.get("truncation_side", self.truncation_side)
        self.clean_up_tokenization_spaces = bool(settings.get("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.model_input_names = list(settings.get("model_input_names") or self.model_input_names)
        self.name_or_path = str(name_or_path)
        self.extra = dict(extra or {})

        if tokenizer_object is None and tokenizer_file is None and (vocab_file is None or merges_file is None):
            raise InputError(
                "a tokenizer needs vocab_file and merges_file, or tokenizer_file; see also from_pretrained"
            )
        named = tokenizer_file or (vocab_file if isinstance(vocab_file, str | Path) else "the tokenizer")
        with library_errors(named):
            if tokenizer_object is not None:
                self._backend = copy.deepcopy(tokenizer_object)
            elif tokenizer_file is not None:
                self._backend = read_tokenizer_file(Path(tokenizer_file), self.unk_token)
            elif vocab_file is not None and merges_file is not None:
                vocab, merges = (
                    Path(each) if isinstance(each, str | Path) else each for each in (vocab_file, merges_file)
                )
                self._backend = read_vocabulary(vocab, merges, self.unk_token)  # type: ignore[arg-type]
            self._add_tokens_of_settings(specials, added_tokens_decoder or {})
            # Each call cuts and pads itself: the backend's settings are shared state, and files may carry some.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self.split_special_tokens
            if self._cleans:
                self.fix_text = ftfy_of_environment()
                add_cleaning(self._backend, fixed=self.fix_text is not None)
            # What does not fit together within a file shows in use only.
            self._backend.encode(_PROBE)
        self._take_flags()
        self.init_kwargs = self.extra | settings | self.special_tokens_map_extended
        self.init_kwargs |= {name: getattr(self, name) for name in ("model_max_length", "name_or_path", "extra")}
        # The backend has them: a copy made of these arguments is given its own.
        self.init_kwargs |= {"tokenizer_object": None, "added_tokens_decoder": None}

    # -- files --

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **settings: Any) -> Self:
        """Returns the tokenizer in a directory or a hub repository: `tokenizer.json`, or `vocab.json` with
        `merges.txt`.

        `tokenizer_config.json` and `special_tokens_map.json` are read where they exist; keywords such as
        `model_max_length` override them, and unknown ones are refused. `use_fast`, `trust_remote_code` and their like
        are accepted for code written for transformers; they change nothing. Others are those of
        `groupvit_common.checkpoints.hub.HubLocation`.
        Raises `CheckpointError` when a file is missing or cannot be used.
        """
        location = HubLocation.take(settings)
        settings = known_settings("tokenizer", settings, (*SETTINGS, *HUB_KEYWORDS))
        with read_lock(resolve(pretrained_model_name_or_path, patterns=TOKENIZER_FILES, location=location)) as held:
            return cls.of_directory(held, settings, name=str(pretrained_model_name_or_path))

    @classmethod
    def of_directory(cls, directory: Path, settings: Mapping[str, Any], name: str = "") -> Self:
        """Returns the tokenizer of a local directory, which is to be called `name`; see `from_pretrained`."""
        from_files, added = read_settings(directory)
        arguments = {name: value for name, value in from_files.items() if name in SETTINGS} | dict(settings)
        # A harmless keyword of the caller replaces the file's.
        arguments["extra"] = {name: value for name, value in from_files.items() if name not in arguments}
        try:
            check_settings(from_files)
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
        return cls(**arguments, added_tokens_decoder=added, name_or_path=name or str(directory))

    def save_pretrained(
        self,
        save_directory: str | Path,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Writes the files from which this class and transformers (4.x, 5.x) load the same tokenizer; returns their
        paths.

        `legacy_format=False` leaves out vocab.json and merges.txt, True tokenizer.json; `filename_prefix` stands
        before the names of all; `push_to_hub` sends the files to the hub besides (further keywords are its).
        """
        check_keywords("tokenizer's save_pretrained", kwargs, PUSH_KEYWORDS, HARMLESS_SAVING)
        left_out = () if legacy_format is None else (TOKENIZER_FILE,) if legacy_format else _VOCABULARY_FILES
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        texts = {prefix + name: text for name, text in self.file_texts().items() if name not in left_out}
        paths = write_texts(Path(save_directory), texts)
        if push_to_hub:
            options = {name: value for name, value in kwargs.items() if name in PUSH_KEYWORDS}
            self.push_to_hub(options.pop("repo_id", None) or Path(save_directory).name, **options)
        return tuple(map(str, paths))

    def file_texts(self) -> dict[str, str]:
        """Returns the texts of the files that `save_pretrained` writes, by name."""
        content = json.loads(self._backend.to_str())
        specials = {name: getattr(self, name) for name in (*SPECIAL_TOKENS, ADDITIONAL)}
        settings = {
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "processor_class": "CLIPProcessor",
            "tokenizer_class": "CLIPTokenizer",
            "truncation_side": self.truncation_side,
        }
        if self.split_special_tokens:
            settings["split_special_tokens"] = True
        if self.model_input_names != type(self).model_input_names:
            settings["model_input_names"] = self.model_input_names
        # Those that a tokenizer has by default are written even if it has none.
        kept = {name: value for name, value in specials.items() if value or name == "pad_token"}
        return file_texts(
            without_cleaning(content),
            self.added_tokens_decoder,
            specials,
            self.extra | kept | settings,
        )

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

    def _add_tokens_of_settings(self, specials: Mapping[str, Any], added: Mapping[int, AddedToken]) -> None:
        """Adds the tokens of a directory's files, and makes each special token one that the text may contain and that
        `skip_special_tokens` skips."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        wanted = [token for _, token in sorted(added.items())]
        for name, value in specials.items():
            for content, given in (
                zip(self.additional_special_tokens, value or (), strict=True)
                if name == ADDITIONAL
                else [(getattr(self, name), value)]
            ):
                if content is not None:
                    # transformers finds CLIP's tokens in the normalised text ("<|ENDOFTEXT|>" is one), others as
                    # written.
                    normalized = content in (START_OF_TEXT, END_OF_TEXT)
                    token = added_token(content, given, normalized=normalized)
                    wanted.append(token if token.special else renamed_token(token, content, special=True))
        for token in wanted:
            if token.content not in known:
                self._backend.add_tokens([token])
                known.add(token.content)
        if self._backend.post_processor is None:
            start, end = (self.bos_token, self.bos_token_id), (self.eos_token, self.eos_token_id)
            self._backend.post_processor = processors.RobertaProcessing(
                end, start, trim_offsets=False, add_prefix_space=False
            )

    # -- vocabulary --

    @property
    def vocab_size(self) -> int:
        """Tokens of the byte-pair vocabulary, without those added to it; `len()` counts all."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Returns every token -> its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str] | None) -> Any:
        """Returns token -> id, or a list of them; a token that the vocabulary lacks has the id of the unknown token.
        Of None (a special token that is not set) it is None."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            if index is None:
                index = self._backend.token_to_id(self.unk_token)
            if index is None:
                raise InputError(f"{tokens!r} is not in this vocabulary of {len(self)} tokens")
            return index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Returns id -> token, or a list of them (any array or tensor of integers)."""
        array = as_ids(ids)
        if array.ndim == 0:
            return self._token_of(int(array))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._token_of(index) for index in array.ravel().tolist() if index not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Returns the text that tokens spell."""
        text: str = self._backend.decoder.decode(list(tokens))
        return text.replace(END_OF_WORD, " ").strip()

    def _token_of(self, index: int) -> str:
        token = self._backend.id_to_token(index) if index >= 0 else None
        if token is None:
            raise InputError(f"{index} is not the id of a token; this vocabulary has {len(self)} tokens")
        return token

    # -- text to ids --

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
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
        split_special_tokens: bool | None = None,
        **old_names: Any,
    ) -> BatchEncoding:
        """Returns the token ids of one text or a list of texts.

        Args:
            text: a string, or a list, tuple, NumPy array, or column of a table (pandas, Arrow, polars) of strings; with
                `is_split_into_words` a list of words, or a list of those. A list may hold pairs of texts.
            text_pair: the second text of a pair, or a list of them. CLIP was trained on single texts.
            text_target: texts whose ids are returned as `labels` (as `input_ids` without `text`).
            padding: True or "longest" (to the longest text of the batch), "max_length" (to `max_length`, or
                `model_max_length` without one), False.
            truncation: True cuts to `max_length` (or `model_max_length`) and keeps the end token; False never cuts.
                Left out, a `max_length` without padding cuts too, as with transformers. Of a pair "only_first" or
                "only_second" is cut, with True the longer one first.
            stride: tokens that the parts of a text share, with `return_overflowing_tokens`.
            pad_to_multiple_of: the padded length becomes a multiple of it.
            return_tensors: None (lists of integers), "np", "pt" (int64) or "tf" (int32): `[N, T]`, also for a single
                string.
            return_overflowing_tokens: the parts that are cut off are rows of their own;
                `overflow_to_sample_mapping` has the number of each row's text.
            return_token_type_ids, return_special_tokens_mask, return_offsets_mapping, return_length: adds
                `token_type_ids` (0), `special_tokens_mask` (1 for special tokens and padding), `offset_mapping`
                (characters `(start, end)` of each token), `length`.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding), `[N, T]` or lists. A text longer than the
            model's context is returned as it is when not truncated.
        """
        if text is None and text_target is not None:
            text, text_pair, text_target = text_target, text_pair_target, None
        check_return_tensors(return_tensors)
        single, items, pair = check_inputs(text, text_pair, is_split_into_words)
        lengths = self._lengths(
            padding, truncation, max_length, add_special_tokens, pair, stride, pad_to_multiple_of, padding_side,
            **old_names,
        )  # fmt: skip
        if self.fix_text is not None:
            items = [mapped_text(self.fix_text, item) for item in items]
        backend = self._backend_of(split_special_tokens)
        encodings = encode_texts(backend, items, add_special_tokens, is_split_into_words, lengths)
        filling = self._filling(lengths, [len(encoding) for encoding in encodings])
        names = self.model_input_names
        fields, encodings = fields_of_encodings(
            encodings,
            filling,
            token_type_ids="token_type_ids" in names if return_token_type_ids is None else return_token_type_ids,
            attention_mask="attention_mask" in names if return_attention_mask is None else return_attention_mask,
            special_tokens_mask=return_special_tokens_mask,
            offset_mapping=return_offsets_mapping,
            overflow=return_overflowing_tokens,
            length=return_length,
        )
        if return_tensors in ("pt", "tf"):
            sizes = sorted({len(row) for row in fields["input_ids"]})
            if len(sizes) > 1:
                raise InputError(
                    f"texts of {sizes[0]} to {sizes[-1]} tokens cannot share one tensor; pass padding=True, "
                    "and truncation=True where some are longer than the model's context"
                )
        if return_tensors is None and single and not return_overflowing_tokens:
            fields = {name: value[0] if isinstance(value[0], list) else value for name, value in fields.items()}
        result = BatchEncoding(fields, encodings, return_tensors)
        result._padding = filling
        if text_target is not None:
            result["labels"] = self(
                text_target, text_pair_target, None, None, add_special_tokens, padding, truncation, max_length, stride,
                is_split_into_words, pad_to_multiple_of, padding_side, return_tensors,
                return_overflowing_tokens=return_overflowing_tokens, split_special_tokens=split_special_tokens,
                **old_names,
            ).input_ids  # fmt: skip
        return result

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Returns the token ids of one text; keywords as in a call."""
        return self(
            text, text_pair, None, None, add_special_tokens, padding, truncation, max_length, stride, **kwargs
        ).input_ids

    def tokenize(self, text: Any, pair: Any = None, add_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Returns the tokens of one text, or of a pair, as strings; `</w>` ends a word. Keywords as in a call."""
        if not isinstance(text, str) and not kwargs.get("is_split_into_words"):
            check_text(text)
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def _lengths(
        self,
        padding: Any,
        truncation: Any,
        max_length: Any,
        add_special_tokens: bool,
        pair: bool,
        stride: int,
        multiple: int | None,
        padding_side: str | None,
        **old_names: Any,
    ) -> Lengths:
        asked = stride or multiple or padding_side or old_names or max_length is not None
        if padding is False and truncation in (None, False) and not asked:
            return _AS_THEY_ARE
        if old_names:
            check_keywords("tokenizer's call", old_names, CALL_KEYWORDS, {})
        return lengths_of_call(
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            least=self._backend.num_special_tokens_to_add(pair) if add_special_tokens else 1,
            longest=self.model_max_length,
            cut_side=self.truncation_side,
            side=self.padding_side if padding_side is None else padding_side,
            stride=stride,
            multiple=multiple,
            **old_names,
        )

    def _backend_of(self, split_special_tokens: bool | None) -> Tokenizer:
        """Returns the backend that finds special tokens in a text or splits them; its own setting is shared state."""
        if split_special_tokens is None or split_special_tokens == self.split_special_tokens:
            return self._backend
        if "_other_backend" not in self.__dict__:
            other = copy.deepcopy(self._backend)
            other.encode_special_tokens = not self.split_special_tokens
            self._other_backend = other
        return self._other_backend

    def _filling(self, lengths: Lengths, sizes: list[int]) -> dict[str, Any] | None:
        """Returns the keywords of `Encoding.pad` for texts of these sizes."""
        width = lengths.width(sizes)
        return (
            None
            if width is None
            else {
                "length": width,
                "direction": lengths.side,
                "pad_id": self._padding_id(),
                "pad_type_id": self.pad_token_type_id,
                "pad_token": self.pad_token,
            }
        )

    # -- ids to text --

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **harmless: Any,
    ) -> Any:
        """Returns the text of one row of ids (an id, a list, an array or a tensor): lower case, a space after each
        word. For several rows a list of texts, as transformers 5.

        `clean_up_tokenization_spaces` removes the space before punctuation; None: as in the tokenizer's files.
        """
        check_keywords("tokenizer's decode", harmless, (), _HARMLESS_DECODING)
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        if isinstance(token_ids, list | tuple) and token_ids and not isinstance(token_ids[0], int):
            array = None if getattr(as_plain(token_ids[0]), "ndim", 1) else as_ids(token_ids)
        else:
            array = as_ids(token_ids)
        if array is None or array.ndim > 1:
            return self.batch_decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)
        ids = array.ravel().tolist()
        if ids and min(ids) < 0:
            raise InputError(f"{min(ids)} is not the id of a token; this vocabulary has {len(self)} tokens")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        text = text.replace(END_OF_WORD, " ").strip()
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **harmless: Any,
    ) -> list[str]:
        """`decode` of each row of a list of lists, an array or a tensor."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **harmless) for row in sequences]


class CLIPTokenizerFast(CLIPTokenizer):
    """CLIP's tokenizer with the ids of transformers' `CLIPTokenizerFast` (and of transformers 5): texts as they are."""

    is_fast = True
    slow_tokenizer_class = CLIPTokenizer
    _cleans = False

    @property
    def decoder(self) -> Any:
        """The decoder of the `tokenizers` library, as in transformers' fast tokenizers."""
        return self._backend.decoder

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Returns the text that tokens spell; ends of words are left in it, as in transformers' fast tokenizers."""
        text: str = self._backend.decoder.decode(list(tokens))
        return text


# Names that programs import for `isinstance` and annotations.
PreTrainedTokenizer, PreTrainedTokenizerFast = CLIPTokenizer, CLIPTokenizerFast


class AutoTokenizer:
    """`from_pretrained` of transformers' class of this name: a `CLIPTokenizerFast`."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, *inputs: Any, use_fast: bool | None = True, **settings: Any
    ) -> CLIPTokenizer:
        """Returns `CLIPTokenizerFast.from_pretrained`, or with `use_fast=False` `CLIPTokenizer.from_pretrained`."""
        kind = CLIPTokenizer if use_fast is False else CLIPTokenizerFast
        return kind.from_pretrained(pretrained_model_name_or_path, *inputs, **settings)


_VOCABULARY_FILES = (VOCAB_FILE, MERGES_FILE, "added_tokens.json")
_HARMLESS_DECODING = {"use_source_tokenizer": (False,), "spaces_between_special_tokens": None}
CALL_KEYWORDS = sorted(
    {*inspect.signature(CLIPTokenizer.__call__).parameters, *_OLD_CALL_NAMES} - {"self", "old_names"}
)
