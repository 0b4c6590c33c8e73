"""Text -> token ids: CLIP's byte-pair tokenizer, with the ids and the files of transformers' fast CLIP tokenizer.

A text is normalised (Unicode NFC, white space to one space, lower case), cut into words by CLIP's pattern, each word's bytes are
merged by the learnt pairs, and the ids stand between the start-of-text and the end-of-text token. The work is done by the
`tokenizers` library; this module says which pieces it is made of, and reads and writes the five files of the hub.

`BatchEncoding`, what the tokenizer, the image processor and both together return, is here too.
"""

import contextlib
import importlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from groupvit_common.checkpoints.hub import resolve
from groupvit_common.errors import CheckpointError, GroupViTError, InputError, short
from groupvit_common.storage.json_text import json_text, parse_json, read_json
from groupvit_common.storage.reading import read_text
from groupvit_common.storage.saving import read_lock, write_texts

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = [TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE]

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"
# The context length of every published CLIP and GroupViT: what a vocabulary without a tokenizer_config.json gets.
CLIP_CONTEXT_LENGTH = 77
# transformers writes 1e30 for "no limit"; anything above this is taken so.
_NO_LIMIT = 10**20

# CLIP's word pattern (Radford et al. 2021, `simple_tokenizer.py`), in the Oniguruma syntax of `tokenizers`.
_WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Far more than any vocabulary has: the library makes a table up to the largest id.
_MOST_IDS = 1 << 20
# Letters, a digit, a sign, and bytes that only a whole alphabet has.
_PROBE = "a \u00e9\u4e2d 1!"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = (
    *_SPECIAL_NAMES,
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)
HUB_KEYWORDS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
# Keywords of transformers' from_pretrained that change nothing here, and the values that may be asked for (None: any).
HARMLESS_KEYWORDS: Mapping[str, tuple[Any, ...] | None] = {
    "use_fast": None,  # there is one implementation
    "trust_remote_code": None,  # no code of a checkpoint is ever run
    "resume_download": None,  # huggingface_hub always resumes
    "proxies": (None,),
}
# Settings of transformers' tokenizers, and the values that say what CLIP's tokenizer does anyway.
HARMLESS_TOKENIZER_KEYWORDS: Mapping[str, tuple[Any, ...] | None] = {
    **HARMLESS_KEYWORDS,
    "add_bos_token": (True,),
    "add_eos_token": (True,),
    "add_prefix_space": (False,),
    "additional_special_tokens": (None, [], ()),
    "do_lower_case": (True,),
    "errors": ("replace",),
    "from_slow": (False,),
    "split_special_tokens": (False,),
    "verbose": None,
}
# Never kept, should a file hold them: older versions of other libraries wrote a caller's access token into their files.
SECRETS = ("token", "use_auth_token")
# transformers' clean-up of decoded English, in its order: what is removed is the space in front.
_SPACED_PUNCTUATION = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class BatchEncoding(dict[str, Any]):
    """Named model inputs: a dictionary (so `model(**encoding)` works) whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} in this encoding; it holds {', '.join(self) or 'nothing'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the PyTorch tensors, in place, as `Tensor.to` does: a device, a dtype or both. Other values stay as they are.

        A dtype is given to floating-point tensors only: token ids and masks remain integers.
        """
        with_dtype = [*args, *kwargs.values()]
        for name, value in self.items():
            if not (hasattr(value, "to") and hasattr(value, "is_floating_point")):
                continue
            if value.is_floating_point():
                self[name] = value.to(*args, **kwargs)
                continue
            devices = [item for item in with_dtype if isinstance(item, str | int) or type(item).__name__ == "device"]
            if devices:
                self[name] = value.to(devices[0])
        return self


def check_return_tensors(return_tensors: str | None) -> None:
    """Raises `InputError` unless `return_tensors` is None, "np", "pt" or "tf"."""
    if return_tensors is not None and return_tensors not in ("np", "pt", "tf"):
        raise InputError(f"return_tensors must be None, 'np', 'pt' or 'tf', got {return_tensors!r}")


