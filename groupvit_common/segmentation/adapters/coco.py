"""Results as COCO's annotations and detections (cocodataset.org/#format-data), whose masks are pycocotools'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from groupvit_common.errors import InputError
from groupvit_common.segmentation.adapters.common import box_of, category_of, class_names, library
from groupvit_common.segmentation.adapters.outlines import polygons
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.segments import By, Mask, segments

Form = Literal["rle", "polygons"]


def to_coco(
    results: Segmentation | Iterable[Segmentation],
    *,
    category_ids: Mapping[str, int] | None = None,
    form: Form = "rle",
    by: By = "label",
) -> dict[str, Any]:
    """Returns a COCO data set of one result or several: `images`, `annotations` and `categories`, ready for JSON.

    Args:
        category_ids: the number of each label; None: 1, 2, ... in the order in which labels come.
        form, by: as for `to_coco_annotations`.

    Raises:
        InputError: as `to_coco_annotations`.
    """
    data_set = CocoDataset(category_ids, form=form, by=by)
    for result in [results] if isinstance(results, Segmentation) else results:
        data_set.add(result)
    return data_set.to_dict()


class CocoDataset:
    """A COCO data set that grows result by result: `to_coco` for results that are not kept.

    Arguments and errors are those of `to_coco`.
    """

    def __init__(self, category_ids: Mapping[str, int] | None = None, *, form: Form = "rle", by: By = "label") -> None:
        _check_form(form)
        self._category_ids, self._is_open = dict(category_ids or {}), category_ids is None
        self._form, self._by = form, by
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._names: set[str] = set()

    def add(self, result: Segmentation) -> None:
        """Adds an image and its annotations. An image is called as its file, by its whole path if another one has the
        name; without a file by its number."""
        if self._is_open:
            for name in class_names(result):
                self._category_ids.setdefault(name, len(self._category_ids) + 1)
        number = len(self._images) + 1
        name = Path(result.source).name if result.source else f"{number}.png"
        name = str(result.source or name) if name in self._names else name
        self._names.add(name)
        width, height = result.image.size
        self._annotations += to_coco_annotations(
            result,
            image_id=number,
            category_ids=self._category_ids,
            first_id=len(self._annotations) + 1,
            form=self._form,
            by=self._by,
        )
        self._images.append({"id": number, "file_name": name, "width": width, "height": height})

    def to_dict(self) -> dict[str, Any]:
        """Returns `images`, `annotations` and `categories`, ready for JSON."""
        categories = [{"id": number, "name": name} for name, number in self._category_ids.items()]
        return {"images": self._images, "annotations": self._annotations, "categories": categories}


def to_coco_annotations(
    result: Segmentation,
    *,
    image_id: int = 1,
    category_ids: Mapping[str, int] | None = None,
    first_id: int = 1,
    form: Form = "rle",
    by: By = "label",
) -> list[dict[str, Any]]:
    """Returns an annotation for each label that has pixels, or for each group; the background has none.

    Args:
        image_id: of all of them. first_id: the first one's own `id`, from which they count.
        category_ids: the number of each label; None: 1, 2, ... in the order of the labels.
        form: "rle": run lengths, compressed. "polygons": outlines along the pixels' edges, which pycocotools turns
            into the same mask.
        by: as for `groupvit_common.segmentation.segments.segments`.

    Returns:
        Dictionaries of `id`, `image_id`, `category_id`, `segmentation`, `area` (pixels), `bbox` (left, top, width,
        height) and `iscrowd` (0), ready for JSON.

    Raises:
        InputError: no pycocotools for "rle", another form, or a label without a number.
    """
    _check_form(form)
    ids = _category_ids(result, category_ids)
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_of(segment.label, ids),
            "segmentation": _run_lengths(segment.mask) if form == "rle" else _flat_polygons(segment.mask),
            "area": int(np.count_nonzero(segment.mask)),
            "bbox": list(map(float, box_of(segment.mask))),
            "iscrowd": 0,
        }
        for number, segment in enumerate(segments(result, by=by), first_id)
    ]


def to_coco_results(
    result: Segmentation,
    *,
    image_id: int,
    category_ids: Mapping[str, int] | None = None,
    by: By = "label",
) -> list[dict[str, Any]]:
    """Returns detections as COCO's evaluation reads them (`COCO.loadRes`), with run lengths.

    Arguments and errors are those of `to_coco_annotations`. A result without scores has 1.0.
    """
    ids = _category_ids(result, category_ids)
    return [
        {
            "image_id": image_id,
            "category_id": category_of(segment.label, ids),
            "segmentation": _run_lengths(segment.mask),
            "bbox": list(map(float, box_of(segment.mask))),
            "score": 1.0 if segment.score is None else segment.score,
        }
        for segment in segments(result, by=by)
    ]


def _check_form(form: object) -> None:
    """Raises `InputError` for an unknown form, and for run lengths without pycocotools."""
    if form not in get_args(Form):
        raise InputError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if form == "rle":
        _mask_library()


def _mask_library() -> Any:
    return library("pycocotools.mask", "'groupvit[adapters]'")


def _category_ids(result: Segmentation, given: Mapping[str, int] | None) -> Mapping[str, int]:
    return {name: number for number, name in enumerate(class_names(result), 1)} if given is None else given


def _run_lengths(mask: Mask) -> dict[str, Any]:
    """Returns a mask as COCO's compressed run lengths; `counts` is text, as JSON needs it."""
    encoded = _mask_library().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _flat_polygons(mask: Mask) -> list[list[float]]:
    return [[float(value) for point in polygon for value in point] for polygon in polygons(mask)]
