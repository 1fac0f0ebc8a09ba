"""What can be searched of an adapter: its newest version, and the words about it."""

from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.rows import StoredVersion
from adaptermesh.store.schema import search_documents, search_tags
from adaptermesh.store.words import WordIndex, Wording


async def write_document(
    connection: AsyncConnection,
    words: WordIndex,
    stored: StoredVersion,
    adapter_id: int,
    version_id: int,
    card: str,
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
    wording = Wording(str(record.adapter), " ".join(record.tags), record.description, card)
    await words.put(connection, adapter_id, wording)


async def remove_document(connection: AsyncConnection, words: WordIndex, adapter_id: int) -> None:
    """Makes an adapter one that no search finds."""
    await connection.execute(delete(search_documents).where(search_documents.c.adapter_id == adapter_id))
    await connection.execute(delete(search_tags).where(search_tags.c.adapter_id == adapter_id))
    await words.remove(connection, adapter_id)
