"""What the user's door does on any framework: pictures and labels -> label maps. A backend fills in the tensor work."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME
from groupvit_common.checkpoints.hub import DEMO_MODEL as DEMO_MODEL
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.checks import check_pixel_values, is_whole_number
from groupvit_common.preprocessing.image_files import images_in
from groupvit_common.preprocessing.images import MAX_PIXELS, load_image
from groupvit_common.preprocessing.processor import PROCESSOR_FILES, GroupViTProcessor, missing_parts
from groupvit_common.preprocessing.prompts import Label, get_templates, label_embedding, parse_labels
from groupvit_common.segmentation.options import OPTIONS, SegmentationOptions
from groupvit_common.segmentation.postprocess import (
    BACKGROUND,
    Details,
    Floats,
    Indices,
    Look,
    PixelLabels,
    Segmentation,
    Windows,
    group_windows,
    label_similarity,
    segmentation,
)

DEFAULT_MODEL = "nvidia/groupvit-gcc-yfcc"

# Prompts encoded at once, and pixels of pictures read ahead at most (a 12-megapixel photo takes 36 MB).
_PROMPTS_AT_ONCE = 256
_PIXELS_AHEAD = 64_000_000
# A picture longer than this many times its shorter side is made smaller rather than long: attention over patches grows
# with the square of their number.
_LONGEST = 4
# The same where the model sees windows: the authors' bound, 2048 pixels for a shorter side of 448.
_LONGEST_IN_WINDOWS = 2048 / 448


@dataclass(frozen=True, eq=False)
class _Picture:
    """One picture on its way: upright RGB, where it came from, its height and width once resized, and those of its windows."""

    image: Image.Image
    source: str | None
    size: tuple[int, int]
    part: tuple[int, int]


class _Known(NamedTuple):
    """A label that was encoded: embeddings `[K, E]`, and of each of its words and definitions the tokens that the model reads."""

    embeds: Floats
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class _LabelSet:
    """The labels of one `set_labels`, never changed: a call reads the segmenter's once, so that it sees one set whatever other threads do.

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
    """What the model said of one look at a picture: of which labels, probabilities `[L]`, and what `_group` gave for each window."""

    labels: _LabelSet
    probabilities: Floats
    affinity: Sequence[Any]
    grouping: Sequence[Any]
    windows: Windows


def _check_fit(processor: GroupViTProcessor, config: Any) -> None:
    """Raises `InputError` for a tokenizer whose tokens the model does not know, or whose end token it does not look for."""
    tokenizer, text = processor.tokenizer, config.text_config
    if len(tokenizer) > text.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: they belong to different models"
        )
    # 2 in early files means the largest id.
    if text.eos_token_id not in (2, tokenizer.eos_token_id):
        raise InputError(
            f"the tokenizer ends texts with token {tokenizer.eos_token_id}, and the model looks for {text.eos_token_id}: they belong "
            "to different models"
        )


