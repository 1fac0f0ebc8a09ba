"""The router's gRPC surface, against a store that is one too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.router.service import GRPC_NAME, RouterService
from adaptermesh.router.settings import RouterSettings
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.telemetry.tracing import no_tracing

STORE_NAME = "adaptermesh.api.store.v1.StoreService"
BASE = adapter_pb2.BaseModel(model_id="tiny", digest=digest_bytes(b"base"))
SECONDS = 30.0
"""Bound on every wait of these tests; a passing one waits for no more than a few loop turns."""


def version(number: int = 1, name: str = "ner", **fields: Any) -> adapter_pb2.Version:
    return adapter_pb2.Version(
        namespace="acme",
        name=name,
        number=number,
        digest=digest_bytes(f"{name}{number}".encode()),
        base_digest=BASE.digest,
        base_model_id="tiny",
        description="finds names",
        op_kinds=["lowrank"],
        servable=True,
        source_files=[adapter_pb2.SourceFile(path="adapter_config.json", size_bytes=7)],
        **fields,
    )


def alias(number: int, generation: int = 1) -> adapter_pb2.Alias:
    return adapter_pb2.Alias(
        namespace="acme",
        name="ner",
        alias="prod",
        version_number=number,
        digest=version(number).digest,
        generation=generation,
    )


def route(task: str = "ner", *targets: tuple[str, int, str], generation: int = 1) -> adapter_pb2.Route:
    return adapter_pb2.Route(
        tenant="*",
        task=task,
        generation=generation,
        targets=[
            adapter_pb2.RouteTarget(ref=ref, weight=weight, cohort=cohort) for ref, weight, cohort in targets
        ],
    )


class FakeStore(store_pb2_grpc.StoreServiceServicer):
    """A store that keeps a log of changes and serves snapshots and watches of it."""

    def __init__(self) -> None:
        self.feed_id = "feed"
        self.log: list[store_pb2.Change] = []
        self._wakes: set[asyncio.Event] = set()

    def commit(self, **event: Any) -> int:
        self.log.append(store_pb2.Change(position=len(self.log) + 1, **event))
        for wake in self._wakes:
            wake.set()
        return len(self.log)

    async def GetSnapshot(self, request: Any, context: Any) -> AsyncIterator[store_pb2.GetSnapshotResponse]:
        position = len(self.log)
        yield store_pb2.GetSnapshotResponse(feed_id=self.feed_id, feed_position=position)
        # Each field holds what was set last; the fake's logs never set one thing twice before a snapshot.
        for change in self.log[:position]:
            part = store_pb2.GetSnapshotResponse(feed_id=self.feed_id, feed_position=position)
            match change.WhichOneof("event"):
                case "base_model_registered":
                    part.base_models.append(change.base_model_registered)
                case "version_published":
                    part.versions.append(change.version_published)
                case "alias_set":
                    part.aliases.append(change.alias_set)
                case "route_set":
                    part.routes.append(change.route_set)
            yield part

    async def WatchChanges(self, request: Any, context: Any) -> AsyncIterator[store_pb2.WatchChangesResponse]:
        if request.feed_id != self.feed_id or request.after_position > len(self.log):
            raise MeshError(Code.OUT_OF_RANGE, Reason.FEED_POSITION_EXPIRED, "take a snapshot")
        position = request.after_position
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            while True:
                wake.clear()
                for change in self.log[position:]:
                    position = change.position
                    yield store_pb2.WatchChangesResponse(head_position=len(self.log), change=change)
                yield store_pb2.WatchChangesResponse(head_position=len(self.log))
                await wake.wait()
        finally:
            self._wakes.discard(wake)


class FakeWorker:
    """A worker's report stream, driven by hand."""

    def __init__(self, stub: router_pb2_grpc.RouterServiceAsyncStub, worker_id: str) -> None:
        self.worker_id = worker_id
        self._outgoing: asyncio.Queue[router_pb2.ReportWorkerRequest | None] = asyncio.Queue()
        self.call = stub.ReportWorker(self._requests())
        self._answers = aiter(self.call)

    async def _requests(self) -> AsyncIterator[router_pb2.ReportWorkerRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def send(self, sequence: int, **report: Any) -> router_pb2.ReportWorkerResponse:
        self._outgoing.put_nowait(router_pb2.ReportWorkerRequest(sequence=sequence, **report))
        return await asyncio.wait_for(anext(self._answers), SECONDS)

    async def join(self, *residencies: worker_pb2.Residency, base: Any = BASE, **fields: Any) -> None:
        snapshot = router_pb2.WorkerSnapshot(
            info=worker_pb2.WorkerInfo(
                worker_id=self.worker_id,
                address=f"{self.worker_id}.test:7710",
                device="cpu",
                base_model=base,
                device_slots=4,
                max_batch_rows=4,
                max_waiting=8,
            ),
            state=worker_pb2.WORKER_STATE_READY,
            residencies=residencies,
            **fields,
        )
        answer = await self.send(1, snapshot=snapshot)
        assert answer.acknowledged_sequence == 1
        assert not answer.snapshot_wanted

    async def answers_left(self) -> int:
        """Waits for the router to end the stream."""
        count = 0
        async with asyncio.timeout(SECONDS):
            async for _ in self._answers:
                count += 1
        return count

    def finish(self) -> None:
        self._outgoing.put_nowait(None)


class Mesh:
    """A real router and a fake store, each behind a port."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.store = FakeStore()  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
        self.store_server = MeshServer(STORE_NAME, ServerConfig(), no_tracing())
        self.store_port = 0
        self.stub: router_pb2_grpc.RouterServiceAsyncStub
        self.service: RouterService

    async def start_store(self) -> None:
        self.store_server = MeshServer(STORE_NAME, ServerConfig(port=self.store_port), no_tracing())
        store_pb2_grpc.add_StoreServiceServicer_to_server(self.store, self.store_server.grpc)
        self.store_port = await self.store_server.start()

    async def start_router(self, **fields: Any) -> None:
        values: dict[str, Any] = {
            "store": f"127.0.0.1:{self.store_port}",
            "startup_wait_seconds": SECONDS,
            "catch_up_seconds": SECONDS,
            "startup_grace_seconds": 0,
            "feed_backoff_initial_seconds": 0.001,
            "feed_backoff_max_seconds": 0.01,
        }
        config = RouterSettings(**{**values, **fields})
        server = MeshServer(GRPC_NAME, ServerConfig(), no_tracing())
        self.service = RouterService(ServiceContext(config, no_tracing(), SystemClock(), server))
        self.service.register(server)
        port = await server.start()
        self._stack.push_async_callback(self.service.stop)
        self._stack.push_async_callback(server.stop, 0)
        self._stack.push_async_callback(self.service.drain)
        await self.service.start()
        channel = open_channel(f"127.0.0.1:{port}")
        self._stack.push_async_callback(channel.close)
        self.stub = router_pb2_grpc.RouterServiceStub(channel)

    def worker(self, worker_id: str = "w1") -> FakeWorker:
        made = FakeWorker(self.stub, worker_id)
        self._stack.callback(made.call.cancel)
        return made

    async def dispatch(self, timeout: float = SECONDS, **fields: Any) -> router_pb2.DispatchResponse:
        values = {"request_id": "r1", "tenant": "default", **fields}
        return await self.stub.Dispatch(router_pb2.DispatchRequest(**values), timeout=timeout)

    async def refusal(self, timeout: float = SECONDS, **fields: Any) -> MeshError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.dispatch(timeout, **fields)
        return mesh_error_from(caught.value)

    async def status(self) -> router_pb2.GetRouterStatusResponse:
        return await self.stub.GetRouterStatus(router_pb2.GetRouterStatusRequest(), timeout=SECONDS)

    async def workers(self) -> list[router_pb2.WorkerView]:
        response = await self.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=SECONDS)
        return list(response.workers)

    async def until_status(self, holds: Callable[[router_pb2.GetRouterStatusResponse], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not holds(await self.status()):
                pass

    async def until_workers(self, *worker_ids: str) -> None:
        async with asyncio.timeout(SECONDS):
            while [view.info.worker_id for view in await self.workers()] != list(worker_ids):
                pass


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        made = Mesh(stack)
        made.store.commit(base_model_registered=BASE)
        made.store.commit(version_published=version(1))
        made.store.commit(alias_set=alias(1))
        made.store.commit(route_set=route("ner", ("acme/ner@prod", 1, "stable"), generation=3))
        await made.start_store()
        stack.push_async_callback(lambda: made.store_server.stop(0))
        await made.start_router()
        yield made


async def test_a_task_is_dispatched_to_the_worker_that_holds_its_version(mesh: Mesh) -> None:
    await mesh.worker("w1").join()
    await mesh.worker("w2").join(
        worker_pb2.Residency(digest=version(1).digest, tier=adapter_pb2.TIER_DEVICE),
        load=worker_pb2.Load(running_requests=2),
    )
    response = await mesh.dispatch(task="ner")
    assert response == router_pb2.DispatchResponse(
        version=version(1),
        base_digest=BASE.digest,
        base_model_id="tiny",
        ref="acme/ner@prod",
        cohort="stable",
        route_generation=3,
        worker_id="w2",
        worker_address="w2.test:7710",
        tier=adapter_pb2.TIER_DEVICE,
        feed_position=4,
    )


async def test_the_bare_base_has_no_version_and_no_tier(mesh: Mesh) -> None:
    await mesh.worker().join()
    response = await mesh.dispatch()
    assert not response.HasField("version")
    assert (response.ref, response.base_digest, response.base_model_id) == ("base", BASE.digest, "tiny")
    assert response.tier == adapter_pb2.TIER_UNSPECIFIED


async def test_a_refusal_carries_reason_name_and_delay_over_the_wire(mesh: Mesh) -> None:
    missing = await mesh.refusal(task="sql")
    assert (missing.code, missing.reason, missing.metadata["name"]) == (
        Code.NOT_FOUND,
        Reason.TASK_NOT_FOUND,
        "sql",
    )
    nobody = await mesh.refusal(task="ner")
    assert (nobody.code, nobody.reason, nobody.retry_after) == (Code.UNAVAILABLE, Reason.NO_WORKER, 1.0)


async def test_what_was_committed_a_moment_ago_is_dispatched(mesh: Mesh) -> None:
    await mesh.worker().join()
    for number in range(2, 12):
        mesh.store.commit(version_published=version(number))
        response = await mesh.dispatch(ref=f"acme/ner:v{number}")
        assert response.version.number == number


async def test_a_revocation_is_followed_and_so_is_its_end(mesh: Mesh) -> None:
    await mesh.worker().join()
    revoked = version(
        1, status=adapter_pb2.VersionStatus(state=adapter_pb2.VERSION_STATE_REVOKED, reason="bad data")
    )
    position = mesh.store.commit(version_status_set=revoked)
    error = await mesh.refusal(task="ner", min_feed_position=position)
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_REVOKED)
    assert "bad data" in error.message
    old = adapter_pb2.VersionStatus(state=adapter_pb2.VERSION_STATE_DEPRECATED, replacement="acme/ner:v2")
    position = mesh.store.commit(version_status_set=version(1, status=old))
    response = await mesh.dispatch(task="ner", min_feed_position=position)
    assert list(response.warnings) == ["acme/ner:v1 is deprecated; use acme/ner:v2"]
    assert response.version.status == old


async def test_a_removal_is_followed_and_so_is_the_same_content_under_its_next_number(mesh: Mesh) -> None:
    await mesh.worker().join()
    second = version(2)
    mesh.store.commit(version_published=second)
    gone = adapter_pb2.DeletedVersion(
        namespace="acme", name="ner", number=2, digest=second.digest, actor="ada", reason="wrong"
    )
    gone.delete_time.FromSeconds(1_796_065_200)
    position = mesh.store.commit(version_deleted=gone)
    for ref in ("acme/ner:v2", f"acme/ner@{second.digest}"):
        error = await mesh.refusal(ref=ref, min_feed_position=position)
        assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.VERSION_DELETED)
        assert "was removed at 2026-11-30T19:00:00+00:00 by ada: wrong" in error.message
    second.number = 3
    position = mesh.store.commit(version_published=second)
    response = await mesh.dispatch(ref=f"acme/ner@{second.digest}", min_feed_position=position)
    assert response.version.number == 3


async def test_policies_and_signatures_are_followed(mesh: Mesh) -> None:
    await mesh.worker().join()
    key = adapter_pb2.SigningKey(key_id="ed25519:1")
    policy = adapter_pb2.NamespacePolicy(
        namespace="acme", signatures=adapter_pb2.SIGNATURE_POLICY_REQUIRED, keys=[key]
    )
    position = mesh.store.commit(namespace_policy_set=policy)
    error = await mesh.refusal(task="ner", min_feed_position=position)
    assert error.reason is Reason.VERSION_UNSIGNED
    position = mesh.store.commit(version_signed=version(1, signing_key_ids=["ed25519:1"]))
    response = await mesh.dispatch(task="ner", min_feed_position=position)
    assert list(response.version.signing_key_ids) == ["ed25519:1"]


async def test_an_alias_that_is_removed_is_not_found_any_more(mesh: Mesh) -> None:
    await mesh.worker().join()
    position = mesh.store.commit(alias_deleted=alias(1, generation=2))
    error = await mesh.refusal(ref="acme/ner@prod", min_feed_position=position)
    assert error.reason is Reason.ALIAS_NOT_FOUND


async def test_a_caller_reads_its_own_writes_by_their_position(mesh: Mesh) -> None:
    await mesh.worker().join()
    mesh.store.commit(version_published=version(2))
    for generation in range(2, 12):
        number = 1 + generation % 2
        position = mesh.store.commit(alias_set=alias(number, generation))
        response = await mesh.dispatch(task="ner", min_feed_position=position)
        assert response.version.number == number
        assert response.feed_position >= position


async def test_reports_are_shown_with_what_is_booked_and_gaps_are_answered(mesh: Mesh) -> None:
    worker = mesh.worker()
    await worker.join()
    await mesh.dispatch(request_id="r1", ref="acme/ner:v1")
    await mesh.dispatch(request_id="r2", ref="acme/ner:v1")
    residency = worker_pb2.Residency(
        digest=version(1).digest, tier=adapter_pb2.TIER_HOST, pinned=True, requests=1, size_bytes=9
    )
    load = worker_pb2.Load(
        running_requests=1,
        waiting_tokens=7,
        kv_used_tokens=3,
        kv_total_tokens=100,
        budgets=worker_pb2.Budgets(device_used_slots=2, host_used_bytes=5, host_budget_bytes=9),
    )
    delta = router_pb2.WorkerDelta(
        state=worker_pb2.WORKER_STATE_DRAINING,
        load=load,
        residencies=[residency],
        admitted_request_ids=["r1"],
    )
    (view,) = await mesh.workers()
    assert not view.load.HasField("budgets"), "this worker's snapshot tells of none"
    answer = await worker.send(2, delta=delta)
    assert (answer.acknowledged_sequence, answer.snapshot_wanted) == (2, False)
    (view,) = await mesh.workers()
    assert (view.info.device, view.info.device_slots) == ("cpu", 4)
    assert view.state == worker_pb2.WORKER_STATE_DRAINING
    assert view.load == load
    assert list(view.residencies) == [residency]
    assert view.booked_requests == 1
    answer = await worker.send(5, delta=delta)
    assert (answer.acknowledged_sequence, answer.snapshot_wanted) == (2, True)


async def test_a_report_without_content_ends_the_stream_with_the_reason(mesh: Mesh) -> None:
    worker = mesh.worker()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.send(1)
    assert mesh_error_from(caught.value).code is Code.INVALID_ARGUMENT


async def test_a_worker_is_gone_when_its_stream_ends_or_breaks(mesh: Mesh) -> None:
    ends, breaks = mesh.worker("w1"), mesh.worker("w2")
    await ends.join()
    await breaks.join()
    await mesh.until_workers("w1", "w2")
    breaks.call.cancel()
    await mesh.until_workers("w1")
    ends.finish()
    await mesh.until_workers()


async def test_a_worker_that_reconnects_replaces_its_old_stream_which_ends(mesh: Mesh) -> None:
    old, new = mesh.worker("w1"), mesh.worker("w1")
    await old.join()
    await new.join(load=worker_pb2.Load(running_requests=3))
    await old.send(2, delta=router_pb2.WorkerDelta(load=worker_pb2.Load(running_requests=9)))
    assert await old.answers_left() == 0
    (view,) = await mesh.workers()
    assert view.load.running_requests == 3


async def test_a_router_that_stops_ends_the_workers_streams(mesh: Mesh) -> None:
    worker = mesh.worker()
    await worker.join()
    await mesh.service.drain()
    assert await worker.answers_left() == 0
    await mesh.until_workers()


async def test_the_status_says_how_far_the_feed_was_followed(mesh: Mesh) -> None:
    await mesh.until_status(lambda status: status.feed_connected)
    status = await mesh.status()
    assert (status.feed_position, status.feed_head, status.versions, status.routes) == (4, 4, 1, 1)
    mesh.store.commit(route_deleted=adapter_pb2.Route(tenant="*", task="ner"))
    await mesh.until_status(lambda status: status.feed_position == 5)
    assert (await mesh.status()).routes == 0
    assert (await mesh.refusal(task="ner")).reason is Reason.TASK_NOT_FOUND


async def test_requests_go_on_while_the_store_is_away_and_the_feed_resumes(mesh: Mesh) -> None:
    await mesh.worker().join()
    await mesh.until_status(lambda status: status.feed_connected)
    await mesh.store_server.stop(0)
    await mesh.until_status(lambda status: not status.feed_connected)
    assert (await mesh.dispatch(task="ner")).version.number == 1
    assert (await mesh.refusal(task="sql")).reason is Reason.CATALOGUE_STALE
    mesh.store.commit(version_published=version(2))
    mesh.store.commit(alias_set=alias(2, 2))
    await mesh.start_store()
    await mesh.until_status(lambda status: status.feed_position == 6)
    assert (await mesh.dispatch(task="ner")).version.number == 2


async def test_another_store_behind_the_address_replaces_the_catalogue(mesh: Mesh) -> None:
    await mesh.until_status(lambda status: status.feed_connected)
    await mesh.store_server.stop(0)
    mesh.store.feed_id, mesh.store.log = "another", []
    mesh.store.commit(base_model_registered=BASE)
    await mesh.start_store()
    await mesh.until_status(lambda status: status.feed_position == 1 and status.feed_connected)
    status = await mesh.status()
    assert (status.versions, status.routes) == (0, 0)


async def test_without_a_store_the_router_starts_and_says_what_is_missing() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        await mesh.start_router(store="127.0.0.1:1", startup_wait_seconds=0)
        await mesh.worker().join()
        error = await mesh.refusal(task="ner")
        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.CATALOGUE_STALE)
        status = await mesh.status()
        assert (status.feed_position, status.feed_connected, status.versions) == (0, False, 0)


async def test_a_change_of_an_unknown_kind_is_answered_with_a_new_snapshot(mesh: Mesh) -> None:
    await mesh.until_status(lambda status: status.feed_connected)
    mesh.store.commit()
    await mesh.until_status(lambda status: status.feed_position == 5 and status.feed_connected)
    mesh.store.commit(version_published=version(2))
    await mesh.until_status(lambda status: status.versions == 2)


@pytest.mark.parametrize("fields", [{"task": ""}, {"ref": "x"}, {"request_id": ""}])
async def test_a_malformed_request_is_an_invalid_argument(mesh: Mesh, fields: dict[str, str]) -> None:
    assert (await mesh.refusal(**fields)).code is Code.INVALID_ARGUMENT  # type: ignore[arg-type]
