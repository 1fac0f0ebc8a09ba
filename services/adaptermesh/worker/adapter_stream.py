"""One adapter's way from the store's stream into the engine's sink: in order, off the loop, resumable."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.worker.engine.source import AdapterSink

_FetchCall: TypeAlias = (
    "grpc.aio.UnaryStreamCall[store_pb2.FetchAdapterRequest, store_pb2.FetchAdapterResponse]"
)
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Bounds of fetching."""

    concurrency: int = 8
    """Fetches that run at once."""
    attempts: int = 5
    """Streams that may break in a row without a byte of progress."""
    timeout_seconds: float = 120.0
    """For one adapter in all, the wait for its turn not included."""
    stall_seconds: float = 10.0
    """A stream that brings nothing for this long is broken."""
    backoff_seconds: float = 0.1
    """Before the second stream; doubles with each that brings nothing, up to 2 s."""


class SinkFeed:
    """Runs a sink's calls on threads, one at a time and in order, and adds up what they take."""

    def __init__(self, sink: AdapterSink, executor: Executor) -> None:
        self._sink = sink
        self._executor = executor
        self._pending: asyncio.Future[int] | None = None
        self.written = 0
        self.verify_ns = 0

    async def begin(self, manifest: bytes) -> None:
        await self._run(lambda: self._sink.begin(manifest))

    async def write(self, data: bytes) -> None:
        """Returns as soon as the bytes before these are verified, so that receiving and hashing overlap."""
        await self.settle()
        self._pending = self._submit(lambda: self._write(data))

    async def settle(self) -> None:
        """Waits for what was handed over; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            await _outlast(pending)

    async def quiesce(self) -> None:
        """Waits until no thread touches the sink, whatever came of it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            await asyncio.wait((pending,))
            pending.exception()

    async def finish(self) -> None:
        await self.settle()
        await self._run(self._sink.finish)

    async def _run(self, call: Callable[[], None]) -> None:
        await _outlast(self._submit(lambda: self._timed(call)))

    def _submit(self, call: Callable[[], int]) -> asyncio.Future[int]:
        return asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _write(self, data: bytes) -> int:
        elapsed = self._timed(lambda: self._sink.write(data))
        self.written += len(data)
        return elapsed

    def _timed(self, call: Callable[[], None]) -> int:
        start = time.perf_counter_ns()
        call()
        elapsed = time.perf_counter_ns() - start
        self.verify_ns += elapsed
        return elapsed


async def _outlast(future: "asyncio.Future[_ResultT]") -> _ResultT:
    """The future's result. A cancelled caller leaves only when the thread is done with the sink."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait((future,))
        raise


class Stalled(Exception):
    """The stream brought nothing for too long."""


class StoreStream:
    """Reads one adapter over as many streams as it takes; each goes on where the verified bytes end."""

    def __init__(
        self, stub: "store_pb2_grpc.StoreServiceAsyncStub", digest: str, feed: SinkFeed, config: SourceConfig
    ) -> None:
        self._stub = stub
        self._digest = digest
        self._feed = feed
        self._config = config
        self._begun = False

    async def read(self) -> None:
        """Reads one stream to its end."""
        call = self._stub.FetchAdapter(
            store_pb2.FetchAdapterRequest(digest=self._digest, offset=self._feed.written),
            timeout=self._config.timeout_seconds,
        )
        try:
            while True:
                message = await self._next(call)
                if message is None:
                    await self._feed.settle()
                    return
                await self._take(message)
        finally:
            call.cancel()

    async def _next(self, call: _FetchCall) -> store_pb2.FetchAdapterResponse | None:
        try:
            async with asyncio.timeout(self._config.stall_seconds):
                message = await call.read()
        except TimeoutError:
            raise Stalled from None
        return message if isinstance(message, store_pb2.FetchAdapterResponse) else None

    async def _take(self, message: store_pb2.FetchAdapterResponse) -> None:
        part = message.WhichOneof("part")
        if part == "data":
            await self._feed.write(message.data)
        elif part == "manifest" and not self._begun:
            await self._feed.begin(message.manifest)
            self._begun = True
