"""A real server and a real channel: what every service gets from `adaptermesh.rpc`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch, unavailable
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.telemetry.tracing import Tracing, no_tracing, trace_into

NAME = "adaptermesh.api.router.v1.RouterService"


class Scripted(router_pb2_grpc.RouterServiceServicer):
    """Answers with what the request id asks for."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def Dispatch(self, request, context):  # type: ignore[no-untyped-def]
        match request.request_id:
            case "mesh":
                raise base_mismatch("a/b@prod", "sha256:1", "sha256:2")
            case "bug":
                raise ZeroDivisionError("secret")
            case "wait":
                self.entered.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        return router_pb2.DispatchResponse(worker_id="w")

    async def ListWorkers(self, request, context):  # type: ignore[no-untyped-def]
        return router_pb2.ListWorkersResponse()

    async def GetRouterStatus(self, request, context):  # type: ignore[no-untyped-def]
        return router_pb2.GetRouterStatusResponse()

    async def ReportWorker(self, request_iterator, context):  # type: ignore[no-untyped-def]
        async for request in request_iterator:
            yield router_pb2.ReportWorkerResponse(acknowledged_sequence=request.sequence)
            if request.sequence == 2:
                raise unavailable(Reason.DRAINING, "bye", 1.5)


class Mesh:
    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self.servicer = Scripted()
        self.server = MeshServer(NAME, ServerConfig(), tracing)
        router_pb2_grpc.add_RouterServiceServicer_to_server(self.servicer, self.server.grpc)

    async def start(self) -> None:
        self.port = await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.port}")
        self.router = router_pb2_grpc.RouterServiceStub(self.channel)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def mesh(spans: InMemorySpanExporter) -> AsyncIterator[Mesh]:
    mesh = Mesh(trace_into(spans))
    await mesh.start()
    yield mesh
    await mesh.channel.close()
    await mesh.server.stop(0)


async def failure(call: grpc.aio.UnaryUnaryCall) -> MeshError:  # type: ignore[type-arg]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return mesh_error_from(raised.value)


async def test_a_mesh_error_reaches_the_caller_whole_and_with_its_request_id(mesh: Mesh) -> None:
    request = router_pb2.DispatchRequest(request_id="mesh")
    error = await failure(mesh.router.Dispatch(request, timeout=10, metadata=(("x-request-id", "r1"),)))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert error.metadata["adapter_base_digest"] == "sha256:1"
    assert error.metadata["request_id"] == "r1"


async def test_an_unexpected_error_is_internal_and_shows_nothing_of_its_cause(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    error = await failure(mesh.router.Dispatch(router_pb2.DispatchRequest(request_id="bug"), timeout=10))
    assert (error.code, error.reason) == (Code.INTERNAL, Reason.INTERNAL)
    assert "secret" not in error.message
    assert "ZeroDivisionError" in caplog.text


async def test_a_stream_that_fails_delivers_what_came_before(mesh: Mesh) -> None:
    call = mesh.router.ReportWorker(timeout=10)
    for sequence in (1, 2):
        await call.write(router_pb2.ReportWorkerRequest(sequence=sequence))
    answers = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for answer in call:
            answers.append(answer.acknowledged_sequence)  # noqa: PERF401
    error = mesh_error_from(raised.value)
    assert answers == [1, 2]
    assert (error.reason, error.retry_after) == (Reason.DRAINING, 1.5)


async def test_the_deadline_of_the_caller_cancels_the_handler(mesh: Mesh) -> None:
    error = await failure(mesh.router.Dispatch(router_pb2.DispatchRequest(request_id="wait"), timeout=0.2))
    assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
    async with asyncio.timeout(10):
        await mesh.servicer.cancelled.wait()


async def test_a_call_inside_a_span_is_joined_to_its_trace_and_one_outside_makes_none(
    mesh: Mesh, spans: InMemorySpanExporter
) -> None:
    await mesh.router.Dispatch(router_pb2.DispatchRequest(), timeout=10)
    assert spans.get_finished_spans() == ()
    with mesh.tracing.tracer.start_as_current_span("root") as root:
        await mesh.router.Dispatch(router_pb2.DispatchRequest(), timeout=10)
    server, outer = spans.get_finished_spans()
    assert outer.name == "root"
    assert server.name == f"{NAME}/Dispatch"
    assert server.parent is not None
    assert server.parent.span_id == root.get_span_context().span_id
    assert server.attributes is not None
    assert server.attributes["rpc.status_code"] == "OK"


async def test_health_says_not_serving_until_told(mesh: Mesh) -> None:
    health: Any = health_pb2_grpc.HealthStub(mesh.channel)
    request = health_pb2.HealthCheckRequest(service=NAME)
    assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await mesh.server.set_serving(True)
    assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(mesh: Mesh) -> None:
    channel: Any = mesh.channel
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    messages: Any = reflection_pb2
    requests = iter([messages.ServerReflectionRequest(list_services="")])
    stub: Any = reflection
    answers = [answer async for answer in stub.ServerReflectionInfo(requests, timeout=10)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {NAME, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names


async def test_a_taken_port_is_an_error_that_names_it(mesh: Mesh) -> None:
    second = MeshServer(NAME, ServerConfig(port=mesh.port), no_tracing())
    with pytest.raises(OSError, match=str(mesh.port)):
        await second.start()
    await second.stop(0)


async def test_an_unreachable_peer_is_unavailable_with_the_reason_the_caller_gives() -> None:
    channel = open_channel("127.0.0.1:1")
    call = router_pb2_grpc.RouterServiceStub(channel).GetRouterStatus(
        router_pb2.GetRouterStatusRequest(), timeout=10
    )
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = mesh_error_from(raised.value, Reason.ROUTER_UNREACHABLE)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.ROUTER_UNREACHABLE)
    assert error.retry_after is not None
    await channel.close()
