"""From what the model says about groups to a label for every pixel, in NumPy, and the record that the user gets.

The paper's inference (Xu et al. 2022, section 4.2, and the authors' evaluation):

1. *Affinity* of group g to label l: `softmax_l(s * cos(g, l))`, s the logit scale (at most 100). With `top_k`, only the labels
   most similar to the whole image stay. Exactly as the authors evaluate, the affinity is the product of two softmaxes, one
   over the labels that stay and one over all, so that a threshold from the paper (0.95 for VOC and COCO, 0.35 for Context)
   means the same here. Without `top_k` both are equal, and the affinity is the squared probability.
2. *Grouping map*: the soft assignments of all stages multiplied, so that each patch holds a distribution over the last
   stage's groups.
3. *Assignment* "hard": the grouping map is interpolated to the image's pixels, a pixel goes to its largest group and takes
   that group's best label. "soft": a pixel's score of a label is the affinity averaged by its grouping weights. Both are
   linear before the maximum, so labels are combined at patch resolution and only then interpolated.
4. *Background*: pixels whose best score is below `min(threshold, the image's largest affinity)`, and pixels of labels that
   the user calls background.

Interpolation is bilinear with half-pixel centres and never holds more than a row or a strip of rows at full resolution.
Letters: B images, L labels, G groups, E embedding, h w patches down and across, P = h*w, H W pixels of the original image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common import visualize
from groupvit_common.errors import InputError

Assignment = Literal["hard", "soft"]
Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.unsignedinteger[Any]]

MAX_LOGIT_SCALE = 100.0
"""The authors' bound on the logit scale (CLIP's too), in training and inference."""

BACKGROUND = "background"
"""Name of value 0 in a label map that has a background."""

# Interpolated values held at once (8 MiB in float32): small enough for the cache, large enough to keep loops rare.
STRIP_VALUES = 1 << 21


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _unit(x: Floats) -> Floats:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def grouping_map(assignments: Sequence[Floats], grid: tuple[int, int]) -> Floats:
    """Stages' soft assignments `[B, G_out, G_in]`, first stage first (its G_in = P = h*w), -> `[B, G, h, w]`.

    Every patch holds a distribution over the last stage's groups, because the columns of each stage sum to one.
    """
    product = assignments[0]
    for stage in assignments[1:]:
        product = stage @ product
    return product.reshape(*product.shape[:2], *grid)


def image_probabilities(image_embeds: Floats, label_embeds: Floats, logit_scale: float) -> Floats:
    """`[B, E]`, `[L, E]` -> `[B, L]`: softmax over labels of the scaled cosine similarity."""
    return softmax(min(logit_scale, MAX_LOGIT_SCALE) * (_unit(image_embeds) @ _unit(label_embeds).T))


def label_affinity(
    group_embeds: Floats,
    label_embeds: Floats,
    logit_scale: float,
    image_embeds: Floats | None = None,
    top_k: int | None = None,
) -> Floats:
    """Affinity of groups to labels (point 1 above): `[B, G, E]`, `[L, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all.
    """
    scaled = min(logit_scale, MAX_LOGIT_SCALE) * (_unit(group_embeds) @ _unit(label_embeds).T)
    among_all = softmax(scaled)
    if top_k is None or top_k >= len(label_embeds):
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    similarity = _unit(image_embeds) @ _unit(label_embeds).T
    best = np.argsort(-similarity, axis=-1, kind="stable")[:, :top_k]
    kept = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(kept, best, True, axis=-1)
    return among_all * softmax(np.where(kept[:, None], scaled, -np.inf))


def label_values(is_background: Sequence[bool], threshold: float | None) -> tuple[npt.NDArray[np.int64], bool]:
    """The label map's value of each label, and whether 0 is background.

    Labels are numbered in their order, background ones are 0. Without a background of either kind they begin at 0.
    """
    background = np.asarray(is_background, dtype=bool)
    has_background = threshold is not None or bool(background.any())
    values = np.cumsum(~background) - (0 if has_background else 1)
    return np.where(background, 0, values), has_background


def index_dtype(count: int) -> type[np.uint8 | np.uint16]:
    """The smaller of uint8 and uint16 that counts to `count` values."""
    if count > 1 << 16:
        raise InputError(f"{count} labels do not fit a label map of 16 bits: give at most {1 << 16}")
    return np.uint8 if count <= 1 << 8 else np.uint16


def linear_taps(n_in: int, n_out: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Bilinear interpolation along one axis: output i is `(1 - t[i]) * x[first[i]] + t[i] * x[second[i]]`.

    The same numbers as `resample.resize_matrix(n_in, n_out)` without its zeros.
    """
    centre = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, n_in - 1), centre - first


def strips(channels: int, size: tuple[int, int]) -> Iterator[slice]:
    """Rows of `size` = (H, W) in pieces of at most `STRIP_VALUES` values (but one row at least)."""
    height, width = size
    rows = max(1, STRIP_VALUES // (channels * width))
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def interpolated_rows(maps: Floats, size: tuple[int, int]) -> Iterator[Floats]:
    """`[C, h, w]` resized to `size` = (H, W), row by row: H times `[C, W]`."""
    height, width = size
    left, right, fraction = linear_taps(maps.shape[2], width)
    across = fraction.astype(maps.dtype)
    wide = maps[:, :, left] * (1 - across) + maps[:, :, right] * across
    # A row's values together: twice as fast as working across the maps.
    wide = np.ascontiguousarray(wide.transpose(1, 0, 2))
    steps = wide[1:] - wide[:-1]
    first, second, fraction = linear_taps(maps.shape[1], height)
    for above, below, down in zip(first, second, fraction.astype(maps.dtype), strict=True):
        yield wide[above] if above == below else wide[above] + down * steps[above]


@dataclass(frozen=True)
class PixelLabels:
    """Maps of one image: `label_map` and `group_map` `[H, W]`, and the label map's value of each group `[G]`."""

    label_map: Indices
    group_map: Indices
    group_values: npt.NDArray[np.int64]


def label_pixels(
    affinity: Floats,
    grouping: Floats,
    size: tuple[int, int],
    *,
    assignment: Assignment = "hard",
    threshold: float | None = None,
    is_background: Sequence[bool] | None = None,
) -> PixelLabels:
    """One image (points 3 and 4 above): affinity `[G, L]`, grouping map `[G, h, w]` -> maps at `size` = (H, W)."""
    groups, labels = affinity.shape
    values, _ = label_values([False] * labels if is_background is None else is_background, threshold)
    limit = None if threshold is None else min(threshold, float(affinity.max()))

    group_values = values[affinity.argmax(axis=1)]
    if limit is not None:
        group_values[affinity.max(axis=1) < limit] = 0
    group_map = np.empty(size, dtype=index_dtype(groups))
    label_map: Indices = np.empty(size, dtype=index_dtype(labels + 1))
    for y, row in enumerate(interpolated_rows(grouping, size)):
        group_map[y] = largest = row.argmax(axis=0)
        if assignment == "hard":
            label_map[y] = group_values[largest]
    if assignment == "hard":
        return PixelLabels(label_map, group_map, group_values)

    for y, row in enumerate(interpolated_rows(np.einsum("gl,ghw->lhw", affinity, grouping), size)):
        row_values = values[row.argmax(axis=0)]
        if limit is not None:
            row_values[row.max(axis=0) < limit] = 0
        label_map[y] = row_values
    return PixelLabels(label_map, group_map, group_values)


@dataclass(frozen=True)
class LabelScore:
    """How much of one label is in an image.

    `probability`: of the whole image, softmax over all labels asked for; None for a background that no label names.
    `pixel_share`: part of the pixels, 0..1.
    """

    name: str
    probability: float | None
    pixel_share: float


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented image.

    `image`: the picture, upright, RGB, at its original size H x W.
    `label_map`: uint8 (uint16 beyond 255 labels) `[H, W]`, index into `labels`.
    `labels`: names; the first is "background" where `has_background`.
    `scores`: one record for each of `labels`.
    `group_map`: uint8 or uint16 `[H, W]`, the group of each pixel.
    `group_labels`: for each group, its label as an index into `labels`.
    `source`: the file that the picture came from, where it came from one.
    """

    image: Image.Image
    label_map: Indices
    labels: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    group_map: Indices
    group_labels: tuple[int, ...]
    has_background: bool
    source: str | None = None

    def mask(self, label: str) -> npt.NDArray[np.bool_]:
        """`[H, W]` bool: the pixels of one label."""
        if label not in self.labels:
            raise InputError(f"no label {label!r} here: there are {', '.join(self.labels)}")
        return np.asarray(self.label_map == self.labels.index(label))

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The picture with its labels in colour (`alpha` 0: none, 1: opaque), the background left as it is.

        The legend stands beside or below the picture, which keeps its size.
        """
        colours = self.colours()
        drawn = visualize.overlay(self.image, self.label_map, colours, alpha, skip=0 if self.has_background else None)
        if not legend:
            return drawn
        present = [i for i, score in enumerate(self.scores) if score.pixel_share > 0]
        present.sort(key=lambda i: (self.has_background and i == 0, -self.scores[i].pixel_share))
        entries = [
            visualize.Entry(
                None if self.has_background and i == 0 else colours[i],
                self.labels[i],
                f"label {i}",
                visualize.percent(self.scores[i].pixel_share),
            )
            for i in present
        ]
        return visualize.with_legend(drawn, entries)

    def group_overlay(self, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture with one colour for each group, and what each group was called."""
        groups = len(self.group_labels)
        colours = visualize.palette(groups)
        drawn = visualize.overlay(self.image, self.group_map, colours, alpha)
        if not legend:
            return drawn
        counts = np.bincount(self.group_map.ravel(), minlength=groups)
        entries = [
            visualize.Entry(
                colours[g], self.labels[self.group_labels[g]], f"label {self.group_labels[g]}", f"group {g}"
            )
            for g in np.flatnonzero(counts).tolist()
        ]
        return visualize.with_legend(drawn, entries)

    def colours(self) -> npt.NDArray[np.uint8]:
        """`[len(labels), 3]`: the colour of each label in pictures; the background is black."""
        if not self.has_background:
            return visualize.label_colours(self.labels)
        return np.concatenate([np.zeros((1, 3), np.uint8), visualize.label_colours(self.labels[1:])])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps and the picture, ready for JSON."""
        return {
            "source": self.source,
            "size": {"width": self.image.width, "height": self.image.height},
            "has_background": self.has_background,
            "labels": [
                {"index": i, "name": s.name, "probability": s.probability, "pixel_share": s.pixel_share}
                for i, s in enumerate(self.scores)
            ],
            "groups": [self.labels[i] for i in self.group_labels],
        }

    def save(self, path: str | Path, *, groups: bool = False) -> dict[str, Path]:
        """Write the overlay, the label map and a JSON record; returns the paths by kind. Files there are replaced.

        `path`: a folder (made if missing), where the files are called after `source` or "image": `NAME_overlay.png`,
        `NAME_labels.png`, `NAME_segmentation.json`; or the file for the overlay (`.png`, `.jpg` or `.webp`), beside which
        the other two are called after its stem. `groups` adds `NAME_groups.png`.
        The label map is a palette PNG whose pixel values are the indices (16-bit grey beyond 256 labels).
        InputError if they cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"} and not path.is_dir():
            folder, name, overlay = path.parent, path.stem, path
        else:
            folder, name = path, Path(self.source).stem if self.source else "image"
            overlay = folder / f"{name}_overlay.png"
        return self.save_as(folder, name, overlay=overlay, groups=groups)

    def save_as(
        self, folder: str | Path, name: str, *, overlay: str | Path | None = None, groups: bool = False
    ) -> dict[str, Path]:
        """`save` into a folder under a name of the caller's choice."""
        folder = Path(folder)
        paths = {
            "overlay": Path(overlay) if overlay else folder / f"{name}_overlay.png",
            "labels": folder / f"{name}_labels.png",
            "record": folder / f"{name}_segmentation.json",
        }
        if groups:
            paths["groups"] = folder / f"{name}_groups.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.overlay().save(paths["overlay"])
            visualize.index_image(self.label_map, self.colours()).save(paths["labels"])
            if groups:
                self.group_overlay().save(paths["groups"])
            record = json.dumps(self.to_dict(), ensure_ascii=False, indent=2)
            paths["record"].write_text(record + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
        return paths


def segmentation(
    image: Image.Image,
    pixels: PixelLabels,
    label_names: Sequence[str],
    probabilities: Sequence[float],
    *,
    is_background: Sequence[bool],
    threshold: float | None,
    source: str | None = None,
) -> Segmentation:
    """Put the record together: `probabilities` `[L]` of all labels asked for, `pixels` from `label_pixels`."""
    _, has_background = label_values(is_background, threshold)
    names = [name for name, hidden in zip(label_names, is_background, strict=True) if not hidden]
    likely: list[float | None] = [p for p, hidden in zip(probabilities, is_background, strict=True) if not hidden]
    if has_background:
        hidden_likely = [p for p, hidden in zip(probabilities, is_background, strict=True) if hidden]
        names.insert(0, BACKGROUND)
        likely.insert(0, sum(hidden_likely) if hidden_likely else None)
    share = np.bincount(pixels.label_map.ravel(), minlength=len(names)) / pixels.label_map.size
    return Segmentation(
        image=image,
        label_map=pixels.label_map,
        labels=tuple(names),
        scores=tuple(LabelScore(n, p, s) for n, p, s in zip(names, likely, share.tolist(), strict=True)),
        group_map=pixels.group_map,
        group_labels=tuple(pixels.group_values.tolist()),
        has_background=has_background,
        source=source,
    )
