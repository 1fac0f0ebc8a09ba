from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.errors import Code, MeshError, Reason, not_found, unavailable
from adaptermesh.rpc.status import mesh_error_from

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Fakes, Mesh

OVERLOADED = MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "the queue is full", retry_after=2.5)
DRAINING = unavailable(Reason.DRAINING, "shutting down", 1.0)


async def test_the_routers_refusal_reaches_the_client_with_the_request_id(mesh: Mesh) -> None:
    def decide(request: Any) -> Any:
        raise not_found(Reason.TASK_NOT_FOUND, "task", "unknown")

    mesh.router.decide = decide
    seen = await mesh.generate(x_model_task="unknown", x_request_id="req-1")
    assert seen.failure.code is Code.NOT_FOUND
    assert seen.failure.reason is Reason.TASK_NOT_FOUND
    assert seen.failure.metadata == {"name": "unknown", "request_id": "req-1"}
    assert seen.trailing["x-request-id"] == "req-1"


async def test_a_router_that_is_gone_is_said_so_with_a_time_to_retry(mesh: Mesh) -> None:
    await mesh.router_server.stop(0)
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.failure.code is Code.UNAVAILABLE
    assert seen.failure.reason is Reason.ROUTER_UNREACHABLE
    assert seen.failure.retry_after
    assert seen.failure.metadata["request_id"] == "req-1"


async def test_a_router_that_does_not_answer_is_unreachable(peers: Mesh, fakes: Fakes) -> None:
    await peers.start_gateway(router_timeout_seconds=0.5)
    peers.router.hangs = True
    seen = await peers.generate()
    assert seen.failure.code is Code.UNAVAILABLE
    assert seen.failure.reason is Reason.ROUTER_UNREACHABLE
    assert seen.failure.retry_after


@pytest.mark.parametrize("refusal", [DRAINING, OVERLOADED, unavailable(Reason.WORKER_LOST, "x", 1.0)])
async def test_another_worker_is_tried_when_the_first_refuses(
    mesh: Mesh, fakes: Fakes, refusal: MeshError
) -> None:
    await mesh.add_worker("w1", fakes.refusing(refusal))
    await mesh.add_worker("w2")
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.error is None
    assert seen.initial["x-worker-id"] == "w2"
    assert [list(asked.excluded_worker_ids) for asked in mesh.router.requests] == [[], ["w1"]]


