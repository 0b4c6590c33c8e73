"""Results as an API answers them: PNGs, masks, numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.drawing.canvas import index_image
from groupvit_common.drawing.palette import palette
from groupvit_common.segmentation.adapters.outlines import polygons
from groupvit_common.segmentation.encoded import EncodedImage
from groupvit_common.segmentation.label_maps import Indices
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.segments import Mask
from groupvit_common.segmentation.windows import interpolated, linear_taps, strips

# A compression that takes a few milliseconds: answers cross a wire once.
_LEVEL = 1


def png(image: Image.Image) -> str:
    """Returns an image as the base64 text of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_LEVEL, **({"bits": 8} if image.mode == "P" else {}))
    return base64.b64encode(file.getvalue()).decode("ascii")


def grey_png(values: npt.NDArray[Any]) -> str:
    """Returns `[H, W]`, uint8 or uint16, as a grey PNG."""
    return png(Image.fromarray(values))


def unit_png(values: Floats) -> str:
    """Returns `[H, W]`, 0 to 1, as a grey PNG of 8 bits."""
    return grey_png((values * 255 + 0.5).astype(np.uint8))


def score_map(result: Segmentation, encoded: EncodedImage, options: SegmentationOptions) -> Floats:
    """Returns the score `[H, W]`, 0 to 1, of each pixel's label: that of its group, or with soft assignment that of
    all groups, weighted by their parts of the pixel.

    With windows it is the group's. A background that no label names has 0.
    """
    assert result.group_scores is not None
    if options.assignment != "soft" or options.window is not None:
        return np.asarray(result.group_scores[result.group_map, result.label_map])
    grouping = encoded.views[0].block_maps[-1][0]
    present = np.unique(result.label_map)
    place = np.zeros(len(result.labels), np.int64)
    place[present] = np.arange(len(present))
    maps = np.einsum("gl,ghw->lhw", result.group_scores[:, present], grouping)
    height, width = result.label_map.shape
    wide = interpolated(maps, 2, linear_taps(maps.shape[2], width))
    above, below, fraction = linear_taps(maps.shape[1], height)
    down = fraction.astype(maps.dtype)[:, None]
    scores = np.empty((height, width), maps.dtype)
    # Only the pixel's own label is interpolated.
    for rows in strips(8, (height, width)):
        own = place[result.label_map[rows]]
        own *= wide.shape[1] * width
        own += np.arange(width)
        first, second = (wide.take(own + width * each[rows, None]) for each in (above, below))
        second -= first
        second *= down[rows]
        np.add(first, second, out=scores[rows])
    return np.clip(scores, 0, 1, out=scores)


def label_answers(result: Segmentation, masks: str) -> list[dict[str, Any]]:
    """Returns the labels of a result, with masks of those that have pixels."""
    answers = []
    for index, (score, colour) in enumerate(zip(result.scores, hex_colours(result.colours()), strict=True)):
        answer: dict[str, Any] = {
            "index": index,
            "name": score.name,
            "colour": colour,
            "probability": score.probability,
            "pixel_share": score.pixel_share,
        }
        if masks != "none":
            answer["mask"] = _mask(result.label_map == index, masks) if score.pixel_share else None
        answers.append(answer)
    return answers


def group_answers(result: Segmentation) -> list[dict[str, Any]]:
    """Returns the groups of a result."""
    assert result.group_scores is not None
    shares = np.bincount(result.group_map.ravel(), minlength=len(result.group_labels)) / result.group_map.size
    rounded = np.round(result.group_scores.astype(np.float64), 5).tolist()
    return [
        {"index": index, "label": label, "scores": scores, "pixel_share": share}
        for index, (label, scores, share) in enumerate(zip(result.group_labels, rounded, shares.tolist(), strict=True))
    ]


def similarity_answers(labels: Sequence[str], similarity: Floats) -> list[dict[str, Any]]:
    """Returns similarities `[L, h, w]` as one grey image a label, each from its least to its largest value."""
    answers = []
    for name, values in zip(labels, similarity, strict=True):
        low, high = float(values.min()), float(values.max())
        spread = (values - low) / (high - low) if high > low else np.zeros_like(values)
        answers.append({"label": name, "map": unit_png(spread), "low": low, "high": high})
    return answers


def label_png(result: Segmentation) -> str:
    """Returns the label map with the labels' colours as its palette."""
    return png(index_image(result.label_map, result.colours()))


def hex_colours(colours: npt.NDArray[np.uint8]) -> list[str]:
    """Returns colours `[N, 3]` as "#rrggbb"."""
    return [f"#{bytes(colour).hex()}" for colour in colours]


def group_palette(count: int) -> list[str]:
    """Returns colours of groups."""
    return hex_colours(palette(count))


def _mask(mask: Mask, form: str) -> Any:
    if form == "png":
        return png(Image.fromarray(mask))
    if form == "polygons":
        return [[float(value) for point in polygon for value in point] for polygon in polygons(mask)]
    return run_lengths(mask)


def run_lengths(mask: Mask) -> dict[str, Any]:
    """Returns a mask as COCO's compressed run lengths: `size` (rows, columns) and `counts`.

    Runs go down the columns, the first one outside the mask. From the third on, a run is written as its difference to
    the one before the last; numbers come in groups of 5 bits, the lowest first, a sixth bit tells that more follow, and
    48 is added to make a character (pycocotools, `rleToString`).
    """
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    text = bytearray()
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        while True:
            bits = value & 0x1F
            value >>= 5
            # The highest bit that is written is the sign.
            more = value != (-1 if bits & 0x10 else 0)
            text.append(48 + bits + (0x20 if more else 0))
            if not more:
                break
    return {"size": list(mask.shape), "counts": text.decode("ascii")}


def stage_maps(maps: Sequence[Indices]) -> list[str]:
    """Returns group maps as PNGs."""
    return [grey_png(each) for each in maps]
