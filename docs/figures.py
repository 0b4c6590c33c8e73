"""Draws the figures of the README and the documentation: `make figures`.

Each is made by the bundled model from synthetic scenes that it was not trained on.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
from groupvit_common.drawing import sheet, with_names
from groupvit_common.preprocessing import Label
from groupvit_common.segmentation import Segmentation
from groupvit_torch import Segmenter

IMAGES = Path(__file__).parent / "images"
# The seed of the 200 scenes that the model card reports on.
VALIDATION_SEED = 1_000_003
_ZOOM = 4


def first_look(segmenter: Segmenter) -> Image.Image:
    """What the README shows: two scenes, their groups, and the labels that groups get from words."""
    rows = []
    for level, index in ((1, 6), (2, 3)):
        scene = make_scene(VALIDATION_SEED, index, level, (96, 160))
        labels, grounds = ([Label(names[0], names[1:]) for names in words] for words in (LEVELS[level], BACKGROUNDS))
        segmenter.set_labels(labels, grounds)
        result = _enlarged(segmenter(Image.fromarray(scene.image)))
        drawn = result.overlay(alpha=0.75, legend=False)
        colours = result.colours()
        named = with_names(drawn, result.label_map, result.labels, colours, skip=result.background)
        rows.append([result.image, result.group_overlay(legend=False), named])
    return sheet(rows, ("image", "groups, without any label", "masks of the labels given as text"))


def _enlarged(result: Segmentation) -> Segmentation:
    """A result whose pixels are drawn as squares."""

    def enlarged(index_map: Any) -> Any:
        return np.kron(index_map, np.ones((_ZOOM, _ZOOM), index_map.dtype))

    size = (result.image.width * _ZOOM, result.image.height * _ZOOM)
    return replace(
        result,
        image=result.image.resize(size, Image.Resampling.NEAREST),
        label_map=enlarged(result.label_map),
        group_map=enlarged(result.group_map),
    )


FIGURES: dict[str, Callable[[Segmenter], Image.Image]] = {"first-look.png": first_look}


def main() -> None:
    """Draws all of them into docs/images."""
    IMAGES.mkdir(exist_ok=True)
    segmenter = Segmenter.from_pretrained("demo", shorter_side=192)
    for name, draw in FIGURES.items():
        # 256 colours are enough for a screen, at a quarter of the size.
        draw(segmenter).quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
        print(IMAGES / name)


if __name__ == "__main__":
    main()
