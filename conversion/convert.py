"""From any checkpoint to any format.

Between the two stands the canonical view, `Checkpoint`: names, shapes and dtypes as in `groupvit_common.parameters.manifest`, each value
read, turned and checked when it is asked for. What is written appears under its name when it is complete, not before.
"""

import json
import math
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from conversion.formats import Format, Info, Source, open_source
from conversion.names import EXTRA, Entry, Naming, account, default_value, entries, from_parts, to_parts
from conversion.nvlabs import settings
from conversion.pickles import numpy_dtype
from conversion.torch_writer import dictionary, plain, write_torch_file
from groupvit_common import hub
from groupvit_common.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    array_info,
    index_text,
    plan_shards,
    stored_bytes,
    write_arrays,
    write_text,
)
from groupvit_common.config import GroupViTConfig
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.pretrained import wanted_dtype

Target = Literal["native", "transformers", "transformers-tf", "pytorch", "nvlabs", "keras", "savedmodel"]
TARGETS: tuple[Target, ...] = get_args(Target)

# What goes with the weights from directory to directory: how texts and pictures become numbers.
_COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?<!\.bin)(?<!\.h5)(?<!\.pth)(?<!\.keras)(?<!\.safetensors)")
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass
class Checkpoint:
    """A source in canonical names. `filled` are tensors that it lacks and that got a default value."""

    source: Source
    config: GroupViTConfig
    tensors: dict[str, Info]
    filled: list[str]
    _entries: dict[str, Entry]
    _last: tuple[str, dict[str, np.ndarray]] = ("", {})

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most elements."""
        counts = dict.fromkeys(_FLOATS, 0)
        for shape, dtype in self.tensors.values():
            if dtype in counts:
                counts[dtype] += math.prod(shape)
        return max(counts, key=lambda name: counts[name])

    def value(self, name: str) -> np.ndarray:
        """A tensor by its canonical name, of the shape and dtype in `tensors`.

        Raises:
            CheckpointError: it cannot be read, or holds values that are no numbers, or are too large for its dtype.
        """
        entry = self._entries[name]
        dtype = self.tensors[name].dtype
        if name in self.filled:
            return default_value(entry.parameters[0]).astype(numpy_dtype(dtype))
        # The three parts of a fused tensor are asked for one after the other.
        if self._last[0] != entry.foreign:
            stored = self.source.value(entry.foreign)
            if dtype in _FLOATS and not np.isfinite(stored).all():
                raise CheckpointError(f"{self.source.path} holds NaN or infinite values in {entry.foreign}")
            self._last = entry.foreign, dict(to_parts(entry, stored))
        array = cast(self._last[1][name], dtype)
        if len(entry.parameters) == 1:
            self._last = "", {}
        if dtype in _FLOATS and not np.isfinite(array).all():
            raise CheckpointError(f"{self.source.path} holds values in {entry.foreign} that are too large for {dtype}")
        return array


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """As PyTorch rounds: from float64 to the 16-bit types by way of float32; too large becomes infinite."""
    with np.errstate(over="ignore"):
        if dtype in ("float16", "bfloat16") and array.dtype == np.float64:
            array = array.astype(np.float32)
        return array.astype(numpy_dtype(dtype), copy=False)


def read(
    source: str | Path | Source,
    *,
    config: GroupViTConfig | str | Path | None = None,
    dtype: str | None = None,
    allow_missing: Iterable[str] = (),
) -> Checkpoint:
    """A checkpoint of any format in canonical names, every tensor accounted for; values are read when asked for.

    Args:
        source: a file, a directory, "org/name" on the hub, or what `open_source` gave.
        config: instead of the source's own: a configuration, or the directory or file of one.
        dtype: of the floating-point tensors; None: as stored.
        allow_missing: shell patterns of tensors that may be missing (they become 0, norms' weights 1) or left over.

    Raises:
        CheckpointError: the source cannot be found, read or understood, or its tensors are not those of its configuration.
        InputError: an argument that cannot be used.
    """
    wanted = None if dtype is None else wanted_dtype(dtype)
    if dtype is not None and wanted is None:
        raise InputError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype!r}")
    given = GroupViTConfig.from_pretrained(config) if isinstance(config, str | Path) else config
    opened = source if isinstance(source, Source) else open_source(_local(source), given)
    known: GroupViTConfig | None = given if given is not None else opened.config
    if known is None:
        raise CheckpointError(
            f"{opened.path} has no {CONFIG_NAME} beside it, and nothing in it says one: pass a configuration"
        )
    extra = EXTRA in opened.tensors
    present, absent = account(
        entries(opened.naming, known, extra),
        {name: info.shape for name, info in opened.tensors.items()},
        source=opened.path,
        allow_missing=allow_missing,
    )
    by_name = {parameter.name: entry for entry in (*present, *absent) for parameter in entry.parameters}
    tensors, filled = {}, []
    main = next((opened.tensors[e.foreign].dtype for e in present if e.parameters[0].kind != "counter"), "float32")
    # In the order of the manifest, whatever the file's is.
    for entry in entries("canonical", known, extra):
        (parameter,) = entry.parameters
        foreign = by_name[parameter.name].foreign
        if foreign in opened.tensors:
            stored = opened.tensors[foreign].dtype
        else:
            # A part of a fused tensor stands alone here, because nothing is to be split.
            by_name[parameter.name] = entry
            filled.append(parameter.name)
            stored = main
        if parameter.kind == "counter":
            if "int" not in stored and parameter.name not in filled:
                raise CheckpointError(f"{opened.path} holds {foreign} as {stored}, expected integers")
            stored = "int64"
        elif stored not in _FLOATS:
            raise CheckpointError(f"{opened.path} holds {foreign} as {stored}, expected floating-point numbers")
        else:
            stored = wanted or stored
        tensors[parameter.name] = Info(parameter.shape, stored)
    return Checkpoint(opened, known, tensors, filled, by_name)


def _local(source: str | Path) -> Path:
    path = Path(source)
    if path.exists() or path.is_symlink() or not _REPOSITORY.fullmatch(str(source)):
        return path
    return hub.resolve(str(source), patterns=(CONFIG_NAME, WEIGHTS_NAME, *_COMPANIONS), required=(WEIGHTS_NAME,))


# -- writing --------------------------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    """What a conversion did: the formats, the files written, and what is worth knowing about it."""

    source: Path
    source_format: Format
    destination: Path
    target: Target
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    to: Target = "native",
    *,
    config: GroupViTConfig | str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_missing: Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the checkpoint `source` as another format.

    Args:
        source, config, dtype, allow_missing: see `read`.
        destination: a directory for "native" (and "transformers", which is the same), "transformers-tf", "pytorch" and
            "savedmodel"; a file for "nvlabs" (.pth) and "keras" (.keras or .weights.h5).
        to: one of `TARGETS`.
        overwrite: whether what is at the destination may be replaced. It is until the new one is complete.
        max_shard_size: of "native": bytes, or "200MB".
        progress: called with the bytes written so far and those to be written.

    Raises:
        CheckpointError: see `read`; or the destination cannot be written, or is there and `overwrite` is not given.
        InputError: an argument that cannot be used, or a model that the target format does not have.
    """
    if to not in TARGETS:
        raise InputError(f"a checkpoint is converted to one of {', '.join(TARGETS)}, got {to!r}")
    destination = Path(destination)
    if to in _SUFFIXES and not destination.name.endswith(_SUFFIXES[to]):
        raise InputError(
            f"{to} is a file: give it a name that ends in {' or '.join(_SUFFIXES[to])}, not {destination.name!r}"
        )
    if not overwrite and (destination.is_symlink() or destination.exists()):
        raise CheckpointError(f"{destination} is there already; pass overwrite (--overwrite) to replace it")
    if destination.exists() and destination.is_dir() == (to in _SUFFIXES):
        kinds = ("a file", "a directory") if to in _SUFFIXES else ("a directory", "a file")
        raise InputError(f"{to} is {kinds[0]}, and {destination} is {kinds[1]}")
    checkpoint = read(source, config=config, dtype=dtype, allow_missing=allow_missing)
    if any(destination.resolve() in (file.resolve(), *file.resolve().parents) for file in checkpoint.source.files):
        raise InputError(f"{destination} holds the source itself; write to another place")
    job = _Job(checkpoint, to, max_shard_size, progress)
    new = destination.parent / f".{destination.name}.{secrets.token_hex(4)}"
    if to == "keras":  # its suffix says which of the two Keras files it is
        new = new.with_name(
            new.name + next(suffix for suffix in _SUFFIXES["keras"] if destination.name.endswith(suffix))
        )
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[to](job, new)
        _put(new, destination)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(new)
    files = sorted(p for p in destination.rglob("*") if p.is_file()) if destination.is_dir() else [destination]
    return Conversion(
        checkpoint.source.path, checkpoint.source.format, destination, to, files, [*_notes(checkpoint), *job.notes]
    )


def _put(new: Path, destination: Path) -> None:
    """Gives what is complete its name; what had it before is lost only then."""
    if not destination.is_dir():
        new.replace(destination)
        return
    old = new.with_name(f"{new.name}.old")
    destination.rename(old)
    try:
        new.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _notes(checkpoint: Checkpoint) -> list[str]:
    counters = [name for name in checkpoint.filled if name.endswith(".num_batches_tracked")]
    others = [name for name in checkpoint.filled if name not in counters]
    notes = [f"{name} was missing and has a default value now" for name in others]
    if counters:
        notes.append("the source counts no batches of its batch norms: the counters are 0, which changes no output")
    return notes


class _Job:
    """One writing: the checkpoint, and how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Target,
        max_shard_size: int | str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.checkpoint, self.target, self.max_shard_size, self.progress = checkpoint, target, max_shard_size, progress
        self.notes: list[str] = []
        self.total = sum(math.prod(shape) * numpy_dtype(dtype).itemsize for shape, dtype in checkpoint.tensors.values())
        self.done = 0

    def value(self, name: str) -> np.ndarray:
        array = self.checkpoint.value(name)
        self.done += array.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
        return array

    def entries(self, naming: Naming) -> list[Entry]:
        return entries(naming, self.checkpoint.config, EXTRA in self.checkpoint.tensors)

    def stored(self, entry: Entry) -> str:
        """The dtype of an entry's foreign tensor."""
        return self.checkpoint.tensors[entry.parameters[0].name].dtype

    def config_text(self, **settings: Any) -> str:
        """`config.json` with what transformers wants to know besides: the class and the dtype."""
        written = self.checkpoint.config.to_dict()
        # transformers 5 writes `dtype` instead of `torch_dtype`, and reads both: two that disagree must not meet.
        written.pop("dtype", None)
        written |= {"architectures": ["GroupViTModel"], "torch_dtype": self.checkpoint.dtype, **settings}
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    def companions(self, directory: Path) -> None:
        beside = self.checkpoint.source.files[0].parent
        for name in _COMPANIONS:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, directory / name)


