"""A store and a router over real gRPC that do what the test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason, not_found
from adaptermesh.rpc.metadata import read
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.telemetry.tracing import no_tracing


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns when the condition holds; fails the test when it does not come to hold."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other threads too
            await asyncio.sleep(0.002)


@dataclass
class Stream:
    """How one FetchAdapter stream goes."""

    break_after: int | None = None
    """Ends with `error` after this many bytes of the tensor file."""
    error: MeshError | None = None
    hold: asyncio.Event | None = None
    """Waits for this before the first byte."""


@dataclass
class FakeStore(store_pb2_grpc.StoreServiceServicer):
    """Knows adapters; each FetchAdapter takes the next stream of its digest's script, or goes well."""

    adapters: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    scripts: dict[str, list[Stream]] = field(default_factory=dict)
    fetches: list[tuple[str, int]] = field(default_factory=list)
    traceparents: list[str] = field(default_factory=list)
    registered: list[store_pb2.RegisterBaseModelRequest] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    part_bytes: int = 64

    def add(self, data: bytes, name: str = "ner") -> str:
        """Adds an adapter; returns its digest."""
        manifest = b'{"name":"%s","size":%d}' % (name.encode(), len(data))
        digest = digest_bytes(manifest)
        self.adapters[digest] = (manifest, data)
        return digest

    async def FetchAdapter(
        self, request: store_pb2.FetchAdapterRequest, context: Any
    ) -> AsyncIterator[store_pb2.FetchAdapterResponse]:
        self.fetches.append((request.digest, request.offset))
        self.traceparents.append(read(context).get("traceparent", ""))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            script = self.scripts.get(request.digest, [])
            async for part in self._parts(request, script.pop(0) if script else Stream()):
                yield part
        finally:
            self.running -= 1

    async def _parts(
        self, request: store_pb2.FetchAdapterRequest, stream: Stream
    ) -> AsyncIterator[store_pb2.FetchAdapterResponse]:
        if request.digest not in self.adapters:
            raise not_found(Reason.VERSION_NOT_FOUND, "digest", request.digest)
        manifest, data = self.adapters[request.digest]
        yield store_pb2.FetchAdapterResponse(manifest=manifest)
        if stream.hold is not None:
            await stream.hold.wait()
        end = len(data) if stream.break_after is None else stream.break_after
        for start in range(request.offset, end, self.part_bytes):
            yield store_pb2.FetchAdapterResponse(data=data[start : min(end, start + self.part_bytes)])
        if stream.error is not None:
            raise stream.error

    async def RegisterBaseModel(
        self, request: store_pb2.RegisterBaseModelRequest, context: Any
    ) -> store_pb2.RegisterBaseModelResponse:
        self.registered.append(request)
        return store_pb2.RegisterBaseModelResponse(created=True, feed_position=1)


@dataclass
class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Keeps every report of every stream and acknowledges it."""

    streams: list[list[router_pb2.ReportWorkerRequest]] = field(default_factory=list)
    ended: int = 0
    want_snapshot: bool = False
    """Asks for a snapshot, once."""
    hang_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Ends the streams that run; cleared by it."""
    silent: bool = False
    """Acknowledges nothing."""

    async def ReportWorker(
        self, request_iterator: AsyncIterator[router_pb2.ReportWorkerRequest], context: Any
    ) -> AsyncIterator[router_pb2.ReportWorkerResponse]:
        stream: list[router_pb2.ReportWorkerRequest] = []
        self.streams.append(stream)
        try:
            async for report in request_iterator:
                stream.append(report)
                if self.silent:
                    continue
                wanted, self.want_snapshot = self.want_snapshot, False
                yield router_pb2.ReportWorkerResponse(
                    acknowledged_sequence=report.sequence, snapshot_wanted=wanted
                )
                if self.hang_up.is_set():
                    self.hang_up.clear()
                    return
        finally:
            self.ended += 1

    @property
    def last(self) -> list[router_pb2.ReportWorkerRequest]:
        """The newest stream's reports."""
        return self.streams[-1] if self.streams else []

    def deltas(self) -> list[router_pb2.WorkerDelta]:
        return [report.delta for report in self.last if report.HasField("delta")]

    def snapshots(self) -> list[router_pb2.WorkerSnapshot]:
        return [report.snapshot for report in self.last if report.HasField("snapshot")]


async def serve_store(store: FakeStore, port: int = 0) -> tuple[MeshServer, int]:
    server = MeshServer("adaptermesh.api.store.v1.StoreService", ServerConfig(port=port), no_tracing())
    store_pb2_grpc.add_StoreServiceServicer_to_server(store, server.grpc)
    return server, await server.start()


async def serve_router(router: FakeRouter, port: int = 0) -> tuple[MeshServer, int]:
    server = MeshServer("adaptermesh.api.router.v1.RouterService", ServerConfig(port=port), no_tracing())
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server.grpc)
    return server, await server.start()
