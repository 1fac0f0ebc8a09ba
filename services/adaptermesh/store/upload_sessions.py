"""Uploads in parts, which can be continued after an interruption at any store of one database and one bucket.

What a client has been told that it was received is in the backend and in the database. Completing an upload
sends its parts through `Uploads` like any other upload's bytes: there is one way to be checked and published.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.catalogue import Catalogue
from adaptermesh.store.database import Database
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.part_blobs import PartBlobs
from adaptermesh.store.part_intake import PartIntake, PartReceived, PartRequest
from adaptermesh.store.session_config import SessionConfig, session_id_of
from adaptermesh.store.session_outcomes import SessionOutcome
from adaptermesh.store.session_rows import (
    UploadSession,
    delete_parts,
    delete_sessions,
    extend_session,
    find_session,
    finish_session,
    insert_session,
    open_sessions,
)
from adaptermesh.store.staging import Staging, next_message
from adaptermesh.store.upload_progress import check_whole
from adaptermesh.store.uploads import UploadOutcome, Uploads

log = logging.getLogger(__name__)

T = TypeVar("T")

_KEY_BYTES = 32
_EXPIRED_FOR_ONE = 4


class UploadSessions:
    """Begins, continues and ends uploads in parts."""

    def __init__(
        self,
        config: SessionConfig,
        database: Database,
        catalogue: Catalogue,
        uploads: Uploads,
        parts: PartBlobs,
        staging: Staging,
        clock: Clock,
        new_key: Callable[[], str] = lambda: secrets.token_urlsafe(_KEY_BYTES),
    ) -> None:
        self._config = config
        self._database = database
        self._catalogue = catalogue
        self._uploads = uploads
        self._parts = parts
        self._intake = PartIntake(config, database, parts, staging, clock, uploads.check_accepting)
        self._clock = clock
        self._new_key = new_key
        self._work = OwnedWork()
        self._completing: dict[str, asyncio.Task[UploadOutcome]] = {}

    async def begin(self, header: UploadHeader) -> tuple[str, UploadSession]:
        """Begins an upload; returns the key that continues it.

        Raises:
            MeshError: what the header alone shows to be wrong; RESOURCE_EXHAUSTED if there are too many.
        """
        self._uploads.check_accepting()
        if header.validate_only:
            raise invalid_field("validate_only", "is for an upload in one piece")
        await self._uploads.check(header)
        await self._uploads.check_room(header)
        await self._parts.expire(most=_EXPIRED_FOR_ONE)
        key = self._new_key()
        caller = current_caller.get()
        session = UploadSession(session_id_of(key), header, self._expire_time(), tenant=caller.tenant)

        async def work(connection: AsyncConnection) -> None:
            await self._check_room(connection, header)
            if not caller.is_operator:
                # Nobody takes the room of all the others.
                await self._check_room(connection, header, caller.tenant, share=2)
            await insert_session(connection, session)

        await self._database.write(work)
        log.info("upload begun", extra={**_fields(session), "size_bytes": header.size_bytes})
        return key, session

    async def _check_room(
        self, connection: AsyncConnection, header: UploadHeader, tenant: str = "", share: int = 1
    ) -> None:
        count, size = await open_sessions(connection, self._now_us(), tenant)
        most, most_bytes = max(1, self._config.most // share), self._config.most_bytes // share
        if count >= most or size + header.size_bytes > most_bytes:
            message = f"{count} uploads of {size} bytes have begun and not ended, the limit"
            raise MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, message, retry_after=60.0)

    async def get(self, key: str) -> UploadSession:
        """What has been received; raises MeshError UPLOAD_NOT_FOUND."""
        return await self._find(session_id_of(key))

    async def first(self, messages: AsyncIterator[T]) -> T | None:
        """The first message of a part, None if there is none."""
        return await next_message(messages, self._config.idle_seconds)

    async def receive(self, key: str, request: PartRequest, pieces: AsyncIterator[bytes]) -> PartReceived:
        """Keeps a part; raises MeshError if it was refused."""
        return await self._intake.receive(session_id_of(key), request, pieces)

    async def complete(self, key: str) -> UploadOutcome:
        """Publishes what was received. Who asks again meanwhile waits for the same; later, gets the same.

        Raises:
            MeshError: UPLOAD_INCOMPLETE, UPLOAD_NOT_FOUND, or why it was refused.
        """
        session_id = session_id_of(key)
        task = self._completing.get(session_id)
        if task is None:
            task = asyncio.create_task(self._work.finish(self._complete(session_id)))
            self._completing[session_id] = task
            task.add_done_callback(lambda done: self._completed(session_id, done))
        return await asyncio.shield(task)

    async def abandon(self, key: str) -> None:
        """Forgets an upload, if it is there, and removes its parts."""
        session_id = session_id_of(key)

        async def work(connection: AsyncConnection) -> set[str]:
            return await delete_sessions(connection, [session_id])

        await self._release(await self._database.write(work))

    async def close(self) -> None:
        """Waits for what is being completed."""
        await self._work.wait()
        await self._intake.close()

    def _completed(self, session_id: str, task: asyncio.Task[UploadOutcome]) -> None:
        del self._completing[session_id]
        # Marks a failure as seen: whoever asked may be gone.
        if not task.cancelled():
            task.exception()

    async def _complete(self, session_id: str) -> UploadOutcome:
        session = await self._find(session_id)
        await self._uploads.check_publisher(session.header)
        if session.outcome is not None:
            return await self._recorded(session.outcome)
        check_whole(session.header, session.parts)
        # It must not expire while it is checked.
        await self._extend(session_id)
        try:
            async with aclosing(self._parts.read(session.parts)) as pieces:
                outcome = await self._uploads.receive(session.header, pieces)
        except MeshError as error:
            return await self._failed(session, error)
        await self._finish(session, SessionOutcome(outcome.version.digest, outcome.created))
        return outcome

    async def _failed(self, session: UploadSession, error: MeshError) -> UploadOutcome:
        """Raises the error, unless somebody else has completed the upload."""
        if error.reason is Reason.DATA_CORRUPT:
            # A part is gone because the upload is: abandoned, or completed at another store.
            ended = await self._find(session.id)
            if ended.outcome is not None:
                return await self._recorded(ended.outcome)
            # Or the backend has lost it: then the client sends it again.
            check_whole(ended.header, await self._intake.drop_lost(ended))
        if error.code is Code.INVALID_ARGUMENT:
            await self._finish(session, SessionOutcome(refusal=error))
        raise error

    async def _recorded(self, outcome: SessionOutcome) -> UploadOutcome:
        if outcome.refusal is not None:
            raise outcome.refusal
        stored = await self._catalogue.get_digest(outcome.digest)
        return UploadOutcome(stored.record, outcome.created, stored.feed_position)

    async def _find(self, session_id: str) -> UploadSession:
        async with self._database.reading() as connection:
            return await find_session(connection, session_id, self._now_us())

    async def _extend(self, session_id: str) -> None:
        async def work(connection: AsyncConnection) -> None:
            await find_session(connection, session_id, self._now_us())
            await extend_session(connection, session_id, self._expire_time())

        await self._database.write(work)

    async def _finish(self, session: UploadSession, outcome: SessionOutcome) -> None:
        """Keeps the outcome instead of the parts, unless somebody has ended the upload already."""

        async def work(connection: AsyncConnection) -> set[str]:
            found = await find_session(connection, session.id, self._now_us())
            if found.outcome is None:
                await finish_session(connection, session.id, outcome)
                await extend_session(connection, session.id, self._expire_time())
            return await delete_parts(connection, [session.id])

        try:
            digests = await self._database.write(work)
        except MeshError as error:
            # The version is what counts; asked again, the upload is completed again, to the same version.
            log.info("upload's outcome not kept", extra={**_fields(session), "reason": error.reason.value})
            return
        await self._release(digests)

    async def _release(self, digests: set[str]) -> None:
        try:
            await self._parts.release(digests)
        except MeshError as error:
            log.info("parts are left to garbage collection", extra={"detail": error.message})

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)

    def _expire_time(self) -> int:
        return self._now_us() + int(self._config.seconds * 1e6)


def _fields(session: UploadSession) -> dict[str, str]:
    return {"adapter": str(session.header.adapter), "session": session.id[:19]}
