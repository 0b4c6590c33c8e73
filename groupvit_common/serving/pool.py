"""Threads for work of a server that is not the model's: decoding, compressing, parsing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")

# More than cores: some images take a decoder long, and others must not wait for them. `Held` bounds the memory.
_POOL = ThreadPoolExecutor(min(16, max(8, os.cpu_count() or 8)), "groupvit-serve")


async def in_pool(call: Callable[..., T], *arguments: object) -> T:
    """Returns the result of a call in one of the threads; other requests are answered meanwhile."""
    # What a call needs leaves with who waits for it, not when a thread comes to it: bodies must not pile up.
    work = [partial(call, *arguments)]
    try:
        return await asyncio.get_running_loop().run_in_executor(_POOL, lambda: work.pop()())
    finally:
        work.clear()
