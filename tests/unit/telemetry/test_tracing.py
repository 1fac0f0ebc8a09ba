import json
import logging
from io import StringIO
from pathlib import Path

import pytest
from opentelemetry import trace

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.telemetry.logging import configure_logging
from adaptermesh.telemetry.trace_reader import list_traces, load_trace
from adaptermesh.telemetry.tracing import Tracing, extract, inject, start_tracing


@pytest.fixture
def services(tmp_path: Path) -> tuple[Tracing, Tracing]:
    return start_tracing("gateway", "1", tmp_path), start_tracing("worker", "2", tmp_path)


def test_a_trace_over_two_services_is_read_back_as_one(
    services: tuple[Tracing, Tracing], tmp_path: Path
) -> None:
    gateway, worker = services
    with gateway.tracer.start_as_current_span(
        "gateway.request", attributes={"gen_ai.request.model": "task"}
    ) as root:
        headers = dict(inject())
    with worker.tracer.start_as_current_span("engine.prefill", context=extract(headers)):
        pass
    for tracing in services:
        tracing.shutdown()
    trace_id = f"{root.get_span_context().trace_id:032x}"
    [summary] = list_traces(tmp_path)
    assert (summary.trace_id, summary.root_name) == (trace_id, "gateway.request")
    assert summary.services == ("gateway", "worker")
    assert summary.attributes == {"gen_ai.request.model": "task"}
    outer, inner = load_trace(tmp_path, trace_id[:6])
    assert (outer.name, inner.name, inner.parent_id) == ("gateway.request", "engine.prefill", outer.span_id)
    assert outer.start_ns <= inner.start_ns


def test_a_linked_span_of_another_trace_is_shown_with_the_trace(
    services: tuple[Tracing, Tracing], tmp_path: Path
) -> None:
    _, worker = services
    with worker.tracer.start_as_current_span("adapter.fetch") as fetch:
        pass
    link = trace.Link(fetch.get_span_context())
    with worker.tracer.start_as_current_span("worker.admit", links=[link]) as admit:
        pass
    worker.shutdown()
    spans = load_trace(tmp_path, f"{admit.get_span_context().trace_id:032x}")
    assert [span.name for span in spans] == ["adapter.fetch", "worker.admit"]


def test_a_line_cut_short_by_a_crash_is_passed_over(
    services: tuple[Tracing, Tracing], tmp_path: Path
) -> None:
    _, worker = services
    with worker.tracer.start_as_current_span("whole"):
        pass
    worker.shutdown()
    [path] = tmp_path.glob("worker-*.jsonl")
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    assert [summary.root_name for summary in list_traces(tmp_path)] == ["whole"]


@pytest.mark.parametrize("prefix", ["", "zz", "0123"])
def test_an_unknown_trace_is_not_found(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(MeshError) as raised:
        load_trace(tmp_path, prefix)
    assert raised.value.code is Code.NOT_FOUND


def test_a_malformed_traceparent_starts_a_trace_of_its_own() -> None:
    context = extract({"traceparent": "00-zz-yy-01"})
    assert not trace.get_current_span(context).get_span_context().is_valid


def test_a_log_line_is_an_event_with_fields_and_the_trace_id(tmp_path: Path) -> None:
    stream = StringIO()
    tracing = start_tracing("router", "1", tmp_path)
    try:
        configure_logging("router", "INFO", json_lines=True, stream=stream)
        with tracing.tracer.start_as_current_span("x") as span:
            logging.getLogger("m").info("worker joined", extra={"worker_id": "w1"})
    finally:
        tracing.shutdown()
    line = json.loads(stream.getvalue())
    assert (line["event"], line["worker_id"], line["service"]) == ("worker joined", "w1", "router")
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"
