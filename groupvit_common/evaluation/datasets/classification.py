"""Pictures with one class each, for zero-shot classification: folders by class as ImageNet comes, or tar shards."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from groupvit_common.data.captions.settings import SourceSettings
from groupvit_common.data.captions.sources import Place, Shards
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.images import image_suffixes, load_image
from groupvit_common.preprocessing.prompts import parse_label
from groupvit_common.storage.files import is_hidden, read_text

CLASS_LISTS = ("classes.txt", "classnames.txt")
"""Words for the classes, one a line, in the order of their numbers or folders."""
SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt")
"""ImageNet's own lists: `n01440764 tench, Tinca tinca` a line."""

_LAYOUT = "{split}/CLASS/*.jpg (or CLASS/*.jpg) with words in classes.txt, or shards DIR/name-{{000..049}}.tar of .jpg and .cls"
_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)  # a compressed one is told to be so
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Picture:
    """One picture: `name`, where its bytes are, and its class."""

    name: str
    place: Place
    truth: int

    def image(self) -> Image.Image:
        """Upright, RGB. InputError if it cannot be read."""
        if self.place.size is None:
            return load_image(self.place.path)
        return load_image(io.BytesIO(_read(self.place)))


@dataclass(frozen=True, eq=False)
class ClassificationSet:
    """A set that is open. `words`: what each class is called; several may share a word, as two cranes of ImageNet do. `folders`: where
    every folder and image would be taken for the set's."""

    kind: str
    split: str
    words: tuple[str, ...]
    pictures: tuple[Picture, ...]
    folders: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Picture:
        return self.pictures[index]

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)


def open_classification_set(where: str, *, split: str | None = None, limit: int | None = None) -> ClassificationSet:
    """ImageNet's folders in `where`, or the shards that it means if it ends in `.tar`.

    Args:
        split: the folder below it, by default val where there is one.
        limit: so many pictures, spread evenly over the set.

    Raises:
        InputError: files are missing or not as they should be.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if not where:
        raise InputError("imagenet needs the folder or the shards it lies in: imagenet:DIR")
    made = _shards(where) if _TAR.search(where) else _folders(Path(os.path.expanduser(where)), split)  # noqa: PTH111 (`~user` of nobody stays)
    if limit is None or limit >= len(made):
        return made
    some = tuple(made.pictures[i * len(made) // limit] for i in range(limit))
    return replace(made, pictures=some)


def _folders(root: Path, split: str | None) -> ClassificationSet:
    layout = _LAYOUT.format(split=split or "val")
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: expected {layout}")
    if split is not None and not (root / split).is_dir():
        raise InputError(f"there is no folder {root / split}: expected {layout}")
    name = split or ("val" if (root / "val").is_dir() else "all")
    base = root if name == "all" else root / name
    folders = [path for path in _within(base) if path.is_dir()]
    pictures = [
        Picture(str(path.relative_to(base)), Place(str(path)), number)
        for number, folder in enumerate(folders)
        for path in _within(folder)
        if path.suffix.lower() in image_suffixes() and path.is_file()
    ]
    if not pictures:
        raise InputError(f"no pictures in the folders of {base}: expected {layout}")
    words = _words([folder.name for folder in folders], (base, root), layout)
    return ClassificationSet("imagenet", name, words, tuple(pictures), (base,))


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, by name, but for hidden files and folders."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _words(names: Sequence[str], folders: Sequence[Path], layout: str) -> tuple[str, ...]:
    """What classes with folders of these names are called."""
    listed = _listed(folders)
    if listed is not None:
        path, words = listed
        if len(words) != len(names):
            raise InputError(f"{path} names {len(words)} classes, but there are {len(names)} folders of classes")
        return words
    for path in (folder / file for folder in folders for file in SYNSETS):
        if path.is_file():
            pairs = [line.split(maxsplit=1) for line in _text(path).splitlines() if line.strip()]
            known = {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
            unknown = [name for name in names if name not in known]
            if unknown:
                raise InputError(f"{path} has no line for the folder {unknown[0]}")
            return tuple(known[name] for name in names)
    synsets = [name for name in names if _SYNSET.fullmatch(name)]
    if synsets:
        raise InputError(
            f"folders such as {synsets[0]} have no words to look for: put {CLASS_LISTS[0]} beside them, with the words of the "
            f"{len(names)} classes one a line, or ImageNet's {SYNSETS[0]}: expected {layout}"
        )
    return tuple(name.replace("_", " ") for name in names)


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


def _shards(pattern: str) -> ClassificationSet:
    layout = _LAYOUT.format(split="val")
    source = Shards(SourceSettings(kind="webdataset", path=pattern, caption_suffix="cls"))
    # A pattern may name folders too.
    folder = Path(source.shard(0)[0]).parent
    listed = _listed((folder,))
    if listed is None:
        raise InputError(f"there is no {CLASS_LISTS[0]} in {folder}, with words for the classes: expected {layout}")
    path, words = listed
    pictures = []
    seen: Counter[str] = Counter()
    for number in range(len(source)):
        unit = source.unit(number)
        if unit.fault is not None:
            raise InputError(f"{unit.where}: {unit.fault}")
        for entry in unit.entries:
            if entry.fault is not None:
                raise InputError(f"{entry.key} in {entry.where} cannot be used: {entry.fault}")
            if entry.image is None or not isinstance(entry.caption, Place):
                missing = "a picture" if entry.image is None else "its class, a .cls file"
                raise InputError(f"{entry.key} in {entry.where} lacks {missing}: expected {layout}")
            given = (
                _read(entry.caption._replace(size=min(entry.caption.size or 0, 20))).decode("ascii", "replace").strip()
            )
            if not given.isdecimal() or int(given) >= len(words):
                raise InputError(
                    f"{entry.key} in {entry.where} is of class {given!r}, but {path} names classes 0 to {len(words) - 1}"
                )
            name = f"{source.names[number]}/{entry.key}"
            # Shards of one name in other folders, or a key that a shard has twice: what was done is known by its name.
            seen[name] += 1
            name = f"{name}#{seen[name]}" if seen[name] > 1 else name
            pictures.append(Picture(name, entry.image, int(given)))
    if not pictures:
        raise InputError(f"no pictures in {pattern}: expected {layout}")
    return ClassificationSet("imagenet", "shards", words, tuple(pictures))


def _read(place: Place) -> bytes:
    try:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            return file.read(-1 if place.size is None else place.size)
    except OSError as error:
        raise InputError(f"cannot read {place.path}: {error.strerror or error}") from error
