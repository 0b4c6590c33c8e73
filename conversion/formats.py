"""What a path is, and what it holds: foreign names, shapes and dtypes at once, values one tensor at a time.

    safetensors              model.safetensors or its shards, PyTorch's names: this project's and transformers' format
    pytorch                  pytorch_model.bin or its shards, PyTorch's names
    transformers-tf          tf_model.h5 or its shards, as transformers' TFGroupViTModel wrote them
    transformers-tf-safetensors   the same in model.safetensors, told by its metadata `format: tf`
    nvlabs                   the authors' .pth
    keras, keras-weights     .keras and .weights.h5, as the GroupViTModel of groupvit_tf writes them

Neither torch nor TensorFlow is needed for any of them; HDF5 takes h5py.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from conversion.magic import container
from conversion.names import EXTRA, Naming
from conversion.nvlabs import plain, read_config
from conversion.pickle_records import Tensor, escaped, other_tensor, shown
from conversion.torch_file import TorchFile, claimed_bytes, read_torch_file, zip_members
from conversion.wrappers import Choice, choose, some, state_dicts
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import STORED_DTYPES, numpy_dtype
from groupvit_common.checkpoints.safetensors_file import read_header
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.storage.json_text import parse_json, read_json
from groupvit_common.storage.names import is_hidden
from groupvit_common.storage.saving import has_file, settle

Format = Literal[
    "safetensors", "pytorch", "transformers-tf", "transformers-tf-safetensors", "nvlabs", "keras", "keras-weights"
]
NAMINGS: dict[Format, Naming] = {
    "safetensors": "canonical",
    "pytorch": "canonical",
    "transformers-tf": "transformers-tf",
    "transformers-tf-safetensors": "transformers-tf",
    "nvlabs": "nvlabs",
    "keras": "keras",
    "keras-weights": "keras",
}

# Files of a directory that are, or begin, a checkpoint; an index stands for its shards.
WEIGHTS = re.compile(
    r"(model\.safetensors|pytorch_model\.bin|tf_model\.h5)(\.index\.json)?|pytorch_model_fsdp\.bin|.+\.(pth|pt|ckpt|keras|weights\.h5)"
)
# Files that training programs put beside the weights: the state of the optimizer, of schedules, of random generators.
_NO_WEIGHTS = re.compile(r"(.*optim(izer)?(_states)?|scheduler|scaler|rng_state\w*|training_args)\.(pth|pt)")
_SAFETENSORS_DTYPES = {**STORED_DTYPES, "BOOL": "bool"}
_DTYPES = frozenset(_SAFETENSORS_DTYPES.values())
# Where files of torch.save keep the state dict, if it is not all that they hold.
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
# What a Keras file has beside the weights: the optimizer's state, the states of random generators.
_KERAS_OTHER = re.compile(r"(^|/)(optimizer|seed_generator|random_generator|metrics)(_\d+)?/")
_MAX_CONFIG = 1 << 20
_MAX_NAME = 500  # characters of a tensor's name
_MAX_OTHERS = 100
# Of an HDF5 file: links, and groups within one another. A model of the paper's size with its optimizer has 2,000, in 12 levels.
_MAX_OBJECTS, _MAX_GROUPS, _MAX_ATTRIBUTES = 20_000, 64, 1_000
# Where a .weights.h5 of this package keeps the model's configuration: an attribute of the root.
CONFIG_ATTRIBUTE = "groupvit_config"


class Info(NamedTuple):
    """A stored tensor: its shape, and NumPy's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class _Piece(NamedTuple):
    """One file: its tensors, the way to one's value, and what else it holds."""

    tensors: dict[str, Info]
    value: Callable[[str], np.ndarray]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what of the state dict is left out


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    `path` is what was named, `files` what holds the weights; `config` is None where nothing says it; `tensors` are the
    foreign names with shapes and dtypes, `homes` the files that they are in, `others` what the files hold besides; `choice` is which
    of the models in them this is, and what its names are there.
    """

    path: Path
    format: Format
    files: tuple[Path, ...]
    config: GroupViTConfig | None
    tensors: Mapping[str, Info]
    value: Callable[[str], np.ndarray]
    homes: Mapping[str, Path]
    choice: Choice
    others: tuple[str, ...] = ()

    @property
    def naming(self) -> Naming:
        return NAMINGS[self.format]


def open_source(
    path: str | Path, config: GroupViTConfig | None = None, key: str | None = None, *, first: bool = False
) -> Source:
    """Says what `path`, a file or a directory, is, and reads all but the values.

    A `config.json` beside the weights is read for the formats that have no configuration of their own; `config` takes the
    place of either.

    Args:
        key: which model, of a file that holds several; `first`: without a key, the first of them.

    Raises:
        CheckpointError: there is no checkpoint, or more than one, or it is damaged; names the file and the cause.
    """
    path = Path(path)
    if path.is_dir():
        with suppress(OSError):
            settle(path)
    main = _weights_of(path) if path.is_dir() else path
    files = index_shards(main) if main.name.endswith(".index.json") else (main,)
    kinds = {container(file) for file in files}
    if len(kinds) > 1:
        raise CheckpointError(f"{main} names shards of different formats ({', '.join(sorted(kinds))})")
    kind = kinds.pop()
    own: GroupViTConfig | None = None
    content: Any = None
    form: Format
    if kind == "safetensors":
        pieces, form = _open_safetensors(files)
    elif kind == "hdf5":
        opened = [_open_hdf5(file, lambda file=file: file.open("rb")) for file in files]  # type: ignore[misc]
        pieces, form, own = [piece for piece, _, _ in opened], opened[0][1], opened[0][2]
    elif kind == "zip" and len(files) == 1 and "model.weights.h5" in zip_members(main):
        piece, own = _open_keras(main)
        pieces, form = [piece], "keras"
    else:
        torch_files = [read_torch_file(file) for file in files]
        content = torch_files[0].content
        states = [_states(file) for file in torch_files]
        named = [{at: _tensor_names(state) for at, state in each.items()} for each in states]
        # A shard may hold a part of one tower alone.
        together: dict[tuple[str, ...], list[str]] = {
            (): [name for each in named for names in each.values() for name in names]
        }
        chosen = choose(
            named[0] if len(files) == 1 else together, ("canonical", "nvlabs"), source=main, key=key, first=first
        )
        pieces = [
            _torch_piece(file, each, chosen.at if chosen is not None and len(files) == 1 else next(iter(each)))
            for file, each in zip(torch_files, states, strict=True)
        ]
        form = "nvlabs" if chosen is not None and chosen.naming == "nvlabs" else "pytorch"
        if form == "nvlabs" and len(files) > 1:
            raise CheckpointError(f"{main.parent} holds the authors' weights in shards, which their code never wrote")
    if content is None:
        names = [name for piece in pieces for name in piece.tensors]
        chosen = choose({(): names}, (NAMINGS[form],), source=main, key=key, first=first)
    source = _joined(path, form, files, chosen, pieces)
    if config is None and content is not None:
        own = _torch_config(content, source, main)
    config = config if config is not None else own
    if config is None and (main.parent / CONFIG_NAME).is_file():
        config = GroupViTConfig.from_json_file(main.parent / CONFIG_NAME)
    return replace(source, config=config)


def _joined(path: Path, form: Format, files: tuple[Path, ...], choice: Choice | None, pieces: list[_Piece]) -> Source:
    found: dict[str, Info] = {}
    pieces_of: dict[str, _Piece] = {}
    homes: dict[str, Path] = {}
    for piece, file in zip(pieces, files, strict=True):
        twice = [name for name in piece.tensors if name in found]
        if twice:
            raise CheckpointError(f"{file} holds {escaped(twice[0])}, which another file of this checkpoint holds too")
        found |= piece.tensors
        pieces_of |= dict.fromkeys(piece.tensors, piece)
        homes |= dict.fromkeys(piece.tensors, file)
    if choice is None:
        choice = Choice((), NAMINGS[form], {name: name for name in found})
    names = {name: stored for name, stored in choice.names.items() if stored in found}
    for stored in names.values():
        if found[stored].dtype not in _DTYPES:
            raise CheckpointError(
                f"{homes[stored]} holds {escaped(stored, 80)} as {found[stored].dtype}, a type that is not read here"
            )
    notes = choice.notes + tuple(note for piece in pieces for note in piece.notes)
    others = tuple(dict.fromkeys(other for piece in pieces for other in piece.others))
    return Source(
        path,
        form,
        files,
        None,
        {name: found[stored] for name, stored in names.items()},
        lambda name: pieces_of[names[name]].value(names[name]),
        {name: homes[stored] for name, stored in names.items()},
        choice._replace(notes=notes),
        others,
    )


# -- directories ----------------------------------------------------------------------------------------------------------


def _weights_of(directory: Path) -> Path:
    """The one file in `directory` that is, or names, its weights."""
    try:
        items = sorted(directory.iterdir())
        present = [item.name for item in items if item.is_file() or item.is_symlink()]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from error
    present = [name for name in present if not is_hidden(name)]
    found = [name for name in present if WEIGHTS.fullmatch(name) and not _NO_WEIGHTS.fullmatch(name)]
    if not found and "saved_model.pb" in present:
        raise CheckpointError(
            f"{directory} is a TensorFlow SavedModel, a program whose weights have no names: convert the checkpoint that it was made of"
        )
    if not found and any(name.endswith(".distcp") for name in present):
        raise CheckpointError(
            f"{directory} is a distributed checkpoint of PyTorch, in pieces: put them together with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {directory} FILE.pth`, and convert that file"
        )
    if not found:
        folders = [item.name for item in items if item.is_dir() and not is_hidden(item.name)]
        raise CheckpointError(
            f"{directory} holds no checkpoint; it has {', '.join(present[:12]) or 'no files'}"
            + (f", and folders, one of which may be meant: {', '.join(folders[:12])}" if folders else "")
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} holds {len(found)} checkpoints, {', '.join(found)}: name the file that is meant"
        )
    return directory / found[0]


def index_shards(index: Path, there: bool = True) -> tuple[Path, ...]:
    """The files that an index names, sorted; `there`: which must be beside it."""
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


# -- safetensors ----------------------------------------------------------------------------------------------------------


def _open_safetensors(files: tuple[Path, ...]) -> tuple[list[_Piece], Format]:
    pieces, layouts = [], set()
    for file in files:
        header = read_header(file)
        layouts.add(header.metadata.get("format"))
        odd = [name for name, info in header.tensors.items() if info.dtype not in _SAFETENSORS_DTYPES]
        if odd:
            raise CheckpointError(
                f"{file} holds {odd[0]} as {header.tensors[odd[0]].dtype}, a type that is not read here"
            )
        # TensorFlow's names are those of its HDF5 files.
        own = {_tensorflow_name(name) if "tf" in layouts else name: name for name in header.tensors}
        tensors = {
            name: Info(header.tensors[stored].shape, _SAFETENSORS_DTYPES[header.tensors[stored].dtype])
            for name, stored in own.items()
        }
        starts = {name: header.starts[stored] for name, stored in own.items()}
        # What TensorFlow's layout has no place for is kept in the metadata.
        scalars = {name: _scalar(name, text, file) for name, text in header.metadata.items() if _is_scalar(name)}
        tensors |= {name: Info((), scalar.dtype.name) for name, scalar in scalars.items()}
        pieces.append(_Piece(tensors, _safetensors_reader(file, tensors, starts, scalars)))
    if "flax" in layouts:
        raise CheckpointError(f"{files[0]} holds transformers' Flax layout, which GroupViT never had")
    return pieces, "transformers-tf-safetensors" if "tf" in layouts else "safetensors"


def _is_scalar(name: str) -> bool:
    """Whether this is a value that a foreign layout has no place for, which files carry beside the tensors."""
    return name == EXTRA or name.endswith(".num_batches_tracked")


def scalar_text(value: np.ndarray) -> str:
    """A scalar as text that `_scalar` reads: its dtype and the shortest decimal number that gives it back."""
    return f"{value.dtype.name} {value.item() if value.dtype.kind in 'iu' else float(value)!r}"


def _scalar(name: str, text: str, file: Path) -> np.ndarray:
    dtype, _, number = text.partition(" ")
    try:
        if dtype not in _DTYPES:
            raise ValueError
        return np.asarray(int(number) if "int" in dtype else float(number)).astype(numpy_dtype(dtype))
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} is damaged: its metadata give {name} as {text[:40]!r}") from error


def _tensorflow_name(place: str) -> str:
    """The name below the model: what follows the last "groupvit/"."""
    return place.rpartition("groupvit/")[2]


def _safetensors_reader(
    file: Path, tensors: Mapping[str, Info], starts: Mapping[str, int], scalars: Mapping[str, np.ndarray]
) -> Callable[[str], np.ndarray]:
    def value(name: str) -> np.ndarray:
        if name in scalars:
            return scalars[name]
        shape, dtype = tensors[name]
        with _reading(file), file.open("rb") as opened:
            opened.seek(starts[name])
            return np.fromfile(opened, numpy_dtype(dtype), math.prod(shape)).reshape(shape)

    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    # A file that became shorter than it was has too few values for their shape.
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# -- torch.save -----------------------------------------------------------------------------------------------------------


def _states(file: TorchFile) -> dict[tuple[str, ...], dict[Any, Any]]:
    """The state dicts in a file, by the keys that lead to each; at least one, which need not be this model's.

    Raises:
        CheckpointError: nothing in it is a state dict.
    """
    found = state_dicts(file.content)
    if found:
        return found
    state, at = file.content, tuple[str, ...]()
    for key in _STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, at = state[key], (*at, key)
    if isinstance(state, dict) and "param_groups" in state and "state" in state:
        raise CheckpointError(f"{file.path} holds an optimizer's state and no model's: name the file of the model")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        what = "a dictionary with other keys than names" if isinstance(state, dict) else shown(state)
        raise CheckpointError(
            f"{file.path} holds {what}, not a state dict: a dictionary of tensors (`model.state_dict()`), or one under 'model'"
        )
    if not state:
        raise CheckpointError(f"{file.path} holds no state dict: it is empty")
    for name, value in state.items():
        if not isinstance(value, Tensor) and other_tensor(value) is None:
            raise CheckpointError(f"{file.path} holds no state dict: {shown(name)} is {shown(value)}, not a tensor")
    return {at: state}


def _tensor_names(state: Mapping[Any, Any]) -> list[str]:
    return [
        name
        for name, value in state.items()
        if isinstance(name, str) and (isinstance(value, Tensor) or other_tensor(value) is not None)
    ]


def _check_names(names: Iterable[str], path: Path) -> None:
    """Refuses names that are no tensor's: every message may hold names."""
    odd = next((name for name in names if len(name) > _MAX_NAME or not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path} holds no state dict: a tensor cannot be called {shown(odd)}")


def _torch_piece(file: TorchFile, states: Mapping[tuple[str, ...], dict[Any, Any]], at: tuple[str, ...]) -> _Piece:
    """The tensors of one of a file's state dicts."""
    state = states[at]
    records = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = {name: Info(record.shape, record.dtype) for name, record in records.items()}
    tensors |= {name: Info((), other_tensor(state[name]) or "") for name in _tensor_names(state) if name not in records}
    _check_names(tensors, file.path)
    limit = claimed_bytes(file.path)
    claimed = sum(file.cost(record) for record in records.values())
    if claimed > limit:
        raise CheckpointError(
            f"{file.path} is damaged: its {len(records)} tensors would take {claimed} bytes of storages that they share, and the "
            f"file justifies {limit}"
        )
    if tensors and all(info.shape == (0,) for info in tensors.values()):
        raise CheckpointError(
            f"{file.path} holds names without values, as of DeepSpeed's ZeRO stage 3: put the weights together with the "
            "zero_to_fp32.py beside it, and convert its result"
        )
    skipped = [name if isinstance(name, str) else shown(name) for name in state if name not in tensors]
    notes = [f"read from {'.'.join(map(escaped, at))!r}"] if at and at[-1] not in _STATE_KEYS else []
    notes += [f"left out: {some(skipped)}"] if skipped else []
    return _Piece(
        tensors, lambda name: file.read(records[name]), _others(file.content, at[0]) if at else (), tuple(notes)
    )


def _torch_config(content: Any, source: Source, path: Path) -> GroupViTConfig | None:
    """Returns the configuration that a file of torch.save says, if it does."""
    settings = content if isinstance(content, dict) else {}
    if source.format == "nvlabs":
        shapes = {name: info.shape for name, info in source.tensors.items()}
        return read_config(shapes, settings.get("config", settings.get("cfg")), path)
    written = plain(settings.get("config"))
    if isinstance(written, dict) and written.get("model_type") == "groupvit":
        return _config_from(written, path)
    return None


def _others(content: dict[Any, Any], chosen: str) -> tuple[str, ...]:
    """What a training program saved beside the weights, which are under the key `chosen`: keys, numbers and texts with their values."""
    others = []
    for key, value in content.items():
        if key == chosen:
            continue
        name = escaped(key) if isinstance(key, str) else shown(key)
        if isinstance(value, str) and len(value) <= 40:
            name += f" {escaped(value)}"
        elif isinstance(value, int | float):
            name += f" {shown(value)}"
        others.append(name)
    more = len(others) - _MAX_OTHERS
    return (*others[:_MAX_OTHERS], *([f"{more} more"] if more > 0 else []))


def _config_from(settings: Mapping[str, Any], source: Path) -> GroupViTConfig:
    try:
        return GroupViTConfig.from_dict(settings)
    except (InputError, TypeError) as error:
        raise CheckpointError(f"{source} has a configuration that cannot be: {escaped(str(error), 300)}") from error


# -- HDF5 -----------------------------------------------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = path.open("rb"), begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_hdf5(path: Path, opener: Callable[[], Any]) -> tuple[_Piece, Format, GroupViTConfig | None]:
    """`opener` gives the HDF5 file as a binary file, which may be a part of `path`; also returns the configuration in it, if any."""
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(f"{path} is an HDF5 file; reading it takes h5py: pip install h5py") from error

    @contextmanager
    def opened() -> Iterator[Any]:
        # The library answers damage in many ways, its own failed assertions among them.
        try:
            with opener() as raw, h5py.File(raw, "r") as file:
                yield file
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({escaped((str(error).splitlines() or [''])[0], 100) or type(error).__name__}); "
                "download or copy it again"
            ) from error

    size = path.stat().st_size
    infos: dict[str, Info] = {}
    places: dict[str, str] = {}
    others: dict[str, None] = {}
    total = 0
    with opened() as file:
        tensorflow = "layer_names" in file.attrs or "layer_names0" in file.attrs
        items = list(_datasets(file, path))
        if not tensorflow and not any("/vars/" in place for place, _ in items):
            raise CheckpointError(
                f"{path} is an HDF5 file, but neither transformers' tf_model.h5 nor Keras 3's .weights.h5"
            )
        for place, item in items:
            other = _KERAS_OTHER.search(place)
            if other is not None:
                others[other[2]] = None
                continue
            info = _dataset_info(item, f"{escaped(place, 80)}", path, size)
            total += math.prod(info.shape) * item.dtype.itemsize
            name = _tensorflow_name(place) if tensorflow else place
            if name in infos:
                raise CheckpointError(f"{path} holds {escaped(name, 80)} twice, at {places[name]} and {place}")
            infos[name], places[name] = info, place
        _check_names(infos, path)
        if total > size:
            raise CheckpointError(f"{path} is damaged: its tensors would have {total} bytes, and the file has {size}")
        # What a format has no place for is kept in attributes, which other readers do not mind.
        if (count := h5py.h5a.get_num_attrs(file.id)) > _MAX_ATTRIBUTES:
            raise CheckpointError(f"{path} is refused: it has {count} attributes, and models have a few")
        written = None if tensorflow else _text_attribute(file, CONFIG_ATTRIBUTE, _MAX_CONFIG, path)
        texts = {name: _text_attribute(file, name, _MAX_NAME, path) for name in file.attrs if _is_scalar(name)}
        scalars = {name: _scalar(name, text, path) for name, text in texts.items() if text is not None}
        infos |= {name: Info((), scalar.dtype.name) for name, scalar in scalars.items()}

    def value(name: str) -> np.ndarray:
        if name in scalars:
            return scalars[name]
        with opened() as file:
            array = np.asarray(file[places[name]][()])
            return array.view(numpy_dtype(infos[name].dtype)) if array.dtype.kind == "V" else array

    config = None
    if written is not None:
        config = _config_from(parse_json(written, f"{CONFIG_ATTRIBUTE} of {path}"), path)
    return _Piece(infos, value, tuple(others)), "transformers-tf" if tensorflow else "keras-weights", config


