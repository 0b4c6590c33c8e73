"""From any checkpoint to any format.

Between the two stands the canonical view, `Checkpoint`: names, shapes and dtypes as in `groupvit_common.model.parameters.manifest`, each value
read, turned and checked when it is asked for. What is written appears under its name when it is complete, not before.
"""

import json
import math
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conversion import Target
from conversion.checkpoint import COMPANIONS, Checkpoint, Values, read
from conversion.destination import SUFFIXES, check_destination, remove, replacement, target_of
from conversion.formats import CONFIG_ATTRIBUTE, Format, scalar_text
from conversion.names import EXTRA, Entry, Naming, entries, from_parts
from conversion.nvlabs import settings
from conversion.report import REPORT_NAME, report_path, report_text
from conversion.torch_writer import dictionary, plain, write_torch_file
from conversion.verify import Verification
from conversion.verify import verify as compare
from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME, index_text, parse_size, plan_shards
from groupvit_common.checkpoints.dtypes import numpy_dtype
from groupvit_common.checkpoints.safetensors_file import array_info, stored_bytes, write_arrays
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig, checkpoint_config_text
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.storage.names import list_files
from groupvit_common.storage.saving import write_text


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        files: those written; report: `conversion_report.json`, which is one of them where the result is a directory.
        verification: None if there was none.
        address: of the commit on the hub, if it was sent there.
        notes: what is worth knowing.
    """

    source: Path
    source_format: Format
    destination: Path
    target: Target
    files: list[Path]
    report: Path
    verification: Verification | None = None
    address: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def format(self) -> Format | Literal["savedmodel"]:
        """The result's, as in `conversion.formats`."""
        if self.target in ("native", "transformers"):
            return "safetensors"
        if self.target == "keras" and self.destination.name.endswith(".weights.h5"):
            return "keras-weights"
        return self.target  # type: ignore[return-value]  # the others are called alike


