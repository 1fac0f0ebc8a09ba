"""What a store does again and again beside its calls."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adaptermesh.core.errors import MeshError

log = logging.getLogger(__name__)


class PeriodicWork:
    """Owns one task that does a piece of work at once and then after every pause, until it is stopped."""

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[object]],
        pause_seconds: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._name = name
        self._work = work
        self._pause_seconds = pause_seconds
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, unless it has begun."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """Ends it, in the middle if need be."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await self._work()
            except MeshError as error:
                # What passes: the next time will do.
                log.warning("not done, comes again", extra={"work": self._name, "reason": error.message})
            except Exception:
                # The top of the task: one failure must not end it for good.
                log.exception("failed unexpectedly", extra={"work": self._name})
            await self._sleep(self._pause_seconds)
