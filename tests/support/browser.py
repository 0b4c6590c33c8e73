"""Headless Chromium for tests of pages: `conftest.py` makes fixtures of it.

Chromium is the one that `GROUPVIT_CHROMIUM` names, or the first of `NAMES` on PATH; `make browser` installs Debian's.
Pages reach the server that they are opened from and nothing else.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The sandbox wants what root and containers do not have. No name is looked up, whatever asks: not the page's workers,
# not Chromium itself.
ARGUMENTS = ("--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1")


def find_chromium() -> str | None:
    """Returns the path of an installed Chromium, or None."""
    if named := os.environ.get("GROUPVIT_CHROMIUM"):
        return shutil.which(named) or pytest.fail(f"GROUPVIT_CHROMIUM names {named!r}, which is no program here")
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """Runs headless Chromium. Skips the test without one. Playwright's event loop runs in the thread meanwhile, so that
    the thread cannot run another (`asyncio.run`)."""
    api = pytest.importorskip("playwright.sync_api", reason="drives Chromium with Playwright, which is not installed")
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium: GROUPVIT_CHROMIUM is not set and PATH has none of {', '.join(NAMES)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Pages:
    """Opens pages, each in a context of its own, and remembers what went wrong in them.

    Attributes:
        faults: errors of scripts, messages of the console that are errors or warnings, and requests to other servers.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.faults: list[str] = []
        self._allowed: list[str] = []
        self._contexts: list[Any] = []

    def open(self, url: str, **options: Any) -> Page:
        """Returns a page at `url` that reaches this server alone; options as of Playwright's `browser.new_context`,
        such as `viewport`, `color_scheme` and `has_touch`. Where a content security policy forbids `eval`, wait for
        selectors, since `page.wait_for_function` needs it."""
        context = self.browser.new_context(service_workers="block", **options)
        self._contexts.append(context)
        own = urlsplit(url).netloc

        def answer(route: Route) -> None:
            if urlsplit(route.request.url).netloc == own:
                route.continue_()
            else:
                self.faults.append(f"asked another server: {route.request.url}")
                route.abort()

        context.route(re.compile("^(?!data:|blob:)"), answer)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("pageerror", lambda error: self.faults.append(f"error of a script: {error}"))
        page.on("console", self._heard)
        page.goto(url)
        return page

    def allow(self, pattern: str) -> None:
        """Takes faults that match a regular expression as expected in this test."""
        self._allowed.append(pattern)

    def close(self) -> None:
        """Closes the pages. Raises `AssertionError` for faults that are not allowed."""
        for context in self._contexts:
            context.close()
        unexpected = [fault for fault in self.faults if not any(re.search(each, fault) for each in self._allowed)]
        assert not unexpected, "\n".join(unexpected)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console, {message.type}: {message.text} ({message.location.get('url')})")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves the files of a folder on a free port of this machine, as `python -m http.server` does. Yields the
    address, without a slash at the end."""
    handler = functools.partial(_SilentHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Says nothing."""
