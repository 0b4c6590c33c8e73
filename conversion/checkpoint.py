"""A checkpoint of any format in canonical names.

Names, shapes and dtypes are as in `groupvit_common.model.parameters.manifest`, each value read, turned and checked when it is asked for.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion.formats import WEIGHTS, Info, Source, index_shards, open_source
from conversion.names import EXTRA, Entry, account, default_value, entries, to_parts
from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import FLOATS, cast, float_dtype, most_common_float, numpy_dtype
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest

# What goes with the weights from directory to directory: how texts and pictures become numbers.
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# "org/name", or "org/name/FILE"; "folder/x.pth" is a path.
_ON_HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+(?<!\.bin)(?<!\.h5)(?<!\.pth)(?<!\.pt)(?<!\.ckpt)(?<!\.keras)(?<!\.safetensors)(?<!\.json))"
    rf"(/(?P<file>([\w.-]+/)*({WEIGHTS.pattern})))?"
)


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
        return most_common_float((dtype, math.prod(shape)) for shape, dtype in self.tensors.values())

    def num_parameters(self) -> int:
        """How many numbers the parameters hold: without batch norms' statistics, as `num_parameters` of a model."""
        kinds = manifest(self.config)
        return sum(
            math.prod(info.shape)
            for name, info in self.tensors.items()
            if name in kinds and kinds[name].kind not in ("running_mean", "running_var", "counter")
        )

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
            if dtype in FLOATS and not np.isfinite(stored).all():
                raise CheckpointError(f"{self._file(entry)} holds NaN or infinite values in {entry.foreign}")
            self._last = entry.foreign, dict(to_parts(entry, stored))
        array = cast(self._last[1][name], dtype)
        if len(entry.parameters) == 1:
            self._last = "", {}
        if dtype in FLOATS and not np.isfinite(array).all():
            raise CheckpointError(f"{self._file(entry)} holds values in {entry.foreign} that are too large for {dtype}")
        return array

    def _file(self, entry: Entry) -> Path:
        return self.source.homes[entry.foreign]


class Values(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is asked for."""

    def __init__(self, names: Collection[str], value: Callable[[str], np.ndarray]) -> None:
        self._names, self._value = names, value

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._value(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_counts(config: GroupViTConfig, opened: Source) -> None:
    """Before every tensor that a configuration asks for is listed, which may be no end: a layer has tensors of its own."""
    layers = sum(config.vision_config.depths) + config.text_config.num_hidden_layers
    if layers > len(opened.tensors):
        raise CheckpointError(
            f"the configuration of {opened.path} asks for {layers} layers, and there are {len(opened.tensors)} tensors in it: they "
            "belong to different models"
        )


def read(
    source: str | Path | Source,
    *,
    config: GroupViTConfig | str | Path | None = None,
    dtype: str | None = None,
    allow_missing: Iterable[str] = (),
    revision: str | None = None,
    key: str | None = None,
) -> Checkpoint:
    """A checkpoint of any format in canonical names, every tensor accounted for; values are read when asked for.

    Args:
        source, revision: see `locate`; or what `open_source` gave.
        config: instead of the source's own: a configuration, or the directory or file of one.
        dtype: of the floating-point tensors; None: as stored.
        allow_missing: shell patterns of tensors that may be missing (they become 0, norms' weights 1) or left over.
        key: which model, of a file that holds several: "model_ema", "state_dict.teacher"; an error lists them. What is not this model's
            is left out.

    Raises:
        CheckpointError: the source cannot be found, read or understood, or its tensors are not those of its configuration.
        InputError: an argument that cannot be used.
    """
    wanted = None if dtype is None else float_dtype(dtype)
    if dtype is not None and wanted is None:
        raise InputError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype!r}")
    given = GroupViTConfig.from_pretrained(config) if isinstance(config, str | Path) else config
    opened = source if isinstance(source, Source) else open_source(locate(source, revision), given, key)
    known: GroupViTConfig | None = given if given is not None else opened.config
    if known is None:
        raise CheckpointError(
            f"{opened.path} has no {CONFIG_NAME} beside it, and nothing in it says one: pass a configuration (--config)"
        )
    _check_counts(known, opened)
    extra = EXTRA in opened.tensors
    present, absent = account(
        entries(opened.naming, known, extra),
        {name: info.shape for name, info in opened.tensors.items()},
        source=opened.path if len(opened.files) > 1 else opened.files[0],
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
                raise CheckpointError(f"{opened.homes[foreign]} holds {foreign} as {stored}, expected integers")
            stored = "int64"
        elif stored not in FLOATS:
            raise CheckpointError(
                f"{opened.homes[foreign]} holds {foreign} as {stored}, expected floating-point numbers"
            )
        else:
            stored = wanted or stored
        tensors[parameter.name] = Info(parameter.shape, stored)
    return Checkpoint(opened, known, tensors, filled, by_name)


# -- where a source is ----------------------------------------------------------------------------------------------------


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local path of a source: itself, or what was downloaded from the hub.

    Args:
        source: a file, a directory, "org/name" on the hub, or "org/name/FILE" for one file of it.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is no such repository or file, or the hub cannot be reached.
    """
    path, text = hub.bundled(source) or Path(source), str(source)
    if not text:
        raise InputError("the source has no name: give a file, a directory or 'org/name' on the hub")
    match = _ON_HUB.fullmatch(text)
    try:
        if path.exists() or path.is_symlink() or match is None or (match["file"] and path.parents[-2].exists()):
            return path
    except OSError as error:
        raise CheckpointError(f"{text[:80]!r} cannot be read: {error.strerror or error}") from error
    name, file = match["name"], match["file"]
    if not file:
        present = [name for name in hub.list_repository(name, revision=revision) if "/" not in name]
        file = _preferred(name, present)
    folder, _, file = file.rpartition("/")
    location = hub.HubLocation(revision=revision, subfolder=folder)
    directory = hub.resolve(name, patterns=(file, CONFIG_NAME, *COMPANIONS), required=(file,), location=location)
    if file.endswith(".index.json"):
        shards = [shard.name for shard in index_shards(directory / file, there=False)]
        hub.resolve(name, patterns=shards, required=shards, location=location)
    return directory / file


def _preferred(name: str, present: list[str]) -> str:
    """The file of a repository that is its weights: of the same weights in several formats, the safest and the quickest."""
    found = [file for file in present if WEIGHTS.fullmatch(file)]
    for preferred in ("model.safetensors", "pytorch_model.bin", "tf_model.h5"):
        for file in (preferred, f"{preferred}.index.json"):
            if file in found:
                return file
    if len(found) != 1:
        listed = ", ".join(found or present[:12]) or "no files"
        raise CheckpointError(
            f"{name!r} on the hub holds {'no checkpoint' if not found else f'{len(found)} checkpoints'} ({listed})"
            + (f": name the one that is meant, as {name}/{found[0]}" if found else "")
        )
    return found[0]
