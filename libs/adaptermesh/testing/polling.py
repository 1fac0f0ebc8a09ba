"""Waiting for something that another process does, with a bound."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_INTERVAL_SECONDS = 0.05


async def eventually(look: Callable[[], Awaitable[T | None]], within: float = 30.0) -> T:
    """What `look` returns as soon as that is true.

    Args:
        look: is called again and again.
        within: seconds after which TimeoutError is raised.
    """
    async with asyncio.timeout(within):
        # What is waited for is in another process, so there is no event to wait on.
        while not (found := await look()):  # noqa: ASYNC110
            await asyncio.sleep(_INTERVAL_SECONDS)
    return found
