import asyncio
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, TraceFlags

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.telemetry.tracing import trace_into
from adaptermesh.worker.engine.request import FinishReason, Outcome, Timeline
from adaptermesh.worker.spans import RequestSpans, ServedRequest
from tests.unit.worker.conftest import Worker, read_all
from tests.unit.worker.fake_peers import until

DIGEST = digest_bytes(b"adapter")
SHARED = SpanContext(trace_id=7, span_id=8, is_remote=False, trace_flags=TraceFlags(1))
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACED = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
MS = 1_000_000
COLD = Timeline(
    submitted_ns=10 * MS,
    fetch_start_ns=11 * MS,
    fetch_end_ns=15 * MS,
    h2d_start_ns=15 * MS,
    h2d_end_ns=17 * MS,
    scheduled_ns=18 * MS,
    first_token_ns=30 * MS,
    finished_ns=50 * MS,
    verify_ns=2 * MS,
    fetched_bytes=1234,
    tier_at_admission=Tier.STORE,
    cached_tokens=4,
)


def record(timeline: Timeline) -> tuple[dict[str, ReadableSpan], SpanContext]:
    """The spans of one request, by name, and the call's own."""
    exporter = InMemorySpanExporter()
    tracer = trace_into(exporter).tracer
    spans = RequestSpans(tracer, "w-1", {DIGEST: SHARED}.get)
    with tracer.start_as_current_span("call") as call:
        served = ServedRequest("acme", DIGEST, "acme/ner:v3", trace.set_span_in_context(call))
        spans.admitted(served, Tier.STORE)
        spans.finished(served, Outcome(FinishReason.LENGTH, 5, 9, timeline))
    return {span.name: span for span in exporter.get_finished_spans()}, call.get_span_context()


def test_each_step_is_a_span_under_the_call() -> None:
    spans, call = record(COLD)
    steps = {name: (span.start_time, span.end_time) for name, span in spans.items() if name != "call"}
    assert steps == {
        "worker.admit": (10 * MS, 18 * MS),
        "adapter.h2d": (15 * MS, 17 * MS),
        "engine.prefill": (18 * MS, 30 * MS),
        "engine.decode": (30 * MS, 50 * MS),
    }
    for name in steps:
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == call.span_id


def test_the_admission_says_what_the_switch_cost() -> None:
    spans, _ = record(COLD)
    assert spans["worker.admit"].attributes == {
        "adaptermesh.worker.id": "w-1",
        "adaptermesh.tenant.id": "acme",
        "adaptermesh.adapter.digest": DIGEST,
        "adaptermesh.adapter.version": "acme/ner:v3",
        "adaptermesh.adapter.bytes": 1234,
        "adaptermesh.switch.kind": "cold",
        "adaptermesh.switch.tier": "store",
        "adaptermesh.switch.queue_ms": 8.0,
        "adaptermesh.switch.fetch_ms": 4.0,
        "adaptermesh.switch.verify_ms": 2.0,
        "adaptermesh.switch.shared_fetch": False,
    }
    assert spans["worker.admit"].links == ()
    h2d, prefill, decode = (spans[n].attributes for n in ("adapter.h2d", "engine.prefill", "engine.decode"))
    assert h2d is not None
    assert prefill is not None
    assert decode is not None
    assert h2d["adaptermesh.switch.h2d_ms"] == 2.0
    assert prefill["gen_ai.usage.input_tokens"] == 5
    assert prefill["gen_ai.usage.cache_read.input_tokens"] == 4
    call = spans["call"].attributes
    assert call is not None
    assert (call["gen_ai.usage.input_tokens"], call["gen_ai.usage.cache_read.input_tokens"]) == (5, 4)
    assert decode["gen_ai.usage.output_tokens"] == 9
    assert decode["gen_ai.response.finish_reasons"] == ("length",)