def _datasets(file: Any, path: Path, within: str = "") -> Iterator[tuple[str, Any]]:
    """All datasets of an HDF5 file by their names. Each group is entered once, so that links in a circle have an end.

    HDF5's own walk is recursive and takes names apart again and again: minutes for thousands of groups in one another.

    Raises:
        CheckpointError: more objects or levels than any model has; links to other files.
    """
    import h5py

    seen, objects = set(), 0
    stack: list[tuple[str, Any]] = [("", file)]
    while stack:
        place, group = stack.pop()
        about = h5py.h5o.get_info(group.id)
        if (about.fileno, about.addr) in seen:
            continue
        seen.add((about.fileno, about.addr))
        objects += len(group)
        if objects > _MAX_OBJECTS or place.count("/") > _MAX_GROUPS:
            raise CheckpointError(
                f"{path} is refused: it has more than {_MAX_OBJECTS} objects or {_MAX_GROUPS} groups in one another, as no model has"
            )
        below = []
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise CheckpointError(
                    f"{path} is refused: the values of {escaped(place + name, 80)} are said to be in another file"
                )
            if not isinstance(link, h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Group):
                below.append((f"{place}{name}/", item))
            elif isinstance(item, h5py.Dataset):
                yield place + name, item
        stack += reversed(below)


