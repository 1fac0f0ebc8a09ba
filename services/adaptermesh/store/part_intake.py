"""Parts of uploads on their way in: received, checked, kept, and only then acknowledged."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.store.database import Database
from adaptermesh.store.headers import invalid_upload
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.part_blobs import PartBlobs
from adaptermesh.store.records import SourceFile
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.session_rows import (
    UploadSession,
    delete_part,
    extend_session,
    find_session,
    insert_part,
)
from adaptermesh.store.staging import Place, Staging, receive_files
from adaptermesh.store.upload_progress import (
    UploadPart,
    check_bounds,
    find_source,
    is_known,
    most_parts,
    upload_conflict,
)
from adaptermesh.store.uploads import raise_if_full

log = logging.getLogger(__name__)

_KEEP_ATTEMPTS = 3
_WAITING_FOR_ONE = 16


@dataclass(frozen=True, slots=True)
class PartRequest:
    """Which bytes of an upload are sent."""

    path: str
    offset: int
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class PartReceived:
    """A part that is kept; `created` is False if it was there before."""

    created: bool
    expire_time_us: int


class PartIntake:
    """Receives parts, a bounded number at the same time."""

    def __init__(
        self,
        config: SessionConfig,
        database: Database,
        parts: PartBlobs,
        staging: Staging,
        clock: Clock,
        check_accepting: Callable[[], None],
    ) -> None:
        self._config = config
        self._database = database
        self._parts = parts
        self._staging = staging
        self._clock = clock
        self._check_accepting = check_accepting
        self._work = OwnedWork()
        self._turns = asyncio.Semaphore(config.parts_at_once)
        self._receiving = 0

    async def close(self) -> None:
        """Waits for what is being cleared away."""
        await self._work.wait()

    async def receive(
        self, session_id: str, request: PartRequest, pieces: AsyncIterator[bytes]
    ) -> PartReceived:
        """Keeps a part. A caller that goes away before its last byte leaves nothing behind.

        Raises:
            MeshError: why it was refused.
        """
        async with self._turn():
            async with self._database.reading() as connection:
                session = await find_session(connection, session_id, self._now_us())
            part, file = _part_of(session, request)
            # Before its bytes are read; it is looked again when they are kept.
            _is_known(session, part)
            place = self._staging.place()
            try:
                path = await self._received(place, part, file, pieces)
                return await self._keep(session_id, part, path)
            except OSError as error:
                raise_if_full(error)
                raise
            finally:
                await self._work.finish(place.discard())

    async def drop_lost(self, session: UploadSession) -> tuple[UploadPart, ...]:
        """Forgets the parts whose bytes are not in the backend any more; returns those that are."""
        lost = [part for part in session.parts if await self._forget_lost(session.id, part)]
        return tuple(part for part in session.parts if part not in lost)

    async def _forget_lost(self, session_id: str, part: UploadPart) -> bool:
        """False if its bytes are there, also if they have come again meanwhile."""
        if await self._parts.is_there(part.digest):
            return False

        async def work(connection: AsyncConnection) -> bool:
            if await self._parts.is_there(part.digest):
                return False
            await delete_part(connection, session_id, part)
            return True

        lost = await self._database.write(work)
        if lost:
            log.error("part of an upload is lost", extra={"digest": part.digest, "session": session_id[:19]})
        return lost

    async def _received(
        self, place: Place, part: UploadPart, file: SourceFile, pieces: AsyncIterator[bytes]
    ) -> Path:
        """Where its bytes are, checked."""
        name = f"{file.path}, bytes {part.offset} to {part.end}"
        source = SourceFile(name, part.size_bytes, part.digest)
        try:
            async with asyncio.timeout(self._config.part_seconds):
                found = await receive_files(place, (source,), pieces, self._config.idle_seconds)
        except TimeoutError as error:
            message = f"the part did not come within {self._config.part_seconds:g} s"
            raise MeshError(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, message) from error
        return found[name]

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """So many parts are received at once; some more wait, the others are refused."""
        self._check_accepting()
        if self._receiving >= self._config.parts_at_once * (1 + _WAITING_FOR_ONE):
            message = f"{self._receiving} parts of uploads are on their way, the limit"
            raise MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, message, retry_after=1.0)
        self._receiving += 1
        try:
            await self._wait()
            try:
                yield
            finally:
                self._turns.release()
        finally:
            self._receiving -= 1

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._config.idle_seconds):
                await self._turns.acquire()
        except TimeoutError as error:
            message = "too many parts of uploads are on their way"
            raise unavailable(Reason.OVERLOADED, message, retry_after=1.0) from error

    async def _keep(self, session_id: str, part: UploadPart, source: Path) -> PartReceived:
        """Again if the part was removed as garbage before its upload could be seen to need it."""

        async def work(connection: AsyncConnection) -> PartReceived:
            session = await find_session(connection, session_id, self._now_us())
            known = _is_known(session, part)
            if not await self._parts.is_there(part.digest):
                raise _Collected
            if not known:
                await insert_part(connection, session_id, part)
            expire_time_us = self._now_us() + int(self._config.seconds * 1e6)
            await extend_session(connection, session_id, expire_time_us)
            return PartReceived(not known, max(expire_time_us, session.expire_time_us))

        for _ in range(_KEEP_ATTEMPTS):
            await self._parts.put(part.digest, source)
            try:
                return await self._database.write(work)
            except _Collected:
                log.info("part is put again", extra={"digest": part.digest})
        message = "garbage collection removed the part again and again"
        raise unavailable(Reason.OVERLOADED, message, retry_after=1.0)

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)


class _Collected(Exception):
    """A part that was put is gone."""


def _part_of(session: UploadSession, request: PartRequest) -> tuple[UploadPart, SourceFile]:
    """The part and its file; raises MeshError INVALID_UPLOAD."""
    index, file = find_source(session.header, request.path)
    part = UploadPart(index, request.offset, request.size_bytes, request.digest)
    check_bounds(part, file)
    if not is_digest(part.digest):
        raise invalid_upload("the part has no sha256 digest", file=file.path)
    return part, file


def _is_known(session: UploadSession, part: UploadPart) -> bool:
    """Whether the part is there already; raises MeshError if it can't be added."""
    if session.outcome is not None:
        raise upload_conflict("the upload is completed")
    if is_known(part, session.parts):
        return True
    if len(session.parts) >= most_parts(session.header):
        raise invalid_upload(f"the upload has {len(session.parts)} parts, the limit: send larger ones")
    return False
