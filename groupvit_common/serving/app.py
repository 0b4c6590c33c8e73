"""The HTTP interface: the page, the API, its document, metrics."""

from __future__ import annotations

import asyncio
import gzip
import mimetypes
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.serving import schemas
from groupvit_common.serving.body import ClientGoneError, read_fields
from groupvit_common.serving.examples import page_examples
from groupvit_common.serving.guard import Guard, answer_of, problem_from
from groupvit_common.serving.metrics import Metrics
from groupvit_common.serving.problems import Problem, busy, fault, loading, stopping
from groupvit_common.serving.reference import reference_page, reference_style
from groupvit_common.serving.service import Operation, Service
from groupvit_common.serving.settings import ServeSettings
from groupvit_common.serving.store import Held, Memory

_TYPES = {".js": "text/javascript", ".webp": "image/webp", ".svg": "image/svg+xml", ".html": "text/html"}
_REQUESTS: dict[str, tuple[type[BaseModel], type[BaseModel], str]] = {
    "/v1/images": (schemas.ImageRequest, schemas.ImageAnswer, "Encode an image and keep it for a while"),
    "/v1/segment": (schemas.SegmentRequest, schemas.SegmentAnswer, "Label every pixel of an image"),
    "/v1/classify": (schemas.ClassifyRequest, schemas.ClassifyAnswer, "Probability of each label for the whole image"),
    "/v1/embed/image": (schemas.EmbedImageRequest, schemas.EmbeddingAnswer, "Embedding of an image"),
    "/v1/embed/text": (schemas.EmbedTextRequest, schemas.EmbeddingsAnswer, "Embeddings of texts"),
}
_STATUSES = {
    400: "Malformed", 401: "No or a wrong API key", 404: "No such image", 408: "Sent too slowly", 413: "Too large",
    415: "Not an image of a kind that is taken", 422: "A value that cannot be used",
    429: "Too many requests: see Retry-After", 503: "Loading or stopping", 504: "Took too long",
}  # fmt: skip


