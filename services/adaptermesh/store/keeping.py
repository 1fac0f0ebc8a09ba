"""Blobs first, then the version that needs them: it becomes visible only if they are there, and stay."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Reason, unavailable
from adaptermesh.store import removal_notes
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.catalogue import Catalogue, Published
from adaptermesh.store.records import VersionRecord
from adaptermesh.store.search_facts import NO_FACTS, SearchFacts

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_CONFIRM_SECONDS = 5.0
_REMOVAL_PAUSE_SECONDS = 0.1


class Keeper:
    """Puts blobs and publishes versions.

    Args:
        catalogue: has the versions.
        blobs: has their bytes.
        removal_seconds: how long to wait for the removal of a blob, which then is put again.
    """

    def __init__(self, catalogue: Catalogue, blobs: BlobStore, removal_seconds: float) -> None:
        self._catalogue = catalogue
        self._blobs = blobs
        self._removal_seconds = removal_seconds

    async def publish(
        self,
        blobs: Mapping[str, Path],
        version: VersionRecord,
        tensor_digest: str,
        card: str,
        parents: Sequence[str] = (),
        facts: SearchFacts = NO_FACTS,
    ) -> Published:
        """Again if a blob was collected as garbage before its version could be seen to need it.

        Raises:
            MeshError: UNAVAILABLE if that goes on, or if a removal does not come to an end.
        """
        deadline = asyncio.get_running_loop().time() + self._removal_seconds
        attempts = 0
        while attempts < _ATTEMPTS:
            for digest, path in blobs.items():
                await self._blobs.put(digest, path)
            try:
                return await self._catalogue.publish(
                    version, tensor_digest, card, partial(self._confirm, blobs), parents, facts
                )
            except _Collected:
                attempts += 1
                log.info("blobs are put again", extra={"digest": version.digest})
            except _BeingRemoved as found:
                log.info("blobs are being removed", extra={"digest": version.digest})
                if asyncio.get_running_loop().time() >= deadline:
                    message = "blobs like the upload's are being removed as garbage"
                    raise unavailable(Reason.OVERLOADED, message, found.seconds_left) from None
                await asyncio.sleep(_REMOVAL_PAUSE_SECONDS)
        message = "garbage collection removed the upload's blobs again and again"
        raise unavailable(Reason.OVERLOADED, message, retry_after=1.0)

    async def _confirm(self, digests: Iterable[str], connection: AsyncConnection) -> None:
        """Raises unless all blobs are there, and stay. Writers wait meanwhile, so not for long."""
        left = await removal_notes.seconds_left(connection, digests)
        if left is not None:
            raise _BeingRemoved(left)
        try:
            async with asyncio.timeout(_CONFIRM_SECONDS):
                found = await asyncio.gather(*(self._blobs.stat(digest) for digest in digests))
        except TimeoutError as error:
            message = "the blobs could not be seen in time"
            raise unavailable(Reason.STORE_UNREACHABLE, message, retry_after=1.0) from error
        if None in found:
            raise _Collected


class _Collected(Exception):
    """A blob that was put is gone."""


class _BeingRemoved(Exception):
    """A blob that is there may vanish at any moment."""

    def __init__(self, seconds_left: float) -> None:
        super().__init__(seconds_left)
        self.seconds_left = seconds_left