class BaseSegmenter(ABC):
    """Segments pictures by words.

        segmenter = Segmenter.from_pretrained("demo", labels="red, green, blue", background_labels="grass, sand")
        result = segmenter("photo.jpg")
        result.label_map, result.labels, result.overlay().save("overlay.png")

    Args:
        model, processor: see `from_pretrained`. The model is put into evaluation mode and stays on its device.
        labels: what to look for, as `groupvit_common.preprocessing.prompts.parse_labels` takes it: "cat, couch | sofa" or
            ["cat", "couch, sofa"] with synonyms, {"dog": ["puppy", '"an animal that barks"']} with a definition, or `Label`
            records. May be set later with `set_labels`.
        background_labels: labels, among `labels` or besides them, whose pixels become background.
            A label that is called "background" is one by itself.
        batch_size: images (or windows) of one size in the model at once.
        max_pixels: larger images are refused by their header, but for JPEGs that are read at half their size: see
            `groupvit_common.preprocessing.images.load_image`.
        options: how pixels get labels, the fields of `groupvit_common.segmentation.options.SegmentationOptions`. They are attributes as well.

    `directory` is where `from_pretrained` found the checkpoint, None for a model that came otherwise. One segmenter may serve several
    threads, which may set labels: each call, and each iterator, uses the labels that were set when it began.

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
        self.batch_size = batch_size
        self.max_pixels = int(max_pixels)
        self._known: dict[Label, _Known] = {}
        self.options = chosen
        self._label_set: _LabelSet | None = None
        if labels is not None:
            self.set_labels(labels, background_labels)

    @property
    def options(self) -> SegmentationOptions:
        """How pixels get labels. Options that are set count from the next call on, those of prompts for labels set afterwards."""
        return self._options

    @options.setter
    def options(self, options: SegmentationOptions) -> None:
        self._options = options = options.for_model(self.model.config)
        self._known.clear()
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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """A segmenter with the model and processor of a checkpoint.

        Args:
            model: "demo" for the bundled model, a checkpoint directory, or "org/name" on the hub.
            processor: of another checkpoint (named as `model` is), or one at hand, for a checkpoint without tokenizer and image
                processor; None: its own.
            device: "cpu", "cuda", "cuda:1" or another of the framework's own; None: the best there is.
            dtype: of the weights, such as "bfloat16"; float32 if None.
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
                    f"{model} has {lacking}: name a checkpoint that has them (processor=..., on the command line --processor NAME)"
                )
            processor = GroupViTProcessor.from_pretrained(directory)
        elif isinstance(processor, str | Path):
            processor = GroupViTProcessor.from_pretrained(processor, **where)
        loaded = cls._load(directory, dtype, chosen)
        _check_fit(processor, loaded.config)
        segmenter = cls(loaded, processor, **options)
        segmenter.directory = directory
        return segmenter

    def set_labels(
        self,
        labels: str | Iterable[str | Label],
        background_labels: str | Iterable[str | Label] = (),
        *,
        embeddings: Floats | None = None,
    ) -> None:
        """Look for these labels from now on. Only labels never seen before are encoded.

        `embeddings` of the labels, `[L, E]` or several for each `[L, K, E]`, of which the most similar counts, take the place of the
        model's; `background_labels` that are not among `labels` come last.
        """
        parsed = parse_labels(labels)
        extra = parse_labels(background_labels) if background_labels else ()
        hidden = {BACKGROUND, *(label.name.casefold() for label in extra)}
        known = {label.name.casefold() for label in parsed}
        every = parse_labels([*parsed, *(label for label in extra if label.name.casefold() not in known)])
        if embeddings is None:
            self._encode([label for label in every if label not in self._known])
            self._check_different(every)
            known_embeds = [self._known[label].embeds for label in every]
            words = max(map(len, known_embeds))
            # Of a label with fewer words one stands for those it lacks: it cannot be more similar than itself.
            embeddings = np.stack(
                [embeds[[*range(len(embeds)), *[0] * (words - len(embeds))]] for embeds in known_embeds]
            )
            embeddings = embeddings[:, 0] if words == 1 else embeddings
        wanted = (len(every), self.model.config.projection_dim)
        if (
            embeddings.ndim not in (2, 3)
            or not embeddings.size
            or (embeddings.shape[0], embeddings.shape[-1]) != wanted
        ):
            raise InputError(f"embeddings of the labels must be {list(wanted)}, got {list(embeddings.shape)}")
        is_background = tuple(label.name.casefold() in hidden for label in every)
        self._check_foreground(is_background, self.options.background)
        self._label_set = _LabelSet(every, is_background, embeddings)

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that were set last; () if none were."""
        return () if self._label_set is None else self._label_set.labels

    @property
    def _label_embeds(self) -> Floats | None:
        return None if self._label_set is None else self._label_set.embeds

    def __call__(self, images: Any) -> Any:
        """One picture -> `Segmentation`; a list, tuple or array `[B, ...]` of pictures -> a list of them, in order.

        A picture is a path, the bytes of a file, a PIL image, or an array `[H, W, 3]`.
        InputError for a picture that cannot be read, and if there are no labels.
        """
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return list(self.iter(images))
        return next(self.iter([images]))

    def iter(self, images: str | Path | Iterable[Any]) -> Iterator[Segmentation]:
        """Segment a folder's pictures, or whatever pictures an iterable gives, in order.

        Pictures are opened as they are needed, a few ahead, so that those of one size go through the model together.
        """
        labels = self._labelled()
        sources = images_in(images) if isinstance(images, str | Path) else images
        return self._iter(sources, labels)

    def classify(self, images: Any) -> Any:
        """Probability of each label for the whole picture, `{label: probability}`; a list of these for several pictures.

        The picture is prepared as the checkpoint's processor says, which for most crops the middle.
        """
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            labels = self._labelled()
            return [self._shares(image, labels) for image in images]
        return self._shares(images, self._labelled())

    def _shares(self, image: Any, labels: _LabelSet) -> dict[str, float]:
        shares = self._classify(self._classifier_pixels(image), labels.embeds)[0].tolist()
        return dict(zip(labels.names, shares, strict=True))

    def probabilities(self, images: Sequence[Any]) -> Floats:
        """The same for many pictures as an array `[N, L]`, through the model `batch_size` at a time; InputError as `classify`."""
        labels = self._labelled()
        parts = []
        for start in range(0, len(images), self.batch_size):
            pixels = [self._classifier_pixels(image) for image in images[start : start + self.batch_size]]
            parts.append(self._classify(np.concatenate(pixels), labels.embeds))
        return np.concatenate(parts) if parts else np.zeros((0, len(labels.labels)), np.float32)

    def threshold_maps(self, image: Any, thresholds: Iterable[float | None]) -> Iterator[Indices]:
        """The label map of one picture with each of these in the place of `background`. The model sees the picture once."""
        labels = self._labelled()
        picture = self._open(image)
        looks = self._looks(picture)
        seen = self._see_pictures(looks, labels)
        size = (picture.image.height, picture.image.width)
        return (self._labels(seen, looks[0], size, threshold).label_map for threshold in thresholds)

    def details(self, image: Any) -> Details:
        """The groups of every grouping block and the similarity to every label, of one picture, for pictures of them.

        InputError as `__call__`. The model sees the picture once more for it.
        """
        labels = self._labelled()
        picture = self._open(image)
        pixels, windows = self._pixels(picture), self._windows(picture.size)
        parts = [pixels[:, rows, columns] for rows, columns in windows]
        seen = [
            self._blocks(np.stack(parts[start : start + self.batch_size]))
            for start in range(0, len(parts), self.batch_size)
        ]
        of_blocks = [np.concatenate(maps) for maps in zip(*(maps for _, maps in seen), strict=True)]
        size = (picture.image.height, picture.image.width)
        return Details(
            tuple(group_windows(maps, windows, size) for maps in of_blocks),
            tuple(labels.names),
            label_similarity(
                np.concatenate([groups for groups, _ in seen]), of_blocks[-1], labels.embeds, windows, picture.size
            ),
        )

    # One level down: pictures as arrays that are ready for the model.

    def prepare(self, image: Any) -> npt.NDArray[np.float32]:
        """Pixels `[3, H, W]` of one picture at the size at which the model sees it, normalised."""
        return self._pixels(self._open(image))

    def pixel_labels(self, pixels: Floats, size: tuple[int, int]) -> PixelLabels:
        """The maps at `size` = (H, W), the original's, of one prepared picture `[3, h, w]`, looked at once as it is.

        InputError for sides that are neither a multiple of the patch size nor larger than the window.
        """
        return self._labels([self._see_picture(pixels)], pixels, size, self.options.background)

    def pixel_scores(self, pixels: Floats, size: tuple[int, int] | None = None) -> Floats:
        """Scores `[C, H, W]`, 0 to 1, of every label and pixel of one prepared picture `[3, h, w]`, looked at once as it is.

        Their largest make the map, unless they are still to be refined, or weighed as foreground and background. C is the number of `labels`, in their order; one more where there is a `background` threshold, which comes first.
        `size` = (H, W), by default the prepared picture's. InputError as for `pixel_labels`.
        """
        seen = self._see_picture(pixels)
        size = (pixels.shape[1], pixels.shape[2]) if size is None else size
        parts = self._window_scores(
            seen.affinity,
            seen.grouping,
            Windows.whole(size) if self.options.window is None else seen.windows,
            size,
            assignment=self.options.assignment,
            threshold=self.options.background,
        )
        return np.concatenate(list(parts), axis=1)

    # What a backend does.

    @classmethod
    @abstractmethod
    def _device(cls, wanted: Any) -> Any:
        """The device of a name, the best there is for None. `InputError` for one that is not there."""

    @classmethod
    @abstractmethod
    def _load(cls, directory: Path, dtype: Any, device: Any) -> Any:
        """The model of a checkpoint directory, on a device that `_device` gave."""

    def _ready(self, model: Any) -> Any:
        """The model in evaluation mode, where models have such a mode."""
        return model

    @abstractmethod
    def _embed_texts(self, tokens: Mapping[str, npt.NDArray[np.int64]]) -> Floats:
        """The tokenizer's arrays `[N, T]` -> the model's embeddings `[N, E]`, float32 or wider, of any length."""

    @abstractmethod
    def _classify(self, pixels: Floats, label_embeds: Floats) -> Floats:
        """Pictures `[B, 3, h, w]`, labels `[L, E]` -> probabilities `[B, L]`."""

    @abstractmethod
    def _group(self, pixels: Floats, label_embeds: Floats) -> tuple[Floats, Any, Any]:
        """Pictures `[B, 3, h, w]`, labels `[L, E]` -> probabilities `[B, L]`, and what `_label_pixels` takes, one entry for
        each picture: affinities `[B, G, L]` and grouping maps (`groupvit_common.segmentation.postprocess`), float32 or wider."""

    @abstractmethod
    def _blocks(self, pixels: Floats) -> tuple[Floats, list[Floats]]:
        """Pictures `[B, 3, h, w]` -> embeddings of the groups `[B, G, E]`, and the grouping map of each block up to it."""

    @abstractmethod
    def _label_pixels(self, affinity: Any, grouping: Any, size: tuple[int, int], **options: Any) -> PixelLabels:
        """`groupvit_common.segmentation.postprocess.label_pixels` for one picture."""

    @abstractmethod
    def _label_windows(
        self, affinity: Sequence[Any], grouping: Sequence[Any], windows: Windows, size: tuple[int, int], **options: Any
    ) -> PixelLabels:
        """`groupvit_common.segmentation.postprocess.label_windows` for one picture, of what `_group` gave for each window."""

    @abstractmethod
    def _label_looks(self, looks: Sequence[Look], pixels: Floats, size: tuple[int, int], **options: Any) -> PixelLabels:
        """`groupvit_common.segmentation.postprocess.label_looks` for one picture, of what `_group` gave for each window of each look."""

    @abstractmethod
    def _window_scores(
        self, affinity: Sequence[Any], grouping: Sequence[Any], windows: Windows, size: tuple[int, int], **options: Any
    ) -> Iterator[Floats]:
        """`groupvit_common.segmentation.postprocess.window_scores` likewise: strips `[C, rows, W]`, from top to bottom."""

    # The rest.

    def _check_foreground(self, is_background: Sequence[bool], threshold: float | None) -> None:
        if self.options.foreground is not None and (
            all(is_background) or not (any(is_background) or threshold is not None)
        ):
            raise InputError(
                "foreground weighs labels against a background: give labels and background_labels, or a background threshold"
            )

    def _labelled(self) -> _LabelSet:
        """The labels of this call; read once for each."""
        labels = self._label_set
        if labels is None:
            raise InputError('there are no labels to look for: call set_labels("cat, couch, remote control") first')
        return labels

    def _encode(self, labels: Sequence[Label]) -> None:
        tokenizer, context = self.processor.tokenizer, self._context
        templates = get_templates(self.options.templates)
        prompts = [label.prompts(templates) for label in labels]
        texts = [text for of_label in prompts for of_word in of_label for text in of_word]
        rows = iter(tokenizer(texts)["input_ids"] if texts else ())
        cut = tokenizer(texts, truncation=True, max_length=context)["input_ids"] if texts else ()
        read = iter(cut)
        tokens = []  # of each label, what the model reads of each word
        for label, of_label in zip(labels, prompts, strict=True):
            words = (*label.words, *label.definitions)
            bare = tokenizer(list(words), add_special_tokens=False)["input_ids"]
            of_words_read = []
            for word, ids, of_word in zip(words, bare, of_label, strict=True):
                if not ids:
                    raise InputError(f"the label {word!r} has no letters or signs that the model knows: leave it out")
                longest = max(len(next(rows)) for _ in of_word)
                of_word_read = [next(read) for _ in of_word]
                if longest > context:
                    warnings.warn(
                        f"the label {_short(word)} is too long: a prompt with it has {longest} tokens, of which the model reads {context}",
                        stacklevel=3,
                    )
                # Where nothing is cut, one prompt tells words apart as well as all.
                seen = of_word_read if longest > context else of_word_read[:1]
                of_words_read.append(tuple(token for ids in seen for token in ids))
            tokens.append(tuple(of_words_read))
        parts = []
        for start in range(0, len(texts), _PROMPTS_AT_ONCE):
            some = texts[start : start + _PROMPTS_AT_ONCE]
            parts.append(
                self._embed_texts(
                    tokenizer(some, padding=True, truncation=True, max_length=context, return_tensors="np")
                )
            )
        if parts:
            counts = [len(of_word) for of_label in prompts for of_word in of_label]
            of_words = iter(np.split(np.concatenate(parts), np.cumsum(counts)[:-1]))
            for label, of_label, read_of_label in zip(labels, prompts, tokens, strict=True):
                embeds = [next(of_words) for _ in of_label]
                embedding = label_embedding(embeds, self.options.synonyms, self.options.normalize_prompts)
                self._known[label] = _Known(embedding, read_of_label)

    def _check_different(self, labels: Sequence[Label]) -> None:
        """Refuses words that the model reads alike: it knows tokens, not how letters are coded, and none beyond its context."""
        seen: dict[tuple[int, ...], str] = {}
        for label in labels:
            words = (*label.words, *label.definitions)
            for word, tokens in zip(words, self._known[label].tokens, strict=True):
                other = seen.setdefault(tokens, word)
                if other is not word:
                    raise InputError(
                        f"the labels {_short(other)} and {_short(word)} are the same to the model, which reads the same tokens, at most "
                        f"{self._context} of each prompt: keep one of them, or make them differ earlier"
                    )

    @property
    def _context(self) -> int:
        """The most tokens of a text, its beginning and its end included."""
        limits = (self.model.config.text_config.max_position_embeddings, self.processor.tokenizer.model_max_length)
        return int(min(limits))

    def _iter(self, sources: Iterable[Any], labels: _LabelSet) -> Iterator[Segmentation]:
        waiting: dict[int, _Picture] = {}
        done: dict[int, Segmentation] = {}
        given = 0

        def run(size: tuple[int, int]) -> None:
            numbers = [i for i, picture in waiting.items() if picture.part == size]
            done.update(zip(numbers, self._segment([waiting.pop(i) for i in numbers], labels), strict=True))

        def ready() -> Iterator[Segmentation]:
            nonlocal given
            while given in done:
                yield done.pop(given)
                given += 1

        for index, source in enumerate(sources):
            picture = self._open(source)
            waiting[index] = picture
            if sum(p.part == picture.part for p in waiting.values()) == self.batch_size:
                run(picture.part)
            yield from ready()
            # Too much read ahead: the oldest waits no longer for company.
            while waiting and (
                len(waiting) + len(done) >= 2 * self.batch_size
                or sum(p.image.width * p.image.height for p in waiting.values()) > _PIXELS_AHEAD
            ):
                run(next(iter(waiting.values())).part)
                yield from ready()
        while waiting:
            run(next(iter(waiting.values())).part)
            yield from ready()

    def _open(self, source: Any) -> _Picture:
        image = load_image(source, max_pixels=self.max_pixels)
        name = str(source) if isinstance(source, str | Path) else getattr(source, "filename", None) or None
        size = self._size(image.height, image.width)
        return _Picture(image, name, size, self._windows(size).size)

    def _classifier_pixels(self, source: Any) -> npt.NDArray[np.float32]:
        """Pixels `[1, 3, H, W]` of one image, prepared as the checkpoint's processor says."""
        image = load_image(source, max_pixels=self.max_pixels)
        encoding = self.processor.image_processor(image, return_tensors="np", max_pixels=self.max_pixels)
        return np.asarray(encoding["pixel_values"])

    def _size(self, height: int, width: int, look: int = 0) -> tuple[int, int]:
        """Height and width at which a picture of this height and width is seen, at the scale of that number."""
        if self.options.window is None:
            return self._image_processors[look].resized_size(height, width)
        # Windows fit any side that is as long as they are. A shorter one is seen whole and must hold whole patches.
        patch, window = self.model.config.vision_config.patch_size, self.options.window
        short, long = min(height, width), max(height, width)
        assert self.options.shorter_side is not None
        shorter_side = self.options.shorter_side * self.options.scales[look]
        scale = min(shorter_side / short, _LONGEST_IN_WINDOWS * shorter_side / long)
        nearest = (int(side * scale + 0.5) for side in (height, width))
        down, across = (side if side >= window else max(1, round(side / patch)) * patch for side in nearest)
        return down, across

    def _looks(self, picture: _Picture) -> list[npt.NDArray[np.float32]]:
        """What the model sees of a picture: at each scale, and mirrored if that is asked for."""
        sizes = [
            self._size(picture.image.height, picture.image.width, look) for look in range(len(self.options.scales))
        ]
        looks = [self._pixels(picture, size) for size in sizes]
        return [*looks, *(np.flip(pixels, 2) for pixels in looks)] if self.options.flip else looks

    def _pixels(self, picture: _Picture, size: tuple[int, int] | None = None) -> npt.NDArray[np.float32]:
        height, width = size or picture.size
        # The same normalisation for any size: `size` says it all.
        pixels = self.image_processor(
            picture.image,
            size={"height": height, "width": width},
            size_divisor=1,
            max_pixels=self.max_pixels,
            return_tensors="np",
        )["pixel_values"]
        return np.asarray(pixels[0])

    def _windows(self, size: tuple[int, int]) -> Windows:
        """What of a prepared picture of this size the model sees at a time."""
        if self.options.window is None or self.options.stride is None:
            return Windows.whole(size)
        return Windows.over(size, self.options.window, self.options.stride)

    def _see_pictures(self, pictures: Sequence[Floats], labels: _LabelSet) -> list[_Seen]:
        """Prepared pictures `[3, h, w]` through the model, windows of one size together."""
        of_pictures = [self._windows((pixels.shape[1], pixels.shape[2])) for pixels in pictures]
        parts = [
            pixels[:, rows, columns]
            for pixels, windows in zip(pictures, of_pictures, strict=True)
            for rows, columns in windows
        ]
        said: list[Any] = [None] * len(parts)  # of each: probabilities, affinity, grouping map
        for shape in dict.fromkeys(part.shape for part in parts):
            alike = [i for i, part in enumerate(parts) if part.shape == shape]
            for start in range(0, len(alike), self.batch_size):
                some = alike[start : start + self.batch_size]
                group = self._group(np.stack([parts[i] for i in some]), labels.embeds)
                for place, i in enumerate(some):
                    said[i] = tuple(each[place] for each in group)
        seen, first = [], 0
        for windows in of_pictures:
            probabilities, affinity, grouping = zip(*said[first : first + len(windows)], strict=True)
            seen.append(_Seen(labels, np.mean(probabilities, axis=0), affinity, grouping, windows))
            first += len(windows)
        return seen

    def _see_picture(self, pixels: Floats) -> _Seen:
        """The same for one that a user prepared."""
        if pixels.ndim != 3:
            raise InputError(f"a prepared picture must have shape [channels, height, width], got {list(pixels.shape)}")
        sides = self._windows((pixels.shape[1], pixels.shape[2])).size
        is_floating_point = np.issubdtype(pixels.dtype, np.floating)
        shape = (1, len(pixels), *sides)
        check_pixel_values(shape, str(pixels.dtype), is_floating_point, self.model.config.vision_config)
        return self._see_pictures([pixels], self._labelled())[0]

    def _labels(
        self, looks: Sequence[_Seen], pixels: Floats, size: tuple[int, int], threshold: float | None
    ) -> PixelLabels:
        """The maps of one picture from all looks at it; `pixels` are those of the first."""
        is_background = looks[0].labels.is_background
        self._check_foreground(is_background, threshold)
        options: dict[str, Any] = {
            "assignment": self.options.assignment,
            "threshold": threshold,
            "is_background": is_background,
        }
        if len(looks) > 1 or self.options.refine or self.options.foreground is not None:
            side = (pixels.shape[1], pixels.shape[2])
            # A picture that is seen as a whole is one window, of any size.
            return self._label_looks(
                [
                    Look(
                        seen.affinity,
                        seen.grouping,
                        Windows.whole(side) if self.options.window is None else seen.windows,
                        mirrored=number >= len(self.options.scales),
                    )
                    for number, seen in enumerate(looks)
                ],
                pixels,
                size,
                foreground=self.options.foreground,
                times=self.options.refine,
                dilations=self.options.refine_dilations,
                **options,
            )
        (seen,) = looks
        if self.options.window is None:
            return self._label_pixels(seen.affinity[0], seen.grouping[0], size, **options)
        return self._label_windows(seen.affinity, seen.grouping, seen.windows, size, **options)

    def _segment(self, pictures: Sequence[_Picture], labels: _LabelSet) -> list[Segmentation]:
        """Pictures of one `part` through the model together."""
        of_pictures = [self._looks(picture) for picture in pictures]
        every = self._see_pictures([pixels for looks in of_pictures for pixels in looks], labels)
        results, count = [], len(of_pictures[0])
        for number, (picture, looks) in enumerate(zip(pictures, of_pictures, strict=True)):
            seen = every[number * count : (number + 1) * count]
            size = (picture.image.height, picture.image.width)
            results.append(
                segmentation(
                    picture.image,
                    self._labels(seen, looks[0], size, self.options.background),
                    labels.names,
                    np.mean([each.probabilities for each in seen], axis=0).tolist(),
                    is_background=labels.is_background,
                    threshold=self.options.background,
                    source=picture.source,
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


def _short(word: str) -> str:
    return repr(word if len(word) <= 60 else f"{word[:57]}...")