def to_tensors(array: np.ndarray[Any, Any], return_tensors: str) -> Any:
    """One NumPy array as the kind of tensor asked for: itself ("np"), a PyTorch ("pt") or a TensorFlow tensor ("tf").

    Integers become int32 for TensorFlow and stay int64 elsewhere, as with transformers.
    """
    if return_tensors == "np":
        return array
    name, extra = ("torch", "torch") if return_tensors == "pt" else ("tensorflow", "tf")
    try:
        framework = importlib.import_module(name)
    except ImportError as error:
        message = (
            f"return_tensors={return_tensors!r} needs {name}, which is not installed: pip install 'groupvit[{extra}]'"
        )
        raise InputError(message) from error
    if name == "torch":
        return framework.from_numpy(array)
    return framework.constant(array.astype(np.int32) if array.dtype == np.int64 else array)


def check_keywords(
    owner: str, given: Mapping[str, Any], valid: Sequence[str], harmless: Mapping[str, tuple[Any, ...] | None]
) -> None:
    """Raises `InputError` for keywords that are neither valid nor harmless, and for a harmless one that asks for something else.

    Values of unknown keywords are not repeated in the message: one may be an access token.
    """
    if "use_auth_token" in given:
        raise InputError("use_auth_token is transformers' former name of an access token; pass token= instead")
    unknown = [name for name in given if name not in valid and name not in harmless]
    if unknown:
        what = "is not a keyword" if len(unknown) == 1 else "are not keywords"
        raise InputError(f"{', '.join(map(repr, unknown))} {what} of the {owner}; these are: {', '.join(valid)}")
    for name, value in given.items():
        values = None if name in valid else harmless[name]
        if values is not None and value not in values:
            raise InputError(f"{name}={value!r} cannot be had: the {owner} knows {name}={values[0]!r} only")


