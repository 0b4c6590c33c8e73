"""Images on their way into the model: opened, resized, normalised, seen in windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.preprocessing.images import load_image
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.windows import Windows

# An image longer than this many times its shorter side is made smaller rather than long: attention over patches grows
# with the square of their number.
_LONGEST = 4
# The same where the model sees windows: the authors' bound, 2048 pixels for a shorter side of 448.
_LONGEST_IN_WINDOWS = 2048 / 448

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A decoded image, upright RGB, and its file if there is one."""

    image: Image.Image
    source: str | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image that is ready for the model.

    Attributes:
        loaded: the image as it was given.
        views: pixels `[3, h, w]` of each view, see `Preparation.views`.
        part: height and width of a window of the first view.
        preparation: what made this.
    """

    loaded: Loaded
    views: Sequence[Pixels]
    part: tuple[int, int]
    preparation: Preparation

    @property
    def nbytes(self) -> int:
        """Memory that is held: Pillow takes four bytes for a pixel."""
        height, width = self.loaded.size
        return 4 * height * width + sum(view.nbytes for view in self.views)


@dataclass(frozen=True, eq=False)
class Preparation:
    """Image loading and preparation under these options, for a model of this patch size. Threads may share it.

    `image_processors`: one for each of `options.scales`.
    """

    options: SegmentationOptions
    image_processors: tuple[CLIPImageProcessor, ...]
    patch_size: int

    @classmethod
    def of(cls, options: SegmentationOptions, image_processor: CLIPImageProcessor, patch_size: int) -> Preparation:
        """Returns the preparation that begins with a checkpoint's image processor."""
        assert options.shorter_side is not None
        sides = [max(1, round(options.shorter_side * scale)) for scale in options.scales]
        processors = [
            image_processor.for_segmentation(side, patch_size, longer_side=_LONGEST * max(side, patch_size))
            for side in sides
        ]
        return cls(options, tuple(processors), patch_size)

    @property
    def deviation(self) -> Any:
        """The standard deviation that pixels are divided by, of each channel or of all; 1 if they are not."""
        processor = self.image_processors[0]
        return processor.image_std if processor.do_normalize else 1.0

    def prepared(self, loaded: Loaded, max_pixels: int) -> Prepared:
        """Returns an image with its views; `max_pixels` bounds their size as well."""
        return Prepared(loaded, self.views(loaded, max_pixels), self.windows(self.size(*loaded.size)).size, self)

    def size(self, height: int, width: int, scale: int = 0) -> tuple[int, int]:
        """Returns height and width at which the model sees an image of this height and width, at the scale of that
        number."""
        if self.options.window is None:
            return self.image_processors[scale].resized_size(height, width)
        # Windows fit any side that is as long as they are. A shorter one is seen whole and must hold whole patches.
        patch, window = self.patch_size, self.options.window
        assert self.options.shorter_side is not None
        short, long = min(height, width), max(height, width)
        shorter_side = self.options.shorter_side * self.options.scales[scale]
        factor = min(shorter_side / short, _LONGEST_IN_WINDOWS * shorter_side / long)
        nearest = (int(side * factor + 0.5) for side in (height, width))
        rows, columns = (side if side >= window else max(1, round(side / patch)) * patch for side in nearest)
        return rows, columns

    def windows(self, size: tuple[int, int]) -> Windows:
        """Returns the windows of a prepared image of this size: one, the image, without the option."""
        if self.options.window is None or self.options.stride is None:
            return Windows.whole(size)
        return Windows.over(size, self.options.window, self.options.stride)

    def views(self, loaded: Loaded, max_pixels: int) -> list[Pixels]:
        """Returns the views of an image: at each scale, and with `flip` mirrored at each scale."""
        scales = range(len(self.options.scales))
        views = [self.pixels(loaded, self.size(*loaded.size, scale), max_pixels) for scale in scales]
        return [*views, *(np.flip(pixels, 2) for pixels in views)] if self.options.flip else views

    def pixels(self, loaded: Loaded, size: tuple[int, int], max_pixels: int) -> Pixels:
        """Returns an image `[3, h, w]`, normalised, resized to `size` = (h, w)."""
        height, width = size
        pixels = self.image_processors[0](
            loaded.image,
            size={"height": height, "width": width},
            size_divisor=1,
            max_pixels=max_pixels,
            return_tensors=None,
        )["pixel_values"][0]
        return np.asarray(pixels)


def load(source: Any, max_pixels: int) -> Loaded:
    """Returns an image of any kind that `load_image` takes. Raises `InputError` as it does."""
    name = str(source) if isinstance(source, str | Path) else getattr(source, "filename", None) or None
    return Loaded(load_image(source, max_pixels=max_pixels), name)