def test_a_prefill_that_began_while_the_adapter_arrived_says_so() -> None:
    early = replace(
        COLD, scheduled_ns=12 * MS, h2d_start_ns=12 * MS, h2d_end_ns=16 * MS, overlapped_ns=3 * MS
    )
    spans, _ = record(early)
    for span in spans.values():
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    prefill, admit = spans["engine.prefill"], spans["worker.admit"]
    assert (prefill.start_time, prefill.end_time) == (12 * MS, 30 * MS)
    assert prefill.attributes is not None
    assert prefill.attributes["adaptermesh.switch.overlap_ms"] == 3.0
    assert admit.attributes is not None
    assert admit.attributes["adaptermesh.switch.queue_ms"] == 2.0
    assert admit.attributes["adaptermesh.switch.fetch_ms"] == 4.0


def test_a_shared_fetch_is_linked() -> None:
    timeline = Timeline(1, 2, 3, 0, 0, 4, 5, 6, shared_fetch=True)
    spans, _ = record(timeline)
    (link,) = spans["worker.admit"].links
    assert link.context == SHARED
    attributes = spans["worker.admit"].attributes
    assert attributes is not None
    assert attributes["adaptermesh.switch.shared_fetch"] is True


def test_a_step_that_did_not_happen_has_no_span() -> None:
    spans, _ = record(Timeline(1, 0, 0, 0, 0, 4, 5, 6))
    assert set(spans) == {"call", "worker.admit", "engine.prefill", "engine.decode"}
    attributes = spans["worker.admit"].attributes
    assert attributes is not None
    assert "adaptermesh.switch.fetch_ms" not in attributes


def test_a_failed_request_has_an_admission_with_the_error() -> None:
    exporter = InMemorySpanExporter()
    tracer = trace_into(exporter).tracer
    spans = RequestSpans(tracer, "w-1", lambda _: None)
    with tracer.start_as_current_span("call") as call:
        served = ServedRequest("acme", "", "base", trace.set_span_in_context(call))
        spans.admitted(served, Tier.NONE)
        spans.failed(served, MeshError(Code.NOT_FOUND, Reason.VERSION_NOT_FOUND, "no such digest"))
    admit = exporter.get_finished_spans()[0]
    assert admit.name == "worker.admit"
    assert not admit.status.is_ok
    assert admit.attributes is not None
    assert admit.attributes["error.type"] == "VERSION_NOT_FOUND"
    assert "adaptermesh.switch.kind" not in admit.attributes


async def drive(worker: Worker, metadata: Any) -> None:
    worker.engine.tiers[DIGEST] = Tier.DEVICE
    call = worker.stub.Generate(worker.request(adapter_digest=DIGEST), metadata=metadata)
    reading = asyncio.create_task(call.initial_metadata())
    await until(lambda: "r1" in worker.engine.requests)
    worker.engine.finish("r1", COLD)
    await reading
    await read_all(call)


async def test_the_steps_are_children_of_the_calls_span_in_the_callers_trace(worker: Worker) -> None:
    await drive(worker, grpc.aio.Metadata(*TRACED))
    await until(lambda: len(worker.spans.get_finished_spans()) == 5)
    spans = {span.name: span for span in worker.spans.get_finished_spans()}
    rpc = spans["adaptermesh.api.worker.v1.WorkerService/Generate"]
    assert rpc.context is not None
    assert f"{rpc.context.trace_id:032x}" == TRACE_ID
    steps = [span for name, span in spans.items() if span is not rpc]
    assert all(span.parent is not None and span.parent.span_id == rpc.context.span_id for span in steps)
    assert rpc.attributes is not None
    assert rpc.attributes["adaptermesh.switch.kind"] == "warm"
    assert rpc.attributes["gen_ai.usage.output_tokens"] == 2


async def test_a_call_without_a_trace_leaves_no_spans(worker: Worker) -> None:
    await drive(worker, None)
    assert worker.spans.get_finished_spans() == ()


@pytest.mark.parametrize("tier", list(Tier))
def test_every_tier_has_a_name_in_the_trace(tier: Tier) -> None:
    served = ServedRequest("acme", DIGEST, "acme/ner:v3", trace.set_span_in_context(trace.INVALID_SPAN))
    RequestSpans(trace_into(InMemorySpanExporter()).tracer, "w", lambda _: None).admitted(served, tier)
    assert served.tier is tier
