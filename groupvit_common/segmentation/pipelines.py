"""Pipelines: a `Segmenter` behind the interface of transformers' pipelines, for both backends.

    segment = pipeline("zero-shot-image-segmentation", model="demo")
    segment("photo.jpg", candidate_labels=["red", "blue"])  # [{"score": 0.9, "label": "red", "mask": a PIL image}, ...]

A backend names its classes and fills in where a model is.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from PIL import Image

from groupvit_common.checkpoints.hub import HUB_KEYWORDS
from groupvit_common.compat.keywords import nearest
from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_number
from groupvit_common.model.optimization import optimization_request
from groupvit_common.preprocessing.download import download, is_address
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.images import MAX_PIXELS
from groupvit_common.preprocessing.processor import GroupViTProcessor, check_fit
from groupvit_common.preprocessing.prompts import Label, parse_labels
from groupvit_common.preprocessing.tokenizer import AutoTokenizer
from groupvit_common.segmentation.label_encoder import PROMPTS_AT_ONCE
from groupvit_common.segmentation.options import DEFAULT_MODEL, OPTIONS, SegmentationOptions
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.segmentation.result import BACKGROUND
from groupvit_common.segmentation.scores import Floats
from groupvit_common.segmentation.segments import By, segments

Result = dict[str, Any]

# Settings of every pipeline, and the names under which programs pass images.
_SETTINGS = ("candidate_labels", "hypothesis_template", "timeout", "batch_size", "num_workers", "max_pixels")
_IMAGE_NAMES = ("images", "image", "inputs")
# Segmenters kept by their options: in Keras each has its own traced functions.
_MOST_SEGMENTERS = 8


class BasePipeline(ABC):
    """A pipeline of transformers' interface: images and candidate labels -> a list of dictionaries for each image.

    Args:
        model: of this backend. It is put into evaluation mode.
        tokenizer, image_processor: of the model (`feature_extractor` is the latter's former name), or `processor`,
            which has both.
        framework: "pt" or "tf", as the backend's.
        device: where the model goes: a number (-1 the CPU), a name or a device; None: where it is.
        dtype: None: the model's (`torch_dtype` is its older name).
        task: its name.
        settings: defaults of a call's keywords.

    Raises:
        InputError: an argument that cannot be used.
    """

    framework: ClassVar[str]
    segmenter_class: ClassVar[type[BaseSegmenter]]
    own_settings: ClassVar[tuple[str, ...]] = ()
    default_task: ClassVar[str] = ""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        image_processor: Any = None,
        processor: Any = None,
        modelcard: Any = None,
        framework: str | None = None,
        task: str = "",
        device: Any = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        **settings: Any,
    ) -> None:
        if framework not in (None, self.framework):
            raise InputError(f"framework={framework!r}: the pipelines of this package are {self.framework!r}")
        model = self._placed(model, _device_name(device))
        dtype = dtype if dtype is not None else torch_dtype
        if dtype not in (None, "auto") and str(dtype).removeprefix("torch.") != str(model.dtype).removeprefix("torch."):
            raise InputError(
                f"the model at hand is of dtype {model.dtype}, not {dtype}: load it with dtype=..., or give its name"
            )
        image_processor = image_processor if image_processor is not None else feature_extractor
        if processor is None or tokenizer is not None or image_processor is not None:
            processor = GroupViTProcessor(
                image_processor if image_processor is not None else getattr(processor, "image_processor", None),
                tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None),
            )
        check_fit(processor, model.config)
        self.task = task or self.default_task
        self.model = model
        self.processor: GroupViTProcessor = processor
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.feature_extractor, self.modelcard = self.image_processor, modelcard
        self.call_count = 0
        self._lock = threading.Lock()
        self._segmenters: dict[tuple[Any, ...], BaseSegmenter] = {}
        self._check(settings)
        self._defaults = settings
        self._segmenter(settings)

    @classmethod
    @abstractmethod
    def load_model(cls, name: str | Path, device: str | None, **keywords: Any) -> Any:
        """Returns the model of a checkpoint on a device, the best there is for None; `keywords` are those of
        `from_pretrained`."""

    @classmethod
    @abstractmethod
    def _placed(cls, model: Any, device: str | None) -> Any:
        """Returns a model of this backend on a device; where it is for None. `InputError` for anything else."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """The device of the model."""

    @property
    def dtype(self) -> Any:
        """The dtype of the model's weights."""
        return self.model.dtype

    torch_dtype = dtype

    def __call__(self, images: Any = None, candidate_labels: Any = None, **keywords: Any) -> Any:
        """Returns the results of one image as a list of dictionaries.

        Args:
            images: a path, an address, bytes, a PIL image, an array `[H, W, 3]`: what
                `groupvit_common.preprocessing.images.load_image` takes, also base64 text. A list, tuple or array
                `[B, ...]` of these gives a list of results; a generator or data set an iterator, which reads a few
                images ahead. `image` and `inputs` are other names. A dictionary, such as a row of a data set, has the
                image as "image"; given alone or in a list also its own "candidate_labels".
            candidate_labels: a list of labels, or one string with commas.
            keywords: `hypothesis_template`: a sentence with {} where the label goes. `timeout`: seconds that fetching
                an image may take (None: 60). `batch_size`: images in the model at once (None: 8). `max_pixels`: larger
                images are refused. `num_workers` changes nothing: images are opened in this process. Others: see the
                class.

        Raises:
            InputError: an argument that cannot be used, or an image that cannot be read.
        """
        given = [keywords.pop(name) for name in _IMAGE_NAMES if name in keywords]
        given = [each for each in (images, *given) if each is not None]
        if len(given) != 1:
            names = ", ".join(_IMAGE_NAMES)
            raise InputError(
                f"a pipeline needs images once, as the first argument or as one of {names}, got {len(given)}"
            )
        [images] = given
        if isinstance(images, Mapping):
            candidate_labels = images.get("candidate_labels", candidate_labels)
            images = _image_of(images)
        elif isinstance(images, list | tuple) and any(_has_labels(each) for each in images):
            return [self(each, candidate_labels, **keywords) for each in images]
        if candidate_labels is not None:
            keywords["candidate_labels"] = candidate_labels
        self._check(keywords)
        settings = self._defaults | keywords
        if settings.get("candidate_labels") is None:
            raise InputError('candidate_labels are missing: give a list such as ["cat", "couch"]')
        self.call_count += 1
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return list(self._run(iter(images), settings))
        is_one = isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image)
        if is_one or hasattr(images, "ndim") or hasattr(images, "read"):
            return next(self._run(iter([images]), settings))
        return self._run(_items(images), settings)

    def predict(self, images: Any) -> Any:
        """The pipeline's call, with the labels that it was made with."""
        return self(images)

    transform = predict

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Saves the model, with its keywords, and the files of tokenizer and image processor."""
        self.model.save_pretrained(save_directory, **options)
        self.processor.save_pretrained(save_directory)

    @abstractmethod
    def _results(
        self, sources: Iterator[Any], segmenter: BaseSegmenter, settings: Mapping[str, Any]
    ) -> Iterator[list[Result]]:
        """Returns an iterator over the results of images. The labels are read before it returns."""

    def _options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options of the segmenter."""
        return {}

    def _run(self, sources: Iterator[Any], settings: Mapping[str, Any]) -> Iterator[list[Result]]:
        timeout = settings.get("timeout")

        def opened(source: Any) -> Any:
            if isinstance(source, Mapping):
                if _has_labels(source):
                    raise InputError("images with candidate_labels of their own are given alone or in a list")
                source = _image_of(source)
            return download(source, timeout) if timeout is not None and is_address(source) else source

        return self._results(map(opened, sources), self._segmenter(settings), settings)

    def _segmenter(self, settings: Mapping[str, Any]) -> BaseSegmenter:
        """Returns the segmenter with the options of a call; the last few are kept."""
        options = SegmentationOptions(**self._options(settings))
        sizes: dict[str, Any] = {
            name: default if settings.get(name) is None else settings[name]
            for name, default in (("batch_size", 8), ("max_pixels", MAX_PIXELS))
        }
        key = (options, *sizes.values())
        with self._lock:
            segmenter = self._segmenters.pop(key, None)
            if segmenter is None:
                # The fields, not `to_dict`: that is for JSON.
                chosen = {name: getattr(options, name) for name in OPTIONS}
                segmenter = self.segmenter_class(self.model, self.processor, **sizes, **chosen)
            self._segmenters[key] = segmenter
            if len(self._segmenters) > _MOST_SEGMENTERS:
                del self._segmenters[next(iter(self._segmenters))]
        return segmenter

    def _check(self, settings: Mapping[str, Any]) -> None:
        known = (*_SETTINGS, *self.own_settings)
        for name in settings:
            if name not in known:
                alike = nearest(name, known)
                meant = f" (did you mean {alike!r}?)" if alike else ""
                raise InputError(f"{name!r} is not a keyword of {self.task}{meant}; these are: {', '.join(known)}")
        timeout, template = settings.get("timeout"), settings.get("hypothesis_template")
        if timeout is not None and not (is_number(timeout) and timeout > 0):
            raise InputError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if template is not None and not _is_template(template):
            raise InputError(f"hypothesis_template must be a sentence with {{}} where the label goes, got {template!r}")


