"""A checkpoint that is open for reading: foreign names, shapes and dtypes at once, values one tensor at a time.

No format needs torch or TensorFlow; HDF5 needs h5py.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from conversion import magic
from conversion.names import EXTRA, Naming
from conversion.pickle_records import escaped, shown
from conversion.registry import FORMATS, WEIGHTS, Container, FormatSpec
from conversion.torch_file import zip_members
from conversion.wrappers import Choice, choose
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import STORED_DTYPES, numpy_dtype
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.storage.json_text import read_json
from groupvit_common.storage.names import is_hidden
from groupvit_common.storage.saving import has_file, settle

T = TypeVar("T")

DTYPES = frozenset((*STORED_DTYPES.values(), "bool"))  # of the tensors that are read
_MAX_NAME = 500  # characters of a tensor's name
# Files that training programs put beside the weights: the state of the optimizer, of schedules, of random generators.
_NO_WEIGHTS = re.compile(r"(.*optim(izer)?(_states)?|scheduler|scaler|rng_state\w*|training_args)\.(pth|pt)")


class Info(NamedTuple):
    """A stored tensor: its shape, and NumPy's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * numpy_dtype(self.dtype).itemsize


class Piece(NamedTuple):
    """One file: its tensors, a reader of their values, what else it holds, and notes on what is left out."""

    tensors: dict[str, Info]
    value: Callable[[str], np.ndarray]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Opened(NamedTuple):
    """The files of a checkpoint as its format reads them.

    Attributes:
        pieces: one per file.
        choice: the model in them; None: the one that the names show.
        config: returns the configuration that the files themselves hold, or None; called where no other is given.
    """

    pieces: Sequence[Piece]
    choice: Choice | None = None
    config: Callable[["Source"], GroupViTConfig | None] = lambda source: None


class Files:
    """The files of a checkpoint before its format is known.

    Args:
        path: a file or a directory.
        key: the model to choose, of a file that holds several.
        first: without a key, choose the first of several.

    Raises:
        CheckpointError: there is no checkpoint, or more than one.
    """

    def __init__(self, path: Path, key: str | None = None, first: bool = False) -> None:
        self.path, self._key, self._first = path, key, first
        self.main = _weights_of(path) if path.is_dir() else path
        self.paths = index_shards(self.main) if self.main.name.endswith(".index.json") else (self.main,)
        self._results: dict[Callable[[Files], Any], Any] = {}

    @cached_property
    def container(self) -> Container:
        """The container of the files.

        Raises:
            CheckpointError: they cannot be read, or have different containers, or are not weights.
        """
        kinds = {magic.container(path) for path in self.paths}
        if len(kinds) > 1:
            raise CheckpointError(f"{self.main} names shards of different formats ({', '.join(sorted(kinds))})")
        kind = kinds.pop()
        if kind == "zip" and len(self.paths) == 1 and "model.weights.h5" in self.once(_members):
            return "keras"
        return "torch" if kind in ("zip", "torch-legacy") else kind

    def once(self, function: Callable[["Files"], T]) -> T:
        """Returns `function(self)`, called once: what detection reads is not read again."""
        if function not in self._results:
            self._results[function] = function(self)
        return self._results[function]

    def choose(self, states: Mapping[tuple[str, ...], Sequence[str]], namings: Sequence[Naming]) -> Choice | None:
        """Returns the model that is meant, see `conversion.wrappers.choose`."""
        return choose(states, namings, source=self.main, key=self._key, first=self._first)


