"""The workers that report to this router, each as its last report left it.

A worker lives as long as its report stream and as long as it keeps reporting. Its state is always a
snapshot plus the unbroken run of deltas after it: after a gap nothing but a new snapshot is taken in.
"""

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from adaptermesh.core.clock import Clock
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.tiers import Tier
from adaptermesh.router.booking import Bookings
from adaptermesh.router.settings import RouterSettings

log = logging.getLogger(__name__)


class WorkerState(enum.IntEnum):
    """Whether a worker takes requests; the numbers are those of the wire."""

    UNSPECIFIED = 0
    READY = 1
    DRAINING = 2


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change while a worker lives; `described` is its own message, handed on unread."""

    worker_id: str
    address: str
    base_digest: str
    base_model_id: str
    max_batch_rows: int
    max_waiting: int
    described: bytes = b""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is; `budgets` are a message that is shown as it came, not looked into."""

    running_requests: int = 0
    waiting_requests: int = 0
    waiting_tokens: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    budgets: bytes = b""


@dataclass(frozen=True, slots=True)
class Residency:
    """Where one version is on a worker; tier STORE means that it is not there."""

    digest: str
    tier: Tier
    pinned: bool = False
    requests: int = 0
    size_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A worker's whole state."""

    info: WorkerInfo
    state: WorkerState
    load: Load
    residencies: tuple[Residency, ...] = ()
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed since the last report."""

    state: WorkerState
    load: Load
    residencies: tuple[Residency, ...] = ()
    admitted_request_ids: tuple[str, ...] = ()


@dataclass(slots=True)
class Worker:
    """One live worker."""

    info: WorkerInfo
    state: WorkerState
    load: Load
    reported_at: float
    residencies: dict[str, Residency] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The answer to a report. `replaced` means that the worker speaks on a newer stream: this one can end."""

    sequence: int
    snapshot_wanted: bool = False
    replaced: bool = False


class WorkerRegistry:
    """Every worker that this router knows."""

    def __init__(self, bookings: Bookings, clock: Clock, settings: RouterSettings) -> None:
        self._bookings = bookings
        self._clock = clock
        self._timeout = settings.worker_timeout_seconds
        self._base_return = settings.base_return_seconds
        self._grace_end = clock.monotonic() + settings.startup_grace_seconds
        self._workers: dict[str, Worker] = {}
        self._streams: dict[str, ReportStream] = {}
        self._bases_gone: dict[str, float] = {}

    def open_stream(self) -> "ReportStream":
        """A worker has connected; its first report says which."""
        return ReportStream(self, self._bookings, self._clock)

    def live(self) -> list[Worker]:
        """The workers that are there now. One that has fallen silent is dropped."""
        oldest = self._clock.monotonic() - self._timeout
        silent = [worker for worker in self._workers.values() if worker.reported_at < oldest]
        for worker in silent:
            self._drop(worker.info.worker_id, "silent")
        return list(self._workers.values())

    def base_may_return(self, base_digest: str) -> bool:
        """True if a base that nobody serves now was served a short while ago, or if we have just started."""
        now = self._clock.monotonic()
        if now < self._grace_end:
            return True
        gone_at = self._bases_gone.get(base_digest)
        return gone_at is not None and now - gone_at < self._base_return

    def _join(self, stream: "ReportStream", snapshot: Snapshot) -> Worker:
        """Takes in a worker's snapshot; its stream takes the place of an older one."""
        worker_id = snapshot.info.worker_id
        if worker_id not in self._workers:
            log.info("worker joined", extra={"worker_id": worker_id, "address": snapshot.info.address})
        worker = Worker(snapshot.info, snapshot.state, snapshot.load, self._clock.monotonic())
        self._workers[worker_id] = worker
        self._streams[worker_id] = stream
        return worker

    def _speaks_for(self, stream: "ReportStream", worker_id: str) -> bool:
        return self._streams.get(worker_id) is stream

    def _was_replaced(self, stream: "ReportStream", worker_id: str) -> bool:
        return self._streams.get(worker_id, stream) is not stream

    def _drop(self, worker_id: str, why: str) -> None:
        worker = self._workers.pop(worker_id)
        del self._streams[worker_id]
        self._bookings.drop_worker(worker_id)
        self._bases_gone[worker.info.base_digest] = self._clock.monotonic()
        level = logging.INFO if worker.state is WorkerState.DRAINING else logging.WARNING
        log.log(level, "worker gone", extra={"worker_id": worker_id, "reason": why})


