"""The calls that versions on their way between stores need: these very files, and that very version."""

import functools
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.calls import PAGE_SIZE, all_pages
from adaptermesh.client.records import Lineage, Publication, UploadResult
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.store_connection import StoreConnection
from adaptermesh.client.transfer import FileStream, ProgressCallback, send_upload, upload_header
from adaptermesh.core.errors import Reason, not_found
from adaptermesh.core.refs import AdapterName


class PackageCalls(StoreConnection):
    """The part of the store's client that moves versions as they are."""

    async def publish(
        self,
        adapter: AdapterName,
        publication: Publication,
        files: Sequence[FolderFile],
        *,
        lineage: Lineage,
        expected_digest: str,
        validate_only: bool = False,
        progress: ProgressCallback | None = None,
    ) -> UploadResult:
        """Uploads these very files; they become the version with the expected digest or none.

        Raises:
            MeshError: as for an upload; FAILED_PRECONDITION (DIGEST_MISMATCH).
        """
        header = upload_header(
            adapter,
            publication,
            files,
            lineage,
            validate_only=validate_only,
            expected_digest=expected_digest,
        )
        response = await send_upload(self._send, header, files, progress)
        return UploadResult(wire.version_of(response.version), response.created, response.feed_position)

    def file_stream(self, digest: str, path: str) -> FileStream:
        """The bytes of one uploaded file of a version, from any offset."""
        return functools.partial(self._stream, digest, path)

    async def copy_base_model(self, source: "PackageCalls", digest: str) -> bool:
        """Makes a base model known that another store knows; False if it was known before.

        Raises:
            MeshError: NOT_FOUND (BASE_NOT_FOUND) if that one does not know it.
        """
        for base in await source.all_base_models():
            if base.digest == digest:
                request = store_pb2.RegisterBaseModelRequest(base_model=base)
                return (await self._call(self._stub.RegisterBaseModel, request)).created
        raise not_found(Reason.BASE_NOT_FOUND, "base model", digest)

    async def all_base_models(self) -> list[adapter_pb2.BaseModel]:
        """The base models with all that another store has to know of them."""

        async def page(token: str) -> tuple[Sequence[adapter_pb2.BaseModel], str]:
            request = store_pb2.ListBaseModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._stub.ListBaseModels, request)
            return response.base_models, response.next_page_token

        return await all_pages(page)

    async def _send(
        self, messages: AsyncIterator[store_pb2.UploadAdapterRequest]
    ) -> store_pb2.UploadAdapterResponse:
        return await self._call(self._stub.UploadAdapter, messages, self.deadlines.transfer_seconds)

    async def _stream(self, digest: str, path: str, offset: int) -> AsyncIterator[bytes]:
        request = store_pb2.DownloadFileRequest(digest=digest, path=path, offset=offset)
        try:
            async for message in self._stub.DownloadFile(request, timeout=self.deadlines.transfer_seconds):
                yield message.data
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
