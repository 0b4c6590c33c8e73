"""Cost as work grows, with the bundled model: images, labels and the side of an image.

python -m benchmarks.growth                   (make bench-growth)
python -m benchmarks.growth --images 100 1000 --labels 1 100 --sides 224 448
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.flops import image_flops
from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.model.config import GroupViTConfig
from groupvit_torch import GroupViTModel, Segmenter


def image_rows(segmenter: Any, counts: list[int]) -> Iterator[list[str]]:
    """Yields images/s and the highest memory of the process so far; images are made as they are asked for."""
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    for count in counts:
        begun = time.perf_counter()
        done = sum(1 for _ in segmenter.iter(image for _ in range(count)))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield [str(done), f"{done / (time.perf_counter() - begun):.1f}", f"{memory:.0f}"]


def label_rows(counts: list[int]) -> Iterator[list[str]]:
    """Yields ms of the texts, once, and of an image with them."""
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    for count in counts:
        begun = time.perf_counter()
        segmenter = Segmenter.from_pretrained("demo", labels=[f"thing {index}" for index in range(count)])
        segmenter(image)
        first = time.perf_counter() - begun
        yield [str(count), f"{1e3 * first:.0f}", f"{1e3 * fastest(lambda s=segmenter: s(image)):.1f}"]


def side_rows(sides: list[int]) -> Iterator[list[str]]:
    """Yields ms, GFLOP and their quotient for an image of a side, by the full-size model with random weights."""
    import torch

    config = GroupViTConfig()
    model = GroupViTModel(config).eval()
    for side in sides:
        pixels = torch.randn(1, 3, side, side)

        def call(pixels: Any = pixels) -> None:
            with torch.no_grad():
                model.get_image_features(pixel_values=pixels)

        seconds, work = fastest(call), flops_at(config, side)
        yield [str(side), f"{1e3 * seconds:.0f}", f"{work / 1e9:.1f}", f"{work / 1e9 / seconds:.1f}"]


def flops_at(config: GroupViTConfig, side: int) -> int:
    """Returns the operations of an image of this side."""
    return image_flops(GroupViTConfig.from_dict({**config.to_dict(), "vision_config": {
        **config.vision_config.to_dict(), "image_size": side}}))  # fmt: skip


def fastest(call: Any, times: int = 3) -> float:
    """Returns the seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--labels", type=int, nargs="*", default=[1, 10, 100, 500, 2000])
    parser.add_argument("--sides", type=int, nargs="*", default=[224, 448, 672, 896, 1344])
    options = parser.parse_args()
    segmenter = Segmenter.from_pretrained("demo", labels=["red", "blue", "a tree"], shorter_side=64)
    tables = (
        ("| images | images/s | MiB, highest |", image_rows(segmenter, options.images)),
        ("| labels | ms, texts and first image | ms, an image |", label_rows(options.labels)),
        ("| side | ms | GFLOP | GFLOP/s |", side_rows(options.sides)),
    )
    for head, rows in tables:
        print(f"\n{head}\n{'|---' * (head.count('|') - 1)}|", flush=True)
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    sys.exit(terminal.run(main))
