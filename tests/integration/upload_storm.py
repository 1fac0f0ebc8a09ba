"""Uploads to the stores of one mesh while their processes, and the servers behind them, are killed.

What a storm promises its test: each upload's bytes follow from its seed, and afterwards it is known of each
what its client was told. What is random follows from the storm's seed, up to the timing of the machine.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.rpc.status import DETAILS_KEY, mesh_error_from
from tests.integration.fragile_processes import Fragile, Replica, Server
from tests.integration.store_process import adapter_files, large_files, upload_messages

WEIGHTS = "adapter_model.safetensors"
CALL_SECONDS = 60.0
RETRY_SECONDS = 0.05
# Of an upload, from its first attempt to its acknowledgement: outages included, and the four minutes that an
# unanswered removal of its blobs is waited for.
UPLOAD_SECONDS = 500.0


class Told(Enum):
    """What the client of an upload knows at its end."""

    NOTHING_YET = "nothing yet"
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    """By the store, before it began to publish."""
    LOST = "lost"
    """The answer never came, or the database was lost: it may have been published or not."""
    CUT_SHORT = "cut short"
    """The client never sent all of it."""


@dataclass
class Upload:
    """One upload with content of its own."""

    seed: int
    name: str
    large: bool
    messages: int | None
    """It stops after so many; None: it is whole."""
    persistent: bool
    """It is tried until it is acknowledged."""
    told: Told = Told.NOTHING_YET
    answer: store_pb2.UploadAdapterResponse | None = None

    def files(self) -> dict[str, bytes]:
        return large_files(self.seed) if self.large else adapter_files(self.seed, rank=1 + self.seed % 8)


@dataclass
class Watcher:
    """Follows the feed at one store, over every outage; fails if a position is missing or comes again."""

    replica: Replica
    feed_id: str
    changes: list[store_pb2.Change] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            request = store_pb2.WatchChangesRequest(feed_id=self.feed_id, after_position=len(self.changes))
            try:
                async for message in self.replica.process.stub.WatchChanges(request):
                    if message.HasField("change"):
                        assert message.change.position == len(self.changes) + 1
                        self.changes.append(message.change)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                await asyncio.sleep(RETRY_SECONDS)


@dataclass(frozen=True)
class StormConfig:
    """How much of what."""

    uploads: int
    lanes: int = 5
    names: int = 12
    uploads_between_kills: int = 5
    """At most; the least is one."""


class Storm:
    """Uploads in several lanes, collections of garbage without grace, and one who kills.

    Args:
        config: how much.
        replicas: the stores, which run.
        servers: what they need, which runs too.
        seed: of everything that is random.
    """

    def __init__(
        self, config: StormConfig, replicas: list[Replica], servers: list[Server], seed: int
    ) -> None:
        self._config = config
        self._replicas = replicas
        self._servers = servers
        self._random = random.Random(seed)
        self._waiting = [self._upload(number) for number in range(config.uploads)]
        self._ended = 0
        self._over = False
        self.uploads = list(self._waiting)
        self.kills: list[str] = []
        self.attempts = 0
        self.collected = 0

    async def run(self, watchers: list[Watcher]) -> None:
        """Until every upload has ended; then all processes run."""
        async with asyncio.TaskGroup() as around:
            watching = [around.create_task(watcher.run()) for watcher in watchers]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._collect())
                group.create_task(self._kill_again_and_again())
                async with asyncio.TaskGroup() as lanes:
                    for _ in range(self._config.lanes):
                        lanes.create_task(self._lane())
                self._over = True
            await self._start_all()
            await self._caught_up(watchers)
            for task in watching:
                task.cancel()

    def _upload(self, number: int) -> Upload:
        dice = self._random.random()
        return Upload(
            seed=number,
            name=f"a{self._random.randrange(self._config.names)}",
            large=dice < 0.04,
            messages=self._random.choice((1, 2, -1)) if dice > 0.92 else None,
            persistent=dice < 0.7,
        )

    async def _lane(self) -> None:
        while self._waiting:
            upload = self._waiting.pop(0)
            async with asyncio.timeout(UPLOAD_SECONDS):
                await self._until_told(upload)
            self._ended += 1

    async def _until_told(self, upload: Upload) -> None:
        files = await asyncio.to_thread(upload.files)
        while upload.told is not Told.ACKNOWLEDGED:
            self.attempts += 1
            told = await self._attempt(upload, files)
            # What one attempt has left open no later refusal can settle.
            if told is not Told.REFUSED or upload.told is Told.NOTHING_YET:
                upload.told = told
            if told is Told.CUT_SHORT or (told is not Told.ACKNOWLEDGED and not upload.persistent):
                return
            await asyncio.sleep(0 if told is Told.ACKNOWLEDGED else RETRY_SECONDS)

    async def _attempt(self, upload: Upload, files: dict[str, bytes]) -> Told:
        stub = self._random.choice(self._replicas).process.stub
        if upload.messages is not None:
            await self._cut_short(stub, upload, files)
            return Told.CUT_SHORT
        try:
            messages = upload_messages(upload.name, files)
            upload.answer = await stub.UploadAdapter(messages, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            return _told_by(error)
        return Told.ACKNOWLEDGED

    async def _cut_short(
        self, stub: "store_pb2_grpc.StoreServiceAsyncStub", upload: Upload, files: dict[str, bytes]
    ) -> None:
        messages = [message async for message in upload_messages(upload.name, files)][: upload.messages]
        cancelled = asyncio.Event()

        async def some() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
            for message in messages:
                yield message
            await cancelled.wait()

        call = stub.UploadAdapter(some(), timeout=CALL_SECONDS)
        await asyncio.sleep(self._random.uniform(0.05, 0.5))
        call.cancel()
        cancelled.set()
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await call

    async def _collect(self) -> None:
        """Garbage, without any grace: the blobs of uploads in progress go too."""
        while not self._over:
            await asyncio.sleep(self._random.uniform(0.5, 3))
            try:
                report = await self._random.choice(self._replicas).process.collect()
                self.collected += report.removed_blobs
            except grpc.aio.AioRpcError as error:
                _told_by(error)

    async def _kill_again_and_again(self) -> None:
        fragile: list[Fragile] = [*self._replicas, *self._servers]
        while not self._over:
            until = self._ended + self._random.randint(1, self._config.uploads_between_kills)
            while self._ended < until and not self._over:  # noqa: ASYNC110  # the lanes have their own tasks
                await asyncio.sleep(0.005)
            await asyncio.sleep(self._random.uniform(0, 0.3))
            # Now and then two at once.
            count = min(len(fragile), self._random.choice((1, 1, 2)))
            await self._outage(self._random.sample(fragile, count))

    async def _outage(self, victims: list[Fragile]) -> None:
        for victim in victims:
            self.kills.append(victim.name)
            await victim.kill()
        await asyncio.sleep(self._random.uniform(0, 0.5))
        # A store does not start without what it needs.
        for victim in sorted(victims, key=lambda each: isinstance(each, Replica)):
            await victim.start()

    async def _start_all(self) -> None:
        """Once more, so that what each store left is swept by its successor."""
        for replica in self._replicas:
            await replica.kill()
            await replica.start()

    async def _caught_up(self, watchers: list[Watcher]) -> None:
        head = (await first_part(self._replicas[0])).feed_position
        async with asyncio.timeout(CALL_SECONDS):
            while any(len(watcher.changes) < head for watcher in watchers):  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.02)


async def first_part(replica: Replica) -> store_pb2.GetSnapshotResponse:
    async for part in replica.process.stub.GetSnapshot(store_pb2.GetSnapshotRequest()):
        return part
    raise AssertionError("a snapshot has a first part")


def _told_by(error: grpc.aio.AioRpcError) -> Told:
    """What a failed call says; fails the test if it is nothing that an outage explains."""
    if error.details() == "Internal error from Core":
        # A refusal or a lost connection that crossed a message (grpc/grpc#36066).
        return Told.LOST
    found = mesh_error_from(error)
    assert found.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED), found
    if DETAILS_KEY not in dict(error.trailing_metadata() or ()):
        return Told.LOST
    assert found.reason in (Reason.STORE_UNREACHABLE, Reason.OVERLOADED), found
    assert found.retry_after, found
    return Told.LOST if _may_have_committed(found) else Told.REFUSED


def _may_have_committed(error: MeshError) -> bool:
    """Only the loss of the database leaves that open: the S3 server is needed before, and named."""
    return error.reason is Reason.STORE_UNREACHABLE and "endpoint" not in error.metadata


async def retried(call: Callable[[], Awaitable[Any]]) -> Any:
    """After an outage a connection may turn out to be dead only when it is used."""
    for _ in range(5):
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            _told_by(error)
            await asyncio.sleep(RETRY_SECONDS)
    return await call()


def versions_by_upload(
    uploads: list[Upload], versions: list[adapter_pb2.Version], digest_of: Callable[[bytes], str]
) -> dict[int, adapter_pb2.Version]:
    """The visible version of each upload, by its seed; by the weights, which no two uploads share."""
    seeds = {(upload.name, digest_of(upload.files()[WEIGHTS])): upload.seed for upload in uploads}
    found: dict[int, adapter_pb2.Version] = {}
    for version in versions:
        (weights,) = (file.digest for file in version.source_files if file.path == WEIGHTS)
        seed = seeds[version.name, weights]
        assert seed not in found, f"upload {seed} is visible twice"
        found[seed] = version
    return found
