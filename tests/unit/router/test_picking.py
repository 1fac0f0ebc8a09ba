import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.router.booking import Bookings
from adaptermesh.router.catalogue import BaseModel
from adaptermesh.router.picking import (
    RESIDENCY_WEIGHT,
    Pick,
    Wanted,
    is_overloaded,
    load_score,
    pick,
    residency_score,
)
from adaptermesh.router.workers import Load, Residency, Worker, WorkerState
from adaptermesh.testing.clock import ManualClock
from tests.unit.router.fakes import BASE, OTHER_BASE, worker_snapshot

DIGEST = digest_bytes(b"adapter")


def worker(
    worker_id: str,
    tier: Tier = Tier.STORE,
    running: int = 0,
    waiting: int = 0,
    base: BaseModel = BASE,
    state: WorkerState = WorkerState.READY,
    rows: int = 4,
    max_waiting: int = 8,
) -> Worker:
    """A worker with four rows and room for eight waiting requests."""
    held = {} if tier <= Tier.STORE else {DIGEST: Residency(DIGEST, tier)}
    info = worker_snapshot(worker_id, base, max_batch_rows=rows, max_waiting=max_waiting).info
    return Worker(info, state, Load(running, waiting), 0.0, held)


def choose(
    *workers: Worker, digest: str | None = DIGEST, excluded: tuple[str, ...] = (), **booked: int
) -> Pick:
    bookings = Bookings(ManualClock(), 10)
    for worker_id, count in booked.items():
        for number in range(count):
            bookings.book(f"{worker_id}-{number}", worker_id)
    return pick(workers, Wanted(BASE.digest, digest, frozenset(excluded)), bookings, 1.5)


def chosen(*workers: Worker, digest: str | None = DIGEST, **booked: int) -> str:
    return choose(*workers, digest=digest, excluded=(), **booked).worker.info.worker_id


@pytest.mark.parametrize(
    ("near", "far"),
    list(itertools.combinations((Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.STORE), 2)),
)
def test_the_nearer_tier_wins_while_its_worker_has_a_free_row(near: Tier, far: Tier) -> None:
    assert chosen(worker("a", near, running=3), worker("b", far)) == "a"
    assert chosen(worker("a", far), worker("b", near, running=3)) == "b"


@pytest.mark.parametrize(
    ("running", "waiting", "others", "wanted"),
    [
        (3, 0, 0, "near"),
        (4, 0, 0, "far"),
        (4, 0, 1, "near"),
        (4, 3, 3, "far"),
        (4, 3, 4, "near"),
        (4, 7, 4, "far"),
    ],
)
def test_residency_counts_until_a_whole_batch_more_is_outstanding_than_elsewhere(
    running: int, waiting: int, others: int, wanted: str
) -> None:
    near = worker("near", Tier.DEVICE, running, waiting)
    assert chosen(near, worker("far", running=others)) == wanted


def test_when_every_holder_is_overloaded_the_least_loaded_worker_wins() -> None:
    workers = (
        worker("a", Tier.DEVICE, running=4, waiting=4),
        worker("b", Tier.HOST, running=4, waiting=2),
        worker("c", running=1),
        worker("d"),
    )
    assert chosen(*workers) == "d"


def test_among_holders_of_one_tier_the_least_loaded_wins() -> None:
    assert chosen(worker("a", Tier.DEVICE, 2), worker("b", Tier.DEVICE, 1), worker("c", Tier.HOST)) == "b"


def test_load_is_relative_to_the_rows_that_a_step_can_hold() -> None:
    assert chosen(worker("small", running=1, rows=2), worker("large", running=4, rows=32)) == "large"


def test_booked_requests_count_as_load() -> None:
    assert chosen(worker("a"), worker("b", running=1), a=2) == "b"
    assert chosen(worker("a", Tier.DEVICE), worker("b"), a=4) == "b"


def test_the_bare_base_goes_to_the_least_loaded_worker_whatever_it_holds() -> None:
    picked = choose(worker("a", Tier.DEVICE, running=1), worker("b"), digest=None)
    assert picked.worker.info.worker_id == "b"
    assert picked.tier is Tier.NONE


def test_the_answer_names_the_reported_tier_and_the_number_of_candidates() -> None:
    picked = choose(worker("a", Tier.HOST), worker("b"), worker("c", base=OTHER_BASE))
    assert (picked.tier, picked.candidates) == (Tier.HOST, 2)
    assert choose(worker("b")).tier is Tier.STORE


