"""Accuracy of `--fast` and `--dtype`: labels of validation scenes by narrow dtypes against those by float32.

    python -m benchmarks.narrow_dtypes --scenes 60                      the bundled model in PyTorch, some minutes
    python -m benchmarks.narrow_dtypes --backend tf --dtypes bfloat16

Prints a Markdown table: for each level of scenes the share of pixels whose labels are equal, and the difference of mean
IoU in points. Narrow dtypes work on every CPU, if slowly, and give the same rounding up to the order of sums.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from groupvit_common.cli.parser import Parser
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.protocols import protocol_settings
from groupvit_common.segmentation.predictor import BaseSegmenter


def label_maps(base: BaseSegmenter, data: SegmentationSet) -> tuple[list[NDArray[np.integer]], float]:
    """Returns the label map of each scene, and the mean IoU in percent."""
    settings = protocol_settings("native", "scenes")
    segmenter = settings.segmenter(base, 8)
    segmenter.set_labels(data.labels, data.background_labels)
    images = [sample.image() for sample in data]
    maps = [result.label_map for result in segmenter.iter(images)]
    confusion = sum(
        confusion_matrix(sample.mask(), found, len(data.classes)) for sample, found in zip(data, maps, strict=True)
    )
    return maps, 100 * mean_iou(np.asarray(confusion), 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.narrow_dtypes", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", choices=("torch", "tf"), default="torch")
    parser.add_argument("--scenes", type=int, default=60, help="of each level (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float16,int8")
    options = parser.parse_args(arguments)
    segmenter_class = importlib.import_module(f"groupvit_{options.backend}.predictor").Segmenter
    sets = open_sets("scenes", limit=options.scenes)
    plain = segmenter_class.from_pretrained(options.model, device="cpu")
    expected = [label_maps(plain, data) for data in sets]
    print("| dtype | " + " | ".join(f"{data.kind}: equal pixels, mean IoU" for data in sets) + " |")
    print("|---|" + "---|" * len(sets))
    print("| float32 | " + " | ".join(f"{iou:.2f}" for _, iou in expected) + " |")
    for dtype in options.dtypes.split(","):
        base = segmenter_class.from_pretrained(options.model, device="cpu", dtype=dtype, fast=True)
        cells = []
        for data, (maps, iou) in zip(sets, expected, strict=True):
            found, narrow_iou = label_maps(base, data)
            equal = np.mean([(one == other).mean() for one, other in zip(maps, found, strict=True)])
            cells.append(f"{equal:.2%}, {narrow_iou - iou:+.2f}")
        print(f"| {dtype} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
