"""The tier table as a state machine, and what it prefers to keep."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.entry import Flight
from adaptermesh.worker.engine.tiers import HALF_LIFE_SECONDS, SlotGrant, TierTable

SLOTS, HOST_BYTES, DISK_BYTES, DEVICE_BYTES = 3, 100, 150, 70
NAMES = [f"d{number}" for number in range(7)]


def size_of(digest: str) -> int:
    return 10 + 7 * int(digest[1:])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def evicted_by(grant: SlotGrant) -> set[str]:
    return {one.digest for one in grant.evicted}


def evict(table: TierTable, digest: str) -> None:
    """Drops all of an adapter that nobody holds, as `residency` does by name."""
    entry = table.get(digest)
    if entry is not None:
        table.unpin(digest)
        table.drop_disk(digest)
        if entry.on_host:
            table.drop_host(digest)
        if entry.slot is not None:
            table.drop_slot(digest)


class TierMachine(RuleBasedStateMachine):
    """Drives the table as `residency` does, with a model of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = TierTable(self.clock, SLOTS, HOST_BYTES, DISK_BYTES, DEVICE_BYTES)
        self.waiters: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self.flights: dict[str, bool] = {}  # digest -> room reserved
        self.pins: dict[str, Tier] = {}
        self.count = 0

    def ensure(self, digest: str) -> None:
        flight = self.table.start_flight(digest)
        if flight is not Flight.NONE:
            assert digest not in self.flights
            self.flights[digest] = False

    def ensure_evicted(self, grant: SlotGrant) -> None:
        """Who gave way and is still wanted is brought back to the host."""
        for digest in evicted_by(grant):
            if self.table.get(digest) is not None:
                self.ensure(digest)

    def resume(self) -> None:
        for digest in self.table.resume():
            self.ensure(digest)

    def leave(self, holder: str) -> None:
        """A row ends."""
        self.table.unuse(self.rows.pop(holder))
        self.give_back(holder)

    def give_back(self, holder: str) -> None:
        orphan = self.table.drop(holder)
        if orphan is not None:
            assert orphan.digest not in {*self.waiters.values(), *self.rows.values()}
            self.table.end_flight(orphan.digest)
            self.flights.pop(orphan.digest, None)

    @rule(seconds=st.floats(0.0, 200.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(digest=st.sampled_from(NAMES))
    def want(self, digest: str) -> None:
        self.count += 1
        self.waiters[f"w{self.count}"] = digest
        self.table.want(f"w{self.count}", digest)
        self.ensure(digest)

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.waiters)))
        del self.waiters[holder]
        self.give_back(holder)
        self.resume()

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.flights)))
        if not self.flights[digest]:
            if self.table.reserve_host(digest, size_of(digest), size_of(digest)) is None:
                del self.flights[digest]
                self.table.postpone(digest)
            else:
                self.flights[digest] = True
            return
        del self.flights[digest]
        self.table.land(digest)
        self.table.add_disk(digest, size_of(digest))
        if digest in self.rows.values():
            # As the next step does, which stages what is missing.
            self.table.complete_slot(digest)
        self.resume()

    @precondition(lambda self: any(self.flights.values()))
    @rule(data=st.data(), layers=st.integers(1, 3))
    def a_layer_arrives(self, data: st.DataObject, layers: int) -> None:
        reserved = sorted(digest for digest, room in self.flights.items() if room)
        self.table.arrive(data.draw(st.sampled_from(reserved)), layers)

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def run_row_early(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.waiters)))
        digest = self.waiters[holder]
        entry = self.table.get(digest)
        assert entry is not None
        if not entry.arrived:
            return
        if entry.slot is None:
            grant = self.table.take_slot(digest)
            if grant is None:
                return
            assert evicted_by(grant).isdisjoint({*self.rows.values(), *self.waiters.values()})
        assert entry.partial
        assert entry.tier < Tier.HOST
        self.table.use(digest)
        self.rows[holder] = digest
        del self.waiters[holder]

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.flights)))
        del self.flights[digest]
        waiting = {holder for holder, wanted in self.waiters.items() if wanted == digest}
        running = {holder for holder, wanted in self.rows.items() if wanted == digest}
        assert set(self.table.end_flight(digest)) == waiting | running
        for holder in waiting:
            del self.waiters[holder]
        freed = [self.table.unuse(self.rows.pop(holder)) for holder in running]
        assert sum(slot is not None for slot in freed) == bool(running)
        self.resume()

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def run_row(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.waiters)))
        digest = self.waiters[holder]
        entry = self.table.get(digest)
        assert entry is not None
        if not entry.is_whole:
            return
        if entry.slot is None:
            used = set(self.rows.values())
            grant = self.table.take_slot(digest)
            if grant is None:
                stays = [one for one in self.table if one.slot is not None and not one.idle_slot]
                taken = sum(one.device_bytes for one in stays)
                assert len(stays) >= SLOTS or taken + entry.device_bytes > DEVICE_BYTES
                return
            assert evicted_by(grant).isdisjoint(used)
            self.ensure_evicted(grant)
        self.table.use(digest)
        self.rows[holder] = digest
        del self.waiters[holder]
        self.resume()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end_row(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.rows)))
        self.leave(holder)
        self.resume()

    @rule(digest=st.sampled_from(NAMES))
    def lose_the_disk_copy(self, digest: str) -> None:
        entry = self.table.get(digest)
        if entry is not None and entry.flight is Flight.NONE and entry.kept is not Tier.DISK:
            self.table.drop_disk(digest)

    @precondition(lambda self: any(entry.tier > Tier.STORE for entry in self.table))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        held = {entry.digest: entry.tier for entry in self.table if entry.tier > Tier.STORE}
        digest = data.draw(st.sampled_from(sorted(held)))
        tier = Tier(data.draw(st.integers(Tier.DISK, held[digest])))
        self.table.pin(digest, tier)
        self.pins[digest] = max(tier, self.pins.get(digest, Tier.NONE))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.pins)))
        del self.pins[digest]
        self.table.unpin(digest)
        self.resume()

    @rule(digest=st.sampled_from(NAMES))
    def evict_by_name(self, digest: str) -> None:
        entry = self.table.get(digest)
        if entry is None or entry.holders:
            return
        self.pins.pop(digest, None)
        evict(self.table, digest)
        assert self.table.get(digest) is None
        self.resume()

    @invariant()
    def what_is_pinned_stays_in_its_tier(self) -> None:
        for digest, tier in self.pins.items():
            entry = self.table.get(digest)
            assert entry is not None
            assert entry.pinned is tier
            assert entry.tier >= tier
        assert {entry.digest for entry in self.table if entry.pinned} == set(self.pins)

    @invariant()
    def budgets_hold(self) -> None:
        entries = list(self.table)
        host = sum(entry.size_bytes for entry in entries if entry.on_host)
        reserved = sum(entry.reserved_bytes for entry in entries)
        assert self.table.host_used == host + reserved <= HOST_BYTES
        on_disk = sum(entry.size_bytes for entry in entries if entry.on_disk)
        assert self.table.disk_used == on_disk
        reading = sum(entry.size_bytes for entry in entries if entry.flight is Flight.DISK)
        assert on_disk <= max(DISK_BYTES, reading)

    @invariant()
    def slots_are_held_once(self) -> None:
        slots = [entry.slot for entry in self.table if entry.slot is not None]
        assert len(slots) == len(set(slots)) <= SLOTS
        held = sum(entry.device_bytes for entry in self.table if entry.slot is not None)
        assert self.table.device_used == held <= DEVICE_BYTES
        assert self.table.empty_slots == SLOTS - len(slots)

    @invariant()
    def a_slot_that_lacks_layers_is_in_use_and_its_adapter_on_the_way(self) -> None:
        for entry in self.table.partial:
            assert entry.partial
            assert entry.uses
            assert entry.flight is Flight.FETCH or entry.flight is Flight.DISK
        assert len(self.table.partial) == sum(entry.partial for entry in self.table)

    @invariant()
    def what_runs_has_its_slot(self) -> None:
        for digest in self.rows.values():
            entry = self.table.get(digest)
            assert entry is not None
            assert entry.slot is not None
            assert entry.uses == sum(other == digest for other in self.rows.values())

    @invariant()
    def who_waits_is_served_or_on_the_way(self) -> None:
        for digest in self.waiters.values():
            entry = self.table.get(digest)
            assert entry is not None
            assert entry.slot is not None or entry.on_host or entry.flight is not Flight.NONE
            if entry.flight in (Flight.FETCH, Flight.DISK):
                assert digest in self.flights

    def teardown(self) -> None:
        """Whatever happened: with rows ended, pins off and flights landing, each waiter gets its slot."""
        for digest in self.pins:
            self.table.unpin(digest)
        for holder in sorted(self.rows):
            self.leave(holder)
        for _ in range(200):
            self.resume()
            for digest in sorted(self.flights):
                reserved = self.flights.pop(digest)
                if not reserved and self.table.reserve_host(digest, size_of(digest), size_of(digest)) is None:
                    self.table.postpone(digest)
                    continue
                self.table.land(digest)
            for holder, digest in sorted(self.waiters.items()):
                entry = self.table.get(digest)
                assert entry is not None
                if entry.slot is None and entry.on_host:
                    grant = self.table.take_slot(digest)
                    assert grant is not None
                    self.ensure_evicted(grant)
                if entry.slot is not None:
                    del self.waiters[holder]
                    self.table.drop(holder)
            if not self.waiters:
                break
        assert not self.waiters
        for entry in self.table:
            assert entry.flight is Flight.NONE
            assert not entry.holders


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def resident(table: TierTable, digest: str, size: int, *, wants: int = 1) -> None:
    """Brings an adapter to the host and leaves it idle there."""
    for number in range(wants):
        table.want(f"{digest}-{number}", digest)
    if table.start_flight(digest) is not Flight.NONE:
        assert table.reserve_host(digest, size) is not None
        table.land(digest)
    for number in range(wants):
        table.drop(f"{digest}-{number}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_least_used_goes_first(clock: Clock) -> None:
    table = TierTable(clock, 1, 30, 0)
    resident(table, "often", 10, wants=3)
    resident(table, "once", 10)
    resident(table, "twice", 10, wants=2)
    table.want("new", "new")
    table.start_flight("new")
    assert table.reserve_host("new", 10) == ["once"]


def on_device(table: TierTable, digest: str, device_bytes: int) -> None:
    """Brings an adapter to a slot and leaves it idle there."""
    table.want(digest, digest)
    table.start_flight(digest)
    assert table.reserve_host(digest, 1, device_bytes) is not None
    table.land(digest)
    assert table.take_slot(digest) is not None
    table.drop(digest)


def test_a_large_adapter_takes_the_room_of_several_and_spares_who_need_not_go(clock: Clock) -> None:
    table = TierTable(clock, 5, 1000, 0, device_bytes=100)
    for digest, size in (("a", 20), ("b", 60), ("c", 20)):
        on_device(table, digest, size)
        clock.now += 100.0
    assert table.device_used == 100
    table.want("waiting", "large")
    table.start_flight("large")
    table.reserve_host("large", 1, 70)
    table.land("large")
    assert not table.has_empty_slot("large")
    assert table.has_slot("large")
    assert table.device_room == 100
    grant = table.take_slot("large")
    # "a" was used longest ago, but together with "b" it is "a" and 60 bytes; both are needed.
    assert grant is not None
    assert evicted_by(grant) == {"a", "b"}
    assert table.device_used == 90
    table.use("large")
    table.want("too", "small")
    table.start_flight("small")
    table.reserve_host("small", 1, 40)
    table.land("small")
    assert table.take_slot("small") is None
    assert not table.has_slot("small")
    table.unuse("large")
    table.drop("waiting")
    grant = table.take_slot("small")
    assert grant is not None
    # The one that brings enough goes; the other one would have gone before it, and may stay.
    assert evicted_by(grant) == {"large"}
    assert table.device_used == 60


def test_old_uses_count_less(clock: Clock) -> None:
    table = TierTable(clock, 1, 20, 0)
    resident(table, "old", 10, wants=3)
    clock.now += 3 * HALF_LIFE_SECONDS
    resident(table, "fresh", 10)
    table.want("new", "new")
    table.start_flight("new")
    assert table.reserve_host("new", 10) == ["old"]


def test_what_is_on_disk_goes_before_what_only_the_store_has(clock: Clock) -> None:
    table = TierTable(clock, 1, 20, 100)
    resident(table, "a-stored", 10)
    resident(table, "b-on-disk", 10)
    table.add_disk("b-on-disk", 10)
    table.want("new", "new")
    table.start_flight("new")
    assert table.reserve_host("new", 10) == ["b-on-disk"]


def test_a_large_one_goes_before_a_small_one(clock: Clock) -> None:
    table = TierTable(clock, 1, 50, 0)
    resident(table, "a-small", 10)
    resident(table, "b-large", 40)
    table.want("new", "new")
    table.start_flight("new")
    assert table.reserve_host("new", 10) == ["b-large"]


def test_the_same_calls_give_the_same_decisions() -> None:
    def play() -> list[str]:
        table = TierTable(Clock(), 1, 35, 0)
        for number in range(6):
            resident(table, f"d{number}", 10 + number)
        return [entry.digest for entry in table]

    assert play() == play()


def test_a_pinned_slot_is_never_granted_to_another(clock: Clock) -> None:
    table = TierTable(clock, 1, 100, 0)
    resident(table, "pinned", 10)
    resident(table, "other", 10)
    assert table.take_slot("pinned") is not None
    table.pin("pinned", Tier.DEVICE)
    assert table.take_slot("other") is None
    entry = table.get("pinned")
    assert entry is not None
    assert entry.tier is Tier.DEVICE


def serve(table: TierTable, digest: str, to_slot: bool) -> None:
    """Brings an adapter to the host, and into a slot, as far as there is room; then nobody holds it."""
    entry = table.want("holder", digest)
    flies = table.start_flight(digest) is not Flight.NONE
    if flies and table.reserve_host(digest, 10) is not None:
        table.add_disk(digest, 10)
        table.land(digest)
    if to_slot and (entry.slot is not None or (entry.on_host and table.take_slot(digest) is not None)):
        table.use(digest)
        table.unuse(digest)
    if table.drop("holder") is not None:
        table.end_flight(digest)


@settings(max_examples=400, deadline=None)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["serve", "serve", "load", "pin", "pin", "unpin", "evict"]),
            st.sampled_from(NAMES[:3]),
            st.sampled_from([Tier.DISK, Tier.HOST, Tier.DEVICE]),
        ),
        min_size=20,
        max_size=60,
    ),
    slots=st.integers(1, 2),
    host=st.sampled_from([10, 20, 30]),
    disk=st.sampled_from([0, 10, 20, 30]),
)
def test_a_pinned_adapter_never_leaves_its_tier_for_a_farther_one(
    actions: list[tuple[str, str, Tier]], slots: int, host: int, disk: int
) -> None:
    table = TierTable(Clock(), slots, host, disk)
    pins: dict[str, Tier] = {}
    for action, digest, tier in actions:
        entry = table.get(digest)
        if action in ("serve", "load"):
            serve(table, digest, to_slot=action == "serve")
        elif action == "pin" and entry is not None and entry.tier >= tier:
            table.pin(digest, tier)
            pins[digest] = max(tier, pins.get(digest, Tier.NONE))
        elif action == "unpin":
            table.unpin(digest)
            pins.pop(digest, None)
        elif action == "evict":
            evict(table, digest)
            pins.pop(digest, None)
            assert table.get(digest) is None
        for pinned, least in pins.items():
            kept = table.get(pinned)
            assert kept is not None
            assert kept.tier >= least
        assert table.host_used <= host
        assert table.disk_used <= disk
        assert table.slots_used <= slots


