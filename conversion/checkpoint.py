"""A checkpoint of any format in canonical names.

Names, shapes and dtypes are as in `groupvit_common.model.parameters.manifest`; each value is read, transposed and
checked when it is needed.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from conversion.names import CANONICAL, EXTRA, Entry, account, default_value, entries, to_parts
from conversion.registry import FILE_ENDINGS, WEIGHTS, WEIGHTS_NAMES
from conversion.source import Info, Source, index_shards, open_source
from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import FLOATS, cast, float_dtype, most_common_float, numpy_dtype
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest
from groupvit_common.storage.saving import read_lock

MODEL_CARD = "README.md"
"""A repository's description, which names its licence."""
# Files of the tokenizer and the image processor, which go along from directory to directory.
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
    rf"(?P<name>[\w.-]+/[\w.-]+{''.join(f'(?<!{re.escape(ending)})' for ending in FILE_ENDINGS)})"
    rf"(/(?P<file>([\w.-]+/)*({WEIGHTS.pattern})))?"
)


@dataclass
class Checkpoint:
    """A source in canonical names. `filled`: tensors that it lacks, which have a default value."""

    source: Source
    config: GroupViTConfig
    tensors: dict[str, Info]
    filled: list[str]
    _entries: dict[str, Entry]
    _last: tuple[str, dict[str, np.ndarray]] = ("", {})

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most elements."""
        return most_common_float((info.dtype, info.elements) for info in self.tensors.values())

    def num_parameters(self) -> int:
        """Returns the number of elements of the parameters, as `num_parameters` of a model does."""
        kinds = manifest(self.config)
        return sum(
            info.elements
            for name, info in self.tensors.items()
            if name in kinds and kinds[name].kind not in ("running_mean", "running_var", "counter")
        )

    def value(self, name: str) -> np.ndarray:
        """Returns a tensor by its canonical name, of the shape and dtype in `tensors`.

        Raises:
            CheckpointError: it cannot be read, or has values that are not finite or too large for its dtype.
        """
        entry = self._entries[name]
        dtype = self.tensors[name].dtype
        if name in self.filled:
            return default_value(entry.parameters[0]).astype(numpy_dtype(dtype))
        # The three parts of a fused tensor are read one after the other.
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
    """Arrays by name, each made when it is needed."""

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
    """Refuses configurations of more layers than tensors, before every tensor of theirs is listed."""
    layers = sum(config.vision_config.depths) + config.text_config.num_hidden_layers
    if layers > len(opened.tensors):
        raise CheckpointError(
            f"the configuration of {opened.path} has {layers} layers, and there are {len(opened.tensors)} tensors "
            "in it: they belong to different models"
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
    """Reads a checkpoint of any format in canonical names and accounts for every tensor; values are read when needed.

    Args:
        source, revision: see `locate`; or the result of `open_source`.
        config: instead of the source's own: a configuration, or the directory or file of one.
        dtype: of the floating-point tensors; None: as stored.
        allow_missing: shell patterns of tensors that may be missing (they become 0, norms' weights 1) or left over.
        key: the model to choose, of a file that holds several: "model_ema", "state_dict.teacher"; an error lists them.
            Tensors of the others are left out.

    Raises:
        CheckpointError: the source cannot be found, read or understood, or its tensors are not those of its
            configuration.
        InputError: an argument that cannot be used.
    """
    wanted = None if dtype is None else float_dtype(dtype)
    if dtype is not None and wanted is None:
        raise InputError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype!r}")
    given = _given(config)
    opened = source if isinstance(source, Source) else open_source(locate(source, revision), given, key)
    known: GroupViTConfig | None = given if given is not None else opened.config
    if known is None:
        raise CheckpointError(
            f"{opened.path} has no {CONFIG_NAME} beside it and holds none: pass a configuration (--config)"
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
    for entry in entries(CANONICAL, known, extra):
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


def _given(config: GroupViTConfig | str | Path | None) -> GroupViTConfig | None:
    return GroupViTConfig.from_pretrained(config) if isinstance(config, str | Path) else config


@contextmanager
def opened_source(
    source: str | Path,
    revision: str | None = None,
    *,
    config: GroupViTConfig | str | Path | None = None,
    key: str | None = None,
    first: bool = False,
) -> Iterator[Source]:
    """Opens a source, see `locate` and `open_source`; within, no save of this package changes its directory."""
    path = locate(source, revision)
    with nullcontext(path) if not path.is_dir() else read_lock(path) as held:
        yield replace(open_source(held, _given(config), key, first=first), path=path)


# -- the location of a source ------------------------------------------------------------------------------------------


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Returns the local path of a source: itself, or its download from the hub.

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
    directory = hub.resolve(
        name, patterns=(file, CONFIG_NAME, *COMPANIONS, MODEL_CARD), required=(file,), location=location
    )
    if file.endswith(".index.json"):
        shards = [shard.name for shard in index_shards(directory / file, there=False)]
        hub.resolve(name, patterns=shards, required=shards, location=location)
    return directory / file


def _preferred(name: str, present: list[str]) -> str:
    """Returns the weights' file of a repository; of the same weights in several formats, the safest and quickest."""
    found = [file for file in present if WEIGHTS.fullmatch(file)]
    for preferred in WEIGHTS_NAMES:
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
