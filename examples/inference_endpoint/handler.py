"""A custom handler for Hugging Face inference endpoints: `handler.py` in the repository of a checkpoint.

It answers `{"inputs": image, "parameters": {"candidate_labels": ["cat", "dog"]}}` as the pipeline
`zero-shot-image-segmentation` does, with masks as base64 PNG: `[{"score": 0.98, "label": "cat", "mask": "iVBOR..."}]`.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from groupvit_common.errors import InputError

# Keywords of the pipeline that a request may set: none of them opens a file or an address, or costs minutes.
PARAMETERS = (
    "candidate_labels", "background_labels", "background", "hypothesis_template", "threshold", "subtask", "assignment",
    "top_k", "temperature", "synonyms", "foreground",
)  # fmt: skip
MOST_LABELS = 1000
MOST_CHARACTERS = 100_000
MOST_PIXELS = 40_000_000


class EndpointHandler:
    """Loads the model of a folder, and answers requests.

    Args:
        path: the repository's folder.
    """

    def __init__(self, path: str = "demo") -> None:
        try:
            from groupvit_torch import pipeline
        except ImportError:
            from groupvit_tf import pipeline
        self.pipeline = pipeline("zero-shot-image-segmentation", model=path or "demo", max_pixels=MOST_PIXELS)

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a dictionary for each mask: `score`, `label`, `mask`.

        Args:
            data: `inputs`: an image as a PIL image, bytes or base64 text; or a dictionary with it as `image`, and
                parameters. `parameters`: `candidate_labels`, a list or one text with commas, and others of
                `PARAMETERS`.

        Raises:
            InputError: what cannot be used, in a sentence, which the endpoint sends with status 400.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise InputError('a request needs "inputs", an image as base64 text or bytes')
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InputError(f'"parameters" must be an object, got {type(parameters).__name__}')
        if isinstance(inputs, Mapping):
            parameters = {name: value for name, value in inputs.items() if name != "image"} | dict(parameters)
            inputs = inputs.get("image")
        unknown = [name for name in parameters if name not in PARAMETERS]
        if unknown:
            raise InputError(f"{unknown[0]!r} is no parameter here: these are {', '.join(PARAMETERS)}")
        for name in ("candidate_labels", "background_labels"):
            check_labels(name, parameters.get(name, ""))
        masks = self.pipeline(image_of(inputs), **parameters)
        return [each | {"mask": base64_png(each["mask"])} for each in masks]


def check_labels(name: str, labels: Any) -> None:
    """Raises `InputError` for anything but a text or a list of texts, or for too many."""
    texts = [labels] if isinstance(labels, str) else labels
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'"{name}" must be a list of texts or one text, got {labels!r:.80}')
    # In a text, not in a list, | is between synonyms.
    count = len(texts) if isinstance(labels, list) else labels.count(",") + labels.count("|") + 1
    if count > MOST_LABELS:
        raise InputError(f'"{name}" has {count} labels, expected at most {MOST_LABELS}')
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise InputError(f'"{name}" is too long: expected at most {MOST_CHARACTERS} characters in all')


def image_of(given: Any) -> Image.Image | bytes:
    """Returns an image, or the bytes of its file. A text is base64, never a path or an address."""
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, bytes | bytearray):
        return bytes(given)
    if not isinstance(given, str):
        raise InputError(f"an image must be base64 text, bytes or a PIL image, got {type(given).__name__}")
    text = given.partition(",")[2] if given.startswith("data:") else given
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the image is no base64 text: send the bytes of its file in base64") from None


def base64_png(mask: Image.Image) -> str:
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
