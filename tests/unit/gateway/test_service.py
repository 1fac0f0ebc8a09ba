from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adaptermesh.core.errors import Reason
from adaptermesh.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Fakes, Mesh

SERVICE = "adaptermesh.api.inference.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_becomes(mesh: Mesh, status: Any) -> None:
    stub = health_pb2_grpc.HealthStub(mesh.channel)
    async with asyncio.timeout(20):
        async for response in stub.Watch(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(service=SERVICE)
        ):
            if response.status == status:
                return


async def test_the_gateway_serves_once_the_router_follows_the_catalogue(peers: Mesh) -> None:
    peers.router.connected = False
    await peers.start_gateway(wait=False)
    starting = asyncio.create_task(peers.service.start())
    await health_becomes(peers, NOT_SERVING)
    assert not starting.done()
    peers.router.connected = True
    await starting
    await health_becomes(peers, SERVING)


async def test_the_gateway_serves_on_while_the_router_has_lost_the_store(mesh: Mesh, fakes: Fakes) -> None:
    await health_becomes(mesh, SERVING)
    mesh.router.connected = False
    before = mesh.router.status_requests
    await fakes.until(lambda: mesh.router.status_requests >= before + 3)
    await health_becomes(mesh, SERVING)


async def test_a_router_that_restarts_is_found_again(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    assert (await mesh.generate()).error is None
    await mesh.router_server.stop(0)
    await health_becomes(mesh, NOT_SERVING)
    assert (await mesh.generate()).failure.reason is Reason.ROUTER_UNREACHABLE
    await mesh.start_router(mesh.router_address)
    await health_becomes(mesh, SERVING)
    assert (await mesh.generate()).error is None


async def test_draining_finishes_what_runs_and_refuses_the_rest(mesh: Mesh, fakes: Fakes) -> None:
    release = asyncio.Event()

    async def finish_later(context: Any) -> None:
        await release.wait()
        await context.write(fakes.finished())

    await mesh.add_worker("w1", fakes.starting_then(finish_later))
    call = mesh.call()
    await call.read()
    draining = asyncio.create_task(mesh.service.drain())
    await health_becomes(mesh, NOT_SERVING)
    refused = await mesh.generate()
    assert refused.failure.reason is Reason.DRAINING
    assert refused.failure.retry_after
    assert not draining.done()
    release.set()
    assert (await call.read()).HasField("delta")
    assert (await call.read()).HasField("finished")
    assert await call.read() is grpc.aio.EOF
    await draining


async def test_draining_does_not_wait_for_ever(peers: Mesh, fakes: Fakes) -> None:
    await peers.start_gateway(drain_seconds=0.1)
    worker = await peers.add_worker("w1", fakes.hanging)
    call = peers.call()
    await fakes.until(lambda: bool(worker.requests))
    await peers.service.drain()
    call.cancel()


async def test_a_plain_client_finds_the_service_by_reflection(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    files = await reflected_files(mesh.channel, SERVICE)
    pool = descriptor_pool.DescriptorPool()
    for file in in_order(files):
        pool.Add(file)
    service = pool.FindServiceByName(SERVICE)
    method = service.methods_by_name["Generate"]
    assert method.server_streaming
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    generate = mesh.channel.unary_stream(
        f"/{SERVICE}/Generate",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    request: Any = request_class()
    request.text = "Say hello"
    metadata = (("x-model-task", "financial-ner"),)
    answers: list[Any] = [answer async for answer in generate(request, metadata=metadata, timeout=30)]
    text = "".join(answer.delta.text for answer in answers)
    assert text == "Hello you"


async def reflected_files(
    channel: grpc.aio.Channel, symbol: str
) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The file that defines a symbol and all that it imports, as the server describes them."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    call = stub.ServerReflectionInfo(timeout=30)
    found: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    wanted = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)]
    while wanted:
        await call.write(wanted.pop())
        response = await call.read()
        for serialized in response.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
            found[file.name] = file
            wanted += [
                reflection_pb2.ServerReflectionRequest(file_by_filename=name)
                for name in file.dependency
                if name not in found
            ]
    await call.done_writing()
    return found


def in_order(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> list[descriptor_pb2.FileDescriptorProto]:
    """Each file after those that it imports."""
    ordered: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for needed in files[name].dependency:
                add(needed)
            ordered[name] = files[name]

    for name in files:
        add(name)
    return list(ordered.values())


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERMESH_GATEWAY_ROUTER", "dns:///routers:7701")
    monkeypatch.setenv("ADAPTERMESH_GATEWAY_STORE", "store:7702")
    monkeypatch.setenv("ADAPTERMESH_GATEWAY_PORT", "8000")
    settings = GatewaySettings()
    assert (settings.router, settings.store, settings.port) == ("dns:///routers:7701", "store:7702", 8000)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in GatewaySettings.model_fields.values())
