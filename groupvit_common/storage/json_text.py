"""JSON, parsed within bounds and written readably.

A file may hold a gigabyte of brackets or a number of five thousand digits. What is accepted here has bounded depth,
finite numbers, and texts that can be written again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.reading import TEXT_BYTES, read_bytes

# Levels of nested arrays and objects; a tokenizer's file has six.
_JSON_DEPTH = 64
# Of a number without a fraction: "no bound" is 10**30 in the files of transformers' tokenizers, and has 31 digits.
_DIGITS = 40
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _DIGITS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {list: "an array", str: "a text", int: "a number", float: "a number", bool: "a truth value"}


def read_json(path: Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises `CheckpointError`: as `read_bytes` and `parse_json`; names the file."""
    return parse_json(read_bytes(path, limit), path)


def parse_json(text: bytes | str, source: object, *, has_names: bool = False) -> dict[str, Any]:
    """Returns the JSON object that a text is.

    Args:
        text: UTF-8, with or without a byte order mark.
        source: the file, for messages.
        has_names: names of files may be in it, which need not be Unicode (`unicode_json`).

    Raises:
        CheckpointError: no JSON, no object, nested too deeply, a number that is not finite or too long, a text that is
            no Unicode.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        # Looked at one by one only where there is a long run of digits: a vocabulary has fifty thousand numbers.
        whole = _bounded if _LONG_NUMBER.search(raw) else None
        content = json.loads(
            raw.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite, parse_int=whole
        )
        _check_depth(content)
        if not has_names and _SURROGATE.search(raw):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source} cannot be used: a text in it has half of a surrogate pair") from error
    except RecursionError as error:
        raise CheckpointError(f"{source} cannot be used: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be read as JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} must hold a JSON object, found {_KINDS.get(type(content), 'null')}")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _bounded(digits: str) -> int:
    if len(digits.lstrip("-")) >= _DIGITS:
        raise ValueError(f"it has a number of {_DIGITS} digits or more")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def json_text(content: Mapping[str, Any]) -> str:
    """Returns a JSON object as text, indented and with sorted keys, as transformers writes it.

    Raises:
        InputError: a number in it is not finite, which JSON does not know.
    """
    try:
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError("a number that is not finite (NaN or infinite) cannot be saved as JSON") from error


def unicode_json(content: Any, **how: Any) -> str:
    """Returns JSON in readable Unicode; in ASCII if a text in it is no Unicode, as file names that are not UTF-8 are
    none.

    Numbers that are not finite, which JSON does not know, are null.
    """
    content = finite(content)
    text = json.dumps(content, ensure_ascii=False, **how)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, **how)
    return text


def finite(value: Any) -> Any:
    """Returns JSON values with None for numbers that are not finite, all through lists and dictionaries."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
