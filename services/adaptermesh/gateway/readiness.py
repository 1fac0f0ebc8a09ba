"""The health check: SERVING while a router that knows the catalogue answers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adaptermesh.core.errors import MeshError
from adaptermesh.gateway.dispatch import Router

log = logging.getLogger(__name__)


class Readiness:
    """Looks at the router again and again.

    The router must have been connected to the store's feed once. If it loses the store later it goes on with
    the catalogue that it has, and so does the gateway.
    """

    def __init__(
        self, router: Router, set_serving: Callable[[bool], Awaitable[None]], interval_seconds: float
    ) -> None:
        self._router = router
        self._set_serving = set_serving
        self._interval = interval_seconds
        self._serving = False

    async def wait_ready(self) -> None:
        """Returns once requests can be served; the caller bounds the wait."""
        while True:
            if await self._look():
                return
            await asyncio.sleep(self._interval)

    async def watch(self) -> None:
        """Keeps the health check true; runs until it is cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self._look()

    async def _look(self) -> bool:
        try:
            connected = await self._router.is_ready()
        except MeshError as error:
            serving, why = False, error.message
        else:
            serving, why = connected or self._serving, "the router does not follow the catalogue yet"
        if serving != self._serving:
            self._serving = serving
            await self._set_serving(serving)
            if serving:
                log.info("router is ready")
            else:
                log.warning("router is not ready", extra={"error": why})
        return serving
