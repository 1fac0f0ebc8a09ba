"""Work that goes on when the call that began it is cancelled."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class OwnedWork:
    """Owns tasks that must run to their end, such as a commit whose caller has gone away."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """How many tasks run."""
        return len(self._running)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`; a cancellation reaches the caller only."""
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts `work`, for which nobody has to wait."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    async def wait(self) -> None:
        """Waits until nothing runs any more."""
        while self._running:
            await asyncio.wait(self._running)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Marks a failure as seen: the caller may be gone.
        if not task.cancelled() and task.exception() is not None:
            log.debug("work failed", extra={"reason": repr(task.exception())})
