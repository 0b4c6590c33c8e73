"""HDF5 files of TensorFlow and Keras, read by h5py within bounds.

Values in other files, filters and shapes larger than the file are refused.
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.pickle_records import escaped
from conversion.source import DTYPES, Files, Info, Piece, check_names, is_scalar, parse_scalar
from groupvit_common.checkpoints.dtypes import numpy_dtype
from groupvit_common.errors import CheckpointError, InputError

# Where a .weights.h5 of this package keeps the model's configuration: an attribute of the root.
CONFIG_ATTRIBUTE = "groupvit_config"
MAX_CONFIG = 1 << 20
# What a Keras file has beside the weights: the optimizer's state, the states of random generators.
_KERAS_OTHER = re.compile(r"(^|/)(optimizer|seed_generator|random_generator|metrics)(_\d+)?/")
# Limits of a file: links, groups within one another, attributes, characters of a text.
# A model of the paper's size with its optimizer has 2,000 links, in 12 levels.
_MAX_OBJECTS, _MAX_GROUPS, _MAX_ATTRIBUTES, _MAX_TEXT = 20_000, 64, 1_000, 500


class Hdf5(NamedTuple):
    """An HDF5 file: its tensors, and the text of the configuration in it, if there is one."""

    piece: Piece
    config: str | None


class Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

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


def create(path: Path) -> Any:
    """Returns a new HDF5 file, open for writing.

    Raises:
        InputError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError("writing TensorFlow's and Keras's files takes h5py: pip install h5py") from error
    return h5py.File(path, "w")


@contextmanager
def _opened(path: Path, window: tuple[int, int] | None = None) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(f"{path} is an HDF5 file; reading it takes h5py: pip install h5py") from error
    # The library answers damage in many ways, its own failed assertions among them.
    try:
        with path.open("rb") if window is None else Window(path, *window) as raw, h5py.File(raw, "r") as file:
            yield file
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is truncated or damaged "
            f"({escaped((str(error).splitlines() or [''])[0], 100) or type(error).__name__}); "
            "download or copy it again"
        ) from error


def has_tensorflow_layout(files: Files) -> bool:
    """Returns whether HDF5 files are those of transformers, not of Keras 3.

    Raises:
        CheckpointError: they are of something else, or damaged.
    """
    path = files.paths[0]
    with _opened(path) as file:
        if "layer_names" in file.attrs or "layer_names0" in file.attrs:
            return True
        if not any("/vars/" in place for place, _ in _datasets(file, path)):
            raise CheckpointError(
                f"{path} is an HDF5 file, but neither transformers' tf_model.h5 nor Keras 3's .weights.h5"
            )
    return False


def read_hdf5(path: Path, rename: Callable[[str], str] = str, window: tuple[int, int] | None = None) -> Hdf5:
    """Reads names, shapes and dtypes of a file, and the configuration in it.

    Args:
        rename: place in the file -> foreign name.
        window: offset and number of bytes of the part of `path` that is the HDF5 file.

    Raises:
        CheckpointError: the file is damaged, or of something else, or beyond what models have.
    """
    size = path.stat().st_size
    infos: dict[str, Info] = {}
    places: dict[str, str] = {}
    others: dict[str, None] = {}
    total = 0
    with _opened(path, window) as file:
        for place, item in _datasets(file, path):
            other = _KERAS_OTHER.search(place)
            if other is not None:
                others[other[2]] = None
                continue
            info = _dataset_info(item, escaped(place, 80), path, size)
            total += info.elements * item.dtype.itemsize
            name = rename(place)
            if name in infos:
                raise CheckpointError(f"{path} holds {escaped(name, 80)} twice, at {places[name]} and {place}")
            infos[name], places[name] = info, place
        check_names(infos, path)
        if total > size:
            raise CheckpointError(f"{path} is damaged: its tensors would have {total} bytes, and the file has {size}")
        _check_attributes(file, path)
        config = _text_attribute(file, CONFIG_ATTRIBUTE, MAX_CONFIG, path)
        texts = {name: _text_attribute(file, name, _MAX_TEXT, path) for name in file.attrs if is_scalar(name)}
        scalars = {name: parse_scalar(name, text, path) for name, text in texts.items() if text is not None}
        infos |= {name: Info((), scalar.dtype.name) for name, scalar in scalars.items()}

    def value(name: str) -> np.ndarray:
        if name in scalars:
            return scalars[name]
        with _opened(path, window) as file:
            array = np.asarray(file[places[name]][()])
            return array.view(numpy_dtype(infos[name].dtype)) if array.dtype.kind == "V" else array

    return Hdf5(Piece(infos, value, tuple(others)), config)


def _check_attributes(file: Any, path: Path) -> None:
    import h5py

    if (count := h5py.h5a.get_num_attrs(file.id)) > _MAX_ATTRIBUTES:
        raise CheckpointError(f"{path} is refused: it has {count} attributes, and models have a few")


def _datasets(file: Any, path: Path, within: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all datasets of an HDF5 file and their names. Each group is entered once, so that links in a circle have
    an end.

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
                f"{path} is refused: it has more than {_MAX_OBJECTS} objects or {_MAX_GROUPS} groups in one another, "
                "as no model has"
            )
        below = []
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise CheckpointError(
                    f"{path} is refused: the values of {escaped(place + name, 80)} are in another file"
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
    """Returns shape and dtype of a dataset whose values are in the file, all of them."""
    if item.shape is None:
        raise CheckpointError(f"{path} holds {place} without values")
    item_type = item.dtype
    # Opaque types may name another type, of another size, as what they are.
    if item.id.get_type().get_size() != item_type.itemsize:
        raise CheckpointError(f"{path} is damaged: the type of {place} contradicts itself")
    # NumPy has no bfloat16, for which Keras writes pairs of bytes with a note.
    if item_type.kind == "V":
        noted = item_type.itemsize == 2 and item_type.fields is None
        dtype = _text_attribute(item, "dtype", _MAX_TEXT, path) if noted else None
        dtype = dtype if dtype == "bfloat16" else None
    else:
        dtype = item_type.name
    if dtype not in DTYPES:
        raise CheckpointError(f"{path} holds {place} as {escaped(str(item_type), 80)}, a type that is not read here")
    if item.external or item.is_virtual:
        raise CheckpointError(f"{path} is refused: the values of {place} are in another file")
    if item.id.get_create_plist().get_nfilters():
        raise CheckpointError(
            f"{path} holds {place} compressed or filtered, as neither transformers nor Keras writes it: unpack it with "
            "h5repack -f NONE"
        )
    stored = math.prod(item.shape) * item_type.itemsize
    chunk = math.prod(item.chunks) * item_type.itemsize if item.chunks else 0
    if max(stored, chunk) > size or item.id.get_storage_size() < stored:
        raise CheckpointError(f"{path} is damaged: {place} has fewer bytes than its shape {list(item.shape)} needs")
    return Info(tuple(item.shape), dtype)


def _text_attribute(item: Any, name: str, limit: int, path: Path) -> str | None:
    """Returns a text attribute, or None. Attributes of other types are not read: they may be of any size."""
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
