"""Settings of a server: where it listens, who may call it, and how much of everything it takes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_number

DEFAULT_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server. Sizes are bytes, times seconds.

    Attributes:
        host, port: where it listens; port 0 is a free one.
        name: of the model, for people.
        api_key: what requests to the API must bring; None: nothing.
        default_labels, default_background_labels: what the page begins with, and requests without labels get.
        max_bytes: of an image file. max_pixels: of an image, by its header.
        max_labels: words of all labels of a request. max_label_length: characters of a word.
        max_prompts: labels times sentences of a request.
        max_queue: requests that are being answered or wait; beyond it 429.
        held_bytes: of request bodies, decoded images of these, and answers until they are sent.
        cache_bytes, cache_seconds: of encoded images. texts_bytes: of embeddings of labels.
        batch_size, batch_seconds: images in the model at once, and how long one waits for others.
        header_seconds, body_seconds: until a request's header and body must have come. idle_seconds: between two pieces
            of either body.
        work_seconds: waiting and work of a request. stop_seconds: what a stopping server gives those that run.
        connections: open at once.
        allowed_hosts: names in the Host header; (): any, but on a loopback address its names alone.
        cors: origins whose pages may call the API.
        root_path: prefix under which a proxy serves this. forwarded_from: addresses of proxies whose X-Forwarded
            headers count; (): none.
        access_log: a line about each request.

    Raises:
        InputError: a value that cannot be used.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    name: str = "demo"
    api_key: str | None = None
    default_labels: str = ""
    default_background_labels: str = ""
    max_bytes: int = 20_000_000
    max_pixels: int = 16_777_216
    max_labels: int = 1000
    max_label_length: int = 200
    max_prompts: int = 2000
    max_queue: int = 64
    held_bytes: int = 512_000_000
    cache_bytes: int = 512_000_000
    cache_seconds: float = 1800
    texts_bytes: int = 64_000_000
    batch_size: int = 8
    batch_seconds: float = 0.004
    header_seconds: float = 10
    body_seconds: float = 60
    idle_seconds: float = 15
    work_seconds: float = 60
    stop_seconds: float = 30
    connections: int = 256
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    root_path: str = ""
    forwarded_from: tuple[str, ...] = ()
    access_log: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in ("int", "float") and not (is_number(value) and 0 <= value < 1 << 62):
                raise InputError(f"{each.name} must be a number of at least 0, got {value!r}")
        for name in ("max_bytes", "max_pixels", "max_labels", "max_label_length", "max_prompts", "max_queue",
                     "batch_size", "connections", "work_seconds", "body_seconds", "header_seconds"):  # fmt: skip
            if not getattr(self, name):
                raise InputError(f"{name} must be above 0")
        if self.port > 65535:
            raise InputError(f"port must be 0 to 65535, got {self.port}")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise InputError("the API key must have at least 8 characters, all of ASCII")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InputError(f"root_path must be a path such as /groupvit, got {self.root_path!r}")

    @property
    def is_loopback(self) -> bool:
        """True if only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str]:
        """Names that the Host header may have; none: any."""
        if self.allowed_hosts or not self.is_loopback:
            return frozenset(map(str.lower, self.allowed_hosts))
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower(), f"[{self.host.lower()}]"})
