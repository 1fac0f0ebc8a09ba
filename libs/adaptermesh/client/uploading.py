"""Uploads: in one piece, or in parts that can be continued."""

import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.records import Lineage, Publication, UploadResult
from adaptermesh.client.resuming import ResumableUpload
from adaptermesh.client.source_folder import FolderFile, read_folder
from adaptermesh.client.store_connection import StoreConnection
from adaptermesh.client.transfer import ProgressCallback, send_upload, upload_header
from adaptermesh.client.upload_memory import UploadMemory, default_folder
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.refs import AdapterName

IN_PARTS_FROM_BYTES = 32 * 2**20


class UploadingCalls(StoreConnection):
    """The part of the store's client that uploads."""

    async def upload(
        self,
        folder: Path | str,
        adapter: str,
        publication: Publication,
        *,
        parents: Sequence[str] = (),
        merge_recipe: Mapping[str, Any] | None = None,
        validate_only: bool = False,
        in_parts: bool | None = None,
        remember_in: Path | str | None = None,
        progress: ProgressCallback | None = None,
    ) -> UploadResult:
        """Uploads a folder that peft or the adapters library saved as the next version of `namespace/name`.

        The same content again is the same version: then `created` is False. With `validate_only` the store
        runs every check and publishes nothing. Weights that the adapters library has pickled are converted
        to safetensors first, which needs torch.

        What has 32 MiB or more goes in parts. Then a connection or a store that is lost in the middle is
        borne with, and if this call fails or its process ends, the next one goes on where it stopped.

        Args:
            folder: what to upload.
            adapter: what to call it.
            publication: what to say of it.
            parents: the digests of the versions it was made from, which the store must have on the same base.
                They become part of the manifest, and so of the digest.
            merge_recipe: how it was merged, which `merge` does; likewise.
            validate_only: everything but publishing.
            in_parts: whatever the size: in parts (True), or in one piece (False).
            remember_in: the folder where an upload in parts is remembered until it is completed. Default:
                `~/.adaptermesh/uploads`.
            progress: hears of bytes.
        """
        name = AdapterName.parse(adapter)
        with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
            files = await read_folder(Path(folder), Path(room))
            return await self.publish(
                name,
                publication,
                files,
                lineage=Lineage(tuple(parents), merge_recipe),
                validate_only=validate_only,
                in_parts=in_parts,
                remember_in=remember_in,
                progress=progress,
            )

    async def publish(
        self,
        adapter: AdapterName,
        publication: Publication,
        files: Sequence[FolderFile],
        *,
        lineage: Lineage,
        expected_digest: str = "",
        validate_only: bool = False,
        in_parts: bool | None = None,
        remember_in: Path | str | None = None,
        progress: ProgressCallback | None = None,
    ) -> UploadResult:
        """Uploads these very files, as `upload` does; with `expected_digest`: to that version or none."""
        header = upload_header(
            adapter,
            publication,
            files,
            lineage,
            validate_only=validate_only,
            expected_digest=expected_digest,
        )
        if in_parts is None:
            in_parts = header_size(header) >= IN_PARTS_FROM_BYTES
        if in_parts and not validate_only:
            memory_folder = default_folder() if remember_in is None else Path(remember_in)
            try:
                return await self._upload_in_parts(header, files, memory_folder, progress)
            except MeshError as error:
                # An older store.
                if error.code is not Code.UNIMPLEMENTED:
                    raise
        response = await send_upload(self._upload, header, files, progress)
        return UploadResult(wire.version_of(response.version), response.created, response.feed_position)

    async def begin_upload(self, header: store_pb2.UploadHeader) -> store_pb2.BeginUploadResponse:
        """Begins an upload in parts. `upload` does all of it."""
        return await self._call(self._stub.BeginUpload, store_pb2.BeginUploadRequest(header=header))

    async def send_part(self, messages: AsyncIterator[store_pb2.UploadPartRequest]) -> None:
        """Sends one part."""
        await self._call(self._stub.UploadPart, messages, self.deadlines.transfer_seconds)

    async def get_upload(self, upload_id: str) -> store_pb2.GetUploadResponse:
        """What the store has received."""
        return await self._call(self._stub.GetUpload, store_pb2.GetUploadRequest(upload_id=upload_id))

    async def complete_upload(self, upload_id: str) -> store_pb2.CompleteUploadResponse:
        """Has it published."""
        request = store_pb2.CompleteUploadRequest(upload_id=upload_id)
        return await self._call(self._stub.CompleteUpload, request, self.deadlines.transfer_seconds)

    async def abandon_upload(self, upload_id: str) -> None:
        """Has the store forget it."""
        await self._call(self._stub.AbandonUpload, store_pb2.AbandonUploadRequest(upload_id=upload_id))

    async def _upload_in_parts(
        self,
        header: store_pb2.UploadHeader,
        files: Sequence[FolderFile],
        memory_folder: Path,
        progress: ProgressCallback | None,
    ) -> UploadResult:
        digest = digest_bytes(header.SerializeToString(deterministic=True))
        memory = UploadMemory(memory_folder, self.target, digest)
        done = await ResumableUpload(self, header, files, memory, progress).send()
        response = done.response
        return UploadResult(
            wire.version_of(response.version),
            response.created,
            response.feed_position,
            resumed_bytes=done.resumed_bytes,
        )

    async def _upload(
        self, messages: AsyncIterator[store_pb2.UploadAdapterRequest]
    ) -> store_pb2.UploadAdapterResponse:
        return await self._call(self._stub.UploadAdapter, messages, self.deadlines.transfer_seconds)


def header_size(header: store_pb2.UploadHeader) -> int:
    """Of all files together."""
    return sum(file.size_bytes for file in header.files)
