"""The segmenter of any framework: images and labels -> label maps. A backend fills in the tensor work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME
from groupvit_common.checkpoints.hub import DEMO_MODEL as DEMO_MODEL
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, is_whole_number
from groupvit_common.model.optimization import OptimizationReport, Optimized, optimization_request
from groupvit_common.preprocessing.image_files import images_in
from groupvit_common.preprocessing.images import MAX_PIXELS, as_array, load_image
from groupvit_common.preprocessing.processor import PROCESSOR_FILES, GroupViTProcessor, check_fit, missing_parts
from groupvit_common.preprocessing.prompts import Label, parse_labels
from groupvit_common.segmentation.label_encoder import LabelEncoder
from groupvit_common.segmentation.label_maps import (
    Indices,
    PixelLabels,
    View,
    group_windows,
    label_similarity,
    pixel_labels,
    view_scores,
)
from groupvit_common.segmentation.options import DEFAULT_MODEL, OPTIONS, SegmentationOptions
from groupvit_common.segmentation.result import BACKGROUND, Details, Segmentation, segmentation
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.windows import Windows

# Pixels of images read ahead at most (a 12-megapixel photo takes 36 MB).
_PIXELS_AHEAD = 64_000_000
# An image longer than this many times its shorter side is made smaller rather than long: attention over patches grows
# with the square of their number.
_LONGEST = 4
# The same where the model sees windows: the authors' bound, 2048 pixels for a shorter side of 448.
_LONGEST_IN_WINDOWS = 2048 / 448


@dataclass(frozen=True, eq=False)
class _Opened:
    """An opened image: upright RGB, its file if there is one, its height and width once resized, and those of its
    windows."""

    image: Image.Image
    source: str | None
    size: tuple[int, int]
    part: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _LabelSet:
    """The labels of one `set_labels`, never changed: a call reads the segmenter's once and sees one set,
    whatever other threads do.

    Attributes:
        labels: L of them; is_background: of each.
        embeds: `[L, E]`, or several of each, `[L, K, E]`.
    """

    labels: tuple[Label, ...]
    is_background: tuple[bool, ...]
    embeds: Floats

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A view of an image and its probabilities `[L]` of these labels."""

    labels: _LabelSet
    probabilities: Floats
    view: View