def _write_native(job: _Job, directory: Path) -> None:
    directory.mkdir()
    infos = {name: array_info(*info) for name, info in job.checkpoint.tensors.items()}
    sizes = {name: stored_bytes(info) for name, info in infos.items()}
    shards = plan_shards(sizes, job.max_shard_size)
    for shard in shards:
        write_arrays(directory / shard.file_name, {name: infos[name] for name in shard.tensors}, job.value)
    if len(shards) > 1:
        write_text(directory / WEIGHTS_INDEX_NAME, index_text(shards, sum(sizes.values())))
    write_text(directory / CONFIG_NAME, job.config_text())
    job.companions(directory)


def _write_pytorch(job: _Job, directory: Path) -> None:
    directory.mkdir()
    infos = {name: (info.shape, info.dtype) for name, info in job.checkpoint.tensors.items()}
    write_torch_file(directory / "pytorch_model.bin", lambda state: state, infos, job.value)
    write_text(directory / CONFIG_NAME, job.config_text())
    job.companions(directory)


def _write_nvlabs(job: _Job, path: Path) -> None:
    written = settings(job.checkpoint.config)
    by_name = {entry.foreign: entry for entry in job.entries("nvlabs")}
    infos = {name: (entry.shape, job.stored(entry)) for name, entry in by_name.items()}

    def content(state: bytes) -> bytes:
        return dictionary({"model": state, "config": plain(written)})

    write_torch_file(path, content, infos, lambda name: from_parts(by_name[name], job.value))


