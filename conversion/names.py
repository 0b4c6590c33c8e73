"""Names and layouts of tensors: a table per naming, read in both directions.

A row of a table is a pair of templates, canonical name and foreign name. The canonical names are those of
`groupvit_common.model.parameters.manifest`, which lists the tensors of a configuration. The first row that fits a name
gives the foreign one. In templates

    {s} {l} {n}   a number (of a stage, a layer, ...), spelt in the format's way
    {path}        some parts of the name, joined in the format's way
    {p}           the last part: weight, bias, running_mean, ...; spelt in the format's way
    {qkv}         q, k or v: the foreign tensor is the three of them, one after the other along its first axis

The tensor's kind and the row's `op` decide how its axes differ.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from groupvit_common.errors import CheckpointError, some
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.layout import canonical_axes, from_canonical, to_canonical
from groupvit_common.model.parameters import Parameter, manifest

Op = Literal["same", "kernel", "conv1", "vector"]

# The temperature of the multi-label loss (paper, section 3.2). It belongs to training: no configuration requires it,
# but a checkpoint's is kept.
EXTRA = "multi_label_logit_scale"
# Buffers of transformers before 4.31: the positions 0, 1, 2, ...
_IGNORABLE = re.compile(r"(^|\.)position_ids$")

_LISTED = 20  # names of a kind that an error spells out

V, T = "vision_model.encoder.stages.{s}", "text_model.encoder.layers.{l}"  # the canonical prefixes of layers

Row = tuple[str, str, Op]


class Naming(NamedTuple):
    """The names of a format's tensors.

    Attributes:
        table: rows of (canonical template, foreign template, op).
        number: the spelling of {s}, {l}, {n}.
        separator: between the parts of a name.
        leaf: the spelling of {p}.
        towers: the beginnings of the names of the text tower and the vision tower.
        lacks: kinds that the format has no place for; a file may carry them under their canonical names (see
            `conversion.source`).
    """

    table: tuple[Row, ...]
    number: Callable[[str], str] = str
    separator: str = "."
    leaf: Callable[[Parameter, str], str] = lambda parameter, leaf: leaf
    towers: tuple[str, str] = ("text_model", "vision_model")
    lacks: tuple[str, ...] = ()


CANONICAL = Naming((("{path}", "{path}", "same"),))


class Entry(NamedTuple):
    """A foreign tensor: its name and shape, the canonical tensors that it holds along its first axis, and its `op`."""

    foreign: str
    shape: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    op: Op


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = {
        "s": r"(?P<s>\d+)",
        "l": r"(?P<l>\d+)",
        "n": r"(?P<n>\d+)",
        "path": r"(?P<path>.+)",
        "p": r"(?P<p>weight|bias|running_mean|running_var|num_batches_tracked)",
        "qkv": "[qkv]",
    }
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(parts[piece] if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)))


def entries(naming: Naming, config: GroupViTConfig, extra: bool = False) -> list[Entry]:
    """Returns every tensor that a file of this naming has for a configuration; `extra`: with `EXTRA`."""
    fused: dict[str, tuple[list[Parameter], Op]] = {}
    for parameter in manifest(config).values():
        name, op = _foreign(naming, parameter)
        fused.setdefault(name, ([], op))[0].append(parameter)
    result = []
    for name, (parameters, op) in fused.items():
        if len(parameters) > 1:
            # Their names differ in one letter; the manifest's order is q, k, v, but nothing need hang on it.
            parameters.sort(key=lambda parameter: "qkv".index(_letter(parameter.name)))
        result.append(Entry(name, _shape(parameters, op), tuple(parameters), op))
    if extra:
        result.append(Entry(EXTRA, (), (Parameter(EXTRA, (), "scale"),), "same"))
    return result


def _letter(name: str) -> str:
    return name.split(".")[-2][0]


def _foreign(naming: Naming, parameter: Parameter) -> tuple[str, Op]:
    if parameter.kind in naming.lacks:
        return parameter.name, "same"
    for canonical, foreign, op in naming.table:
        match = _pattern(canonical).fullmatch(parameter.name)
        if match is None:
            continue
        values = {key: value for key, value in match.groupdict().items() if value is not None}
        for key, value in values.items():
            if key == "path":
                values[key] = value.replace(".", naming.separator)
            elif key == "p":
                values[key] = naming.leaf(parameter, value)
            else:
                values[key] = naming.number(value)
        return foreign.format(**values), _op(op, parameter)
    raise AssertionError(f"no row of the table names {parameter.name}")


def _op(op: Op, parameter: Parameter) -> Op:
    """Returns the `op` of one tensor of a row: only weights of dense layers and convolutions have axes to move."""
    return op if op == "vector" or parameter.kind in ("dense", "conv") else "same"


def _shape(parameters: list[Parameter], op: Op) -> tuple[int, ...]:
    first = parameters[0]
    if op == "kernel":
        axes = canonical_axes(first.kind, len(first.shape))
        return tuple(first.shape[int(axis)] for axis in np.argsort(axes))
    if op == "conv1":
        return (*first.shape, 1)
    if op == "vector":
        return (1,)
    return (
        (sum(parameter.shape[0] for parameter in parameters), *first.shape[1:]) if len(parameters) > 1 else first.shape
    )


def to_parts(entry: Entry, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns a foreign tensor as canonical ones; views."""
    kind = entry.parameters[0].kind
    if entry.op == "kernel":
        array = to_canonical(kind, array)
    elif entry.op != "same":
        array = array.reshape(entry.parameters[0].shape)
    parts = np.split(array, len(entry.parameters)) if len(entry.parameters) > 1 else [array]
    return [(parameter.name, part) for parameter, part in zip(entry.parameters, parts, strict=True)]


