"""`groupvit demo`: segments synthetic images with the bundled model, offline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import BACKENDS, whole
from groupvit_common.cli.parser import EXIT_CODES, Parser
from groupvit_common.cli.runtime import (
    BackendMissingError,
    backend_module,
    backend_title,
    check_writable,
    installed_backends,
    make_writable,
)
from groupvit_common.cli.terminal import OK
from groupvit_common.errors import InputError
from groupvit_common.segmentation.figures import write_images

if TYPE_CHECKING:
    from PIL import Image

    from groupvit_common.segmentation.predictor import BaseSegmenter
    from groupvit_common.segmentation.result import Segmentation

_DESCRIPTION = """\
Makes images that the bundled model has never seen, in two sizes, segments them by text labels, and compares with the
truth: IoU (intersection over union) is 100% where every pixel of a label is found and no other.
"""
_LEVELS = {1: "colours", 2: "textures", 3: "shapes"}
_SIZES = ((64, 64), (96, 160))  # height, width: as trained, and larger of another shape
# Strong colours: the objects' own are strong too.
_ALPHA = 0.7


def add_arguments(parser: Parser) -> None:
    """Adds the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, EXIT_CODES
    parser.add_argument(
        "--out", default="demo_output", metavar="DIR", help="folder to write into (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole, default=2022, help="seed of the images (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=(*BACKENDS, "all"), default="all",
        help="the backend; all: all that are installed, compared with each other (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from groupvit_common.training.recipe import get_recipe

    out = Path(options.out)
    if options.seed < 0:
        raise InputError(f"--seed must not be negative, got {options.seed}")
    recipe = get_recipe("scenes-demo-fine")
    if options.seed == recipe.run.seed:
        raise InputError(f"the model was trained on images of seed {options.seed}; choose another --seed")
    check_writable(out)

    from groupvit_common.checkpoints.hub import DEMO_MODEL

    backends = installed_backends() if options.backend == "all" else [options.backend]
    if not backends:
        raise BackendMissingError(None)
    loaded: list[BaseSegmenter] = [
        backend_module(backend, "predictor").Segmenter.from_pretrained("demo") for backend in backends
    ]
    make_writable(out)
    millions = loaded[0].model.num_parameters() / 1e6
    by = " and ".join(map(backend_title, backends))
    terminal.print_lines(
        f"The bundled model: {millions:.1f} million parameters, trained from captions alone; run by {by}."
    )
    rows: list[list[Image.Image]] = []
    agreement = _Agreement()
    for size in _SIZES:
        # Objects of a larger scene are not larger: it is enlarged as much as those of the training.
        side = min(size) * recipe.model.image_size // recipe.scene_size
        segmenters = [type(each)(each.model, each.processor, shorter_side=side) for each in loaded]
        rows += [
            _demo_image(segmenters, agreement, out, options.seed, level, what, size) for level, what in _LEVELS.items()
        ]

    measured = json.loads((DEMO_MODEL / "training.json").read_text(encoding="utf-8"))["mean_iou"]
    means = ", ".join(f"{what} {measured[str(level)]:.0f}%" for level, what in _LEVELS.items())
    terminal.print_lines("", f"Over 200 such images of each kind, the mean IoU is: {means}.")
    if len(backends) > 1:
        terminal.print_lines(
            f"{by} label {agreement.share:.3%} of the pixels alike; {agreement.probability:.0e} is the largest "
            "difference of a probability."
        )

    from groupvit_common.drawing.canvas import sheet

    overview = out / "overview.png"
    write_images(out, {overview.name: sheet(rows, ("image", "predicted", "truth"))})
    terminal.print_lines(
        f"Images, overlays and label maps are in {out.resolve()}; all on one page: {overview.resolve()}"
    )
    return OK


class _Agreement:
    """The differences between backends: fraction of pixels with the same label, largest difference of a probability."""

    def __init__(self) -> None:
        self._alike = self._pixels = 0
        self.probability = 0.0

    @property
    def share(self) -> float:
        return self._alike / self._pixels

    def add(self, a: Segmentation, b: Segmentation) -> None:
        self._alike += int((a.label_map == b.label_map).sum())
        self._pixels += a.label_map.size
        pairs = zip(a.scores, b.scores, strict=True)
        differences = (abs((one.probability or 0.0) - (other.probability or 0.0)) for one, other in pairs)
        self.probability = max(self.probability, *differences)


def _demo_image(
    segmenters: Sequence[BaseSegmenter],
    agreement: _Agreement,
    out: Path,
    seed: int,
    level: int,
    what: str,
    size: tuple[int, int],
) -> list[Image.Image]:
    """Makes, segments, measures and saves one image of `size` = (height, width); returns a row of the overview.

    The first segmenter's result is shown; `agreement` collects the others' differences.
    """
    from PIL import Image

    from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene
    from groupvit_common.evaluation.metrics import class_iou, confusion_matrix
    from groupvit_common.preprocessing.prompts import Label

    scene = make_scene(seed, 0, level, size)
    image = Image.fromarray(scene.image)
    labels, grounds = ([Label(names[0], names[1:]) for names in words] for words in (LEVELS[level], BACKGROUNDS))
    results: list[Segmentation] = []
    for segmenter in segmenters:
        segmenter.set_labels(labels, grounds)
        results.append(segmenter(image))
    result = results[0]
    for other in results[1:]:
        agreement.add(result, other)
    iou = class_iou(confusion_matrix(scene.mask, result.label_map, len(labels) + 1, None))

    height, width = size
    terminal.print_lines("", f'{what.capitalize()}, {width} x {height} pixels: "{scene.caption}"')
    for index, name in enumerate(result.labels):
        if index and (scene.mask == index).any():
            terminal.print_lines(f"  {name:<10} IoU {iou[index]:4.0%}")
    wrong = [
        name for i, name in enumerate(result.labels) if i and result.mask(name).any() and not (scene.mask == i).any()
    ]
    if wrong:
        terminal.print_lines(f"  found, but not in the image: {', '.join(wrong)}")

    name = f"{what}_{width}x{height}"
    image.save(out / f"{name}.png")
    result.save_as(out, name)
    drawn = _enlarged(result, 384 // height)
    write_images(out, {f"{name}_overlay.png": drawn.overlay(_ALPHA)})
    truth = _enlarged(replace(result, label_map=scene.mask), 384 // height)
    return [drawn.image, drawn.overlay(_ALPHA), truth.overlay(_ALPHA, legend=False)]


def _enlarged(result: Segmentation, zoom: int) -> Segmentation:
    """Returns a small image's result with every pixel drawn as `zoom` x `zoom`."""
    import numpy as np
    from PIL import Image

    def enlarged(index_map: Any) -> Any:
        return np.kron(index_map, np.ones((zoom, zoom), index_map.dtype))

    width, height = result.image.size
    return replace(
        result,
        image=result.image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST),
        label_map=enlarged(result.label_map),
        group_map=enlarged(result.group_map),
    )
