"""Habits of transformers' image processors: a model's outputs -> label maps and segments.

What these methods label is `segmentation_logits`, as transformers' GroupViT computes them. `Segmenter` does more:
prompts, photos of any size, a background.

Everything is computed in NumPy, so that both backends give the same maps; they come back as the kind of tensor that
came in. Letters: B images, N texts, G groups, P = h*w patches, H W pixels.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from groupvit_common.errors import InputError

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]
Size = tuple[int, int]

# Values of enlarged maps held at once (32 MB in float32): a photo's maps of all labels would be gigabytes.
_VALUES_AT_ONCE = 1 << 23
# Differences between groups' shares that are smaller, relative to the largest, are lost in the rounding of logits: in
# single and in half precision.
_SMALLEST_PART, _SMALLEST_PART_OF_HALF = 1e-5, 1e-2


class PostProcessing:
    """`post_process_*_segmentation` of an image processor, or of a processor that has one."""

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None) -> list[Any]:
        """Returns the index of the best text for each pixel: for each image `[H, W]`, int64.

        Args:
            outputs: of a model called with `output_segmentation=True`, in any framework or NumPy: a record or mapping
                with `segmentation_logits` `[B, N, H, W]` (or `logits`, as other models call them).
            target_sizes: (height, width) of each image, to which its logits are resized first (bilinear, half-pixel
                centres); None: the size of the logits.

        Raises:
            InputError: outputs without such logits, or sizes that are not one pair for each image.
        """
        logits = _segmentation_logits(outputs)
        sizes = _sizes(target_sizes, logits.shape)
        return [_like(_largest(each, size), _of(outputs)) for each, size in zip(_array(logits), sizes, strict=True)]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.0,
        mask_threshold: float = 0.0,
        overlap_mask_area_threshold: float = 0.0,
        target_sizes: Any = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """Returns the groups of each image as segments: a pixel belongs to its largest group.

        Args:
            outputs: of a model called with `output_segmentation=True`.
            threshold: segments of a lower score are left out, and their pixels belong to none.
            mask_threshold, overlap_mask_area_threshold: also left out are groups that nowhere have this share of a
                pixel, and those that own no larger part than this of the pixels in which they have such a share.
            target_sizes: (height, width) of each image; None: the size of the logits.
            return_binary_maps: `segmentation` is one mask for each segment, `[segments, H, W]` of 0 and 1.

        Returns:
            For each image `segmentation`, `[H, W]` int32 of ids, -1 for no segment, and `segments_info`: for each
            segment its `id` (from 0), `label_id` (the index of the text that its group is most like), `score` (the
            probability of that text, softmax over texts) and `was_fused`, False.

        Raises:
            InputError: outputs without groups or logits, sizes that are not one pair for each image, or a threshold
                that is not between 0 and 1.
        """
        if return_coco_annotation:
            raise InputError(
                "return_coco_annotation=True is not supported: make COCO annotations of a Segmenter's result with "
                "groupvit_common.segmentation.adapters.to_coco_annotations"
            )
        thresholds = _thresholds(threshold, mask_threshold, overlap_mask_area_threshold)
        results = []
        for found in _found(outputs, thresholds, target_sizes):
            segmentation = np.full(found.owner.shape, -1, np.int32)
            for number, (group, _, _) in enumerate(found.segments):
                segmentation[found.owner == group] = number
            info = [_info(number, segment) for number, segment in enumerate(found.segments)]
            if return_binary_maps and info:
                segmentation = np.stack([segmentation == each["id"] for each in info]).astype(np.int32)
            results.append({"segmentation": _like(segmentation, _of(outputs)), "segments_info": info})
        return results

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.0,
        mask_threshold: float = 0.0,
        overlap_mask_area_threshold: float = 0.0,
        label_ids_to_fuse: Any = None,
        target_sizes: Any = None,
    ) -> list[dict[str, Any]]:
        """Returns the groups of each image as segments, those of some labels as one.

        Arguments, results and errors are those of `post_process_instance_segmentation`, except:

        Args:
            label_ids_to_fuse: labels whose groups are one segment, with the largest of their scores.

        Returns:
            The same with ids from 1, 0 for no segment; `was_fused` is True for the labels in `label_ids_to_fuse`.
        """
        thresholds = _thresholds(threshold, mask_threshold, overlap_mask_area_threshold)
        fused = {int(label) for label in label_ids_to_fuse or ()}
        results = []
        for found in _found(outputs, thresholds, target_sizes):
            segmentation = np.zeros(found.owner.shape, np.int32)
            info: list[dict[str, Any]] = []
            known: dict[int, dict[str, Any]] = {}
            for segment in found.segments:
                entry = known.get(segment.label_id)
                if entry is None:
                    entry = _info(len(info) + 1, segment, segment.label_id in fused)
                    info.append(entry)
                    if entry["was_fused"]:
                        known[segment.label_id] = entry
                entry["score"] = max(entry["score"], round(segment.score, 6))
                segmentation[found.owner == segment.group] = entry["id"]
            results.append({"segmentation": _like(segmentation, _of(outputs)), "segments_info": info})
        return results


class _Segment(NamedTuple):
    group: int
    label_id: int
    score: float


class _Found(NamedTuple):
    """Segments of one image, and the group `[H, W]` that owns each pixel."""

    segments: list[_Segment]
    owner: Integers


def _info(number: int, segment: _Segment, was_fused: bool = False) -> dict[str, Any]:
    return {
        "id": number,
        "label_id": segment.label_id,
        "was_fused": was_fused,
        "score": round(segment.score, 6),
    }


def _found(outputs: Any, thresholds: tuple[float, float, float], target_sizes: Any) -> Iterator[_Found]:
    """Yields the segments of each image."""
    threshold, mask_threshold, overlap = thresholds
    logits = _segmentation_logits(outputs)
    sizes = _sizes(target_sizes, logits.shape)
    shares = _group_shares(outputs, logits.shape)
    scores = _group_scores(outputs, _array(logits), shares)
    for share, score, size in zip(shares, scores, sizes, strict=True):
        groups = len(share)
        owned, reached, owner = np.zeros(groups, np.int64), np.zeros(groups, np.int64), np.empty(size, np.int64)
        for rows, part in _resized(share, size):
            owner[rows] = part.argmax(axis=0)
            owned += np.bincount(owner[rows].ravel(), minlength=groups)
            reached += (part >= mask_threshold).sum(axis=(1, 2))
        segments = [
            _Segment(group, int(score[group].argmax()), float(score[group].max()))
            for group in range(groups)
            if owned[group] and reached[group] and owned[group] > overlap * reached[group]
        ]
        yield _Found([segment for segment in segments if segment.score >= threshold], owner)


def _group_shares(outputs: Any, shape: Sequence[int]) -> Floats:
    """Returns the share of each group in each patch, `[B, G, h, w]`, from the assignments of all grouping blocks."""
    attentions = _field(_field(outputs, "vision_model_output"), "attentions")
    if not attentions:
        raise InputError(
            "these outputs have no groups (vision_model_output.attentions): call the model with "
            "output_segmentation=True"
        )
    product = _array(attentions[0])
    for assignment in attentions[1:]:
        product = _array(assignment) @ product
    height, width = int(shape[-2]), int(shape[-1])
    patch = math.isqrt(height * width // product.shape[-1])
    return product.reshape(*product.shape[:2], height // patch, width // patch)


def _group_scores(outputs: Any, logits: Floats, shares: Floats) -> Floats:
    """Returns the probability of each text for each group, `[B, G, N]`.

    Logits are the similarities of groups and texts, spread over the pixels by the groups' shares: a linear map, which
    least squares undo. The temperature is in them twice, as in transformers, and in `logits_per_text` once.
    """
    cosine = _array(_field(outputs, "text_embeds")) @ _array(_field(outputs, "image_embeds")).T
    scale = float((cosine * _array(_field(outputs, "logits_per_text"))).sum() / (cosine * cosine).sum())
    smallest = _SMALLEST_PART_OF_HALF if "16" in str(_of(outputs).dtype) else _SMALLEST_PART
    size, patch = (logits.shape[2], logits.shape[3]), logits.shape[2] // shares.shape[2]
    similarities = []
    for share, each in zip(shares, logits, strict=True):
        # One pixel of each patch: as many equations as there are patches.
        spread = [part[:, _middles(rows, patch), patch // 2 :: patch] for rows, part in _resized(share, size)]
        equations = np.concatenate(spread, axis=1).reshape(len(share), -1).T.astype(np.float64)
        known = each[:, patch // 2 :: patch, patch // 2 :: patch].reshape(len(each), -1).T
        similarities.append(np.linalg.lstsq(equations, known, rcond=smallest)[0] / scale)
    odds = np.stack(similarities)
    odds = np.exp(odds - odds.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def _middles(rows: slice, patch: int) -> Integers:
    """Returns which of these rows are in the middle of a patch."""
    return np.flatnonzero(np.arange(rows.start, rows.stop) % patch == patch // 2)


def _largest(maps: Floats, size: Size) -> Integers:
    """Returns which of `[C, h, w]` is the largest at each pixel of `size`."""
    index = np.empty(size, np.int64)
    for rows, part in _resized(maps, size):
        index[rows] = part.argmax(axis=0)
    return index


def _resized(maps: Floats, size: Size) -> Iterator[tuple[slice, Floats]]:
    """Yields `[C, h, w]` resized to `size` in strips of rows: (rows, `[C, rows, W]`)."""
    if maps.shape[1:] == size:
        yield slice(0, size[0]), maps
        return
    left, right, across = _taps(maps.shape[2], size[1], maps.dtype)
    above, below, down = _taps(maps.shape[1], size[0], maps.dtype)
    step = max(1, _VALUES_AT_ONCE // (len(maps) * size[1]))
    for start in range(0, size[0], step):
        rows = slice(start, min(start + step, size[0]))
        first, t = int(above[rows.start]), down[rows, None]
        source = maps[:, first : int(below[rows.stop - 1]) + 1]
        wide = source[:, :, left] * (1 - across) + source[:, :, right] * across
        yield rows, wide[:, above[rows] - first] * (1 - t) + wide[:, below[rows] - first] * t


def _taps(n_in: int, n_out: int, dtype: Any) -> tuple[Integers, Integers, Floats]:
    """Returns for each of `n_out` samples the two of `n_in` that it lies between, and how near it is to the second."""
    centre = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, n_in - 1), (centre - first).astype(dtype)


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if hasattr(outputs, "get") else getattr(outputs, name, None)


def _of(outputs: Any) -> Any:
    """Returns the tensor that says of which kind and where results are."""
    logits = _field(outputs, "segmentation_logits")
    return _field(outputs, "logits") if logits is None else logits


def _segmentation_logits(outputs: Any) -> Any:
    logits = _of(outputs)
    if logits is None:
        raise InputError(
            f"these outputs ({type(outputs).__name__}) have no segmentation_logits: call the model with "
            "output_segmentation=True, and without return_dict=False"
        )
    if len(logits.shape) != 4:
        raise InputError(f"segmentation_logits must be [images, texts, height, width], got {list(logits.shape)}")
    return logits


def _sizes(target_sizes: Any, shape: Sequence[int]) -> list[Size]:
    """Returns height and width for each image."""
    count = int(shape[0])
    if target_sizes is None:
        return [(int(shape[2]), int(shape[3]))] * count
    given = _array(target_sizes).tolist() if hasattr(target_sizes, "shape") else list(target_sizes)
    pairs = [_array(pair).tolist() if hasattr(pair, "shape") else pair for pair in given]
    if len(pairs) != count:
        raise InputError(f"target_sizes has {len(pairs)} entries for {count} images: give (height, width) for each")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(side != int(side) or side < 1 for side in pair):
            raise InputError(f"target_sizes must be pairs (height, width) of whole numbers of at least 1, got {pair!r}")
    return [(int(height), int(width)) for height, width in pairs]


def _thresholds(*given: float) -> tuple[float, float, float]:
    for name, value in zip(("threshold", "mask_threshold", "overlap_mask_area_threshold"), given, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} must be a number between 0 and 1, got {value!r}")
    return (given[0], given[1], given[2])


def _array(values: Any) -> Floats:
    """Returns an array or tensor of any framework in NumPy, half precision as float32."""
    if hasattr(values, "detach"):  # PyTorch: NumPy knows no bfloat16
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    array: Floats = np.asarray(values)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _like(array: npt.NDArray[Any], values: Any) -> Any:
    """Returns an array as the kind of tensor that `values` is, where that is."""
    if hasattr(values, "detach"):
        return importlib.import_module("torch").from_numpy(array).to(values.device)
    if type(values).__module__.startswith("tensorflow."):
        return importlib.import_module("tensorflow").convert_to_tensor(array)
    return array
