"""A checkpoint directory: the names of its files, which weights it holds, and whether they fit a model.

A checkpoint is the layout of the Hugging Face hub: `config.json` with `model.safetensors`, or with
`model.safetensors.index.json` and the shards that it names. Everything here works on names, shapes and bytes; a backend
adds the tensors.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from groupvit_common.checkpoints.safetensors_file import Header, TensorInfo, read_header
from groupvit_common.errors import CheckpointError, InputError, some
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.names import list_files
from groupvit_common.storage.saving import WEIGHTS_FILE, has_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
# In the metadata of a save's index and shards: which save they belong to. Files of other programs have none.
SAVE_ID = "save_id"

_FOREIGN_FILES = {
    "pytorch_model.bin": "PyTorch pickle",
    "pytorch_model.bin.index.json": "PyTorch pickle, sharded",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
}

# Tensors that some files have and the model does not need: transformers before 4.31 stored the positions 0, 1, 2...;
# the multi-label temperature belongs to training.
_IGNORABLE_UNEXPECTED = re.compile(r"(^|\.)position_ids$|^multi_label_logit_scale$")
# A batch norm's step counter is used in training only, and TensorFlow has none.
_IGNORABLE_MISSING = re.compile(r"\.num_batches_tracked$")


class Weights(NamedTuple):
    """The weights of a checkpoint: its files, what they hold, and which file holds what."""

    tensors: dict[str, TensorInfo]
    files: dict[Path, list[str]]


# -- reading --


def read_index(path: Path) -> dict[str, str]:
    """Returns the index of a sharded checkpoint: tensor name -> file name of its shard.

    Raises:
        CheckpointError: the index cannot be read, or names a shard outside its own directory.
    """
    return _read_index(path)[0]


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    """Returns the index, and the save that it belongs to if it names one."""
    content = read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f]{1,200}\.safetensors", shard):
            raise CheckpointError(
                f"{path} puts tensor {name[:80]!r} into {str(shard)[:80]!r}; a shard is a .safetensors file beside the "
                "index"
            )
    save = metadata.get(SAVE_ID) if isinstance(metadata, dict) else None
    return weight_map, save if isinstance(save, str) else None


def find_weights(directory: Path) -> Weights:
    """Returns the weights in `directory`: `model.safetensors`, else the shards of `model.safetensors.index.json`.

    Headers are read and checked, the index against them; no tensor is read. Hold the directory with `read_lock` until
    the tensors are read too, where somebody may be saving into it.

    Raises:
        CheckpointError: no weights, a missing shard, a tensor that is not where the index says, shards of different
            saves, a damaged file, or a file in another framework's layout.
    """
    single, index = directory / WEIGHTS_NAME, directory / WEIGHTS_INDEX_NAME
    if os.path.lexists(single):
        header = _read_pytorch_header(single)
        return Weights(header.tensors, {single: list(header.tensors)})
    if not os.path.lexists(index):
        raise missing_files(directory, [WEIGHTS_NAME], list_files(directory))
    weight_map, save = _read_index(index)
    missing = sorted({shard for shard in weight_map.values() if not has_file(directory, shard)})
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the shards that {WEIGHTS_INDEX_NAME} names: {some(missing)}"
        )
    tensors: dict[str, TensorInfo] = {}
    files: dict[Path, list[str]] = {}
    saves = {save}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        header = _read_pytorch_header(path)
        saves.add(header.metadata.get(SAVE_ID))
        files[path] = [name for name, where in weight_map.items() if where == shard]
        absent = [name for name in files[path] if name not in header.tensors]
        if absent:
            raise CheckpointError(
                f"{path} lacks {len(absent)} tensors that {WEIGHTS_INDEX_NAME} puts there: {some(absent)}; "
                "the index and the shards belong to different checkpoints"
            )
        tensors |= {name: header.tensors[name] for name in files[path]}
    if len(saves) > 1:
        raise CheckpointError(
            f"{directory} holds {WEIGHTS_INDEX_NAME} and shards of different saves, which are different models: copy "
            "or save all "
            "of one again"
        )
    return Weights(tensors, files)


def _read_pytorch_header(path: Path) -> Header:
    header = read_header(path)
    layout = header.metadata.get("format")
    if layout in ("tf", "flax"):
        framework = {"tf": "TensorFlow", "flax": "Flax"}[layout]
        raise CheckpointError(
            f"{path} holds transformers' {framework} layout (metadata format {layout!r}), whose names and axes differ; "
            f"it needs conversion: groupvit convert {path.parent} DIRECTORY"
        )
    return header


def missing_files(
    where: object, wanted: Sequence[str], present: Iterable[str], *, every: bool = False
) -> CheckpointError:
    """Returns the error for a directory or repository `where` that has none of the files `wanted`, but those `present`.

    `every`: all of `wanted` are needed, not one of them.
    """
    present = sorted(present)
    listed = (" and no " if every else " or ").join(wanted)
    message = f"{where} has no {listed}; it has " + (some(present, 12) if present else "no files")
    if WEIGHTS_NAME in wanted:
        foreign = [f"{name} ({meaning})" for name, meaning in _FOREIGN_FILES.items() if name in present]
        if foreign:
            message += (
                f". {', '.join(foreign)} cannot be read directly: convert the weights first, "
                "with `groupvit convert SOURCE DIRECTORY`"
            )
    return CheckpointError(message)


# -- comparing --


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: object,
    model: str = "the model",
    prefix: str = "",
) -> list[str]:
    """Returns the names to load, in the order of `expected`, if the tensors of a file are those of the model.

    Args:
        expected: the model's tensors, name -> shape.
        found: the file's tensors, name -> shape.
        source, model: what the error message calls the two.
        prefix: a tower's prefix ("text_model."): tensors outside it are another part's and not looked at.

    Returns:
        The names in both. A missing `num_batches_tracked` is harmless, and so are `position_ids` and
        `multi_label_logit_scale` that the model does not have.

    Raises:
        CheckpointError: missing or unexpected tensors, or other shapes; lists the first few of each with their number.
    """
    everything = found
    found = {name: shape for name, shape in found.items() if name.startswith(prefix)}
    missing = [name for name in expected if name not in found and not _IGNORABLE_MISSING.search(name)]
    unexpected = [name for name in found if name not in expected and not _IGNORABLE_UNEXPECTED.search(name)]
    mismatched = [
        f"{name} {list(found[name])} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if not missing and not unexpected and not mismatched:
        return [name for name in expected if name in found]
    problems = [
        f"{len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    raise CheckpointError(
        f"{source} does not fit {model}. Tensors {'; '.join(problems)}. "
        f"{_prefix_hint(everything, missing) or _mismatch_hint(found, missing, unexpected)}"
    )


def _prefix_hint(found: Iterable[str], missing: Sequence[str]) -> str:
    """Returns a hint at the prefix of a training framework: `module.`, `_orig_mod.`, `model.`."""
    for name in missing[:1]:
        for other in found:
            if other.endswith(f".{name}"):
                return (
                    f"Names have the prefix {other.removesuffix(name)!r} of a training framework: `groupvit convert "
                    "SOURCE DIRECTORY` "
                    "takes it off."
                )
    return ""


def _mismatch_hint(found: Mapping[str, Any], missing: list[str], unexpected: list[str]) -> str:
    if any(name.startswith(("img_encoder.", "text_encoder.", "model.img_encoder.")) for name in found):
        return "The names are those of the authors' original code: the file needs conversion first."
    for prefix, tower in (("text_model.", "GroupViTTextModel"), ("vision_model.", "GroupViTVisionModel")):
        if missing and found and all(name.startswith(prefix) for name in found):
            return f"The file holds one tower only: {tower} loads it."
    if not found:
        return "The file holds nothing of this model."
    if missing and unexpected:
        return "The names are another model's, or another format's."
    return "Do the weights and config.json belong together?"


# -- writing --


class Shard(NamedTuple):
    """One weights file to be written: its name and the tensors that go into it."""

    file_name: str
    tensors: list[str]


def plan_shards(
    sizes: Mapping[str, int], max_shard_size: int | str = "5GB", weights_name: str = WEIGHTS_NAME, mark: str = ""
) -> list[Shard]:
    """Spreads tensors over files of at most `max_shard_size`, in order; a larger tensor gets a file of its own.

    Args:
        sizes: name -> bytes.
        max_shard_size: bytes, or a text such as "5GB" or "200MB" (powers of 1000; "GiB" of 1024).
        weights_name: of the one file.
        mark: in the names of shards, where those without one are taken.

    Returns:
        `weights_name` alone if one file is enough, else shards under transformers' names.
    """
    limit = parse_size(max_shard_size)
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return [Shard(weights_name, groups[0])]
    stem, _, suffix = weights_name.rpartition(".")
    stem = f"{stem}-{mark}" if mark else stem
    return [
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}", names) for number, names in enumerate(groups, 1)
    ]


def parse_size(size: int | str) -> int:
    """Returns a size in bytes: of 1000, "200MB", "5GB", "1.5GiB". Raises `InputError` for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    )
    if match is None or not (
        number := int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))
    ):
        raise InputError(f"max_shard_size must be a number of bytes or a text such as '5GB' or '200MB', got {size!r}")
    return number


def index_text(shards: Sequence[Shard], total_size: int, save_id: str | None = None) -> str:
    """Returns the JSON text of an index such as `model.safetensors.index.json`; `total_size`: bytes of all tensors."""
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    metadata: dict[str, Any] = {"total_size": total_size} | ({} if save_id is None else {SAVE_ID: save_id})
    return json_text({"metadata": metadata, "weight_map": weight_map})


def is_weights_file(name: str) -> bool:
    """Returns whether a file of this name is part of a checkpoint's weights."""
    return WEIGHTS_FILE.fullmatch(name) is not None
