"""Upload sessions and their parts in the database. The functions that write need a write transaction."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Reason, not_found
from adaptermesh.core.refs import AdapterName
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.records import SourceFile
from adaptermesh.store.schema import upload_parts, upload_sessions
from adaptermesh.store.session_outcomes import SessionOutcome
from adaptermesh.store.upload_progress import UploadPart


@dataclass(frozen=True, slots=True)
class UploadSession:
    """An upload that has begun; `id` is the digest of the key that continues it."""

    id: str
    header: UploadHeader
    expire_time_us: int
    outcome: SessionOutcome | None = None
    parts: tuple[UploadPart, ...] = ()
    tenant: str = ""
    """Whose upload it is."""


async def insert_session(connection: AsyncConnection, session: UploadSession) -> None:
    row = {
        "id": session.id,
        "header": header_to_json(session.header),
        "size_bytes": session.header.size_bytes,
        "expire_time_us": session.expire_time_us,
        "outcome": "",
        "tenant": session.tenant,
    }
    await connection.execute(insert(upload_sessions).values(row))


async def open_sessions(connection: AsyncConnection, now_us: int, tenant: str = "") -> tuple[int, int]:
    """How many, perhaps of one tenant, are neither completed nor expired, and how many bytes they have."""
    query = select(func.count(), func.sum(upload_sessions.c.size_bytes)).where(
        upload_sessions.c.outcome == "", upload_sessions.c.expire_time_us > now_us
    )
    if tenant:
        query = query.where(upload_sessions.c.tenant == tenant)
    count, size = (await connection.execute(query)).one()
    return int(count), int(size or 0)


async def find_session(connection: AsyncConnection, session_id: str, now_us: int) -> UploadSession:
    """The session with its parts; raises MeshError UPLOAD_NOT_FOUND, also if it has expired."""
    row = (
        await connection.execute(
            select(upload_sessions).where(
                upload_sessions.c.id == session_id, upload_sessions.c.expire_time_us > now_us
            )
        )
    ).first()
    if row is None:
        # The key is a secret: the error does not repeat it.
        raise not_found(Reason.UPLOAD_NOT_FOUND, "upload", "of this id")
    parts = await connection.execute(select(upload_parts).where(upload_parts.c.session_id == session_id))
    return _session(row, tuple(sorted(map(_part, parts))))


async def insert_part(connection: AsyncConnection, session_id: str, part: UploadPart) -> None:
    row = {
        "session_id": session_id,
        "file_index": part.file_index,
        "offset_bytes": part.offset,
        "size_bytes": part.size_bytes,
        "digest": part.digest,
    }
    await connection.execute(insert(upload_parts).values(row))


async def delete_part(connection: AsyncConnection, session_id: str, part: UploadPart) -> None:
    """Forgets one part, so that it is sent again."""
    same = (
        (upload_parts.c.session_id == session_id)
        & (upload_parts.c.file_index == part.file_index)
        & (upload_parts.c.offset_bytes == part.offset)
    )
    await connection.execute(delete(upload_parts).where(same))


async def extend_session(connection: AsyncConnection, session_id: str, expire_time_us: int) -> None:
    """Moves the end of a session on; another store's clock may have moved it further."""
    same = (upload_sessions.c.id == session_id) & (upload_sessions.c.expire_time_us < expire_time_us)
    await connection.execute(update(upload_sessions).where(same).values(expire_time_us=expire_time_us))


async def finish_session(connection: AsyncConnection, session_id: str, outcome: SessionOutcome) -> None:
    """Keeps what has become of it."""
    same = upload_sessions.c.id == session_id
    await connection.execute(update(upload_sessions).where(same).values(outcome=outcome.to_json()))


async def delete_parts(connection: AsyncConnection, session_ids: Sequence[str]) -> set[str]:
    """Forgets the parts of sessions; returns their digests."""
    same = upload_parts.c.session_id.in_(session_ids)
    rows = await connection.execute(delete(upload_parts).where(same).returning(upload_parts.c.digest))
    return {row.digest for row in rows}


async def delete_sessions(connection: AsyncConnection, session_ids: Sequence[str]) -> set[str]:
    """Forgets sessions with their parts; returns the parts' digests."""
    digests = await delete_parts(connection, session_ids)
    await connection.execute(delete(upload_sessions).where(upload_sessions.c.id.in_(session_ids)))
    return digests


async def expired_sessions(connection: AsyncConnection, now_us: int, limit: int) -> list[str]:
    """Those that have expired, the oldest first."""
    query = select(upload_sessions.c.id).where(upload_sessions.c.expire_time_us <= now_us)
    rows = await connection.execute(query.order_by(upload_sessions.c.expire_time_us).limit(limit))
    return [row.id for row in rows]


async def count_expired(connection: AsyncConnection, now_us: int) -> int:
    query = select(func.count()).where(upload_sessions.c.expire_time_us <= now_us)
    return int((await connection.execute(query)).scalar_one())


async def needed_parts(connection: AsyncConnection, digests: Sequence[str], now_us: int) -> set[str]:
    """Which of these digests a session needs that has not expired."""
    query = (
        select(upload_parts.c.digest)
        .join(upload_sessions, upload_sessions.c.id == upload_parts.c.session_id)
        .where(upload_parts.c.digest.in_(digests), upload_sessions.c.expire_time_us > now_us)
    )
    return {row.digest for row in await connection.execute(query)}


def _session(row: Row[Any], parts: tuple[UploadPart, ...]) -> UploadSession:
    outcome = SessionOutcome.from_json(row.outcome) if row.outcome else None
    return UploadSession(row.id, header_from_json(row.header), row.expire_time_us, outcome, parts)


def _part(row: Row[Any]) -> UploadPart:
    return UploadPart(row.file_index, row.offset_bytes, row.size_bytes, row.digest)


def header_to_json(header: UploadHeader) -> str:
    return json.dumps(dataclasses.asdict(header))


def header_from_json(text: str) -> UploadHeader:
    values = json.loads(text)
    values["adapter"] = AdapterName(**values["adapter"])
    values["files"] = tuple(SourceFile(**file) for file in values["files"])
    for name in ("tags", "parents"):
        values[name] = tuple(values[name])
    return UploadHeader(**values)
