from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.router.booking import Bookings
from adaptermesh.router.settings import RouterSettings
from adaptermesh.router.workers import (
    Acknowledgement,
    Delta,
    Load,
    Residency,
    Snapshot,
    Worker,
    WorkerRegistry,
    WorkerState,
)
from adaptermesh.testing.clock import ManualClock
from tests.unit.router.fakes import BASE, OTHER_BASE, worker_delta, worker_snapshot

SETTINGS = RouterSettings(worker_timeout_seconds=5, base_return_seconds=60, startup_grace_seconds=3)
DIGESTS = [digest_bytes(str(number).encode()) for number in range(4)]


class Registry:
    """A registry with its clock and bookings at hand."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bookings = Bookings(self.clock, 10)
        self.registry = WorkerRegistry(self.bookings, self.clock, SETTINGS)
        self.open = self.registry.open_stream

    def workers(self) -> dict[str, Worker]:
        return {worker.info.worker_id: worker for worker in self.registry.live()}


@pytest.fixture
def known() -> Registry:
    return Registry()


def at(number: int, tier: Tier, requests: int = 0) -> Residency:
    return Residency(DIGESTS[number], tier, requests=requests)


def test_a_worker_is_there_from_its_snapshot_to_the_end_of_its_stream(known: Registry) -> None:
    stream = known.open()
    assert known.workers() == {}
    snapshot = worker_snapshot(load=Load(2, 1), residencies=[at(0, Tier.DEVICE)])
    assert stream.take(1, snapshot) == Acknowledgement(1)
    worker = known.workers()["w1"]
    assert worker.info == snapshot.info
    assert worker.load == Load(2, 1)
    assert worker.residencies == {DIGESTS[0]: at(0, Tier.DEVICE)}
    stream.close()
    assert known.workers() == {}


def test_a_stream_that_never_reported_ends_without_a_trace(known: Registry) -> None:
    known.open().close()
    assert known.workers() == {}


def test_deltas_change_what_they_name_and_leave_the_rest(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot(residencies=[at(0, Tier.DEVICE), at(1, Tier.DISK)]))
    stream.take(2, worker_delta(running=3, residencies=[at(1, Tier.HOST, 1), at(2, Tier.DISK)]))
    stream.take(3, worker_delta(waiting=1, residencies=[at(0, Tier.STORE)], state=WorkerState.DRAINING))
    worker = known.workers()["w1"]
    assert worker.residencies == {DIGESTS[1]: at(1, Tier.HOST, 1), DIGESTS[2]: at(2, Tier.DISK)}
    assert worker.load == Load(0, 1)
    assert worker.state is WorkerState.DRAINING


def test_after_a_gap_only_a_snapshot_is_taken_in(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    assert stream.take(3, worker_delta(running=9)) == Acknowledgement(1, snapshot_wanted=True)
    assert stream.take(4, worker_delta(running=9)) == Acknowledgement(1, snapshot_wanted=True)
    assert known.workers()["w1"].load == Load()
    assert stream.take(5, worker_snapshot(load=Load(2))) == Acknowledgement(5)
    assert stream.take(6, worker_delta(running=3)) == Acknowledgement(6)
    assert known.workers()["w1"].load == Load(3)


def test_a_stream_that_begins_with_a_delta_is_asked_for_a_snapshot(known: Registry) -> None:
    stream = known.open()
    assert stream.take(1, worker_delta()) == Acknowledgement(0, snapshot_wanted=True)
    assert known.workers() == {}
    assert stream.take(2, worker_snapshot()) == Acknowledgement(2)


def test_a_report_that_was_taken_in_before_changes_nothing(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    stream.take(2, worker_delta(running=1))
    assert stream.take(2, worker_delta(running=9)) == Acknowledgement(2)
    assert known.workers()["w1"].load == Load(1)


def test_the_same_worker_on_a_new_stream_replaces_the_old_one(known: Registry) -> None:
    old, new = known.open(), known.open()
    old.take(1, worker_snapshot(load=Load(1)))
    new.take(1, worker_snapshot(load=Load(2)))
    assert old.take(2, worker_delta(running=9)) == Acknowledgement(1, replaced=True)
    assert old.take(3, worker_snapshot(load=Load(9))) == Acknowledgement(1, replaced=True)
    old.close()
    assert known.workers()["w1"].load == Load(2)
    new.close()
    assert known.workers() == {}


def test_a_worker_that_falls_silent_is_gone_and_comes_back_with_a_snapshot(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    known.clock.advance(4)
    stream.take(2, worker_delta())
    known.clock.advance(5)
    assert list(known.workers()) == ["w1"]
    known.clock.advance(0.1)
    assert known.workers() == {}
    assert stream.take(3, worker_delta()) == Acknowledgement(2, snapshot_wanted=True)
    assert known.workers() == {}
    assert stream.take(4, worker_snapshot()) == Acknowledgement(4)
    assert list(known.workers()) == ["w1"]
    stream.close()
    assert known.workers() == {}


def test_the_old_stream_of_a_worker_that_fell_silent_does_not_end_its_new_one(known: Registry) -> None:
    old, new = known.open(), known.open()
    old.take(1, worker_snapshot())
    known.clock.advance(6)
    assert known.workers() == {}
    new.take(1, worker_snapshot())
    old.close()
    assert list(known.workers()) == ["w1"]


def test_admitted_requests_end_their_bookings(known: Registry) -> None:
    stream = known.open()
    for number in range(4):
        known.bookings.book(f"r{number}", "w1")
    stream.take(1, worker_snapshot(request_ids=["r0"]))
    assert known.bookings.counts.get("w1", 0) == 3
    stream.take(2, worker_delta(admitted=["r1", "r2"]))
    assert known.bookings.counts.get("w1", 0) == 1
    stream.take(9, worker_delta(admitted=["r3"]))
    assert known.bookings.counts.get("w1", 0) == 1


def test_an_adapter_is_expected_while_it_is_fetched_and_no_longer_when_it_is_there(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    known.bookings.expect("w1", DIGESTS[0])
    stream.take(2, worker_delta(residencies=[at(0, Tier.STORE, requests=1), at(1, Tier.STORE, requests=2)]))
    assert "w1" in known.bookings.expecting(DIGESTS[0])
    assert "w1" in known.bookings.expecting(DIGESTS[1])
    stream.take(3, worker_delta(residencies=[at(0, Tier.HOST, requests=1), at(1, Tier.STORE)]))
    assert "w1" not in known.bookings.expecting(DIGESTS[0])
    assert "w1" not in known.bookings.expecting(DIGESTS[1])
    assert list(known.workers()["w1"].residencies) == [DIGESTS[0]]


def test_a_worker_that_is_gone_takes_its_bookings_along(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    known.bookings.book("r1", "w1")
    stream.close()
    assert known.bookings.counts.get("w1", 0) == 0


def test_a_base_that_was_served_a_short_while_ago_may_return(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot())
    known.clock.advance(4)
    stream.close()
    assert known.registry.base_may_return(BASE.digest)
    assert not known.registry.base_may_return(OTHER_BASE.digest)
    known.clock.advance(60)
    assert not known.registry.base_may_return(BASE.digest)


def test_every_base_may_return_just_after_the_start(known: Registry) -> None:
    assert known.registry.base_may_return(OTHER_BASE.digest)
    known.clock.advance(3)
    assert not known.registry.base_may_return(OTHER_BASE.digest)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("worker_id", "", "info.worker_id"),
        ("address", "", "info.address"),
        ("base_digest", "tiny", "info.base_model.digest"),
        ("max_batch_rows", 0, "info.max_batch_rows"),
    ],
)
def test_a_snapshot_that_can_not_be_a_workers_is_refused(
    known: Registry, field: str, value: Any, named: str
) -> None:
    good = worker_snapshot()
    bad = replace(good, info=replace(good.info, **{field: value}))
    with pytest.raises(MeshError) as caught:
        known.open().take(1, bad)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == named
    assert known.workers() == {}


def test_a_stream_can_not_change_its_worker(known: Registry) -> None:
    stream = known.open()
    stream.take(1, worker_snapshot("w1"))
    with pytest.raises(MeshError):
        stream.take(2, worker_snapshot("w2"))
    assert list(known.workers()) == ["w1"]


RESIDENCIES = st.lists(
    st.builds(at, st.integers(0, 3), st.sampled_from(list(Tier)[1:]), st.integers(0, 2)), max_size=3
)
REPORTS = st.one_of(
    st.builds(lambda held: worker_snapshot(residencies=held), RESIDENCIES),
    st.builds(
        lambda running, held: worker_delta(running=running, residencies=held), st.integers(0, 9), RESIDENCIES
    ),
)
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["next", "next", "next", "lost", "again", "close", "silence"]),
        REPORTS,
    ),
    max_size=40,
)


def replayed(log: list[tuple[int, Snapshot | Delta]]) -> tuple[Load, dict[str, Residency]]:
    """What a stream's reports amount to: its last snapshot and the unbroken run of deltas after it."""
    start = max(place for place, (_, report) in enumerate(log) if isinstance(report, Snapshot))
    taken, first = log[start]
    load, merged = first.load, {residency.digest: residency for residency in first.residencies}
    for sequence, report in log[start + 1 :]:
        if sequence == taken + 1:
            taken, load = sequence, report.load
            merged |= {residency.digest: residency for residency in report.residencies}
    return load, {digest: residency for digest, residency in merged.items() if residency.tier > Tier.STORE}