def _dataset_info(item: Any, place: str, path: Path, size: int) -> Info:
    """Shape and dtype of a dataset whose values are in the file, all of them."""
    if item.shape is None:
        raise CheckpointError(f"{path} holds {place} without values")
    item_type = item.dtype
    # Opaque types may name another type, of another size, as what they are.
    if item.id.get_type().get_size() != item_type.itemsize:
        raise CheckpointError(f"{path} is damaged: the type of {place} contradicts itself")
    # NumPy has no bfloat16, for which Keras writes pairs of bytes with a note.
    if item_type.kind == "V":
        noted = item_type.itemsize == 2 and item_type.fields is None
        dtype = _text_attribute(item, "dtype", _MAX_NAME, path) if noted else None
        dtype = dtype if dtype == "bfloat16" else None
    else:
        dtype = item_type.name
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path} holds {place} as {escaped(str(item_type), 80)}, a type that is not read here")
    if item.external or item.is_virtual:
        raise CheckpointError(f"{path} is refused: the values of {place} are said to be in another file")
    if item.id.get_create_plist().get_nfilters():
        raise CheckpointError(
            f"{path} holds {place} compressed or filtered, as neither transformers nor Keras writes it: unpack it with h5repack -f NONE"
        )
    stored = math.prod(item.shape) * item_type.itemsize
    chunk = math.prod(item.chunks) * item_type.itemsize if item.chunks else 0
    if max(stored, chunk) > size or item.id.get_storage_size() < stored:
        raise CheckpointError(f"{path} is damaged: {place} has fewer bytes than its shape {list(item.shape)} says")
    return Info(tuple(item.shape), dtype)


