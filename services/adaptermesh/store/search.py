"""Search over adapters: by words, and by what their newest version is; with facets."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import invalid_field
from adaptermesh.store.database import Database
from adaptermesh.store.fields import check_text
from adaptermesh.store.listing import MAX_CONDITION, MAX_TAGS, summaries_of
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import AdapterSummary
from adaptermesh.store.rows import SELECT_VERSIONS
from adaptermesh.store.schema import adapters, search_documents, search_tags, versions
from adaptermesh.store.words import MAX_WORDS, WordIndex, word_index, words_of

MAX_RELEVANT = 1000
"""Adapters that are found in order of relevance; a token names those of the later pages."""
MAX_COUNTED = 10_000
"""Adapters that facets are counted over."""
MAX_VALUES = 20
"""Values of one facet."""
_FACETS = ("base_model_id", "task", "kind", "license")


class Order(Enum):
    """In which order adapters come."""

    RELEVANCE = "relevance"
    NEWEST = "newest"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Conditions that must all hold, of the newest version; an empty one matches all."""

    text: str = ""
    namespace: str = ""
    base_model: str = ""
    """Name or digest."""
    task: str = ""
    kind: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    order: Order | None = None
    """None: by relevance where there are words, else the newest first."""


@dataclass(frozen=True, slots=True)
class Facets:
    """Values and how many adapters have each, by field; `capped`: of the newest `MAX_COUNTED` only."""

    counts: Mapping[str, tuple[tuple[str, int], ...]]
    capped: bool


@dataclass(frozen=True, slots=True)
class _Hit:
    """An adapter and its place in an order."""

    adapter_id: int
    key: Key