class State:
    """State of a server: loading until there is a service, stopping when it is told to end.

    `active`: requests that are being answered.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.service: Service | None = None
        self.is_stopping = False
        self.active = 0
        metrics.gauge("groupvit_requests_active", "Requests that are being answered.", lambda: self.active)

    def load(self, segmenters: Mapping[str, BaseSegmenter]) -> None:
        """Begins to answer with these segmenters."""
        self.service = Service(segmenters, self.settings, self.metrics)

    def ready(self) -> Service:
        """Returns the service. Raises `Problem` before and after."""
        if self.is_stopping:
            raise stopping()
        if self.service is None:
            raise loading()
        return self.service


def create_app(segmenters: Mapping[str, BaseSegmenter] | None = None, settings: ServeSettings | None = None) -> ASGIApp:
    """Returns the ASGI application, for a server of your own; `groupvit serve` and `Server` run one.

    Args:
        segmenters: by backend, "torch" or "tf"; the first one is the default. None: they are loaded later.
        settings: of the server; None: the default ones. Limits of connections are `Server`'s alone.
    """
    return guarded_app(segmenters, settings or ServeSettings())[0]


def guarded_app(segmenters: Mapping[str, BaseSegmenter] | None, settings: ServeSettings) -> tuple[ASGIApp, State]:
    """Returns the application and its state."""
    metrics = Metrics()
    state = State(settings, metrics)
    if segmenters is not None:
        state.load(segmenters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.is_stopping = True
        if state.service is not None:
            await asyncio.to_thread(state.service.close)

    app = FastAPI(
        title="groupvit", version=_version(), docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
        description="Segments images by text labels.",
    )  # fmt: skip
    app.add_exception_handler(HTTPException, _plain_problem)
    app.add_exception_handler(Exception, _fault)
    _add_api(app, state)
    _add_pages(app, state)
    guarded: ASGIApp = Guard(app, settings, metrics)
    if settings.cors:
        # Outside: a page that may ask may read why it is refused.
        guarded = CORSMiddleware(
            guarded, allow_origins=list(settings.cors), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"], expose_headers=["Retry-After"],
        )  # fmt: skip
    return guarded, state


def _add_api(app: FastAPI, state: State) -> None:
    for path, (_, answer, summary) in _REQUESTS.items():
        refusals: dict[int | str, dict[str, Any]] = {
            status: {"model": schemas.ErrorAnswer, "description": text} for status, text in _STATUSES.items()
        }
        app.add_api_route(
            path, _endpoint(state, path), methods=["POST"], summary=summary,
            responses={**refusals, 200: {"model": answer}}, response_class=Response, name=path,
        )  # fmt: skip

    @app.delete("/v1/images/{image_id}", status_code=204, response_class=Response, summary="Forget an image")
    async def forget(image_id: str) -> Response:
        try:
            state.ready().store.remove(image_id)
        except Problem as problem:
            return answer_of(problem)
        return Response(status_code=204)

    @app.get("/v1/info", summary="The model, its defaults and this server's limits")
    async def info() -> Response:
        try:
            service = state.ready()
        except Problem as problem:
            return answer_of(problem)
        needs_key = state.settings.api_key is not None
        about = {"name": "groupvit", "version": _version(), "needs_key": needs_key, "examples": page_examples()}
        return JSONResponse(about | service.info())

    @app.get("/healthz", summary="Is the server ready?")
    async def health() -> Response:
        status = "stopping" if state.is_stopping else "loading" if state.service is None else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


def _endpoint(state: State, path: str) -> Any:
    async def endpoint(request: Request) -> Response:
        try:
            return await _answered(state, request, path)
        except ClientGoneError:
            # Nobody reads it, but it is counted.
            return Response(status_code=499)
        except Exception as error:
            problem = problem_from(error)
            if problem is None:
                raise
            return answer_of(problem)

    return endpoint


class Answer(Response):
    """JSON whose memory counts until it is sent: many large ones that are read slowly must not fill it.

    Raises:
        Problem: there is no room for it.
    """

    media_type = "application/json"

    def __init__(self, content: bytes, memory: Memory) -> None:
        self._held = Held(memory)
        self._held.take(len(content))
        super().__init__(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        with self._held:
            await super().__call__(scope, receive, send)


async def _answered(state: State, request: Request, path: str) -> Answer:
    """Returns the answer to a request within the limits of the queue and of time; drops it if its client goes."""
    service, settings = state.ready(), state.settings
    if state.active >= settings.max_queue:
        raise busy(_patience(state), "the server has as many requests as it can queue")
    operations: dict[str, Operation] = {
        "/v1/images": service.add_image,
        "/v1/segment": service.segment,
        "/v1/classify": service.classify,
        "/v1/embed/image": service.embed_image,
        "/v1/embed/text": service.embed_text,
    }
    with Held(service.memory) as held:
        fields = await read_fields(request, settings, held)
        # Others may have come while the body did.
        if state.active >= settings.max_queue:
            raise busy(_patience(state), "the server has as many requests as it can queue")
        state.ready()
        state.active += 1
        try:
            answer = await _watched(request, operations[path](fields, held), settings.work_seconds)
        finally:
            state.active -= 1
    return Answer(answer, service.memory)


async def _watched(request: Request, operation: Any, seconds: float) -> bytes:
    work = asyncio.ensure_future(operation)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return bytes(work.result())
        if gone.done():
            raise ClientGoneError
        raise Problem(
            504, "timeout", f"the request took longer than {seconds:g} s: send a smaller image or fewer labels"
        )
    finally:
        for task in (work, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _patience(state: State) -> int:
    """Returns the seconds after which there may be room: more, the more wait."""
    return max(1, min(30, state.active // 16))


async def _fault(request: Request, error: Exception) -> Response:
    return answer_of(fault())


async def _plain_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {
        404: ("not_found", "there is nothing at this address"),
        405: ("method", "this address takes other methods"),
    }
    code, message = codes.get(error.status_code, ("http", "the request cannot be answered"))
    response = answer_of(Problem(error.status_code, code, message))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


# -- pages -------------------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI, state: State) -> None:
    # Read once: no name of a request reaches the disk.
    page = {each.name: each.read_bytes() for each in files("groupvit_common.serving").joinpath("page").iterdir()
            if each.is_file()}  # fmt: skip
    packed = {name: gzip.compress(content, mtime=0) for name, content in page.items() if not name.endswith(".webp")}
    document: dict[str, Any] = {}

    def described() -> dict[str, Any]:
        if not document:
            document.update(_document(app))
            if state.settings.root_path:
                document["servers"] = [{"url": state.settings.root_path}]
        return document

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file("index.html", page, packed, request)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        return _file(name, page, packed, request)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(described())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(reference_page(described()), media_type="text/html")

    @app.get("/docs.css", include_in_schema=False)
    async def docs_style() -> Response:
        return Response(reference_style(), media_type="text/css")


def _file(name: str, page: Mapping[str, bytes], packed: Mapping[str, bytes], request: Request) -> Response:
    if name not in page:
        return answer_of(Problem(404, "not_found", "there is nothing at this address"))
    ending = f".{name.rpartition('.')[2]}"
    kind = _TYPES.get(ending) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    accepted = [each.strip().lower() for each in request.headers.get("accept-encoding", "").split(",")]
    if name in packed and "gzip" in accepted:
        return Response(packed[name], media_type=kind, headers=headers | {"Content-Encoding": "gzip"})
    return Response(page[name], media_type=kind, headers=headers)


def _document(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document, with the bodies of requests, which are read by hand."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = document.setdefault("components", {}).setdefault("schemas", {})
    for path, (model, _, _) in _REQUESTS.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        parts.update(schema.pop("$defs", {}))
        parts[model.__name__] = schema
        reference = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True, "content": {"application/json": reference, "multipart/form-data": reference},
        }  # fmt: skip
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _version() -> str:
    try:
        return version("groupvit")
    except PackageNotFoundError:
        return "0"
