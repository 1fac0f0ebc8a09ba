"""Removing a blob inside a transaction that keeps everybody away who could come to need it."""

import asyncio

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.schema import feed

_ALIVE_SECONDS = 1.0


async def remove_blob(connection: AsyncConnection, blobs: BlobStore, digest: str) -> None:
    """Returns when nothing is being removed any more, also after an error."""
    deletion = asyncio.ensure_future(blobs.delete(digest))
    try:
        while not (await asyncio.wait([deletion], timeout=_ALIVE_SECONDS))[0]:
            # A database may end a transaction that says nothing, and let others publish meanwhile.
            await connection.execute(select(feed.c.id))
    finally:
        await deletion
