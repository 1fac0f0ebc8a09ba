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
    FromClause,
    Integer,
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

    def matching(self, words: Sequence[str]) -> FromClause:
        """The adapters that have a word beginning with each of these: columns `adapter_id` and `score`."""
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

    def matching(self, words: Sequence[str]) -> FromClause:
        index: ColumnElement[str] = literal_column("search_words")
        asked = " ".join(f'"{word}"*' for word in words)
        score = -func.bm25(index, 8.0, 4.0, 2.0, 1.0)
        query = select(self._index.c.rowid.label("adapter_id"), score.label("score"))
        return query.where(index.op("MATCH")(asked)).subquery()


class PostgresWords:
    """A tsvector whose weights A to D are name, tags, description and card."""

    _index = table("search_words", column("adapter_id", Integer), column("document"))

    async def put(self, connection: AsyncConnection, adapter_id: int, wording: Wording) -> None:
        await self.remove(connection, adapter_id)
        await self.add(connection, {adapter_id: wording})

    async def add(self, connection: AsyncConnection, wordings: Mapping[int, Wording]) -> None:
        rows = [{"adapter_id": adapter_id, **_values(wording)} for adapter_id, wording in wordings.items()]
        await connection.execute(insert(self._index).values(document=_document()), rows)

    async def remove(self, connection: AsyncConnection, adapter_id: int) -> None:
        await connection.execute(delete(self._index).where(self._index.c.adapter_id == adapter_id))

    def matching(self, words: Sequence[str]) -> FromClause:
        # Words are of letters and digits only: nothing in them means anything to the query.
        asked = func.to_tsquery("simple", " & ".join(f"'{word}':*" for word in words))
        score = func.ts_rank_cd(self._index.c.document, asked)
        query = select(self._index.c.adapter_id, score.label("score"))
        return query.where(self._index.c.document.op("@@")(asked)).subquery()


def _document() -> ColumnElement[Any]:
    """The tsvector of the parameters that are called as the parts are."""
    weighted = [
        # Its type, "char", is one that no parameter has.
        func.setweight(func.to_tsvector("simple", bindparam(part)), literal_column(f"'{weight}'"))
        for part, weight in zip(PARTS, "ABCD", strict=True)
    ]
    document: ColumnElement[Any] = weighted[0]
    for part in weighted[1:]:
        document = document.op("||")(part)
    return document


def _values(wording: Wording) -> dict[str, str]:
    """The words of each part, by its name."""
    texts = (wording.name, wording.tags, wording.description, wording.card[:MAX_CARD_CHARACTERS])
    return {part: " ".join(words_of(words)) for part, words in zip(PARTS, texts, strict=True)}
