"""The router put together: what it is made of, what it runs, how it stops."""

import asyncio
import logging
import random

from adaptermesh.api.router.v1 import router_pb2_grpc
from adaptermesh.router.booking import Bookings
from adaptermesh.router.catalogue import Catalogue
from adaptermesh.router.catch_up import CatchUp
from adaptermesh.router.dispatch import Dispatcher
from adaptermesh.router.feed import FeedFollower
from adaptermesh.router.servicer import RouterServicer
from adaptermesh.router.settings import RouterSettings
from adaptermesh.router.store_client import StoreClient
from adaptermesh.router.workers import WorkerRegistry
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer
from adaptermesh.rpc.service import ServiceContext

log = logging.getLogger(__name__)

GRPC_NAME = "adaptermesh.api.router.v1.RouterService"


class RouterService:
    """One router process."""

    def __init__(self, context: ServiceContext[RouterSettings]) -> None:
        settings, clock = context.settings, context.clock
        self._settings = settings
        self._channel = open_channel(settings.store, settings.store_key.get_secret_value())
        feed = StoreClient(self._channel, settings)
        self._catalogue = Catalogue()
        self._follower = FeedFollower(feed, self._catalogue, settings, random.Random())  # noqa: S311  # jitter
        self._catch_up = CatchUp(feed, self._catalogue, settings)
        bookings = Bookings(clock, settings.booking_seconds)
        registry = WorkerRegistry(bookings, clock, settings)
        dispatcher = Dispatcher(
            self._catalogue, self._catch_up, registry, bookings, clock, context.tracing, settings
        )
        self._servicer = RouterServicer(dispatcher, registry, bookings, self._catalogue, self._follower)
        self._tasks: list[asyncio.Task[None]] = []

    def register(self, server: MeshServer) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(self._servicer, server.grpc)

    async def start(self) -> None:
        """Follows the store; returns when the catalogue is there, or without it after a bounded wait.

        Without it, requests are refused with a reason and a delay: a store that is away is no cause to hide.
        """
        self._tasks = [
            asyncio.create_task(self._follower.run(), name="feed-follower"),
            asyncio.create_task(self._catch_up.run(), name="catch-up"),
        ]
        if not await self._catalogue.reach(0, self._settings.startup_wait_seconds):
            log.warning("serving without a catalogue", extra={"store": self._settings.store})

    async def drain(self) -> None:
        """Decisions take no time to finish; the workers' streams would last for ever."""
        self._servicer.close_reports()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