def from_parts(entry: Entry, value: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns a foreign tensor, made of canonical ones: the reverse of `to_parts`. `value`: name -> tensor."""
    arrays = [value(parameter.name) for parameter in entry.parameters]
    array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    if entry.op == "kernel":
        return from_canonical(entry.parameters[0].kind, array)
    return array.reshape(entry.shape)


def account(
    wanted: Iterable[Entry], found: Mapping[str, tuple[int, ...]], *, source: object, allow_missing: Iterable[str] = ()
) -> tuple[list[Entry], list[Entry]]:
    """Compares a file's tensors with those that its configuration requires.

    Args:
        wanted: the tensors of the configuration; found: name -> shape of those in the file.
        source: the file's name in an error.
        allow_missing: shell patterns of foreign or canonical names: tensors that may be missing or left over.

    Returns:
        The entries in the file, and those that may be missing and are. A batch norm's step counter always may.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; lists and counts them.
    """
    patterns = list(allow_missing)

    def allowed(*names: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    expected = {entry.foreign: entry for entry in wanted}
    problems: dict[str, list[str]] = {"missing": [], "left over": [], "of another shape": []}
    absent = []
    for name, entry in expected.items():
        if name not in found:
            absent.append(entry)
            names = [parameter.name for parameter in entry.parameters]
            if entry.parameters[0].kind != "counter" and not allowed(name, *names):
                problems["missing"].append(name)
        elif tuple(found[name]) != entry.shape:
            problems["of another shape"].append(f"{name} {list(found[name])} in the file, {list(entry.shape)} expected")
    problems["left over"] = [
        name for name in found if name not in expected and not _IGNORABLE.search(name) and not allowed(name)
    ]
    if any(problems.values()):
        lists = "; ".join(f"{len(names)} {what}: {some(names, _LISTED)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{source} does not fit its configuration. Tensors {lists}")
    return [entry for name, entry in expected.items() if name in found], absent


def default_value(parameter: Parameter) -> np.ndarray:
    """Returns the substitute of a missing tensor: 0, but 1 for a norm's weight and a batch norm's variance."""
    ones = parameter.kind == "running_var" or (parameter.kind == "norm" and parameter.name.endswith("weight"))
    return np.full(parameter.shape, float(ones), np.int64 if parameter.kind == "counter" else np.float32)
