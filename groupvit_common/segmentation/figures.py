"""Figures of results: the kinds of `groupvit segment --show`, comparisons, thumbnails.

A figure is a row of `FIGURES`. Nothing heavy is imported before one is drawn: `groupvit --help` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common import drawing
from groupvit_common.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from groupvit_common.segmentation.result import Details, Segmentation


@dataclass(frozen=True)
class Figure:
    """A kind of figure: `draw` makes it of a result and its details, which are None unless it `needs_details`."""

    draw: Callable[[Segmentation, Any], Image.Image]
    needs_details: bool = False


def _labels(result: Segmentation, details: None) -> Image.Image:
    """The labels' colours alone, a background black."""
    return drawing.colour_image(result.label_map, result.colours())


def _names(result: Segmentation, details: None) -> Image.Image:
    """The overlay with each label's name on it, the background's left out."""
    tinted = result.overlay(legend=False)
    return drawing.with_names(tinted, result.label_map, result.labels, result.colours(), skip=result.background)


def _all_groups(result: Segmentation, details: Details) -> Image.Image:
    """The groups of every grouping block, side by side."""
    import numpy as np

    # The last block's groups are the result's: windows and precision are those it was made with.
    group_maps = (*details.group_maps[:-1], result.group_map)
    titles = [f"block {i}: {len(np.unique(each))} groups" for i, each in enumerate(group_maps, 1)]
    return drawing.sheet([[drawing.group_overlay(result.image, each) for each in group_maps]], titles)


FIGURES: dict[str, Figure] = {
    "input": Figure(lambda result, details: result.image),
    "pred": Figure(_labels),
    "input_pred": Figure(lambda result, details: result.overlay(legend=False)),
    "input_pred_label": Figure(_names),
    "first_group": Figure(lambda result, details: drawing.group_overlay(result.image, details.group_maps[0]), True),
    "final_group": Figure(lambda result, details: drawing.group_overlay(result.image, result.group_map)),
    "all_groups": Figure(_all_groups, True),
    "similarity": Figure(
        lambda result, details: drawing.heat_sheet(result.image, details.labels, details.similarity), True
    ),
}
"""The seven of the authors' evaluation, under their names, and the heat maps; docs/usage.md describes each."""


def show(result: Segmentation, mode: str, details: Details | None = None) -> Image.Image:
    """Returns a figure of a result, of the size of the image where it is one image, as the authors' evaluation shows
    it.

    Args:
        mode: a name in `FIGURES`.
        details: `Segmenter.details` of the same image, for figures that need them.

    Raises:
        InputError: no such figure, or details that are missing or of another image.
    """
    if mode not in FIGURES:
        raise InputError(f"unknown figure {mode!r}: it must be one of {', '.join(FIGURES)}")
    figure = FIGURES[mode]
    if figure.needs_details:
        if details is None:
            raise InputError(
                f"{mode} shows more than a result holds: give details, the result of segmenter.details(image)"
            )
        if any(group_map.shape != result.label_map.shape for group_map in details.group_maps):
            raise InputError(
                f"details of an image of {_size(details.group_maps[0])} pixels, but the result is of "
                f"{_size(result.label_map)}"
            )
    return figure.draw(result, details)


def thumbnail(result: Segmentation, side: int) -> Image.Image:
    """The overlay of a result made to fit `side` x `side` pixels if it is larger, with a legend that can still be
    read."""
    import numpy as np
    from PIL import Image

    small = result.image.copy()
    small.thumbnail((side, side))
    index_map = np.asarray(Image.fromarray(result.label_map).resize(small.size, Image.Resampling.NEAREST))
    return replace(result, image=small, label_map=index_map).overlay()


def compare(first: Segmentation, second: Segmentation, titles: tuple[str, str] = ("first", "second")) -> Image.Image:
    """Two results of one image side by side, and the pixels that differ: from two models, two backends, two sets of
    options.

    InputError if they are of different sizes or labels.
    """
    import numpy as np

    if first.label_map.shape != second.label_map.shape:
        raise InputError(
            f"the results are of {_size(first.label_map)} and {_size(second.label_map)} pixels: they must be of one "
            "image"
        )
    if first.labels != second.labels:
        raise InputError(
            f"the results have other labels ({', '.join(first.labels)}; {', '.join(second.labels)}): they must have "
            "the same"
        )
    different = first.label_map != second.label_map
    images = [
        first.image,
        first.overlay(legend=False),
        second.overlay(legend=False),
        drawing.difference(first.image, different),
    ]
    drawn = drawing.sheet([images], ("image", *titles, f"different: {_percent(different)} of the pixels"))
    colours = first.colours()
    present = np.union1d(first.label_map, second.label_map).tolist()
    entries = [
        drawing.Entry(None if i == first.background else colours[i], first.labels[i], f"label {i}") for i in present
    ]
    return drawing.with_legend(drawn, entries, drawing.title_size(images))


def _percent(pixels: npt.NDArray[np.bool_]) -> str:
    """More exact than `percent`: backends differ in a few pixels of a photo, or in none."""
    fraction = float(pixels.mean())
    return "none" if fraction == 0 else f"{fraction:.2%}" if fraction >= 0.0001 else "<0.01%"


def _size(index_map: npt.NDArray[Any]) -> str:
    return f"{index_map.shape[1]} x {index_map.shape[0]}"


def write_images(folder: Path, images: Mapping[str, Image.Image]) -> None:
    """Writes images under these names into a folder, all or none.

    Raises:
        InputError: they cannot be written.
    """
    from groupvit_common.storage.saving import write_files

    try:
        write_files(folder, {name: drawing.image_writer(image.copy, name) for name, image in images.items()})
    except CheckpointError as error:
        raise InputError(str(error)) from error


def __getattr__(name: str) -> Any:
    # Programs take drawing from here: `groupvit_common.visualize` was one module.
    if not name.startswith("__"):  # the import system's own
        from groupvit_common.drawing import canvas, palette

        for module in (canvas, palette):
            if name in vars(module):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
