"""An upload in parts that goes on after interruptions: of the connection, of the store, of this process."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.transfer import STATUS_LOST, Progress, ProgressCallback
from adaptermesh.client.upload_memory import UploadMemory
from adaptermesh.client.upload_parts import (
    Part,
    Ranges,
    missing_parts,
    part_messages,
    read_part,
    received_bytes,
)
from adaptermesh.core.backoff import Backoff
from adaptermesh.core.errors import Code, MeshError, Reason

_LOST_PAUSE_SECONDS = 0.1
# What the next look at the upload's state answers.
_LOOK_AGAIN = (Reason.UPLOAD_NOT_FOUND, Reason.UPLOAD_CONFLICT, Reason.UPLOAD_INCOMPLETE)
_TRANSIENT = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class ResumeConfig:
    """How parts are sent, and how often to try again."""

    part_bytes: int = 8 * 2**20
    """Or less, if the store takes no such parts."""
    attempts: int = 12
    """So often without any progress in between."""
    busy_attempts: int = 60
    """Likewise, where the store has too much to do and says so."""
    first_seconds: float = 0.25
    longest_seconds: float = 8.0
    """Pauses between attempts. A store that asks for a longer one is not waited for."""
    parts_at_once: int = 3


class UploadCalls(Protocol):
    """The store's RPCs for uploads in parts; each raises MeshError."""

    async def begin_upload(self, header: store_pb2.UploadHeader) -> store_pb2.BeginUploadResponse: ...

    async def send_part(self, messages: AsyncIterator[store_pb2.UploadPartRequest]) -> None: ...

    async def get_upload(self, upload_id: str) -> store_pb2.GetUploadResponse: ...

    async def complete_upload(self, upload_id: str) -> store_pb2.CompleteUploadResponse: ...


@dataclass(frozen=True, slots=True)
class Completed:
    """The store's answer, and how much of it an earlier process had sent."""

    response: store_pb2.CompleteUploadResponse
    resumed_bytes: int


class ResumableUpload:
    """One upload of some files.

    Args:
        calls: to the store.
        header: what is uploaded.
        files: in the header's order.
        memory: where the upload's id is kept until it is completed.
        progress: hears of bytes that are on their way; never less than before.
        config: how it is sent, and how often to try again.
        rng: for the lengths of pauses.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        calls: UploadCalls,
        header: store_pb2.UploadHeader,
        files: Sequence[FolderFile],
        memory: UploadMemory,
        progress: ProgressCallback | None = None,
        config: ResumeConfig = ResumeConfig(),  # frozen
        rng: random.Random | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._calls = calls
        self._header = header
        self._files = files
        self._memory = memory
        self._config = config
        self._pauses = Backoff(
            config.first_seconds,
            config.longest_seconds,
            rng or random.Random(),  # noqa: S311  # no secret
        )
        self._pause = pause
        self._tally = _Tally(files, progress)
        self._upload_id: str | None = None
        self._answered = False
        self._attempts = 0
        self._resumed_bytes: int | None = None
        self._lost_pause = 0.0

    async def send(self) -> Completed:
        """Sends what is missing and has it published.

        Raises:
            MeshError: the store's refusal; or the last failure, after which a call with the same files and
                header goes on from there.
        """
        self._upload_id = await asyncio.to_thread(self._memory.recall)
        while True:
            acknowledged = self._tally.acknowledged
            try:
                response = await self._try()
            except MeshError as error:
                if self._tally.acknowledged > acknowledged:
                    self._attempts = 0
                    self._pauses.reset()
                await self._bear(error)
            else:
                await asyncio.to_thread(self._memory.forget)
                return Completed(response, self._resumed_bytes or 0)

    async def _try(self) -> store_pb2.CompleteUploadResponse:
        if self._upload_id is None:
            begun = await self._calls.begin_upload(self._header)
            self._answered = True
            self._upload_id = begun.upload_id
            await asyncio.to_thread(self._memory.keep, begun.upload_id)
        upload_id = self._upload_id
        found = await self._calls.get_upload(upload_id)
        self._answered = True
        if not found.completed:
            received = {
                file.path: [(one.offset, one.size_bytes) for one in file.ranges] for file in found.files
            }
            most_bytes = min(found.max_part_bytes or self._config.part_bytes, self._config.part_bytes)
            await self._send_missing(upload_id, received, most_bytes)
        return await self._calls.complete_upload(upload_id)

    async def _send_missing(self, upload_id: str, received: Ranges, most_bytes: int) -> None:
        self._tally.restart(received_bytes(received))
        if self._resumed_bytes is None:
            self._resumed_bytes = received_bytes(received)
        parts = deque(missing_parts(self._files, received, most_bytes))

        async def work() -> None:
            while parts:
                await self._send_part(upload_id, parts.popleft())

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.parts_at_once):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            refused, others = failures.split(MeshError)
            if others is not None or refused is None:
                raise
            raise _first(refused) from failures

    async def _send_part(self, upload_id: str, part: Part) -> None:
        def on_bytes(count: int) -> None:
            self._tally.on_its_way(part.file.source.path, count)

        data, digest = await asyncio.to_thread(read_part, part)
        header = store_pb2.PartHeader(
            upload_id=upload_id,
            path=part.file.source.path,
            offset=part.offset,
            size_bytes=part.size_bytes,
            digest=digest,
        )
        await self._calls.send_part(part_messages(header, data, on_bytes, self._lost_pause))
        self._tally.acknowledge(part.size_bytes)

    async def _bear(self, error: MeshError) -> None:
        """Returns after a pause if another attempt makes sense; else raises the error."""
        if error.reason is Reason.UPLOAD_NOT_FOUND or error.code is Code.INVALID_ARGUMENT:
            # It has expired, or it was refused for good.
            self._upload_id = None
            await asyncio.to_thread(self._memory.forget)
        lost = error.message == STATUS_LOST
        again = error.code in _TRANSIENT or error.reason in _LOOK_AGAIN or lost
        asked = error.retry_after or 0.0
        # Where nobody ever answered there is nothing to wait for.
        hopeless = (error.code is Code.UNAVAILABLE and not self._answered) or (
            asked > self._config.longest_seconds
        )
        self._attempts += 1
        busy = error.code is Code.RESOURCE_EXHAUSTED
        most = self._config.busy_attempts if busy else self._config.attempts
        if not again or hopeless or self._attempts >= most:
            raise error
        self._lost_pause = _LOST_PAUSE_SECONDS if lost else self._lost_pause
        await self._pause(max(asked, self._pauses.next_delay()))


class _Tally:
    """Counts bytes; what is shown never goes back."""

    def __init__(self, files: Sequence[FolderFile], progress: ProgressCallback | None) -> None:
        self._total = sum(file.source.size_bytes for file in files)
        self._progress = progress
        self._shown = 0
        self._sent = 0
        self.acknowledged = 0

    def restart(self, acknowledged: int) -> None:
        """What was on its way is lost, unless it is there."""
        self.acknowledged = max(self.acknowledged, acknowledged)
        self._sent = acknowledged
        self._show("")

    def on_its_way(self, path: str, count: int) -> None:
        self._sent += count
        self._show(path)

    def acknowledge(self, count: int) -> None:
        self.acknowledged += count

    def _show(self, path: str) -> None:
        if self._progress is not None and self._sent > self._shown:
            self._shown = self._sent
            self._progress(Progress(path, self._sent, self._total))


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise RuntimeError("an empty group")
