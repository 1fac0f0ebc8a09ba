"""Blobs in a folder: what is particular to them. What all backends promise is in tests/contract/store."""

import asyncio
import os
import time
from pathlib import Path

from adaptermesh.core.digests import digest_bytes
from adaptermesh.store.blobs import FolderBlobStore
from adaptermesh.testing.polling import eventually

CONTENT = b"slowly written"
DIGEST = digest_bytes(CONTENT)


async def test_a_put_in_progress_is_not_unfinished_however_young_the_garbage_that_is_asked_for(
    tmp_path: Path,
) -> None:
    blobs = FolderBlobStore(tmp_path / "blobs")
    await blobs.recover()
    left = tmp_path / "blobs" / "tmp" / "left-by-a-crash"
    await asyncio.to_thread(left.write_bytes, b"half")
    # It is read as slowly as somebody writes into it.
    source = tmp_path / "source"
    os.mkfifo(source)
    putting = asyncio.create_task(blobs.put(DIGEST, source))
    with await asyncio.to_thread(source.open, "wb") as writer:
        writer.write(CONTENT[:5])
        writer.flush()

        async def begun() -> bool:
            return len(await asyncio.to_thread(os.listdir, left.parent)) == 2

        await eventually(begun)
        assert await blobs.unfinished(time.time() + 10) == 1
        assert await blobs.discard_unfinished(time.time() + 10) == 1
        writer.write(CONTENT[5:])
    await putting
    async with blobs.open(DIGEST) as reader:
        assert await reader.read(0, reader.size) == CONTENT
    assert await asyncio.to_thread(os.listdir, left.parent) == []