def _write_transformers_tf(job: _Job, directory: Path) -> None:
    directory.mkdir()
    instance = "tf_group_vi_t_model"
    with _hdf5(directory / "tf_model.h5") as file:
        file.attrs["layer_names"] = ["groupvit"]
        file.attrs["backend"] = "tensorflow"
        file.attrs["keras_version"] = "2.18.0"  # whose format this is
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
        group = file.create_group("groupvit")
        names = []
        for entry in job.entries("transformers-tf"):
            array = from_parts(entry, job.value)
            if entry.parameters[0].kind == "counter" or entry.foreign == EXTRA:
                file.attrs[entry.foreign] = array
                continue
            if array.dtype.name == "bfloat16":
                raise InputError("TensorFlow's files have no bfloat16: pass dtype float32 or float16")
            names.append(f"{instance}/groupvit/{entry.foreign}")
            group.create_dataset(names[-1], data=array)
        group.attrs["weight_names"] = names
    write_text(directory / CONFIG_NAME, job.config_text())
    job.companions(directory)


def _write_keras(job: _Job, path: Path) -> None:
    if path.name.endswith(".weights.h5"):
        _write_keras_weights(job, path)
        return
    weights = path.with_name(f"{path.name}.weights.h5")
    try:
        _write_keras_weights(job, weights)
        # What Keras's own `save` writes for a GroupViTModel that is neither compiled nor frozen.
        policy = {"name": job.checkpoint.dtype}
        content = {
            "module": "groupvit_tf.model",
            "class_name": "GroupViTModel",
            "config": {
                "config": job.checkpoint.config.to_dict(),
                "name": "group_vi_t_model",
                "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": policy, "registered_name": None},
                "trainable": {"": True},
            },
            "registered_name": "groupvit>GroupViTModel",
            "build_config": {"shapes_dict": {}},
            "compile_config": {},
        }
        metadata = {"keras_version": "3.12.0", "date_saved": time.strftime("%Y-%m-%d@%H:%M:%S")}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps(metadata))
            archive.writestr("config.json", json.dumps(content))
            archive.write(weights, "model.weights.h5")
    finally:
        weights.unlink(missing_ok=True)


