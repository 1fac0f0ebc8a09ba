"""Lists of adapters, by name, with conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import invalid_field
from adaptermesh.store.access.visibility import caller_scope, visible
from adaptermesh.store.database import Database
from adaptermesh.store.fields import check_text
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import AdapterSummary, AliasRecord, PolicyRecord
from adaptermesh.store.rows import SAME_MOVE, SELECT_ALIASES, SELECT_VERSIONS, alias_record, version_record
from adaptermesh.store.schema import adapters, alias_moves, aliases, version_tags, versions
from adaptermesh.store.usability import find_policies, suspects, why_not

MAX_CONDITION = 256
MAX_TAGS = 32
# SQLite takes a bounded number of parameters in one statement.
_IDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class AdapterQuery:
    """Conditions that must all hold; an empty one matches all."""

    text: str = ""
    """Substring of namespace/name, without regard to case."""
    namespace: str = ""
    task: str = ""
    base_model: str = ""
    """Name or digest."""
    tags: tuple[str, ...] = ()


class Listing:
    """Lists adapters. Task, base and tags are those of the newest version."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self, query: AdapterQuery, request: PageRequest) -> Page[AdapterSummary]:
        """Adapters in order of namespace and name."""
        for field in ("text", "namespace", "task", "base_model"):
            check_text("query" if field == "text" else field, getattr(query, field), MAX_CONDITION)
        if len(query.tags) > MAX_TAGS:
            raise invalid_field("tags", f"at most {MAX_TAGS} are allowed")
        for tag in query.tags:
            check_text("tags", tag, MAX_CONDITION)

        def key(summary: AdapterSummary) -> Key:
            return summary.newest.namespace, summary.newest.name

        tags = sorted(set(query.tags))
        conditions = [query.text, query.namespace, query.task, query.base_model, tags]
        pager = Pager(request, ["adapters", *conditions, *caller_scope()], key, (str, str))
        statement = (
            SELECT_VERSIONS.where(versions.c.number == adapters.c.newest_number)
            .where(*_conditions(query))
            .order_by(adapters.c.namespace, adapters.c.name)
            .limit(pager.limit)
        )
        if pager.after is not None:
            namespace, name = pager.after
            same = (adapters.c.namespace == namespace) & (adapters.c.name > name)
            statement = statement.where((adapters.c.namespace > namespace) | same)
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
            summaries = await summaries_of(connection, rows)
        return pager.page(summaries)


def _conditions(query: AdapterQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if (seen := visible()) is not None:
        conditions.append(seen)
    if query.text:
        # Names have lower-case letters only.
        full = adapters.c.namespace + "/" + adapters.c.name
        conditions.append(full.contains(query.text.lower(), autoescape=True))
    if query.namespace:
        conditions.append(adapters.c.namespace == query.namespace)
    if query.task:
        conditions.append(versions.c.task == query.task)
    if query.base_model:
        column = versions.c.base_digest if is_digest(query.base_model) else versions.c.base_model_id
        conditions.append(column == query.base_model)
    for tag in sorted(set(query.tags)):
        same = (version_tags.c.version_id == versions.c.id) & (version_tags.c.tag == tag)
        conditions.append(exists(select(version_tags.c.tag).where(same)))
    return conditions


async def summaries_of(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[AdapterSummary]:
    """The adapters whose newest versions are in the rows, in their order."""
    ids = [row.adapter_id for row in rows]
    policies = await find_policies(connection, (row.namespace for row in rows))
    found, unusable = await _aliases(connection, ids), await _unusable(connection, ids, policies)
    summaries = []
    for row in rows:
        newest, pointers = version_record(row), tuple(found.get(row.adapter_id, ()))
        numbers = unusable.get(row.adapter_id, ())
        count = row.version_count - row.deleted_count
        summaries.append(AdapterSummary(newest, count, pointers, numbers, row.adapter_downloads))
    return summaries


async def _aliases(connection: AsyncConnection, adapter_ids: list[int]) -> dict[int, list[AliasRecord]]:
    """The aliases of each of some adapters, by name."""
    found: dict[int, list[AliasRecord]] = {}
    for start in range(0, len(adapter_ids), _IDS_AT_ONCE):
        batch = adapter_ids[start : start + _IDS_AT_ONCE]
        query = SELECT_ALIASES.where(alias_moves.c.adapter_id.in_(batch)).order_by(alias_moves.c.alias)
        for row in await connection.execute(query):
            found.setdefault(row.adapter_id, []).append(alias_record(row))
    return found


async def _unusable(
    connection: AsyncConnection, adapter_ids: list[int], policies: Mapping[str, PolicyRecord]
) -> dict[int, tuple[int, ...]]:
    """Of each adapter's newest and aliased versions the numbers of those that must not be used."""
    rows: list[Row[Any]] = []
    pointed = (
        select(alias_moves.c.version_number)
        .join(aliases, SAME_MOVE)
        .where(aliases.c.adapter_id == versions.c.adapter_id)
        .correlate(versions)
    )
    shown = (versions.c.number == adapters.c.newest_number) | versions.c.number.in_(pointed)
    suspect = suspects(policies.values())
    for start in range(0, len(adapter_ids), _IDS_AT_ONCE):
        batch = adapter_ids[start : start + _IDS_AT_ONCE]
        query = SELECT_VERSIONS.where(versions.c.adapter_id.in_(batch), shown, suspect)
        rows += (await connection.execute(query.order_by(versions.c.number))).all()
    found: dict[int, tuple[int, ...]] = {}
    for row in rows:
        version = version_record(row)
        if why_not(version.ref, version, policies[version.namespace]) is not None:
            found[row.adapter_id] = (*found.get(row.adapter_id, ()), version.number)
    return found
