"""Gain and cost of each option for better masks: mean IoU of validation scenes, and time as a multiple of that without
options.

    python -m benchmarks.mask_options                       the bundled model, 60 scenes a level, some minutes of one
    core python -m benchmarks.mask_options --model DIR --scenes 200 --backend tf

Every option is tried alone. The best combination is chosen on scenes of another seed, one option after the other by
what it added there, and measured on the same validation scenes as the others. Options take turns at every few scenes,
so that a busy machine is as busy for one as for the other; CPU time is counted. Prints a Markdown table.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.protocols import protocol_settings
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.predictor import BaseSegmenter

CHOOSING_SEED = "555"
# Scenes between turns.
TURN = 10
MARGIN = 0.5  # points of mean IoU: what chance adds is not chosen


@dataclass(frozen=True)
class Option:
    """A name for the table, the `Settings` that it changes, and whether labels keep their synonyms."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    synonyms: bool = True

    def joined(self, other: Option) -> Option | None:
        """Both together; None where they are about the same setting."""
        if self.changes.keys() & other.changes.keys() or not (self.synonyms or other.synonyms):
            return None
        name = other.name if self.name == "default" else f"{self.name}; {other.name}"
        return Option(name, {**self.changes, **other.changes}, self.synonyms and other.synonyms)


@dataclass
class Measured:
    """Of one option: mean IoU by level in percent, and CPU seconds."""

    levels: dict[str, float]
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.levels.values()) / len(self.levels)


def options_for(base: BaseSegmenter) -> list[Option]:
    """The default first. Sizes are multiples of the side at which the model was trained."""
    vision = base.model.config.vision_config
    side, patch = base.options.shorter_side, vision.patch_size

    def patches(factor: float) -> int:
        return max(1, round(side * factor / patch)) * patch

    other = "hard" if base.options.assignment == "soft" else "soft"
    large = patches(1.5)
    return [
        Option("default"),
        Option(f"{other} assignment", {"assignment": other}),
        Option("flip", {"flip": True}),
        Option("scales 0.75, 1, 1.25", {"scales": (0.75, 1.0, 1.25)}),
        Option("scales 1, 1.25, 1.5", {"scales": (1.0, 1.25, 1.5)}),
        Option("flip and scales 1, 1.25, 1.5", {"flip": True, "scales": (1.0, 1.25, 1.5)}),
        *(Option(f"shorter side {patches(f)} for {side}", {"shorter_side": patches(f)}) for f in (4 / 3, 1.5, 2.0)),
        *(
            Option(
                f"side {large} in windows of {patches(1)} every {stride}",
                {"shorter_side": large, "window": patches(1), "stride": stride},
            )
            for stride in (patches(0.5), patches(0.25))
        ),
        Option("refine 10", {"refine": 10}),
        Option("refine 10, dilations 1, 2", {"refine": 10, "refine_dilations": (1, 2)}),
        Option("refine 3, dilations 1, 2", {"refine": 3, "refine_dilations": (1, 2)}),
        *(Option(f"foreground {fraction}", {"foreground": fraction}) for fraction in (0.5, 0.7, 0.8, 0.9)),
        Option("background 0.7 beside its words", {"background": 0.7}),
        Option("synonyms by max", {"synonyms": "max"}),
        Option("names without synonyms", {}, synonyms=False),
        Option('templates "{}"', {"templates": "{}"}),
        Option("templates seven", {"templates": "seven"}),
        Option("templates eighty", {"templates": "eighty"}),
        Option("temperature 2", {"temperature": 2.0}),
    ]


