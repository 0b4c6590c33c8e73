"""A client of `groupvit serve`, without any library but NumPy and Pillow."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.preprocessing.images import load_image
from groupvit_common.segmentation.label_maps import Indices
from groupvit_common.segmentation.result import LabelScore
from groupvit_common.segmentation.scores import Floats

Mapped = npt.NDArray[Any]


class ServedError(GroupViTError, OSError):
    """A server that refused a request, or did not answer. `status`: of HTTP, None without an answer; `code`: its word
    for programs."""

    exit_code = 3

    def __init__(self, message: str, status: int | None = None, code: str = "network") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, eq=False)
class ServedSegmentation:
    """A segmented image, as a server answers it; the names are those of `Segmentation`.

    `label_map`: `[H, W]`, index into `labels`. `group_map`: `[H, W]`. `score_map`: `[H, W]`, 0 to 1 in steps of 1/255,
    the score of each pixel's label. `stages`: the group map of each stage. Maps that were not asked for are None.
    `group_scores`: `[groups, labels]`. `masks`: by label, as `masks` asked. `answer`: the whole JSON.
    """

    labels: tuple[str, ...]
    scores: tuple[LabelScore, ...]
    colours: tuple[str, ...]
    has_background: bool
    group_labels: tuple[int, ...]
    group_scores: Floats
    label_map: Indices | None
    score_map: Floats | None
    group_map: Indices | None
    stages: tuple[Indices, ...] | None
    overlay: Image.Image | None
    masks: dict[str, Any]
    answer: dict[str, Any]

    def mask(self, label: str) -> npt.NDArray[np.bool_]:
        """`[H, W]` bool: the pixels of one label. InputError without it, or without a label map."""
        if label not in self.labels or self.label_map is None:
            raise InputError(f"no label map with {label!r} here: there are {', '.join(self.labels)}")
        return np.asarray(self.label_map == self.labels.index(label))


class Client:
    """A client of a server; threads may share it.

        client = Client("http://127.0.0.1:8000", api_key=None)
        result = client.segment("photo.jpg", "cat, dog|puppy, grass", background=0.3)

    Args:
        url: of the page. api_key: of the server, where it has one.
        tries: of a request that a busy server refuses. timeout: seconds for an answer.
    """

    def __init__(self, url: str, *, api_key: str | None = None, tries: int = 5, timeout: float = 120) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"a server's address begins with http:// or https://, got {url!r}")
        self._url, self._key, self._tries, self._timeout = url.rstrip("/"), api_key, max(1, tries), timeout

    def info(self) -> dict[str, Any]:
        """Returns the server's model, defaults and limits."""
        return self._call("GET", "/v1/info")

    def add_image(self, image: Any, *, backend: str | None = None) -> str:
        """Sends an image to be encoded and kept for a while; returns its id, which stands for it in other calls."""
        return str(self._post("/v1/images", {"image": _text(image), "backend": backend})["image_id"])

    def remove_image(self, image_id: str) -> None:
        """Has the server forget an image."""
        self._call("DELETE", f"/v1/images/{image_id}")

    def segment(
        self,
        image: Any,
        labels: str | Iterable[str] | None = None,
        *,
        background_labels: str | Iterable[str] | None = None,
        include: Sequence[str] = ("label_map", "score_map", "group_map"),
        **options: Any,
    ) -> ServedSegmentation:
        """Segments an image.

        Args:
            image: a path, the bytes of a file, a PIL image, an array `[H, W, 3]`, or the id of `add_image`.
            labels, background_labels: as a `Segmenter` takes them; None: the server's.
            include: maps in the answer. options: further fields of `/v1/segment`.

        Raises:
            InputError: the server cannot use an argument. ServedError: it refuses, or does not answer.
        """
        answer = self._post(
            "/v1/segment",
            {
                **_image_field(image),
                "labels": _listed(labels),
                "background_labels": _listed(background_labels),
                "include": list(include),
                **options,
            },
        )
        names = [label["name"] for label in answer["labels"]]
        return ServedSegmentation(
            labels=tuple(names),
            scores=tuple(LabelScore(e["name"], e["probability"], e["pixel_share"]) for e in answer["labels"]),
            colours=tuple(label["colour"] for label in answer["labels"]),
            has_background=answer["has_background"],
            group_labels=tuple(group["label"] for group in answer["groups"]),
            group_scores=np.array([group["scores"] for group in answer["groups"]]),
            label_map=_map(answer.get("label_map")),
            score_map=None if answer.get("score_map") is None else _map(answer["score_map"]) / np.float32(255),
            group_map=_map(answer.get("group_map")),
            stages=None if answer.get("stages") is None else tuple(_map(each) for each in answer["stages"]),
            overlay=None if answer.get("overlay") is None else _image(answer["overlay"]).convert("RGB"),
            masks={e["name"]: e["mask"] for e in answer["labels"] if e.get("mask") is not None},
            answer=answer,
        )

    def classify(self, image: Any, labels: str | Iterable[str] | None = None, **options: Any) -> dict[str, float]:
        """Returns the probability of each label for the whole image, the best first. Raises as `segment`."""
        answer = self._post("/v1/classify", {**_image_field(image), "labels": _listed(labels), **options})
        return {label["name"]: label["probability"] for label in answer["labels"]}

    def embed_image(self, image: Any, *, backend: str | None = None) -> Floats:
        """Returns the embedding `[E]` of an image, of length 1. Raises as `segment`."""
        answer = self._post("/v1/embed/image", {**_image_field(image), "backend": backend})
        return np.array(answer["embedding"], np.float32)

    def embed_texts(self, texts: Sequence[str], *, backend: str | None = None) -> Floats:
        """Returns the embeddings `[N, E]` of texts, of length 1. Raises as `segment`."""
        answer = self._post("/v1/embed/text", {"texts": list(texts), "backend": backend})
        return np.array(answer["embeddings"], np.float32)

    def _post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        return self._call("POST", path, json.dumps(given).encode())

    def _call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, body, headers, method=method)
        for left in range(self._tries - 1, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    content = answer.read()
                return dict(json.loads(content)) if content else {}
            except urllib.error.HTTPError as error:
                with error:
                    wait = error.headers.get("Retry-After")
                    if error.code in (429, 503) and wait is not None and left:
                        time.sleep(min(30.0, float(wait) if wait.isdigit() else 1.0))
                        continue
                    raise _refusal(error) from None
            except (urllib.error.URLError, OSError, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                raise ServedError(f"the server at {self._url} does not answer: {reason}") from error
        raise AssertionError("the last try returns or raises")


def _refusal(error: urllib.error.HTTPError) -> Exception:
    try:
        about = json.loads(error.read())["error"]
        code, message = str(about["code"]), str(about["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return ServedError(f"the server answers with status {error.code}", error.code, "http")
    if error.code == 422:
        return InputError(message)
    return ServedError(message, error.code, code)


def _image_field(image: Any) -> dict[str, str]:
    is_id = isinstance(image, str) and re.fullmatch(r"[\w-]{32}", image, re.ASCII) and not Path(image).exists()
    return {"image_id": image} if is_id else {"image": _text(image)}


def _text(image: Any) -> str:
    """Returns an image as base64 text of a file."""
    if isinstance(image, str | Path):
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"{image} cannot be read: {error.strerror or error}") from error
    if not isinstance(image, bytes | bytearray | memoryview):
        file = io.BytesIO()
        load_image(image).save(file, "PNG", compress_level=1)
        image = file.getvalue()
    return base64.b64encode(image).decode("ascii")


def _listed(labels: str | Iterable[str] | None) -> str | list[str] | None:
    return labels if labels is None or isinstance(labels, str) else list(labels)


def _image(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _map(text: str | None) -> Any:
    return None if text is None else np.asarray(_image(text))