class BaseImageClassification(BasePipeline):
    """Zero-shot classification of whole images, with the numbers of transformers'
    `zero-shot-image-classification` pipeline: `[{"score", "label"}]`, the largest score first.

    A score is the softmax over the labels. `hypothesis_template` is "This is a photo of {}." by default.
    `tokenizer_kwargs`: further keywords of the tokenizer, such as `{"truncation": True}`.
    """

    own_settings = ("tokenizer_kwargs",)
    default_task = "zero-shot-image-classification"

    def _results(
        self, sources: Iterator[Any], segmenter: BaseSegmenter, settings: Mapping[str, Any]
    ) -> Iterator[list[Result]]:
        labels = _listed(settings["candidate_labels"])
        template = settings.get("hypothesis_template")
        template = "This is a photo of {}." if template is None else template
        texts = [template.format(label) for label in labels]
        embeds = self._embedded(segmenter, texts, dict(settings.get("tokenizer_kwargs") or {}))
        return (
            [
                {"score": score, "label": label}
                for score, label in sorted(zip(scores.tolist(), labels, strict=True), key=lambda pair: -pair[0])
            ]
            for scores in _probabilities(segmenter, sources, embeds)
        )

    def _embedded(self, segmenter: BaseSegmenter, texts: list[str], options: dict[str, Any]) -> Floats:
        parts = []
        for start in range(0, len(texts), PROMPTS_AT_ONCE):
            wanted = {"padding": True, **options, "return_tensors": "np"}
            tokens = self.tokenizer(texts[start : start + PROMPTS_AT_ONCE], **wanted)
            parts.append(segmenter._embed_texts({name: tokens[name] for name in ("input_ids", "attention_mask")}))
        return np.concatenate(parts)


