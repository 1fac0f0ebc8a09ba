"""Refs and digests looked up in one query each: nothing else is asked for so often, nor so impatiently."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy import JSON, ColumnElement, ScalarSelect, Select, bindparam, func, select

from adaptermesh.core.refs import Ref
from adaptermesh.store.database import Database
from adaptermesh.store.prepared import Prepared
from adaptermesh.store.records import PolicyRecord
from adaptermesh.store.rows import SAME_MOVE, SELECT_VERSIONS, StoredVersion, policy_record, stored_version
from adaptermesh.store.schema import adapters, alias_moves, aliases, namespace_policies, versions

_POLICY = "policy_"
_NAMED = (adapters.c.namespace == bindparam("namespace")) & (adapters.c.name == bindparam("name"))


@dataclass(frozen=True, slots=True)
class Found:
    """What a ref means, as of one moment."""

    version: StoredVersion
    aliases: tuple[str, ...]
    """All that point at the version, in order."""
    policy: PolicyRecord
    """Of the version's namespace."""


class Lookup:
    """The queries, compiled for one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        named = _everything(database.dialect).where(_NAMED)
        self._by_number = database.prepare(named.where(versions.c.number == bindparam("number")))
        self._by_alias = database.prepare(named.where(versions.c.number == _target()))
        self._by_digest = database.prepare(named.where(_same_digest()))
        self._version_by_digest = database.prepare(SELECT_VERSIONS.where(_same_digest()))

    @property
    def statements(self) -> tuple[str, ...]:
        """The queries in SQL."""
        every = (self._by_number, self._by_alias, self._by_digest, self._version_by_digest)
        return tuple(query.sql for query in every)

    async def find(self, ref: Ref) -> Found | None:
        """What a ref means now; None if there is no such thing, whatever is missing."""
        query, values = self._query(ref)
        rows = await self._database.fetch(
            query, namespace=ref.adapter.namespace, name=ref.adapter.name, **values
        )
        return _found(rows[0]) if rows else None

    async def find_digest(self, digest: str) -> StoredVersion | None:
        """The version with a digest, if there is one."""
        rows = await self._database.fetch(self._version_by_digest, digest=digest)
        return stored_version(rows[0]) if rows else None

    def _query(self, ref: Ref) -> tuple[Prepared, dict[str, Any]]:
        if ref.alias is not None:
            return self._by_alias, {"alias": ref.alias}
        if ref.digest is not None:
            return self._by_digest, {"digest": ref.digest}
        return self._by_number, {"number": ref.version}


def _everything(dialect: str) -> Select[Any]:
    """Versions with all that a `Found` holds."""
    policy = (column.label(_POLICY + column.name) for column in namespace_policies.c)
    return SELECT_VERSIONS.add_columns(_alias_names(dialect).label("alias_names"), *policy).outerjoin(
        namespace_policies, namespace_policies.c.namespace == adapters.c.namespace
    )


def _alias_names(dialect: str) -> ScalarSelect[Any]:
    gather = func.json_agg if dialect == "postgresql" else func.json_group_array
    # From the aliases that are there, at most 256, to their moves: of those there may be any number.
    number = select(alias_moves.c.version_number).where(SAME_MOVE).correlate(aliases).scalar_subquery()
    names = select(gather(aliases.c.alias, type_=JSON)).where(aliases.c.adapter_id == versions.c.adapter_id)
    return names.where(number == versions.c.number).scalar_subquery()


def _target() -> ScalarSelect[int]:
    """The number of the version that an alias points to."""
    same_alias = (aliases.c.adapter_id == adapters.c.id) & (aliases.c.alias == bindparam("alias"))
    return select(alias_moves.c.version_number).join(aliases, SAME_MOVE).where(same_alias).scalar_subquery()


def _same_digest() -> ColumnElement[bool]:
    return versions.c.digest == bindparam("digest")


def _found(row: Any) -> Found:
    policy = PolicyRecord(row.namespace) if row.policy_namespace is None else _policy(row)
    return Found(stored_version(row), tuple(sorted(row.alias_names or ())), policy)


def _policy(row: Any) -> PolicyRecord:
    values = {column.name: getattr(row, _POLICY + column.name) for column in namespace_policies.c}
    return policy_record(SimpleNamespace(**values))
