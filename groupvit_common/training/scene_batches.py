"""Batches of synthetic scenes for training, in NumPy: every backend trains on the very same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.training.recipe import Recipe

A = TypeVar("A")
"""An array, or a backend's tensor."""

B = TypeVar("B")


class TrainingScenes:
    """N scenes of one level, each made when it is first drawn.

    It keeps what training may know: images, captions and the names in them. Masks are dropped here.

    Args:
        make: number of a scene -> the scene, `size` pixels a side.
    """

    def __init__(self, make: Callable[[int], Scene], count: int, level: int, size: int) -> None:
        self._make = make
        self._images = np.empty((count, size, size, 3), np.uint8)
        self._captions: list[str] = [""] * count
        self.words = tuple(sorted(name for names in (*LEVELS[level], *BACKGROUNDS) for name in names))
        """All names that captions of the level may have."""
        self._named = np.zeros((count, len(self.words)), np.bool_)

    def __len__(self) -> int:
        return len(self._captions)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], list[str], NDArray[np.bool_]]:
        """Returns `count` random images `[B, H, W, 3]`, the batch mirrored at random along either axis, their captions
        and the words of each caption `[B, words]`."""
        numbers = rng.integers(len(self), size=count)
        images, captions, named = self.take(numbers.tolist())
        if rng.random() < 0.5:
            images = images[:, :, ::-1]
        if rng.random() < 0.5:
            images = images[:, ::-1]
        return images, captions, named

    def take(self, numbers: Sequence[int]) -> tuple[NDArray[np.uint8], list[str], NDArray[np.bool_]]:
        """Returns images, captions and words of scenes, as `draw` does."""
        for number in numbers:
            if not self._captions[number]:
                scene = self._make(number)
                self._images[number], self._captions[number] = scene.image, scene.caption
                self._named[number] = [word in scene.nouns for word in self.words]
        rows = np.asarray(numbers, np.intp)
        return self._images[rows], [self._captions[number] for number in numbers], self._named[rows]


@dataclass(frozen=True, eq=False)
class Batch(Generic[A]):
    """The data of one step: B images, P patches, W different prompts of the batch.

    pixels: float32 `[B, 3, H, W]`, possibly mixed; allowed: bool `[B, P, W]` (`[B, 1, W]` where nothing is mixed), the
    prompts of each patch's caption; named: bool `[B, W]`, the prompts of each image's caption (none for mixed images);
    prompts: their tokens; captions: tokens of the whole sentences; of_caption: int64 `[B, M]`, M prompts of each
    caption. The last two only for the paper's losses.
    """

    pixels: A
    allowed: A
    named: A
    prompts: Mapping[str, A]
    captions: Mapping[str, A] | None = None
    of_caption: A | None = None

    def map(self, change: Callable[[A], B]) -> Batch[B]:
        """Returns a batch with each array changed, such as to a backend's tensor."""

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
    """The batches of a run, without end: one level in each, so that names of other levels are never taken for wrong
    answers.

    Every process draws the whole batch and keeps its part of the images; each has the prompts of the whole batch.

    Args:
        scenes: level -> its scenes.
        rng: of all randomness here; None: from the recipe's seed.
        rank, world: of this process.
    """

    def __init__(
        self,
        recipe: Recipe,
        scenes: Mapping[int, TrainingScenes],
        processor: GroupViTProcessor,
        rng: np.random.Generator | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe = recipe
        self.scenes = scenes
        self.processor = processor
        self.rng = np.random.default_rng(recipe.run.seed) if rng is None else rng
        self.step = 0
        part = recipe.schedule.batch_size // world
        self.mine = slice(rank * part, (rank + 1) * part)
        self._prompts = {
            (level, template): self._tokens([template.format(word) for word in scenes[level].words])
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
        drawn, sentences, named = self.scenes[level].draw(rng, count)
        pixels = to_pixels(
            enlarged(drawn, recipe.model.image_size, images.resample), images.image_mean, images.image_std
        )
        template = scenes.templates[int(rng.integers(len(scenes.templates)))]
        present = named.any(axis=0)
        named = named[:, present]
        words = {key: value[present] for key, value in self._prompts[level, template].items()}
        captions, of_caption = None, None
        if recipe.objective.has_paper_losses:
            captions = {key: value[mine] for key, value in self._tokens(sentences).items()}
            of_caption = np.stack([_chosen(np.flatnonzero(row), scenes.prompts, rng) for row in named])[mine]
        if recipe.objective.kind == "paper":
            return Batch(pixels[mine], named[mine, None], named[mine], words, captions, of_caption)
        mixed = recipe.mixed_images
        pixels, allowed = mix_images(pixels, named, mixed, recipe.model.patch_size, rng, quarters=scenes.mixed_quarters)
        named[:mixed] = False
        return Batch(pixels[mine], allowed[mine], named[mine], words, captions, of_caption)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, as JSON values: the next batches depend on nothing else."""
        return {"step": self.step, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position of `state_dict`."""
        self.step = state["step"]
        self.rng.bit_generator.state = state["rng"]

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, NDArray[np.int64]]:
        encoded: Mapping[str, NDArray[np.int64]] = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="np"
        )
        return encoded