class BaseImageSegmentation(BasePipeline):
    """Zero-shot segmentation, as transformers' `image-segmentation` pipeline returns it:
    `[{"score", "label", "mask"}]`, `mask` a PIL image of mode "L" and of the photo's size, upright, 255 within.

    A call's further keywords, all of them also arguments of the constructor:

    - `subtask`: "semantic" (None): a mask for each candidate label that has pixels, in the order of the labels.
      "instance", "panoptic": a mask for each group of patches, which has one label.
    - `threshold`: masks of a lower score are left out. A score is the probability of the label for the groups that hold
      the mask's pixels: `groupvit_common.segmentation.segments.Segment`.
    - `background_labels` and the options of `SegmentationOptions`, such as `background=0.3`: pixels that these make
      background are in no mask, unless "background" is among the candidate labels.
    - `hypothesis_template`: the option `templates` for one sentence.
    - `overlap_mask_area_threshold` changes nothing, since masks do not overlap; `mask_threshold` may be 0.5, its
      default.
    """

    own_settings = (
        "subtask",
        "threshold",
        "mask_threshold",
        "overlap_mask_area_threshold",
        "background_labels",
        *OPTIONS,
    )
    default_task = "zero-shot-image-segmentation"

    def _options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in settings.items() if name in OPTIONS}
        template = settings.get("hypothesis_template")
        if template is not None:
            if "templates" in options:
                raise InputError("give hypothesis_template or templates, not both: they are the same option")
            options["templates"] = (template,)
        return options

    def _check(self, settings: Mapping[str, Any]) -> None:
        super()._check(settings)
        if settings.get("subtask") not in _SUBTASKS:
            names = ", ".join(filter(None, _SUBTASKS))
            raise InputError(f"subtask must be one of {names}, got {settings['subtask']!r}")
        for name in ("threshold", "overlap_mask_area_threshold"):
            value = settings.get(name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise InputError(f"{name} must be a number between 0 and 1, got {value!r}")
        if settings.get("mask_threshold") not in (None, 0.5):
            raise InputError(
                f"mask_threshold={settings['mask_threshold']!r} is not supported: a pixel belongs to the label that "
                "fits it best; leave pixels out with background=..., masks with threshold=..."
            )

    def _results(
        self, sources: Iterator[Any], segmenter: BaseSegmenter, settings: Mapping[str, Any]
    ) -> Iterator[list[Result]]:
        labels = settings["candidate_labels"]
        if isinstance(labels, Iterable) and not isinstance(labels, str | Mapping):
            # The entries of a list are labels as they are, commas and all, as in transformers.
            labels = [Label(label) if isinstance(label, str) else label for label in labels]
        candidates = parse_labels(labels)
        with self._lock:
            segmenter.set_labels(candidates, settings.get("background_labels") or ())
            results = segmenter.iter(sources)
        # A background is called as the caller calls it.
        background = next((label.name for label in candidates if label.name.casefold() == BACKGROUND), None)
        by, threshold = _SUBTASKS[settings.get("subtask")], settings.get("threshold") or 0.0
        return (
            [
                {
                    "score": segment.score,
                    "label": background if background and segment.label == BACKGROUND else segment.label,
                    "mask": Image.fromarray(segment.mask.astype(np.uint8) * 255),
                }
                for segment in segments(result, by=by, background=background is not None)
                if segment.score is None or segment.score >= threshold
            ]
            for result in results
        )


def _probabilities(segmenter: BaseSegmenter, sources: Iterator[Any], embeds: Floats) -> Iterator[Floats]:
    """Yields for each image the probability of each label `[L]`, images of one size together."""
    waiting: list[Floats] = []
    for source in sources:
        pixels = segmenter._classifier_pixels(source)
        if waiting and (len(waiting) == segmenter.batch_size or waiting[0].shape != pixels.shape):
            yield from segmenter._classify(np.concatenate(waiting), embeds)
            waiting.clear()
        waiting.append(pixels)
    if waiting:
        yield from segmenter._classify(np.concatenate(waiting), embeds)


_SUBTASKS: dict[str | None, By] = {None: "label", "semantic": "label", "instance": "group", "panoptic": "group"}


def pipeline_of(tasks: Mapping[str, type[BasePipeline]]) -> Callable[..., Any]:
    """Returns a backend's `pipeline`, from its pipelines by task."""

    def pipeline(
        task: str | None = None,
        model: Any = None,
        config: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        image_processor: Any = None,
        processor: Any = None,
        framework: str | None = None,
        revision: str | None = None,
        use_fast: bool = True,
        token: str | bool | None = None,
        device: Any = None,
        device_map: Any = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        trust_remote_code: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        pipeline_class: Any = None,
        fast: bool = False,
        **settings: Any,
    ) -> Any:
        """Returns the pipeline of a task, as transformers' `pipeline` does.

        Args:
            task: "zero-shot-image-segmentation" ("image-segmentation" is the same), "zero-shot-image-classification".
            model: "demo" for the bundled model, a checkpoint directory, "org/name" on the hub, or a model.
            config: a configuration, or its directory or name, instead of the checkpoint's.
            tokenizer, image_processor, processor: objects or names, instead of the checkpoint's.
            revision, token: of the hub. device: None: the best there is, or where a given model is.
            dtype: of the weights; `torch_dtype` is its older name.
            model_kwargs: further keywords of the model's `from_pretrained`.
            pipeline_class: another class in the place of the task's.
            fast: let `optimize` choose the dtype of a model that is given by name, unless `dtype` names it; `dtype`
                may be "int8" as well.
            use_fast: False asks for a `CLIPTokenizer` instead of a `CLIPTokenizerFast`.
            trust_remote_code: changes nothing. `use_auth_token` is the former name of `token`.
            settings: defaults of the pipeline's keywords.

        Raises:
            InputError: an unknown task, or an argument that cannot be used.
            CheckpointError: the checkpoint cannot be found, reached, read or loaded.
        """
        former = settings.pop("use_auth_token", None)
        token = former if token is None else token
        known = ", ".join(tasks)
        if task is None and pipeline_class is None:
            raise InputError(f"a pipeline needs a task; there are {known}")
        if pipeline_class is None and task not in tasks:
            raise InputError(f"unknown task {task!r}: there are {known}")
        chosen: type[BasePipeline] = pipeline_class or tasks[cast(str, task)]
        if framework not in (None, chosen.framework):
            raise InputError(f"framework={framework!r}: the pipelines of this package are {chosen.framework!r}")
        if device is not None and device_map is not None:
            raise InputError("give device or device_map, not both")
        device = device if device_map == "auto" or device_map is None else device_map
        model = DEFAULT_MODEL if model is None else model
        keywords = {"revision": revision, "token": token, **(model_kwargs or {})}
        where = {name: keywords[name] for name in HUB_KEYWORDS if name in keywords} | {"use_fast": use_fast}
        name = model if isinstance(model, str | Path) else None
        if name is None:
            if fast:
                raise InputError("fast=True is for a model that is given by name: call optimize on a model at hand")
            model = chosen._placed(model, None)
        image_processor = feature_extractor if image_processor is None else image_processor
        parts = _parts(name, model, config, tokenizer, image_processor, processor, where)
        if name is not None:
            dtype = dtype if dtype is not None else torch_dtype
            request = optimization_request(dtype, fast=fast)
            dtype = dtype if request is None else None
            model = chosen.load_model(name, _device_name(device), config=config, dtype=dtype, **keywords)
            if request is not None:
                model = chosen.segmenter_class._optimized(model, request).model
            device = dtype = torch_dtype = None
        return chosen(
            model=model,
            processor=parts,
            task=task or "",
            device=device,
            dtype=dtype,
            torch_dtype=torch_dtype,
            **settings,
        )

    return pipeline


def check_model(model: object, expected: type) -> None:
    """Raises `InputError` for anything but a model of this class."""
    if not isinstance(model, expected):
        raise InputError(
            f"model must be a name, a directory or a {expected.__module__.split('.')[0]}.{expected.__name__}, "
            f"got {type(model).__module__}.{type(model).__name__}"
        )


def _parts(
    name: Any, model: Any, config: Any, tokenizer: Any, image_processor: Any, processor: Any, where: dict[str, Any]
) -> GroupViTProcessor:
    """Returns the processor of a pipeline, from what was given and else from the model's checkpoint."""
    if isinstance(processor, str | Path):
        processor = GroupViTProcessor.from_pretrained(processor, **where)
    if isinstance(tokenizer, tuple):  # a name and keywords
        tokenizer = AutoTokenizer.from_pretrained(tokenizer[0], **{**where, **tokenizer[1]})
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **where)
    if isinstance(image_processor, str | Path):
        image_processor = GroupViTImageProcessor.from_pretrained(image_processor, **where)
    if processor is None and (tokenizer is None or image_processor is None):
        source = name or (config if isinstance(config, str | Path) else None) or getattr(model, "name_or_path", None)
        if not source:
            raise InputError(
                "a model at hand needs a tokenizer and an image_processor, or a processor: give them as well"
            )
        processor = GroupViTProcessor.from_pretrained(source, **where)
    if tokenizer is None and image_processor is None:
        return cast(GroupViTProcessor, processor)
    return GroupViTProcessor(
        processor.image_processor if image_processor is None else image_processor,
        processor.tokenizer if tokenizer is None else tokenizer,
    )


