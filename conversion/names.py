"""What each format calls each tensor, and how it lays it out: one table per format, read in both directions.

A table's row is a pair of templates, canonical name and foreign name. The canonical names are those of
`groupvit_common.model.parameters.manifest`, which says what there is for a configuration; the first row that fits a name gives the foreign
one. In templates

    {s} {l} {n}   a number (of a stage, a layer, ...), spelt in the format's way
    {path}        some parts of the name, joined in the format's way
    {p}           the last part: weight, bias, running_mean, ...; spelt in the format's way
    {qkv}         q, k or v: the foreign tensor is the three of them, one after the other along its first axis

How a tensor's axes differ follows from its kind and the row's `op`.
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

Naming = Literal["canonical", "nvlabs", "transformers-tf", "keras"]
Op = Literal["same", "kernel", "conv1", "vector"]

# The temperature of the multi-label loss (paper, section 3.2). It belongs to training: no configuration asks for it, but where
# a checkpoint has one it is kept.
EXTRA = "multi_label_logit_scale"
# Buffers of transformers before 4.31: the positions 0, 1, 2, ...
_IGNORABLE = re.compile(r"(^|\.)position_ids$")

_LISTED = 20  # names of a kind that an error spells out

_V, _T = "vision_model.encoder.stages.{s}", "text_model.encoder.layers.{l}"

_NVLABS: tuple[tuple[str, str, Op], ...] = (
    ("vision_model.embeddings.position_embeddings", "img_encoder.pos_embed", "same"),
    ("vision_model.embeddings.patch_embeddings.projection.{p}", "img_encoder.patch_embed.proj.{p}", "same"),
    ("vision_model.embeddings.layernorm.{p}", "img_encoder.patch_embed.norm.{p}", "same"),
    (_V + ".layers.{l}.layer_norm{n}.{p}", "img_encoder.layers.{s}.blocks.{l}.norm{n}.{p}", "same"),
    (_V + ".layers.{l}.self_attn.{qkv}_proj.{p}", "img_encoder.layers.{s}.blocks.{l}.attn.qkv.{p}", "same"),
    (_V + ".layers.{l}.self_attn.out_proj.{p}", "img_encoder.layers.{s}.blocks.{l}.attn.proj.{p}", "same"),
    (_V + ".layers.{l}.mlp.{path}", "img_encoder.layers.{s}.blocks.{l}.mlp.{path}", "same"),
    (
        _V + ".downsample.pre_assign_attn.attn.out_proj.{p}",
        "img_encoder.layers.{s}.downsample.pre_assign_attn.attn.proj.{p}",
        "same",
    ),
    (_V + ".{path}", "img_encoder.layers.{s}.{path}", "same"),
    ("vision_model.layernorm.{p}", "img_encoder.norm.{p}", "same"),
    ("text_model.embeddings.token_embedding.weight", "text_encoder.token_embedding.weight", "same"),
    ("text_model.embeddings.position_embedding.weight", "text_encoder.positional_embedding", "same"),
    (_T + ".layer_norm{n}.{p}", "text_encoder.transformer.resblocks.{l}.ln_{n}.{p}", "same"),
    (_T + ".self_attn.{qkv}_proj.{p}", "text_encoder.transformer.resblocks.{l}.attn.in_proj_{p}", "same"),
    (_T + ".self_attn.out_proj.{p}", "text_encoder.transformer.resblocks.{l}.attn.out_proj.{p}", "same"),
    (_T + ".mlp.fc1.{p}", "text_encoder.transformer.resblocks.{l}.mlp.c_fc.{p}", "same"),
    (_T + ".mlp.fc2.{p}", "text_encoder.transformer.resblocks.{l}.mlp.c_proj.{p}", "same"),
    ("text_model.final_layer_norm.{p}", "text_encoder.ln_final.{p}", "same"),
    ("visual_projection.0.{p}", "img_projector.linear_hidden.0.{p}", "conv1"),
    ("visual_projection.1.{p}", "img_projector.linear_hidden.1.{p}", "same"),
    ("visual_projection.3.{p}", "img_projector.linear_out.{p}", "conv1"),
    ("text_projection.0.{p}", "text_projector.linear_hidden.0.{p}", "conv1"),
    ("text_projection.1.{p}", "text_projector.linear_hidden.1.{p}", "same"),
    ("text_projection.3.{p}", "text_projector.linear_out.{p}", "conv1"),
    ("logit_scale", "logit_scale", "same"),
)

_TF_V = "vision_model/encoder/stages_._{s}"
_TRANSFORMERS_TF: tuple[tuple[str, str, Op], ...] = (
    ("vision_model.embeddings.position_embeddings", "vision_model/embeddings/position_embeddings:0", "same"),
    (_V + ".group_token", _TF_V + "/group_token:0", "same"),
    (_V + ".group_projector.0.{p}", _TF_V + "/group_projector.0/{p}", "kernel"),
    (_V + ".group_projector.1.{path}.{p}", _TF_V + "/group_projector.1/{path}/{p}", "kernel"),
    (_V + ".layers.{l}.{path}.{p}", _TF_V + "/layers_._{l}/{path}/{p}", "kernel"),
    (_V + ".downsample.{path}.{p}", _TF_V + "/downsample/{path}/{p}", "kernel"),
    ("text_model.embeddings.token_embedding.weight", "text_model/embeddings/token_embedding/weight:0", "same"),
    (
        "text_model.embeddings.position_embedding.weight",
        "text_model/embeddings/position_embedding/embeddings:0",
        "same",
    ),
    (_T + ".{path}.{p}", "text_model/encoder/layers_._{l}/{path}/{p}", "kernel"),
    ("visual_projection.{n}.{p}", "visual_projection.{n}/{p}", "kernel"),
    ("text_projection.{n}.{p}", "text_projection.{n}/{p}", "kernel"),
    ("logit_scale", "logit_scale:0", "vector"),
    ("{path}.{p}", "{path}/{p}", "kernel"),
)

_KERAS_V = "layers/vision_tower/encoder/stages/stage{s}"
_KERAS: tuple[tuple[str, str, Op], ...] = (
    ("vision_model.embeddings.position_embeddings", "layers/vision_tower/embeddings/vars/0", "same"),
    (_V + ".group_token", _KERAS_V + "/vars/0", "same"),
    (_V + ".group_projector.0.{p}", _KERAS_V + "/group_projector/norm/{p}", "kernel"),
    (_V + ".group_projector.1.{path}.{p}", _KERAS_V + "/group_projector/mixer/{path}/{p}", "kernel"),
    (_V + ".layers.{l}.{path}.{p}", _KERAS_V + "/layers/encoder_layer{l}/{path}/{p}", "kernel"),
    (_V + ".downsample.{path}.{p}", _KERAS_V + "/downsample/{path}/{p}", "kernel"),
    (_T + ".{path}.{p}", "layers/text_tower/encoder/layers/encoder_layer{l}/{path}/{p}", "kernel"),
    ("vision_model.{path}.{p}", "layers/vision_tower/{path}/{p}", "kernel"),
    ("text_model.{path}.{p}", "layers/text_tower/{path}/{p}", "kernel"),
    ("visual_projection.0.{p}", "layers/projection/hidden/{p}", "kernel"),
    ("visual_projection.1.{p}", "layers/projection/norm/{p}", "kernel"),
    ("visual_projection.3.{p}", "layers/projection/output_layer/{p}", "kernel"),
    ("text_projection.0.{p}", "layers/projection_1/hidden/{p}", "kernel"),
    ("text_projection.1.{p}", "layers/projection_1/norm/{p}", "kernel"),
    ("text_projection.3.{p}", "layers/projection_1/output_layer/{p}", "kernel"),
    ("logit_scale", "vars/0", "same"),
)


def _tf_leaf(parameter: Parameter, leaf: str) -> str:
    if parameter.kind == "norm":
        return {"weight": "gamma:0", "bias": "beta:0"}[leaf]
    return {"weight": "kernel:0", "running_mean": "moving_mean:0", "running_var": "moving_variance:0"}.get(
        leaf, f"{leaf}:0"
    )


def _keras_leaf(parameter: Parameter, leaf: str) -> str:
    return f"vars/{('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked').index(leaf)}"


class _Style(NamedTuple):
    table: tuple[tuple[str, str, Op], ...]
    number: Callable[[str], str] = str  # how {s}, {l}, {n} are spelt
    separator: str = "."  # within {path}
    leaf: Callable[[Parameter, str], str] = lambda parameter, leaf: leaf
    towers: tuple[str, str] = ("text_model", "vision_model")  # what the names of either tower begin with
    # Kinds that the format has no place for; where it can, a file carries them under their canonical names (see `formats`).
    lacks: tuple[str, ...] = ()


_STYLES: dict[Naming, _Style] = {
    "canonical": _Style((("{path}", "{path}", "same"),)),
    "nvlabs": _Style(_NVLABS, towers=("text_encoder", "img_encoder")),
    "transformers-tf": _Style(_TRANSFORMERS_TF, separator="/", leaf=_tf_leaf, lacks=("counter",)),
    # Keras numbers layers of one class: stage, stage_1, stage_2.
    "keras": _Style(
        _KERAS,
        lambda n: "" if n == "0" else f"_{n}",
        "/",
        _keras_leaf,
        towers=("layers/text_tower", "layers/vision_tower"),
    ),
}


def towers(naming: Naming) -> tuple[str, str]:
    """Returns what the names of the text tower and of the vision tower begin with."""
    return _STYLES[naming].towers


def separator(naming: Naming) -> str:
    """Returns what separates the parts of names."""
    return _STYLES[naming].separator


class Entry(NamedTuple):
    """A foreign tensor: its name and shape, the canonical tensors that it holds, along its first axis, and what is to be done."""

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
    """Every tensor that a file of this naming has for a configuration; `extra`: with `EXTRA`."""
    style = _STYLES[naming]
    fused: dict[str, tuple[list[Parameter], Op]] = {}
    for parameter in manifest(config).values():
        name, op = _foreign(style, parameter)
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


def _foreign(style: _Style, parameter: Parameter) -> tuple[str, Op]:
    if parameter.kind in style.lacks:
        return parameter.name, "same"
    for canonical, foreign, op in style.table:
        match = _pattern(canonical).fullmatch(parameter.name)
        if match is None:
            continue
        values = {key: value for key, value in match.groupdict().items() if value is not None}
        for key, value in values.items():
            if key == "path":
                values[key] = value.replace(".", style.separator)
            elif key == "p":
                values[key] = style.leaf(parameter, value)
            else:
                values[key] = style.number(value)
        return foreign.format(**values), _op(op, parameter)
    raise AssertionError(f"no row of the table names {parameter.name}")


def _op(op: Op, parameter: Parameter) -> Op:
    """What a row's `op` means for one of its tensors: only weights of dense layers and convolutions have axes to move."""
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
    """A foreign tensor as canonical ones; views."""
    kind = entry.parameters[0].kind
    if entry.op == "kernel":
        array = to_canonical(kind, array)
    elif entry.op != "same":
        array = array.reshape(entry.parameters[0].shape)
    parts = np.split(array, len(entry.parameters)) if len(entry.parameters) > 1 else [array]
    return [(parameter.name, part) for parameter, part in zip(entry.parameters, parts, strict=True)]


