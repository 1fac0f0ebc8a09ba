import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.status import ResidencyView
from adaptermesh.worker.reporter import Reporter, ReporterConfig, resolve
from adaptermesh.worker.residency import StatusBoard
from tests.unit.worker.fake_peers import FakeRouter, serve_router, until
from tests.unit.worker.scripted_engine import ScriptedEngine

DIGEST = digest_bytes(b"adapter")
INFO = worker_pb2.WorkerInfo(worker_id="w-1", address="127.0.0.1:1")
QUICK = ReporterConfig(
    routers=("router:1",),
    interval_seconds=0.001,
    heartbeat_seconds=0.02,
    resolve_seconds=0.01,
    timeout_seconds=5,
    backoff_seconds=0.001,
)
SILENT_UNLESS_CHANGED = replace(QUICK, heartbeat_seconds=60)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def board(engine: ScriptedEngine) -> StatusBoard:
    board = StatusBoard(engine.status)
    engine.set_change_callback(board.touch)
    return board


@asynccontextmanager
async def reporting(
    board: StatusBoard, config: ReporterConfig, addresses: Callable[[], frozenset[str]]
) -> AsyncIterator[None]:
    async def resolver(_: str) -> frozenset[str]:
        return addresses()

    task = asyncio.create_task(Reporter(config, INFO, board, resolver).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def router_at(port: int = 0) -> AsyncIterator[tuple[FakeRouter, str]]:
    router = FakeRouter()  # type: ignore[abstract]
    server, bound = await serve_router(router, port)
    try:
        yield router, f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)


async def test_a_snapshot_comes_first_then_numbered_deltas(
    engine: ScriptedEngine, board: StatusBoard
) -> None:
    engine.hold(ResidencyView(DIGEST, Tier.HOST, pinned=False, requests=0, size_bytes=7))
    async with router_at() as (router, address):
        async with reporting(board, SILENT_UNLESS_CHANGED, lambda: frozenset({address})):
            await until(lambda: len(router.last) == 1)
            engine.hold(ResidencyView(DIGEST, Tier.DEVICE, pinned=False, requests=1, size_bytes=7))
            await until(lambda: len(router.last) == 2)
            engine.drop(DIGEST)
            await until(lambda: len(router.last) == 3)
        (snapshot,) = router.snapshots()
        assert snapshot.info.worker_id == "w-1"
        assert snapshot.state == worker_pb2.WORKER_STATE_READY
        assert [r.tier for r in snapshot.residencies] == [adapter_pb2.TIER_HOST]
        assert [report.sequence for report in router.last] == [1, 2, 3]
        tiers = [[r.tier for r in delta.residencies] for delta in router.deltas()]
        assert tiers == [[adapter_pb2.TIER_DEVICE], [adapter_pb2.TIER_STORE]]


async def test_admitted_requests_are_named_once(board: StatusBoard) -> None:
    async with router_at() as (router, address):
        async with reporting(board, QUICK, lambda: frozenset({address})):
            await until(lambda: len(router.last) >= 1)
            for number in range(50):
                board.admitted(f"r{number}")
                await asyncio.sleep(0)
            await until(lambda: sum(len(d.admitted_request_ids) for d in router.deltas()) >= 50)
        named = [name for delta in router.deltas() for name in delta.admitted_request_ids]
        assert named == [f"r{number}" for number in range(50)]


async def test_a_quiet_worker_sends_heartbeats(board: StatusBoard) -> None:
    async with router_at() as (router, address), reporting(board, QUICK, lambda: frozenset({address})):
        await until(lambda: len(router.deltas()) >= 3)


async def test_many_changes_are_one_report(engine: ScriptedEngine, board: StatusBoard) -> None:
    config = replace(SILENT_UNLESS_CHANGED, interval_seconds=0.05)
    async with router_at() as (router, address):
        async with reporting(board, config, lambda: frozenset({address})):
            await until(lambda: len(router.last) == 1)
            for number in range(200):
                engine.report(running=number)
            await until(lambda: any(d.load.running_requests == 199 for d in router.deltas()))
        assert len(router.deltas()) < 200


