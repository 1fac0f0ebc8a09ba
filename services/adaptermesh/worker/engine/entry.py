"""What the tier table knows of one adapter version."""

import enum
from dataclasses import dataclass, field

from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.traits import Traits


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
    `arrived` counts the leading layers that are here of an adapter in flight. `partial`: its slot was given
    before it was whole and lacks layers still. `traits` is None until its manifest has been read.
    """

    digest: str
    size_bytes: int = 0
    device_bytes: int = 0
    on_disk: bool = False
    on_host: bool = False
    slot: int | None = None
    partial: bool = False
    pinned: Tier = Tier.NONE
    uses: int = 0
    flight: Flight = Flight.NONE
    reserved_bytes: int = 0
    arrived: int = 0
    holders: dict[str, None] = field(default_factory=dict)
    traits: Traits | None = None
    rate: float = 0.0
    rate_time: float = 0.0

    @property
    def tier(self) -> Tier:
        """The nearest tier that holds all of it."""
        if self.slot is not None and not self.partial:
            return Tier.DEVICE
        if self.on_host:
            return Tier.HOST
        return Tier.DISK if self.on_disk else Tier.STORE

    @property
    def is_whole(self) -> bool:
        """Whether all of it is on the device or on the host."""
        return self.tier >= Tier.HOST

    @property
    def kept(self) -> Tier:
        """The tier whose copy the pin keeps: the pinned one or, without a copy there, the next nearer one."""
        on_device = self.slot is not None and not self.partial
        copies = ((Tier.DISK, self.on_disk), (Tier.HOST, self.on_host), (Tier.DEVICE, on_device))
        if self.pinned is not Tier.NONE:
            for tier, held in copies:
                if held and tier >= self.pinned:
                    return tier
        return Tier.NONE

    @property
    def idle_slot(self) -> bool:
        return self.slot is not None and not (self.partial or self.uses) and self.kept is not Tier.DEVICE

    @property
    def idle_host(self) -> bool:
        lacks_slot = self.slot is None or self.partial
        wanted = lacks_slot and bool(self.holders)
        return self.on_host and not wanted and self.kept is not Tier.HOST
