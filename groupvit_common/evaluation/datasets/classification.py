"""Images with one class each, for zero-shot classification: folders by class as ImageNet comes, or tar shards."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from groupvit_common.data.captions.settings import SourceSettings
from groupvit_common.data.captions.sources import ByteRange, Shards
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.registry import IMAGENET
from groupvit_common.preprocessing.images import MAX_PIXELS, image_suffixes, load_image
from groupvit_common.preprocessing.prompts import parse_label
from groupvit_common.storage.names import is_hidden
from groupvit_common.storage.reading import read_text

CLASS_LISTS = ("classes.txt", "classnames.txt")
"""Names of the classes, one a line, in the order of their numbers or folders."""
SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt")
"""ImageNet's own lists: `n01440764 tench, Tinca tinca` a line."""

_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)  # a compressed one is reported as such
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassifiedImage:
    """One image of a set: its name, where its bytes are, and the index of its class."""

    name: str
    place: ByteRange
    truth: int
    max_pixels: int = MAX_PIXELS

    def image(self) -> Image.Image:
        """Returns the image, upright, RGB. Raises `InputError` if it cannot be read, or has more than `max_pixels`."""
        source = self.place.path if self.place.size is None else io.BytesIO(_read(self.place))
        return load_image(source, max_pixels=self.max_pixels)


@dataclass(frozen=True, eq=False)
class ClassificationSet:
    """An open classification set.

    Attributes:
        kind: its name before the colon.
        split: the part of the set.
        words: the name of each class; several classes may share one, as two cranes of ImageNet do.
        images: all images.
        folders: the folders of the set, in which other folders and images would be taken for its own.
    """

    kind: str
    split: str
    words: tuple[str, ...]
    images: tuple[ClassifiedImage, ...]
    folders: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ClassifiedImage:
        return self.images[index]

    def __iter__(self) -> Iterator[ClassifiedImage]:
        return iter(self.images)


def open_classification_set(
    where: str, *, split: str | None = None, limit: int | None = None, max_pixels: int = MAX_PIXELS
) -> ClassificationSet:
    """Opens ImageNet's folders in `where`, or the shards that it means if it ends in `.tar`.

    Args:
        split: the folder below it, by default val where there is one.
        limit: the number of images, spread evenly over the set.
        max_pixels: images of more pixels are refused before they are decoded.

    Raises:
        InputError: files are missing or malformed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if not where:
        raise InputError(f"{IMAGENET.name} needs the folder or the shards it lies in: {IMAGENET.usage}")
    opened = (
        _open_shards(where) if _TAR.search(where) else _open_folders(Path(os.path.expanduser(where)), split)  # noqa: PTH111 (`~user` of nobody stays)
    )
    count = len(opened) if limit is None else min(limit, len(opened))
    images = (opened.images[i * len(opened) // count] for i in range(count))
    return replace(opened, images=tuple(replace(image, max_pixels=max_pixels) for image in images))


def _open_folders(root: Path, split: str | None) -> ClassificationSet:
    layout = IMAGENET.layout_of(split or "val")
    for folder in (root, *([] if split is None else [root / split])):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: expected {layout}")
    name = split or ("val" if (root / "val").is_dir() else "all")
    base = root if name == "all" else root / name
    folders = [path for path in _visible(base) if path.is_dir()]
    images = [
        ClassifiedImage(str(path.relative_to(base)), ByteRange(str(path)), number)
        for number, folder in enumerate(folders)
        for path in _visible(folder)
        if path.suffix.lower() in image_suffixes() and path.is_file()
    ]
    if not images:
        raise InputError(f"no images in the folders of {base}: expected {layout}")
    words = _class_names([folder.name for folder in folders], (base, root), layout)
    return ClassificationSet(IMAGENET.name, name, words, tuple(images), (base,))


def _visible(folder: Path) -> list[Path]:
    """Returns the files and folders in a folder, by name, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _class_names(folder_names: Sequence[str], folders: Sequence[Path], layout: str) -> tuple[str, ...]:
    """Returns the names of classes, given those of their folders."""
    listed = _listed(folders)
    if listed is not None:
        path, words = listed
        if len(words) != len(folder_names):
            raise InputError(f"{path} names {len(words)} classes, but there are {len(folder_names)} folders of classes")
        return words
    for path in (folder / file for folder in folders for file in SYNSETS):
        if path.is_file():
            pairs = [line.split(maxsplit=1) for line in _text(path).splitlines() if line.strip()]
            known = {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
            unknown = [name for name in folder_names if name not in known]
            if unknown:
                raise InputError(f"{path} has no line for the folder {unknown[0]}")
            return tuple(known[name] for name in folder_names)
    synsets = [name for name in folder_names if _SYNSET.fullmatch(name)]
    if synsets:
        raise InputError(
            f"folders such as {synsets[0]} have no words to look for: put {CLASS_LISTS[0]} beside them, with the words "
            f"of the {len(folder_names)} classes one a line, or ImageNet's {SYNSETS[0]}: expected {layout}"
        )
    return tuple(name.replace("_", " ") for name in folder_names)


def _listed(folders: Sequence[Path]) -> tuple[Path, tuple[str, ...]] | None:
    for path in (folder / file for folder in folders for file in CLASS_LISTS):
        if path.is_file():
            labels = [parse_label(line) for line in _text(path).splitlines()]
            return path, tuple(label.name for label in labels if label is not None)
    return None


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except CheckpointError as error:
        raise InputError(f"cannot read the classes: {error}") from error


def _open_shards(pattern: str) -> ClassificationSet:
    layout = IMAGENET.layout_of("val")
    source = Shards(SourceSettings(kind="webdataset", path=pattern, caption_suffix="cls"))
    # A pattern may name folders too.
    folder = Path(source.shard(0)[0]).parent
    listed = _listed((folder,))
    if listed is None:
        raise InputError(f"there is no {CLASS_LISTS[0]} in {folder}, with words for the classes: expected {layout}")
    path, words = listed
    images = []
    seen: Counter[str] = Counter()
    for number in range(len(source)):
        unit = source.unit(number)
        if unit.fault is not None:
            raise InputError(f"{unit.where}: {unit.fault}")
        for entry in unit.entries:
            if entry.fault is not None:
                raise InputError(f"{entry.key} in {entry.where} cannot be used: {entry.fault}")
            if entry.image is None or not isinstance(entry.caption, ByteRange):
                missing = "an image" if entry.image is None else "its class, a .cls file"
                raise InputError(f"{entry.key} in {entry.where} lacks {missing}: expected {layout}")
            most = entry.caption._replace(size=min(entry.caption.size or 0, 20))
            given = _read(most).decode("ascii", "replace").strip()
            if not given.isdecimal() or int(given) >= len(words):
                raise InputError(
                    f"{entry.key} in {entry.where} is of class {given!r}, "
                    f"but {path} names classes 0 to {len(words) - 1}"
                )
            name = f"{source.names[number]}/{entry.key}"
            # Shards of one name in other folders, or a key that a shard has twice: an image is known by its name.
            seen[name] += 1
            name = f"{name}#{seen[name]}" if seen[name] > 1 else name
            images.append(ClassifiedImage(name, entry.image, int(given)))
    if not images:
        raise InputError(f"no images in {pattern}: expected {layout}")
    return ClassificationSet(IMAGENET.name, "shards", words, tuple(images))


def _read(place: ByteRange) -> bytes:
    try:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            return file.read(-1 if place.size is None else place.size)
    except OSError as error:
        raise InputError(f"cannot read {place.path}: {error.strerror or error}") from error
