"""The record of a segmented image: maps, labels, scores, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.drawing.canvas import (
    GROUP_ALPHA,
    Entry,
    image_writer,
    index_image,
    overlay,
    percent,
    with_legend,
)
from groupvit_common.drawing.palette import label_colours, palette
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.segmentation.label_maps import Indices, PixelLabels, label_values
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.windows import Integers
from groupvit_common.storage.json_text import unicode_json
from groupvit_common.storage.names import fit_name
from groupvit_common.storage.saving import write_files, write_text

RESULT_ENDS = ("_overlay.png", "_labels.png", "_groups.png", "_segmentation.json")
"""Ends of the names of a segmentation's files."""

CLIP_ENDS = ("_overlay.mp4", "_overlay.png", "_labels.npz", "_labels", "_segmentation.json")
"""The same of a clip; `_labels` is a folder."""

BACKGROUND = "background"
"""Name of value 0 in a label map that has a background."""


@dataclass(frozen=True, eq=False)
class Details:
    """Groups and similarities that a model finds in one image, besides the labels of its pixels.

    `group_maps`: for each grouping block, the first one first, the largest group of each pixel, uint8 or uint16
    `[H, W]` like the image; the last is a `Segmentation`'s `group_map`. In windows groups are numbered window by
    window.
    `similarity`: `[L, h, w]`, -1 to 1, how alike each place and each of `labels` are, at the size at which the model
    sees the image. It is what labels are chosen by, before a softmax makes it a score.
    """

    group_maps: tuple[Indices, ...]
    labels: tuple[str, ...]
    similarity: Floats


