"""The server: a socket, uvicorn with bounds on connections, and an end that finishes what runs."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from groupvit_common.errors import InputError
from groupvit_common.segmentation.predictor import BaseSegmenter
from groupvit_common.serving.app import State, guarded_app
from groupvit_common.serving.settings import ServeSettings

# What a client may go on sending after it was refused, and a closed connection may take to be gone.
_LINGER_SECONDS = 2.0


class Server:
    """A server of one model. As a context manager it runs in a thread; `run` runs it in the caller's.

        with Server({"torch": segmenter}, ServeSettings(port=0)) as server:
            print(server.url)

    Args:
        segmenters: by backend, "torch" or "tf"; or a function that loads them, while clients are told to wait.
        settings: None: the default ones.

    Raises:
        InputError: the address cannot be listened on.
    """

    def __init__(
        self,
        segmenters: Mapping[str, BaseSegmenter] | Callable[[], Mapping[str, BaseSegmenter]],
        settings: ServeSettings | None = None,
    ) -> None:
        self.settings = settings or ServeSettings()
        self._segmenters = segmenters
        self._socket = _listening(self.settings.host, self.settings.port)
        self._port = self._socket.getsockname()[1]
        try:
            app, self._state = guarded_app(None if callable(segmenters) else segmenters, self.settings)
        except BaseException:
            self._socket.close()
            raise
        self._uvicorn = _Uvicorn(app, self._state)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """The address of the page."""
        host = self.settings.host
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{shown}:{self._port}/"

    def run(self, ready: Callable[[], object] | None = None) -> None:
        """Serves until the process is told to end (SIGINT, SIGTERM), or `stop` is called; finishes what runs.

        Args:
            ready: is called when requests are answered.

        Raises:
            CheckpointError, InputError: of the function that loads the segmenters.
        """
        self._uvicorn.announce = ready
        if callable(self._segmenters):
            threading.Thread(target=self._load, name="groupvit-load", daemon=True).start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the server when what runs is done; from another thread."""
        self._uvicorn.begin_stop()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        started = threading.Event()

        def run() -> None:
            try:
                self.run(started.set)
            except BaseException as error:
                self._failure = error
            started.set()

        self._thread = threading.Thread(target=run, name="groupvit-server", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def _load(self) -> None:
        assert callable(self._segmenters)
        try:
            self._state.load(self._segmenters())
        except BaseException as error:
            self._failure = error
            self._uvicorn.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror:
        raise InputError(f"there is no address of the name {host!r} on this machine: give --host an address") from None
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program listens there: choose another --port, or 0 for a free one",
            errno.EACCES: "that needs more rights: choose a --port above 1023",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }.get(error.errno or 0, error.strerror or "unknown")
        raise InputError(f"cannot listen on {host}, port {port}: {why}") from None


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which is told to end once and then answers 503 until what runs is done."""

    def __init__(self, app: Any, state: State) -> None:
        self._state = state
        settings = state.settings

        class Protocol(_BoundedProtocol):
            most, header_seconds = settings.connections, settings.header_seconds

        # Their lines about what clients send are for developers.
        for name in ("uvicorn", "python_multipart"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", lifespan="on", log_config=None, log_level=logging.CRITICAL,
                access_log=False, server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=3,
                backlog=128, proxy_headers=bool(settings.forwarded_from),
                forwarded_allow_ips=list(settings.forwarded_from) or "127.0.0.1",
            )
        )  # fmt: skip
        self.announce: Callable[[], object] | None = None
        self._end = 0.0

    def begin_stop(self) -> None:
        """Refuses new requests from now on, and ends when those that run are done."""
        if not self._state.is_stopping:
            self._end = time.monotonic() + self._state.settings.stop_seconds
            self._state.is_stopping = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        # The second time, at once.
        if self._state.is_stopping:
            self.should_exit = self.force_exit = True
        self.begin_stop()

    async def on_tick(self, counter: int) -> bool:
        if self._state.service is not None and self.announce is not None:
            self.announce()
            self.announce = None
        if self._state.is_stopping and (not self._state.active or time.monotonic() > self._end):
            return True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals to end for itself; a graceful end is no failure, so they are not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _BoundedProtocol(H11Protocol):
    """A connection that is closed when its client sends no whole header, or reads no answer, for a while.

    `most`: connections at once. `header_seconds`: for a header; twice as much may pass.
    """

    most, header_seconds = 256, 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._before: tuple[object, ...] | None = None
        self._watch = self.loop.call_later(self.header_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if hasattr(self, "_watch"):
            self._watch.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            # The rest of a body that was refused: time for the client to read why.
            self.loop.call_later(_LINGER_SECONDS, self._abort_if_sending, self.cycle)

    def _abort_if_sending(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _look(self) -> None:
        """Compares the connection with itself a while ago."""
        unsent = self.transport.get_write_buffer_size()
        is_waiting = self.cycle is None or self.cycle.response_complete
        now = (self.cycle, unsent) if unsent or is_waiting or self.transport.is_closing() else None
        if now is not None and now == self._before:
            self.transport.abort()
            return
        self._before = now
        self._watch = self.loop.call_later(self.header_seconds, self._look)
