"""`RouterService` over gRPC: messages in, nouns, messages out."""

# The generated base class decides names and parameters.
# ruff: noqa: N802, ARG002

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.router import wire
from adaptermesh.router.booking import Bookings
from adaptermesh.router.catalogue import Catalogue
from adaptermesh.router.dispatch import Dispatcher
from adaptermesh.router.feed import FeedFollower
from adaptermesh.router.workers import WorkerRegistry
from adaptermesh.rpc.deadline import time_remaining


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Thin: every decision is made elsewhere."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        registry: WorkerRegistry,
        bookings: Bookings,
        catalogue: Catalogue,
        follower: FeedFollower,
    ) -> None:
        self._dispatcher = dispatcher
        self._registry = registry
        self._bookings = bookings
        self._catalogue = catalogue
        self._follower = follower
        self._closing = asyncio.Event()

    def close_reports(self) -> None:
        """Ends every worker's report stream, so that a stopping router does not wait for them."""
        self._closing.set()

    async def Dispatch(
        self, request: router_pb2.DispatchRequest, context: Any
    ) -> router_pb2.DispatchResponse:
        decision = await self._dispatcher.dispatch(wire.dispatch_request(request), time_remaining(context))
        return wire.dispatch_response(decision)

    async def ReportWorker(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[router_pb2.ReportWorkerResponse]:
        stream = self._registry.open_stream()
        try:
            async with aclosing(_until(self._closing, request_iterator)) as messages:
                async for message in messages:
                    taken = stream.take(message.sequence, wire.worker_report(message))
                    yield router_pb2.ReportWorkerResponse(
                        acknowledged_sequence=taken.sequence, snapshot_wanted=taken.snapshot_wanted
                    )
                    if taken.replaced:
                        return
        finally:
            stream.close()

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: Any
    ) -> router_pb2.ListWorkersResponse:
        self._bookings.expire()
        workers = sorted(self._registry.live(), key=lambda worker: worker.info.worker_id)
        return router_pb2.ListWorkersResponse(
            workers=[
                wire.worker_view(worker, self._bookings.counts.get(worker.info.worker_id, 0))
                for worker in workers
            ]
        )

    async def GetRouterStatus(
        self, request: router_pb2.GetRouterStatusRequest, context: Any
    ) -> router_pb2.GetRouterStatusResponse:
        image = self._catalogue.image
        return router_pb2.GetRouterStatusResponse(
            feed_position=0 if image is None else image.position,
            feed_head=self._catalogue.head,
            feed_connected=self._follower.connected,
            versions=0 if image is None else len(image.by_digest),
            routes=0 if image is None else len(image.routes),
        )


async def _until(
    closing: asyncio.Event, messages: AsyncIterator[router_pb2.ReportWorkerRequest]
) -> AsyncGenerator[router_pb2.ReportWorkerRequest, None]:
    """The messages, until they end or `closing` is set."""
    closed = asyncio.ensure_future(closing.wait())
    try:
        while not closing.is_set():
            coming = asyncio.ensure_future(anext(messages, None))
            try:
                await asyncio.wait((coming, closed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
            if not coming.done():
                return
            message = coming.result()
            if message is None:
                return
            yield message
    finally:
        closed.cancel()
