"""Which adapters are where: holds them for requests, brings them into device slots, lets them go.

As the tier table decides. Everything here runs under the engine's lock and is short, but `stage`, which fills
device slots on the engine's own thread between two steps.
"""

import itertools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.arrivals import Arrival
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.entry import Entry
from adaptermesh.worker.engine.holders import Holder, Holders, OnDone, OnFailed
from adaptermesh.worker.engine.host_arena import HostCopy
from adaptermesh.worker.engine.request import Timeline
from adaptermesh.worker.engine.slots import DeviceSlots
from adaptermesh.worker.engine.source import AdapterSource
from adaptermesh.worker.engine.status import ResidencyView, TierBudgets
from adaptermesh.worker.engine.tiers import TierTable
from adaptermesh.worker.engine.traits import Traits
from adaptermesh.worker.engine.transfers import Transfers, no_room

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Staging:
    """A slot to fill up to a layer. The host copy is held here, whatever becomes of it in the arena."""

    slot: int
    digest: str
    copy: HostCopy
    until: int


@dataclass(frozen=True, slots=True)
class _Copying:
    """A slot whose last copies are queued: when the first ones were, and when the last ones."""

    digest: str
    first_ns: int
    last_ns: int
    arrival: Arrival


class Residency:
    """The adapters of one engine, in all tiers."""

    def __init__(
        self,
        config: EngineConfig,
        base: Base,
        slots: DeviceSlots,
        source: AdapterSource,
        clock: Clock,
        lock: threading.Condition,
        on_failed: OnFailed,
    ) -> None:
        self._slots = slots
        self._layers = base.sites.num_layers
        self._clock = clock
        self._lock = lock
        self._table = TierTable(
            clock, config.device_slots, config.host_bytes, config.disk_bytes, config.device_bytes
        )
        self._holders = Holders(on_failed)
        self._transfers = Transfers(
            config, base, self._table, self._holders, source, clock, lock, self._settle_loads
        )
        self._staging: list[Staging] = []
        self._unloads: list[int] = []
        self._copy_starts = [0] * config.device_slots
        self._arriving: list[_Copying] = []
        self._load_ids = itertools.count()
        # Those that use a slot which was given before their adapter was whole.
        self._early_loads: set[str] = set()

    def close(self, error: MeshError) -> None:
        """Ends the loads that are under way and the threads. Without the lock."""
        with self._lock:
            for holder in self._holders.loads:
                self.drop(holder.holder_id)
                _tell(holder, error)
        self._transfers.close()

    # Wanting and letting go. Under the lock.

    def want(self, holder: Holder) -> Tier:
        """Registers a holder and starts what its adapter lacks; gives the tier where it is now."""
        self._holders.add(holder)
        tier = self._table.want(holder.holder_id, holder.digest).tier
        self._transfers.ensure(holder.digest)
        return tier

    def drop(self, holder_id: str) -> None:
        """A holder is done; a transfer that nobody waits for any more is called off."""
        self._holders.remove(holder_id)
        orphan = self._table.drop(holder_id)
        if orphan is not None:
            self._transfers.call_off(orphan.digest)
        self._transfers.resume()

    def load(self, digest: str, tier: Tier, pin: bool, on_done: OnDone, context: object | None) -> None:
        """Brings an adapter to a tier; `on_done` is called once, on any thread."""
        holder_id = f"load:{next(self._load_ids)}"

        def ended(error: MeshError | None) -> None:
            if holder_id in self._early_loads:
                self._early_loads.remove(holder_id)
                self.unplace(digest)
            on_done(error)

        self.want(Holder(holder_id, digest, context, Timeline(), tier, pin, ended))
        self._settle_loads(digest)

    def evict(self, digest: str) -> None:
        """Drops an adapter from every tier; raises MeshError FAILED_PRECONDITION if something uses it."""
        entry = self._table.get(digest)
        if entry is None:
            return
        if entry.holders or entry.uses:
            raise MeshError(
                Code.FAILED_PRECONDITION,
                Reason.ADAPTER_IN_USE,
                f"adapter {digest} is used by {len(entry.holders)} requests",
                metadata={"digest": digest},
                retry_after=1.0,
            )
        self._table.unpin(digest)
        self._transfers.drop_copies(digest)
        if entry.slot is not None:
            self._unloads.append(entry.slot)
            self._table.drop_slot(digest)
        self._transfers.resume()

    def unpin(self, digest: str) -> ResidencyView:
        """Lets an adapter go like any other; gives where it is now, in the store if nothing of it is here."""
        self._table.unpin(digest)
        # What waits for room may have it now.
        self._transfers.resume()
        entry = self._table.get(digest)
        return _view(Entry(digest) if entry is None else entry)

    # The scheduler's `Placer`. Under the lock.

    def place(self, digest: str) -> int | None:
        entry = self._table.get(digest)
        if entry is None or not self._take_slot(entry):
            return None
        self._table.use(digest)
        return entry.slot

    def traits(self, digest: str) -> Traits | None:
        entry = self._table.get(digest)
        return None if entry is None else entry.traits

    def waits_for_slot(self, digest: str) -> bool:
        entry = self._table.get(digest)
        return entry is not None and entry.on_host and entry.slot is None

    def in_slot(self, digest: str) -> bool:
        entry = self._table.get(digest)
        return entry is not None and entry.slot is not None

    def gives_way(self, digest: str) -> bool:
        entry = self._table.get(digest)
        return entry is not None and entry.kept is not Tier.DEVICE

    def unplace(self, digest: str) -> None:
        slot = self._table.unuse(digest)
        if slot is not None:
            self._unloads.append(slot)

    def arrived(self, digest: str) -> int | None:
        entry = self._table.get(digest)
        if entry is None:
            return 0
        return None if entry.is_whole else entry.arrived

    def place_early(self, digest: str) -> int | None:
        entry = self._table.get(digest)
        if entry is None or not entry.arrived:
            return None
        if entry.slot is None and self._grant_slot(digest) is None:
            return None
        self._table.use(digest)
        return entry.slot

    def has_slot(self, digest: str) -> bool:
        return self._table.has_slot(digest)

    def device_bytes(self, digest: str) -> int:
        entry = self._table.get(digest)
        return 0 if entry is None else entry.device_bytes

    @property
    def device_room(self) -> float:
        return self._table.device_room

    @property
    def empty_slots(self) -> int:
        return self._table.empty_slots

    def stage_ahead(self, digest: str) -> None:
        entry = self._table.get(digest)
        if entry is not None and self._table.has_empty_slot(digest):
            self._take_slot(entry)

    # Filling slots.

    def take_staging(self) -> tuple[list[int], list[Staging]]:
        """The slots to empty, then the slots to fill before the next step. Under the lock."""
        for holder in self._holders.loads:
            if holder.tier is Tier.DEVICE:
                self._place_load(holder)
        for entry in tuple(self._table.partial):
            self._stage_rest(entry)
        unloads, self._unloads = self._unloads, []
        staging, self._staging = self._staging, []
        return unloads, staging

    def stage(self, unloads: Sequence[int], staging: Sequence[Staging]) -> list[tuple[str, MeshError]]:
        """Empties and fills slots; gives the adapters that failed. The engine's thread, without the lock."""
        failed: list[tuple[str, MeshError]] = []
        for slot in unloads:
            self._slots.unload(slot)
        for job in staging:
            start_ns = self._now_ns()
            try:
                if self._slots.digest(job.slot) != job.digest:
                    self._slots.unload(job.slot)
                    self._slots.reserve(job.slot, job.digest, job.copy.manifest)
                    self._copy_starts[job.slot] = start_ns
                arrival = self._slots.fill(job.slot, job.until, job.copy.data)
            except MeshError as error:
                failed.append((job.digest, error))
                continue
            except Exception as error:
                # Foreign code at the top of a task: one adapter's trouble must not end the engine's thread.
                log.exception("staging failed", extra={"digest": job.digest})
                failed.append((job.digest, MeshError(Code.INTERNAL, Reason.INTERNAL, f"staging: {error}")))
                continue
            if not self._slots.is_whole(job.slot, job.digest):
                continue
            first_ns = self._copy_starts[job.slot]
            self._staged(job.digest, first_ns, self._now_ns())
            if arrival is not None:
                self._arriving.append(_Copying(job.digest, first_ns, start_ns, arrival))
        return failed

    def note_arrivals(self) -> None:
        """Corrects the times of copies that were still under way when they were staged. Under the lock."""
        arriving, self._arriving = self._arriving, []
        for one in arriving:
            elapsed_ns = one.arrival.elapsed_ns()
            if elapsed_ns is None:
                self._arriving.append(one)
            else:
                self._note_copy(one.digest, one.first_ns, one.last_ns + elapsed_ns)

    def stage_failed(self, digest: str, error: MeshError) -> None:
        """Frees the slot that could not be filled. Its rows have left it. Under the lock."""
        if self._table.get(digest) is None:
            return
        # A load that fails lets go of the slot.
        self._holders.fail(self._transfers.call_off(digest), error)
        self._table.drop_slot(digest)

    def views(self) -> tuple[ResidencyView, ...]:
        return tuple(_view(entry) for entry in self._table if entry.tier > Tier.STORE)

    def budgets(self) -> TierBudgets:
        table = self._table
        return TierBudgets(
            device_used_bytes=self._slots.size_bytes,
            device_used_slots=table.slots_used,
            device_budget_bytes=table.device_budget,
            host_used_bytes=table.host_used,
            host_budget_bytes=table.host_budget,
            disk_used_bytes=table.disk_used,
            disk_budget_bytes=table.disk_budget,
        )

    def _take_slot(self, entry: Entry) -> bool:
        """Whether the adapter is whole and has a slot, taking one if it is on the host."""
        if entry.slot is not None:
            return entry.is_whole
        copy = self._transfers.host_copy(entry.digest) if entry.on_host else None
        slot = None if copy is None else self._grant_slot(entry.digest)
        if copy is None or slot is None:
            return False
        self._staging.append(Staging(slot, entry.digest, copy, self._layers))
        return True

    def _grant_slot(self, digest: str) -> int | None:
        grant = self._table.take_slot(digest)
        if grant is None:
            return None
        gone = {evicted.slot for evicted in grant.evicted}
        # One staged ahead for this very step gives way unfilled, or its slot would be filled for nobody.
        self._staging = [job for job in self._staging if job.slot not in gone]
        for evicted in grant.evicted:
            if evicted.slot != grant.slot:
                self._unloads.append(evicted.slot)
            if self._table.get(evicted.digest) is not None:
                self._transfers.ensure(evicted.digest)
        return grant.slot

    def _stage_rest(self, entry: Entry) -> None:
        """Fills a slot that was given early as far as its adapter has come."""
        digest, slot, until = entry.digest, entry.slot or 0, entry.arrived
        copy = self._transfers.arriving_copy(digest)
        if entry.on_host:
            copy, until = self._transfers.host_copy(digest), self._layers
            self._table.complete_slot(digest)
        if copy is not None and self._loaded(entry) < until:
            self._staging.append(Staging(slot, digest, copy, until))

    def _loaded(self, entry: Entry) -> int:
        """How many layers of an adapter are in its slot."""
        if entry.slot is None or entry.slot in self._unloads:
            return 0
        return self._slots.loaded(entry.slot, entry.digest)

    def _place_load(self, holder: Holder) -> None:
        entry = self._table.get(holder.digest)
        if entry is not None and entry.on_host and not self._take_slot(entry):
            self.drop(holder.holder_id)
            _tell(holder, no_room(holder.digest, "finds every device slot in use", 1.0))
        elif holder.holder_id not in self._early_loads and self.place_early(holder.digest) is not None:
            self._early_loads.add(holder.holder_id)

    def _staged(self, digest: str, start_ns: int, end_ns: int) -> None:
        with self._lock:
            self._note_copy(digest, start_ns, end_ns)
            self._settle_loads(digest)
            self._transfers.resume()

    def _note_copy(self, digest: str, start_ns: int, end_ns: int) -> None:
        entry = self._table.get(digest)
        for holder_id in entry.holders if entry is not None else ():
            timeline = self._holders[holder_id].timeline
            # Who came later did not wait for the first layers.
            own_ns = max(start_ns, timeline.submitted_ns)
            if timeline.h2d_start_ns in (0, own_ns):
                timeline.h2d_start_ns, timeline.h2d_end_ns = own_ns, end_ns

    def _settle_loads(self, digest: str) -> None:
        """Ends the loads whose tier is reached."""
        entry = self._table.get(digest)
        if entry is None:
            return
        in_slot = self._loaded(entry) == self._layers
        if entry.partial and entry.on_host and in_slot:
            # Its last layer was staged before its last byte was verified.
            self._table.complete_slot(digest)
        reached = Tier.NONE
        if entry.is_whole:
            reached = Tier.DEVICE if in_slot else Tier.HOST
        for holder_id in list(entry.holders):
            holder = self._holders[holder_id]
            if holder.on_done is not None and holder.tier <= reached:
                if holder.pin:
                    self._table.pin(digest, holder.tier)
                self.drop(holder_id)
                _tell(holder, None)

    def _now_ns(self) -> int:
        return int(self._clock.wall() * 1e9)


def _view(entry: Entry) -> ResidencyView:
    pinned = entry.pinned is not Tier.NONE
    return ResidencyView(
        entry.digest, entry.tier, pinned, len(entry.holders), entry.size_bytes, entry.device_bytes
    )


def _tell(holder: Holder, error: MeshError | None) -> None:
    if holder.on_done is not None:
        holder.on_done(error)
