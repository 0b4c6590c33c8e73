"""Which files are pictures: folders and patterns -> paths."""

from __future__ import annotations

from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path

from groupvit_common.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"})
"""What a folder's pictures are called. A file given by name may be called anything."""


def images_in(folder: str | Path) -> list[Path]:
    """The pictures of a folder, not of those inside it, by name. InputError if there are none."""
    try:
        found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    if not found:
        raise InputError(f"no pictures in the folder {folder}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def expand(names: Iterable[str]) -> list[Path]:
    """File names as they are, folders as their pictures, patterns (`*`, `?`, `[...]`, `**`) as what they match.

    A file that is not there is kept: whoever opens it says so. A path named twice counts once.
    InputError for a folder without pictures and a pattern without matches.
    """
    paths: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            paths += images_in(name)
        elif has_magic(name) and not Path(name).exists():
            found = glob(name, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            matches = sorted(Path(match) for match in found if Path(match).is_file())
            if not matches:
                raise InputError(f"no file matches {name}")
            paths += matches
        else:
            paths.append(Path(name))
    return list(dict.fromkeys(paths))
