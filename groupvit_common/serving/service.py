"""The operations of the API, from checked fields to answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from groupvit_common.preprocessing.prompts import TEMPLATE_SETS
from groupvit_common.segmentation.encoded import EncodedImage
from groupvit_common.segmentation.label_maps import group_windows
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.segmentation.result import Details, Segmentation
from groupvit_common.serving import results
from groupvit_common.serving.body import decoded_image
from groupvit_common.serving.costs import check_cost
from groupvit_common.serving.engine import Engine, view_key
from groupvit_common.serving.metrics import Metrics, resident_bytes
from groupvit_common.serving.pool import in_pool
from groupvit_common.serving.problems import Problem
from groupvit_common.serving.schemas import (
    ClassifyRequest,
    EmbedImageRequest,
    EmbedTextRequest,
    ImageRequest,
    SegmentRequest,
    checked,
    options_of,
)
from groupvit_common.serving.settings import ServeSettings
from groupvit_common.serving.store import Held, ImageStore, Memory
from groupvit_common.serving.words import check_prompts, check_texts, read_labels, read_templates

T = TypeVar("T")

# Labels whose similarity maps are in one answer.
_MOST_MAPS = 100


class Times:
    """Milliseconds of the parts of a request; what is no part of it was waiting."""

    def __init__(self) -> None:
        self._start, self._parts = time.perf_counter(), dict[str, float]()

    @contextmanager
    def part(self, name: str) -> Any:
        """Counts what is within as a part."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a part."""
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def milliseconds(self, *names: str) -> dict[str, float]:
        """Returns `wait` and these parts."""
        waited = time.perf_counter() - self._start - sum(self._parts.values())
        parts = {"wait": max(0.0, waited)} | {name: self._parts.get(name, 0.0) for name in names}
        return {name: round(1000 * seconds, 2) for name, seconds in parts.items()}


