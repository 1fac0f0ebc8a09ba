"""The words by which adapters are found, in the index that each database has for words.

One row for each adapter: SQLite's FTS5, or a tsvector of PostgreSQL under a GIN index. Both get the same
words, cut here, so that they agree on what a word is.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    bindparam,
    column,
    delete,
    func,
    insert,
    literal_column,
    select,
    table,
)
from sqlalchemy.ext.asyncio import AsyncConnection

PARTS = ("name", "tags", "description", "card")
MAX_WORDS = 16
MAX_CARD_CHARACTERS = 64 * 1024
"""Of a card; what is behind is not found."""
_MAX_WORD = 64
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Wording:
    """What of an adapter is searched, the most telling first."""

    name: str
    tags: str
    description: str
    card: str


def words_of(words: str) -> list[str]:
    """The words of a text, in lower case and without accents."""
    letters = unicodedata.normalize("NFKD", words.lower())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return [word[:_MAX_WORD] for word in _WORD.findall(unicodedata.normalize("NFC", plain))]


class WordIndex(Protocol):
    """Where the words are."""

    async def put(self, connection: AsyncConnection, adapter_id: int, wording: Wording) -> None:
        """Replaces an adapter's words, inside the caller's write transaction."""
        ...

    async def add(self, connection: AsyncConnection, wordings: Mapping[int, Wording]) -> None:
        """Adds the words of adapters that have none yet."""
        ...

    async def remove(self, connection: AsyncConnection, adapter_id: int) -> None:
        """Removes an adapter's words, likewise."""
        ...

    def matches(self, adapter_id: ColumnElement[int], words: Sequence[str]) -> ColumnElement[bool]:
        """Whether an adapter has a word beginning with each of these."""
        ...

    def newest(self, words: Sequence[str], allowed: Select[Any] | None, limit: int) -> Select[Any]:
        """The adapters that match and are allowed (None: all), the newest first: column `adapter_id`."""
        ...

    def ranked(
        self, words: Sequence[str], allowed: Select[Any] | None, limit: int, *, names_only: bool = False
    ) -> Select[Any]:
        """The same in any order, with a `score`, the higher the better; or those whose names match."""
        ...


def word_index(dialect: str) -> WordIndex:
    """That of a database, by SQLAlchemy's name of its dialect."""
    return PostgresWords() if dialect == "postgresql" else SqliteWords()


class SqliteWords:
    """FTS5; a match's score is bm25, in which a name counts most."""

    _index = table("search_words", column("rowid", Integer), *(column(part) for part in PARTS))

    async def put(self, connection: AsyncConnection, adapter_id: int, wording: Wording) -> None:
        await self.remove(connection, adapter_id)
        await self.add(connection, {adapter_id: wording})

    async def add(self, connection: AsyncConnection, wordings: Mapping[int, Wording]) -> None:
        rows = [{"rowid": adapter_id, **_values(wording)} for adapter_id, wording in wordings.items()]
        await connection.execute(insert(self._index), rows)

    async def remove(self, connection: AsyncConnection, adapter_id: int) -> None:
        await connection.execute(delete(self._index).where(self._index.c.rowid == adapter_id))

    def matches(self, adapter_id: ColumnElement[int], words: Sequence[str]) -> ColumnElement[bool]:
        return adapter_id.in_(select(self._index.c.rowid).where(self._match(words)))

    def newest(self, words: Sequence[str], allowed: Select[Any] | None, limit: int) -> Select[Any]:
        return self._newest(self._match(words), allowed, limit)

    def ranked(
        self, words: Sequence[str], allowed: Select[Any] | None, limit: int, *, names_only: bool = False
    ) -> Select[Any]:
        match = self._match(words, "{name} : ") if names_only else self._match(words)
        score = -func.bm25(self._whole, 8.0, 4.0, 2.0, 1.0)
        return self._newest(match, allowed, limit).add_columns(score.label("score"))

    def _newest(self, match: ColumnElement[bool], allowed: Select[Any] | None, limit: int) -> Select[Any]:
        query = select(self._index.c.rowid.label("adapter_id")).where(match)
        if allowed is not None:
            # The plus keeps SQLite from asking the index once for each that is allowed.
            query = query.where(literal_column("+search_words.rowid").in_(allowed))
        # In its own order the index is read no further than needed.
        return query.order_by(self._index.c.rowid.desc()).limit(limit)

    def _match(self, words: Sequence[str], columns: str = "") -> ColumnElement[bool]:
        asked = " ".join(f'"{word}"*' for word in words)
        return self._whole.op("MATCH", is_comparison=True)(f"{columns}({asked})")

    @property
    def _whole(self) -> ColumnElement[str]:
        return literal_column("search_words")


