"""What can be searched of an adapter: its newest version, and the words about it."""

from dataclasses import dataclass

from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.rows import StoredVersion
from adaptermesh.store.schema import search_documents, search_tags
from adaptermesh.store.search_facts import NO_FACTS, SearchFacts, put_facts
from adaptermesh.store.words import WordIndex, Wording


@dataclass(frozen=True, slots=True)
class Findable:
    """What a version is found by beside its own fields."""

    card: str = ""
    facts: SearchFacts = NO_FACTS


async def write_document(
    connection: AsyncConnection,
    words: WordIndex,
    stored: StoredVersion,
    adapter_id: int,
    version_id: int,
    found_by: Findable,
) -> None:
    """Makes a version the one by which its adapter is found."""
    record = stored.record
    await remove_document(connection, words, adapter_id)
    await connection.execute(
        insert(search_documents).values(
            adapter_id=adapter_id,
            version_id=version_id,
            feed_position=stored.feed_position,
            base_digest=record.base_digest,
            base_model_id=record.base_model_id,
            task=record.task,
            kind=record.kind,
            license=record.license,
        )
    )
    place = {"adapter_id": adapter_id, "feed_position": stored.feed_position}
    tags = [{**place, "tag": tag} for tag in sorted(set(record.tags))]
    if tags:
        await connection.execute(insert(search_tags), tags)
    await put_facts(connection, adapter_id, stored.feed_position, found_by.facts)
    wording = Wording(str(record.adapter), " ".join(record.tags), record.description, found_by.card)
    await words.put(connection, adapter_id, wording)


async def remove_document(connection: AsyncConnection, words: WordIndex, adapter_id: int) -> None:
    """Makes an adapter one that no search finds."""
    await connection.execute(delete(search_documents).where(search_documents.c.adapter_id == adapter_id))
    await connection.execute(delete(search_tags).where(search_tags.c.adapter_id == adapter_id))
    await put_facts(connection, adapter_id, 0, NO_FACTS)
    await words.remove(connection, adapter_id)
