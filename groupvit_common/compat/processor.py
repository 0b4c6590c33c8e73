"""Habits of transformers' processors: names of the parts, JSON, and every order and form of a call's arguments."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from groupvit_common.checkpoints.hub import HubLocation, resolve
from groupvit_common.compat.chat import NoChat
from groupvit_common.compat.image_processor import CALL_KEYWORDS
from groupvit_common.compat.keywords import check_unknown
from groupvit_common.errors import InputError, short
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import write_file, write_text

_NESTED = ("text_kwargs", "images_kwargs", "common_kwargs", "audio_kwargs", "videos_kwargs")
# Inputs of other models' processors.
_OTHER_INPUTS = ("audio", "audios", "videos")


class ProcessorHabits(NoChat):
    """Methods and attributes that programs written for transformers use of a processor."""

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    optional_attributes: ClassVar[list[str]] = ["chat_template"]
    image_processor_class: ClassVar[str] = "CLIPImageProcessor"
    feature_extractor_class: ClassVar[str] = "CLIPImageProcessor"
    tokenizer_class: ClassVar[tuple[str, str]] = ("CLIPTokenizer", "CLIPTokenizerFast")

    image_processor: Any
    tokenizer: Any

    @property
    def feature_extractor(self) -> Any:
        """Returns the image processor, by the name that it had before transformers 4.25."""
        return self.image_processor

    @feature_extractor.setter
    def feature_extractor(self, value: Any) -> None:
        self.image_processor = value

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Returns the names of the parts."""
        return list(cls.attributes)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a processor_config.json holds besides the parts, which have files of their own."""
        return {"processor_class": type(self).__name__}

    def to_json_string(self) -> str:
        """Returns `to_dict` as JSON text."""
        return json_text(self.to_dict())

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes the text of `to_json_string` to a file."""
        write_file(Path(json_file_path), partial(write_text, text=self.to_json_string()))

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | Path, **keywords: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the content of processor_config.json, {} without one, and the keywords that do not say where it is.

        Keywords and errors as of `from_pretrained`.
        """
        location, name = HubLocation.take(keywords), pretrained_model_name_or_path
        if os.path.isfile(name):  # noqa: PTH113 - as transformers: a file by its path
            return read_json(Path(name)), keywords
        files = ["processor_config.json", "preprocessor_config.json"]
        path = resolve(name, patterns=files, location=location) / files[0]
        return (read_json(path) if path.is_file() else {}), keywords

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: Mapping[str, Any], **keywords: Any) -> Any:
        """Returns the processor of its parts, in the order of `attributes`.

        `processor_dict`: the content of a processor_config.json; the parts are not made from it. With
        `return_unused_kwargs=True` the pair of it and the other keywords.
        """
        return_unused = keywords.pop("return_unused_kwargs", False)
        processor = cast(Any, cls)(*args)
        return (processor, keywords) if return_unused else processor

    def __repr__(self) -> str:
        parts = "\n".join(f"- {name}: {getattr(self, name)!r}" for name in self.attributes)
        return f"{type(self).__name__}:\n{parts}\n\n{self.to_json_string()}"


def in_order(text: Any, images: Any) -> tuple[Any, Any]:
    """Returns text and images of a call, whichever came first: transformers 4 has text first, 5 images.

    Strings beside strings are taken as in 4: the second may be paths.
    """
    return (images, text) if is_image(text) and not is_image(images) else (text, images)


def is_image(value: Any) -> bool:
    """Returns whether a value is certainly an image, or a batch of images: no string, of which some are paths."""
    if isinstance(value, list | tuple):
        return bool(value) and is_image(value[0])
    if getattr(value, "ndim", 0) == 1 and str(getattr(value, "dtype", "")) == "object":
        return len(value) > 0 and is_image(value[0])
    binary = isinstance(value, bytes | bytearray | memoryview | os.PathLike)
    return binary or hasattr(value, "getbands") or hasattr(value, "read") or getattr(value, "ndim", 0) >= 2


def divided(
    keywords: Mapping[str, Any], text_keywords: Collection[str], image_keywords: Collection[str], return_tensors: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the keywords of a processor's call for its tokenizer and for its image processor.

    They are given plainly or in the dictionaries `text_kwargs`, `images_kwargs` and `common_kwargs`.

    Raises:
        InputError: a keyword is given twice, is nearly a known one, or asks for audio or video. Of other unknown ones
            there is a warning.
    """
    for name in (*_OTHER_INPUTS, "audio_kwargs", "videos_kwargs"):
        if keywords.get(name):
            raise InputError(f"{name}= was given: GroupViT takes text and images")
    text_names, image_names = {*text_keywords}, {*image_keywords, *CALL_KEYWORDS}
    plain = {name: value for name, value in keywords.items() if name not in (*_NESTED, *_OTHER_INPUTS)}
    check_unknown("processor", sorted(plain.keys() - text_names - image_names), sorted(text_names | image_names))
    both = {"return_tensors": return_tensors, **_nested(keywords, "common_kwargs")}
    if return_tensors is not None:
        both["return_tensors"] = return_tensors
    parts = []
    for kind, names in (("text_kwargs", text_names), ("images_kwargs", image_names)):
        own = {name: value for name, value in plain.items() if name in names}
        nested = _nested(keywords, kind)
        if twice := sorted(nested.keys() & own.keys()):
            raise InputError(f"{twice[0]!r} is given twice, in {kind} and by itself")
        common = {name: value for name, value in both.items() if name in names or name == "return_tensors"}
        parts.append({**common, **own, **nested})
    return parts[0], parts[1]


ProcessorMixin = ProcessorHabits


def _nested(keywords: Mapping[str, Any], kind: str) -> dict[str, Any]:
    value = keywords.get(kind) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{kind} must be a dictionary of keywords, got {short(value)}")
    return dict(value)