async def test_another_worker_is_tried_when_the_first_cannot_be_reached(mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        mesh.router.workers.append(("gone", f"127.0.0.1:{unused.getsockname()[1]}"))
    await mesh.add_worker("w2")
    seen = await mesh.generate()
    assert seen.error is None
    assert seen.initial["x-worker-id"] == "w2"


async def test_another_worker_is_tried_when_the_first_does_not_admit_in_time(
    peers: Mesh, fakes: Fakes
) -> None:
    await peers.start_gateway(admission_timeout_seconds=0.1)
    first = await peers.add_worker("w1", fakes.hanging)
    await peers.add_worker("w2")
    seen = await peers.generate()
    assert seen.error is None
    assert seen.initial["x-worker-id"] == "w2"
    await first.cancelled.wait()


async def test_another_worker_is_tried_when_the_address_has_been_taken_over(mesh: Mesh, fakes: Fakes) -> None:
    request = worker_pb2.GenerateRequest()
    await mesh.add_worker("w1", fakes.sending(fakes.started("somebody-else", request), fakes.finished()))
    await mesh.add_worker("w2")
    seen = await mesh.generate()
    assert seen.error is None
    assert seen.initial["x-worker-id"] == "w2"


async def test_another_worker_is_tried_when_the_first_ends_before_it_starts(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1", fakes.sending())
    await mesh.add_worker("w2")
    seen = await mesh.generate()
    assert seen.initial["x-worker-id"] == "w2"


async def test_no_more_workers_are_tried_than_the_setting_allows(mesh: Mesh, fakes: Fakes) -> None:
    workers = [await mesh.add_worker(f"w{number}", fakes.refusing(DRAINING)) for number in range(5)]
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.failure.reason is Reason.DRAINING
    assert seen.failure.retry_after == 1.0
    assert seen.failure.metadata == {"worker_id": "w2", "request_id": "req-1"}
    assert [len(worker.requests) for worker in workers] == [1, 1, 1, 0, 0]


async def test_the_only_workers_refusal_says_when_to_retry(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1", fakes.refusing(OVERLOADED))
    seen = await mesh.generate()
    assert seen.failure.code is Code.RESOURCE_EXHAUSTED
    assert seen.failure.reason is Reason.OVERLOADED
    assert seen.failure.retry_after == 2.5


async def test_a_refusal_that_another_worker_would_repeat_is_final(mesh: Mesh, fakes: Fakes) -> None:
    too_long = MeshError(Code.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG, "9 tokens are more than 8")
    await mesh.add_worker("w1", fakes.refusing(too_long))
    second = await mesh.add_worker("w2")
    seen = await mesh.generate()
    assert seen.failure.reason is Reason.PROMPT_TOO_LONG
    assert second.requests == []


async def test_a_worker_lost_in_the_middle_is_reported_with_request_and_worker(
    mesh: Mesh, fakes: Fakes
) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    _, wire = await mesh.add_wired_worker("w1", fakes.starting_then(hang))
    second = await mesh.add_worker("w2")
    call = mesh.call(x_request_id="req-1")
    assert (await call.read()).WhichOneof("event") == "started"
    assert (await call.read()).delta.text == "Hello"
    await wire.cut()
    seen = await rest_of(call)
    assert seen.code is Code.UNAVAILABLE
    assert seen.reason is Reason.WORKER_LOST
    assert seen.metadata == {"worker_id": "w1", "request_id": "req-1"}
    assert seen.retry_after
    assert second.requests == []


async def test_a_worker_that_is_stopped_in_the_middle_is_lost(mesh: Mesh, fakes: Fakes) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    worker = await mesh.add_worker("w1", fakes.starting_then(hang))
    call = mesh.call(x_request_id="req-1")
    await call.read()
    await call.read()
    await worker.server.stop(0)
    seen = await rest_of(call)
    assert seen.code is Code.UNAVAILABLE
    assert seen.reason is Reason.WORKER_LOST


async def test_a_worker_that_comes_back_at_its_address_serves_at_once(mesh: Mesh, fakes: Fakes) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    first, wire = await mesh.add_wired_worker("w1", fakes.starting_then(hang))
    call = mesh.call()
    await call.read()
    await wire.cut()
    assert (await rest_of(call)).reason is Reason.WORKER_LOST
    await wire.start((await mesh.add_worker("w2")).address)
    mesh.router.workers[:] = [("w2", wire.address)]
    seen = await mesh.generate()
    assert seen.error is None
    assert seen.initial["x-worker-id"] == "w2"
    assert len(first.requests) == 1


async def test_a_stream_that_ends_without_a_finish_is_an_error(mesh: Mesh, fakes: Fakes) -> None:
    async def end(context: Any) -> None:
        return

    await mesh.add_worker("w1", fakes.starting_then(end))
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.order == ["started", "delta"]
    assert seen.failure.code is Code.UNAVAILABLE
    assert seen.failure.reason is Reason.WORKER_LOST
    assert seen.failure.metadata["request_id"] == "req-1"


async def test_an_error_of_the_worker_after_it_started_is_passed_on(mesh: Mesh, fakes: Fakes) -> None:
    async def fail(context: Any) -> None:
        raise unavailable(Reason.STORE_UNREACHABLE, "no bytes", 3.0, digest="d")

    await mesh.add_worker("w1", fakes.starting_then(fail))
    second = await mesh.add_worker("w2")
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.failure.reason is Reason.STORE_UNREACHABLE
    assert seen.failure.retry_after == 3.0
    assert seen.failure.metadata == {"digest": "d", "worker_id": "w1", "request_id": "req-1"}
    assert second.requests == []


async def test_an_answer_of_the_base_never_passes_for_an_adapters(mesh: Mesh, fakes: Fakes) -> None:
    bare = fakes.started("w1", worker_pb2.GenerateRequest())
    await mesh.add_worker("w1", fakes.sending(bare, fakes.delta("Hello", 1), fakes.finished()))
    seen = await mesh.generate(x_model_task="financial-ner")
    assert seen.order == []
    assert seen.failure.code is Code.INTERNAL
    assert "acme/ner:v3" in seen.failure.message


@pytest.mark.parametrize("second", ["started", "nothing"])
async def test_a_message_out_of_order_is_an_error(mesh: Mesh, fakes: Fakes, second: str) -> None:
    first = fakes.started("w1", worker_pb2.GenerateRequest())
    strange = first if second == "started" else worker_pb2.GenerateResponse()
    await mesh.add_worker("w1", fakes.sending(first, strange, fakes.finished()))
    seen = await mesh.generate()
    assert seen.order == ["started"]
    assert seen.failure.code is Code.INTERNAL


async def test_output_before_the_start_is_an_error(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1", fakes.sending(fakes.delta("Hello", 1), fakes.finished()))
    seen = await mesh.generate()
    assert seen.order == []
    assert seen.failure.code is Code.INTERNAL


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": ""},
        {"worker_address": ""},
        {"base_digest": ""},
        {
            "version": adapter_pb2.Version(
                namespace="acme", name="other", number=3, digest="sha256:" + "0" * 64
            )
        },
        {"version": adapter_pb2.Version(namespace="acme", name="ner", number=4, digest="sha256:" + "0" * 64)},
        {"version": adapter_pb2.Version(namespace="acme", name="ner", number=3, digest="")},
    ],
)
async def test_a_decision_for_something_else_is_refused(mesh: Mesh, change: dict[str, Any]) -> None:
    worker = await mesh.add_worker("w1")

    def decide(request: Any) -> Any:
        response = mesh.router.first_worker(request)
        for name, value in change.items():
            if name == "version":
                response.version.CopyFrom(value)
            else:
                setattr(response, name, value)
        return response

    mesh.router.decide = decide
    seen = await mesh.generate(x_adapter_id="acme/ner:v3")
    assert seen.failure.code is Code.INTERNAL
    assert worker.requests == []


async def test_a_request_without_deadline_is_bounded_by_the_setting(peers: Mesh, fakes: Fakes) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    await peers.start_gateway(default_deadline_seconds=0.3)
    worker = await peers.add_worker("w1", fakes.starting_then(hang))
    seen = await peers.generate(timeout=None, x_request_id="req-1")
    assert seen.order == ["started", "delta"]
    assert seen.failure.code is Code.DEADLINE_EXCEEDED
    assert seen.failure.metadata["request_id"] == "req-1"
    assert seen.trailing["x-request-id"] == "req-1"
    await worker.cancelled.wait()


async def test_the_clients_deadline_ends_the_workers_call(mesh: Mesh, fakes: Fakes) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    worker = await mesh.add_worker("w1", fakes.starting_then(hang))
    seen = await mesh.generate(timeout=0.3)
    assert seen.failure.code is Code.DEADLINE_EXCEEDED
    await worker.cancelled.wait()


async def test_a_client_that_goes_away_cancels_the_workers_call(mesh: Mesh, fakes: Fakes) -> None:
    async def hang(context: Any) -> None:
        await asyncio.Event().wait()

    worker = await mesh.add_worker("w1", fakes.starting_then(hang))
    call = mesh.call()
    await call.read()
    await call.read()
    call.cancel()
    await asyncio.wait_for(worker.cancelled.wait(), 10)
    await fakes.until(lambda: mesh.service._gate.inside == 0)


async def test_a_client_that_goes_away_before_the_start_cancels_the_workers_call(
    mesh: Mesh, fakes: Fakes
) -> None:
    worker = await mesh.add_worker("w1", fakes.hanging)
    call = mesh.call()
    await fakes.until(lambda: bool(worker.requests))
    call.cancel()
    await asyncio.wait_for(worker.cancelled.wait(), 10)
    await fakes.until(lambda: mesh.service._gate.inside == 0)


async def test_more_requests_than_the_limit_are_refused_with_a_time_to_retry(
    peers: Mesh, fakes: Fakes
) -> None:
    await peers.start_gateway(max_requests_in_flight=1)
    worker = await peers.add_worker("w1", fakes.hanging)
    first = peers.call()
    await fakes.until(lambda: bool(worker.requests))
    seen = await peers.generate(x_request_id="req-2")
    assert seen.failure.code is Code.RESOURCE_EXHAUSTED
    assert seen.failure.reason is Reason.OVERLOADED
    assert seen.failure.retry_after
    assert seen.failure.metadata["request_id"] == "req-2"
    first.cancel()
    await worker.cancelled.wait()


async def test_an_unexpected_fault_is_internal_and_names_the_request(mesh: Mesh) -> None:
    mesh.service._servicer._placement = None  # type: ignore[assignment]
    seen = await mesh.generate(x_request_id="req-1")
    assert seen.failure.code is Code.INTERNAL
    assert seen.failure.metadata["request_id"] == "req-1"


async def rest_of(call: Any) -> MeshError:
    """The error that ends a call."""
    try:
        async with asyncio.timeout(10):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return mesh_error_from(error)
    raise AssertionError("the call ended without an error")
