"""COCO's `instances_*.json`: objects -> masks of class indices.

Incomplete annotations are left out and reported once, with their number.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import is_number, is_whole_number
from groupvit_common.storage.json_text import parse_json
from groupvit_common.storage.reading import read_bytes

_MAX_BYTES = 4 << 30
_MAX_PIXELS = 1 << 28  # of an image
_FURTHEST = 1 << 16  # of an outline's points from the origin, in pixels

Number = int | str
"""The id of an image or category."""


class CocoImage(NamedTuple):
    """One image of the file: its unique name, its path within the folder of images, and its size in pixels."""

    name: str
    path: str
    height: int
    width: int


class _Object(NamedTuple):
    where: str  # the annotation, for messages
    value: int
    outline: Any


class Instances:
    """Paints the masks of a file's images from polygons and run lengths, smaller objects over larger ones.

    Args:
        classes: names in the order of their values in a mask.

    Raises:
        InputError: pycocotools is missing, the file is no file of instances, or has objects of other classes.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        try:
            from pycocotools import mask as coco
        except ImportError as error:
            raise InputError(
                f"masks from {path.name} need the package pycocotools: pip install 'groupvit[evaluate]'"
            ) from error
        self._coco, self._path = coco, path
        try:
            record = parse_json(read_bytes(path, _MAX_BYTES), path)
        except CheckpointError as error:
            raise InputError(str(error)) from error
        for key in ("categories", "images", "annotations"):
            if not isinstance(record.get(key), list) or not all(isinstance(each, dict) for each in record[key]):
                raise self._wrong(f"{key!r} must be a list of objects")
        found = self._read_images(record["images"])
        self.images = tuple(found.values())
        objects = self._read_objects(record["annotations"], self._read_classes(record["categories"], classes), found)
        self._objects = tuple(objects[number] for number in found)

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Returns the mask `[H, W]` of an image; 0 where there is no object. `InputError` for a malformed outline."""
        image = self.images[index]
        mask = np.zeros((image.height, image.width), np.uint8)
        for each in self._objects[index]:
            mask[self._inside(each, image)] = each.value
        return mask

    def _wrong(self, cause: str) -> InputError:
        return InputError(f"{self._path} is not COCO's file of instances: {cause}")

    def _read_images(self, images: Sequence[Mapping[str, Any]]) -> dict[Number, CocoImage]:
        """Returns the images by their ids, in the order of these."""
        found: dict[Number, CocoImage] = {}
        for place, image in enumerate(images):
            number, path, height, width = (image.get(key) for key in ("id", "file_name", "height", "width"))
            if not _is_number(number) or not isinstance(path, str) or not path:
                raise self._wrong(f"image {place} of the list needs 'id' and 'file_name'")
            if not (
                is_whole_number(height) and is_whole_number(width) and 0 < height * width <= _MAX_PIXELS and height > 0
            ):
                raise self._wrong(f"image {path} needs 'height' and 'width' in pixels, got {height!r} and {width!r}")
            if number in found:
                raise self._wrong(f"the images {found[number].path} and {path} both have the id {number!r}")
            found[number] = CocoImage("", path, height, width)
        names = _names([(str(number), image.path) for number, image in found.items()])
        named = {number: image._replace(name=name) for (number, image), name in zip(found.items(), names, strict=True)}
        return dict(sorted(named.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))

    def _read_classes(self, categories: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[Number, int | str]:
        """Returns the value of each category in a mask; for one that is none of the set's its name."""
        values = {name.casefold(): value for value, name in enumerate(classes)}
        found: dict[Number, int | str] = {}
        for place, category in enumerate(categories):
            number, name = category.get("id"), category.get("name")
            if not _is_number(number) or not isinstance(name, str):
                raise self._wrong(f"category {place} of the list needs 'id' and 'name'")
            value = values.get(name.strip().casefold(), name)
            if found.get(number, value) != value:
                raise self._wrong(f"two categories have the id {number!r}")
            found[number] = value
        return found

    def _read_objects(
        self,
        annotations: Sequence[Mapping[str, Any]],
        values: Mapping[Number, int | str],
        images: Mapping[Number, CocoImage],
    ) -> dict[Number, list[_Object]]:
        """Returns the objects of each image in the order in which they are painted."""
        objects_of: dict[Number, list[tuple[bool, float, _Object]]] = {number: [] for number in images}
        left_out: Counter[str] = Counter()
        for place, each in enumerate(annotations):
            has_id = _is_number(each.get("id"))
            where = f"the annotation {each['id']!r}" if has_id else f"annotation {place} of the list"
            number, category = each.get("image_id"), each.get("category_id")
            outline = _outline(each.get("segmentation"))
            if not _is_number(number) or number not in objects_of:
                left_out["of images that the file does not list"] += 1
            elif outline is None:
                left_out["without an outline"] += 1
            else:
                value = values.get(category) if _is_number(category) else None
                if value is None:
                    raise self._wrong(f"{where} is of the category {category!r}, which the file does not list")
                if isinstance(value, str):
                    raise self._wrong(
                        f"{where} is of the category {value!r}, which is none of the 80 objects; for classes of "
                        "your own make a set folder:DIR"
                    )
                area = each["area"] if is_number(each.get("area")) else _area(outline)
                objects_of[number].append((not each.get("iscrowd"), -area, _Object(where, value, outline)))
        if annotations and left_out["of images that the file does not list"] == len(annotations):
            raise self._wrong("none of its annotations is of an image that it lists")
        if left_out:
            parts = ", ".join(f"{count} {cause}" for cause, count in left_out.items())
            warnings.warn(f"{self._path}: left out annotations {parts} (of {len(annotations)})", stacklevel=2)
        return {
            number: [found for *_, found in sorted(objects, key=lambda entry: entry[:2])]
            for number, objects in objects_of.items()
        }

    def _inside(self, each: _Object, image: CocoImage) -> NDArray[np.bool_]:
        """Returns the pixels inside an outline, `[H, W]`: polygons, or run lengths as a list or a string."""
        outline, shape = each.outline, [image.height, image.width]
        if isinstance(outline, list):
            for polygon in outline:
                fits = all(isinstance(point, int | float) and abs(point) < _FURTHEST for point in polygon)
                if len(polygon) % 2 or not fits:
                    raise self._unreadable(each, image, "its polygon is not a list of pairs of pixels")
            outline = self._coco.merge(self._coco.frPyObjects(outline, *shape))
            outline = {**outline, "counts": outline["counts"].decode()}
        size, counts = outline.get("size"), outline.get("counts")
        if size != shape:
            raise self._unreadable(each, image, f"its run lengths are of {size!r} rows and columns, not {shape}")
        if isinstance(counts, str):
            counts = _unpacked(counts)
        if (
            not isinstance(counts, list)
            or not all(is_whole_number(count) and count >= 0 for count in counts)
            or sum(counts) != image.height * image.width
        ):
            raise self._unreadable(each, image, "its run lengths do not add up to the image's pixels")
        # Outside and inside in turn, down the columns.
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return inside.reshape(image.width, image.height).T

    def _unreadable(self, each: _Object, image: CocoImage, cause: str) -> InputError:
        return InputError(f"{image.path} in {self._path}: {each.where} has an outline that cannot be read: {cause}")