class Search:
    """Answers searches; each from one read transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._words: WordIndex = word_index(database.dialect)

    async def find(self, query: SearchQuery, request: PageRequest) -> Page[AdapterSummary]:
        """One page, in the order that is asked for."""
        words = _checked(query)
        order = query.order or (Order.RELEVANCE if words else Order.NEWEST)
        tags = sorted(set(query.tags))
        fields = [query.namespace, query.base_model, query.task, query.kind, query.license]
        scope = ["search", order.value, words, tags, *fields]
        found = self._matches(query, words)
        async with self._database.reading() as connection:
            if order is Order.RELEVANCE and words:
                return await _by_relevance(connection, found, request, scope)
            position = None if order is Order.NAME else _position(query)
            return await _by_key(connection, found, request, scope, position)

    async def facets(self, query: SearchQuery) -> Facets:
        """What the adapters that match have in common."""
        found = self._matches(query, _checked(query))
        newest = found.order_by(_position(query).desc()).limit(MAX_COUNTED + 1)
        # The one too many only tells that there are more.
        matched = newest.subquery()
        counts: dict[str, tuple[tuple[str, int], ...]] = {}
        async with self._database.reading() as connection:
            total = (await connection.execute(select(func.count()).select_from(matched))).scalar_one()
            for name in _FACETS:
                counts[name.removesuffix("_id")] = await _counted(
                    connection, search_documents.c[name], matched, search_documents.c.adapter_id
                )
            counts["tags"] = await _counted(connection, search_tags.c.tag, matched, search_tags.c.adapter_id)
        return Facets(counts, capped=total > MAX_COUNTED)

    def _matches(self, query: SearchQuery, words: Sequence[str]) -> Select[Any]:
        """The documents that match: adapter_id, and score where there are words."""
        statement: Select[Any] = select(search_documents.c.adapter_id)
        if words:
            matching = self._words.matching(words)
            statement = statement.add_columns(matching.c.score).join(
                matching, matching.c.adapter_id == search_documents.c.adapter_id
            )
        if query.tags:
            statement = statement.join(
                search_tags, search_tags.c.adapter_id == search_documents.c.adapter_id
            ).where(search_tags.c.tag == min(query.tags))
        return statement.join(adapters, adapters.c.id == search_documents.c.adapter_id).where(
            *_conditions(query)
        )


def _checked(query: SearchQuery) -> list[str]:
    """The words that are asked for."""
    for field in ("text", "namespace", "base_model", "task", "kind", "license"):
        check_text(field, getattr(query, field), MAX_CONDITION)
    if len(query.tags) > MAX_TAGS:
        raise invalid_field("tags", f"at most {MAX_TAGS} are allowed")
    words = words_of(query.text)
    if len(words) > MAX_WORDS:
        raise invalid_field("text", f"has {len(words)} words, at most {MAX_WORDS} are allowed")
    if query.text.strip() and not words:
        raise invalid_field("text", "has no word of letters or digits")
    return words


def _conditions(query: SearchQuery) -> list[ColumnElement[bool]]:
    columns = search_documents.c
    conditions: list[ColumnElement[bool]] = []
    if query.namespace:
        conditions.append(adapters.c.namespace == query.namespace)
    if query.base_model:
        column = columns.base_digest if is_digest(query.base_model) else columns.base_model_id
        conditions.append(column == query.base_model)
    exact = ((field, getattr(query, field)) for field in ("task", "kind", "license"))
    conditions.extend(columns[field] == value for field, value in exact if value)
    # The first one is joined.
    for tag in sorted(set(query.tags))[1:]:
        other = search_tags.alias()
        same = (other.c.adapter_id == columns.adapter_id) & (other.c.tag == tag)
        conditions.append(exists(select(other.c.tag).where(same)))
    return conditions


def _position(query: SearchQuery) -> ColumnElement[int]:
    """The position of the newest version, from the table whose index has it in order."""
    return search_tags.c.feed_position if query.tags else search_documents.c.feed_position


async def _by_key(
    connection: AsyncConnection,
    found: Select[Any],
    request: PageRequest,
    scope: Sequence[Any],
    position: ColumnElement[int] | None,
) -> Page[AdapterSummary]:
    """The place of an adapter is its newest version's position, or, if that is None, its name.

    So writes between two pages shift nothing.
    """
    named = (adapters.c.namespace, adapters.c.name)
    pager = Pager[_Hit](request, scope, lambda hit: hit.key, (str, str) if position is None else (int,))
    if position is None:
        statement = found.add_columns(*named).order_by(*named)
        if pager.after is not None:
            namespace, name = pager.after
            same = (adapters.c.namespace == namespace) & (adapters.c.name > name)
            statement = statement.where((adapters.c.namespace > namespace) | same)
    else:
        statement = found.add_columns(position).order_by(position.desc())
        if pager.after is not None:
            statement = statement.where(position < pager.after[0])
    rows = (await connection.execute(statement.limit(pager.limit))).all()
    hits = [
        _Hit(row.adapter_id, (row.namespace, row.name) if position is None else (row.feed_position,))
        for row in rows
    ]
    page = pager.page(hits)
    return Page(await _load(connection, [hit.adapter_id for hit in page.items]), page.next_token)


async def _by_relevance(
    connection: AsyncConnection, found: Select[Any], request: PageRequest, scope: Sequence[Any]
) -> Page[AdapterSummary]:
    """Scores change with every write: the first page decides the order, and its token names what follows."""
    pager = Pager[_Hit](request, scope, lambda hit: hit.key, (str,))
    if pager.after is None:
        ranked = found.order_by(found.selected_columns.score.desc(), search_documents.c.adapter_id)
        rows = await connection.execute(ranked.limit(MAX_RELEVANT))
        ids = [int(row.adapter_id) for row in rows]
    else:
        ids = _ids_of(pager.after[0])
    count = pager.limit - 1
    shown, rest = ids[:count], ids[count:]
    token = pager.token((_token_of(rest),)) if rest else ""
    return Page(await _load(connection, shown), token)


async def _load(connection: AsyncConnection, ids: Sequence[int]) -> tuple[AdapterSummary, ...]:
    """The adapters of these ids, in this order."""
    if not ids:
        return ()
    newest = versions.c.id == search_documents.c.version_id
    statement = SELECT_VERSIONS.join(search_documents, newest).where(search_documents.c.adapter_id.in_(ids))
    rows = {row.adapter_id: row for row in await connection.execute(statement)}
    known = [rows[adapter_id] for adapter_id in ids if adapter_id in rows]
    return tuple(await summaries_of(connection, known))


async def _counted(
    connection: AsyncConnection,
    value: ColumnElement[str],
    matched: Any,
    adapter_id: ColumnElement[int],
) -> tuple[tuple[str, int], ...]:
    count = func.count().label("count")
    statement = select(value.label("value"), count).join(matched, matched.c.adapter_id == adapter_id)
    statement = statement.group_by(value).order_by(count.desc(), value).limit(MAX_VALUES)
    rows = (await connection.execute(statement)).all()
    return tuple((str(value), int(number)) for value, number in rows)


def _token_of(ids: Sequence[int]) -> str:
    return base64.b85encode(b"".join(number.to_bytes(4, "big") for number in ids)).decode()


def _ids_of(token: str) -> list[int]:
    try:
        data = base64.b85decode(token)
    except ValueError:
        data = b"x"
    ids = [int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4)]
    # No database has a larger one.
    if len(data) % 4 or not 0 < len(ids) <= MAX_RELEVANT or max(ids) >= 2**31:
        raise invalid_field("page_token", "is not one that this list gave for these conditions")
    return ids
