"""Threads for work of a server that is not the model's: decoding, compressing, parsing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Few: each may hold a decoded image.
_POOL = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2)), "groupvit-serve")


async def in_pool(call: Callable[..., T], *arguments: object) -> T:
    """Returns the result of a call in one of the threads; other requests are answered meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, call, *arguments)