class PostgresWords:
    """A tsvector whose weights A to D are name, tags, description and card; and one of the name alone."""

    _index = table("search_words", column("adapter_id", Integer), column("document"), column("names"))

    async def put(self, connection: AsyncConnection, adapter_id: int, wording: Wording) -> None:
        await self.remove(connection, adapter_id)
        await self.add(connection, {adapter_id: wording})

    async def add(self, connection: AsyncConnection, wordings: Mapping[int, Wording]) -> None:
        rows = [{"adapter_id": adapter_id, **_values(wording)} for adapter_id, wording in wordings.items()]
        vectors = {"document": _document(PARTS), "names": _document(PARTS[:1])}
        await connection.execute(insert(self._index).values(vectors), rows)

    async def remove(self, connection: AsyncConnection, adapter_id: int) -> None:
        await connection.execute(delete(self._index).where(self._index.c.adapter_id == adapter_id))

    def matches(self, adapter_id: ColumnElement[int], words: Sequence[str]) -> ColumnElement[bool]:
        return adapter_id.in_(select(self._index.c.adapter_id).where(self._match(words)))

    def newest(self, words: Sequence[str], allowed: Select[Any] | None, limit: int) -> Select[Any]:
        return self._newest(self._match(words), allowed, limit)

    def ranked(
        self, words: Sequence[str], allowed: Select[Any] | None, limit: int, *, names_only: bool = False
    ) -> Select[Any]:
        # An index of its own: that of the documents does not know which part a word is of.
        match = self._match(words, self._index.c.names) if names_only else self._match(words)
        # Only what the limit leaves is scored, and no document is sorted: they are large.
        found = self._newest(match, allowed, limit).subquery()
        score = func.ts_rank_cd(self._index.c.document, _asked(words)).label("score")
        query = select(self._index.c.adapter_id, score)
        return query.where(self._index.c.adapter_id.in_(select(found.c.adapter_id)))

    def _newest(self, match: ColumnElement[bool], allowed: Select[Any] | None, limit: int) -> Select[Any]:
        query = select(self._index.c.adapter_id).where(match)
        if allowed is not None:
            query = query.where(self._index.c.adapter_id.in_(allowed))
        return query.order_by(self._index.c.adapter_id.desc()).limit(limit)

    def _match(self, words: Sequence[str], searched: ColumnElement[Any] | None = None) -> ColumnElement[bool]:
        column = self._index.c.document if searched is None else searched
        return column.op("@@", is_comparison=True)(_asked(words))


def _asked(words: Sequence[str]) -> ColumnElement[Any]:
    # Words are of letters and digits only: nothing in them means anything to the query.
    return func.to_tsquery("simple", " & ".join(f"'{word}':*" for word in words))


def _document(parts: Sequence[str]) -> ColumnElement[Any]:
    """The tsvector of the parameters that are called as some parts are."""
    weighted = [
        # Its type, "char", is one that no parameter has.
        func.setweight(func.to_tsvector("simple", bindparam(part)), literal_column(f"'{weight}'"))
        for part, weight in zip(parts, "ABCD", strict=False)
    ]
    document: ColumnElement[Any] = weighted[0]
    for part in weighted[1:]:
        document = document.op("||")(part)
    return document


def _values(wording: Wording) -> dict[str, str]:
    """The words of each part, by its name."""
    texts = (wording.name, wording.tags, wording.description, wording.card[:MAX_CARD_CHARACTERS])
    return {part: " ".join(words_of(words)) for part, words in zip(PARTS, texts, strict=True)}
