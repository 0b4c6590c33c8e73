"""CLIP's byte-pair vocabulary: learned, or read from its files, within the pipeline of the `tokenizers` library."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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


def read_vocabulary(vocab_file: Path, merges_file: Path, unk_token: str) -> Tokenizer:
    """Returns the tokenizer of a vocab.json and a merges.txt. Raises `CheckpointError` for damaged ones."""
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
    with library_errors(f"{vocab_file} with {merges_file}"):
        return assemble(vocab, merges, unk_token)


def _check_ids(vocab: object, path: Path) -> None:
    """Raises `CheckpointError` unless `vocab` is a table of token ids that a model can have."""
    if not isinstance(vocab, Mapping):
        raise CheckpointError(f"{path} cannot be used as a tokenizer (it has no vocabulary); fetch or save it again")
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise CheckpointError(
                f"{path} cannot be used as a tokenizer: token {short(token)} has the id {short(index)}, expected an "
                "integer "
                f"from 0 to {_MOST_IDS - 1}"
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
