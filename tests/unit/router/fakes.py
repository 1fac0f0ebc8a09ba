"""What the tests are made of: a clock, entries of a catalogue, workers, and a store that does as told."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.version_state import VersionState
from adaptermesh.router.catalogue import (
    Alias,
    BaseModel,
    Catalogue,
    CatalogueImage,
    Change,
    Entry,
    Event,
    Route,
    RouteTarget,
    Version,
)
from adaptermesh.router.feed import FeedMessage, SnapshotPart
from adaptermesh.router.workers import (
    Delta,
    Load,
    Residency,
    Snapshot,
    WorkerInfo,
    WorkerState,
)

BASE = BaseModel("tiny", digest_bytes(b"base tiny"))
OTHER_BASE = BaseModel("other", digest_bytes(b"base other"))


def adapter_name(text: str) -> AdapterName:
    return AdapterName.parse(text)


def version(
    name: str = "acme/ner",
    number: int = 1,
    base: BaseModel = BASE,
    servable: bool = True,
    unservable_reason: str = "",
    op_kinds: tuple[str, ...] = ("lowrank",),
    state: VersionState = VersionState.ACTIVE,
    state_reason: str = "",
    replacement: str = "",
) -> Version:
    return Version(
        adapter=adapter_name(name),
        number=number,
        digest=digest_bytes(f"{name}:{number}".encode()),
        base_digest=base.digest,
        base_model_id=base.model_id,
        op_kinds=op_kinds,
        size_bytes=1234,
        servable=servable,
        unservable_reason=unservable_reason,
        state=state,
        state_reason=state_reason,
        replacement=replacement,
    )


def alias(target: Version, name: str = "prod", generation: int = 1) -> Alias:
    return Alias(target.adapter, name, target.digest, generation)


def route(task: str, *targets: tuple[str, int, str], tenant: str = "default", generation: int = 1) -> Route:
    return Route(
        tenant, task, tuple(RouteTarget(ref, weight, cohort) for ref, weight, cohort in targets), generation
    )


def image(*entries: Event, feed_id: str = "feed", position: int | None = None) -> CatalogueImage:
    built = CatalogueImage(feed_id, len(entries) if position is None else position)
    for entry in entries:
        built.add(entry)
    return built


def catalogue(*entries: Event) -> Catalogue:
    made = Catalogue()
    made.replace(image(*entries))
    return made


def worker_snapshot(
    worker_id: str = "w1",
    base: BaseModel = BASE,
    state: WorkerState = WorkerState.READY,
    load: Load | None = None,
    residencies: Iterable[Residency] = (),
    request_ids: Iterable[str] = (),
    max_batch_rows: int = 4,
    max_waiting: int = 8,
) -> Snapshot:
    info = WorkerInfo(
        worker_id, f"{worker_id}.test:7710", base.digest, base.model_id, max_batch_rows, max_waiting
    )
    return Snapshot(info, state, load or Load(), tuple(residencies), tuple(request_ids))


def worker_delta(
    running: int = 0,
    waiting: int = 0,
    residencies: Iterable[Residency] = (),
    admitted: Iterable[str] = (),
    state: WorkerState = WorkerState.READY,
) -> Delta:
    return Delta(state, Load(running, waiting), tuple(residencies), tuple(admitted))


class MemoryStore:
    """A store's feed in memory, with the same contract as the real one, and faults on demand.

    `cuts` are the numbers of messages after which a stream breaks, one for each stream that is opened;
    afterwards streams don't break.
    """

    def __init__(self, feed_id: str = "feed") -> None:
        self.feed_id = feed_id
        self.log: list[Event] = []
        self.trimmed = 0
        self.available = True
        self.silent = False
        self.cuts: list[int] = []
        self.snapshots_taken = 0
        self.watches: list[tuple[str, int]] = []
        self._wakes: set[asyncio.Event] = set()

    @property
    def head(self) -> int:
        return len(self.log)

    def commit(self, *events: Event) -> int:
        self.log.extend(events)
        self._wake()
        return self.head

    def cut_all(self) -> None:
        """Ends every open stream with UNAVAILABLE."""
        self.available = False
        self._wake()

    def entries(self) -> list[Entry]:
        built = CatalogueImage(self.feed_id, self.head)
        for event in self.log:
            built.add(event)
        found: list[Entry] = [*built.bases.values(), *built.by_digest.values()]
        found += [*built.aliases.values(), *built.routes.values(), *built.policies.values()]
        return found

    async def snapshot(self) -> AsyncGenerator[SnapshotPart, None]:
        left = self._open()
        feed_id, position, entries = self.feed_id, self.head, self.entries()
        self.snapshots_taken += 1
        yield SnapshotPart(feed_id, position, ())
        for entry in entries:
            await asyncio.sleep(0)
            left = self._spend(left)
            yield SnapshotPart(feed_id, position, (entry,))

    async def watch(self, feed_id: str, after: int) -> AsyncGenerator[FeedMessage, None]:
        left = self._open()
        self.watches.append((feed_id, after))
        if feed_id != self.feed_id or not self.trimmed <= after <= self.head:
            raise MeshError(Code.OUT_OF_RANGE, Reason.FEED_POSITION_EXPIRED, "take a snapshot")
        position = after
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            while True:
                wake.clear()
                while not self.silent and position < self.head:
                    left = self._spend(left)
                    position += 1
                    yield FeedMessage(self.head, Change(position, self.log[position - 1]))
                if not self.silent:
                    yield FeedMessage(self.head)
                await wake.wait()
                self._spend(None)
        finally:
            self._wakes.discard(wake)

    def _open(self) -> int | None:
        self._spend(None)
        return self.cuts.pop(0) if self.cuts else None

    def _spend(self, left: int | None) -> int | None:
        if not self.available or left == 0:
            raise unavailable(Reason.STORE_UNREACHABLE, "the store is away", 1.0)
        return None if left is None else left - 1

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()


async def until(condition: Callable[[], bool], turns: int = 10_000) -> None:
    """Gives the loop turns until the condition holds; bounded by turns, not by time."""
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never held")