@given(EVENTS)
def test_a_workers_state_is_always_its_snapshot_and_the_unbroken_run_of_deltas_after_it(
    events: list[tuple[int, str, Snapshot | Delta]],
) -> None:
    known = Registry()
    streams = [known.open(), known.open()]
    sequences = [0, 0]
    has_spoken = [False, False]
    speaker: int | None = None
    log: list[tuple[int, Snapshot | Delta]] = []
    for which, what, report in events:
        if what == "silence":
            known.clock.advance(SETTINGS.worker_timeout_seconds + 1)
            speaker = None
        elif what == "close":
            streams[which].close()
            streams[which], sequences[which], has_spoken[which] = known.open(), 0, False
            speaker = None if speaker == which else speaker
        else:
            sequences[which] += {"next": 1, "lost": 2, "again": 0}[what]
            answer = streams[which].take(sequences[which], report)
            replaced = has_spoken[which] and speaker not in (None, which)
            assert answer.replaced is replaced
            if isinstance(report, Snapshot) and not replaced:
                speaker, log, has_spoken[which] = which, [], True
            if speaker == which:
                log.append((sequences[which], report))
        if speaker is None:
            assert known.workers() == {}
        else:
            worker = known.workers()["w1"]
            assert (worker.load, worker.residencies) == replayed(log)
