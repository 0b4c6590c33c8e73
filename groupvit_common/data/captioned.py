"""Batches of captioned pictures for training, in NumPy: every backend sees the very same ones.

What is kept of a scene is what training may know: its picture, and which words its caption names. Masks are left behind here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from groupvit_common.data.scenes import Scene, make_scene
from groupvit_common.processor import GroupViTProcessor
from groupvit_common.recipe import Recipe

A = TypeVar("A")
"""An array, or a backend's tensor."""

B = TypeVar("B")


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Pictures of one level in memory.

    images: uint8 `[N, H, W, 3]`; captions: N sentences; words: the different words that they name, sorted;
    named: bool `[N, words]`, which caption names which.
    """

    images: NDArray[np.uint8]
    captions: tuple[str, ...]
    words: tuple[str, ...]
    named: NDArray[np.bool_]

    @classmethod
    def of(cls, scenes: Iterable[Scene]) -> CaptionedImages:
        """The pictures and words of scenes."""
        images, captions, nouns = zip(*((scene.image, scene.caption, scene.nouns) for scene in scenes), strict=True)
        words = tuple(sorted({word for names in nouns for word in names}))
        named = np.array([[word in names for word in words] for names in nouns])
        return cls(np.stack(images), captions, words, named)

    @classmethod
    def scenes(cls, seed: int, count: int, level: int, size: int) -> CaptionedImages:
        """Scenes 0 .. count - 1 of a seed and level, square."""
        return cls.of(make_scene(seed, index, level, (size, size)) for index in range(count))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """`count` pictures at random, the batch mirrored at random along either axis, and their numbers."""
        numbers = rng.integers(len(self.images), size=count)
        images = self.images[numbers]
        if rng.random() < 0.5:
            images = images[:, :, ::-1]
        if rng.random() < 0.5:
            images = images[:, ::-1]
        return images, numbers


@dataclass(frozen=True, eq=False)
class Batch(Generic[A]):
    """What one step sees. B images, P patches, W the batch's different prompts.

    pixels: float32 `[B, 3, H, W]`, possibly mixed; allowed: bool `[B, P, W]` (`[B, 1, W]` where nothing is mixed), the words
    of each patch's caption; named: bool `[B, W]`, the words of each unmixed image's caption (no word where it is mixed);
    prompts: their tokens; captions: the tokens of the whole sentences; of_caption: int64 `[B, M]`, M prompts of each
    caption. The last two only for the paper's losses.
    """

    pixels: A
    allowed: A
    named: A
    prompts: Mapping[str, A]
    captions: Mapping[str, A] | None = None
    of_caption: A | None = None

    def map(self, change: Callable[[A], B]) -> Batch[B]:
        """Each array changed, to a backend's tensors say."""

        def each(arrays: Mapping[str, A]) -> Mapping[str, B]:
            return {name: change(array) for name, array in arrays.items()}

        return Batch(
            change(self.pixels),
            change(self.allowed),
            change(self.named),
            each(self.prompts),
            None if self.captions is None else each(self.captions),
            None if self.of_caption is None else change(self.of_caption),
        )


