"""Images as a model has seen them, before any label: what stays when labels and most options change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.label_maps import View, group_windows, label_similarity
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.preparation import Loaded, Preparation
from groupvit_common.segmentation.result import Details
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.windows import Windows

PREPARATION_OPTIONS = ("shorter_side", "window", "stride", "flip", "scales")
"""Options that change what the model sees of an image."""

Blocks = tuple[Floats, Floats, Sequence[Floats]]
"""Of B images: embeddings of the groups `[B, G, E]` and of the images `[B, E]`, and each block's grouping maps
`[B, G, h, w]`."""


@dataclass(frozen=True, eq=False)
class EncodedView:
    """A view of an image as a model saw it, in N windows: one, the whole view, without the option.

    `group_embeds`: `[N, G, E]`. `image_embeds`: `[N, E]`. `block_maps`: of each grouping block `[N, G, h, w]`, a
    patch's probability of each of its groups; the last has the groups of `group_embeds`.
    """

    group_embeds: Floats
    image_embeds: Floats
    block_maps: tuple[Floats, ...]
    windows: Windows

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return sum(each.nbytes for each in (self.group_embeds, self.image_embeds, *self.block_maps))


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as a model has seen it, from `Segmenter.encode`. Never changed; threads may share it.

    Attributes:
        loaded: the image, upright RGB, and its file if there is one.
        pixels: `[3, h, w]` of the first view, normalised.
        views: one for each of the option `scales`, then with `flip` the mirrored ones.
        preparation: what made the views.
        model: what saw them.
    """

    loaded: Loaded
    pixels: Floats
    views: tuple[EncodedView, ...]
    preparation: Preparation = field(repr=False)
    model: Any = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """The image, upright RGB, in its own size."""
        return self.loaded.image

    @property
    def group_counts(self) -> tuple[int, ...]:
        """The number of groups of each grouping block, the first one first."""
        return tuple(maps.shape[1] for maps in self.views[0].block_maps)

    @property
    def nbytes(self) -> int:
        """Memory that is held: Pillow takes four bytes for a pixel."""
        return 4 * self.image.width * self.image.height + self.pixels.nbytes + sum(view.nbytes for view in self.views)

    def check(self, model: Any, options: SegmentationOptions) -> None:
        """Raises `InputError` if another model saw the image, or it was prepared under other options than these."""
        if self.model is not model:
            raise InputError("the encoded image is another model's: encode the image with this segmenter")
        own = self.preparation.options
        for name in PREPARATION_OPTIONS:
            if getattr(own, name) != getattr(options, name):
                raise InputError(
                    f"the image was encoded with {name}={getattr(own, name)}, the segmenter has "
                    f"{getattr(options, name)}: encode the image again with these options"
                )


@dataclass(frozen=True, eq=False)
class LabelSet:
    """The labels of one `set_labels`, never changed: a call reads the segmenter's once and sees one set,
    whatever other threads do.

    Attributes:
        labels: L of them; is_background: of each.
        embeds: `[L, E]`, or several of each, `[L, K, E]`.
    """

    labels: tuple[Label, ...]
    is_background: tuple[bool, ...]
    embeds: Floats

    @property
    def names(self) -> list[str]:
        """The labels' names."""
        return [label.name for label in self.labels]


@dataclass(frozen=True, eq=False)
class SeenView:
    """A view of an image and its probabilities `[L]` of these labels."""

    labels: LabelSet
    probabilities: Floats
    view: View


def in_batches(
    images: Sequence[Floats],
    image_windows: Sequence[Windows],
    batch_size: int,
    call: Callable[[Floats], Sequence[Any]],
) -> list[list[tuple[Any, ...]]]:
    """Calls a model with the windows of prepared images `[3, h, w]`, those of one size together.

    Args:
        image_windows: of each image. batch_size: the most windows of a call.
        call: windows `[B, 3, h, w]` -> outputs, each with B entries.

    Returns:
        For each image and window its entries of the outputs.
    """
    parts = [
        pixels[:, rows, columns]
        for pixels, windows in zip(images, image_windows, strict=True)
        for rows, columns in windows
    ]
    outputs: list[tuple[Any, ...]] = [()] * len(parts)
    for shape in dict.fromkeys(part.shape for part in parts):
        alike = [i for i, part in enumerate(parts) if part.shape == shape]
        for start in range(0, len(alike), batch_size):
            some = alike[start : start + batch_size]
            batch = call(np.stack([parts[i] for i in some]))
            for place, i in enumerate(some):
                outputs[i] = tuple(each[place] for each in batch)
    rest = iter(outputs)
    return [[next(rest) for _ in range(len(windows))] for windows in image_windows]


def encoded_views(
    images: Sequence[Floats], preparation: Preparation, batch_size: int, blocks: Callable[[Floats], Blocks]
) -> list[EncodedView]:
    """Prepared images `[3, h, w]` through the model, windows of one size together.

    Args:
        blocks: windows `[B, 3, h, w]` -> what the model makes of them.
    """

    def call(windows: Floats) -> Sequence[Floats]:
        groups, embeds, maps = blocks(windows)
        return groups, embeds, *maps

    image_windows = [preparation.windows((pixels.shape[1], pixels.shape[2])) for pixels in images]
    seen = in_batches(images, image_windows, batch_size, call)
    views = []
    for windows, outputs in zip(image_windows, seen, strict=True):
        # Copies, so that one image does not keep the arrays of its batch.
        groups, embeds, *maps = (np.stack(each) for each in zip(*outputs, strict=True))
        views.append(EncodedView(groups, embeds, tuple(maps), windows))
    return views


def labelled_view(
    view: EncodedView,
    labels: LabelSet,
    compare: Callable[[Floats, Floats, Floats], tuple[Floats, Any, Any]],
    in_windows: bool,
) -> SeenView:
    """Returns a view with labels.

    Args:
        compare: embeddings of groups and windows and their grouping maps -> probabilities `[N, L]`, affinities
            `[N, G, L]` and grouping maps.
        in_windows: whether there is the option.
    """
    probabilities, affinity, grouping = compare(view.group_embeds, view.image_embeds, view.block_maps[-1])
    seen = View(affinity, grouping, view.windows if in_windows else None)
    return SeenView(labels, np.mean(probabilities, axis=0), seen)


def encoded_details(view: EncodedView, size: tuple[int, int], labels: Sequence[str], label_embeds: Floats) -> Details:
    """Returns the details of an image of `size` = (H, W) from its first view.

    Args:
        labels: L names. label_embeds: `[L, E]`, or several of each, `[L, K, E]`.
    """
    return Details(
        tuple(group_windows(maps, view.windows, size) for maps in view.block_maps),
        tuple(labels),
        label_similarity(view.group_embeds, view.block_maps[-1], label_embeds, view.windows, view.windows.image),
    )
