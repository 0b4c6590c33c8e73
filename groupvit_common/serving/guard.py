"""The door of every request: who may ask, headers of every answer, a line and numbers about it, and no traceback."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groupvit_common.errors import InputError, printable
from groupvit_common.serving.metrics import Metrics
from groupvit_common.serving.problems import Problem, fault, problem_of
from groupvit_common.serving.settings import ServeSettings

logger = logging.getLogger("groupvit.serving")

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
# A client that reads nothing for so long is let go; answers go out in pieces.
_SEND_SECONDS, _PIECE = 30.0, 1 << 18
# Paths that need no key where there is one: they hold nothing.
_OPEN = ("/", "/healthz", "/docs", "/docs.css", "/openapi.json")


def answer_of(problem: Problem) -> Response:
    """Returns the answer to a request that is refused."""
    content = {"error": {"code": problem.code, "message": problem.message}}
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, problem.status, headers)


class Guard:
    """An ASGI application around another one.

    Args:
        app: the other one.
        settings: of the server. metrics: what is counted.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if settings.api_key is None else settings.api_key.encode()
        metrics.describe("groupvit_requests_total", "counter", "Answers by path and status.")
        metrics.describe("groupvit_request_seconds", "histogram", "Seconds from a request's header to its answer.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
                return
            await self._app(scope, receive, send)
            return
        start, status, prefix = time.perf_counter(), 0, self._settings.root_path
        is_head = scope["method"] == "HEAD"
        if is_head:
            # The server below keeps its own record of the method.
            scope = {**scope, "method": "GET"}
        if prefix and scope["path"].startswith(f"{prefix}/"):
            # Some proxies leave it in front.
            scope["path"] = scope["path"].removeprefix(prefix)
            scope["raw_path"] = scope["path"].encode()

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                await send(message)
                return
            body = b"" if is_head else message.get("body", b"")
            for at in range(0, max(len(body), 1), _PIECE):
                more = message.get("more_body", False) or at + _PIECE < len(body)
                async with asyncio.timeout(_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": body[at : at + _PIECE], "more_body": more})

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await answer_of(refusal)(scope, receive, guarded_send)
            else:
                await self._app(scope, receive, guarded_send)
        except TimeoutError:
            raise ConnectionError("the client reads no answer") from None
        except Exception as error:
            # Its text may hold what the user sent.
            logger.error("a fault of the server: %s", type(error).__name__, exc_info=_where(error))
            if status:
                raise ConnectionError("the answer cannot be completed") from None
            await answer_of(fault())(scope, receive, guarded_send)
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> Problem | None:
        headers, settings = Headers(scope=scope), self._settings
        host = headers.get("host", "")
        # A page elsewhere may give its own name this machine's address.
        if settings.hosts and _name_of(host) not in settings.hosts:
            return Problem(
                400, "host", "this server does not answer to the name in the Host header: see --allowed-host"
            )
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            same = _place_of(origin) == host.lower() or headers.get("sec-fetch-site") == "same-origin"
            if not same and origin not in settings.cors and "*" not in settings.cors:
                return Problem(403, "origin", "pages of other origins may not call this server: see --cors")
        path = scope["path"]
        is_open = path in _OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"
        if self._key is not None and not is_open:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(key.encode("utf-8", "replace"), self._key):
                return Problem(401, "key", "this server needs its API key: Authorization: Bearer KEY")
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        # An id of an image is a secret, and paths that are made up must not fill the metrics.
        path = getattr(route, "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"
        self._metrics.count("groupvit_requests_total", method=method, path=path, status=str(status))
        if path.startswith("/v1/"):
            self._metrics.observe("groupvit_request_seconds", seconds, path=path)
        if self._settings.access_log:
            logger.info("%s %s %d %.1f ms", method, path, status, 1000 * seconds)


def problem_from(error: Exception) -> Problem | None:
    """Returns the refusal that an error means; None for a fault of the server."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return problem_of(error)
    name, text = type(error).__name__, str(error)
    signs = ("can't allocate memory", "not enough memory", "out of memory", "RESOURCE_EXHAUSTED", "bad_alloc")
    if isinstance(error, MemoryError) or "OutOfMemory" in name or any(sign in text for sign in signs):
        return Problem(503, "memory", "the server has no memory for this: send a smaller image", 5)
    return None


def _where(error: Exception) -> Any:
    """Returns an error as logging takes it, with the places of its traceback but not its text."""
    return (type(error), type(error)(), error.__traceback__) if type(error).__init__ is Exception.__init__ else None


def _place_of(origin: str) -> str | None:
    """Returns host and port of an origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """Returns a Host header without its port."""
    host = printable(host).lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