def from_parts(entry: Entry, value: Callable[[str], np.ndarray]) -> np.ndarray:
    """The reverse of `to_parts`: `value` gives a canonical tensor by name."""
    arrays = [value(parameter.name) for parameter in entry.parameters]
    array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    if entry.op == "kernel":
        return from_canonical(entry.parameters[0].kind, array)
    return array.reshape(entry.shape)


def account(
    wanted: Iterable[Entry],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: object,
    allow_missing: Iterable[str] = (),
) -> tuple[list[Entry], list[Entry]]:
    """Holds a file's tensors against those that its configuration asks for.

    Args:
        wanted: what there should be; found: name -> shape of what there is; source: what an error calls the file.
        allow_missing: shell patterns of foreign or canonical names: tensors that may be missing or left over.

    Returns:
        The entries that are there, and those that are not but may be. A batch norm's step counter always may.

    Raises:
        CheckpointError: tensors that are missing, left over or of another shape, listed with their numbers.
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
    """What stands in for a tensor that may be missing: 0, but 1 for a norm's weight and a batch norm's variance."""
    ones = parameter.kind == "running_var" or (parameter.kind == "norm" and parameter.name.endswith("weight"))
    return np.full(parameter.shape, float(ones), np.int64 if parameter.kind == "counter" else np.float32)
