import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable, version_deleted
from adaptermesh.rpc.channel import open_channel
from adaptermesh.telemetry.tracing import Tracing, trace_into
from adaptermesh.worker.adapter_stream import SourceConfig
from adaptermesh.worker.source import GrpcAdapterSource
from tests.unit.worker.fake_peers import FakeStore, Stream, serve_store, until
from tests.unit.worker.scripted_engine import RecordingSink

CONFIG = SourceConfig(concurrency=4, attempts=3, backoff_seconds=0.001)
BROKEN = unavailable(Reason.STORE_UNREACHABLE, "gone", 0.1)


@dataclass
class Rig:
    store: FakeStore
    source: GrpcAdapterSource
    tracing: Tracing
    exporter: InMemorySpanExporter

    async def fetch(self, digest: str, context: object | None = None) -> RecordingSink:
        sink = RecordingSink()
        self.source.fetch(digest, sink, context)
        await until(sink.ended)
        return sink

    async def span(self) -> ReadableSpan:
        await until(lambda: len(self.exporter.get_finished_spans()) > 0)
        return next(s for s in self.exporter.get_finished_spans() if s.name == "adapter.fetch")


@pytest.fixture
def config() -> SourceConfig:
    return CONFIG


@pytest.fixture
async def rig(config: SourceConfig) -> AsyncIterator[Rig]:
    store = FakeStore()  # type: ignore[abstract]
    server, port = await serve_store(store)
    exporter = InMemorySpanExporter()
    tracing = trace_into(exporter)
    channel = open_channel(f"127.0.0.1:{port}")
    source = GrpcAdapterSource(channel, config, tracing.tracer)
    yield Rig(store, source, tracing, exporter)
    await source.stop()
    await channel.close()
    await server.stop(0)


async def test_the_sink_gets_the_manifest_then_every_byte_in_order_off_the_loop(rig: Rig) -> None:
    data = bytes(range(256)) * 8
    digest = rig.store.add(data)
    sink = await rig.fetch(digest)
    assert sink.finished
    assert digest_bytes(sink.manifests[0]) == digest
    assert bytes(sink.data) == data
    assert not sink.overlapped
    assert all(name.startswith("adapter-fetch") for name in sink.threads)


async def test_a_broken_stream_is_resumed_where_the_verified_bytes_end(rig: Rig) -> None:
    data = bytes(range(200))
    digest = rig.store.add(data)
    rig.store.scripts[digest] = [Stream(break_after=100, error=BROKEN), Stream(break_after=150, error=BROKEN)]
    sink = await rig.fetch(digest)
    assert sink.finished
    assert bytes(sink.data) == data
    assert len(sink.manifests) == 1
    assert rig.store.fetches == [(digest, 0), (digest, 100), (digest, 150)]


async def test_progress_gives_a_stream_new_attempts(rig: Rig) -> None:
    data = bytes(200)
    digest = rig.store.add(data)
    rig.store.scripts[digest] = [Stream(break_after=n, error=BROKEN) for n in (20, 40, 60, 80, 100)]
    sink = await rig.fetch(digest)
    assert sink.finished
    assert bytes(sink.data) == data


async def test_a_store_that_stays_away_is_unavailable_with_a_delay(rig: Rig) -> None:
    digest = rig.store.add(bytes(10))
    rig.store.scripts[digest] = [Stream(break_after=0, error=BROKEN) for _ in range(3)]
    sink = await rig.fetch(digest)
    error = sink.error
    assert isinstance(error, MeshError)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
    assert error.retry_after is not None
    assert error.metadata["digest"] == digest
    assert len(rig.store.fetches) == CONFIG.attempts


async def test_a_store_that_does_not_listen_is_unreachable() -> None:
    server, port = await serve_store(FakeStore())  # type: ignore[abstract]
    await server.stop(0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        source = GrpcAdapterSource(channel, CONFIG, trace_into(InMemorySpanExporter()).tracer)
        sink = RecordingSink()
        source.fetch(digest_bytes(b"x"), sink, None)
        await until(sink.ended)
        await source.stop()
    assert isinstance(sink.error, MeshError)
    assert sink.error.reason is Reason.STORE_UNREACHABLE


async def test_an_unknown_digest_is_not_found_at_once(rig: Rig) -> None:
    digest = digest_bytes(b"nothing")
    sink = await rig.fetch(digest)
    assert isinstance(sink.error, MeshError)
    assert (sink.error.code, sink.error.reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
    assert sink.error.metadata["digest"] == digest
    assert len(rig.store.fetches) == 1


async def test_a_removed_version_is_refused_with_who_removed_it_and_why(rig: Rig) -> None:
    digest = rig.store.add(bytes(1000))
    gone = version_deleted(
        digest, "acme/ner:v2", digest, time="2026-11-30T19:00:00+00:00", actor="ada", why="wrong"
    )
    rig.store.scripts[digest] = [Stream(break_after=64, error=gone)]
    sink = await rig.fetch(digest)
    assert isinstance(sink.error, MeshError)
    assert (sink.error.code, sink.error.reason) == (Code.NOT_FOUND, Reason.VERSION_DELETED)
    assert (sink.error.message, sink.error.metadata["actor"]) == (gone.message, "ada")
    assert len(rig.store.fetches) == 1


async def test_bytes_that_fail_their_check_end_the_fetch_without_a_retry(rig: Rig) -> None:
    digest = rig.store.add(bytes(1000))
    sink = RecordingSink()
    sink.refuse_write = MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, "chunk 0 is damaged")
    rig.source.fetch(digest, sink, None)
    await until(sink.ended)
    assert isinstance(sink.error, MeshError)
    assert sink.error.reason is Reason.DATA_CORRUPT
    assert len(rig.store.fetches) == 1
    span = await rig.span()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "DATA_CORRUPT"
    assert not span.status.is_ok


async def test_a_sink_without_room_stops_the_stream(rig: Rig) -> None:
    digest = rig.store.add(bytes(1000))
    sink = RecordingSink()
    sink.refuse_begin = MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "no room")
    rig.source.fetch(digest, sink, None)
    await until(sink.ended)
    assert sink.data == b""
    assert len(rig.store.fetches) == 1
    await until(lambda: rig.store.running == 0)


