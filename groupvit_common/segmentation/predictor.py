"""The segmenter of any framework: images and labels -> label maps. A backend fills in the tensor work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

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
from groupvit_common.segmentation.encoded import (
    Blocks,
    EncodedImage,
    LabelSet,
    SeenView,
    encoded_details,
    encoded_views,
    in_batches,
    labelled_view,
)
from groupvit_common.segmentation.label_encoder import KnownLabels, LabelEncoder
from groupvit_common.segmentation.label_maps import (
    Indices,
    PixelLabels,
    View,
    label_values,
    pixel_labels,
    view_scores,
)
from groupvit_common.segmentation.options import DEFAULT_MODEL, OPTIONS, SegmentationOptions
from groupvit_common.segmentation.parts import BakedLabels
from groupvit_common.segmentation.preparation import Loaded, Preparation, Prepared, load
from groupvit_common.segmentation.result import BACKGROUND, Details, Segmentation, segmentation
from groupvit_common.segmentation.scores import Floats, unit
from groupvit_common.segmentation.smoothing import Smoother
from groupvit_common.segmentation.stream import LabelPixels, OnError, Steps, segmented
from groupvit_common.segmentation.video import VideoFrame, segmented_frames


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
        self.known_labels = KnownLabels()
        self.directory: Path | None = None
        self.optimization: OptimizationReport | None = None
        self.batch_size = batch_size
        self.max_pixels = int(max_pixels)
        self.options = chosen
        self._label_set: LabelSet | None = None
        self._smoother: Smoother | None = None
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
        self._encode_labels = LabelEncoder(
            self.processor.tokenizer, context, self._embed_texts, options, self.known_labels
        )
        patch_size = self.model.config.vision_config.patch_size
        self._preparation = Preparation.of(options, self.processor.image_processor, patch_size)
        self.image_processor = self._preparation.image_processors[0]

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
            embeddings = self._encode_labels(every)
        wanted = (len(every), self.model.config.projection_dim)
        shape = embeddings.shape
        if embeddings.ndim not in (2, 3) or not embeddings.size or (shape[0], shape[-1]) != wanted:
            raise InputError(f"embeddings of the labels must be {list(wanted)}, got {list(shape)}")
        is_background = tuple(label.name.casefold() in hidden for label in every)
        self.options.check_foreground(is_background)
        self._label_set = LabelSet(every, is_background, embeddings)

    def baked_labels(self) -> BakedLabels:
        """Returns what a program needs in place of labels and a background threshold."""
        labels, threshold = self._labelled(), self.options.background
        values, has_background = label_values(labels.is_background, threshold)
        shown = [name for name, hidden in zip(labels.names, labels.is_background, strict=True) if not hidden]
        return BakedLabels((*([BACKGROUND] if has_background else []), *shown), labels.embeds, values, threshold)

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that were set last; () if none were."""
        return () if self._label_set is None else self._label_set.labels

    def __call__(self, images: Any) -> Any:
        """One image -> `Segmentation`; a list, tuple or array `[B, ...]` of images -> a list of them, in order.

        An image is a path, the bytes of a file, a PIL image, an array `[H, W, 3]`, or what `encode` made of it.
        InputError for an image that cannot be read, and if there are no labels.
        """
        if _are_several(images):
            encoded = isinstance(images, list | tuple) and any(isinstance(image, EncodedImage) for image in images)
            return [self(image) for image in images] if encoded else list(self.iter(images))
        labels = self._labelled()
        if isinstance(images, EncodedImage):
            return self._result(images.loaded, images.pixels, self._see_encoded(images, labels), self.options)
        (label,) = self._segment([self._open(images)], labels)
        return label()

    def encode(self, images: Any) -> Any:
        """One image as the model sees it, without labels: an `EncodedImage`; a list of them for several images.

        `segmenter(encoded)` is then `segmenter(image)` without the image encoder, by far the longest part, for any
        labels and options but those that change what the model sees: `shorter_side`, `window`, `stride`, `flip` and
        `scales`. Of several images those of one size go through the model together. InputError as `__call__`.
        """
        preparation, several = self._preparation, _are_several(images)
        loaded = [load(image, self.max_pixels) for image in (images if several else [images])]
        every = [preparation.views(each, self.max_pixels) for each in loaded]
        seen = iter(
            encoded_views([view for views in every for view in views], preparation, self.batch_size, self._blocks)
        )
        encoded = [
            EncodedImage(each, views[0], tuple(next(seen) for _ in views), preparation, self.model)
            for each, views in zip(loaded, every, strict=True)
        ]
        return encoded if several else encoded[0]

    def with_labels(
        self,
        labels: str | Iterable[str | Label],
        background_labels: str | Iterable[str | Label] = (),
        **options: Any,
    ) -> Self:
        """Returns a segmenter over the same model with these labels; this one keeps its own.

        Both remember the embeddings of the labels that either has encoded, so that known labels cost next to nothing:
        a program that answers many requests makes one for each, in any thread.

        Args:
            labels, background_labels: as the constructor takes them.
            options: those that differ from this segmenter's.

        Raises:
            InputError: an argument that cannot be used.
        """
        other = copy(self)
        if options:
            other.options = SegmentationOptions.from_dict(self.options.to_dict() | options)
        other.set_labels(labels, background_labels)
        return other

    def iter(self, images: str | Path | Iterable[Any], *, on_error: OnError | None = None) -> Iterator[Segmentation]:
        """Segments the images of a folder or of an iterable, in order.

        Images are opened as they are needed, up to four times `batch_size` ahead but no more than fit into 256 MB, so
        that those of one size go through the model together. Files are read, and pixels labelled, beside the model.

        Args:
            images: a folder, or images of any kind.
            on_error: is called in order with an input that cannot be read, and the error, and the others follow. None:
                the error is raised, after the results of earlier images.
        """
        images = images_in(images) if isinstance(images, str | Path) else images
        return segmented(images, self._steps(self._labelled()), on_error)

    def video(
        self, source: Any, *, smoothing: float = 0.0, every: int = 1, max_frames: int | None = None
    ) -> Iterator[VideoFrame]:
        """Segments the frames of a video or animated image, in order; memory does not grow with their number.

        Args:
            source: a path, the bytes of a file, a binary file, or what `open_clip` returns. InputError as it says.
            smoothing: 0 to less than 1, the weight of earlier frames in each pixel's scores: `smoothing.Smoother`.
            every: only every N-th frame is segmented. max_frames: at most so many are.
        """
        own = copy(self)
        own._smoother = Smoother(smoothing, self._preparation.deviation) if smoothing else None
        return segmented_frames(source, own._steps(own._labelled()), self.max_pixels, every, max_frames)

    def _steps(self, labels: LabelSet) -> Steps:
        return Steps(
            lambda source: load(source, self.max_pixels),
            lambda loaded: self._preparation.prepared(loaded, self.max_pixels),
            lambda prepared: self._segment(prepared, labels),
            self.batch_size,
            self._may_label_in_threads(),
        )

    def classify(self, images: Any) -> Any:
        """Probability of each label for the whole image, `{label: probability}`; a list of these for several images.

        The image is prepared as the checkpoint's processor says, which for most crops the middle.
        """
        if _are_several(images):
            labels = self._labelled()
            return [self._label_probabilities(image, labels) for image in images]
        return self._label_probabilities(images, self._labelled())

    def _label_probabilities(self, image: Any, labels: LabelSet) -> dict[str, float]:
        probabilities = self._classify(self._classifier_pixels(image), labels.embeds)[0].tolist()
        return dict(zip(labels.names, probabilities, strict=True))

    def probabilities(self, images: Sequence[Any]) -> Floats:
        """The same for many images as an array `[N, L]`, through the model `batch_size` at a time; InputError as
        `classify`."""
        labels = self._labelled()
        parts = self._classifier_outputs(images, lambda pixels: self._classify(pixels, labels.embeds))
        return np.concatenate(parts) if parts else np.zeros((0, len(labels.labels)), np.float32)

    def embed_images(self, images: Sequence[Any]) -> Floats:
        """Embeddings `[B, E]` of images, of length 1, prepared as for `classify`: their products with those of texts
        are cosine similarities. InputError for an image that cannot be read."""
        parts = self._classifier_outputs(images, lambda pixels: unit(self._embed_images(pixels)))
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.projection_dim), np.float32)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Embeddings `[N, E]` of texts as they are, without templates, of length 1; a text is cut at the model's
        context. InputError for anything but a list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts must be a list of texts, got {texts!r:.80}")
        if not len(texts):
            return np.zeros((0, self.model.config.projection_dim), np.float32)
        return unit(self._encode_labels.embed(texts))

    def _classifier_outputs(self, images: Sequence[Any], call: Callable[[Floats], Floats]) -> list[Floats]:
        starts = range(0, len(images), self.batch_size)
        batches = ([self._classifier_pixels(image) for image in images[i : i + self.batch_size]] for i in starts)
        return [call(np.concatenate(pixels)) for pixels in batches]

    def threshold_maps(self, image: Any, thresholds: Iterable[float | None]) -> Iterator[Indices]:
        """The label map of one image with each of these in the place of `background`. The model sees the image once."""
        labels, options = self._labelled(), self.options
        if isinstance(image, EncodedImage):
            seen, pixels, size = self._see_encoded(image, labels), image.pixels, image.loaded.size
        else:
            opened = self._open(image)
            seen, pixels, size = self._see(opened.views, labels), opened.views[0], opened.loaded.size
        return (
            self._label(seen, pixels, size, replace(options, background=threshold)).label_map
            for threshold in thresholds
        )

    def details(self, image: Any) -> Details:
        """The groups of every grouping block and the similarity to every label, of one image, for figures.

        InputError as `__call__`. The model sees the image once more for it, unless it is encoded.
        """
        labels, preparation = self._labelled(), self._preparation
        if isinstance(image, EncodedImage):
            image.check(self.model, self.options)
            view, size = image.views[0], image.loaded.size
        else:
            loaded = load(image, self.max_pixels)
            size = loaded.size
            pixels = preparation.pixels(loaded, preparation.size(*size), self.max_pixels)
            (view,) = encoded_views([pixels], preparation, self.batch_size, self._blocks)
        return encoded_details(view, size, labels.names, labels.embeds)

    # One level down: images as arrays that are ready for the model.

    def prepare(self, image: Any) -> npt.NDArray[np.float32]:
        """Pixels `[3, H, W]` of one image at the size at which the model sees it, normalised."""
        preparation, loaded = self._preparation, load(image, self.max_pixels)
        return preparation.pixels(loaded, preparation.size(*loaded.size), self.max_pixels)

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
    def _blocks(self, pixels: Floats) -> Blocks:
        """Images `[B, 3, h, w]` -> embeddings of the groups `[B, G, E]` and of the images `[B, E]`, and the grouping
        map of each block up to it."""

    @abstractmethod
    def _compare(
        self, group_embeds: Floats, image_embeds: Floats, grouping: Floats, label_embeds: Floats
    ) -> tuple[Floats, Any, Any]:
        """The result of `_group` from that of `_blocks`."""

    @abstractmethod
    def _embed_images(self, pixels: Floats) -> Floats:
        """Images `[B, 3, h, w]` -> the model's embeddings `[B, E]`, float32 or wider, of any length."""

    # These are right for a backend whose affinities and grouping maps are arrays.

    def _may_label_in_threads(self) -> bool:
        """Returns whether `_pixel_labels` may run in a thread beside the model."""
        return True

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

    def _labelled(self) -> LabelSet:
        """The labels of this call; read once for each."""
        labels = self._label_set
        if labels is None:
            raise InputError('there are no labels: call set_labels("cat, couch, remote control") first')
        return labels

    def _open(self, source: Any) -> Prepared:
        return self._preparation.prepared(load(source, self.max_pixels), self.max_pixels)

    def _classifier_pixels(self, source: Any) -> npt.NDArray[np.float32]:
        """Pixels `[1, 3, H, W]` of one image, prepared as the checkpoint's processor says."""
        given = source.image if isinstance(source, EncodedImage) else source
        image = load_image(given, max_pixels=self.max_pixels)
        encoding = self.processor.image_processor(image, return_tensors="np", max_pixels=self.max_pixels)
        return np.asarray(encoding["pixel_values"])

    def _see(self, images: Sequence[Floats], labels: LabelSet) -> list[SeenView]:
        """Prepared images `[3, h, w]` through the model, windows of one size together."""
        image_windows = [self._preparation.windows((pixels.shape[1], pixels.shape[2])) for pixels in images]
        outputs = in_batches(images, image_windows, self.batch_size, lambda pixels: self._group(pixels, labels.embeds))
        seen = []
        for windows, each in zip(image_windows, outputs, strict=True):
            probabilities, affinity, grouping = zip(*each, strict=True)
            view = View(self._stack(affinity), self._stack(grouping), None if self.options.window is None else windows)
            seen.append(SeenView(labels, np.mean(probabilities, axis=0), view))
        return seen

    def _see_encoded(self, image: EncodedImage, labels: LabelSet) -> list[SeenView]:
        """The same for one that the model has seen."""
        image.check(self.model, self.options)
        compare = partial(self._compare, label_embeds=labels.embeds)
        return [labelled_view(view, labels, compare, self.options.window is not None) for view in image.views]

    def _see_prepared(self, pixels: Floats) -> SeenView:
        """The same for one that a user prepared."""
        if pixels.ndim != 3:
            raise InputError(f"a prepared image must have shape [channels, height, width], got {list(pixels.shape)}")
        sides = self._preparation.windows((pixels.shape[1], pixels.shape[2])).size
        is_floating_point = np.issubdtype(pixels.dtype, np.floating)
        shape = (1, len(pixels), *sides)
        check_pixel_values(shape, str(pixels.dtype), is_floating_point, self.model.config.vision_config)
        return self._see([pixels], self._labelled())[0]

    def _label(
        self, seen: Sequence[SeenView], pixels: Floats, size: tuple[int, int], options: SegmentationOptions
    ) -> PixelLabels:
        """The maps of one image from all its views; `pixels` are those of the first."""
        is_background = seen[0].labels.is_background
        options.check_foreground(is_background)
        # The mirrored views come last.
        views = [replace(each.view, mirrored=number >= len(options.scales)) for number, each in enumerate(seen)]
        pixel_labels = self._pixel_labels if self._smoother is None else self._smoother.pixel_labels
        return pixel_labels(views, pixels, size, options, is_background)

    def _segment(self, images: Sequence[Prepared], labels: LabelSet) -> list[LabelPixels]:
        """Images of one `part` through the model together: for each, what labels its pixels."""
        # The options may have changed since an image was opened.
        images = [
            each if each.preparation is self._preparation else self._preparation.prepared(each.loaded, self.max_pixels)
            for each in images
        ]
        every, count = self._see([pixels for each in images for pixels in each.views], labels), len(images[0].views)
        return [
            partial(
                self._result, each.loaded, each.views[0], every[number * count : (number + 1) * count], self.options
            )
            for number, each in enumerate(images)
        ]

    def _result(
        self, loaded: Loaded, pixels: Floats, seen: Sequence[SeenView], options: SegmentationOptions
    ) -> Segmentation:
        """The result of an image from all its views; `pixels` are those of the first."""
        labels = seen[0].labels
        return segmentation(
            loaded.image,
            self._label(seen, pixels, loaded.size, options),
            labels.names,
            np.mean([each.probabilities for each in seen], axis=0).tolist(),
            is_background=labels.is_background,
            threshold=options.background,
            source=loaded.source,
            affinity=as_array(seen[0].view.affinity),
        )


def _are_several(images: Any) -> bool:
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4


def _attribute(name: str) -> property:
    """An option as an attribute of the segmenter."""

    def read(segmenter: BaseSegmenter) -> Any:
        return getattr(segmenter.options, name)

    def write(segmenter: BaseSegmenter, value: Any) -> None:
        segmenter.options = replace(segmenter.options, **{name: value})

    return property(read, write, doc=OPTIONS[name].help)


for _name in OPTIONS:
    setattr(BaseSegmenter, _name, _attribute(_name))