def _text_attribute(item: Any, name: str, limit: int, path: Path) -> str | None:
    """One text that is an attribute; None where there is none, or no text. Others are not read: they may be of any size."""
    import h5py

    if name not in item.attrs:
        return None
    attribute = h5py.h5a.open(item.id, name.encode())
    if attribute.shape != () or attribute.get_type().get_class() != h5py.h5t.STRING:
        return None
    if not attribute.get_type().is_variable_str() and attribute.get_storage_size() > limit:
        raise CheckpointError(f"{path} is damaged: its {name} is longer than {limit} characters")
    value = item.attrs[name]
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    if len(text) > limit:
        raise CheckpointError(f"{path} is damaged: its {name} is longer than {limit} characters")
    return text


def _open_keras(path: Path) -> tuple[_Piece, GroupViTConfig]:
    members = zip_members(path)
    if "config.json" not in members:
        raise CheckpointError(f"{path} is no .keras file: it has no config.json")
    begin, length = members["config.json"]
    with path.open("rb") as file:
        file.seek(begin)
        content = parse_json(file.read(min(length, _MAX_CONFIG)), f"config.json of {path}")
    settings = _keras_settings(content, path)
    piece, _, _ = _open_hdf5(path, lambda: _Window(path, *members["model.weights.h5"]))
    return piece, _config_from(settings, path)


def _keras_settings(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The configuration of the GroupViTModel that a Keras model is, or has among its layers."""
    found: list[Any] = []
    queue: list[Any] = [content]
    for value in queue:
        if isinstance(value, dict) and value.get("class_name") in ("GroupViTModel", "TFGroupViTModel"):
            found.append(value.get("config"))
        else:
            queue += [
                item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, dict | list)
            ]
    if not found:
        name = content.get("class_name")
        raise CheckpointError(
            f"{path} holds a {escaped(str(name), 80)}; the GroupViTModel of groupvit_tf can be converted"
        )
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GroupViTModels: convert the weights of one, saved alone")
    settings = found[0].get("config") if isinstance(found[0], dict) else None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged: its config.json has no configuration")
    return settings
