"""The gateway as a process: what it is made of, how it starts and ends."""

import asyncio
import logging
import uuid

from adaptermesh.api.inference.v1 import inference_pb2_grpc
from adaptermesh.gateway.authentication import Authentication, AuthenticationConfig
from adaptermesh.gateway.channels import WorkerChannels
from adaptermesh.gateway.dispatch import Router
from adaptermesh.gateway.gate import Gate
from adaptermesh.gateway.models import ModelList, StoreCatalogue
from adaptermesh.gateway.placement import Placement
from adaptermesh.gateway.readiness import Readiness
from adaptermesh.gateway.servicer import Edge, InferenceServicer
from adaptermesh.gateway.settings import GatewaySettings
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer
from adaptermesh.rpc.service import ServiceContext

log = logging.getLogger(__name__)


class GatewayService:
    """Channels to router, store and workers, the servicer, and the health check."""

    def __init__(self, context: ServiceContext[GatewaySettings]) -> None:
        settings = context.settings
        self._settings = settings
        self._server = context.server
        self._router_channel = open_channel(settings.router)
        self._store_channel = open_channel(settings.store, settings.store_key.get_secret_value())
        self._worker_channels = WorkerChannels(open_channel, settings.max_worker_channels)
        self._gate = Gate(settings.max_requests_in_flight)
        router = Router(self._router_channel, settings.router_timeout_seconds)
        self._readiness = Readiness(router, self._server.set_serving, settings.health_interval_seconds)
        self._watch: asyncio.Task[None] | None = None
        self._servicer = InferenceServicer(
            Placement(
                router, self._worker_channels, settings.max_attempts, settings.admission_timeout_seconds
            ),
            ModelList(router, StoreCatalogue(self._store_channel, settings.store_timeout_seconds)),
            Edge(
                gate=self._gate,
                authentication=Authentication(
                    AuthenticationConfig(
                        required=settings.authenticates,
                        cache_seconds=settings.key_cache_seconds,
                        grace_seconds=settings.key_grace_seconds,
                        timeout_seconds=settings.store_timeout_seconds,
                    ),
                    self._store_channel,
                    context.clock,
                ),
                tracing=context.tracing,
                clock=context.clock,
                new_request_id=lambda: uuid.uuid4().hex,
                default_deadline_seconds=settings.default_deadline_seconds,
            ),
        )

    def register(self, server: MeshServer) -> None:
        """Adds the public API."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._servicer, server.grpc)
        if self._settings.authenticates:
            server.hide_connections()

    async def start(self) -> None:
        """Returns once the router knows the catalogue."""
        await self._readiness.wait_ready()
        self._watch = asyncio.create_task(self._readiness.watch(), name="gateway readiness")

    async def drain(self) -> None:
        """Refuses new requests and waits for the running ones, within the settings' drain time."""
        await self._end_watch()
        await self._server.set_serving(False)
        self._gate.close()
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._gate.wait_empty()
        except TimeoutError:
            log.warning("requests still run after the drain time", extra={"requests": self._gate.inside})

    async def stop(self) -> None:
        """Closes every channel."""
        await self._end_watch()
        await self._worker_channels.close()
        await self._store_channel.close()
        await self._router_channel.close()

    async def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
