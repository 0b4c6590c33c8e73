"""The files of a tokenizer, as the hub has them: what they say, and what is written into them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from groupvit_common.compat.keywords import check_unknown
from groupvit_common.compat.special_tokens import ADDITIONAL, SPECIAL_TOKENS
from groupvit_common.errors import CheckpointError, InputError, short
from groupvit_common.preprocessing.encoding import HARMLESS_TOKENIZER_KEYWORDS, SECRETS, check_keywords
from groupvit_common.preprocessing.lengths import check_side
from groupvit_common.preprocessing.vocabulary import END_OF_TEXT, START_OF_TEXT
from groupvit_common.storage.json_text import json_text, read_json

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILES = [
    TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE,
]  # fmt: skip

# The context length of every published CLIP and GroupViT: what a vocabulary without a tokenizer_config.json gets.
CLIP_CONTEXT_LENGTH = 77

SETTINGS = (
    *SPECIAL_TOKENS, ADDITIONAL, "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
    "split_special_tokens", "model_input_names",
)  # fmt: skip
# Names of older and newer transformers for settings.
_OTHER_NAMES = {
    "vocab": "vocab_file", "merges": "merges_file", "max_len": "model_max_length", "extra_special_tokens": ADDITIONAL,
}  # fmt: skip
# What `save_pretrained` passes to `push_to_hub`, and keywords of transformers' that ask for nothing here.
PUSH_KEYWORDS = ("repo_id", "commit_message", "token", "use_auth_token", "private", "revision", "create_pr")
HARMLESS_SAVING: Mapping[str, tuple[Any, ...] | None] = {
    "save_jinja_files": None, "save_raw_chat_template": None, "max_shard_size": None, "safe_serialization": None,
    "organization": (None,), "tags": (None,),
}  # fmt: skip
# Of the machine that wrote a file, or kept elsewhere: never taken from it.
_NOT_KEPT = ("vocab_file", "merges_file", "tokenizer_file", "tokenizer_object", "name_or_path", *SECRETS)
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def known_settings(owner: str, given: Mapping[str, Any], valid: Sequence[str]) -> dict[str, Any]:
    """Returns keywords by our names without those that transformers alone has; see `check_unknown`."""
    given = {_OTHER_NAMES.get(name, name): value for name, value in given.items()}
    known = {name: value for name, value in given.items() if name in valid or name in HARMLESS_TOKENIZER_KEYWORDS}
    check_keywords(owner, known, valid, HARMLESS_TOKENIZER_KEYWORDS)
    check_unknown(owner, given.keys() - known.keys(), valid)
    return known


def read_settings(directory: Path) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """Returns the settings and further keys of a directory's files, and the tokens added to the vocabulary by id."""
    config_file, map_file, added_file = (
        directory / name for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
    )
    settings = read_json(config_file) if config_file.is_file() else {}
    if isinstance(settings.get("extra_special_tokens"), list):  # as transformers 5 calls them
        settings.setdefault(ADDITIONAL, settings.pop("extra_special_tokens"))
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        # Written by transformers 4.34 to 4.x: complete, the flags of each token stand in this table.
        added = _added_tokens(settings.pop("added_tokens_decoder"), config_file)
    else:
        # Older, or of transformers 5: these files have the last word.
        special_map = read_json(map_file) if map_file.is_file() else {}
        settings |= {name: special_map[name] for name in (*SPECIAL_TOKENS, ADDITIONAL) if name in special_map}
        specials = {_content(name, settings.get(name)) for name in SPECIAL_TOKENS}
        specials |= {_content(ADDITIONAL, token) for token in _listed(settings.get(ADDITIONAL))}
        for content, index in (read_json(added_file) if added_file.is_file() else {}).items():
            special = content in specials
            added[_id(index, added_file)] = AddedToken(content, normalized=not special, special=special)
    by_content = {token.content: token for token in added.values()}
    for name in SPECIAL_TOKENS:
        if isinstance(settings.get(name), str):
            settings[name] = by_content.get(settings[name], settings[name])
    if isinstance(settings.get(ADDITIONAL), list):
        settings[ADDITIONAL] = [
            by_content.get(token, token) if isinstance(token, str) else token for token in settings[ADDITIONAL]
        ]
    return {name: value for name, value in settings.items() if name not in _NOT_KEPT}, added


