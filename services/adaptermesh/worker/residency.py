"""What this worker tells of itself: state, load, residency and the requests that it has admitted."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView

MAX_PENDING_ADMISSIONS = 4096
"""Admissions that a slow router may leave unread before it gets a snapshot instead."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything."""

    draining: bool
    status: EngineStatus
    residencies: tuple[ResidencyView, ...]
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed since the last report."""

    draining: bool
    status: EngineStatus
    residencies: tuple[ResidencyView, ...]
    admitted: tuple[str, ...]


class StatusBoard:
    """The worker's state as its routers may see it. For the event loop's thread, `touch` excepted."""

    def __init__(self, read_status: Callable[[], EngineStatus]) -> None:
        self._read_status = read_status
        self._loop = asyncio.get_running_loop()
        self._cursors: set[ReportCursor] = set()
        self._active: dict[str, int] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._touched = False
        self.draining = False

    def touch(self) -> None:
        """The engine's status changed. Any thread; many calls make one notice."""
        if self._touched:
            return
        self._touched = True
        # A closed loop has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._notify)

    def start_draining(self) -> None:
        self.draining = True
        self._notify()

    def admitted(self, request_id: str) -> None:
        """A request was admitted; it counts until as many `finished` calls came."""
        self._active[request_id] = self._active.get(request_id, 0) + 1
        self._idle.clear()
        for cursor in self._cursors:
            cursor.admitted(request_id)
        self._notify()

    def finished(self, request_id: str) -> None:
        left = self._active.get(request_id, 0) - 1
        if left > 0:
            self._active[request_id] = left
        else:
            self._active.pop(request_id, None)
        if not self._active:
            self._idle.set()
        self._notify()

    async def wait_idle(self) -> None:
        """Returns when no admitted request is left."""
        await self._idle.wait()

    def status(self) -> EngineStatus:
        return self._read_status()

    def snapshot(self) -> Snapshot:
        status = self._read_status()
        return Snapshot(self.draining, status, _held(status), tuple(self._active))

    @contextlib.contextmanager
    def follow(self) -> Iterator["ReportCursor"]:
        """A cursor that collects what changes from now on."""
        cursor = ReportCursor(self)
        self._cursors.add(cursor)
        try:
            yield cursor
        finally:
            self._cursors.discard(cursor)

    def _notify(self) -> None:
        self._touched = False
        for cursor in self._cursors:
            cursor.changed.set()


class ReportCursor:
    """How much of the board one router knows."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board
        self._known: dict[str, ResidencyView] = {}
        self._admitted: list[str] = []
        self._snapshot_due = True
        self.changed = asyncio.Event()

    def admitted(self, request_id: str) -> None:
        if len(self._admitted) < MAX_PENDING_ADMISSIONS:
            self._admitted.append(request_id)
        else:
            self._snapshot_due = True

    def want_snapshot(self) -> None:
        """The next report is a snapshot."""
        self._snapshot_due = True
        self.changed.set()

    def next_report(self) -> Snapshot | Delta:
        """What the router must hear now, taken to be heard."""
        self.changed.clear()
        snapshot = self._board.snapshot()
        admitted, self._admitted = tuple(self._admitted), []
        known, self._known = self._known, {view.digest: view for view in snapshot.residencies}
        if self._snapshot_due:
            self._snapshot_due = False
            return snapshot
        changed = [view for view in snapshot.residencies if known.get(view.digest) != view]
        gone = [
            ResidencyView(digest, Tier.STORE, pinned=False, requests=0, size_bytes=view.size_bytes)
            for digest, view in known.items()
            if digest not in self._known
        ]
        return Delta(snapshot.draining, snapshot.status, (*changed, *gone), admitted)


def _held(status: EngineStatus) -> tuple[ResidencyView, ...]:
    """The versions of which this worker has anything complete."""
    return tuple(view for view in status.residencies if view.tier > Tier.STORE)
