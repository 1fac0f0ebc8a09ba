"""How many requests are served at once, and the end of taking any."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from adaptermesh.core.errors import Code, MeshError, Reason, unavailable

RETRY_AFTER_SECONDS = 1.0


class Gate:
    """Counts the requests in flight; refuses those above the limit, and all of them once it is closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Requests in flight."""
        return self._inside

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds one place.

        Raises:
            MeshError: RESOURCE_EXHAUSTED (OVERLOADED), or UNAVAILABLE (DRAINING) once it is closed.
        """
        if self._closed:
            raise unavailable(Reason.DRAINING, "the gateway is shutting down", RETRY_AFTER_SECONDS)
        if self._inside >= self._limit:
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.OVERLOADED,
                f"the gateway already serves {self._limit} requests",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def close(self) -> None:
        """Lets nothing new in."""
        self._closed = True

    async def wait_empty(self) -> None:
        """Returns when nothing is in flight."""
        await self._empty.wait()
