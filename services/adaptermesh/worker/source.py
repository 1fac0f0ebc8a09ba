"""Adapter bytes from the store: streamed, handed to the engine in order, resumed after a broken stream."""

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, StatusCode, Tracer

from adaptermesh.core.errors import Code, MeshError, Reason, not_found, unavailable
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.worker.adapter_stream import SinkFeed, SourceConfig, Stalled, StoreStream, fetch_of
from adaptermesh.worker.engine.source import AdapterSink

log = logging.getLogger(__name__)

_BROKEN = frozenset(
    {
        Code.UNAVAILABLE,
        Code.CANCELLED,
        Code.UNKNOWN,
        Code.INTERNAL,
        Code.ABORTED,
        Code.RESOURCE_EXHAUSTED,
        Code.DEADLINE_EXCEEDED,
    }
)
"""Ends of a stream after which the rest may still be had."""

_REMEMBERED_SPANS = 4096


class GrpcAdapterSource:
    """The engine's `AdapterSource` over the store's `FetchAdapter`.

    Made on the event loop; `fetch` and `cancel` may be called from any thread.
    """

    def __init__(self, channel: grpc.aio.Channel, config: SourceConfig, tracer: Tracer) -> None:
        self._fetch_adapter = fetch_of(channel)
        self._config = config
        self._tracer = tracer
        self._loop = asyncio.get_running_loop()
        self._turns = asyncio.Semaphore(config.concurrency)
        self._executor = ThreadPoolExecutor(config.concurrency, thread_name_prefix="adapter-fetch")
        self._current: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._spans: OrderedDict[str, SpanContext] = OrderedDict()

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        """Starts to fetch; the sink hears of the end. `context` is the first requester's trace context."""
        self._begin(digest, sink, context, member=False)

    def fetch_member(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        """The same for a part of something else: `cancel` does not reach it."""
        self._begin(digest, sink, context, member=True)

    def cancel(self, digest: str) -> None:
        """Gives a fetch up; its sink gets CANCELLED when no thread touches it any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel, digest)

    def span_of(self, digest: str) -> SpanContext | None:
        """The span of the digest's last fetch, for those who shared it."""
        return self._spans.get(digest)

    async def stop(self) -> None:
        """Cancels what runs and waits for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._executor.shutdown(wait=False)

    def _begin(self, digest: str, sink: AdapterSink, context: object | None, *, member: bool) -> None:
        try:
            self._loop.call_soon_threadsafe(self._start, digest, sink, context, member)
        except RuntimeError:
            # The loop is closed: the process is on its way out.
            sink.fail(unavailable(Reason.DRAINING, "the worker has stopped", 1.0, digest=digest))

    def _start(self, digest: str, sink: AdapterSink, context: object | None, member: bool) -> None:
        span = self._tracer.start_span(
            "adapter.fetch",
            context=context if isinstance(context, Context) else Context(),
            attributes={"adaptermesh.adapter.digest": digest, "adaptermesh.switch.kind": "cold"},
        )
        self._remember(digest, span.get_span_context())
        task = self._loop.create_task(self._run(digest, sink, span), name=f"fetch {digest}")
        if not member:
            self._current[digest] = task
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._forget(digest, done, span))

    def _remember(self, digest: str, span: SpanContext) -> None:
        if not span.is_valid:
            return
        self._spans[digest] = span
        self._spans.move_to_end(digest)
        if len(self._spans) > _REMEMBERED_SPANS:
            self._spans.popitem(last=False)

    def _forget(self, digest: str, task: asyncio.Task[None], span: Span) -> None:
        self._tasks.discard(task)
        if span.is_recording():
            # Given up before its first step.
            span.end()
        if self._current.get(digest) is task:
            del self._current[digest]

    def _cancel(self, digest: str) -> None:
        task = self._current.pop(digest, None)
        if task is not None:
            task.cancel()

    async def _run(self, digest: str, sink: AdapterSink, span: Span) -> None:
        feed = SinkFeed(sink, self._executor)
        error: MeshError | None = None
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                await self._fetch(digest, feed)
            except MeshError as failure:
                error = failure
            except asyncio.CancelledError:
                error = MeshError(Code.CANCELLED, Reason.CANCELLED, "the fetch was given up")
                raise
            except Exception as failure:  # the top of a task: the sink must hear of every end
                log.error("fetch failed unexpectedly", extra={"digest": digest}, exc_info=failure)
                error = MeshError(Code.INTERNAL, Reason.INTERNAL, f"the fetch of {digest} failed")
            finally:
                span.set_attribute("adaptermesh.adapter.bytes", feed.written)
                span.set_attribute("adaptermesh.switch.verify_ms", feed.verify_ns / 1e6)
                if error is not None:
                    await feed.quiesce()
                    span.set_attribute("error.type", error.reason.value)
                    span.set_status(StatusCode.ERROR, error.message[:256])
                    # A sink that raised has ended by itself and may say so again.
                    with contextlib.suppress(MeshError):
                        sink.fail(error)

    async def _fetch(self, digest: str, feed: SinkFeed) -> None:
        async with self._turns:
            try:
                async with asyncio.timeout(self._config.timeout_seconds):
                    await self._fetch_with_retries(digest, feed)
            except TimeoutError:
                raise unavailable(
                    Reason.STORE_UNREACHABLE,
                    f"the adapter store did not deliver {digest} within {self._config.timeout_seconds:g} s",
                    1.0,
                    digest=digest,
                ) from None
            await feed.finish()

    async def _fetch_with_retries(self, digest: str, feed: SinkFeed) -> None:
        stream = StoreStream(self._fetch_adapter, digest, feed, self._config)
        failures = 0
        while True:
            before = feed.written
            try:
                await stream.read()
                return
            except grpc.aio.AioRpcError as failure:
                error = mesh_error_from(failure, Reason.STORE_UNREACHABLE)
                await feed.settle()
            except Stalled:
                error = unavailable(Reason.STORE_UNREACHABLE, "the adapter store's stream stalled", 1.0)
                await feed.settle()
            if error.code not in _BROKEN:
                raise _final(error, digest)
            failures = 1 if feed.written > before else failures + 1
            if failures >= self._config.attempts:
                raise _final(error, digest)
            log.warning(
                "adapter stream broke, resuming",
                extra={"digest": digest, "offset": feed.written, "reason": error.message},
            )
            await asyncio.sleep(self._backoff(failures))

    def _backoff(self, failures: int) -> float:
        delay = min(2.0, self._config.backoff_seconds * 2.0 ** (failures - 1))
        return delay * random.uniform(0.5, 1.0)  # noqa: S311  # spreads retries, protects nothing


def _final(error: MeshError, digest: str) -> MeshError:
    """What the requests that wait for the adapter are told."""
    if error.code is Code.NOT_FOUND and error.reason is not Reason.VERSION_DELETED:
        failure = not_found(Reason.VERSION_NOT_FOUND, "adapter version", digest)
    elif error.code in _BROKEN:
        failure = unavailable(
            Reason.STORE_UNREACHABLE, f"the adapter store can't be reached: {error.message}", 1.0
        )
    else:
        failure = MeshError(error.code, error.reason, error.message, metadata=error.metadata)
    failure.metadata["digest"] = digest
    return failure