class CLIPTokenizer:
    """CLIP's tokenizer, from its vocabulary files; also exported as `AutoTokenizer` and `CLIPTokenizerFast`.

    `CLIPTokenizer(vocab_file, merges_file)`, or `tokenizer_file=` a tokenizer.json; `from_pretrained` takes a directory or a hub
    name. Attributes: `bos_token`, `eos_token`, `unk_token`, `pad_token` (strings; `pad_token` may be None), their `..._id`,
    `model_max_length`, `padding_side` and `truncation_side` ("right" or "left").

    Keys of a file that are not settings here are kept in `extra` and written back by `save_pretrained`. Keywords of a caller
    never are: unknown ones are refused, and settings of transformers' tokenizers (`errors`, `do_lower_case`, ...) are accepted
    where they ask for what is done anyway.
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
        with _library(tokenizer_file or vocab_file or "the tokenizer"):
            if tokenizer_object is not None:
                self._backend = tokenizer_object
            elif tokenizer_file is not None:
                self._backend = self._read_tokenizer_file(Path(tokenizer_file))
            elif vocab_file is not None and merges_file is not None:
                self._backend = self._read_vocabulary(Path(vocab_file), Path(merges_file))
            self._add_special_tokens(specials)
            # Cut and padded here, call by call: the backend's own settings are shared state, and a saved file may carry some.
            self._backend.no_truncation()
            self._backend.no_padding()
            # What does not fit together within a file shows in use only.
            self._backend.encode(_PROBE)

    # ---- files ----

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        force_download: bool = False,
        **settings: Any,
    ) -> Self:
        """The tokenizer in a directory or a hub repository: `tokenizer.json`, or `vocab.json` with `merges.txt`.

        `tokenizer_config.json` and `special_tokens_map.json` are read where they exist; keywords such as `model_max_length`
        override them, and unknown ones are refused. `use_fast`, `trust_remote_code` and their like are accepted for code written
        for transformers; they change nothing. `revision` to `force_download` say where to look: `groupvit_common.checkpoints.hub.resolve`.
        Raises `CheckpointError` when a file is missing or cannot be used.
        """
        check_keywords("tokenizer", settings, (*_SETTINGS, *HUB_KEYWORDS), HARMLESS_TOKENIZER_KEYWORDS)
        directory = resolve(
            name_or_path,
            patterns=TOKENIZER_FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            subfolder=subfolder,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        with read_lock(directory) as held:
            return cls.of_directory(held, settings)

    @classmethod
    def of_directory(cls, directory: Path, settings: Mapping[str, Any]) -> Self:
        """The tokenizer of a local directory; see `from_pretrained`."""
        from_files = _read_settings(directory)
        arguments = {name: value for name, value in from_files.items() if name in _SETTINGS} | dict(settings)
        # A harmless keyword of the caller takes the place of what the file says.
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
        """Writes the five files from which this class and transformers (4.x, 5.x) load the same tokenizer; returns their paths."""
        return write_texts(Path(save_directory), self.file_texts())

    def file_texts(self) -> dict[str, str]:
        """The texts of the files that `save_pretrained` writes, by name."""
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
        """A byte-pair vocabulary learnt from captions, laid out as CLIP's: the same captions always give the same one.

        First the 256 bytes, then the 256 bytes that end a word (so that no text is unknown), then the merged pairs by the order
        in which they were learnt, last the start-of-text and the end-of-text token (ids `vocab_size - 2`, `vocab_size - 1`): the
        end token has the largest id, as pooling in early checkpoints needs.

        `vocab_size` is at least 514. Few captions may offer fewer pairs than asked for: `len(tokenizer)` says the size reached.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        for caption in captions:
            _check_text(caption)
        if not captions:
            raise InputError("a tokenizer cannot be trained on an empty list of captions")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        letters = alphabet + [letter + END_OF_WORD for letter in alphabet]
        if not isinstance(vocab_size, int) or vocab_size < len(letters) + 2:
            raise InputError(
                f"vocab_size must be at least {len(letters) + 2} (256 bytes inside and 256 at the end of a word, "
                f"two special tokens), got {vocab_size!r}"
            )
        learner = _assemble({}, [], None)
        trainer = BpeTrainer(
            vocab_size=vocab_size - 2,
            show_progress=False,
            # Announced as special, every letter has an id before the captions are counted (in no fixed order), and the ids
            # decide between pairs of equal frequency: without this, two trainings differ.
            special_tokens=letters,
            end_of_word_suffix=END_OF_WORD,
        )
        learner.train_from_iterator(captions, trainer)
        learnt = json.loads(learner.to_str())["model"]["merges"]
        merges = [
            (pair.split(" ")[0], pair.split(" ")[1]) if isinstance(pair, str) else (pair[0], pair[1]) for pair in learnt
        ]
        # Two pairs may spell the same token: it has one id.
        tokens = list(dict.fromkeys([*letters, *(left + right for left, right in merges), START_OF_TEXT, END_OF_TEXT]))
        vocab = {token: index for index, token in enumerate(tokens)}
        backend = _assemble(vocab, merges, END_OF_TEXT)
        return cls(tokenizer_object=backend, model_max_length=model_max_length, **settings)

    def _read_tokenizer_file(self, path: Path) -> Tokenizer:
        text = read_text(path)
        content = parse_json(text, path)
        model = content.get("model")
        if not isinstance(model, Mapping):
            raise CheckpointError(f"{path} cannot be used as a tokenizer (it has no model); fetch or save it again")
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{path} holds a {short(model['type'])} tokenizer; CLIP's is a BPE tokenizer")
        _check_ids(model.get("vocab"), path)
        added = content.get("added_tokens") or []
        _check_ids({str(position): token.get("id") for position, token in enumerate(added)}, path)
        if (content.get("pre_tokenizer") or {}).get("type") == "Sequence":
            return Tokenizer.from_str(text)
        # Written before transformers 4.17, without CLIP's word pattern: only its vocabulary is of use.
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return self._assemble_own(model["vocab"], [(left, right) for left, right in merges])

    def _read_vocabulary(self, vocab_file: Path, merges_file: Path) -> Tokenizer:
        vocab = read_json(vocab_file)
        _check_ids(vocab, vocab_file)
        lines = read_text(merges_file).split("\n")
        if lines and lines[0].startswith("#version"):
            lines = lines[1:]
        merges: list[tuple[str, str]] = []
        for line in lines:
            if not line.strip():
                continue
            left, space, right = line.partition(" ")
            if not space or not left or not right or " " in right:
                raise CheckpointError(f"{merges_file} must hold two tokens a line, found {line[:60]!r}")
            merges.append((left, right))
        with _library(f"{vocab_file} with {merges_file}"):
            return self._assemble_own(vocab, merges)

    def _assemble_own(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        return _assemble(vocab, merges, self.unk_token)

    def _add_special_tokens(self, specials: Mapping[str, Any]) -> None:
        """Makes each special token one that the text may contain and that `skip_special_tokens` skips."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for name, value in specials.items():
            content = getattr(self, name)
            if content is None or content in known:
                continue
            given = value if isinstance(value, Mapping) else {}
            flags = {key: bool(given[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in given}
            # transformers' CLIP tokenizer finds its own tokens in the normalised text ("<|ENDOFTEXT|>" is one), others as written.
            flags.setdefault("normalized", content in (START_OF_TEXT, END_OF_TEXT))
            self._backend.add_special_tokens([AddedToken(content, special=True, **flags)])
            known.add(content)
        if self._backend.post_processor is None:
            start, end = (self.bos_token, self.bos_token_id), (self.eos_token, self.eos_token_id)
            self._backend.post_processor = processors.RobertaProcessing(
                end, start, trim_offsets=False, add_prefix_space=False
            )

    # ---- vocabulary ----

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
        """The distinct special tokens."""
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
        """Every token -> its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Token -> id, or a list of them; a token that the vocabulary lacks has the id of the unknown token."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Id -> token, or a list of them (any array or tensor of integers)."""
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

    # ---- text to ids ----

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
        """Token ids of one text or a list of texts.

        Args:
            text: a string, or a list, tuple, NumPy array, or column of a table (pandas, Arrow, polars) of strings.
            padding: True or "longest" (to the longest text of the batch), "max_length" (to `max_length`, or `model_max_length`
                without one), False.
            truncation: True cuts to `max_length` (or `model_max_length`) and keeps the end token; False never cuts. Left out, a
                `max_length` without padding cuts too, as with transformers.
            return_tensors: None (lists of integers), "np", "pt" (int64) or "tf" (int32): `[N, T]`, also for a single string.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding), `[N, T]` or lists. A text longer than the model's
            context is returned as it is when not truncated.
        """
        check_return_tensors(return_tensors)
        single = isinstance(text, str)
        texts = _check_texts(text)
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
        """The token ids of one text; keywords as in a call."""
        return self(text, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of one text as strings; `</w>` ends a word."""
        return self._encode([_check_text(text)], add_special_tokens, None)[0].tokens

    def _limit(self, max_length: int | None, add_special_tokens: bool, *, wanted: bool) -> int | None:
        """Tokens to cut or pad to; None where neither the call nor the tokenizer sets a limit."""
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
        """One text's tokens cut so that they and the special tokens around them are `limit`."""
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

    # ---- ids to text ----

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of one row of ids (an id, a list, an array or a tensor): lower case, a space after each word.

        `clean_up_tokenization_spaces` removes the space before punctuation; None: what the tokenizer's files say.
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


def _assemble(vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str | None) -> Tokenizer:
    """CLIP's pipeline around a byte-pair vocabulary."""
    model = BPE(
        vocab=vocab,
        merges=merges,
        unk_token=unk_token,
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_settings(directory: Path) -> dict[str, Any]:
    """The settings, and keys that are none, that `tokenizer_config.json`, `special_tokens_map.json` and `tokenizer.json` give."""
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
    """A special token's text, from a string, an AddedToken or the dictionary that stands for one in JSON; None stays None."""
    content = value.get("content") if isinstance(value, Mapping) else getattr(value, "content", value)
    if not (content is None or (isinstance(content, str) and content)):
        raise InputError(f"{name} must be a non-empty string, got {short(value)}")
    return content


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens' texts. Raises `InputError` for settings that cannot be used."""
    contents = {name: _content(name, settings[name]) for name in _SPECIAL_NAMES if name in settings}
    if not (contents.get("bos_token", START_OF_TEXT) and contents.get("eos_token", END_OF_TEXT)):
        raise InputError("bos_token and eos_token cannot be left out: the text tower reads its result at the end token")
    length = settings.get("model_max_length", CLIP_CONTEXT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int | float) or not 2 <= length < math.inf:
        raise InputError(f"model_max_length must be a number of at least 2 tokens, got {short(length)}")
    for name in ("padding_side", "truncation_side"):
        _check_side(name, settings.get(name, "right"))
    return contents


def _check_ids(vocab: object, path: Path) -> None:
    """Raises `CheckpointError` unless `vocab` is a table of token ids that a model can have."""
    if not isinstance(vocab, Mapping):
        raise CheckpointError(f"{path} cannot be used as a tokenizer (it has no vocabulary); fetch or save it again")
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise CheckpointError(
                f"{path} cannot be used as a tokenizer: token {short(token)} has the id {short(index)}, expected an integer "
                f"from 0 to {_MOST_IDS - 1}"
            )


@contextlib.contextmanager
def _library(source: object) -> Iterator[None]:
    """Turns what the `tokenizers` library raises, or anything read from a file of another shape, into a `CheckpointError`."""
    try:
        yield
    except (GroupViTError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are no Exception at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source} cannot be used as a tokenizer ({reason:.200}); fetch or save it again"
        ) from error


def _flags(token: AddedToken) -> dict[str, Any]:
    """An added token as transformers' files say it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _check_side(name: str, side: Any) -> None:
    if side not in ("right", "left"):
        raise InputError(f"{name} must be 'right' or 'left', got {short(side)}")


def _check_text(text: Any) -> str:
    if isinstance(text, str):
        return text
    hint = (
        "; decode bytes first"
        if isinstance(text, bytes)
        else "; images are passed as images="
        if _is_image(text)
        else ""
    )
    raise InputError(f"text must be a string or a list of strings, got {type(text).__name__}{hint}")


def _check_texts(text: Any) -> list[str]:
    """One text or several as a list of strings."""
    text = _listed(text)
    if not isinstance(text, list | tuple):
        return [_check_text(text)]
    if not text:
        raise InputError("the list of texts is empty; expected a string or a list of strings")
    for position, item in enumerate(text):
        if not isinstance(item, str):
            missing = item is None or item != item  # NaN is unlike itself
            hint = ": it is missing, so leave its row out" if missing is True else ""
            raise InputError(f"text {position} of the list must be a string, got {type(item).__name__}{hint}")
    return list(text)


def _listed(text: Any) -> Any:
    """The column of a table or an array of one axis as a list: pandas, NumPy, Arrow, polars, `datasets`. Anything else as it is."""
    if _is_image(text) or getattr(text, "ndim", 1) > 1:
        return text
    for method in ("tolist", "to_pylist", "to_list"):
        if callable(getattr(text, method, None)):
            return getattr(text, method)()
    plain = isinstance(text, list | tuple | str | bytes | Mapping)
    return list(text) if isinstance(text, Sequence) and not plain else text


def _is_image(value: Any) -> bool:
    return hasattr(value, "getbands") or getattr(value, "ndim", 0) >= 2


def _mode(name: str, value: Any, meanings: Mapping[Any, str], names: tuple[str, ...]) -> str:
    """One of the modes of `padding` or `truncation`; "" is off."""
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
    """Ids of any kind (integer, list, array, tensor on any device) as an int64 array."""
    array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids must be integers, got {array.dtype if array.dtype != object else 'a ragged list'}")
    return array.astype(np.int64)
