"""Stored bytes read again and hashed: whether what is kept is still what was put."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.blob_reading import BlobReader
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.catalogue import Catalogue
from adaptermesh.store.database import Database
from adaptermesh.store.garbage import needed_blobs

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BlobCheck:
    """What became of one blob; `problem` is empty for one that is as it was put."""

    digest: str
    size_bytes: int
    problem: str = ""


class Scrubber:
    """Reads blobs one by one, so that it is in nobody's way."""

    def __init__(self, database: Database, catalogue: Catalogue, blobs: BlobStore) -> None:
        self._database = database
        self._catalogue = catalogue
        self._blobs = blobs

    async def check(self, version_digest: str) -> AsyncGenerator[BlobCheck]:
        """Checks every blob of a version, or, for an empty digest, those of all versions.

        Raises:
            MeshError: VERSION_NOT_FOUND; UNAVAILABLE if the backend can't be reached.
        """
        for digest in await self._needed(version_digest):
            found = await self._check(digest)
            if found.problem and not version_digest and digest not in await self._needed(""):
                # Its version was removed meanwhile.
                continue
            if found.problem:
                log.error("blob is damaged", extra={"digest": digest, "detail": found.problem})
            yield found

    async def _needed(self, version_digest: str) -> list[str]:
        if not version_digest:
            async with self._database.reading() as connection:
                return sorted({digest async for digest in needed_blobs(connection)})
        version = await self._catalogue.get_digest(version_digest)
        files = (file.digest for file in version.record.source_files)
        return list(dict.fromkeys((version.record.digest, version.tensor_digest, *files)))

    async def _check(self, digest: str) -> BlobCheck:
        try:
            async with self._blobs.open(digest) as reader:
                found = await _hash(reader)
                problem = "" if found == digest else f"its bytes have digest {found}"
                return BlobCheck(digest, reader.size, problem)
        except MeshError as error:
            if error.reason is not Reason.DATA_CORRUPT:
                raise
            return BlobCheck(digest, 0, error.message)


async def _hash(reader: BlobReader) -> str:
    digest = hashlib.sha256()
    for offset in range(0, reader.size, _BLOCK_BYTES):
        block = await reader.read(offset, min(_BLOCK_BYTES, reader.size - offset))
        await asyncio.to_thread(digest.update, block)
    return f"sha256:{digest.hexdigest()}"