class BaseSegmenter(ABC):
    """Segments images by text labels.

        segmenter = Segmenter.from_pretrained("demo", labels="red, green, blue", background_labels="grass, sand")
        result = segmenter("photo.jpg")
        result.label_map, result.labels, result.overlay().save("overlay.png")

    Args:
        model, processor: see `from_pretrained`. The model is put into evaluation mode and stays on its device.
        labels: class names, as `groupvit_common.preprocessing.prompts.parse_labels` takes them: "cat, couch | sofa" or
            ["cat", "couch, sofa"] with synonyms, {"dog": ["puppy", '"an animal that barks"']} with a definition, or
            `Label` records. May be set later with `set_labels`.
        background_labels: labels, among `labels` or besides them, whose pixels become background.
            A label that is called "background" is one by itself.
        batch_size: images (or windows) of one size in the model at once.
        max_pixels: larger images are refused by their header, but for JPEGs that are read at half their size: see
            `groupvit_common.preprocessing.images.load_image`.
        options: how pixels get labels, the fields of `groupvit_common.segmentation.options.SegmentationOptions`. They
            are attributes as well.

    `directory` is the checkpoint of `from_pretrained`, None for a model that came otherwise; `optimization` the report
    of its `fast` or `dtype="int8"`, None without. One segmenter may serve
    several threads, which may set labels: each call, and each iterator, uses the labels that were set when it began.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        processor: GroupViTProcessor,
        *,
        labels: str | Iterable[str | Label] | None = None,
        background_labels: str | Iterable[str | Label] = (),
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
        **options: Any,
    ) -> None:
        for name, count in (("batch_size", batch_size), ("max_pixels", max_pixels)):
            if not is_whole_number(count) or count < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {count!r}")
        chosen = SegmentationOptions(**options).for_model(model.config)
        self.model = self._ready(model)
        self.processor = processor
        self.directory: Path | None = None
        self.optimization: OptimizationReport | None = None
        self.batch_size = batch_size
        self.max_pixels = int(max_pixels)
        self.options = chosen
        self._label_set: _LabelSet | None = None
        if labels is not None:
            self.set_labels(labels, background_labels)

    @property
    def options(self) -> SegmentationOptions:
        """The options of segmentation. Those of prompts hold for labels that are set afterwards, the others from the
        next call on."""
        return self._options

    @options.setter
    def options(self, options: SegmentationOptions) -> None:
        self._options = options = options.for_model(self.model.config)
        text = self.model.config.text_config
        context = int(min(text.max_position_embeddings, self.processor.tokenizer.model_max_length))
        self._encode = LabelEncoder(self.processor.tokenizer, context, self._embed_texts, options)
        assert options.shorter_side is not None
        patch = self.model.config.vision_config.patch_size
        sides = [max(1, round(options.shorter_side * scale)) for scale in options.scales]
        self._image_processors = [
            self.processor.image_processor.for_segmentation(side, patch, longer_side=_LONGEST * max(side, patch))
            for side in sides
        ]
        self.image_processor = self._image_processors[0]

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        processor: GroupViTProcessor | str | Path | None = None,
        device: Any = None,
        dtype: Any = None,
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Returns a segmenter with the model and processor of a checkpoint.

        Args:
            model: "demo" for the bundled model, a checkpoint directory, or "org/name" on the hub.
            processor: of another checkpoint (named as `model` is), or one at hand, for a checkpoint without tokenizer
                and image processor; None: its own.
            device: "cpu", "cuda", "cuda:1" or another of the framework's own; None: the best there is.
            dtype: of the weights, such as "bfloat16"; float32 if None. "int8" quantizes them, for CPUs.
            fast: let `optimize` of the backend choose the dtype by what computes, unless it is named; results then
                differ a little. What was chosen is the segmenter's `optimization`.
            revision, token, cache_dir, local_files_only: see `groupvit_common.checkpoints.hub.HubLocation`.
            options: the constructor's keywords.

        Raises:
            CheckpointError: the checkpoint cannot be found, reached, read or loaded.
            InputError: an argument that cannot be used.
        """
        chosen = cls._device(device)
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        companions = PROCESSOR_FILES if processor is None else ()
        directory = hub.resolve(
            model,
            patterns=[CONFIG_NAME, *companions, WEIGHTS_NAME],
            required=[CONFIG_NAME, WEIGHTS_NAME],
            location=hub.HubLocation(revision=revision, **where),
        )
        # The processor first: it is small, and a checkpoint without one is no use here.
        if processor is None:
            if lacking := missing_parts(directory):
                raise CheckpointError(
                    f"{model} has {lacking}: name a checkpoint that has them (processor=..., on the command line "
                    "--processor NAME)"
                )
            processor = GroupViTProcessor.from_pretrained(directory)
        elif isinstance(processor, str | Path):
            processor = GroupViTProcessor.from_pretrained(processor, **where)
        request = optimization_request(dtype, fast=fast)
        loaded = cls._load(directory, dtype if request is None else None, chosen)
        check_fit(processor, loaded.config)
        report = None
        if request is not None:
            loaded, report = cls._optimized(loaded, request)
        segmenter = cls(loaded, processor, **options)
        segmenter.directory, segmenter.optimization = directory, report
        return segmenter

    def set_labels(
        self,
        labels: str | Iterable[str | Label],
        background_labels: str | Iterable[str | Label] = (),
        *,
        embeddings: Floats | None = None,
    ) -> None:
        """Sets the labels of the following calls. Only labels never seen before are encoded.

        `embeddings` of the labels, `[L, E]` or several for each `[L, K, E]`, of which the most similar counts, take the
        place of the model's; `background_labels` that are not among `labels` come last.
        """
        parsed = parse_labels(labels)
        extra = parse_labels(background_labels) if background_labels else ()
        hidden = {BACKGROUND, *(label.name.casefold() for label in extra)}
        known = {label.name.casefold() for label in parsed}
        every = parse_labels([*parsed, *(label for label in extra if label.name.casefold() not in known)])
        if embeddings is None:
            embeddings = self._encode(every)
        wanted = (len(every), self.model.config.projection_dim)
        shape = embeddings.shape
        if embeddings.ndim not in (2, 3) or not embeddings.size or (shape[0], shape[-1]) != wanted:
            raise InputError(f"embeddings of the labels must be {list(wanted)}, got {list(shape)}")
        is_background = tuple(label.name.casefold() in hidden for label in every)
        self._check_foreground(is_background, self.options)
        self._label_set = _LabelSet(every, is_background, embeddings)

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that were set last; () if none were."""
        return () if self._label_set is None else self._label_set.labels

    def __call__(self, images: Any) -> Any:
        """One image -> `Segmentation`; a list, tuple or array `[B, ...]` of images -> a list of them, in order.

        An image is a path, the bytes of a file, a PIL image, or an array `[H, W, 3]`.
        InputError for an image that cannot be read, and if there are no labels.
        """
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return list(self.iter(images))
        return next(self.iter([images]))

    def iter(self, images: str | Path | Iterable[Any]) -> Iterator[Segmentation]:
        """Segments the images of a folder or of an iterable, in order.

        Images are opened as they are needed, a few ahead, so that those of one size go through the model together.
        """
        labels = self._labelled()
        sources = images_in(images) if isinstance(images, str | Path) else images
        return self._iter(sources, labels)

    def classify(self, images: Any) -> Any:
        """Probability of each label for the whole image, `{label: probability}`; a list of these for several images.

        The image is prepared as the checkpoint's processor says, which for most crops the middle.
        """
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            labels = self._labelled()
            return [self._label_probabilities(image, labels) for image in images]
        return self._label_probabilities(images, self._labelled())

    def _label_probabilities(self, image: Any, labels: _LabelSet) -> dict[str, float]:
        probabilities = self._classify(self._classifier_pixels(image), labels.embeds)[0].tolist()
        return dict(zip(labels.names, probabilities, strict=True))

    def probabilities(self, images: Sequence[Any]) -> Floats:
        """The same for many images as an array `[N, L]`, through the model `batch_size` at a time; InputError as
        `classify`."""
        labels = self._labelled()
        parts = []
        for start in range(0, len(images), self.batch_size):
            pixels = [self._classifier_pixels(image) for image in images[start : start + self.batch_size]]
            parts.append(self._classify(np.concatenate(pixels), labels.embeds))
        return np.concatenate(parts) if parts else np.zeros((0, len(labels.labels)), np.float32)

    def threshold_maps(self, image: Any, thresholds: Iterable[float | None]) -> Iterator[Indices]:
        """The label map of one image with each of these in the place of `background`. The model sees the image once."""
        labels, options, opened = self._labelled(), self.options, self._open(image)
        views = self._view_pixels(opened)
        seen = self._see(views, labels)
        size = (opened.image.height, opened.image.width)
        return (
            self._label(seen, views[0], size, replace(options, background=threshold)).label_map
            for threshold in thresholds
        )

    def details(self, image: Any) -> Details:
        """The groups of every grouping block and the similarity to every label, of one image, for figures.

        InputError as `__call__`. The model sees the image once more for it.
        """
        labels, opened = self._labelled(), self._open(image)
        pixels, windows = self._pixels(opened, opened.size), self._windows(opened.size)
        parts = [pixels[:, rows, columns] for rows, columns in windows]
        seen = [
            self._blocks(np.stack(parts[start : start + self.batch_size]))
            for start in range(0, len(parts), self.batch_size)
        ]
        groups = np.concatenate([embeds for embeds, _ in seen])
        block_maps = [np.concatenate(maps) for maps in zip(*(maps for _, maps in seen), strict=True)]
        size = (opened.image.height, opened.image.width)
        return Details(
            tuple(group_windows(maps, windows, size) for maps in block_maps),
            tuple(labels.names),
            label_similarity(groups, block_maps[-1], labels.embeds, windows, opened.size),
        )

    # One level down: images as arrays that are ready for the model.

    def prepare(self, image: Any) -> npt.NDArray[np.float32]:
        """Pixels `[3, H, W]` of one image at the size at which the model sees it, normalised."""
        opened = self._open(image)
        return self._pixels(opened, opened.size)

    def pixel_labels(self, pixels: Floats, size: tuple[int, int]) -> PixelLabels:
        """The maps at `size` = (H, W), the original's, of one prepared image `[3, h, w]`, of one view as it is.

        InputError for sides that are neither a multiple of the patch size nor larger than the window.
        """
        return self._label([self._see_prepared(pixels)], pixels, size, self.options)

    def pixel_scores(self, pixels: Floats, size: tuple[int, int] | None = None) -> Floats:
        """Scores `[C, H, W]`, 0 to 1, of every label and pixel of one prepared image `[3, h, w]`, of one view as it is.

        Their largest make the map, unless they are still to be refined, or weighed as foreground and background. C is
        the number of `labels`, in their order; one more where there is a `background` threshold, which comes first.
        `size` = (H, W), by default the prepared image's. InputError as for `pixel_labels`.
        """
        view = self._see_prepared(pixels).view
        size = (pixels.shape[1], pixels.shape[2]) if size is None else size
        return np.concatenate(list(self._view_scores(view, size)), axis=1)

    # The part of a backend.

    @classmethod
    @abstractmethod
    def _device(cls, wanted: Any) -> Any:
        """The device of a name, the best there is for None. `InputError` for one that is not there."""

    @classmethod
    @abstractmethod
    def _load(cls, directory: Path, dtype: Any, device: Any) -> Any:
        """The model of a checkpoint directory, on a device that `_device` gave."""

    @classmethod
    @abstractmethod
    def _optimized(cls, model: Any, request: Mapping[str, Any]) -> Optimized:
        """The result of the backend's `optimize` with these keywords."""

    def _ready(self, model: Any) -> Any:
        """The model in evaluation mode, where models have such a mode."""
        return model

    @abstractmethod
    def _embed_texts(self, tokens: Mapping[str, npt.NDArray[np.int64]]) -> Floats:
        """The tokenizer's arrays `[N, T]` -> the model's embeddings `[N, E]`, float32 or wider, of any length."""

    @abstractmethod
    def _classify(self, pixels: Floats, label_embeds: Floats) -> Floats:
        """Images `[B, 3, h, w]`, labels `[L, E]` -> probabilities `[B, L]`."""

    @abstractmethod
    def _group(self, pixels: Floats, label_embeds: Floats) -> tuple[Floats, Any, Any]:
        """Images `[B, 3, h, w]`, labels `[L, E]` -> probabilities `[B, L]`, affinities `[B, G, L]` and grouping maps
        `[B, G, h, w]` (`groupvit_common.segmentation.scores`), float32 or wider."""

    @abstractmethod
    def _blocks(self, pixels: Floats) -> tuple[Floats, list[Floats]]:
        """Images `[B, 3, h, w]` -> embeddings of the groups `[B, G, E]`, and the grouping map of each block up to
        it."""

    # These are right for a backend whose affinities and grouping maps are arrays.

    def _stack(self, parts: Sequence[Any]) -> Any:
        """Affinities or grouping maps of several windows in one."""
        return np.stack(parts)

    def _pixel_labels(
        self,
        views: Sequence[View],
        pixels: Floats,
        size: tuple[int, int],
        options: SegmentationOptions,
        is_background: Sequence[bool],
    ) -> PixelLabels:
        """`label_maps.pixel_labels` of one image."""
        return pixel_labels(views, pixels, size, options, is_background)

    def _view_scores(self, view: View, size: tuple[int, int]) -> Iterator[Floats]:
        """`label_maps.view_scores`: strips `[C, rows, W]`, from top to bottom."""
        return (scores for _, scores in view_scores(view, size, self.options))

    # The rest.

    def _check_foreground(self, is_background: Sequence[bool], options: SegmentationOptions) -> None:
        has_background = any(is_background) or options.background is not None
        if options.foreground is not None and (all(is_background) or not has_background):
            raise InputError(
                "foreground weighs labels against a background: give labels and background_labels, or a background "
                "threshold"
            )

    def _labelled(self) -> _LabelSet:
        """The labels of this call; read once for each."""
        labels = self._label_set
        if labels is None:
            raise InputError('there are no labels: call set_labels("cat, couch, remote control") first')
        return labels

    def _iter(self, sources: Iterable[Any], labels: _LabelSet) -> Iterator[Segmentation]:
        waiting: dict[int, _Opened] = {}
        done: dict[int, Segmentation] = {}
        given = 0

        def run(size: tuple[int, int]) -> None:
            numbers = [i for i, opened in waiting.items() if opened.part == size]
            done.update(zip(numbers, self._segment([waiting.pop(i) for i in numbers], labels), strict=True))

        def ready() -> Iterator[Segmentation]:
            nonlocal given
            while given in done:
                yield done.pop(given)
                given += 1

        for index, source in enumerate(sources):
            opened = self._open(source)
            waiting[index] = opened
            if sum(other.part == opened.part for other in waiting.values()) == self.batch_size:
                run(opened.part)
            yield from ready()
            # Too much read ahead: the oldest waits no longer for company.
            while waiting and (
                len(waiting) + len(done) >= 2 * self.batch_size
                or sum(other.image.width * other.image.height for other in waiting.values()) > _PIXELS_AHEAD
            ):
                run(next(iter(waiting.values())).part)
                yield from ready()
        while waiting:
            run(next(iter(waiting.values())).part)
            yield from ready()

    def _open(self, source: Any) -> _Opened:
        image = load_image(source, max_pixels=self.max_pixels)
        name = str(source) if isinstance(source, str | Path) else getattr(source, "filename", None) or None
        size = self._size(image.height, image.width)
        return _Opened(image, name, size, self._windows(size).size)

    def _classifier_pixels(self, source: Any) -> npt.NDArray[np.float32]:
        """Pixels `[1, 3, H, W]` of one image, prepared as the checkpoint's processor says."""
        image = load_image(source, max_pixels=self.max_pixels)
        encoding = self.processor.image_processor(image, return_tensors="np", max_pixels=self.max_pixels)
        return np.asarray(encoding["pixel_values"])

    def _size(self, height: int, width: int, scale: int = 0) -> tuple[int, int]:
        """Height and width at which the model sees an image of this height and width, at the scale of that number."""
        if self.options.window is None:
            return self._image_processors[scale].resized_size(height, width)
        # Windows fit any side that is as long as they are. A shorter one is seen whole and must hold whole patches.
        patch, window = self.model.config.vision_config.patch_size, self.options.window
        assert self.options.shorter_side is not None
        short, long = min(height, width), max(height, width)
        shorter_side = self.options.shorter_side * self.options.scales[scale]
        factor = min(shorter_side / short, _LONGEST_IN_WINDOWS * shorter_side / long)
        nearest = (int(side * factor + 0.5) for side in (height, width))
        rows, columns = (side if side >= window else max(1, round(side / patch)) * patch for side in nearest)
        return rows, columns

    def _view_pixels(self, opened: _Opened) -> list[npt.NDArray[np.float32]]:
        """The views of an image: at each scale, and with `flip` mirrored at each scale."""
        height, width = opened.image.height, opened.image.width
        views = [self._pixels(opened, self._size(height, width, scale)) for scale in range(len(self.options.scales))]
        return [*views, *(np.flip(pixels, 2) for pixels in views)] if self.options.flip else views

    def _pixels(self, opened: _Opened, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        height, width = size
        pixels = self.image_processor(
            opened.image,
            size={"height": height, "width": width},
            size_divisor=1,
            max_pixels=self.max_pixels,
            return_tensors="np",
        )["pixel_values"]
        return np.asarray(pixels[0])

    def _windows(self, size: tuple[int, int]) -> Windows:
        """The windows of a prepared image of this size: one, the image, without the option."""
        if self.options.window is None or self.options.stride is None:
            return Windows.whole(size)
        return Windows.over(size, self.options.window, self.options.stride)

    def _see(self, images: Sequence[Floats], labels: _LabelSet) -> list[_Seen]:
        """Prepared images `[3, h, w]` through the model, windows of one size together."""
        image_windows = [self._windows((pixels.shape[1], pixels.shape[2])) for pixels in images]
        parts = [
            pixels[:, rows, columns]
            for pixels, windows in zip(images, image_windows, strict=True)
            for rows, columns in windows
        ]
        outputs: list[Any] = [None] * len(parts)  # of each: probabilities, affinity, grouping map
        for shape in dict.fromkeys(part.shape for part in parts):
            alike = [i for i, part in enumerate(parts) if part.shape == shape]
            for start in range(0, len(alike), self.batch_size):
                some = alike[start : start + self.batch_size]
                group = self._group(np.stack([parts[i] for i in some]), labels.embeds)
                for place, i in enumerate(some):
                    outputs[i] = tuple(each[place] for each in group)
        seen, first = [], 0
        for windows in image_windows:
            probabilities, affinity, grouping = zip(*outputs[first : first + len(windows)], strict=True)
            view = View(self._stack(affinity), self._stack(grouping), None if self.options.window is None else windows)
            seen.append(_Seen(labels, np.mean(probabilities, axis=0), view))
            first += len(windows)
        return seen

    def _see_prepared(self, pixels: Floats) -> _Seen:
        """The same for one that a user prepared."""
        if pixels.ndim != 3:
            raise InputError(f"a prepared image must have shape [channels, height, width], got {list(pixels.shape)}")
        sides = self._windows((pixels.shape[1], pixels.shape[2])).size
        is_floating_point = np.issubdtype(pixels.dtype, np.floating)
        shape = (1, len(pixels), *sides)
        check_pixel_values(shape, str(pixels.dtype), is_floating_point, self.model.config.vision_config)
        return self._see([pixels], self._labelled())[0]

    def _label(
        self, seen: Sequence[_Seen], pixels: Floats, size: tuple[int, int], options: SegmentationOptions
    ) -> PixelLabels:
        """The maps of one image from all its views; `pixels` are those of the first."""
        is_background = seen[0].labels.is_background
        self._check_foreground(is_background, options)
        # The mirrored views come last.
        views = [replace(each.view, mirrored=number >= len(options.scales)) for number, each in enumerate(seen)]
        return self._pixel_labels(views, pixels, size, options, is_background)

    def _segment(self, images: Sequence[_Opened], labels: _LabelSet) -> list[Segmentation]:
        """Images of one `part` through the model together."""
        image_views = [self._view_pixels(opened) for opened in images]
        every = self._see([pixels for views in image_views for pixels in views], labels)
        results, count = [], len(image_views[0])
        for number, (opened, views) in enumerate(zip(images, image_views, strict=True)):
            seen = every[number * count : (number + 1) * count]
            size = (opened.image.height, opened.image.width)
            results.append(
                segmentation(
                    opened.image,
                    self._label(seen, views[0], size, self.options),
                    labels.names,
                    np.mean([each.probabilities for each in seen], axis=0).tolist(),
                    is_background=labels.is_background,
                    threshold=self.options.background,
                    source=opened.source,
                    affinity=as_array(seen[0].view.affinity),
                )
            )
        return results


def _attribute(name: str) -> property:
    """An option as an attribute of the segmenter."""

    def read(segmenter: BaseSegmenter) -> Any:
        return getattr(segmenter.options, name)

    def write(segmenter: BaseSegmenter, value: Any) -> None:
        segmenter.options = replace(segmenter.options, **{name: value})

    return property(read, write, doc=OPTIONS[name].help)


for _name in OPTIONS:
    setattr(BaseSegmenter, _name, _attribute(_name))