@dataclass(frozen=True)
class LabelScore:
    """Share of one label in an image.

    `probability`: of the whole image, softmax over all labels; None for a background that no label names.
    `pixel_share`: fraction of the pixels, 0..1.
    """

    name: str
    probability: float | None
    pixel_share: float


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented image.

    `image`: upright, RGB, at its original size H x W.
    `label_map`: uint8 (uint16 beyond 255 labels) `[H, W]`, index into `labels`.
    `labels`: names; the first is "background" where `has_background`.
    `scores`: one record for each of `labels`.
    `group_map`: uint8 or uint16 `[H, W]`, the group of each pixel.
    `group_labels`: for each group, its label as an index into `labels`.
    `source`: the file that the image came from, where it came from one.
    `group_scores`: `[groups, len(labels)]`, 0 to 1, each group's score of each label, as a `background` threshold is
    compared with; of a background the largest of its labels', 0 if there are none. None in a result that was made
    without them.
    """

    image: Image.Image
    label_map: Indices
    labels: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    group_map: Indices
    group_labels: tuple[int, ...]
    has_background: bool
    source: str | None = None
    group_scores: Floats | None = None

    def mask(self, label: str) -> npt.NDArray[np.bool_]:
        """`[H, W]` bool: the pixels of one label."""
        if label not in self.labels:
            raise InputError(f"no label {label!r} here: there are {', '.join(self.labels)}")
        return np.asarray(self.label_map == self.labels.index(label))

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The image with its labels in colour (`alpha` 0: none, 1: opaque), the background left as it is.

        The legend stands beside or below the image, which keeps its size.
        """
        colours = self.colours()
        drawn = overlay(self.image, self.label_map, colours, alpha, skip=self.background)
        if not legend:
            return drawn
        present = [i for i, score in enumerate(self.scores) if score.pixel_share > 0]
        present.sort(key=lambda i: (i == self.background, -self.scores[i].pixel_share))
        entries = [
            Entry(
                None if i == self.background else colours[i],
                self.labels[i],
                f"label {i}",
                percent(self.scores[i].pixel_share),
            )
            for i in present
        ]
        return with_legend(drawn, entries)

    def group_overlay(self, alpha: float = GROUP_ALPHA, legend: bool = True) -> Image.Image:
        """The image with one colour for each group, and the label of each group."""
        groups = len(self.group_labels)
        colours = palette(groups)
        drawn = overlay(self.image, self.group_map, colours, alpha)
        if not legend:
            return drawn
        counts = np.bincount(self.group_map.ravel(), minlength=groups)
        entries = [
            Entry(colours[g], self.labels[self.group_labels[g]], f"label {self.group_labels[g]}", f"group {g}")
            for g in np.flatnonzero(counts).tolist()
        ]
        return with_legend(drawn, entries)

    @property
    def background(self) -> int | None:
        """The background's index into `labels`, None where there is none."""
        return 0 if self.has_background else None

    def colours(self) -> npt.NDArray[np.uint8]:
        """`[len(labels), 3]`: the colour of each label in figures; the background is black."""
        if not self.has_background:
            return label_colours(self.labels)
        return np.concatenate([np.zeros((1, 3), np.uint8), label_colours(self.labels[1:])])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps and the image, ready for JSON."""
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
        """Write the overlay, the label map and a JSON record, all or none; returns the paths by kind. Files there are
        replaced.

        `path`: a folder (made if missing), where the files are called after `source` or "image": `NAME_overlay.png`,
        `NAME_labels.png`, `NAME_segmentation.json`; or the file for the overlay (`.png`, `.jpg` or `.webp`), beside
        which the other two are called after its stem. `groups` adds `NAME_groups.png`.
        The label map is a palette PNG whose pixel values are the indices (16-bit grey beyond 256 labels).
        InputError if they cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"} and not path.is_dir():
            folder, name, overlay = path.parent, path.stem, path
        else:
            folder, name = path, Path(self.source).stem if self.source else "image"
            name = fit_name(name, RESULT_ENDS, folder)
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
        record = unicode_json(self.to_dict(), indent=2) + "\n"
        writers: dict[str, Callable[[Path], None]] = {
            "overlay": image_writer(self.overlay, paths["overlay"].name),
            "labels": image_writer(lambda: index_image(self.label_map, self.colours()), paths["labels"].name),
            "record": lambda path: write_text(path, record),
        }
        if groups:
            paths["groups"] = folder / f"{name}_groups.png"
            writers["groups"] = image_writer(self.group_overlay, paths["groups"].name)
        try:
            for parent in dict.fromkeys(path.parent for path in paths.values()):
                kinds = [kind for kind, path in paths.items() if path.parent == parent]
                write_files(parent, {paths[kind].name: writers[kind] for kind in kinds})
        except CheckpointError as error:
            raise InputError(str(error)) from error
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
    affinity: Floats | None = None,
) -> Segmentation:
    """Put the record together: `probabilities` `[L]` of all labels, `pixels` from `label_maps.pixel_labels`, and the
    `affinity` `[N, G, L]` of the view whose groups they are."""
    values, has_background = label_values(is_background, threshold)
    names = [name for name, hidden in zip(label_names, is_background, strict=True) if not hidden]
    likely: list[float | None] = [p for p, hidden in zip(probabilities, is_background, strict=True) if not hidden]
    if has_background:
        hidden_likely = [p for p, hidden in zip(probabilities, is_background, strict=True) if hidden]
        names.insert(0, BACKGROUND)
        likely.insert(0, sum(hidden_likely) if hidden_likely else None)
    fractions = np.bincount(pixels.label_map.ravel(), minlength=len(names)) / pixels.label_map.size
    return Segmentation(
        image=image,
        label_map=pixels.label_map,
        labels=tuple(names),
        scores=tuple(LabelScore(n, p, s) for n, p, s in zip(names, likely, fractions.tolist(), strict=True)),
        group_map=pixels.group_map,
        group_labels=tuple(pixels.group_values.tolist()),
        has_background=has_background,
        source=source,
        group_scores=None if affinity is None else _group_scores(affinity, values, len(names)),
    )


def _group_scores(affinity: Floats, values: Integers, count: int) -> Floats:
    """Affinities of the groups of all windows `[N, G, L]`, and the label map's value of each label, as
    `[N * G, count]`."""
    flat = affinity.reshape(-1, affinity.shape[2])
    order = np.argsort(values, kind="stable")
    present, first = np.unique(values[order], return_index=True)
    scores = np.zeros((len(flat), count), affinity.dtype)
    scores[:, present] = np.maximum.reduceat(flat[:, order], first, axis=1)
    return scores
