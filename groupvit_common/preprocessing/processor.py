"""Text and images together: one object that turns both into a model's inputs, as transformers' CLIPProcessor (4.x)
does."""

import inspect
import tempfile
from pathlib import Path
from typing import Any, Self

from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, local, push, resolve
from groupvit_common.compat.post_process import PostProcessing
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.encoding import HARMLESS_TOKENIZER_KEYWORDS, BatchEncoding, check_keywords
from groupvit_common.preprocessing.image_processor import IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, GroupViTImageProcessor
from groupvit_common.preprocessing.tokenizer import (
    MERGES_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    VOCAB_FILE,
    CLIPTokenizer,
)
from groupvit_common.storage.saving import has_file, read_lock, write_texts

__all__ = ["AutoProcessor", "BatchEncoding", "CLIPProcessor", "GroupViTProcessor"]


def _keywords(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)


PROCESSOR_FILES = (*TOKENIZER_FILES, IMAGE_PROCESSOR_FILE, PROCESSOR_FILE)

# What a call passes on, and to whom. `return_tensors` goes to both.
_TEXT_KEYWORDS = _keywords(CLIPTokenizer.__call__) - {"return_tensors"}
_IMAGE_SETTINGS = frozenset(inspect.signature(GroupViTImageProcessor).parameters) - {"extra"}
_IMAGE_KEYWORDS = (_keywords(GroupViTImageProcessor.__call__) | _IMAGE_SETTINGS) - {"return_tensors"}
_TEXT_SETTINGS = _keywords(CLIPTokenizer.__init__) - {"tokenizer_file", "tokenizer_object", "extra"}


class GroupViTProcessor(PostProcessing):
    """An image processor and a tokenizer; also exported as `AutoProcessor` and `CLIPProcessor`."""

    def __init__(
        self, image_processor: GroupViTImageProcessor | None = None, tokenizer: CLIPTokenizer | None = None
    ) -> None:
        if not isinstance(image_processor, GroupViTImageProcessor) or not isinstance(tokenizer, CLIPTokenizer):
            raise InputError(
                "a processor needs a GroupViTImageProcessor and a CLIPTokenizer, in this order, "
                f"got {type(image_processor).__name__} and {type(tokenizer).__name__}"
            )
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> Self:
        """Returns the processor of a directory or a hub repository, from the files of transformers 4 or 5.

        Keywords override settings, of the image processor or (such as `model_max_length`) of the tokenizer; unknown
        ones are refused. Harmless ones of transformers, such as `use_fast`, are accepted as by the two parts. Others
        are those of `groupvit_common.checkpoints.hub.HubLocation`. Raises `CheckpointError` as the two parts do.
        """
        valid = (*sorted(_IMAGE_SETTINGS | _TEXT_SETTINGS), *HUB_KEYWORDS)
        check_keywords("processor", settings, valid, HARMLESS_TOKENIZER_KEYWORDS)
        here = local(name_or_path) if isinstance(name_or_path, str | Path) else None
        location = HubLocation.take(settings)
        directory = (
            here / location.subfolder
            if here is not None
            else resolve(name_or_path, patterns=PROCESSOR_FILES, location=location)
        )
        for_images = {name: value for name, value in settings.items() if name in _IMAGE_SETTINGS}
        for_text = {name: value for name, value in settings.items() if name not in _IMAGE_SETTINGS}
        if lacking := missing_parts(directory):
            raise CheckpointError(
                f"{name_or_path} has {lacking}: take them from the checkpoint that its model began as"
            )
        with read_lock(directory) as held:
            return cls(
                GroupViTImageProcessor.of_directory(held, for_images), CLIPTokenizer.of_directory(held, for_text)
            )

    def save_pretrained(self, save_directory: str | Path) -> list[Path]:
        """Writes the files of both, which transformers 4 and 5 read as a CLIPProcessor; returns their paths."""
        directory = Path(save_directory)
        return write_texts(directory, self.tokenizer.file_texts() | self.image_processor.file_texts(directory))

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
            images: one image or a batch of any kind that the image processor takes; None: no images.
            return_tensors: None (lists), "np", "pt" or "tf".
            kwargs: of the tokenizer (`padding`, `truncation`, `max_length`, ...) and settings of the image processor.

        Returns:
            `input_ids` and `attention_mask` int64 `[N, T]` with text; `pixel_values` float32 `[B, 3, H, W]` with
            images.
        """
        unknown = kwargs.keys() - _TEXT_KEYWORDS - _IMAGE_KEYWORDS
        if unknown:
            choices = ", ".join(sorted(_TEXT_KEYWORDS | _IMAGE_KEYWORDS))
            raise InputError(f"{min(unknown)!r} is not a keyword of the processor; these are: {choices}")
        if text is None and images is None:
            raise InputError("a processor needs text, images or both, got neither")
        encoding = BatchEncoding()
        if text is not None:
            options = {name: value for name, value in kwargs.items() if name in _TEXT_KEYWORDS}
            encoding.update(self.tokenizer(text, return_tensors=return_tensors, **options))
        if images is not None:
            options = {name: value for name, value in kwargs.items() if name in _IMAGE_KEYWORDS}
            encoding.update(self.image_processor(images, return_tensors=return_tensors, **options))
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(image_processor={self.image_processor!r}, tokenizer={self.tokenizer!r})"


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


AutoProcessor = GroupViTProcessor
CLIPProcessor = GroupViTProcessor
