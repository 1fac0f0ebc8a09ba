"""Which tier holds which adapter, who wants it and what gives way: decisions only, no bytes.

The table is a deterministic state machine: the same calls at the same times of the injected clock give the
same answers. It isn't thread-safe; `residency` calls it under the engine's lock and carries out what it says.

Never evicted: a slot that a running row uses; a host copy that somebody waits for and that has no slot yet;
the copy that keeps a pinned adapter in its tier; anything that is arriving.
"""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from adaptermesh.core.clock import Clock
from adaptermesh.core.tiers import Tier

HALF_LIFE_SECONDS = 120.0
"""A use counts half after this time: recency and frequency in one number."""


class Flight(enum.Enum):
    """How an adapter's bytes are getting into host memory."""

    NONE = "none"
    FETCH = "fetch"
    """From the store."""
    DISK = "disk"
    ROOM = "room"
    """Not yet: host memory is full of what can't be evicted."""


@dataclass(slots=True)
class Entry:
    """One adapter version. `holders` wait for it or run with it; `uses` counts the rows in its slot.

    `pinned` is the tier that it must not leave for a farther one; NONE if it may.
    """

    digest: str
    size_bytes: int = 0
    on_disk: bool = False
    on_host: bool = False
    slot: int | None = None
    pinned: Tier = Tier.NONE
    uses: int = 0
    flight: Flight = Flight.NONE
    reserved_bytes: int = 0
    holders: dict[str, None] = field(default_factory=dict)
    rate: float = 0.0
    rate_time: float = 0.0

    @property
    def tier(self) -> Tier:
        """The nearest tier that holds all of it."""
        if self.slot is not None:
            return Tier.DEVICE
        if self.on_host:
            return Tier.HOST
        return Tier.DISK if self.on_disk else Tier.STORE

    @property
    def kept(self) -> Tier:
        """The tier whose copy the pin keeps: the pinned one or, without a copy there, the next nearer one."""
        copies = ((Tier.DISK, self.on_disk), (Tier.HOST, self.on_host), (Tier.DEVICE, self.slot is not None))
        if self.pinned is not Tier.NONE:
            for tier, held in copies:
                if held and tier >= self.pinned:
                    return tier
        return Tier.NONE

    @property
    def idle_slot(self) -> bool:
        return self.slot is not None and self.uses == 0 and self.kept is not Tier.DEVICE

    @property
    def idle_host(self) -> bool:
        wanted = self.slot is None and bool(self.holders)
        return self.on_host and not wanted and self.kept is not Tier.HOST


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """A slot for an adapter, and what was in it."""

    slot: int
    evicted: str | None