def measure(base: BaseSegmenter, options: Sequence[Option], data: Mapping[str, SegmentationSet]) -> list[Measured]:
    """Each option on every level's scenes, taking turns."""
    seconds = [0.0] * len(options)
    levels: list[dict[str, float]] = [{} for _ in options]
    for level, scenes in data.items():
        segmenters = [prepared(base, option, scenes) for option in options]
        counts: list[NDArray[np.int64]] = [np.zeros((len(scenes.classes),) * 2, np.int64) for _ in options]
        images = [(sample.image(), sample.mask()) for sample in scenes]
        for segmenter in segmenters:
            for _ in range(5):  # Keras compiles a size with the fifth batch
                segmenter(images[0][0])
        for start in range(0, len(images), TURN):
            some = images[start : start + TURN]
            for number, segmenter in enumerate(segmenters):
                began = time.process_time()
                found = segmenter([image for image, _ in some])
                seconds[number] += time.process_time() - began
                for result, (_, mask) in zip(found, some, strict=True):
                    counts[number] += confusion_matrix(mask, result.label_map, len(scenes.classes))
        for number, count in enumerate(counts):
            levels[number][level] = 100 * mean_iou(count, 0)
    return [Measured(each, spent) for each, spent in zip(levels, seconds, strict=True)]


def prepared(base: BaseSegmenter, option: Option, scenes: SegmentationSet) -> BaseSegmenter:
    settings = replace(protocol_settings("native", scenes.kind), **option.changes)
    segmenter = settings.segmenter(base, TURN)
    words: list[tuple[Label, ...]] = [scenes.labels, scenes.background_labels]
    if not option.synonyms:
        words = [tuple(Label(label.name) for label in some) for some in words]
    segmenter.set_labels(*words)
    return segmenter


def best_combination(base: BaseSegmenter, options: Sequence[Option], data: Mapping[str, SegmentationSet]) -> Option:
    """Of the default and what betters it, by gain, whatever makes the mean over levels higher still, by more than
    `MARGIN`."""
    default, *alone = measure(base, options, data)
    chosen, best = options[0], default.mean
    helpful = [pair for pair in zip(alone, options[1:], strict=True) if pair[0].mean > default.mean + MARGIN]
    for _, option in sorted(helpful, key=lambda pair: -pair[0].mean):
        joined = chosen.joined(option)
        if joined is not None:
            mean = measure(base, [joined], data)[0].mean
            if mean > best + MARGIN:
                chosen, best = joined, mean
    return chosen


def scenes_of(levels: Sequence[str], count: int, seed: str | None) -> dict[str, SegmentationSet]:
    return {level: open_sets(f"scenes:{level}", split=seed, limit=count)[0] for level in levels}


def main() -> None:
    """Prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="demo", help='a checkpoint of scenes, or "demo", the bundled one')
    parser.add_argument("--backend", default="torch", choices=("torch", "tf"))
    parser.add_argument("--scenes", type=int, default=60, metavar="N", help="of each level (default: %(default)s)")
    parser.add_argument(
        "--choosing", type=int, default=20, metavar="N",
        help="scenes of each level by which the combination is chosen, 0: no combination (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--levels", nargs="+", default=["1", "2", "3"], choices=("1", "2", "3"))
    arguments = parser.parse_args()
    segmenter = importlib.import_module(f"groupvit_{arguments.backend}.predictor").Segmenter
    base = segmenter.from_pretrained(arguments.model, device="cpu")
    options = options_for(base)
    if arguments.choosing:
        options.append(best_combination(base, options, scenes_of(arguments.levels, arguments.choosing, CHOOSING_SEED)))
    measured = measure(base, options, scenes_of(arguments.levels, arguments.scenes, None))
    default = measured[0]
    print(
        f"{arguments.scenes} scenes a level; {base.options.assignment} assignment, shorter side "
        f"{base.options.shorter_side} by default\n"
    )
    print("| | " + " | ".join(f"level {level}" for level in arguments.levels) + " | mean gain | time |")
    print("|---" * (len(arguments.levels) + 3) + "|")
    for number, (option, found) in enumerate(zip(options, measured, strict=True)):
        name = f"**best together**: {option.name}" if arguments.choosing and number == len(options) - 1 else option.name
        cells = [f"{value:.1f} ({value - default.levels[level]:+.1f})" for level, value in found.levels.items()]
        ratio = found.seconds / default.seconds if default.seconds else math.nan
        print(f"| {name} | " + " | ".join(cells) + f" | {found.mean - default.mean:+.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    sys.exit(terminal.run(main))
