"""Brings adapters into host memory, from the store or from the disk cache.

The tier table decides what comes and what goes; here its decisions are carried out. The bytes move outside of
the engine's lock: the source's threads write through a sink, the input/output threads read the disk cache.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from adaptermesh.artifact.composing import is_composed
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.admission import check_adapter, device_bytes_of
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.disk_cache import DiskCache
from adaptermesh.worker.engine.disk_writes import DiskWrites
from adaptermesh.worker.engine.entry import Flight
from adaptermesh.worker.engine.fetch import FetchSink, Transfer
from adaptermesh.worker.engine.holders import Holders
from adaptermesh.worker.engine.host_arena import HostArena, HostCopy, Landing
from adaptermesh.worker.engine.source import AdapterSource
from adaptermesh.worker.engine.tiers import TierTable
from adaptermesh.worker.engine.traits import Traits

log = logging.getLogger(__name__)


class Transfers:
    """The transfers of one engine, at most one for each adapter."""

    def __init__(
        self,
        config: EngineConfig,
        base: Base,
        table: TierTable,
        holders: Holders,
        source: AdapterSource,
        clock: Clock,
        lock: threading.Condition,
        on_landed: Callable[[str], None],
    ) -> None:
        self._base = base
        self._table = table
        self._holders = holders
        self._source = source
        self._clock = clock
        self._lock = lock
        self._on_landed = on_landed
        self._arena = HostArena(base.device, config.host_bytes)
        self._disk = DiskCache(config.disk_dir)
        self._io = ThreadPoolExecutor(config.io_threads, thread_name_prefix="adapter-disk")
        self._writes = DiskWrites(self._disk, lock, self._written)
        self._transfers: dict[str, Transfer] = {}
        for entry in self._disk.scan():
            self._delete_disk(self._table.add_disk(entry.digest, entry.size_bytes))

    def __len__(self) -> int:
        return len(self._transfers)

    def close(self) -> None:
        self._io.shutdown(wait=True, cancel_futures=True)
        self._writes.close()

    # Under the lock.

    def host_copy(self, digest: str) -> HostCopy | None:
        return self._arena.get(digest)

    def arriving_copy(self, digest: str) -> HostCopy | None:
        """What is there of an adapter that is on its way; only its verified layers may be read."""
        transfer = self._transfers.get(digest)
        landing = None if transfer is None else transfer.landing
        return None if landing is None else HostCopy(landing.manifest, landing.data)

    def drop_copies(self, digest: str) -> None:
        """Drops an idle adapter from host and disk."""
        self._writes.call_off(digest)
        entry = self._table.get(digest)
        if entry is not None and entry.on_disk:
            self._table.drop_disk(digest)
            self._disk.delete(digest)
        if entry is not None and entry.on_host:
            self._table.drop_host(digest)
            self._arena.drop(digest)

    def ensure(self, digest: str) -> None:
        """Starts the transfer that a wanted adapter lacks, if any."""
        flight = self._table.start_flight(digest)
        entry = self._table.get(digest)
        if flight is Flight.NONE or entry is None:
            return
        starter = self._holders[next(iter(entry.holders))]
        transfer = Transfer(digest, starter.holder_id, flight is Flight.FETCH, self._now_ns())
        self._transfers[digest] = transfer
        if flight is Flight.DISK:
            self._io.submit(self._read_disk, transfer)
        else:
            self._source.fetch(digest, FetchSink(self, transfer), starter.context)

    def call_off(self, digest: str) -> list[str]:
        """Ends a transfer whose bytes are of no use any more. Gives the holders that waited for it."""
        transfer = self._transfers.pop(digest, None)
        holder_ids = self._table.end_flight(digest)
        if transfer is not None and transfer.from_store:
            self._source.cancel(digest)
        return holder_ids

    def resume(self) -> None:
        """Starts what was postponed for want of room, now that something has changed."""
        for digest in self._table.resume():
            self.ensure(digest)

    # Called by sinks and input/output threads, which take the lock here.

    def open_landing(self, transfer: Transfer, manifest: Manifest) -> Landing:
        check_adapter(transfer.digest, manifest, self._base)
        device_bytes = device_bytes_of(manifest, self._base.dtype)
        with self._lock:
            if not self.is_current(transfer):
                raise MeshError(Code.CANCELLED, Reason.CANCELLED, "nobody waits for this adapter any more")
            if not self._table.fits_host(manifest.size_bytes):
                raise no_room(transfer.digest, "is larger than all of the host memory for adapters", None)
            if not self._table.fits_device(device_bytes):
                raise no_room(transfer.digest, "is larger than all of the device memory for adapters", None)
            self._table.learn(transfer.digest, Traits.of(manifest))
            victims = self._table.reserve_host(transfer.digest, manifest.size_bytes, device_bytes)
            if victims is None:
                del self._transfers[transfer.digest]
                self._table.postpone(transfer.digest)
                raise no_room(transfer.digest, "finds no room in host memory now", 0.1)
            self._drop_host(victims)
        data = self._arena.allocate(manifest.size_bytes)
        return Landing(transfer.digest, manifest, data, self._base.sites.num_layers)

    def layers_arrived(self, transfer: Transfer) -> None:
        with self._lock:
            if transfer.landing is not None and self.is_current(transfer):
                self._table.arrive(transfer.digest, transfer.landing.layers_ready)
                self._lock.notify_all()

    def landed(self, transfer: Transfer) -> None:
        landing = transfer.landing
        with self._lock:
            digest = transfer.digest
            if landing is None or not self.is_current(transfer):
                return
            del self._transfers[digest]
            self._arena.put(digest, landing.finish())
            self._table.land(digest)
            if transfer.from_store:
                self._note_fetch(transfer, landing)
            self._on_landed(digest)
            self.resume()
            late = None
            # A composition is made anew: on disk nothing would vouch for it.
            stored = transfer.from_store and not is_composed(landing.manifest)
            if stored and self._table.fits_disk(landing.manifest.size_bytes):
                late = self._writes.start(digest, transfer.manifest, landing.finish())
            self._lock.notify_all()
        if late is not None:
            late()

    def transfer_failed(self, transfer: Transfer, error: MeshError) -> None:
        with self._lock:
            if not self.is_current(transfer):
                return
            del self._transfers[transfer.digest]
            self._holders.fail(self._table.end_flight(transfer.digest), error)
            self.resume()
            self._lock.notify_all()

    def is_current(self, transfer: Transfer) -> bool:
        return self._transfers.get(transfer.digest) is transfer

    def _read_disk(self, transfer: Transfer) -> None:
        """Reads an entry of the disk cache, or fetches it anew if it is damaged. On its own thread."""
        try:
            manifest = self._disk.manifest(transfer.digest)
            landing = transfer.landing = self.open_landing(transfer, manifest)
            with self._disk.open(transfer.digest) as file:
                landing.read_from(file.readinto)  # type: ignore[attr-defined]
            self.landed(transfer)
        except MeshError as error:
            if error.reason is Reason.DATA_CORRUPT:
                self._refetch(transfer)
            else:
                self.transfer_failed(transfer, error)
        except Exception as error:
            # The top of the thread's task: the holders must not hang.
            log.exception("reading the disk cache failed", extra={"digest": transfer.digest})
            self.transfer_failed(transfer, MeshError(Code.INTERNAL, Reason.INTERNAL, f"disk cache: {error}"))

    def _refetch(self, transfer: Transfer) -> None:
        """The disk copy is damaged: away with it, the store has another one."""
        log.warning("dropping a damaged adapter from disk", extra={"digest": transfer.digest})
        self._disk.delete(transfer.digest)
        with self._lock:
            if not self.is_current(transfer):
                self._table.drop_disk(transfer.digest)
                return
            del self._transfers[transfer.digest]
            self._table.restart_flight(transfer.digest)
            self._table.drop_disk(transfer.digest)
            self.ensure(transfer.digest)

    def _note_fetch(self, transfer: Transfer, landing: Landing) -> None:
        entry = self._table.get(transfer.digest)
        for holder_id in entry.holders if entry is not None else ():
            timeline = self._holders[holder_id].timeline
            timeline.fetch_start_ns, timeline.fetch_end_ns = transfer.start_ns, self._now_ns()
            timeline.verify_ns = landing.verify_ns
            timeline.fetched_bytes = landing.position
            timeline.shared_fetch = holder_id != transfer.starter

    def _written(self, digest: str, size_bytes: int) -> None:
        self._delete_disk(self._table.add_disk(digest, size_bytes))

    def _drop_host(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._arena.drop(digest)

    def _delete_disk(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._disk.delete(digest)

    def _now_ns(self) -> int:
        return int(self._clock.wall() * 1e9)


def no_room(digest: str, problem: str, retry_after: float | None) -> MeshError:
    """A tier is full."""
    return MeshError(
        Code.RESOURCE_EXHAUSTED,
        Reason.OVERLOADED,
        f"adapter {digest} {problem}",
        metadata={"digest": digest},
        retry_after=retry_after,
    )
