"""API keys: made, listed, ended, and looked up."""

import asyncio
import dataclasses
import logging
from dataclasses import dataclass, field

from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.core.refs import check_name
from adaptermesh.core.roles import MESH_TENANT, Role
from adaptermesh.store.access.records import ApiKeyRecord
from adaptermesh.store.access.rows import key_record
from adaptermesh.store.access.secrets import hash_key, new_key
from adaptermesh.store.access.tenants import check_tenant
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import MAX_ACTOR, MAX_COMMENT, check_text
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import ChangeKind
from adaptermesh.store.schema import api_keys, tenants

log = logging.getLogger(__name__)

MAX_KEYS = 1000
MAX_NAMESPACES = 32
MAX_TTL_SECONDS = 10 * 366 * 86400


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """What a new key shall be."""

    tenant: str
    """"*" for an operator's."""
    roles: tuple[Role, ...]
    namespaces: tuple[str, ...] = ()
    ttl_seconds: float | None = None
    """None: for good."""
    comment: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; its secret is nowhere else."""

    record: ApiKeyRecord
    secret: str = field(repr=False)
    feed_position: int


@dataclass(frozen=True, slots=True)
class KeptKey:
    """A key as it is kept."""

    record: ApiKeyRecord
    secret_hash: str = field(repr=False)
    max_requests_per_minute: int = 0
    """Of its tenant."""


class ApiKeys:
    """The keys of all tenants."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._hashing = asyncio.Semaphore(1)
        # Asked for with every call.
        kept = select(api_keys, tenants.c.max_requests_per_minute)
        kept = kept.outerjoin(tenants, tenants.c.name == api_keys.c.tenant)
        self._by_id = database.prepare(kept.where(api_keys.c.key_id == bindparam("key_id")))

    async def create(self, request: KeyRequest) -> NewKey:
        """Makes a key.

        Raises:
            MeshError: TENANT_NOT_FOUND; INVALID_FIELD; FAILED_PRECONDITION if the tenant has too many.
        """
        _check(request)
        async with self._database.reading() as connection:
            await _check_room(connection, request.tenant)
        key_id, secret = new_key()
        async with self._hashing:
            secret_hash = await asyncio.to_thread(hash_key, secret)
        now_us = int(self._clock.wall() * 1e6)
        ttl = request.ttl_seconds
        record = ApiKeyRecord(
            key_id=key_id,
            tenant=request.tenant,
            roles=tuple(sorted(set(request.roles))),
            namespaces=tuple(sorted(set(request.namespaces))),
            comment=request.comment,
            create_time_us=now_us,
            expire_time_us=0 if ttl is None else now_us + int(ttl * 1e6),
            actor=request.actor,
        )

        async def work(connection: AsyncConnection) -> int:
            if request.tenant != MESH_TENANT:
                await check_tenant(connection, request.tenant)
            await _check_room(connection, request.tenant)
            position = await append_change(connection, ChangeKind.API_KEY_SET, record, now_us)
            row = {
                **dataclasses.asdict(record),
                "roles": [role.value for role in record.roles],
                "namespaces": list(record.namespaces),
                "secret_hash": secret_hash,
                "feed_position": position,
            }
            await connection.execute(insert(api_keys).values(row))
            return position

        position = await self._database.write(work)
        log.info("API key made", extra={**_fields(record), "feed_position": position})
        return NewKey(record, secret, position)

    async def revoke(self, key_id: str, actor: str = "") -> tuple[ApiKeyRecord, int]:
        """Ends a key; returns it and the feed position, 0 if it was revoked before.

        Raises:
            MeshError: KEY_NOT_FOUND.
        """
        check_text("actor", actor, MAX_ACTOR)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[ApiKeyRecord, int]:
            row = (await connection.execute(select(api_keys).where(api_keys.c.key_id == key_id))).first()
            if row is None:
                raise unknown_key(key_id)
            known = key_record(row)
            if known.revoke_time_us:
                return known, 0
            same = api_keys.c.key_id == key_id
            await connection.execute(update(api_keys).where(same).values(revoke_time_us=now_us))
            revoked = dataclasses.replace(known, revoke_time_us=now_us)
            told = dataclasses.replace(revoked, actor=actor)
            return revoked, await append_change(connection, ChangeKind.API_KEY_SET, told, now_us)

        revoked, position = await self._database.write(work)
        log.info("API key revoked", extra={**_fields(revoked), "feed_position": position})
        return revoked, position

    async def list(self, tenant: str, request: PageRequest) -> Page[ApiKeyRecord]:
        """The keys of a tenant, or all of them, newest first."""
        if tenant != MESH_TENANT and tenant:
            check_name(tenant, "tenant")
        positions: dict[str, int] = {}

        def key(record: ApiKeyRecord) -> Key:
            return (positions[record.key_id],)

        pager = Pager(request, ["api_keys", tenant], key, (int,))
        statement = select(api_keys).order_by(api_keys.c.feed_position.desc()).limit(pager.limit)
        if tenant:
            statement = statement.where(api_keys.c.tenant == tenant)
        if pager.after is not None:
            statement = statement.where(api_keys.c.feed_position < pager.after[0])
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
        positions = {row.key_id: row.feed_position for row in rows}
        return pager.page(list(map(key_record, rows)))

    async def find(self, key_id: str) -> KeptKey | None:
        """A key as it is kept, also one that is no longer valid."""
        rows = await self._database.fetch(self._by_id, key_id=key_id)
        if not rows:
            return None
        (row,) = rows
        return KeptKey(key_record(row), row.secret_hash, row.max_requests_per_minute or 0)

    async def note_use(self, key_id: str, now_us: int) -> None:
        """Remembers that a key was used."""

        async def work(connection: AsyncConnection) -> None:
            same = api_keys.c.key_id == key_id
            await connection.execute(update(api_keys).where(same).values(last_use_time_us=now_us))

        await self._database.write(work)


def unknown_key(key_id: str) -> MeshError:
    """NOT_FOUND (KEY_NOT_FOUND)."""
    return not_found(Reason.KEY_NOT_FOUND, "API key", key_id[:80])


def _check(request: KeyRequest) -> None:
    if request.tenant != MESH_TENANT:
        check_name(request.tenant, "tenant")
    if not request.roles:
        raise invalid_field("roles", "must be at least one")
    if len(request.namespaces) > MAX_NAMESPACES:
        raise invalid_field("namespaces", f"at most {MAX_NAMESPACES} are allowed")
    for namespace in request.namespaces:
        check_name(namespace, "namespaces")
    if request.ttl_seconds is not None and not 0 < request.ttl_seconds <= MAX_TTL_SECONDS:
        raise invalid_field("ttl", "must be in (0, 10 years]")
    check_text("comment", request.comment, MAX_COMMENT)
    check_text("actor", request.actor, MAX_ACTOR)


async def _check_room(connection: AsyncConnection, tenant: str) -> None:
    alive = (api_keys.c.tenant == tenant) & (api_keys.c.revoke_time_us == 0)
    count = await connection.execute(select(func.count()).select_from(api_keys).where(alive))
    if count.scalar_one() >= MAX_KEYS:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.INVALID_FIELD,
            f"tenant: '{tenant}' has {MAX_KEYS} keys, the limit; revoke some",
            metadata={"field": "tenant"},
        )


def _fields(record: ApiKeyRecord) -> dict[str, str]:
    return {"key_id": record.key_id, "tenant": record.tenant, "roles": ",".join(record.roles)}