def _device_name(device: Any) -> str | None:
    """Returns a device as its name: transformers counts accelerators, and calls the CPU -1."""
    if device is None or isinstance(device, str):
        return device
    if isinstance(device, bool) or not isinstance(device, int):
        return str(device)
    return "cpu" if device < 0 else f"cuda:{device}"


def _is_template(template: Any) -> bool:
    """Returns whether a label can be put into a sentence, which need not have a place for it."""
    try:
        return isinstance(template, str) and isinstance(template.format("label"), str)
    except (IndexError, KeyError, ValueError, AttributeError):
        return False


def _image_of(row: Mapping[str, Any]) -> Any:
    if row.get("image") is None:
        raise InputError(f'a dictionary needs the image as "image", got the keys {", ".join(map(str, row)) or "none"}')
    return row["image"]


def _has_labels(item: Any) -> bool:
    return isinstance(item, Mapping) and "candidate_labels" in item


def _items(images: Any) -> Iterator[Any]:
    """Returns an iterator over a generator or a data set. One that has a length may have no other end."""
    if not hasattr(images, "__iter__") and not hasattr(images, "__getitem__"):
        raise InputError(
            f"images must be a path, an address, a PIL image, an array, or several of them, got {type(images).__name__}"
        )
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return (images[i] for i in range(len(images)))
    return iter(images)


def _listed(labels: Any) -> list[str]:
    """Returns candidate labels of a classification as a list."""
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",") if label.strip()]
    if not isinstance(labels, Iterable) or not (labels := list(labels)):
        raise InputError(f'candidate_labels must be a list of labels such as ["cat", "couch"], got {labels!r}')
    for label in labels:
        if not isinstance(label, str):
            raise InputError(f"a candidate label must be text, got {type(label).__name__}: {label!r}")
    return labels