class ReportStream:
    """The reports of one connection of one worker."""

    def __init__(self, registry: WorkerRegistry, bookings: Bookings, clock: Clock) -> None:
        self._registry = registry
        self._bookings = bookings
        self._clock = clock
        self._worker: Worker | None = None
        self._taken = 0

    def take(self, sequence: int, report: Snapshot | Delta) -> Acknowledgement:
        """Takes in one report if it continues what is there.

        Raises:
            MeshError: INVALID_ARGUMENT for a snapshot that can't be a worker's.
        """
        if isinstance(report, Snapshot):
            return self._take_snapshot(sequence, report)
        worker = self._worker
        if worker is None:
            return Acknowledgement(self._taken, snapshot_wanted=True)
        worker_id = worker.info.worker_id
        if self._registry._was_replaced(self, worker_id):
            return Acknowledgement(self._taken, replaced=True)
        if not self._registry._speaks_for(self, worker_id):
            # It was dropped for its silence; what it held may be long out of date.
            return Acknowledgement(self._taken, snapshot_wanted=True)
        worker.reported_at = self._clock.monotonic()
        if sequence <= self._taken:
            return Acknowledgement(self._taken)
        if sequence != self._taken + 1:
            return Acknowledgement(self._taken, snapshot_wanted=True)
        worker.state = report.state
        worker.load = report.load
        self._locate(worker, report.residencies)
        self._bookings.admitted(worker_id, report.admitted_request_ids)
        self._taken = sequence
        return Acknowledgement(sequence)

    def close(self) -> None:
        """The connection has ended: the worker is gone unless it speaks on a newer one."""
        if self._worker is not None and self._registry._speaks_for(self, self._worker.info.worker_id):
            self._registry._drop(self._worker.info.worker_id, "its stream ended")

    def _take_snapshot(self, sequence: int, snapshot: Snapshot) -> Acknowledgement:
        info = snapshot.info
        _check(info)
        if self._worker is not None:
            if self._worker.info.worker_id != info.worker_id:
                raise invalid_field("info.worker_id", "it changed within one stream")
            if self._registry._was_replaced(self, info.worker_id):
                return Acknowledgement(self._taken, replaced=True)
        self._worker = self._registry._join(self, snapshot)
        self._locate(self._worker, snapshot.residencies)
        self._bookings.admitted(info.worker_id, snapshot.request_ids)
        self._taken = sequence
        return Acknowledgement(sequence)

    def _locate(self, worker: Worker, residencies: Iterable[Residency]) -> None:
        worker_id = worker.info.worker_id
        for residency in residencies:
            if residency.tier > Tier.STORE:
                worker.residencies[residency.digest] = residency
                self._bookings.located(worker_id, residency.digest)
                continue
            worker.residencies.pop(residency.digest, None)
            if residency.requests:
                # Nothing is there yet, but requests wait for it: it is being fetched.
                self._bookings.expect(worker_id, residency.digest)
            else:
                self._bookings.located(worker_id, residency.digest)


def _check(info: WorkerInfo) -> None:
    if not info.worker_id:
        raise invalid_field("info.worker_id", "it is empty")
    if not info.address:
        raise invalid_field("info.address", "it is empty")
    if not is_digest(info.base_digest):
        raise invalid_field("info.base_model.digest", f"{info.base_digest[:80]!r} is not a digest")
    if info.max_batch_rows < 1:
        raise invalid_field("info.max_batch_rows", f"{info.max_batch_rows} is not at least 1")
