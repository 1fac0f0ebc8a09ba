"""Spans over the wire of OTLP, into a receiver made of the protocol's own stubs."""

import asyncio
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from adaptermesh.telemetry.tracing import start_tracing


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_are_sent_to_the_configured_otlp_endpoint() -> None:
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tracing = start_tracing("router", "7", None, f"http://127.0.0.1:{port}")
    with tracing.tracer.start_as_current_span("router.resolve", attributes={"adaptermesh.tenant.id": "acme"}):
        pass
    await asyncio.to_thread(tracing.shutdown)
    await server.stop(0)
    [resource] = receiver.requests[0].resource_spans
    about = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("adaptermesh-router", "7")
    [span] = resource.scope_spans[0].spans
    assert span.name == "router.resolve"
    assert {item.key: item.value.string_value for item in span.attributes} == {
        "adaptermesh.tenant.id": "acme",
        "service.name": "adaptermesh-router",
    }