def test_a_cold_adapter_that_is_on_its_way_to_a_worker_draws_the_next_requests_there() -> None:
    bookings = Bookings(ManualClock(), 10)
    workers = [worker(f"w{number}") for number in range(10)]
    homes = set()
    for number in range(4):
        picked = pick(workers, Wanted(BASE.digest, DIGEST), bookings, 1.0)
        worker_id = picked.worker.info.worker_id
        bookings.book(f"r{number}", worker_id)
        bookings.expect(worker_id, DIGEST)
        homes.add(worker_id)
    assert len(homes) == 1
    # Its four rows are taken: the fifth goes where there is room.
    assert pick(workers, Wanted(BASE.digest, DIGEST), bookings, 1.0).worker.info.worker_id not in homes


def test_an_adapter_on_disk_elsewhere_is_nearer_than_one_on_its_way_from_the_store() -> None:
    bookings = Bookings(ManualClock(), 10)
    bookings.expect("a", DIGEST)
    workers = [worker("a"), worker("b", Tier.DISK), worker("c")]
    assert pick(workers, Wanted(BASE.digest, DIGEST), bookings, 1.0).worker.info.worker_id == "b"
    assert pick([workers[0], workers[2]], Wanted(BASE.digest, DIGEST), bookings, 1.0).worker is workers[0]


def test_a_cold_adapter_has_one_home_and_homes_are_spread() -> None:
    workers = [worker(f"w{number}") for number in range(8)]
    digests = [digest_bytes(str(number).encode()) for number in range(400)]
    homes = {digest: chosen(*workers, digest=digest) for digest in digests}
    assert homes == {digest: chosen(*reversed(workers), digest=digest) for digest in digests}
    assert all(20 <= count <= 90 for count in Counter(homes.values()).values())
    left = [worker for worker in workers if worker.info.worker_id != "w3"]
    for digest in digests:
        if homes[digest] != "w3":
            assert chosen(*left, digest=digest) == homes[digest]


@pytest.mark.parametrize(
    "unfit",
    [
        worker("x", Tier.DEVICE, base=OTHER_BASE),
        worker("x", Tier.DEVICE, state=WorkerState.DRAINING),
        worker("x", Tier.DEVICE, state=WorkerState.UNSPECIFIED),
        worker("x", Tier.DEVICE, running=4, waiting=8),
        worker("x", Tier.DEVICE, running=0, waiting=8),
    ],
    ids=["another base", "draining", "unknown state", "full", "full queue"],
)
def test_a_worker_that_can_not_serve_is_never_chosen(unfit: Worker) -> None:
    assert chosen(unfit, worker("a", running=4, waiting=6)) == "a"


def test_a_worker_that_has_just_failed_for_the_request_is_left_out() -> None:
    picked = choose(worker("a", Tier.DEVICE), worker("b"), excluded=("a",))
    assert picked.worker.info.worker_id == "b"


@pytest.mark.parametrize(
    "workers",
    [
        (),
        (worker("a", state=WorkerState.DRAINING),),
        (worker("out"),),
        (worker("a", base=OTHER_BASE),),
    ],
    ids=["none", "draining", "excluded", "another base"],
)
def test_without_a_worker_that_takes_requests_the_answer_is_to_try_again(workers: tuple[Worker, ...]) -> None:
    with pytest.raises(MeshError) as caught:
        choose(*workers, excluded=("out",))
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.NO_WORKER)
    assert caught.value.retry_after == 1.5


@pytest.mark.parametrize(("waiting", "booked"), [(8, 0), (7, 1), (0, 8)])
def test_full_queues_everywhere_are_an_overload_with_a_delay(waiting: int, booked: int) -> None:
    with pytest.raises(MeshError) as caught:
        choose(worker("a", running=4, waiting=waiting), a=booked)
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    assert caught.value.retry_after == 1.5


@given(st.sampled_from(Tier), st.booleans(), st.floats(0, 1e6))
def test_scores_are_in_their_range(tier: Tier, expected: bool, batches: float) -> None:
    assert 0.0 <= residency_score(tier, expected) <= 1.0
    assert 0.0 < load_score(batches) <= 1.0


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_the_weight_of_residency_outweighs_load_unless_a_worker_is_overloaded(
    first: float, second: float
) -> None:
    low, high = sorted((first, second))
    steps = sorted({residency_score(tier, expected) for tier in Tier for expected in (True, False)})
    least_step = min(after - before for before, after in itertools.pairwise(steps))
    if not is_overloaded(high, low):
        assert load_score(low) - load_score(high) < RESIDENCY_WEIGHT * least_step