async def test_a_router_that_wants_a_snapshot_gets_one_on_the_same_stream(board: StatusBoard) -> None:
    board.admitted("r1")
    async with router_at() as (router, address):
        async with reporting(board, QUICK, lambda: frozenset({address})):
            await until(lambda: len(router.last) >= 2)
            router.want_snapshot = True
            await until(lambda: len(router.snapshots()) == 2)
        assert len(router.streams) == 1
        assert list(router.snapshots()[1].request_ids) == ["r1"]
        assert [report.sequence for report in router.last] == list(range(1, len(router.last) + 1))


async def test_a_stream_that_ends_is_opened_again_with_a_snapshot(board: StatusBoard) -> None:
    async with router_at() as (router, address):
        async with reporting(board, QUICK, lambda: frozenset({address})):
            await until(lambda: len(router.last) >= 1)
            router.hang_up.set()
            await until(lambda: len(router.streams) == 2 and len(router.last) >= 2)
        assert router.last[0].HasField("snapshot")
        assert router.last[0].sequence == 1


async def test_a_router_that_restarts_is_found_again(board: StatusBoard) -> None:
    async with router_at() as (router, address):
        port = int(address.rpartition(":")[2])
        task = reporting(board, QUICK, lambda: frozenset({address}))
        await task.__aenter__()
        await until(lambda: len(router.last) >= 1)
    async with router_at(port) as (restarted, _):
        await until(lambda: len(restarted.last) >= 1)
        assert restarted.last[0].HasField("snapshot")
        await task.__aexit__(None, None, None)


async def test_a_router_that_acknowledges_nothing_is_connected_anew(board: StatusBoard) -> None:
    config = replace(QUICK, timeout_seconds=0.1)
    async with router_at() as (router, address):
        router.silent = True
        async with reporting(board, config, lambda: frozenset({address})):
            await until(lambda: len(router.streams) >= 2)


async def test_every_address_behind_a_name_is_a_router_and_new_ones_are_found(board: StatusBoard) -> None:
    async with router_at() as (one, first), router_at() as (other, second):
        known = {first}
        async with reporting(board, QUICK, lambda: frozenset(known)):
            await until(lambda: len(one.last) >= 1)
            assert other.streams == []
            known.add(second)
            await until(lambda: len(other.last) >= 1)


async def test_a_router_that_left_the_name_is_kept_until_its_stream_breaks(board: StatusBoard) -> None:
    async with router_at() as (one, first), router_at() as (other, second):
        known = {first}
        async with reporting(board, QUICK, lambda: frozenset(known)):
            await until(lambda: len(one.last) >= 1)
            known.clear()
            known.add(second)
            await until(lambda: len(other.last) >= 1)
            heard = len(one.last)
            await until(lambda: len(one.last) > heard)
            one.hang_up.set()
            await until(lambda: one.ended == 1)
            heard = len(other.last)
            await until(lambda: len(other.last) > heard + 3)
        assert len(one.streams) == 1


async def test_a_name_service_that_fails_leaves_the_routers_that_are_known(board: StatusBoard) -> None:
    async with router_at() as (router, address):
        answers = iter([frozenset({address})])

        def addresses() -> frozenset[str]:
            found = next(answers, None)
            if found is None:
                raise OSError("no name service")
            return found

        async with reporting(board, QUICK, addresses):
            await until(lambda: len(router.last) >= 5)
        assert len(router.streams) == 1


async def test_localhost_counts_once() -> None:
    assert await resolve("127.0.0.1:7701") == frozenset({"127.0.0.1:7701"})
    assert await resolve("[::1]:7701") == frozenset({"[::1]:7701"})


async def test_a_drain_is_told_at_once(board: StatusBoard) -> None:
    async with router_at() as (router, address):
        async with reporting(board, SILENT_UNLESS_CHANGED, lambda: frozenset({address})):
            await until(lambda: len(router.last) == 1)
            board.start_draining()
            await until(lambda: len(router.deltas()) == 1)
        assert router.deltas()[0].state == worker_pb2.WORKER_STATE_DRAINING
