"""Settings as frozen dataclasses, from and to TOML. An unknown key or a value of another type is one clear error."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from groupvit_common.errors import InputError

T = TypeVar("T")

_NONE = "none"


def read_settings(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Returns the dataclass `cls` that a table describes; what the table leaves out has its default.

    Fields may be of the types bool, int, float, str, Literal, `tuple[T, ...]`, `tuple[T, T]`, a dataclass, `T | None`.

    Args:
        where: name of the table for error messages: "model", "data.sources[0]".

    Raises:
        InputError: an unknown key, a value of another type, or settings that `cls` refuses.
    """
    fields = _types(cls)
    for key in table:
        if key not in fields:
            owner = f"{where} has" if where else "a recipe has"
            raise InputError(
                f"{owner} no setting {key!r}; {_suggestion(key, fields) or 'there are ' + ', '.join(fields)}"
            )
    values = {key: _convert(fields[key], value, f"{where}.{key}" if where else key) for key, value in table.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where or 'a recipe'} needs the setting {missing[0]!r}")
    return cls(**values)


def to_table(settings: Any) -> dict[str, Any]:
    """Returns all settings as plain values, in order. TOML has no None: it is left out, or "none" if not the
    default."""
    return {
        field.name: _NONE if value is None else _plain(value)
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) is not None or field.default is not None
    }


def to_toml(settings: Any) -> str:
    """Returns the TOML text of settings, which `read_settings` reads back to equal ones."""
    table = to_table(settings)
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_toml(entry)}" for name, entry in value.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def changed(settings: T, changes: Mapping[str, Any]) -> T:
    """Returns settings with some values replaced, all at once.

    Args:
        changes: "section.key", or "key" alone where only one section has it, -> the new value.

    Raises:
        InputError: an unknown or ambiguous key, or what `read_settings` refuses.
    """
    return read_settings(type(settings), with_changes(type(settings), to_table(settings), changes))


def with_changes(cls: type[Any], table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table for `read_settings` of `cls` with some values replaced; `changes` as in `changed`."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for name, value in changes.items():
        *sections, key = _full_name(cls, table, name).split(".")
        place: Any = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"{name} cannot be set: {section} is a setting without others in it")
        place[key] = value
    return result


def parse_change(text: str) -> tuple[str, Any]:
    """Returns name and value of "learning_rate=1e-3". The value is TOML; text that is not TOML is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"a setting is changed by NAME=VALUE, such as learning_rate=1e-3; got {text!r}")
    try:
        table = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        table = {}
    return name.strip(), table["value"] if table.keys() == {"value"} else value.strip()


def _full_name(cls: type[Any], table: Mapping[str, Any], name: str) -> str:
    fields = _types(cls)
    # An optional section that is not there does not count.
    sections = {
        key: section
        for key, kind in fields.items()
        if (section := _section(kind)) and (section is kind or key in table)
    }
    if "." in name:
        return name
    if name in fields:
        if name in sections:
            raise InputError(
                f"{name} is a section; change one of its settings, such as {name}.{_first(sections[name])}"
            )
        return name
    owners = [section for section, kind in sections.items() if name in _types(kind)]
    if len(owners) > 1:
        raise InputError(f"{name} is ambiguous: there are {', '.join(f'{owner}.{name}' for owner in owners)}")
    if not owners:
        # For the suggestion it does.
        every = {
            f"{key}.{field}": None
            for key, kind in fields.items()
            if (owner := _section(kind))
            for field in _types(owner)
        }
        hint = (
            _suggestion(name, every)
            or f"the sections are {', '.join(fields)}; groupvit train NAME --show prints all that is in them"
        )
        raise InputError(f"there is no setting {name!r}; {hint}")
    return f"{owners[0]}.{name}"


_SUGGESTIONS = 3
_ALIKE = 0.75


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean batch_size?" for a misspelt setting, a part of one, or the initials of one; else ""."""

    def plain(text: str) -> str:
        return text.rpartition(".")[2].casefold().replace("_", "").replace("-", "")

    wanted = plain(name)

    def likeness(full: str) -> float:
        key = full.rpartition(".")[2]
        alike = difflib.SequenceMatcher(None, wanted, plain(key)).ratio()
        within = len(wanted) >= 3 and (
            plain(key).startswith(wanted) or wanted.endswith(plain(key)) or wanted.startswith(plain(key))
        )
        initials = "".join(word[0] for word in key.split("_")) == wanted and len(wanted) > 1
        return max(alike, 0.8 if within else 0.0, 0.9 if initials else 0.0)

    ranked = sorted(((likeness(full), full) for full in known), key=lambda pair: -pair[0])
    best = ranked[0][0] if ranked else 0.0
    least = max(_ALIKE, best - 0.15) if best < 1 else best
    near = [full for score, full in ranked[:_SUGGESTIONS] if score >= least]
    return f"did you mean {' or '.join(near)}?" if wanted and near else ""


def _section(kind: Any) -> Any:
    """Returns the dataclass of a type that is one or is `one | None`."""
    return next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)


def _first(cls: Any) -> str:
    return next(iter(_types(cls)))


def _types(cls: Any) -> dict[str, Any]:
    """Returns field -> type."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in arguments and (value is None or value == _NONE):
            return None
        *others, last = (argument for argument in arguments if argument is not types.NoneType)
        for other in others:
            with contextlib.suppress(InputError):
                return _convert(other, value, where)
        return _convert(last, value, where)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise _error(where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        if not isinstance(value, Sequence) or isinstance(value, str) or (not many and len(value) != len(arguments)):
            raise _error(where, "a list" if many else f"a list of {len(arguments)}", value)
        kinds = [arguments[0]] * len(value) if many else arguments
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(Any, kind)):
            return value
        if not isinstance(value, Mapping):
            raise _error(where, f"a table with {', '.join(_types(kind))}", value)
        return read_settings(typing.cast(Any, kind), value, where)
    if kind is bool:
        if not isinstance(value, bool):
            raise _error(where, "true or false", value)
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        # 1e6 is a float in TOML.
        if not number or not math.isfinite(value) or value != int(value):
            raise _error(where, "a whole number", value)
        return int(value)
    if kind is float:
        if not number:
            raise _error(where, "a number", value)
        return float(value)
    assert kind is str, f"{where}: settings of type {kind} are not supported"
    if not isinstance(value, str):
        raise _error(where, "a text", value)
    return value


def _error(where: str, expected: str, value: object) -> InputError:
    return InputError(f"{where} must be {expected}, got {value!r}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string, except for the one control character that JSON does not escape.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return repr(value)
