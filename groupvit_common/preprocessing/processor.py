"""Text and images together: one object that turns both into a model's inputs, as transformers' CLIPProcessor (4.x)
does."""

import inspect
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, local, push, resolve
from groupvit_common.compat.auto import AutoClass
from groupvit_common.compat.image_processor import FILE_KEYWORDS
from groupvit_common.compat.keywords import check_unknown, drop_harmless
from groupvit_common.compat.post_process import PostProcessing
from groupvit_common.compat.processor import ProcessorHabits, divided, in_order
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID
from groupvit_common.preprocessing.encoding import HARMLESS_TOKENIZER_KEYWORDS, BatchEncoding
from groupvit_common.preprocessing.image_processor import (
    IMAGE_PROCESSOR_FILE,
    PROCESSOR_FILE,
    CLIPImageProcessor,
    push_keywords,
)
from groupvit_common.preprocessing.image_settings import DEFAULTS
from groupvit_common.preprocessing.tokenizer import CALL_KEYWORDS, CLIPTokenizer, CLIPTokenizerFast
from groupvit_common.preprocessing.tokenizer_files import (
    MERGES_FILE,
    SETTINGS,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    VOCAB_FILE,
)
from groupvit_common.storage.saving import has_file, read_lock, write_texts

__all__ = ["AutoProcessor", "BatchEncoding", "CLIPProcessor", "GroupViTProcessor"]


def _keywords(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)


PROCESSOR_FILES = (*TOKENIZER_FILES, IMAGE_PROCESSOR_FILE, PROCESSOR_FILE)

_IMAGE_SETTINGS = frozenset(DEFAULTS)
_IMAGE_KEYWORDS = (_keywords(CLIPImageProcessor.preprocess) | _IMAGE_SETTINGS) - {"return_tensors"}
_TEXT_KEYWORDS = frozenset(CALL_KEYWORDS) - {"text", "return_tensors"}
_PARTS = ("image_processor", "tokenizer", "feature_extractor")
_TEXT_SETTINGS = frozenset(SETTINGS)


