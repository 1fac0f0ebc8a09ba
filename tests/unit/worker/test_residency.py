import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView
from adaptermesh.worker.residency import MAX_PENDING_ADMISSIONS, Delta, Snapshot, StatusBoard
from tests.unit.worker.fake_peers import until

A, B = digest_bytes(b"a"), digest_bytes(b"b")


def view(digest: str, tier: Tier = Tier.HOST, requests: int = 0) -> ResidencyView:
    return ResidencyView(digest, tier, pinned=False, requests=requests, size_bytes=10)


class Engine:
    def __init__(self) -> None:
        self.views: tuple[ResidencyView, ...] = ()

    def status(self) -> EngineStatus:
        return EngineStatus(1, 2, 3, 4, 5, self.views)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def board(engine: Engine) -> StatusBoard:
    return StatusBoard(engine.status)


async def test_the_first_report_is_everything(engine: Engine, board: StatusBoard) -> None:
    engine.views = (view(A),)
    board.admitted("r1")
    with board.follow() as cursor:
        report = cursor.next_report()
    assert isinstance(report, Snapshot)
    assert (report.residencies, report.request_ids, report.draining) == ((view(A),), ("r1",), False)


async def test_a_delta_has_only_what_changed_and_what_is_gone(engine: Engine, board: StatusBoard) -> None:
    engine.views = (view(A), view(B))
    with board.follow() as cursor:
        cursor.next_report()
        engine.views = (view(A, Tier.DEVICE, requests=1),)
        board.admitted("r1")
        report = cursor.next_report()
        assert isinstance(report, Delta)
        assert report.residencies == (view(A, Tier.DEVICE, requests=1), view(B, Tier.STORE))
        assert report.admitted == ("r1",)
        again = cursor.next_report()
        assert isinstance(again, Delta)
        assert (again.residencies, again.admitted) == ((), ())


async def test_a_version_of_which_nothing_is_complete_is_not_held(engine: Engine, board: StatusBoard) -> None:
    engine.views = (view(A, Tier.STORE, requests=1),)
    assert board.snapshot().residencies == ()


async def test_each_router_has_its_own_position(engine: Engine, board: StatusBoard) -> None:
    with board.follow() as one, board.follow() as other:
        one.next_report()
        other.next_report()
        board.admitted("r1")
        assert one.next_report().admitted == ("r1",)  # type: ignore[union-attr]
        board.admitted("r2")
        assert one.next_report().admitted == ("r2",)  # type: ignore[union-attr]
        assert other.next_report().admitted == ("r1", "r2")  # type: ignore[union-attr]


async def test_a_wanted_snapshot_has_the_requests_that_run(board: StatusBoard) -> None:
    with board.follow() as cursor:
        cursor.next_report()
        board.admitted("r1")
        board.admitted("r2")
        board.finished("r1")
        cursor.want_snapshot()
        assert cursor.changed.is_set()
        report = cursor.next_report()
    assert isinstance(report, Snapshot)
    assert report.request_ids == ("r2",)


async def test_a_router_that_reads_nothing_costs_bounded_memory_and_gets_a_snapshot(
    board: StatusBoard,
) -> None:
    with board.follow() as cursor:
        cursor.next_report()
        for number in range(MAX_PENDING_ADMISSIONS + 1):
            board.admitted(str(number))
        assert isinstance(cursor.next_report(), Snapshot)


async def test_a_change_on_the_engines_thread_wakes_the_cursors(board: StatusBoard) -> None:
    with board.follow() as cursor, ThreadPoolExecutor(1) as thread:
        cursor.next_report()
        for _ in range(100):
            thread.submit(board.touch)
        await until(cursor.changed.is_set)


async def test_two_requests_of_one_id_are_both_waited_for(board: StatusBoard) -> None:
    board.admitted("r1")
    board.admitted("r1")
    board.finished("r1")
    waiting = asyncio.ensure_future(board.wait_idle())
    await asyncio.sleep(0)
    assert not waiting.done()
    board.finished("r1")
    await waiting
