"""A checkpoint directory on disk: its file names, what its weight files say about themselves, and how it is replaced.

A checkpoint is the layout of the Hugging Face hub: `config.json` with `model.safetensors`, or with
`model.safetensors.index.json` and the shards that it names. Everything here works on names, shapes and bytes; a backend adds
the tensors. The format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON header, data).
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.files import WEIGHTS_FILE, has_file, json_text, list_files, parse_json, read_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

# Bits per element of safetensors' dtypes.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# What transformers knows PyTorch's layout by.
PYTORCH_METADATA = {"format": "pt"}
# In the metadata of a save's index and shards: which save they belong to. Files of other programs have none.
SAVE_ID = "save_id"

# NumPy's names of the dtypes that models use, widest first.
_ARRAY_DTYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
_STORED_AS = {name: stored for stored, name in _ARRAY_DTYPES.items()}
# Some 60,000 tensors, a hundred times those of the largest model; the library's own limit of 100 MB costs gigabytes of memory.
_MAX_HEADER_BYTES = 8 << 20

# What other files begin with that end up under the name of a weights file.
_IMPOSTORS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves; run `git lfs pull` in its repository"),
    (b"<", "a web page or XML, not weights; the download was answered by an error or login page: download it again"),
    (b"PK\x03\x04", "a zip archive (PyTorch's pickle format), not safetensors; `groupvit convert` reads it"),
    (b"\x80\x02", "a Python pickle, not safetensors; `groupvit convert` reads those of PyTorch"),
    (b"\x89HDF", "an HDF5 file (TensorFlow's .h5), not safetensors; `groupvit convert` reads it"),
    (b"{", "a JSON text, not weights"),
)
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

_LISTED = 5  # names that an error message spells out


class TensorInfo(NamedTuple):
    """A stored tensor: shape, and dtype under safetensors' name ("F32", "BF16", "I64", ...)."""

    shape: tuple[int, ...]
    dtype: str


class Header(NamedTuple):
    """What a safetensors file says about itself: tensors by name, where each begins, and free metadata such as `format`."""

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]  # bytes from the beginning of the file
    metadata: dict[str, str]


class Weights(NamedTuple):
    """The weights of a checkpoint: its files, what they hold, and which file holds what."""

    tensors: dict[str, TensorInfo]
    files: dict[Path, list[str]]


# -- reading --------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size; no tensor is read.

    Raises:
        CheckpointError: the file cannot be read, is something else, or is damaged; names the file and the cause.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            _refuse_impostor(path, size, start)
            length = int.from_bytes(start[:8], "little")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file of a model: its header would be {length} bytes long, and "
                    f"{_MAX_HEADER_BYTES} are the most that is read"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it announces a header of {length} bytes "
                    f"and is {size} bytes long; download or copy it again"
                )
            file.seek(8)
            text = file.read(length)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _parse_header(path, text, size)


def _refuse_impostor(path: Path, size: int, start: bytes) -> None:
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes); download or copy it again")
    for magic, meaning in _IMPOSTORS:
        # A length that happens to begin with such a byte has eight bytes that are no text.
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(magic) and not _plausible_length(start, size):
            raise CheckpointError(f"{path} is {meaning}")
    if len(start) < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are no safetensors file; download or copy it again")


def _plausible_length(start: bytes, size: int) -> bool:
    return len(start) > 8 and int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{"


def _parse_header(path: Path, text: bytes, size: int) -> Header:
    data_start = 8 + len(text)
    data_bytes = size - data_start
    damaged = f"{path} is damaged or not a safetensors file"
    content = parse_json(text, f"the header of {path}")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{damaged}: its metadata is no table of texts")
    tensors, spans = {}, []
    for name, entry in content.items():
        info, span = _parse_entry(entry)
        if info is None or span is None:
            raise CheckpointError(f"{damaged}: the entry of tensor {name!r} makes no sense")
        tensors[name] = info
        spans.append((*span, name))
    end = 0
    for begin, after, name in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{damaged}: tensor {name!r} starts at byte {begin}, expected {end}")
        end = after
    if end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header announces {end} bytes of tensors and {data_bytes} are there; "
            "download or copy it again"
        )
    if end < data_bytes:
        raise CheckpointError(f"{damaged}: {data_bytes - end} bytes follow the last tensor")
    return Header(tensors, {name: data_start + begin for begin, _, name in spans}, metadata)