class SceneBatches:
    """The batches of a run, without end: levels in turn, so that words of other levels are never taken for wrong answers.

    Every process draws the whole batch and keeps its part of the images; the prompts are all of the batch's words on each of them.
    Where it stands is a small state of JSON values, from which another one goes on.

    Args:
        pictures: level -> its pictures; rng: draws everything that is random here (None: made from the recipe's seed).
        rank, world: which part of the images, of how many.
    """

    def __init__(
        self,
        recipe: Recipe,
        pictures: Mapping[int, CaptionedImages],
        processor: GroupViTProcessor,
        rng: np.random.Generator | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe = recipe
        self.pictures = pictures
        self.processor = processor
        self.rng = np.random.default_rng(recipe.run.seed) if rng is None else rng
        self.step = 0
        share = recipe.schedule.batch_size // world
        self.mine = slice(rank * share, (rank + 1) * share)
        self._prompts = {
            (level, template): self._tokens([template.format(word) for word in pictures[level].words])
            for level in recipe.scenes.levels
            for template in recipe.scenes.templates
        }

    def __iter__(self) -> Iterator[Batch[NDArray[Any]]]:
        return self

    def __next__(self) -> Batch[NDArray[Any]]:
        recipe, rng, images = self.recipe, self.rng, self.processor.image_processor
        scenes, count, mine = recipe.scenes, recipe.schedule.batch_size, self.mine
        level = scenes.turns[self.step % len(scenes.turns)]
        self.step += 1
        pictures = self.pictures[level]
        batch_images, numbers = pictures.draw(rng, count)
        pixels = to_pixels(batch_images, images.image_mean, images.image_std)
        named = pictures.named[numbers]
        template = scenes.templates[int(rng.integers(len(scenes.templates)))]
        present = named.any(axis=0)
        named = named[:, present]
        words = {key: value[present] for key, value in self._prompts[level, template].items()}
        if recipe.objective.kind == "paper":
            captions = self._tokens([pictures.captions[number] for number in numbers])
            # As many of each caption as the shortest one has.
            prompts = min(scenes.prompts, int(named.sum(axis=1).min()))
            chosen = [rng.choice(np.flatnonzero(row), prompts, replace=False) for row in named]
            captions = {key: value[mine] for key, value in captions.items()}
            return Batch(pixels[mine], named[mine, None], named[mine], words, captions, np.stack(chosen)[mine])
        pixels, allowed = mix_halves(pixels, named, scenes.mixed_share, recipe.model.patch_size, rng)
        named[: int(count * scenes.mixed_share)] = False
        return Batch(pixels[mine], allowed[mine], named[mine], words)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: what is drawn next depends on nothing else."""
        return {"step": self.step, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of `state_dict`."""
        self.step = state["step"]
        self.rng.bit_generator.state = state["rng"]

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, NDArray[np.int64]]:
        encoded: Mapping[str, NDArray[np.int64]] = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="np"
        )
        return encoded


def batches(
    recipe: Recipe, pictures: Mapping[int, CaptionedImages], processor: GroupViTProcessor, rng: np.random.Generator
) -> Iterator[Batch[NDArray[Any]]]:
    """The batches of a whole run of one process (see `SceneBatches`), as many as it has steps."""
    return islice(SceneBatches(recipe, pictures, processor, rng), recipe.schedule.total_steps)


def to_pixels(images: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float]) -> NDArray[np.float32]:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]`, normalised per channel as the image processor does."""
    centre, spread = (np.array(tuple(values), np.float32) for values in (mean, std))
    pixels = (images.astype(np.float32) / np.float32(255) - centre) / spread
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def mix_halves(
    pixels: NDArray[np.float32], named: NDArray[np.bool_], share: float, patch: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Puts part of one picture beside part of another in the first `share` of a batch.

    The cut is straight, across or down, on a patch border, between a quarter and three quarters of the way. (Yun et al. 2019,
    "CutMix", mix rectangles and whole-image labels; here each patch keeps the words of the picture that it comes from.)

    Args:
        pixels: `[B, 3, H, W]`; named: bool `[B, W]`, words of each caption; patch: side of a patch in pixels.

    Returns:
        pixels `[B, 3, H, W]` and the words of each patch's caption, bool `[B, P, W]`.
    """
    batch, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    mixed = int(batch * share)
    other = np.zeros((batch, rows, columns), bool)
    for number in range(mixed):
        if rng.random() < 0.5:
            other[number, :, int(rng.integers(columns // 4, columns - columns // 4 + 1)) :] = True
        else:
            other[number, int(rng.integers(rows // 4, rows - rows // 4 + 1)) :] = True
    partner = np.arange(batch)
    partner[:mixed] = np.roll(partner[:mixed], 1)
    from_other = other.repeat(patch, 1).repeat(patch, 2)[:, None]
    pixels = np.where(from_other, pixels[partner], pixels)
    return pixels, np.where(other.reshape(batch, -1, 1), named[partner][:, None], named[:, None])
