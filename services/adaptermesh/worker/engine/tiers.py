"""Which tier holds which adapter, who wants it and what gives way: decisions only, no bytes.

The table is a deterministic state machine: the same calls at the same times of the injected clock give the
same answers. It isn't thread-safe; `residency` calls it under the engine's lock and carries out what it says.

Never evicted: a slot that a running row uses; a host copy that somebody waits for and that has no slot yet;
the copy that keeps a pinned adapter in its tier; anything that is arriving.

An adapter may get its slot while it arrives, once its first layer is here. That slot lasts as long as rows
use it: when the last one leaves before the adapter is whole, it is free.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from adaptermesh.core.clock import Clock
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.entry import Entry, Flight
from adaptermesh.worker.engine.traits import Traits

HALF_LIFE_SECONDS = 120.0
"""A use counts half after this time: recency and frequency in one number."""


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """A slot for an adapter, and who gave way for it."""

    slot: int
    evicted: tuple["Evicted", ...] = ()


@dataclass(frozen=True, slots=True)
class Evicted:
    """An adapter that gave its slot up; one such slot may be the grant's own, the others are empty now."""

    digest: str
    slot: int


class TierTable:
    """The state of all tiers of one worker."""

    def __init__(
        self, clock: Clock, slots: int, host_bytes: int, disk_bytes: int, device_bytes: int = 0
    ) -> None:
        """`device_bytes` 0: the device is bounded by its slots alone."""
        self._clock = clock
        self.device_budget = device_bytes
        self.host_budget = host_bytes
        self.disk_budget = disk_bytes
        self._entries: dict[str, Entry] = {}
        self._slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._held: dict[str, str] = {}
        self._partial: dict[str, Entry] = {}
        self.host_used = 0
        self.disk_used = 0
        self.device_used = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def slots_used(self) -> int:
        return self._slots - len(self._free_slots)

    def get(self, digest: str) -> Entry | None:
        return self._entries.get(digest)

    @property
    def partial(self) -> Collection[Entry]:
        """The adapters whose slots lack layers."""
        return self._partial.values()

    @property
    def empty_slots(self) -> int:
        return len(self._free_slots)

    def has_slot(self, digest: str) -> bool:
        """Whether an adapter that is whole would get a slot."""
        return self._slot_victims(self._entries[digest], only_unwanted=False) is not None

    def has_empty_slot(self, digest: str) -> bool:
        """Whether it would get one for which nobody has to give way."""
        return bool(self._free_slots) and self._device_short(self._entries[digest]) <= 0

    @property
    def device_room(self) -> float:
        """Bytes that adapters could get on the device now, those in idle slots included."""
        if not self.device_budget:
            return math.inf
        idle = sum(entry.device_bytes for entry in self._entries.values() if entry.idle_slot)
        return self.device_budget - self.device_used + idle

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
        if not entry.holders or entry.is_whole or entry.flight is not Flight.NONE:
            return Flight.NONE
        entry.flight = Flight.DISK if entry.on_disk else Flight.FETCH
        return entry.flight

    def learn(self, digest: str, traits: Traits) -> None:
        """An arriving adapter's manifest is here."""
        self._entries[digest].traits = traits

    def reserve_host(self, digest: str, size_bytes: int, device_bytes: int = 0) -> list[str] | None:
        """Makes room for an arriving adapter. Gives the host copies that go; None if there is no room now."""
        entry = self._entries[digest]
        entry.size_bytes = size_bytes
        if entry.slot is None:
            entry.device_bytes = device_bytes
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

    def fits_device(self, device_bytes: int) -> bool:
        """Whether it could ever be there."""
        return not self.device_budget or device_bytes <= self.device_budget

    def fits_disk(self, size_bytes: int) -> bool:
        """Whether it could ever be there."""
        return size_bytes <= self.disk_budget

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
        self._stop_flight(self._entries[digest])

    def arrive(self, digest: str, layers: int) -> None:
        """That many leading layers are in host memory and verified."""
        self._entries[digest].arrived = layers

    def land(self, digest: str) -> None:
        """All bytes are in host memory and verified."""
        entry = self._entries[digest]
        entry.flight = Flight.NONE
        entry.reserved_bytes = entry.arrived = 0
        entry.on_host = True

    def end_flight(self, digest: str) -> list[str]:
        """The flight failed or was called off. Gives the holders that waited for it; they hold no longer."""
        entry = self._entries[digest]
        self._stop_flight(entry)
        holders = list(entry.holders)
        for holder in holders:
            del self._held[holder]
        entry.holders.clear()
        self._forget_if_empty(entry)
        return holders

    def _stop_flight(self, entry: Entry) -> None:
        entry.flight = Flight.NONE
        self.host_used -= entry.reserved_bytes
        entry.reserved_bytes = entry.arrived = 0

    # The way up: host -> device.

    def take_slot(self, digest: str) -> SlotGrant | None:
        """A slot for an adapter, and room for its bytes: free ones, or those of the least valuable idle ones.

        One that is still arriving takes nothing from an adapter that somebody waits for.
        """
        entry = self._entries[digest]
        victims = self._slot_victims(entry, only_unwanted=not entry.on_host)
        if victims is None:
            return None
        evicted = tuple(Evicted(victim.digest, self._vacate(victim)) for victim in victims)
        slot = entry.slot = self._free_slots.pop()
        self.device_used += entry.device_bytes
        if not entry.on_host:
            entry.partial = True
            self._partial[digest] = entry
        return SlotGrant(slot, evicted)

    def complete_slot(self, digest: str) -> None:
        """A slot that was given early gets the rest of its layers before the next step."""
        self._partial.pop(digest).partial = False

    def use(self, digest: str) -> None:
        self._entries[digest].uses += 1

    def unuse(self, digest: str) -> int | None:
        """A row leaves the slot. Gives the slot if it is free now, as it lacks layers and nobody uses it."""
        entry = self._entries[digest]
        entry.uses -= 1
        return self.drop_slot(digest) if entry.partial and not entry.uses else None

    # The way down.

    def drop_slot(self, digest: str) -> int | None:
        """Frees the slot; gives its number."""
        entry = self._entries.get(digest)
        if entry is None or entry.slot is None:
            return None
        entry.partial = False
        self._partial.pop(digest, None)
        return self._vacate(entry)

    def _vacate(self, entry: Entry) -> int:
        slot, entry.slot = entry.slot or 0, None
        self.device_used -= entry.device_bytes
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

    def _device_short(self, entry: Entry) -> int:
        """Bytes that the device lacks for an adapter."""
        if not self.device_budget:
            return 0
        return self.device_used + entry.device_bytes - self.device_budget

    def _slot_victims(self, entry: Entry, *, only_unwanted: bool) -> list[Entry] | None:
        """The least valuable idle slots that give a slot and room together; None if all don't suffice.

        Preferably those of adapters that nobody waits for, or only such.
        """
        slots, short = len(self._free_slots), self._device_short(entry)
        if slots and short <= 0:
            return []
        now = self._clock.monotonic()
        idle = [
            one for one in self._entries.values() if one.idle_slot and not (only_unwanted and one.holders)
        ]
        idle.sort(key=lambda one: (bool(one.holders), self._slot_value(one, now), one.digest))
        victims: list[Entry] = []
        for one in idle:
            victims.append(one)
            slots, short = slots + 1, short - one.device_bytes
            if short <= 0:
                break
        if not slots or short > 0:
            return None
        # The last one may have brought so much that the others can stay.
        for one in reversed(victims[:-1]):
            if short + one.device_bytes <= 0 and slots > 1:
                victims.remove(one)
                slots, short = slots - 1, short + one.device_bytes
        return victims

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
        here = entry.tier is not Tier.STORE or entry.slot is not None or entry.pinned
        if not (entry.holders or here or entry.flight is not Flight.NONE):
            self._entries.pop(entry.digest, None)


# Latency in seconds and bytes a second of a reload from each tier: only their ratios matter.
_STORE = (0.020, 100e6)
_DISK = (0.002, 1e9)
_HOST = (0.0005, 4e9)


def _reload(size_bytes: int, source: tuple[float, float]) -> float:
    latency, rate = source
    return latency + size_bytes / rate
