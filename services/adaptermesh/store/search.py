"""Search over adapters: by words, and by what their newest version is; with facets.

Orders whose values move under a reader, such as relevance and downloads, are decided by the first page: its
token names the adapters of the pages that follow. The others go by a key that stays.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import invalid_field
from adaptermesh.store.access.visibility import visible
from adaptermesh.store.database import Database
from adaptermesh.store.facets import MAX_COUNTED, Facets, count_facets
from adaptermesh.store.listing import summaries_of
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import AdapterSummary
from adaptermesh.store.rows import SELECT_VERSIONS
from adaptermesh.store.schema import adapters, search_documents, search_scores, versions
from adaptermesh.store.search_query import Order, SearchQuery, checked_words, documents, newest_position
from adaptermesh.store.words import WordIndex, word_index

MAX_RELEVANT = 1000
"""Adapters that are found in an order that the first page decides; a token names those of the later pages."""
MAX_RANKED = 2000
"""Of more adapters that match words, those that are ranked: the newest, and the newest whose names match."""


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
        words = checked_words(query)
        order = query.order or Order.RELEVANCE
        if order is Order.RELEVANCE and not words:
            order = Order.NEWEST
        scope = query.scope(words, order)
        async with self._database.reading() as connection:
            if order in (Order.NEWEST, Order.NAME):
                position = None if order is Order.NAME else newest_position(query)
                return await _by_key(connection, self._matching(query, words), request, scope, position)
            pager = Pager[_Hit](request, scope, lambda hit: hit.key, (str,))
            if pager.after is not None:
                ids = _ids_of(pager.after[0])
            elif order is Order.RELEVANCE:
                ids = await self._most_relevant(connection, query, words)
            else:
                first = _ordered(self._matching(query, words), query, order)
                ids = list(await connection.scalars(first.limit(MAX_RELEVANT)))
            return await _page_of(connection, ids, pager)

    async def facets(self, query: SearchQuery) -> Facets:
        """What the adapters that match have in common."""
        words = checked_words(query)
        if words:
            newest = self._words.newest(words, _allowed(query), MAX_COUNTED + 1)
        else:
            newest = documents(query).order_by(newest_position(query).desc()).limit(MAX_COUNTED + 1)
        async with self._database.reading() as connection:
            return await count_facets(connection, newest)

    def _matching(self, query: SearchQuery, words: Sequence[str]) -> Select[Any]:
        """The documents that match words and conditions."""
        found = documents(query)
        return found.where(self._words.matches(search_documents.c.adapter_id, words)) if words else found

    async def _most_relevant(
        self, connection: AsyncConnection, query: SearchQuery, words: Sequence[str]
    ) -> list[int]:
        allowed = _allowed(query)
        found = (await connection.execute(self._words.ranked(words, allowed, MAX_RANKED + 1))).all()
        scores = {row.adapter_id: row.score for row in found}
        if len(found) > MAX_RANKED:
            # The one too many, which is the oldest, only told that there are more.
            del scores[min(scores)]
            # A name is not to be missed because many cards say the same.
            named = self._words.ranked(words, allowed, MAX_RANKED, names_only=True)
            for row in await connection.execute(named):
                scores[row.adapter_id] = max(row.score, scores.get(row.adapter_id, row.score))
        return sorted(scores, key=lambda adapter_id: (-scores[adapter_id], adapter_id))[:MAX_RELEVANT]


def _allowed(query: SearchQuery) -> Select[Any] | None:
    """What the conditions leave, and what the caller may see; None if that is everything."""
    return documents(query) if query.conditions or visible() is not None else None


def _ordered(found: Select[Any], query: SearchQuery, order: Order) -> Select[Any]:
    if order is Order.DOWNLOADS:
        return found.order_by(adapters.c.download_count.desc(), adapters.c.id.desc())
    scored = found.join(search_scores, search_scores.c.adapter_id == search_documents.c.adapter_id)
    scored = scored.where(search_scores.c.metric == query.metric)
    place = (search_scores.c.value, search_scores.c.adapter_id)
    return scored.order_by(*(place if query.lowest_score_first else [part.desc() for part in place]))


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


async def _page_of(
    connection: AsyncConnection, ids: Sequence[int], pager: Pager[_Hit]
) -> Page[AdapterSummary]:
    """The first of the adapters; the token names the others, wherever they are in the order by then."""
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
    if (seen := visible()) is not None:
        # The ids may be those of a token that somebody has made up.
        statement = statement.where(seen)
    rows = {row.adapter_id: row for row in await connection.execute(statement)}
    known = [rows[adapter_id] for adapter_id in ids if adapter_id in rows]
    return tuple(await summaries_of(connection, known))


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