class CLIPProcessor(PostProcessing, ProcessorHabits):
    """An image processor and a tokenizer; also exported as `GroupViTProcessor` and `AutoProcessor`.

    `feature_extractor` is the image processor's older name, here and as an attribute. There is no chat template.
    """

    def __init__(
        self,
        image_processor: CLIPImageProcessor | None = None,
        tokenizer: CLIPTokenizer | None = None,
        **others: Any,
    ) -> None:
        self.chat_template = others.pop("chat_template", None)
        former = others.pop("feature_extractor", None)
        image_processor = former if image_processor is None else image_processor
        check_unknown("processor", others, _PARTS)
        if not isinstance(image_processor, CLIPImageProcessor) or not isinstance(tokenizer, CLIPTokenizer):
            raise InputError(
                "a processor needs a CLIPImageProcessor and a CLIPTokenizer, in this order, "
                f"got {type(image_processor).__name__} and {type(tokenizer).__name__}"
            )
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Self:
        """Returns the processor of a directory or a hub repository, from the files of transformers 4 or 5.

        Keywords override settings, of the image processor or (such as `model_max_length`) of the tokenizer. Harmless
        ones of transformers are accepted as by the two parts; `use_fast=False` asks for a `CLIPTokenizer` instead of a
        `CLIPTokenizerFast`; `image_processor` and `tokenizer` take the place of those in the files; names that are
        nearly a setting's are refused, others are warned of, or returned with `return_unused_kwargs=True`. Keywords
        besides are those of `groupvit_common.checkpoints.hub.HubLocation`. Raises `CheckpointError` as the parts do.
        """
        name = pretrained_model_name_or_path
        return_unused = settings.pop("return_unused_kwargs", False)
        parts = {keyword: settings.pop(keyword) for keyword in _PARTS if keyword in settings}
        settings = drop_harmless("processor", settings, {**FILE_KEYWORDS, "chat_template": (None,)})
        here = local(name) if isinstance(name, str | Path) else None
        location = HubLocation.take(settings)
        known = {*_IMAGE_SETTINGS, *_TEXT_SETTINGS, *HARMLESS_TOKENIZER_KEYWORDS}
        unused = {keyword: settings.pop(keyword) for keyword in sorted(settings.keys() - known)}
        if not return_unused:
            check_unknown("processor", unused, (*sorted(_IMAGE_SETTINGS | _TEXT_SETTINGS), *HUB_KEYWORDS))
        directory = (
            here / location.subfolder
            if here is not None
            else resolve(name, patterns=PROCESSOR_FILES, location=location)
        )
        for_images = {keyword: value for keyword, value in settings.items() if keyword in _IMAGE_SETTINGS}
        for_text = {keyword: value for keyword, value in settings.items() if keyword not in _IMAGE_SETTINGS}
        tokenizer = CLIPTokenizer if settings.get("use_fast") is False else CLIPTokenizerFast
        if lacking := missing_parts(directory):
            raise CheckpointError(f"{name} has {lacking}: take them from the checkpoint that its model began as")
        with read_lock(directory) as held:
            processor = cls(
                CLIPImageProcessor.of_directory(held, for_images),
                tokenizer.of_directory(held, for_text, name=str(name)),
            )
        for part, value in parts.items():
            if value is not None:
                setattr(processor, part, value)
        return cast(Self, (processor, unused)) if return_unused else processor

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, *, repo_id: str | None = None, **push_options: Any
    ) -> list[str]:
        """Writes the files of both, which transformers 4 and 5 read as a CLIPProcessor; returns their paths.

        `push_to_hub`: also send them to the repository `repo_id` (the directory's name if None); `push_options` as of
        `push_to_hub`.
        """
        directory = Path(save_directory)
        options = push_keywords(push_to_hub, repo_id, directory, push_options)
        # By this, transformers' AutoProcessor knows what to make of the directory.
        self.image_processor.extra["processor_class"] = "CLIPProcessor"
        texts = self.image_processor.file_texts(directory) | self.tokenizer.file_texts()
        paths = [str(path) for path in write_texts(directory, texts)]
        if options is not None:
            self.push_to_hub(**options)
        return paths

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload processor", **options: Any) -> str:
        """Sends the files of both to a model repository; `options` and errors as
        `groupvit_common.checkpoints.hub.push`."""
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return push(directory, repo_id, commit_message=commit_message, **options)

    def __call__(
        self, text: Any = None, images: Any = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """Returns the inputs of a model for text, images or both.

        Args:
            text: a string, or strings in any form that the tokenizer takes; None: no text.
            images: one image or a batch of any kind that the image processor takes; None: no images. Text and images
                are recognised in either order.
            return_tensors: None (lists), "np", "pt" or "tf".
            kwargs: of the tokenizer (`padding`, `truncation`, `max_length`, ...) and settings of the image processor;
                also within the dictionaries `text_kwargs`, `images_kwargs` and `common_kwargs`.

        Returns:
            `input_ids` and `attention_mask` int64 `[N, T]` with text; `pixel_values` float32 `[B, 3, H, W]` with
            images.
        """
        text, images = in_order(text, images)
        if text is None and images is None:
            raise InputError("a processor needs text, images or both, got neither")
        for_text, for_images = divided(kwargs, _TEXT_KEYWORDS, _IMAGE_KEYWORDS, return_tensors)
        encoding = BatchEncoding() if text is None else self.tokenizer(text, **for_text)
        if images is not None:
            encoding.update(self.image_processor(images, **for_images))
        return encoding

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """`CLIPTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """`CLIPTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Returns the names of a call's outputs for text and images."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def missing_parts(directory: Path) -> str:
    """Returns a message of what a directory lacks: "no tokenizer (FILES) and no image processor (FILE)", or ""."""
    missing = []
    if not has_file(directory, TOKENIZER_FILE) and not (
        has_file(directory, VOCAB_FILE) and has_file(directory, MERGES_FILE)
    ):
        missing.append(f"no tokenizer ({TOKENIZER_FILE}, or {VOCAB_FILE} with {MERGES_FILE})")
    if not has_file(directory, IMAGE_PROCESSOR_FILE) and not has_file(directory, PROCESSOR_FILE):
        missing.append(f"no image processor ({IMAGE_PROCESSOR_FILE})")
    return " and ".join(missing)


GroupViTProcessor = CLIPProcessor


class AutoProcessor(AutoClass):
    """CLIP's processor, if that is the one that a checkpoint asks for."""

    key: ClassVar[str] = "processor_class"
    classes: ClassVar[dict[str, type[Any]]] = {"CLIPProcessor": CLIPProcessor}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Any:
        """`CLIPProcessor.from_pretrained`; `CheckpointError` for another kind of processor."""
        made = CLIPProcessor.from_pretrained(pretrained_model_name_or_path, **settings)
        processor = made[0] if isinstance(made, tuple) else made
        named = processor.image_processor.extra.get("processor_class", "CLIPProcessor")
        if cls._chosen(named, pretrained_model_name_or_path) is CLIPProcessor:
            return made
        return cls.classes[named].from_pretrained(pretrained_model_name_or_path, **settings)

    @classmethod
    def register(cls, config_class: Any, processor_class: type[Any], exist_ok: bool = False) -> None:
        """Has a class of yours made for files that name it. `config_class` is not needed to know them."""
        cls._register(processor_class.__name__, processor_class, exist_ok)


def check_fit(processor: GroupViTProcessor, config: Any) -> None:
    """Raises `InputError` for a tokenizer whose tokens the model does not know, or whose end token it does not
    expect."""
    tokenizer, text = processor.tokenizer, config.text_config
    if len(tokenizer) > text.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: they belong to "
            "different models"
        )
    if text.eos_token_id not in (LEGACY_EOS_TOKEN_ID, tokenizer.eos_token_id):
        raise InputError(
            f"the tokenizer ends texts with token {tokenizer.eos_token_id}, and the model expects {text.eos_token_id}: "
            "they belong to different models"
        )