class TierTable:
    """The state of all tiers of one worker."""

    def __init__(self, clock: Clock, slots: int, host_bytes: int, disk_bytes: int) -> None:
        self._clock = clock
        self.host_budget = host_bytes
        self.disk_budget = disk_bytes
        self._entries: dict[str, Entry] = {}
        self._slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._held: dict[str, str] = {}
        self.host_used = 0
        self.disk_used = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def slots_used(self) -> int:
        return self._slots - len(self._free_slots)

    def get(self, digest: str) -> Entry | None:
        return self._entries.get(digest)

    # Who wants what.

    def want(self, holder: str, digest: str) -> Entry:
        """A request or a load wants an adapter until `drop`."""
        entry = self._entries.setdefault(digest, Entry(digest))
        entry.holders[holder] = None
        self._held[holder] = digest
        now = self._clock.monotonic()
        entry.rate, entry.rate_time = self._rate(entry, now) + 1.0, now
        return entry

    def drop(self, holder: str) -> Entry | None:
        """The holder is done. Gives the entry if its flight has nobody to land for any more."""
        digest = self._held.pop(holder, None)
        if digest is None:
            return None
        entry = self._entries[digest]
        del entry.holders[holder]
        orphan = not entry.holders and entry.flight is not Flight.NONE
        self._forget_if_empty(entry)
        return entry if orphan else None

    def pin(self, digest: str, tier: Tier) -> None:
        """Keeps an adapter from leaving the tier, or the nearer one in which it is pinned already."""
        entry = self._entries[digest]
        entry.pinned = max(entry.pinned, tier)

    # The way up: store or disk -> host.

    def start_flight(self, digest: str) -> Flight:
        """What has to be started so that a wanted adapter gets to the host; NONE if nothing has to."""
        entry = self._entries[digest]
        if not entry.holders or entry.on_host or entry.slot is not None or entry.flight is not Flight.NONE:
            return Flight.NONE
        entry.flight = Flight.DISK if entry.on_disk else Flight.FETCH
        return entry.flight

    def reserve_host(self, digest: str, size_bytes: int) -> list[str] | None:
        """Makes room for an arriving adapter. Gives the host copies that go; None if there is no room now."""
        entry = self._entries[digest]
        entry.size_bytes = size_bytes
        victims = self._host_victims(size_bytes)
        if victims is None:
            return None
        for victim in victims:
            self.drop_host(victim.digest)
        entry.reserved_bytes = size_bytes
        self.host_used += size_bytes
        return [victim.digest for victim in victims]

    def fits_host(self, size_bytes: int) -> bool:
        """Whether it could ever be there."""
        return size_bytes <= self.host_budget

    def postpone(self, digest: str) -> None:
        """The flight waits for room."""
        self._entries[digest].flight = Flight.ROOM

    def resume(self) -> list[str]:
        """Postponed flights for which there is room now; each must be started with `start_flight`."""
        found = []
        for entry in self._entries.values():
            if entry.flight is Flight.ROOM and self._host_victims(entry.size_bytes) is not None:
                entry.flight = Flight.NONE
                found.append(entry.digest)
                # One at a time: the next one is looked at when this one has taken its room.
                break
        return found

    def restart_flight(self, digest: str) -> None:
        """The transfer came to nothing and another one has to be started; the holders go on waiting."""
        entry = self._entries[digest]
        entry.flight = Flight.NONE
        self.host_used -= entry.reserved_bytes
        entry.reserved_bytes = 0

    def land(self, digest: str) -> None:
        """All bytes are in host memory and verified."""
        entry = self._entries[digest]
        entry.flight = Flight.NONE
        entry.reserved_bytes = 0
        entry.on_host = True

    def end_flight(self, digest: str) -> list[str]:
        """The flight failed or was called off. Gives the holders that waited for it; they hold no longer."""
        entry = self._entries[digest]
        entry.flight = Flight.NONE
        self.host_used -= entry.reserved_bytes
        entry.reserved_bytes = 0
        holders = list(entry.holders)
        for holder in holders:
            del self._held[holder]
        entry.holders.clear()
        self._forget_if_empty(entry)
        return holders

    # The way up: host -> device.

    def take_slot(self, digest: str) -> SlotGrant | None:
        """A slot for an adapter on the host: a free one, or that of the least valuable idle one."""
        entry = self._entries[digest]
        if self._free_slots:
            entry.slot = self._free_slots.pop()
            return SlotGrant(entry.slot, None)
        now = self._clock.monotonic()
        idle = [other for other in self._entries.values() if other.idle_slot]
        if not idle:
            return None
        victim = min(
            idle, key=lambda other: (bool(other.holders), self._slot_value(other, now), other.digest)
        )
        slot, victim.slot = victim.slot, None
        entry.slot = slot
        self._forget_if_empty(victim)
        return SlotGrant(entry.slot or 0, victim.digest)

    def use(self, digest: str) -> None:
        self._entries[digest].uses += 1

    def unuse(self, digest: str) -> None:
        self._entries[digest].uses -= 1

    # The way down.

    def drop_slot(self, digest: str) -> int | None:
        """Frees the slot; gives its number."""
        entry = self._entries[digest]
        slot, entry.slot = entry.slot, None
        if slot is not None:
            self._free_slots.append(slot)
            self._free_slots.sort(reverse=True)
        self._forget_if_empty(entry)
        return slot

    def drop_host(self, digest: str) -> None:
        entry = self._entries[digest]
        if entry.on_host:
            entry.on_host = False
            self.host_used -= entry.size_bytes
            self._forget_if_empty(entry)

    def add_disk(self, digest: str, size_bytes: int) -> list[str]:
        """The disk cache has taken an adapter. Gives what it must delete to stay within its budget."""
        entry = self._entries.setdefault(digest, Entry(digest, rate_time=self._clock.monotonic()))
        entry.size_bytes = size_bytes
        if not entry.on_disk:
            entry.on_disk = True
            self.disk_used += size_bytes
        now = self._clock.monotonic()
        gone: list[str] = []
        while self.disk_used > self.disk_budget:
            # The new one may go again at once: what is pinned here, or read, must not.
            found = [
                e
                for e in self._entries.values()
                if e.on_disk and e.flight is not Flight.DISK and (e is entry or e.kept is not Tier.DISK)
            ]
            if not found:
                break
            victim = min(
                found, key=lambda e: (e.pinned, self._rate(e, now) * _reload(e.size_bytes, _STORE), e.digest)
            )
            gone.append(victim.digest)
            self.drop_disk(victim.digest)
        return gone

    def drop_disk(self, digest: str) -> None:
        entry = self._entries.get(digest)
        if entry is not None and entry.on_disk:
            entry.on_disk = False
            self.disk_used -= entry.size_bytes
            self._forget_if_empty(entry)

    def unpin(self, digest: str) -> None:
        entry = self._entries.get(digest)
        if entry is not None:
            entry.pinned = Tier.NONE
            self._forget_if_empty(entry)

    # What a copy is worth.

    def _host_victims(self, size_bytes: int) -> list[Entry] | None:
        """The least valuable idle host copies that make room together; None if all don't suffice."""
        short = self.host_used + size_bytes - self.host_budget
        if short <= 0:
            return []
        now = self._clock.monotonic()
        victims: list[Entry] = []
        idle = [entry for entry in self._entries.values() if entry.idle_host]
        for entry in sorted(idle, key=lambda e: (self._host_value(e, now), e.digest)):
            victims.append(entry)
            short -= entry.size_bytes
            if short <= 0:
                return victims
        return None

    def _rate(self, entry: Entry, now: float) -> float:
        """Uses, each halved every half-life."""
        return entry.rate * math.exp2((entry.rate_time - now) / HALF_LIFE_SECONDS)

    def _host_value(self, entry: Entry, now: float) -> float:
        """Seconds of reloading that a byte of this copy saves; beside a slot it saves little."""
        if entry.slot is not None:
            return 0.0
        source = _DISK if entry.on_disk else _STORE
        return self._rate(entry, now) * _reload(entry.size_bytes, source) / max(1, entry.size_bytes)

    def _slot_value(self, entry: Entry, now: float) -> float:
        """Seconds of reloading that this slot saves; slots are equal, so size counts only there."""
        source = _HOST if entry.on_host else _DISK if entry.on_disk else _STORE
        return self._rate(entry, now) * _reload(entry.size_bytes, source)

    def _forget_if_empty(self, entry: Entry) -> None:
        empty = not entry.holders and entry.tier is Tier.STORE and entry.flight is Flight.NONE
        if empty and not entry.pinned:
            self._entries.pop(entry.digest, None)


# Latency in seconds and bytes a second of a reload from each tier: only their ratios matter.
_STORE = (0.020, 100e6)
_DISK = (0.002, 1e9)
_HOST = (0.0005, 4e9)


def _reload(size_bytes: int, source: tuple[float, float]) -> float:
    latency, rate = source
    return latency + size_bytes / rate
