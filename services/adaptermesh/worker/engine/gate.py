"""Which adapters may get new rows in a step, so that adapters beyond the slots cost time and not liveness."""

import math
from collections.abc import Iterable
from typing import Protocol

from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.sequence import Sequence
from adaptermesh.worker.engine.traits import Traits


class Placer(Protocol):
    """Brings adapters into device slots. What it says holds until the row gives the slot back."""

    def place(self, digest: str) -> int | None:
        """The slot that holds the adapter, counted as used by one more row; None if it can't be there now."""
        ...

    def traits(self, digest: str) -> Traits | None:
        """What the adapter asks of its sequences; None, and no slot, until its manifest is here."""
        ...

    def waits_for_slot(self, digest: str) -> bool:
        """Whether all that the adapter lacks is a free slot."""
        ...

    def in_slot(self, digest: str) -> bool:
        """Whether the adapter has a slot."""
        ...

    def gives_way(self, digest: str) -> bool:
        """Whether another adapter may get its slot once no row uses it."""
        ...

    def unplace(self, digest: str) -> None:
        """One row less uses the adapter's slot."""
        ...

    def arrived(self, digest: str) -> int | None:
        """The leading layers that are here of an adapter that is not whole yet; None if it is."""
        ...

    def place_early(self, digest: str) -> int | None:
        """As `place`, for an adapter whose first layers are here; it takes no slot that others wait for."""
        ...

    def has_slot(self, digest: str) -> bool:
        """Whether an adapter that is whole would get a slot, and room on the device."""
        ...

    def device_bytes(self, digest: str) -> int:
        """What the adapter takes on the device, as far as that is known."""
        ...

    @property
    def device_room(self) -> float:
        """Bytes that adapters could get on the device now, those in idle slots included."""
        ...

    @property
    def empty_slots(self) -> int:
        """Slots that hold nothing."""
        ...

    def stage_ahead(self, digest: str) -> None:
        """Gives an adapter that only lacks a slot an empty one, though no row uses it yet."""
        ...


class AdapterGate:
    """Made anew for each step.

    A request that was overtaken too often claims a place for its adapter. For each claim one running adapter
    is drained, or more if their bytes are needed: it takes no new rows. One whose slot nobody else can get is
    spared. While there are claims, a place that gets free goes to the oldest one, whatever the order of the
    queue, since that order alone could pass it over each time. While a claim lacks bytes, idle adapters get
    no new rows either: the room that they leave has to add up.
    """

    def __init__(
        self,
        config: EngineConfig,
        placer: Placer,
        running: Iterable[Sequence],
        starving: Iterable[Sequence],
    ) -> None:
        self._placer = placer
        self._limit = config.max_step_adapters
        self._left: dict[str, int] = {}
        for sequence in running:
            if sequence.digest is not None:
                self._left[sequence.digest] = self._left.get(sequence.digest, 0) + sequence.remaining
        # The ones with the fewest tokens left get free first.
        yielding = [digest for digest in self._left if self._limit or placer.gives_way(digest)]
        shortest = sorted(yielding, key=lambda digest: (self._left[digest], digest))
        room = placer.device_room
        self._claims = self._find_claims(
            starving, config.device_slots, room + sum(map(placer.device_bytes, yielding))
        )
        short = sum(map(self._lacking, self._claims)) - room
        self._by_bytes = not math.isinf(room)
        self._lacks_bytes = short > 0
        self._drained: set[str] = set()
        for digest in shortest:
            if len(self._drained) >= len(self._claims) and short <= 0:
                break
            self._drained.add(digest)
            short -= placer.device_bytes(digest)
        self._absent: set[str] = set()
        self._slots_taken = False

    def place(self, digest: str) -> int | None:
        """A slot for one more row of the adapter; None if it has to wait."""
        if digest in self._drained or digest in self._absent or self._held_back(digest):
            return None
        slot = self._placer.place(digest)
        if slot is None:
            # Nothing leaves a slot within a step: neither this adapter need ask again, nor others for a slot,
            # unless it was bytes that it lacked: a smaller one may find them.
            self._absent.add(digest)
            if not self._by_bytes:
                self._slots_taken = self._slots_taken or self._placer.waits_for_slot(digest)
            return None
        self._left.setdefault(digest, 0)
        if digest in self._claims:
            self._claims.remove(digest)
        return slot

    def place_early(self, digest: str) -> int | None:
        """A slot for one more row of an adapter that still arrives, if nobody who is ready lacks one."""
        full = bool(self._limit) and digest not in self._left and len(self._left) >= self._limit
        if full or self._slots_taken or self._claims:
            return None
        slot = self._placer.place_early(digest)
        if slot is None:
            self._slots_taken = True
        else:
            self._left.setdefault(digest, 0)
        return slot

    def _held_back(self, digest: str) -> bool:
        idle = digest not in self._left and digest not in self._claims and self._placer.in_slot(digest)
        if self._lacks_bytes and idle:
            return True
        if not self._needs_place(digest):
            return False
        if self._slots_taken and not self._placer.in_slot(digest):
            return True
        if self._limit and digest not in self._left and len(self._left) >= self._limit:
            return True
        return bool(self._claims) and digest != self._claims[0]

    def _needs_place(self, digest: str) -> bool:
        """Whether the adapter is here but lacks a slot, or a place among those of the step."""
        if self._placer.waits_for_slot(digest):
            return True
        return bool(self._limit) and digest not in self._left and self._placer.in_slot(digest)

    def _find_claims(self, starving: Iterable[Sequence], most: int, room: float) -> list[str]:
        """The adapters to make way for, as many as `room` bytes take: no use in draining for the others."""
        claims: dict[str, None] = {}
        for sequence in starving:
            if len(claims) >= most:
                break
            digest = sequence.digest
            if digest is None or digest in claims or not self._needs_place(digest):
                continue
            lacking = self._lacking(digest)
            if lacking <= room:
                claims[digest] = None
                room -= lacking
        return list(claims)

    def _lacking(self, digest: str) -> int:
        """The bytes that an adapter needs on the device and doesn't have."""
        return 0 if self._placer.in_slot(digest) else self._placer.device_bytes(digest)