def test_what_is_pinned_on_the_host_gives_its_slot_back_and_keeps_its_copy(clock: Clock) -> None:
    table = TierTable(clock, 1, 20, 0)
    resident(table, "pinned", 10)
    resident(table, "other", 10)
    table.pin("pinned", Tier.HOST)
    assert table.take_slot("pinned") is not None
    table.want("new", "new")
    table.start_flight("new")
    assert table.reserve_host("new", 10) == ["other"]
    table.land("new")
    grant = table.take_slot("new")
    assert grant is not None
    assert evicted_by(grant) == {"pinned"}
    entry = table.get("pinned")
    assert entry is not None
    assert entry.tier is Tier.HOST


def test_what_is_pinned_on_the_disk_stays_there_and_the_newest_copy_goes(clock: Clock) -> None:
    table = TierTable(clock, 1, 100, 20)
    resident(table, "pinned", 10)
    assert table.add_disk("pinned", 10) == []
    table.pin("pinned", Tier.DISK)
    for _ in range(9):
        resident(table, "often", 15)
    assert table.add_disk("often", 15) == ["often"]
    table.drop_host("pinned")
    entry = table.get("pinned")
    assert entry is not None
    assert entry.tier is Tier.DISK


def test_of_pinned_copies_on_the_disk_only_one_that_no_pin_needs_goes(clock: Clock) -> None:
    table = TierTable(clock, 1, 100, 20)
    resident(table, "on-disk", 10)
    table.add_disk("on-disk", 10)
    table.pin("on-disk", Tier.DISK)
    resident(table, "on-host", 15)
    table.pin("on-host", Tier.HOST)
    assert table.add_disk("on-host", 15) == ["on-host"]


def test_a_second_pin_never_loosens_the_first(clock: Clock) -> None:
    table = TierTable(clock, 1, 100, 0)
    resident(table, "pinned", 10)
    assert table.take_slot("pinned") is not None
    table.pin("pinned", Tier.DEVICE)
    table.pin("pinned", Tier.HOST)
    resident(table, "other", 10)
    assert table.take_slot("other") is None
    table.unpin("pinned")
    assert table.take_slot("other") is not None