def _added_tokens(table: Any, path: Path) -> dict[int, AddedToken]:
    entries: Any = table.items() if isinstance(table, Mapping) else [("", None)]
    if not all(isinstance(token, Mapping) and isinstance(token.get("content"), str) for _, token in entries):
        raise CheckpointError(f"{path} cannot be used: added_tokens_decoder must give each token's content and flags")
    return {_id(index, path): added_token(token["content"], token) for index, token in entries}


def _id(index: Any, path: Path) -> int:
    try:
        return int(index)
    except (TypeError, ValueError):
        raise CheckpointError(f"{path} cannot be used: {short(index)} is not the id of a token") from None


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def added_token(content: str, given: Any, **default: bool) -> AddedToken:
    """Returns a token with the flags of a file's entry; `default` are those that it leaves out."""
    if isinstance(given, AddedToken):
        return given
    entry = given if isinstance(given, Mapping) else {}
    flags = {name: bool(entry[name]) for name in _FLAGS[1:] if name in entry}
    return AddedToken(content, **default | flags)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens' texts. Raises `InputError` for settings that cannot be used."""
    contents = {name: _content(name, settings[name]) for name in SPECIAL_TOKENS if name in settings}
    if not (contents.get("bos_token", START_OF_TEXT) and contents.get("eos_token", END_OF_TEXT)):
        raise InputError("bos_token and eos_token cannot be left out: the text tower reads its result at the end token")
    additional = settings.get(ADDITIONAL)
    if additional is not None and not isinstance(additional, list | tuple):
        raise InputError(f"{ADDITIONAL} must be a list of tokens, got {short(additional)}")
    contents[ADDITIONAL] = [_content(ADDITIONAL, token) for token in additional or ()]
    length = settings.get("model_max_length", CLIP_CONTEXT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int | float) or not 2 <= length < math.inf:
        raise InputError(f"model_max_length must be a number of at least 2 tokens, got {short(length)}")
    for name in ("padding_side", "truncation_side"):
        check_side(name, settings.get(name, "right"))
    return contents


def _content(name: str, value: Any) -> Any:
    """Returns a special token's text, from a string, an AddedToken or its dictionary in JSON; None stays None."""
    content = value.get("content") if isinstance(value, Mapping) else getattr(value, "content", value)
    if not (content is None or (isinstance(content, str) and content)):
        raise InputError(f"{name} must be a non-empty string, got {short(value)}")
    return content


def file_texts(
    content: dict[str, Any], added: Mapping[int, AddedToken], specials: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the texts of a tokenizer's files by name.

    Args:
        content: what tokenizer.json holds.
        added: the tokens beside the vocabulary.
        specials: special tokens (for additional ones a list) by the names of their settings.
        config: settings and further keys of tokenizer_config.json.
    """
    # "a b" instead of ["a", "b"]: tokenizers before 0.20 (transformers before 4.45) reads nothing else.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    content["model"]["merges"] = merges
    vocab = content["model"]["vocab"]
    table = {index: {flag: getattr(token, flag) for flag in _FLAGS} for index, token in added.items()}
    entries = {each["content"]: {name: each[name] for name in _FLAGS[:-1]} for each in table.values()}

    def entry(token: str) -> Any:
        # A token that the user set after loading has no flags of its own.
        return entries.get(token, token)

    special_map = {
        name: [entry(token) for token in value] if isinstance(value, list) else entry(value)
        for name, value in specials.items()
        if value
    }
    texts = {
        TOKENIZER_CONFIG_FILE: json_text({**config, "added_tokens_decoder": {str(i): table[i] for i in sorted(table)}}),
        SPECIAL_TOKENS_FILE: json_text(special_map),
        # One line for the big vocabulary: indented, it is a third longer.
        VOCAB_FILE: json.dumps(vocab, ensure_ascii=False),
        MERGES_FILE: "\n".join(["#version: 0.2", *merges]) + "\n",
    }
    if beyond := {token.content: index for index, token in added.items() if index >= len(vocab)}:
        texts[ADDED_TOKENS_FILE] = json_text(beyond)
    return texts | {TOKENIZER_FILE: json.dumps(content, ensure_ascii=False)}
