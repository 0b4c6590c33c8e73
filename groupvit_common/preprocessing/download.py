"""Images behind http(s) addresses, fetched within bounds: bytes, seconds, redirects, and where redirects may lead."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import string
import threading
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

from groupvit_common.errors import InputError, printable

BYTES = 100 << 20
"""Bound of what is fetched: larger than any photo."""
SECONDS = 60.0
"""Bound of the whole download, from the first connection to the last byte."""
REDIRECTS = 10

_REDIRECTION = (301, 302, 303, 307, 308)
# How near a host is: a redirect may not lead to one that is nearer than the hosts before it.
_PUBLIC, _PRIVATE, _THIS_MACHINE = 0, 1, 2
_PLACES = {_PRIVATE: "a private network", _THIS_MACHINE: "this machine or what is linked to it"}


def is_address(source: object) -> bool:
    """Returns whether a source is an http(s) address."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def download(address: str, seconds: float | None = None) -> bytes:
    """Returns the bytes behind an http(s) address, fetched within `seconds` (None: `SECONDS`).

    Redirects are followed to http(s) addresses only, and never from a public host to a private one or to this machine;
    such an address may be given directly. Proxies are those of the environment, as everywhere in Python.

    Raises:
        InputError: no such address, no answer, an answer that breaks off, or one beyond the bounds of this module.
    """
    bound = SECONDS if seconds is None else seconds
    fetch = _Fetch(bound)
    try:
        return fetch.read(address)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        message = f"it took longer than {bound:g} seconds" if fetch.expired else str(reason) or type(reason).__name__
        raise InputError(f"{printable(address)} cannot be downloaded: {printable(message)}") from error
    finally:
        fetch.close()


class _Fetch:
    """One download: its deadline, and the nearest kind of host to which it may still be led."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._allowed = _THIS_MACHINE
        self._end = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        # A socket's own timeout starts anew with every byte: this ends the connection whatever it is waiting for.
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            for connection in self._sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def read(self, address: str) -> bytes:
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(), _Http(self), _Https(self)):
            opener.add_handler(handler)
        for _ in range(REDIRECTS + 1):
            # As browsers do, with letters of any script and with spaces. Some servers refuse Python's own name.
            parts = urllib.parse.urlsplit(address)
            address = parts._replace(netloc=parts.netloc.encode("idna").decode()).geturl()
            address = urllib.parse.quote(address, safe=string.punctuation)
            request = urllib.request.Request(address, headers={"User-Agent": "groupvit"})
            with opener.open(request, timeout=max(self._end - time.monotonic(), 0.001)) as response:
                if response.status not in _REDIRECTION:
                    return self._content(response)
                address = urllib.parse.urljoin(address, response.headers.get("Location") or "")
            if not is_address(address):
                raise OSError(f"it leads to {address[:100]!r}, expected an http or https address")
        raise OSError(f"it leads on more than {REDIRECTS} times")

    def _content(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"the server answers {response.status} {response.reason}")
        content = b"" if (response.length or 0) > BYTES else response.read(BYTES + 1)
        if self.expired:
            raise TimeoutError
        if len(content) > BYTES or (response.length or 0) > BYTES:
            raise OSError(f"it is larger than {BYTES / 2**20:.3g} MiB: download it yourself and give its path")
        if response.length:
            raise OSError(f"the answer breaks off: {response.length} of its bytes are missing")
        return content

    def allow(self, kind: int, host: str) -> None:
        """Notes the kind of host that comes next. OSError if it is nearer than one before it."""
        if kind > self._allowed:
            raise OSError(f"it leads from elsewhere to {host} in {_PLACES[kind]}")
        self._allowed = kind

    def connect(self, host: str, port: int, proxied: bool) -> socket.socket:
        """Returns a connection, made to the very addresses that were checked."""
        places = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not proxied:
            self.allow(max(map(_kind, places)), host)
        for number, place in enumerate(places, 1):
            try:
                connection = socket.create_connection((place, port), max(self._end - time.monotonic(), 0.001))
            except OSError:
                if number == len(places):
                    raise
                continue
            with self._lock:
                # A copy: TLS takes the socket itself over.
                self._sockets.append(connection.dup())
            if not self.expired:
                return connection
            connection.close()
            break
        raise TimeoutError


def _kind(number: str) -> int:
    """Returns the kind of an IP address: public, of a private network, or of this machine and what is linked to it."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    if address.is_loopback or address.is_unspecified or address.is_link_local:
        return _THIS_MACHINE
    return _PUBLIC if address.is_global else _PRIVATE


def _kind_of_name(host: str) -> int:
    """Returns the kind of a host that a proxy resolves, by its name alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return _THIS_MACHINE
    with suppress(ValueError):
        return _kind(host)
    with suppress(OSError, UnicodeError):  # numbers in the forms that C knows, such as 127.1
        return _kind(socket.inet_ntoa(socket.inet_aton(host)))
    return _PUBLIC


class _Connection(http.client.HTTPConnection):
    """A connection that a `_Fetch` makes."""

    fetch: _Fetch
    proxied: bool

    def connect(self) -> None:
        self._create_connection = lambda address, *_: self.fetch.connect(address[0], address[1], self.proxied)
        super().connect()


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """The same with TLS."""


def _maker(kind: type[_Connection], fetch: _Fetch, request: urllib.request.Request) -> Any:
    """Returns what makes the connection for a request, to its host or to a proxy."""
    target = urllib.parse.urlsplit(request.full_url)

    def make(host: str, **options: Any) -> _Connection:
        connection = kind(host, **options)
        connection.fetch, connection.proxied = fetch, host != target.netloc
        if connection.proxied:
            fetch.allow(_kind_of_name(target.hostname or ""), target.netloc)
        return connection

    return make


class _Http(urllib.request.HTTPHandler):
    def __init__(self, fetch: _Fetch) -> None:
        super().__init__()
        self._fetch = fetch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_maker(_Connection, self._fetch, req), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, fetch: _Fetch) -> None:
        super().__init__()
        self._fetch = fetch

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_maker(_SecureConnection, self._fetch, req), req)
