"""One adapter's way from the store's stream into the engine's sink: in order, off the loop, resumable."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.rpc.payloads import payload_or
from adaptermesh.worker.engine.source import AdapterSink

_Message: TypeAlias = store_pb2.FetchAdapterResponse | memoryview
"""A message, or its data if it has nothing else."""
_FetchCall: TypeAlias = "grpc.aio.UnaryStreamCall[store_pb2.FetchAdapterRequest, _Message]"
Fetch: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[store_pb2.FetchAdapterRequest, _Message]"
_QUEUED_BYTES = 2 * 2**20


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


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a sink, and the bytes that it holds."""

    run: Callable[[], None]
    size_bytes: int = 0


class SinkFeed:
    """Runs a sink's calls on a thread, one after the other, and adds up what they take.

    What has been received waits here until the thread comes to it, so that receiving goes on while a manifest
    is read and bytes are hashed; never more than `_QUEUED_BYTES` and one message. All methods belong to the
    event loop.
    """

    def __init__(self, sink: AdapterSink, executor: Executor) -> None:
        self._sink = sink
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        # What the thread and the loop share, under the lock.
        self._lock = threading.Lock()
        self._calls: deque[_Call] = deque()
        self._queued_bytes = 0
        self._busy = False
        self._error: Exception | None = None
        self._waited_for = False
        self._room = asyncio.Event()
        self._job: asyncio.Future[None] | None = None
        self.written = 0
        self.verify_ns = 0

    async def begin(self, manifest: bytes) -> None:
        await self._push(_Call(lambda: self._sink.begin(manifest)))

    async def write(self, data: bytes | memoryview) -> None:
        """Returns as soon as there is room for more; raises what the sink raised of what came before."""
        await self._push(_Call(lambda: self._sink.write(data), len(data)))

    async def finish(self) -> None:
        await self._push(_Call(self._sink.finish))
        await self.settle()

    async def settle(self) -> None:
        """Waits for what was handed over; raises what it raised."""
        if self._job is not None:
            await _outlast(self._job)
        self._raise_error()

    async def quiesce(self) -> None:
        """Waits until no thread touches the sink, whatever came of it."""
        with self._lock:
            self._calls.clear()
            self._queued_bytes = 0
        if self._job is not None:
            await asyncio.wait((self._job,))

    async def _push(self, call: _Call) -> None:
        while self._is_full():
            await self._room.wait()
        self._raise_error()
        with self._lock:
            self._calls.append(call)
            self._queued_bytes += call.size_bytes
            idle, self._busy = not self._busy, True
        if idle:
            self._job = self._loop.run_in_executor(self._executor, self._drain)

    def _is_full(self) -> bool:
        with self._lock:
            self._room.clear()
            self._waited_for = self._queued_bytes >= _QUEUED_BYTES
            return self._waited_for

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _drain(self) -> None:
        """On the thread: runs what there is."""
        while (call := self._next_call()) is not None:
            start = time.perf_counter_ns()
            try:
                call.run()
            except Exception as error:  # noqa: BLE001  # whoever hands over the next one hears of it
                self._ended(call, 0, start, error)
            else:
                self._ended(call, call.size_bytes, start, None)

    def _next_call(self) -> _Call | None:
        with self._lock:
            self._busy = bool(self._calls)
            return self._calls.popleft() if self._calls else None

    def _ended(self, call: _Call, written: int, start_ns: int, error: Exception | None) -> None:
        with self._lock:
            self.verify_ns += time.perf_counter_ns() - start_ns
            self.written += written
            self._queued_bytes -= call.size_bytes
            if error is not None:
                self._error = error
                self._calls.clear()
                self._queued_bytes = 0
            if self._waited_for:
                self._waited_for = False
                self._loop.call_soon_threadsafe(self._room.set)


async def _outlast(future: "asyncio.Future[None]") -> None:
    """A cancelled caller leaves only when the thread is done with the sink."""
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait((future,))
        raise


def fetch_of(channel: grpc.aio.Channel) -> Fetch:
    """The store's `FetchAdapter`, whose data are not copied once more."""
    response = store_pb2.FetchAdapterResponse
    return channel.unary_stream(
        "/adaptermesh.api.store.v1.StoreService/FetchAdapter",
        request_serializer=store_pb2.FetchAdapterRequest.SerializeToString,
        response_deserializer=payload_or(response.DATA_FIELD_NUMBER, response.FromString),
    )


class Stalled(Exception):
    """The stream brought nothing for too long."""


class StoreStream:
    """Reads one adapter over as many streams as it takes; each goes on where the verified bytes end."""

    def __init__(self, fetch: Fetch, digest: str, feed: SinkFeed, config: SourceConfig) -> None:
        self._fetch = fetch
        self._digest = digest
        self._feed = feed
        self._config = config
        self._begun = False

    async def read(self) -> None:
        """Reads one stream to its end."""
        call = self._fetch(
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

    async def _next(self, call: _FetchCall) -> _Message | None:
        try:
            async with asyncio.timeout(self._config.stall_seconds):
                message = await call.read()
        except TimeoutError:
            raise Stalled from None
        return message if isinstance(message, _Message) else None

    async def _take(self, message: _Message) -> None:
        if isinstance(message, memoryview):
            await self._feed.write(message)
            return
        part = message.WhichOneof("part")
        if part == "data":
            await self._feed.write(message.data)
        elif part == "manifest" and not self._begun:
            await self._feed.begin(message.manifest)
            self._begun = True