def _members(files: Files) -> dict[str, tuple[int, int]]:
    return zip_members(files.main)


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    Attributes:
        path: the file or directory that was named.
        spec: the format.
        files: the files that hold the weights.
        config: the configuration; None where there is none.
        tensors: foreign name -> shape and dtype.
        value: reads a tensor by its foreign name.
        homes: foreign name -> file.
        choice: which of the models in the files this is, and its names in them.
        others: what the files hold besides.
    """

    path: Path
    spec: FormatSpec
    files: tuple[Path, ...]
    config: GroupViTConfig | None
    tensors: Mapping[str, Info]
    value: Callable[[str], np.ndarray]
    homes: Mapping[str, Path]
    choice: Choice
    others: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        return self.spec.name

    @property
    def naming(self) -> Naming:
        return self.choice.naming


def open_source(
    path: str | Path, config: GroupViTConfig | None = None, key: str | None = None, *, first: bool = False
) -> Source:
    """Recognises a file or a directory, and reads everything except the values.

    A `config.json` beside the weights is read for the formats that hold no configuration themselves; `config` replaces
    either.

    Args:
        key: the model to choose, of a file that holds several.
        first: without a key, choose the first of several.

    Raises:
        CheckpointError: there is no checkpoint, or more than one, or it is damaged; names the file and the cause.
    """
    path = Path(path)
    if path.is_dir():
        with suppress(OSError):
            settle(path)
    files = Files(path, key, first)
    spec = next((spec for spec in FORMATS if spec.container == files.container and spec.code.detect(files)), None)
    if spec is None:
        raise CheckpointError(f"{files.main} is a {files.container} file, but of no format that is read here")
    opened: Opened = spec.code.read(files)
    choice = opened.choice
    if choice is None:
        names = [name for piece in opened.pieces for name in piece.tensors]
        choice = files.choose({(): names}, (spec.code.NAMING,)) or whole(spec.code.NAMING, names)
    source = _joined(files, spec, choice, opened.pieces)
    if config is None:
        config = opened.config(source)
    beside = files.main.parent / CONFIG_NAME
    if config is None and beside.is_file():
        config = GroupViTConfig.from_json_file(beside)
    return replace(source, config=config)


def whole(naming: Naming, names: Sequence[str]) -> Choice:
    """Returns all tensors of files as one model, where no model is recognised among their names."""
    return Choice((), naming, {name: name for name in names})


def _joined(files: Files, spec: FormatSpec, choice: Choice, pieces: Sequence[Piece]) -> Source:
    found: dict[str, Info] = {}
    pieces_of: dict[str, Piece] = {}
    homes: dict[str, Path] = {}
    for piece, file in zip(pieces, files.paths, strict=True):
        twice = [name for name in piece.tensors if name in found]
        if twice:
            raise CheckpointError(f"{file} holds {escaped(twice[0])}, which another file of this checkpoint holds too")
        found |= piece.tensors
        pieces_of |= dict.fromkeys(piece.tensors, piece)
        homes |= dict.fromkeys(piece.tensors, file)
    names = {name: stored for name, stored in choice.names.items() if stored in found}
    for stored in names.values():
        if found[stored].dtype not in DTYPES:
            raise CheckpointError(
                f"{homes[stored]} holds {escaped(stored, 80)} as {found[stored].dtype}, a type that is not read here"
            )
    return Source(
        files.path,
        spec,
        files.paths,
        None,
        {name: found[stored] for name, stored in names.items()},
        lambda name: pieces_of[names[name]].value(names[name]),
        {name: homes[stored] for name, stored in names.items()},
        choice._replace(notes=choice.notes + tuple(note for piece in pieces for note in piece.notes)),
        tuple(dict.fromkeys(other for piece in pieces for other in piece.others)),
    )


def check_names(names: Iterable[str], path: Path) -> None:
    """Refuses names that no tensor has: every message may hold names."""
    wrong = next((name for name in names if len(name) > _MAX_NAME or not name.isprintable()), None)
    if wrong is not None:
        raise CheckpointError(f"{path} holds no state dict: a tensor cannot be called {shown(wrong)}")


# -- directories -------------------------------------------------------------------------------------------------------


def _weights_of(directory: Path) -> Path:
    """Returns the one file in `directory` that is, or names, its weights."""
    try:
        items = sorted(directory.iterdir())
        present = [item.name for item in items if item.is_file() or item.is_symlink()]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from error
    present = [name for name in present if not is_hidden(name)]
    found = [name for name in present if WEIGHTS.fullmatch(name) and not _NO_WEIGHTS.fullmatch(name)]
    if len(found) == 1:
        return directory / found[0]
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} checkpoints, {', '.join(found)}: name the file that is meant"
        )
    if "saved_model.pb" in present:
        raise CheckpointError(
            f"{directory} is a TensorFlow SavedModel, a program whose weights have no names: convert the checkpoint "
            "that it was made of"
        )
    if any(name.endswith(".distcp") for name in present):
        raise CheckpointError(
            f"{directory} is a distributed checkpoint of PyTorch, in pieces: put them together with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {directory} FILE.pth`, and convert that file"
        )
    folders = [item.name for item in items if item.is_dir() and not is_hidden(item.name)]
    raise CheckpointError(
        f"{directory} holds no checkpoint; it has {', '.join(present[:12]) or 'no files'}"
        + (f", and folders, one of which may be meant: {', '.join(folders[:12])}" if folders else "")
    )


def index_shards(index: Path, there: bool = True) -> tuple[Path, ...]:
    """Returns the files that an index names, sorted. `there`: whether they must be beside it."""
    content = read_json(index)
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    weight_map = content.get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or not all(re.fullmatch(r"[^/\\:\x00]+", name) and name.endswith(suffix) for name in names):
        raise CheckpointError(f"{index} is no index of {suffix} files beside it")
    shards = tuple(index.parent / name for name in sorted(names))
    missing = [shard.name for shard in shards if not has_file(shard.parent, shard.name)]
    if there and missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the shards that {index.name} names: {', '.join(missing)}"
        )
    return shards


# -- scalars and configurations within files ---------------------------------------------------------------------------


def is_scalar(name: str) -> bool:
    """Returns whether this value has no place in some layouts, so that files carry it as text beside the tensors."""
    return name == EXTRA or name.endswith(".num_batches_tracked")


def scalar_text(value: np.ndarray) -> str:
    """Returns a scalar as text for `parse_scalar`: its dtype and the shortest decimal number that is equal to it."""
    return f"{value.dtype.name} {value.item() if value.dtype.kind in 'iu' else float(value)!r}"


def parse_scalar(name: str, text: str, file: Path) -> np.ndarray:
    """Returns the scalar of a text.

    Raises:
        CheckpointError: the text is no scalar.
    """
    dtype, _, number = text.partition(" ")
    try:
        if dtype not in DTYPES:
            raise ValueError
        return np.asarray(int(number) if "int" in dtype else float(number)).astype(numpy_dtype(dtype))
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} is damaged: its metadata give {name} as {text[:40]!r}") from error


def parse_config(settings: Mapping[str, Any], file: Path) -> GroupViTConfig:
    """Returns the configuration that a file holds.

    Raises:
        CheckpointError: no model can have it.
    """
    try:
        config: GroupViTConfig = GroupViTConfig.from_dict(settings)
        config.check_model()
    except (InputError, TypeError) as error:
        raise CheckpointError(f"{file} has a configuration that cannot be: {escaped(str(error), 300)}") from error
    return config