def convert(
    source: str | Path,
    destination: str | Path,
    to: Target | None = None,
    *,
    config: GroupViTConfig | str | Path | None = None,
    revision: str | None = None,
    key: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    max_shard_size: int | str | None = None,
    processor: str | Path | None = None,
    push: str | None = None,
    overwrite: bool = False,
    allow_missing: Iterable[str] = (),
    opened: Callable[[Checkpoint], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the checkpoint `source` as another format, with a report (`conversion_report.json`).

    Args:
        source, config, revision, key, dtype, allow_missing: see `conversion.checkpoint.read`.
        destination: a directory for "native" (and "transformers", which is the same), "transformers-tf",
            "transformers-tf-safetensors", "pytorch" and "savedmodel"; a file for "nvlabs" (.pth) and "keras" (.keras or
            .weights.h5).
        to: one of `TARGETS`; None: what the destination's name says by its ending, a directory ("native") where it has none.
        verify: compare the result with the source before it gets its name; see `conversion.verify.verify`. One that is not the
            same model is an error, and is not kept.
        max_shard_size: of the formats of transformers: bytes, or "200MB"; 5 GB if None.
        processor: the directory, or "org/name" on the hub, whose tokenizer and image processor go along, instead of those
            beside the source. Only directories hold them.
        push: "org/name" on the hub, to which the result is sent too.
        overwrite: whether what is at the destination may be replaced. It is until the new one is complete.
        opened: called with the source once it is known what it is.
        progress: called with the bytes written so far and those to be written.

    Raises:
        CheckpointError: see `read`; or the destination cannot be written, or is there and `overwrite` is not given; or the result
            is not the same model; or it cannot be sent to the hub.
        InputError: an argument that cannot be used, or a model that the target format does not have.
    """
    by_ending, to = to is None, target_of(destination, to)
    destination, allow_missing, is_file = Path(destination), list(allow_missing), to in SUFFIXES
    if max_shard_size is not None:
        parse_size(max_shard_size)
        if is_file or to == "savedmodel":
            raise InputError(f"{to} is never in shards: leave max_shard_size (--max-shard-size) out")
    if to == "savedmodel" and dtype not in (None, "float32"):
        raise InputError(f"a SavedModel computes in float32: leave dtype (--dtype) {dtype} out")
    if processor is not None and (is_file or to == "savedmodel"):
        raise InputError(f"{to} has no place for a tokenizer and an image processor: leave processor (--processor) out")
    check_destination(destination, is_file=is_file, overwrite=overwrite, to=to)
    checkpoint = read(source, config=config, revision=revision, key=key, dtype=dtype, allow_missing=allow_missing)
    if any(destination.resolve() in (file.resolve(), *file.resolve().parents) for file in checkpoint.source.files):
        raise InputError(f"{destination} holds the source itself; write to another place")
    if opened is not None:
        opened(checkpoint)
    result = Conversion(checkpoint.source.path, checkpoint.source.format, destination, to, [], destination)
    result.notes = _notes(checkpoint)
    companions: list[Path] = []
    if not is_file and to != "savedmodel":
        companions, note = _companions(checkpoint, processor)
        result.notes.append(note)
    job = _Job(checkpoint, to, "5GB" if max_shard_size is None else max_shard_size, companions, progress)
    # Which of the two Keras files it is goes by the suffix.
    suffix = next((end for end in SUFFIXES.get(to, ()) if destination.name.endswith(end)), "")
    with replacement(destination, suffix) as new:
        try:
            _WRITERS[to](job, new)
        except InputError as error:
            if not (by_ending and is_file):
                raise
            raise InputError(
                f"{error}; {destination.name} asks for that format by its ending: name a directory for safetensors"
            ) from error
        if verify:
            result.verification = _verified(checkpoint, new, destination, to, allow_missing)
        text = report_text(checkpoint, new, destination, to, result.verification, result.notes)
        if not is_file:
            write_text(new / REPORT_NAME, text)
    result.report = report_path(destination) if is_file else destination / REPORT_NAME
    if is_file:
        try:
            write_text(result.report, text)
        except OSError as error:
            raise CheckpointError(
                f"{destination} is complete, but {result.report} cannot be written: {error}"
            ) from error
        result.files = [destination]
    else:
        result.files = [destination / name for name in list_files(destination, folders=True)]
    if push is not None:
        result.address = _push(result, push)
    return result


def _verified(
    checkpoint: Checkpoint, new: Path, destination: Path, to: Target, allow_missing: Sequence[str]
) -> Verification:
    # As stored: what another dtype does by itself is told.
    before = read(checkpoint.source, config=checkpoint.config, allow_missing=allow_missing)
    # With the configuration that was written, not the one that is known.
    verification = compare(before, new)
    verification.b = str(destination)
    verification.notes = [note.replace(str(new), str(destination)) for note in verification.notes]
    if not verification.passed:
        raise CheckpointError(
            "the result is not the same model as its source, and was not kept (without verification, --no-verify, it is): "
            + "; ".join(line.strip() for line in verification.lines())
        )
    return verification


def _companions(checkpoint: Checkpoint, processor: str | Path | None) -> tuple[list[Path], str]:
    """The files of the tokenizer and the image processor that go along, and a note about them."""
    directory = checkpoint.source.files[0].parent
    if processor is not None:
        directory = hub.resolve(processor, patterns=COMPANIONS)
    found = [directory / name for name in COMPANIONS if (directory / name).is_file()]
    if not found:
        return [], (
            "there is no tokenizer and no image processor beside the source, which words and photos take: pass processor "
            "(--processor), a directory or a name on the hub"
        )
    note = f"with it: {', '.join(path.name for path in found)}"
    try:
        words, known = (
            len(GroupViTProcessor.from_pretrained(directory).tokenizer),
            checkpoint.config.text_config.vocab_size,
        )
        if words > known:
            raise InputError(f"the tokenizer in {directory} has {words} tokens, and the model knows {known}")
    except (CheckpointError, InputError) as error:
        if processor is not None:
            raise
        note += f", which cannot be used as they are: {error}"
    return found, note


def _push(result: Conversion, repository: str) -> str:
    """Sends the result to the hub; returns the address of the commit."""
    message = f"Upload {result.target} weights, converted from {result.source_format}"
    try:
        if result.destination.is_dir():
            return hub.push(result.destination, repository, commit_message=message, folders=True)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / result.destination.name).symlink_to(result.destination.resolve())
            (Path(folder) / REPORT_NAME).symlink_to(result.report.resolve())
            return hub.push(folder, repository, commit_message=message)
    except CheckpointError as error:
        raise CheckpointError(f"{result.destination} is complete, but {error}") from error


def _notes(checkpoint: Checkpoint) -> list[str]:
    counters = [name for name in checkpoint.filled if name.endswith(".num_batches_tracked")]
    others = [name for name in checkpoint.filled if name not in counters]
    notes = [*checkpoint.source.choice.notes]
    notes += [f"{name} was missing and has a default value now" for name in others]
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
        companions: Sequence[Path],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.checkpoint, self.target, self.max_shard_size, self.progress = checkpoint, target, max_shard_size, progress
        self.companions = companions
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

    def size(self, entry: Entry) -> int:
        """The bytes of an entry's foreign tensor."""
        return math.prod(entry.shape) * numpy_dtype(self.stored(entry)).itemsize

    def config_text(self, **settings: Any) -> str:
        return checkpoint_config_text(self.checkpoint.config, "GroupViTModel", self.checkpoint.dtype, **settings)


def _write_sharded(
    job: _Job,
    directory: Path,
    weights_name: str,
    sizes: Mapping[str, int],
    write: Callable[[Path, list[str]], None],
    full_name: Callable[[str], str] = str,
) -> None:
    """Weights in as many files as they need, an index if these are several, the configuration and what belongs to it.

    Args:
        sizes: name -> bytes; write: writes the tensors of these names; full_name: what the index calls a tensor.
    """  # fmt: skip
    directory.mkdir()
    shards = plan_shards(sizes, job.max_shard_size, weights_name)
    for shard in shards:
        write(directory / shard.file_name, shard.tensors)
    if len(shards) > 1:
        named = [shard._replace(tensors=[full_name(name) for name in shard.tensors]) for shard in shards]
        write_text(directory / f"{weights_name}.index.json", index_text(named, sum(sizes.values())))
    write_text(directory / CONFIG_NAME, job.config_text())
    for path in job.companions:
        shutil.copyfile(path, directory / path.name)


def _write_native(job: _Job, directory: Path) -> None:
    infos = {name: array_info(*info) for name, info in job.checkpoint.tensors.items()}
    sizes = {name: stored_bytes(info) for name, info in infos.items()}
    _write_sharded(
        job, directory, WEIGHTS_NAME, sizes,
        lambda path, names: write_arrays(path, {name: infos[name] for name in names}, job.value),
    )  # fmt: skip


def _write_pytorch(job: _Job, directory: Path) -> None:
    infos = {name: (info.shape, info.dtype) for name, info in job.checkpoint.tensors.items()}
    sizes = {name: math.prod(shape) * numpy_dtype(dtype).itemsize for name, (shape, dtype) in infos.items()}

    def write(path: Path, names: list[str]) -> None:
        write_torch_file(path, lambda state: state, {name: infos[name] for name in names}, job.value)

    _write_sharded(job, directory, "pytorch_model.bin", sizes, write)


def _write_nvlabs(job: _Job, path: Path) -> None:
    written = settings(job.checkpoint.config)
    by_name = {entry.foreign: entry for entry in job.entries("nvlabs")}
    infos = {name: (entry.shape, job.stored(entry)) for name, entry in by_name.items()}

    def content(state: bytes) -> bytes:
        return dictionary({"model": state, "config": plain(written)})

    write_torch_file(path, content, infos, lambda name: from_parts(by_name[name], job.value))


# The name that TFGroupViTModel gives itself, and that of the layer which holds all.
_TF_MODEL, _TF_LAYER = "tf_group_vi_t_model", "groupvit"


def _tensorflow(job: _Job) -> tuple[dict[str, Entry], dict[str, np.ndarray]]:
    """The tensors by their names within the layer, and those that TensorFlow's files have no place for, with their values."""
    found = job.entries("transformers-tf")
    # The training's temperature is no weight of transformers' model.
    others = [entry for entry in found if entry.parameters[0].kind == "counter" or entry.foreign == EXTRA]
    weights = {f"{_TF_LAYER}/{entry.foreign}": entry for entry in found if entry not in others}
    return weights, {entry.foreign: from_parts(entry, job.value) for entry in others}


def _write_transformers_tf(job: _Job, directory: Path) -> None:
    weights, others = _tensorflow(job)
    last = list(weights)[-1]
    if any(job.stored(entry) == "bfloat16" for entry in weights.values()):
        raise InputError("TensorFlow's .h5 files have no bfloat16: pass dtype float32 or float16")
    sizes = {name: job.size(entry) for name, entry in weights.items()}

    def write(path: Path, names: list[str]) -> None:
        whole = len(names) == len(weights)
        with _hdf5(path) as file:
            if whole:
                file.attrs["backend"] = "tensorflow"
                file.attrs["keras_version"] = "2.18.0"  # whose format this is
                file.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
                file.attrs["layer_names"] = [_TF_LAYER]
                group = file.create_group(_TF_LAYER)
                _write_names(group, "weight_names", [f"{_TF_MODEL}/{name}" for name in names])
            else:
                _write_names(file, "layer_names", names)
            for name in names:
                array = from_parts(weights[name], job.value)
                (group if whole else file).create_dataset(f"{_TF_MODEL}/{name}" if whole else name, data=array)
            if last in names:
                for name, value in others.items():
                    file.attrs[name] = scalar_text(value)

    _write_sharded(job, directory, "tf_model.h5", sizes, write, lambda name: f"{_TF_MODEL}/{name}")


# An attribute holds up to 64 KiB less its header; Keras spreads longer lists over attributes with numbers.
_MAX_ATTRIBUTE = 64_512


def _write_names(group: Any, attribute: str, names: list[str]) -> None:
    count = -(-sum(map(len, names)) // _MAX_ATTRIBUTE)
    for index in range(count):
        part = names[index * len(names) // count : (index + 1) * len(names) // count]
        group.attrs[f"{attribute}{index}" if count > 1 else attribute] = part


def _write_transformers_tf_safetensors(job: _Job, directory: Path) -> None:
    weights, others = _tensorflow(job)
    infos = {name: array_info(entry.shape, job.stored(entry)) for name, entry in weights.items()}
    last = list(weights)[-1]

    def write(path: Path, names: list[str]) -> None:
        metadata = {"format": "tf"}
        if last in names:
            metadata |= {name: scalar_text(value) for name, value in others.items()}
        tensors = {name: infos[name] for name in names}
        write_arrays(path, tensors, lambda name: from_parts(weights[name], job.value), metadata)

    _write_sharded(
        job, directory, WEIGHTS_NAME, {name: stored_bytes(info) for name, info in infos.items()}, write,
        lambda name: f"{_TF_MODEL}/{name}",
    )  # fmt: skip


def _write_keras(job: _Job, path: Path) -> None:
    if path.name.endswith(".weights.h5"):
        _write_keras_weights(job, path)
        return
    types = sorted({dtype for _, dtype in job.checkpoint.tensors.values() if "float" in dtype})
    if len(types) > 1:
        raise InputError(
            f"a .keras file has one type for all its numbers, and there are {', '.join(types)}: pass dtype (--dtype)"
        )
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
        remove(weights)


def _write_keras_weights(job: _Job, path: Path) -> None:
    with _hdf5(path) as file:
        # Keras's own has no configuration, and does not mind this one.
        file.attrs[CONFIG_ATTRIBUTE] = json.dumps(job.checkpoint.config.to_dict())
        for entry in job.entries("keras"):
            array = from_parts(entry, job.value)
            if entry.foreign == EXTRA:
                file.attrs[EXTRA] = scalar_text(array)
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
    arrays = Values(job.checkpoint.tensors, job.value)
    model = GroupViTModel.from_arrays(job.checkpoint.config, arrays, dtype="float32")
    try:
        model.export(directory)
    except Exception as error:
        # TensorFlow's own, for a full disk.
        if type(error).__name__ != "ResourceExhaustedError":
            raise
        raise CheckpointError(f"a SavedModel cannot be written: {str(error).splitlines()[0]}") from error


_WRITERS: dict[Target, Callable[[_Job, Path], None]] = {
    "native": _write_native,
    "transformers": _write_native,
    "transformers-tf": _write_transformers_tf,
    "transformers-tf-safetensors": _write_transformers_tf_safetensors,
    "pytorch": _write_pytorch,
    "nvlabs": _write_nvlabs,
    "keras": _write_keras,
    "savedmodel": _write_saved_model,
}