def _is_number(value: Any) -> TypeGuard[Number]:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _outline(given: Any) -> Any:
    """Returns polygons of at least three points, or run lengths; None where there is none. Faults of an
    outline are reported when it is painted."""
    if isinstance(given, dict):
        return given if given.get("counts") else None
    if not isinstance(given, list):
        return None
    # Some tools write a single polygon without the list around it.
    polygons = [given] if given and not any(isinstance(part, list) for part in given) else given
    # Four numbers would be taken for a box.
    polygons = [polygon for polygon in polygons if isinstance(polygon, list) and len(polygon) >= 6]
    return polygons or None


def _area(outline: Any) -> float:
    """Returns the number of pixels in an outline, for the order of painting; 0 for one that cannot be read."""
    try:
        if isinstance(outline, dict):
            counts = outline["counts"]
            return float(sum((_unpacked(counts) if isinstance(counts, str) else counts)[1::2]))
        return sum(
            abs(sum(a * d - c * b for (a, b), (c, d) in pairwise([*points, points[0]]))) / 2
            for points in (list(zip(polygon[::2], polygon[1::2], strict=True)) for polygon in outline)
        )
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0.0


def _unpacked(text: str) -> list[int]:
    """Returns the run lengths of COCO's compact text: five bits a character, the lowest first, each but the first
    three as the difference to the one before the last."""
    counts: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << (shift - 4)
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts if shift == 0 else []


def _names(images: Sequence[tuple[str, str]]) -> list[str]:
    """Returns unique names, given ids and paths of images: the files', without folder and suffix where possible."""
    paths = [
        PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", ".."))) for _, path in images
    ]
    for names in ([path.stem for path in paths], [path.with_suffix("").as_posix() for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{path.with_suffix('').as_posix()}-{number}" for path, (number, _) in zip(paths, images, strict=True)]
