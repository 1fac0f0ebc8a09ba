"""The audit log: of every change what it was done to, by which key, and who the caller said it was."""

from dataclasses import dataclass

from sqlalchemy import Row, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.refs import check_name
from adaptermesh.core.roles import DEFAULT_TENANT
from adaptermesh.store.access.caller import Caller, current_caller
from adaptermesh.store.access.records import ApiKeyRecord, GrantRecord, NamespaceRecord, TenantRecord
from adaptermesh.store.database import Database
from adaptermesh.store.fields import check_line
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import (
    AliasRecord,
    BaseModelRecord,
    ChangeKind,
    DeletedVersion,
    PolicyRecord,
    Record,
    RouteRecord,
    VersionRecord,
)
from adaptermesh.store.schema import audit_entries, namespaces

MAX_CONDITION = 256


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change and who made it."""

    feed_position: int
    time_us: int
    action: str
    subject: str
    namespace: str
    tenant: str
    key_id: str
    key_tenant: str
    actor: str


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Conditions that must all hold; an empty one matches all."""

    namespace: str = ""
    subject_prefix: str = ""
    action: str = ""
    key_id: str = ""
    from_time_us: int = 0
    until_time_us: int = 0


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a change was done to: in a namespace, or to a tenant, or neither."""

    text: str
    namespace: str = ""
    tenant: str = ""


async def record_change(
    connection: AsyncConnection, kind: ChangeKind, record: Record, position: int, now_us: int
) -> None:
    """Writes the entry of a change, inside the mutation's own transaction."""
    subject, caller = _subject(record), current_caller.get()
    tenant = subject.tenant
    if subject.namespace and not tenant:
        owner = select(namespaces.c.tenant).where(namespaces.c.name == subject.namespace)
        tenant = (await connection.execute(owner)).scalar() or DEFAULT_TENANT
    entry = {
        "feed_position": position,
        "time_us": now_us,
        "action": kind.value,
        "subject": subject.text,
        "namespace": subject.namespace,
        "tenant": tenant,
        "key_id": caller.key_id,
        # Where no keys are asked for, nobody has shown whose he is.
        "key_tenant": caller.tenant if caller.key_id else "",
        "actor": _actor(kind, record),
    }
    await connection.execute(insert(audit_entries).values(entry))


class Audit:
    """Reads the log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, query: AuditQuery, caller: Caller, request: PageRequest) -> Page[AuditEntry]:
        """Entries that a caller may see, newest first: of its tenant, or by its keys."""
        if query.namespace:
            check_name(query.namespace, "namespace")
        for field in ("subject_prefix", "action", "key_id"):
            check_line(field, getattr(query, field), MAX_CONDITION)

        def key(entry: AuditEntry) -> Key:
            return (entry.feed_position,)

        pager = Pager(request, ["audit", *_parts(query)], key, (int,))
        table = audit_entries.c
        statement = select(audit_entries).order_by(table.feed_position.desc()).limit(pager.limit)
        if not caller.is_operator:
            statement = statement.where(or_(table.tenant == caller.tenant, table.key_tenant == caller.tenant))
        if caller.namespaces:
            statement = statement.where(table.namespace.in_(caller.namespaces))
        for name in ("namespace", "action", "key_id"):
            if value := getattr(query, name):
                statement = statement.where(table[name] == value)
        if query.subject_prefix:
            # Not LIKE: for SQLite that takes capitals for small letters.
            start = func.substr(table.subject, 1, len(query.subject_prefix))
            statement = statement.where(start == query.subject_prefix)
        if query.from_time_us:
            statement = statement.where(table.time_us >= query.from_time_us)
        if query.until_time_us:
            statement = statement.where(table.time_us < query.until_time_us)
        if pager.after is not None:
            statement = statement.where(table.feed_position < pager.after[0])
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
        return pager.page([_entry(row) for row in rows])


def _parts(query: AuditQuery) -> list[str]:
    return [
        query.namespace,
        query.subject_prefix,
        query.action,
        query.key_id,
        str(query.from_time_us),
        str(query.until_time_us),
    ]


def _entry(row: Row[tuple[object, ...]]) -> AuditEntry:
    return AuditEntry(**row._mapping)  # the documented way


def _subject(record: Record) -> _Subject:
    match record:
        case VersionRecord() | DeletedVersion() | AliasRecord():
            return _Subject(record.ref, record.namespace)
        case PolicyRecord():
            return _Subject(record.namespace, "" if record.tenant else record.namespace, record.tenant)
        case NamespaceRecord():
            return _Subject(record.name, record.name, record.tenant)
        case GrantRecord():
            what = f"{record.namespace}/{record.name or '*'} to {record.grantee}"
            return _Subject(what, record.namespace)
        case RouteRecord():
            return _Subject(f"{record.tenant}/{record.task}", tenant=record.tenant)
        case TenantRecord():
            return _Subject(record.name, tenant=record.name)
        case ApiKeyRecord():
            return _Subject(record.key_id, tenant=record.tenant)
        case BaseModelRecord():
            return _Subject(record.model_id)


def _actor(kind: ChangeKind, record: Record) -> str:
    """Who the caller said it was, where a call says so."""
    match record:
        case VersionRecord() if kind is ChangeKind.VERSION_STATUS_SET:
            return record.status.actor
        case VersionRecord() if kind is ChangeKind.VERSION_SIGNED:
            return max(record.signatures, key=lambda one: one.create_time_us).actor
        case VersionRecord() | RouteRecord() | BaseModelRecord():
            return ""
        case _:
            return record.actor