class Service:
    """Segmenters of one model, one for each backend, as an API.

    Args:
        segmenters: by backend, the first one is the default; they are not changed.
        settings: of the server. metrics: what is counted.
    """

    def __init__(self, segmenters: Mapping[str, BaseSegmenter], settings: ServeSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.store = ImageStore(settings.cache_bytes, settings.cache_seconds)
        self.memory = Memory(settings.held_bytes)
        self.engines = {
            name: Engine(
                name, segmenter, batch_size=settings.batch_size, batch_seconds=settings.batch_seconds, metrics=metrics
            )
            for name, segmenter in segmenters.items()
        }
        for engine in self.engines.values():
            engine.segmenter.known_labels.most_bytes = settings.texts_bytes
            # A warning would name what users wrote.
            engine.segmenter.known_labels.warns = False
        self._describe(metrics)

    def close(self) -> None:
        """Ends the models' threads and forgets all images."""
        for engine in self.engines.values():
            engine.stop()
        self.store.clear()

    def info(self) -> dict[str, Any]:
        """Returns what `/v1/info` says of the model."""
        segmenter, settings = next(iter(self.engines.values())).segmenter, self.settings
        options = segmenter.options.to_dict()
        names = {sentences: name for name, sentences in TEMPLATE_SETS.items()}
        options["templates"] = names.get(segmenter.options.templates, options["templates"])  # type: ignore[call-overload]
        vision = segmenter.model.config.vision_config
        groups = [count for count in vision.num_group_tokens if count]
        return {
            "model": settings.name,
            "backends": list(self.engines),
            "image_size": vision.image_size,
            "stages": len(groups),
            "default_labels": settings.default_labels,
            "default_background_labels": settings.default_background_labels,
            "options": options,
            "palette": results.group_palette(max([*groups, 1])),
            "limits": {
                "bytes": settings.max_bytes,
                "pixels": settings.max_pixels,
                "labels": settings.max_labels,
                "label_length": settings.max_label_length,
                "requests_in_queue": settings.max_queue,
            },
        }

    async def add_image(self, fields: dict[str, Any], held: Held) -> bytes:
        """`POST /v1/images`: encodes an image and keeps it."""
        request, times = checked(ImageRequest, fields), Times()
        engine = self._engine(request.backend)
        image = await self._decoded(request.image, held, times)
        check_cost(engine.segmenter, (image.height, image.width), 1)
        encoded = await self._encoded(engine, engine.segmenter, image, times)
        return _json(
            {
                "image_id": self.store.add(_key(engine, engine.segmenter), encoded),
                "width": image.width,
                "height": image.height,
                "groups": list(encoded.group_counts),
                "milliseconds": times.milliseconds("decode", "encode"),
            }
        )

    async def segment(self, fields: dict[str, Any], held: Held) -> bytes:
        """`POST /v1/segment`."""
        request, times = checked(SegmentRequest, fields), Times()
        engine = self._engine(request.backend)
        segmenter, count = await self._segmenter(engine, request, request.background_labels, times)
        if "similarity" in request.include and count > _MOST_MAPS:
            raise Problem(422, "too_many_labels", f"similarity has maps of at most {_MOST_MAPS} labels, got {count:,}")
        encoded, image = await self._image(engine, segmenter, request, held, times)
        check_cost(segmenter, (image.height, image.width), count, with_maps="similarity" in request.include)
        if encoded is None:
            encoded = await self._encoded(engine, segmenter, image, times)
            if request.image_id is not None:
                self.store.extend(request.image_id, _key(engine, segmenter), encoded)
        result, details = await self._run(
            engine, "label", times, partial(_labelled, segmenter, encoded, "similarity" in request.include)
        )
        with times.part("write"):
            answer = await in_pool(_answer, request, result, encoded, segmenter, details)
        answer["milliseconds"] = times.milliseconds("decode", "encode", "texts", "label", "write")
        return await in_pool(_json, answer)

    async def classify(self, fields: dict[str, Any], held: Held) -> bytes:
        """`POST /v1/classify`."""
        request, times = checked(ClassifyRequest, fields), Times()
        engine = self._engine(request.backend)
        segmenter, _ = await self._segmenter(engine, request, None, times)
        image = await self._any_image(engine, request, held, times)
        found = await self._run(engine, "encode", times, lambda: segmenter.classify(image), long=True)
        ranked = sorted(found.items(), key=lambda item: -item[1])
        return _json({"labels": [{"name": name, "probability": probability} for name, probability in ranked]})

    async def embed_image(self, fields: dict[str, Any], held: Held) -> bytes:
        """`POST /v1/embed/image`."""
        request, times = checked(EmbedImageRequest, fields), Times()
        engine = self._engine(request.backend)
        image = await self._any_image(engine, request, held, times)
        embeds = await self._run(engine, "encode", times, lambda: engine.segmenter.embed_images([image]), long=True)
        return _json({"embedding": _rounded(embeds[0])})

    async def embed_text(self, fields: dict[str, Any], held: Held) -> bytes:
        """`POST /v1/embed/text`."""
        request = checked(EmbedTextRequest, fields)
        engine = self._engine(request.backend)
        check_texts(request.texts, self.settings)
        embeds = await self._run(
            engine, "texts", Times(), lambda: engine.segmenter.embed_texts(request.texts), long=True
        )
        return _json({"embeddings": [_rounded(each) for each in embeds]})

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _engine(self, backend: str | None) -> Engine:
        if backend is None:
            return next(iter(self.engines.values()))
        if backend not in self.engines:
            raise Problem(422, "no_backend", f"the backend {backend} is not loaded: there is {', '.join(self.engines)}")
        return self.engines[backend]

    async def _segmenter(
        self, engine: Engine, request: ClassifyRequest, background: str | list[str] | None, times: Times
    ) -> tuple[BaseSegmenter, int]:
        """Returns a segmenter with the labels and options of a request, and the number of its labels."""
        labels, behind = await in_pool(read_labels, request.labels, background, self.settings)
        options = options_of(request)
        if "templates" in options:
            options["templates"] = read_templates(options["templates"])
        sentences = options.get("templates", engine.segmenter.options.templates)
        check_prompts([*labels, *behind], sentences, self.settings)
        made = partial(engine.segmenter.with_labels, labels, behind, **options)
        segmenter = await self._run(engine, "texts", times, made)
        return segmenter, len(segmenter.labels)

    async def _image(
        self, engine: Engine, segmenter: BaseSegmenter, request: SegmentRequest, held: Held, times: Times
    ) -> tuple[EncodedImage | None, Image.Image]:
        """Returns the image of a request, encoded as this segmenter sees it if it was."""
        if (request.image is None) == (request.image_id is None):
            raise Problem(422, "unusable", "give either image or image_id")
        if request.image_id is not None:
            encoded, other = self.store.find(request.image_id, _key(engine, segmenter))
            return encoded, other.image
        return None, await self._decoded(request.image, held, times)

    async def _any_image(
        self, engine: Engine, request: ClassifyRequest | EmbedImageRequest, held: Held, times: Times
    ) -> Image.Image:
        """Returns the image of a request that needs it whole."""
        return (await self._image(engine, engine.segmenter, request, held, times))[1]  # type: ignore[arg-type]

    async def _decoded(self, content: bytes | None, held: Held, times: Times) -> Image.Image:
        assert content is not None
        with times.part("decode"):
            return await in_pool(decoded_image, content, self.settings, held)

    async def _encoded(
        self, engine: Engine, segmenter: BaseSegmenter, image: Image.Image, times: Times
    ) -> EncodedImage:
        encoded, seconds = await asyncio.wrap_future(engine.encode(segmenter, image))
        times.add("encode", seconds)
        return encoded

    async def _run(self, engine: Engine, name: str, times: Times, call: Callable[[], T], *, long: bool = False) -> T:
        """Returns the result of a call in the model's thread, whose time is a part of the request's."""

        def timed() -> tuple[T, float]:
            start = time.perf_counter()
            result = call()
            return result, time.perf_counter() - start

        result, seconds = await asyncio.wrap_future(engine.run(timed, long=long))
        times.add(name, seconds)
        return result

    def _describe(self, metrics: Metrics) -> None:
        metrics.describe("groupvit_model_seconds_total", "counter", "Seconds of the model's thread.")
        metrics.describe("groupvit_batch_images", "histogram", "Images that went through the encoder together.")
        engines, store, memory = list(self.engines.values()), self.store, self.memory
        known = [engine.segmenter.known_labels for engine in engines]
        for name, text, read in (
            ("groupvit_queue_length", "Requests that wait for a model.", lambda: sum(map(len, engines))),
            ("groupvit_images_kept", "Encoded images that are kept.", lambda: len(store)),
            ("groupvit_images_kept_bytes", "Memory of encoded images.", lambda: store.nbytes),
            ("groupvit_images_found_total", "Requests for a kept image that found it encoded.", lambda: store.hits),
            ("groupvit_images_gone_total", "Requests for an image that was not kept.", lambda: store.misses),
            ("groupvit_labels_known", "Labels whose embeddings are kept.", lambda: sum(map(len, known))),
            ("groupvit_labels_known_bytes", "Memory of these.", lambda: sum(each.nbytes for each in known)),
            ("groupvit_labels_found_total", "Labels of requests that were known.", lambda: sum(k.hits for k in known)),
            ("groupvit_labels_new_total", "Labels of requests that were not.", lambda: sum(k.misses for k in known)),
            ("groupvit_requests_held_bytes", "Memory of requests, their images and answers.", lambda: memory.nbytes),
            ("process_resident_memory_bytes", "Memory of the process.", resident_bytes),
        ):
            metrics.gauge(name, text, read)


Operation = Callable[[dict[str, Any], Held], Awaitable[bytes]]


def _key(engine: Engine, segmenter: BaseSegmenter) -> tuple[object, ...]:
    return engine.name, view_key(segmenter)


def _labelled(
    segmenter: BaseSegmenter, encoded: EncodedImage, with_details: bool
) -> tuple[Segmentation, Details | None]:
    return segmenter(encoded), segmenter.details(encoded) if with_details else None


def _answer(
    request: SegmentRequest,
    result: Segmentation,
    encoded: EncodedImage,
    segmenter: BaseSegmenter,
    details: Details | None,
) -> dict[str, Any]:
    height, width = result.label_map.shape
    answer: dict[str, Any] = {
        "image_id": request.image_id,
        "width": width,
        "height": height,
        "has_background": result.has_background,
        "labels": results.label_answers(result, request.masks),
        "groups": results.group_answers(result),
    }
    include = set(request.include)
    if "label_map" in include:
        answer["label_map"] = results.label_png(result)
    if "score_map" in include:
        answer["score_map"] = results.unit_png(results.score_map(result, encoded, segmenter.options))
    if "group_map" in include:
        answer["group_map"] = results.grey_png(result.group_map)
    if "stages" in include:
        view, size = encoded.views[0], (height, width)
        earlier = (
            [group_windows(maps, view.windows, size) for maps in view.block_maps[:-1]]
            if details is None
            else list(details.group_maps[:-1])
        )
        answer["stages"] = results.stage_maps([*earlier, result.group_map])
    if details is not None:
        answer["similarity"] = results.similarity_answers(details.labels, details.similarity)
    if "overlay" in include:
        answer["overlay"] = results.png(result.overlay(request.opacity))
    return answer


def _json(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _rounded(embedding: np.ndarray[Any, Any]) -> list[float]:
    return np.round(embedding.astype(np.float64), 7).tolist()
