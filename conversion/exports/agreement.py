"""Is an exported file the model that it was made of? Both run on the same inputs, of several sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conversion.exports.runtimes import Arrays, Runner
from conversion.outputs import sample_inputs
from groupvit_common.data.scenes import make_scene
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTConfig
from groupvit_common.segmentation.parts import Part

BATCHES = (1, 3)
# In patches: the training size is in front of these. Neither side is the other, nor a multiple of it.
_GRIDS = ((5, 3), (4, 7))
# Of float32 the largest difference over the largest value: sums in another order. Of fewer bits, the root of the mean
# square over that of the values: eleven bits, eight bits.
# "images": float32 where the file resizes images, in which some values are one step of 255 away from Pillow's.
TOLERANCES = {"float32": 1e-4, "images": 1e-2, "float16": 2e-2, "int8": 0.25}
# Share of pixels that may have another label or group: those of two groups that are as probable but for rounding.
PIXELS = {"float32": 1e-3, "images": 1e-2, "float16": 5e-2, "int8": 0.2}
# The smallest scene.
_LEAST_SIDE = 48


@dataclass(frozen=True)
class Agreement:
    """One output for one size of inputs. difference: of values, see `TOLERANCES`, or the share of unequal pixels of a
    map. seconds: of a call of the file, after a first one."""

    part: str
    output: str
    sizes: str
    difference: float
    bound: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compare(
    part: Part, config: GroupViTConfig, source: Runner, file: Runner, dtype: str, *, fixed: bool
) -> Iterator[Agreement]:
    """Yields the agreement of each output at three image sizes and two batch sizes (texts: three lengths). Images are
    scenes.

    part: with the file's inputs. fixed: whether the file has the configuration's image size alone.
    """
    if "images" in part.inputs and dtype == "float32":
        dtype = "images"
    for sizes, inputs in _inputs(part, config, fixed=fixed):
        wanted = source(inputs)
        file(inputs)
        begun = time.perf_counter()
        found = file(inputs)
        seconds = time.perf_counter() - begun
        for name in part.outputs:
            if name not in wanted:
                continue
            yield Agreement(part.name, name, sizes, *difference(name, wanted, found, dtype), seconds)


def difference(name: str, wanted: Arrays, found: Arrays, dtype: str) -> tuple[float, float]:
    """Returns how far an output is from the wanted one, see `Agreement`, and how far it may be."""
    a, b = wanted[name], found.get(name)
    if b is None or a.shape != b.shape or not np.isfinite(b).all():
        return float("inf"), 0.0
    if name in ("label_map", "group_map"):
        return float((a != b).mean()), PIXELS[dtype]
    if name == "scores":
        # A pixel on the border of two groups, or of two labels, has the score of one of them.
        same = (wanted["group_map"] == found["group_map"]) & (wanted["label_map"] == found["label_map"])
        a, b = a[same], b[same]
    a, b = a.astype(np.float64), b.astype(np.float64)
    if dtype == "float32":
        return float(np.abs(a - b).max(initial=0.0)) / max(float(np.abs(a).max(initial=0.0)), 1e-30), TOLERANCES[dtype]
    bound = TOLERANCES[dtype]
    if name == "group_embeds":
        # A near tie of two groups gives some patches to the other one, and both another embedding: the median group.
        return float(np.median(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1).clip(1e-30))), bound
    if name == "image_embeds" and "group_embeds" in found:
        # The mean of the groups differs by no more than they do on the whole, but may be short.
        groups = wanted["group_embeds"]
        mean = float(np.linalg.norm(groups.mean(1))) * groups.shape[1] ** 0.5
        bound = max(bound, float(np.linalg.norm(groups - found["group_embeds"])) / max(mean, 1e-30))
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-30), bound


def _inputs(part: Part, config: GroupViTConfig, *, fixed: bool) -> Iterator[tuple[str, Arrays]]:
    vision, longest = config.vision_config, config.text_config.max_position_embeddings
    if part.name == "text_encoder":
        for count in BATCHES:
            for length in sorted({longest, max(2, longest // 2), max(2, longest // 4)}):
                yield f"{count} x {length}", texts(config, count, length)
        return
    patch, side = vision.patch_size, vision.image_size
    grids = ((side // patch, side // patch), *(() if fixed else _GRIDS))
    sizes = [(rows * patch, columns * patch) for rows, columns in grids]
    if "images" in part.inputs:
        # Smaller than the model sees them, larger, and longer than four times the shorter side.
        sizes = [(side // 2 + 1, side // 2), (side + 5, 2 * side - 3), (3 * side, side // 2)]
    rng = np.random.default_rng(0)
    for count in BATCHES:
        for height, width in sizes:
            if "images" in part.inputs:
                inputs: Arrays = {"images": photos(count, height, width)}
            else:
                inputs = {"pixel_values": scenes(count, vision.num_channels, height, width)}
            if "text_embeds" in part.inputs:
                inputs["text_embeds"] = embeddings(rng, count + 4, config.projection_dim)
            yield f"{count} x {height} x {width}", inputs


def photos(count: int, height: int, width: int) -> np.ndarray:
    """Returns scenes, uint8 `[count, height, width, 3]`."""
    size = (max(height, _LEAST_SIDE), max(width, _LEAST_SIDE))
    return np.stack([make_scene(0, index, 1, size).image[:height, :width] for index in range(count)])


def scenes(count: int, channels: int, height: int, width: int) -> np.ndarray:
    """Returns normalised scenes, float32 `[count, channels, height, width]`."""
    pixels = (photos(count, height, width).transpose(0, 3, 1, 2).astype(np.float32) - 116) / 68
    return np.ascontiguousarray(np.resize(pixels.swapaxes(0, 1), (channels, count, height, width)).swapaxes(0, 1))


def embeddings(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Returns random directions, float32 `[count, length]`."""
    embeds = rng.standard_normal((count, length), np.float32)
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def texts(config: GroupViTConfig, count: int, length: int) -> Arrays:
    """Returns texts of different numbers of tokens; those that are cut end where they are cut."""
    text = config.text_config
    whole = sample_inputs(config, texts=count)
    ids, mask = whole["input_ids"][:, :length].copy(), whole["attention_mask"][:, :length]
    end = text.vocab_size - 1 if text.eos_token_id == LEGACY_EOS_TOKEN_ID else text.eos_token_id
    ids[~(ids == end).any(1), -1] = end
    return {"input_ids": ids, "attention_mask": mask}
