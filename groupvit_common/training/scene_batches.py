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
from PIL import Image

from groupvit_common.data.scenes import Scene, make_scene
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.training.recipe import Recipe

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
    def scenes(
        cls,
        seed: int,
        count: int,
        level: int,
        size: int,
        *,
        single_share: float = 0.0,
        close_up_share: float = 0.0,
    ) -> CaptionedImages:
        """Scenes 0 .. count - 1 of a seed and level, square; see `make_scene`."""
        return cls.of(
            make_scene(seed, index, level, (size, size), single_share=single_share, close_up_share=close_up_share)
            for index in range(count)
        )

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
        batch_images = enlarged(batch_images, recipe.model.image_size, images.resample)
        pixels = to_pixels(batch_images, images.image_mean, images.image_std)
        named = pictures.named[numbers]
        template = scenes.templates[int(rng.integers(len(scenes.templates)))]
        present = named.any(axis=0)
        named = named[:, present]
        words = {key: value[present] for key, value in self._prompts[level, template].items()}
        captions, of_caption = None, None
        if recipe.objective.has_paper_losses:
            captions = self._tokens([pictures.captions[number] for number in numbers])
            captions = {key: value[mine] for key, value in captions.items()}
            of_caption = np.stack([_chosen(np.flatnonzero(row), scenes.prompts, rng) for row in named])[mine]
        if recipe.objective.kind == "paper":
            return Batch(pixels[mine], named[mine, None], named[mine], words, captions, of_caption)
        mixed = recipe.mixed_images
        pixels, allowed = mix_pictures(
            pixels, named, mixed, recipe.model.patch_size, rng, quarters=scenes.mixed_quarters
        )
        named[:mixed] = False
        return Batch(pixels[mine], allowed[mine], named[mine], words, captions, of_caption)

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


def enlarged(images: NDArray[np.uint8], side: int, resample: int) -> NDArray[np.uint8]:
    """uint8 `[B, h, w, 3]` -> `[B, side, side, 3]`, by Pillow's filter as the image processor does."""
    if images.shape[1:3] == (side, side):
        return images
    pictures = (Image.fromarray(np.ascontiguousarray(image)) for image in images)
    return np.stack([np.asarray(picture.resize((side, side), Image.Resampling(resample))) for picture in pictures])


def to_pixels(images: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float]) -> NDArray[np.float32]:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]`, normalised per channel as the image processor does."""
    centre, spread = (np.array(tuple(values), np.float32) for values in (mean, std))
    pixels = (images.astype(np.float32) / np.float32(255) - centre) / spread
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _chosen(words: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """`count` of a caption's words: all of them before any of them twice."""
    times = -(-count // len(words))
    return np.concatenate([words[:0], *(rng.permutation(words) for _ in range(times))])[:count]


def mix_pictures(
    pixels: NDArray[np.float32],
    named: NDArray[np.bool_],
    mixed: int,
    patch: int,
    rng: np.random.Generator,
    *,
    quarters: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Puts part of one picture beside part of another in the first `mixed` of a batch; with `quarters`, parts of four pictures.

    Cuts are straight, across or down (or both), on a patch border, between a quarter and three quarters of the way. (Yun et al. 2019,
    "CutMix", mix rectangles and whole-image labels; here each patch keeps the words of the picture that it comes from.)

    Args:
        pixels: `[B, 3, H, W]`; named: bool `[B, W]`, words of each caption; patch: side of a patch in pixels.

    Returns:
        pixels `[B, 3, H, W]` and the words of each patch's caption, bool `[B, P, W]`.
    """
    batch, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    source = np.broadcast_to(np.arange(batch)[:, None, None], (batch, rows, columns)).copy()
    for number in range(mixed):
        across = int(rng.integers(columns // 4, columns - columns // 4 + 1))
        down = int(rng.integers(rows // 4, rows - rows // 4 + 1))
        if quarters:
            source[number, :down, across:] = (number - 1) % mixed
            source[number, down:, :across] = (number - 2) % mixed
            source[number, down:, across:] = (number - 3) % mixed
        elif rng.random() < 0.5:
            source[number, :, across:] = (number - 1) % mixed
        else:
            source[number, down:] = (number - 1) % mixed
    of_pixel = source.repeat(patch, 1).repeat(patch, 2)
    y, x = np.arange(height)[:, None], np.arange(width)
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)[of_pixel, y, x].transpose(0, 3, 1, 2))
    return pixels, named[source.reshape(batch, -1)]
