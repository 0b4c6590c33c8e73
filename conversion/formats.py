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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from conversion.magic import container
from conversion.names import EXTRA, Naming
from conversion.nvlabs import plain, read_config
from conversion.pickles import (
    Tensor,
    TorchFile,
    escaped,
    numpy_dtype,
    other_tensor,
    read_torch_file,
    shown,
    zip_members,
)
from groupvit_common.checkpoint import CONFIG_NAME, read_header
from groupvit_common.config import GroupViTConfig
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.files import parse_json, read_json

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
    r"(model\.safetensors|pytorch_model\.bin|tf_model\.h5)(\.index\.json)?|.+\.(pth|pt|ckpt|keras|weights\.h5)"
)
# NumPy's names of safetensors' dtypes.
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPES = frozenset(_SAFETENSORS_DTYPES.values())
# Where files of torch.save keep the state dict, if it is not all that they hold.
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
# What a Keras file has beside the weights: the optimizer's state, the states of random generators.
_KERAS_OTHER = re.compile(r"(^|/)(optimizer|seed_generator|random_generator|metrics)(_\d+)?/")
_MAX_CONFIG = 1 << 20
_MAX_NAME = 500  # characters of a tensor's name
_MAX_OTHERS = 100
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


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open for reading.

    `path` is what was named, `files` what holds the weights; `config` is None where nothing says it; `tensors` are the
    foreign names with shapes and dtypes, `homes` the files that they are in, `others` what the files hold besides.
    """

    path: Path
    format: Format
    files: tuple[Path, ...]
    config: GroupViTConfig | None
    tensors: Mapping[str, Info]
    value: Callable[[str], np.ndarray]
    homes: Mapping[str, Path]
    others: tuple[str, ...] = ()

    @property
    def naming(self) -> Naming:
        return NAMINGS[self.format]


def open_source(path: str | Path, config: GroupViTConfig | None = None) -> Source:
    """Says what `path`, a file or a directory, is, and reads all but the values.

    A `config.json` beside the weights is read for the formats that have no configuration of their own; `config` takes the
    place of either.

    Raises:
        CheckpointError: there is no checkpoint, or more than one, or it is damaged; names the file and the cause.
    """
    path = Path(path)
    main = _weights_of(path) if path.is_dir() else path
    files = index_shards(main) if main.name.endswith(".index.json") else (main,)
    kinds = {container(file) for file in files}
    if len(kinds) > 1:
        raise CheckpointError(f"{main} names shards of different formats ({', '.join(sorted(kinds))})")
    kind = kinds.pop()
    own: GroupViTConfig | None = None
    if kind == "safetensors":
        pieces, form = _open_safetensors(files)
    elif kind == "hdf5":
        opened = [_open_hdf5(file, lambda file=file: file.open("rb")) for file in files]  # type: ignore[misc]
        pieces, form, own = [piece for piece, _, _ in opened], opened[0][1], opened[0][2]
    elif kind == "zip" and len(files) == 1 and "model.weights.h5" in zip_members(main):
        piece, own = _open_keras(main)
        pieces, form = [piece], "keras"
    else:
        pieces, form, own = _open_torch(files, config)
    config = config if config is not None else own
    if config is None and (main.parent / CONFIG_NAME).is_file():
        config = GroupViTConfig.from_json_file(main.parent / CONFIG_NAME)
    return _joined(path, form, files, config, pieces)


def _joined(
    path: Path, form: Format, files: tuple[Path, ...], config: GroupViTConfig | None, pieces: list[_Piece]
) -> Source:
    tensors: dict[str, Info] = {}
    pieces_of: dict[str, _Piece] = {}
    homes: dict[str, Path] = {}
    for piece, file in zip(pieces, files, strict=True):
        twice = [name for name in piece.tensors if name in tensors]
        if twice:
            raise CheckpointError(f"{file} holds {twice[0]}, which another file of this checkpoint holds too")
        tensors |= piece.tensors
        pieces_of |= dict.fromkeys(piece.tensors, piece)
        homes |= dict.fromkeys(piece.tensors, file)
    others = tuple(dict.fromkeys(other for piece in pieces for other in piece.others))
    return Source(path, form, files, config, tensors, lambda name: pieces_of[name].value(name), homes, others)


# -- directories ----------------------------------------------------------------------------------------------------------


def _weights_of(directory: Path) -> Path:
    """The one file in `directory` that is, or names, its weights."""
    try:
        present = sorted(item.name for item in directory.iterdir() if item.is_file() or item.is_symlink())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from error
    found = [name for name in present if WEIGHTS.fullmatch(name)]
    if not found and "saved_model.pb" in present:
        raise CheckpointError(
            f"{directory} is a TensorFlow SavedModel, a program whose weights have no names: convert the checkpoint that it was made of"
        )
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoint; it has {', '.join(present[:12]) or 'no files'}")
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
    missing = [shard.name for shard in shards if not shard.is_file()]
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


def _open_torch(
    files: tuple[Path, ...], given: GroupViTConfig | None
) -> tuple[list[_Piece], Format, GroupViTConfig | None]:
    pieces, form, config = [], "pytorch", given
    for path in files:
        file = read_torch_file(path)
        state = file.content
        for key in _STATE_KEYS:
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            what = "a dictionary with other keys than names" if isinstance(state, dict) else shown(state)
            raise CheckpointError(
                f"{path} holds {what}, not a state dict: a dictionary of tensors (`model.state_dict()`), or one under 'model'"
            )
        # A module that was trained in parallel is one level further down.
        if state and all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): value for name, value in state.items()}
        records = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for name, value in state.items():
            kind = value.dtype if isinstance(value, Tensor) else other_tensor(value)
            if kind is None:
                raise CheckpointError(f"{path} holds no state dict: {shown(name)} is {shown(value)}, not a tensor")
            if kind not in _DTYPES:
                raise CheckpointError(f"{path} holds {escaped(name)} as {kind}, a type that is not read here")
            # No model's; and every message may hold names.
            if len(name) > _MAX_NAME or not name.isprintable():
                raise CheckpointError(f"{path} holds no state dict: a tensor cannot be called {shown(name)}")
        if not records:
            raise CheckpointError(f"{path} holds no state dict: it is empty")
        tensors = {name: Info(record.shape, record.dtype) for name, record in records.items()}
        beside = _others(file.content) if state is not file.content else ()
        pieces.append(_Piece(tensors, partial(_torch_value, file, records), beside))
        if any(name.startswith("img_encoder.") for name in records):
            form = "nvlabs"
            if given is None:
                settings = file.content.get("config", file.content.get("cfg"))
                config = read_config({name: info.shape for name, info in tensors.items()}, settings, path)
        elif (
            given is None
            and isinstance(written := plain(file.content.get("config")), dict)
            and written.get("model_type") == "groupvit"
        ):
            config = _config_from(written, path)
    if form == "nvlabs" and len(files) > 1:
        raise CheckpointError(f"{files[0].parent} holds the authors' weights in shards, which their code never wrote")
    return pieces, "nvlabs" if form == "nvlabs" else "pytorch", config


def _torch_value(file: TorchFile, records: Mapping[str, Tensor], name: str) -> np.ndarray:
    return file.read(records[name])


def _others(content: Any) -> tuple[str, ...]:
    """What a training program saved beside the weights: keys, numbers and texts with their values."""
    if not isinstance(content, dict):
        return ()
    others = []
    for key, value in content.items():
        if key in _STATE_KEYS:
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
        # The library answers damage in many ways, all of them ordinary exceptions.
        try:
            with opener() as raw, h5py.File(raw, "r") as file:
                yield file
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__}); "
                "download or copy it again"
            ) from error

    size = path.stat().st_size
    infos: dict[str, Info] = {}
    places: dict[str, str] = {}
    others: dict[str, None] = {}

    def visit(place: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        other = _KERAS_OTHER.search(place)
        if other is not None:
            others[other[2]] = None
            return
        name = _tensorflow_name(place) if tensorflow else place
        # NumPy has no bfloat16, for which Keras writes bytes with a note.
        dtype = item.attrs.get("dtype") if item.dtype.kind == "V" else item.dtype.name
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path} holds {place} as {item.dtype}, a type that is not read here")
        if item.external or item.is_virtual:
            raise CheckpointError(f"{path} is refused: the values of {place} are said to be in another file")
        stored = math.prod(item.shape) * item.dtype.itemsize
        if stored > size or item.compression is not None or item.id.get_storage_size() < stored:
            raise CheckpointError(f"{path} is damaged: {place} has fewer bytes than its shape {list(item.shape)} says")
        if name in infos:
            raise CheckpointError(f"{path} holds {name} twice, at {places[name]} and {place}")
        infos[name], places[name] = Info(tuple(item.shape), dtype), place

    with opened() as file:
        tensorflow = "layer_names" in file.attrs or "layer_names0" in file.attrs
        if not tensorflow and "layers" not in file:
            raise CheckpointError(
                f"{path} is an HDF5 file, but neither transformers' tf_model.h5 nor Keras 3's .weights.h5"
            )
        file.visititems(visit)
        # What a format has no place for is kept in attributes, which other readers do not mind.
        written = None if tensorflow else file.attrs.get(CONFIG_ATTRIBUTE)
        scalars = {name: _scalar(name, str(text), path) for name, text in file.attrs.items() if _is_scalar(name)}
        infos |= {name: Info((), scalar.dtype.name) for name, scalar in scalars.items()}

    def value(name: str) -> np.ndarray:
        if name in scalars:
            return scalars[name]
        with opened() as file:
            array = np.asarray(file[places[name]][()])
            return array.view(numpy_dtype(infos[name].dtype)) if array.dtype.kind == "V" else array

    config = None
    if isinstance(written, str | bytes):
        text = written.encode("utf-8", "surrogateescape") if isinstance(written, str) else written
        config = _config_from(parse_json(text, f"{CONFIG_ATTRIBUTE} of {path}"), path)
    return _Piece(infos, value, tuple(others)), "transformers-tf" if tensorflow else "keras-weights", config


def _open_keras(path: Path) -> tuple[_Piece, GroupViTConfig]:
    members = zip_members(path)
    if "config.json" not in members:
        raise CheckpointError(f"{path} is no .keras file: it has no config.json")
    begin, length = members["config.json"]
    with path.open("rb") as file:
        file.seek(begin)
        content = parse_json(file.read(min(length, _MAX_CONFIG)), f"config.json of {path}")
    name, settings = content.get("class_name"), content.get("config")
    if name not in ("GroupViTModel", "TFGroupViTModel"):
        raise CheckpointError(f"{path} holds a {name}; the GroupViTModel of groupvit_tf can be converted")
    if not isinstance(settings, dict) or not isinstance(settings.get("config"), dict):
        raise CheckpointError(f"{path} is damaged: its config.json has no configuration")
    piece, _, _ = _open_hdf5(path, lambda: _Window(path, *members["model.weights.h5"]))
    return piece, _config_from(settings["config"], path)