def _write_keras_weights(job: _Job, path: Path) -> None:
    with _hdf5(path) as file:
        for entry in job.entries("keras"):
            array = from_parts(entry, job.value)
            if entry.foreign == EXTRA:
                file.attrs[EXTRA] = array
            elif entry.parameters[0].kind == "counter":
                if int(array) > np.iinfo(np.int32).max:
                    raise InputError(f"Keras counts batches in int32, and {entry.parameters[0].name} is {int(array)}")
                file.create_dataset(entry.foreign, data=array.astype(np.int32))
            elif array.dtype.name == "bfloat16":
                # HDF5 has no such numbers; Keras writes their bytes, with a note.
                raw = np.ascontiguousarray(array).reshape(-1).view("V2").reshape(array.shape)
                file.create_dataset(entry.foreign, data=raw).attrs["dtype"] = "bfloat16"
            else:
                file.create_dataset(entry.foreign, data=array)


def _hdf5(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError("writing TensorFlow's and Keras's files takes h5py: pip install h5py") from error
    return h5py.File(path, "w")


def _write_saved_model(job: _Job, directory: Path) -> None:
    try:
        from groupvit_tf import GroupViTModel
    except ImportError as error:
        raise InputError("a SavedModel is written by TensorFlow: pip install 'groupvit[tf]'") from error
    native = directory.with_name(f"{directory.name}.native")
    try:
        _write_native(job, native)
        GroupViTModel.from_pretrained(native).export(directory)
    finally:
        _remove(native)


_SUFFIXES: dict[Target, tuple[str, ...]] = {"nvlabs": (".pth",), "keras": (".keras", ".weights.h5")}
_WRITERS: dict[Target, Callable[[_Job, Path], None]] = {
    "native": _write_native,
    "transformers": _write_native,
    "transformers-tf": _write_transformers_tf,
    "pytorch": _write_pytorch,
    "nvlabs": _write_nvlabs,
    "keras": _write_keras,
    "savedmodel": _write_saved_model,
}
