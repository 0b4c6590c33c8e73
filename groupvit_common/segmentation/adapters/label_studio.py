"""Results as brush labels of Label Studio, whose masks are run lengths packed into bits.

The packing is that of thi.ng/rle-pack: the number of values (32 bits), the bits of a value less 1 (5), four lengths of
counters less 1 (4 each); then runs, each of one bit (1: all values are equal), two bits (which counter), the count less
1, and the value. The values are those of an RGBA image, row by row: 0 or 255, four for each pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from groupvit_common.errors import InputError
from groupvit_common.segmentation.result import Segmentation
from groupvit_common.segmentation.segments import By, Mask, check_result, segments

_VALUE_BITS = 8
_COUNTER_BITS = (3, 4, 8, 16)
_CHANNELS = 4
_MOST_VALUES = (1 << 32) - 1


def to_label_studio(
    result: Segmentation, *, from_name: str = "tag", to_name: str = "image", by: By = "label"
) -> list[dict[str, Any]]:
    """Returns the segments of a result as regions for the `result` of a prediction or annotation, ready for JSON.

    Args:
        from_name: the name of `<BrushLabels>` in the labelling configuration. to_name: that of `<Image>`.
        by: as for `groupvit_common.segmentation.segments.segments`.

    Raises:
        InputError: an image of more than a billion pixels, which the format cannot hold.
    """
    check_result(result)
    width, height = result.image.size
    return [
        {
            "id": f"groupvit-{number}",
            "from_name": from_name,
            "to_name": to_name,
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": packed(segment.mask), "brushlabels": [segment.label]},
            **({} if segment.score is None else {"score": segment.score}),
        }
        for number, segment in enumerate(segments(result, by=by), 1)
    ]


def packed(mask: Mask) -> list[int]:
    """Returns a mask `[H, W]` as the bytes of Label Studio's run lengths."""
    flat = mask.ravel()
    values = flat.size * _CHANNELS
    if values > _MOST_VALUES:
        raise InputError(f"a mask of {flat.size} pixels is too large for Label Studio's format: make the image smaller")
    header = f"{values:032b}{_VALUE_BITS - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in _COUNTER_BITS)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size)) * _CHANNELS
    runs = zip(flat[starts].tolist(), lengths.tolist(), strict=True)
    bits = header + "".join(part for is_set, length in runs for part in _run(255 if is_set else 0, length))
    ones = np.frombuffer(bits.encode("ascii"), np.uint8) == ord("1")
    packed_bits: list[int] = np.packbits(ones).tolist()
    return packed_bits


def _run(value: int, length: int) -> Iterator[str]:
    """Yields a run as bits, in pieces that its counters hold."""
    while length:
        piece = min(length, 1 << _COUNTER_BITS[-1])
        which = next(index for index, bits in enumerate(_COUNTER_BITS) if piece <= 1 << bits)
        yield f"1{which:02b}{piece - 1:0{_COUNTER_BITS[which]}b}{value:0{_VALUE_BITS}b}"
        length -= piece
