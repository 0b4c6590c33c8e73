"""Bounds of the work and memory of one request: options can ask for a thousand times what an image usually takes."""

from __future__ import annotations

from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.segmentation.preparation import Preparation
from groupvit_common.serving.problems import Problem

# Attention over a window grows with the square of its patches; all windows and views together take time.
_PATCHES_AT_ONCE, _PATCHES = 4096, 16_384
# Scores of all labels at the size of the first view, where options need them, in numbers of four bytes.
_SCORES = 50_000_000
# Products of refinement: scores, times the neighbours of a pixel, times the turns.
_PRODUCTS = 6_000_000_000
# Labels times pixels of the image.
_LABEL_PIXELS = 1_000_000_000


def check_cost(segmenter: BaseSegmenter, size: tuple[int, int], labels: int, *, with_maps: bool = False) -> None:
    """Raises `Problem` for an image of `size` = (H, W), labels and options that would take too long or too much memory.

    Args:
        labels: their number. with_maps: whether there is to be a map for each.
    """
    options, vision = segmenter.options, segmenter.model.config.vision_config
    preparation = Preparation.of(options, segmenter.processor.image_processor, vision.patch_size)
    total = largest = 0
    for scale in range(len(options.scales)):
        windows = preparation.windows(preparation.size(*size, scale))
        patches = -(-windows.size[0] // vision.patch_size) * -(-windows.size[1] // vision.patch_size)
        largest, total = max(largest, patches), total + patches * len(windows) * (2 if options.flip else 1)
    # What the model was trained at, and its usual size for long images, is always possible.
    usual = 4 * (vision.image_size // vision.patch_size) ** 2 * 4
    for count, most in ((largest, max(_PATCHES_AT_ONCE, usual)), (total, max(_PATCHES, usual))):
        if count > most:
            raise Problem(
                422, "too_costly",
                f"these options show the model {count:,} patches, of which this server takes {most:,}: choose a "
                "smaller shorter_side, fewer scales or a larger stride",
            )  # fmt: skip
    several = options.needs_scores or options.flip or len(options.scales) > 1 or options.window is not None
    groups = [count for count in vision.num_group_tokens if count]
    height, width = preparation.size(*size)
    channels = labels + 1
    if options.assignment != "soft" or options.background is None:
        channels = min(channels, total // max(largest, 1) * (groups[-1] if groups else 1))
    products = options.refine * 8 * len(options.refine_dilations) * channels * height * width
    if products > _PRODUCTS:
        raise Problem(
            422, "too_costly", "refining so many labels so many times takes too long: choose a smaller refine"
        )
    if with_maps:
        several, channels = True, labels
    if (several and channels * height * width > _SCORES) or labels * size[0] * size[1] > _LABEL_PIXELS:
        raise Problem(422, "too_costly", f"{labels:,} labels are too many for an image of this size: give fewer")