async def test_a_slow_download_does_not_delay_others(rig: Rig) -> None:
    slow, quick = rig.store.add(bytes(10), "slow"), rig.store.add(bytes(10), "quick")
    gate = asyncio.Event()
    rig.store.scripts[slow] = [Stream(hold=gate)]
    waiting = RecordingSink()
    rig.source.fetch(slow, waiting, None)
    await until(lambda: len(rig.store.fetches) == 1)
    assert (await rig.fetch(quick)).finished
    assert not waiting.ended()
    gate.set()
    await until(waiting.ended)
    assert waiting.finished


async def test_fetches_run_at_once_up_to_the_limit(rig: Rig) -> None:
    gate = asyncio.Event()
    sinks = []
    for number in range(CONFIG.concurrency + 3):
        digest = rig.store.add(bytes(10), f"n{number}")
        rig.store.scripts[digest] = [Stream(hold=gate)]
        sinks.append(RecordingSink())
        rig.source.fetch(digest, sinks[-1], None)
    await until(lambda: rig.store.running == CONFIG.concurrency)
    gate.set()
    await until(lambda: all(sink.ended() for sink in sinks))
    assert rig.store.most_running == CONFIG.concurrency


async def test_a_cancelled_fetch_ends_its_stream_and_tells_the_sink(rig: Rig) -> None:
    digest = rig.store.add(bytes(10))
    rig.store.scripts[digest] = [Stream(hold=asyncio.Event())]
    sink = RecordingSink()
    rig.source.fetch(digest, sink, None)
    await until(lambda: rig.store.running == 1)
    rig.source.cancel(digest)
    await until(sink.ended)
    assert isinstance(sink.error, MeshError)
    assert sink.error.code is Code.CANCELLED
    await until(lambda: rig.store.running == 0)
    assert (await rig.fetch(digest)).finished


@pytest.mark.parametrize(
    "config", [SourceConfig(attempts=2, stall_seconds=0.05, backoff_seconds=0.001)], ids=["short stall"]
)
async def test_a_stream_that_stalls_is_opened_again(rig: Rig) -> None:
    digest = rig.store.add(bytes(100))
    rig.store.scripts[digest] = [Stream(hold=asyncio.Event())]
    sink = await rig.fetch(digest)
    assert sink.finished
    assert len(rig.store.fetches) == 2


@pytest.mark.parametrize("config", [SourceConfig(timeout_seconds=0.05)], ids=["short timeout"])
async def test_a_fetch_has_a_deadline(rig: Rig) -> None:
    digest = rig.store.add(bytes(100))
    rig.store.scripts[digest] = [Stream(hold=asyncio.Event()) for _ in range(9)]
    sink = await rig.fetch(digest)
    assert isinstance(sink.error, MeshError)
    assert sink.error.reason is Reason.STORE_UNREACHABLE


async def test_the_fetch_is_a_span_of_the_first_requester_and_its_context_reaches_the_store(rig: Rig) -> None:
    digest = rig.store.add(bytes(1000))
    with rig.tracing.tracer.start_as_current_span("call") as parent:
        context = trace.set_span_in_context(parent)
    await rig.fetch(digest, context)
    await until(lambda: len(rig.exporter.get_finished_spans()) == 2)
    span = await rig.span()
    assert span.parent is not None
    assert span.parent.span_id == parent.get_span_context().span_id
    assert span.attributes is not None
    assert span.attributes["adaptermesh.adapter.digest"] == digest
    assert span.attributes["adaptermesh.adapter.bytes"] == 1000
    assert span.attributes["adaptermesh.switch.kind"] == "cold"
    assert "adaptermesh.switch.verify_ms" in span.attributes
    assert rig.source.span_of(digest) == span.context
    assert span.context is not None
    assert f"{span.context.span_id:016x}" in rig.store.traceparents[0]


async def test_stopping_ends_what_runs(rig: Rig) -> None:
    digest = rig.store.add(bytes(10))
    rig.store.scripts[digest] = [Stream(hold=asyncio.Event())]
    sink = RecordingSink()
    rig.source.fetch(digest, sink, None)
    await until(lambda: rig.store.running == 1)
    await rig.source.stop()
    assert sink.ended()
