"""Images and masks in files: the reader of the published layouts, and the checks that its files exist."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.registry import DatasetSpec
from groupvit_common.evaluation.datasets.segmentation import IGNORE, Bytes, Mask
from groupvit_common.preprocessing.images import GREY_STEP, stored_image, to_rgb
from groupvit_common.storage.names import is_hidden
from groupvit_common.storage.reading import read_text

_NO_CLASS = -1
_MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")
_NOT_INDICES = {
    "LA": "it has transparency beside the indices; save it without",
    "PA": "it has transparency beside the indices; save it without",
    "F": "fractions were put in the place of indices",
}


class MaskFiles:
    """Reads pairs of an image file and a mask file.

    Args:
        pairs: of each image its name, its path and its mask's path.
        file_values: class i is stored as `file_values[i]` in the masks.
        expected: the values of a mask in words, for messages.
        ignored: values that are no class, besides 255.
        palette: the colours that a mask's palette must have, `[256, 3]`; None: any.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, Path, Path]],
        file_values: Sequence[int],
        expected: str,
        *,
        ignored: Sequence[int] = (),
        palette: Bytes | None = None,
    ) -> None:
        self.names = tuple(name for name, _, _ in pairs)
        self.folders = tuple(dict.fromkeys(path.parent for _, *paths in pairs for path in paths))
        self._pairs, self._expected, self._palette = pairs, expected, palette
        self._table: NDArray[np.int16] = np.full(256, _NO_CLASS, np.int16)
        self._table[[IGNORE, *ignored]] = IGNORE
        self._table[list(file_values)] = np.arange(len(file_values))

    def image(self, index: int, max_pixels: int) -> Image.Image:
        return stored_rgb(self._pairs[index][1], max_pixels)

    def mask(self, index: int) -> Mask:
        path = self._pairs[index][2]
        image = stored_image(path)
        if image.mode not in _MASK_MODES:
            raise InputError(
                f"{path} must hold indices, one whole number a pixel (mode P or L), but it is an image of mode "
                f"{image.mode}: {_NOT_INDICES.get(image.mode, 'colours were put in the place of indices')}"
            )
        # Grey levels of few bits are spread over those of eight as they are read.
        values = np.asarray(image) // image.info[GREY_STEP] if GREY_STEP in image.info else np.asarray(image)
        colours = np.asarray(image.getpalette() or (), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        outside = values[(values < 0) | (values > IGNORE)] if values.dtype.itemsize > 1 else values[:0]
        if outside.size:
            raise InputError(f"{path} holds the value {outside.flat[0]}, but {self._expected}")
        values = values.astype(np.uint8)
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        unknown = present[self._table[present] == _NO_CLASS]
        if unknown.size:
            raise InputError(f"{path} holds the value {unknown[0]}, but {self._expected}")
        if colours is not None and self._palette is not None:
            self._check_palette(path, present, colours, self._palette)
        return self._table[values].astype(np.uint8)

    def _check_palette(self, path: Path, present: NDArray[np.intp], colours: Bytes, palette: Bytes) -> None:
        """Refuses a mask that a program stored with another palette, and so with other indices: its colours show it."""
        grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        shown = present[present < len(colours)]
        for expected in (palette, grey):
            if len(shown) == len(present) and (colours[shown] == expected[shown]).all():
                return
        raise InputError(
            f"{path} has a palette of its own: index {present[-1]} is not of the set's colour, so its indices cannot "
            "be trusted; take the original file"
        )

    def describe(self, index: int) -> str:
        return f"{self._pairs[index][1]} and {self._pairs[index][2]}"


def stored_rgb(path: Path, max_pixels: int) -> Image.Image:
    """Returns an image as its pixels are stored, as its mask's are."""
    return to_rgb(stored_image(path, max_pixels=max_pixels), str(path))


def find_root(given: Path, needed: str, spec: DatasetSpec, layout: str) -> Path:
    """Returns `given`, or the folder below it, that holds the folder `needed`."""
    for folder in (given, *(given / name for name in spec.parents)):
        if (folder / needed).is_dir():
            return folder
    places = " or ".join([str(given), *(f"{given}/{name}" for name in spec.parents)])
    raise InputError(f"there is no folder {needed} in {places}: expected {layout}")


def read_list(path: Path, layout: str) -> list[str]:
    """Returns the names in a split's list of images, one a line."""
    try:
        names = [composed(line.strip()) for line in read_text(path).split("\n") if line.strip()]
    except CheckpointError as error:
        if path.exists():
            raise InputError(f"cannot read the list: {error}") from error
        others = sorted(other.stem for other in path.parent.glob("*.txt") if not is_hidden(other.name))
        found = f"there are {', '.join(others)}" if others else "there are no lists"
        raise InputError(f"there is no list {path} ({found}): expected {layout}") from error
    if not names:
        raise InputError(f"the list {path} is empty")
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"the list {path} has the name {repeated} twice")
    for name in names:
        # Label maps are written under these names.
        if Path(name).is_absolute() or ".." in Path(name).parts or any(unicodedata.category(c) == "Cc" for c in name):
            raise InputError(f"the list {path} has {name!r}, which is no name of an image within the set")
    return names


def check_all_exist(paths: Sequence[Path], layout: str) -> None:
    """Raises `InputError` unless all files exist."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in listed:
            listed[path.parent] = {entry.name for entry in os.scandir(path.parent)} if path.parent.is_dir() else set()
        if path.name not in listed[path.parent]:
            missing.append(path)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} files are missing, the first is {missing[0]}: expected {layout}"
        )


def find_files(folder: Path, pattern: str, layout: str) -> list[Path]:
    """Returns the visible files of a pattern in a folder, by name; there must be some."""
    found = visible_files(folder, pattern)
    if not found:
        fault = f"no {pattern} in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        raise InputError(f"{fault}: expected {layout}")
    return found


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a pattern in a folder, by name, without hidden ones; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(pattern) if not any(map(is_hidden, path.relative_to(folder).parts)))


def files_by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Returns the files with one of these suffixes by their stems. Raises `InputError` where two share one."""
    found: dict[str, Path] = {}
    for path in visible_files(folder, "*"):
        if path.suffix.lower() in suffixes and path.is_file():
            other = found.setdefault(composed(path.stem), path)
            if other != path:
                raise InputError(
                    f"{other} and {path.name} have one name but for the suffix, so that it is open which of them a "
                    "mask or name is of: rename one, or take it out"
                )
    return found


def composed(name: str) -> str:
    """Returns a name in the form that is compared: macOS takes letters and their accents apart in file names."""
    return unicodedata.normalize("NFC", name)
