"""Safetensors in PyTorch's layout: `model.safetensors`, or shards, of this project and of transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.names import CANONICAL
from conversion.source import Files, Info, Opened, Piece, is_scalar, parse_scalar
from conversion.writing import Job, write_sharded
from groupvit_common.checkpoints.directory import WEIGHTS_NAME
from groupvit_common.checkpoints.dtypes import STORED_DTYPES, numpy_dtype
from groupvit_common.checkpoints.safetensors_file import Header, array_info, read_header, write_arrays
from groupvit_common.errors import CheckpointError

NAMING = CANONICAL

_DTYPES = {**STORED_DTYPES, "BOOL": "bool"}


def detect(files: Files) -> bool:
    """Returns whether files of safetensors have PyTorch's layout."""
    return not has_tensorflow_layout(files)


def read(files: Files) -> Opened:
    """Reads the headers of files in PyTorch's layout."""
    return Opened(read_pieces(files))


def write(job: Job, directory: Path) -> None:
    """Writes a directory with `model.safetensors` or shards."""
    infos = {name: array_info(*info) for name, info in job.checkpoint.tensors.items()}
    write_sharded(
        job, directory, WEIGHTS_NAME, {name: info.nbytes for name, info in job.checkpoint.tensors.items()},
        lambda path, names: write_arrays(path, {name: infos[name] for name in names}, job.value),
    )  # fmt: skip


def program_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    """Returns the values as the safetensors library reads them."""
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in checkpoint.source.files]
    homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    stored = checkpoint.source.choice.names

    def value(name: str) -> np.ndarray:
        if stored.get(name) not in homes:
            return checkpoint.value(name)
        return tensor_array(homes[stored[name]].get_tensor(stored[name]))

    return value


def tensor_array(tensor: Any) -> np.ndarray:
    """Returns a PyTorch tensor as an array; floats as float64, which holds all of them."""
    array: np.ndarray = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def has_tensorflow_layout(files: Files) -> bool:
    """Returns whether files of safetensors have TensorFlow's layout, by the metadata `format: tf`.

    Raises:
        CheckpointError: a file is damaged, or has Flax's layout.
    """
    layouts = {header.metadata.get("format") for header in files.once(_headers)}
    if "flax" in layouts:
        raise CheckpointError(f"{files.paths[0]} holds transformers' Flax layout, which GroupViT never had")
    return "tf" in layouts


def _headers(files: Files) -> list[Header]:
    return [read_header(path) for path in files.paths]


def read_pieces(files: Files, rename: Callable[[str], str] = str) -> list[Piece]:
    """Returns the tensors of files of safetensors. `rename`: name in the file -> foreign name."""
    return [_piece(path, header, rename) for path, header in zip(files.paths, files.once(_headers), strict=True)]


def _piece(file: Path, header: Header, rename: Callable[[str], str]) -> Piece:
    unread = next((name for name, info in header.tensors.items() if info.dtype not in _DTYPES), None)
    if unread is not None:
        raise CheckpointError(f"{file} holds {unread} as {header.tensors[unread].dtype}, a type that is not read here")
    tensors = {rename(name): Info(info.shape, _DTYPES[info.dtype]) for name, info in header.tensors.items()}
    starts = {rename(name): start for name, start in header.starts.items()}
    scalars = {name: parse_scalar(name, text, file) for name, text in header.metadata.items() if is_scalar(name)}
    tensors |= {name: Info((), scalar.dtype.name) for name, scalar in scalars.items()}
    return Piece(tensors, _reader(file, tensors, starts, scalars))


def _reader(
    file: Path, tensors: Mapping[str, Info], starts: Mapping[str, int], scalars: Mapping[str, np.ndarray]
) -> Callable[[str], np.ndarray]:
    def value(name: str) -> np.ndarray:
        if name in scalars:
            return scalars[name]
        info = tensors[name]
        try:
            with file.open("rb") as opened:
                opened.seek(starts[name])
                return np.fromfile(opened, numpy_dtype(info.dtype), info.elements).reshape(info.shape)
        # A file that became shorter than it was has too few values for their shape.
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    return value
