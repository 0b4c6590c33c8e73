"""CLIP's byte-pair vocabulary: learned, or read from its files, within the pipeline of the `tokenizers` library."""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from groupvit_common.errors import CheckpointError, GroupViTError, InputError, short
from groupvit_common.storage.json_text import parse_json, read_json
from groupvit_common.storage.reading import read_text

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"

# CLIP's word pattern (Radford et al. 2021, `simple_tokenizer.py`), in the Oniguruma syntax of `tokenizers`.
_WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What transformers' slow tokenizer leaves out of a text: control, format, private and unassigned characters, and the
# sign for what could not be decoded. Line breaks and tabulators are white space.
_LEFT_OUT = r"[\p{C}\x{FFFD}&&[^\t\n\r]]"
# A sigma that ends a word has a letter of its own, in Python's `lower` as in Greek.
_FINAL_SIGMA = r"(?<=[\p{Lu}\p{Ll}\p{Lt}])\x{3A3}(?![\p{Mn}\p{Cf}\p{Lm}'.:\x{B7}\x{2019}]*[\p{Lu}\p{Ll}\p{Lt}])"
# Chinese characters, each a word of its own there (the ranges are BERT's).
_CHINESE = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]"
)
# Far more than any vocabulary has: the library makes a table up to the largest id.
_MOST_IDS = 1 << 20


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str | None) -> Tokenizer:
    """Returns CLIP's pipeline around a byte-pair vocabulary."""
    model = BPE(
        vocab=vocab, merges=merges, unk_token=unk_token, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD
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


def read_tokenizer_file(path: Path, unk_token: str) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json. Raises `CheckpointError` for one that is not CLIP's kind."""
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
    return assemble(model["vocab"], [(left, right) for left, right in merges], unk_token)


def ftfy_of_environment() -> Callable[[str], str] | None:
    """Returns `ftfy.fix_text`; None where ftfy is not installed."""
    try:
        fix_text: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    except ImportError:
        return None
    return fix_text


def mapped_text(function: Callable[[str], str], item: Any) -> Any:
    """Returns a text, a pair of texts or a list of words, each changed by a function."""
    return function(item) if isinstance(item, str) else type(item)(mapped_text(function, each) for each in item)


def add_cleaning(tokenizer: Tokenizer, *, fixed: bool) -> None:
    """Puts the clean-up of transformers' slow tokenizer before the pipeline of the fast one; with `fixed` that of texts
    that come from ftfy."""
    left_out = [] if fixed else [normalizers.Replace(Regex(_LEFT_OUT), "")]
    chinese = [] if fixed else [pre_tokenizers.Split(Regex(_CHINESE), behavior="isolated")]
    final_sigma = normalizers.Replace(Regex(_FINAL_SIGMA), "\u03c2")
    tokenizer.normalizer = normalizers.Sequence([*left_out, final_sigma, tokenizer.normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*chinese, tokenizer.pre_tokenizer])


def without_cleaning(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what a tokenizer.json holds without what `add_cleaning` has put in."""
    for name, steps in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = content[name] or {}
        if steps in part:
            kept = [step for step in part[steps] if not _is_cleaning(step)]
            content = content | {name: part | {steps: kept}}
    return content


def _is_cleaning(step: Mapping[str, Any]) -> bool:
    pattern = step.get("pattern")
    return isinstance(pattern, Mapping) and pattern.get("Regex") in (_LEFT_OUT, _FINAL_SIGMA, _CHINESE)


def read_vocabulary(
    vocab: Path | Mapping[str, int], merges: Path | Sequence[str | Sequence[str]], unk_token: str
) -> Tokenizer:
    """Returns the tokenizer of a vocab.json and a merges.txt, or of what they hold. Raises `CheckpointError` for
    damaged ones."""
    source = f"{vocab} with {merges}" if isinstance(vocab, Path) else "the vocabulary"
    table = read_json(vocab) if isinstance(vocab, Path) else vocab
    _check_ids(table, vocab if isinstance(vocab, Path) else "the vocabulary")
    pairs = _read_merges(merges) if isinstance(merges, Path) else [_pair(line, "the merges") for line in merges]
    with library_errors(source):
        return assemble(dict(table), pairs, unk_token)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path).split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    return [_pair(line, path) for line in lines if line.strip()]


def _pair(line: str | Sequence[str], source: object) -> tuple[str, str]:
    parts = line.split(" ") if isinstance(line, str) else list(line)
    if len(parts) != 2 or not all(parts):
        raise CheckpointError(f"{source} must hold two tokens a line, found {str(line)[:60]!r}")
    return parts[0], parts[1]


def _check_ids(vocab: object, path: object) -> None:
    """Raises `CheckpointError` unless `vocab` is a table of token ids that a model can have."""
    if not isinstance(vocab, Mapping):
        raise CheckpointError(f"{path} cannot be used as a tokenizer (it has no vocabulary); fetch or save it again")
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise CheckpointError(
                f"{path} cannot be used as a tokenizer: token {short(token)} has the id {short(index)}, expected an "
                f"integer from 0 to {_MOST_IDS - 1}"
            )


def learn_vocabulary(captions: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with a byte-pair vocabulary learned from captions (see `CLIPTokenizer.train`)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [letter + END_OF_WORD for letter in alphabet]
    if not isinstance(vocab_size, int) or vocab_size < len(letters) + 2:
        raise InputError(
            f"vocab_size must be at least {len(letters) + 2} (256 bytes inside and 256 at the end of a word, "
            f"two special tokens), got {vocab_size!r}"
        )
    learner = assemble({}, [], None)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2,
        show_progress=False,
        # Announced as special, every letter has an id before the captions are counted (in no fixed order), and the ids
        # decide between pairs of equal frequency: without this, two trainings differ.
        special_tokens=letters,
        end_of_word_suffix=END_OF_WORD,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [
        (pair.split(" ")[0], pair.split(" ")[1]) if isinstance(pair, str) else (pair[0], pair[1]) for pair in learned
    ]
    # Two pairs may spell the same token: it has one id.
    tokens = list(dict.fromkeys([*letters, *(left + right for left, right in merges), START_OF_TEXT, END_OF_TEXT]))
    vocab = {token: index for index, token in enumerate(tokens)}
    return assemble(vocab, merges, END_OF_TEXT)


@contextlib.contextmanager
def library_errors(source: object) -> Iterator[None]:
    """Turns errors of the `tokenizers` library, or of a file of another shape, into `CheckpointError`."""
    try:
        yield
    except (GroupViTError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are no Exception at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source} cannot be used as a tokenizer ({reason:.200}); fetch or save it again"
        ) from error