def enlarged(images: NDArray[np.uint8], side: int, resample: int) -> NDArray[np.uint8]:
    """Resizes uint8 `[B, h, w, 3]` to `[B, side, side, 3]` with Pillow's filter, as the image processor does."""
    if images.shape[1:3] == (side, side):
        return images
    opened = (Image.fromarray(np.ascontiguousarray(image)) for image in images)
    return np.stack([np.asarray(image.resize((side, side), Image.Resampling(resample))) for image in opened])


def to_pixels(images: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float]) -> NDArray[np.float32]:
    """Normalises uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]`, as the image processor does."""
    centre, spread = (np.array(tuple(values), np.float32) for values in (mean, std))
    pixels = (images.astype(np.float32) / np.float32(255) - centre) / spread
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _chosen(words: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draws `count` of a caption's words: all of them before any of them twice."""
    times = -(-count // len(words))
    return np.concatenate([words[:0], *(rng.permutation(words) for _ in range(times))])[:count]


def mix_images(
    pixels: NDArray[np.float32],
    named: NDArray[np.bool_],
    mixed: int,
    patch: int,
    rng: np.random.Generator,
    *,
    quarters: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Puts part of one image beside part of another in the first `mixed` of a batch; with `quarters`, parts of four
    images.

    Cuts are vertical or horizontal (or both), on a patch border, between a quarter and three quarters of the side. (Yun
    et al. 2019, "CutMix", mix rectangles and whole-image labels; here each patch keeps the prompts of the image that it
    comes from.)

    Args:
        pixels: `[B, 3, H, W]`.
        named: bool `[B, W]`, the prompts of each caption.
        patch: side of a patch in pixels.

    Returns:
        Pixels `[B, 3, H, W]` and the prompts of each patch's caption, bool `[B, P, W]`.
    """
    batch, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    source = np.broadcast_to(np.arange(batch)[:, None, None], (batch, rows, columns)).copy()
    for number in range(mixed):
        column = int(rng.integers(columns // 4, columns - columns // 4 + 1))
        row = int(rng.integers(rows // 4, rows - rows // 4 + 1))
        if quarters:
            source[number, :row, column:] = (number - 1) % mixed
            source[number, row:, :column] = (number - 2) % mixed
            source[number, row:, column:] = (number - 3) % mixed
        elif rng.random() < 0.5:
            source[number, :, column:] = (number - 1) % mixed
        else:
            source[number, row:] = (number - 1) % mixed
    pixel_source = source.repeat(patch, 1).repeat(patch, 2)
    y, x = np.arange(height)[:, None], np.arange(width)
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)[pixel_source, y, x].transpose(0, 3, 1, 2))
    return pixels, named[source.reshape(batch, -1)]
