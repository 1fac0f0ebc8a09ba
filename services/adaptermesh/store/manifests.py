"""Manifests, of which those that were read last are kept in memory: they are asked for with every ref."""

from collections import OrderedDict

from adaptermesh.artifact.manifest import MAX_MANIFEST_BYTES
from adaptermesh.core.digests import digest_bytes
from adaptermesh.store.blob_reading import corrupt_blob
from adaptermesh.store.blobs import BlobStore

MOST_BYTES = 16 * 2**20


class Manifests:
    """Reads them by their digest, which is why one that is kept can't be out of date."""

    def __init__(self, blobs: BlobStore, most_bytes: int = MOST_BYTES) -> None:
        self._blobs = blobs
        self._most_bytes = most_bytes
        self._bytes = 0
        # The one that was asked for last is at the end.
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    @property
    def kept_bytes(self) -> int:
        """How much of memory they take."""
        return self._bytes

    async def read(self, digest: str) -> bytes:
        """A version's canonical manifest; raises MeshError DATA_CORRUPT if it isn't what was kept."""
        manifest = self._kept.get(digest)
        if manifest is not None:
            self._kept.move_to_end(digest)
            return manifest
        return await self.read_again(digest)

    async def read_again(self, digest: str) -> bytes:
        """The same from the blobs, whatever is in memory: for whoever wants to know what is kept."""
        manifest = await self._blobs.get(digest, MAX_MANIFEST_BYTES)
        if digest_bytes(manifest) != digest:
            raise corrupt_blob(digest, "the manifest has another digest")
        self._keep(digest, manifest)
        return manifest

    def _keep(self, digest: str, manifest: bytes) -> None:
        if digest in self._kept:
            return
        self._kept[digest] = manifest
        self._bytes += len(manifest)
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])