def _parse_entry(entry: object) -> tuple[TensorInfo, tuple[int, int]] | tuple[None, None]:
    """One tensor's header entry, or (None, None) if it is malformed or contradicts itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return None, None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS or not _is_sizes(shape) or not _is_sizes(offsets):
        return None, None
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        return None, None
    return TensorInfo(tuple(shape), dtype), (offsets[0], offsets[1])


def _is_sizes(value: object) -> bool:
    # The bound keeps products of damaged numbers small; no file has 2**63 bytes.
    return isinstance(value, list) and len(value) < 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_arrays(path: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors `names` of a safetensors file, one at a time, in their stored dtypes (bfloat16: that of `ml_dtypes`).

    Raises:
        CheckpointError: the file cannot be read, or holds one of them in a dtype that NumPy does not have.
    """
    header = read_header(path)
    try:
        with path.open("rb") as file:
            for name in sorted(names, key=header.starts.__getitem__):
                shape, stored = header.tensors[name]
                if stored not in _ARRAY_DTYPES:
                    raise CheckpointError(f"{path} holds {name} as {stored}; {', '.join(_ARRAY_DTYPES)} can be read")
                array = np.empty(math.prod(shape), _array_dtype(stored))
                file.seek(header.starts[name])
                if file.readinto(array.view(np.uint8).data) != array.nbytes:
                    raise CheckpointError(f"{path} is truncated: it ends within {name}")
                yield name, array.reshape(shape)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _array_dtype(stored: str) -> np.dtype:
    if stored == "BF16":
        # NumPy has no such type; the package that adds it comes with TensorFlow and with JAX.
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_ARRAY_DTYPES[stored])


def read_index(path: Path) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor name -> file name of its shard.

    Raises:
        CheckpointError: the index cannot be read, or names a shard outside its own directory.
    """
    return _read_index(path)[0]


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    """The index, and the save that it belongs to, if it says so."""
    content = read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f]{1,200}\.safetensors", shard):
            raise CheckpointError(
                f"{path} puts tensor {name[:80]!r} into {str(shard)[:80]!r}; a shard is a .safetensors file beside the index"
            )
    save = metadata.get(SAVE_ID) if isinstance(metadata, dict) else None
    return weight_map, save if isinstance(save, str) else None


def find_weights(directory: Path) -> Weights:
    """The weights in `directory`: `model.safetensors`, else the shards of `model.safetensors.index.json`.

    Headers are read and checked, the index against them; no tensor is read. Hold the directory with `files.reading` until the
    tensors are read too, where somebody may be saving into it.

    Raises:
        CheckpointError: no weights, a missing shard, a tensor that is not where the index says, shards of different saves, a
            damaged file, or a file in another framework's layout.
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
            f"{directory} holds {WEIGHTS_INDEX_NAME} and shards of different saves, which are different models: copy or save all "
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
    """The error for a directory or repository `where` that has none of the files `wanted`, but those `present`.

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


def some(names: Sequence[str], limit: int = _LISTED) -> str:
    """The first few of some names, and how many there are besides, for a message."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


# -- comparing ------------------------------------------------------------------------------------------------------------


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: object,
    model: str = "the model",
    prefix: str = "",
) -> list[str]:
    """The names to load, in the order of `expected`, if the tensors of a file are those of the model.

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
    """Training frameworks put prefixes before names: `module.`, `_orig_mod.`, `model.`."""
    for name in missing[:1]:
        for other in found:
            if other.endswith(f".{name}"):
                return (
                    f"Names have the prefix {other.removesuffix(name)!r} of a training framework: `groupvit convert SOURCE DIRECTORY` "
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


# -- writing --------------------------------------------------------------------------------------------------------------


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
    """Bytes of 1000, "200MB", "5GB", "1.5GiB". Raises `InputError` for anything else."""
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
    """The JSON text of an index, such as `model.safetensors.index.json`; `total_size` is the bytes of all tensors."""
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    metadata: dict[str, Any] = {"total_size": total_size} | ({} if save_id is None else {SAVE_ID: save_id})
    return json_text({"metadata": metadata, "weight_map": weight_map})


def array_info(shape: Iterable[int], dtype: str) -> TensorInfo:
    """How a tensor of NumPy's dtype name ("float32", "bfloat16", "int64", ...) is stored. Raises `InputError` for others."""
    if dtype not in _STORED_AS:
        raise InputError(f"a tensor of dtype {dtype} cannot be saved; {', '.join(_STORED_AS)} can")
    return TensorInfo(tuple(shape), _STORED_AS[dtype])


def stored_bytes(info: TensorInfo) -> int:
    """How many bytes a tensor takes in a file."""
    return math.prod(info.shape) * _BITS[info.dtype] // 8


def write_arrays(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = PYTORCH_METADATA,
) -> None:
    """Writes a safetensors file with one tensor in memory at a time; the library needs all, twice.

    Args:
        tensors: name -> shape and dtype.
        value: name -> the array, of that shape and dtype or as its bytes.
        metadata: the file's; by it transformers knows whose layout the tensors have.
    """
    # Widest dtypes first, so that every tensor starts at a multiple of its element's size; then by name. As the library does.
    widest_first = list(_ARRAY_DTYPES)
    order = sorted(tensors, key=lambda name: (widest_first.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + stored_bytes(tensors[name])
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = bytes_of(value(name))
            assert content.nbytes == stored_bytes(tensors[name]), name
            file.write(content.data)


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array as they are stored."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def is_weights_file(name: str) -> bool:
    """Whether a file of this name is part of a checkpoint's weights."""
    return WEIGHTS_FILE.fullmatch(name) is not None
