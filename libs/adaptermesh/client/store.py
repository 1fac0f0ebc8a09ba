"""The adapter store's client: upload, download, find, point aliases, set routes."""

import datetime
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.client import wire
from adaptermesh.client.access import AccessCalls
from adaptermesh.client.aliases import AliasCalls
from adaptermesh.client.calls import DEFAULT_STORE, PAGE_SIZE, Deadlines, all_pages
from adaptermesh.client.changes import ChangeCalls
from adaptermesh.client.downloads import DownloadCalls
from adaptermesh.client.integrity_records import BlobCheck, GarbageReport, Verification
from adaptermesh.client.records import (
    Adapter,
    BaseModel,
    Found,
    Merge,
    MergeResult,
    Publication,
    Route,
    RouteChange,
    RouteTarget,
    Search,
    Version,
    VersionDifference,
)
from adaptermesh.client.signatures import SignatureCalls
from adaptermesh.client.statuses import StatusCalls
from adaptermesh.client.transfer import (
    FileStream,
    Progress,
    ProgressCallback,
    destination,
    fetch_file,
    is_there,
)
from adaptermesh.client.uploading import UploadingCalls
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.refs import AdapterName

EVERY_TENANT = "*"
CARD = "README.md"


class StoreClient(
    UploadingCalls, AliasCalls, StatusCalls, SignatureCalls, AccessCalls, ChangeCalls, DownloadCalls
):
    """Talks to the adapter store. Every method raises `MeshError` with a code and a reason.

    ```python
    async with StoreClient() as store:
        await store.upload("my-adapter", "acme/ner", Publication("smollm2-135m-instruct", task="ner"))
        await store.set_alias("acme/ner@prod", "v1")
        await store.set_route("ner", "acme/ner@prod")
    ```
    """

    def __init__(
        self, target: str = DEFAULT_STORE, *, deadlines: Deadlines | None = None, api_key: str = ""
    ) -> None:
        """Connects on the first call.

        Args:
            target: host:port of a store.
            deadlines: upper bounds of each kind of call.
            api_key: shown with every call; a store that asks for none ignores it.
        """
        super().__init__(target, deadlines or Deadlines(), api_key)

    async def download(
        self,
        ref: str,
        folder: Path | str,
        *,
        force: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Version:
        """Brings the uploaded files of a version into `folder`, byte for byte and verified.

        Files that are there already are kept, partial ones continued. A file with other content is
        overwritten only with `force`.
        """
        version = (await self.resolve(ref)).version
        total = sum(file.size_bytes for file in version.source_files)
        done = 0
        for file in version.source_files:
            place = destination(Path(folder), file.path)
            before, path = done, file.path

            def on_bytes(count: int, before: int = before, path: str = path) -> None:
                if progress is not None:
                    progress(Progress(path, before + count, total))

            if await is_there(file, place, force=force):
                on_bytes(file.size_bytes)
            else:
                await fetch_file(file, place, self.file_stream(version.digest, file.path), on_bytes)
            done += file.size_bytes
        return version

    async def merge(
        self,
        adapter: str,
        merge: Merge,
        publication: Publication | None = None,
        *,
        validate_only: bool = False,
        progress: ProgressCallback | None = None,
        on_module: Callable[[int, int], None] | None = None,
    ) -> MergeResult:
        """Merges versions into the next version of `namespace/name`; needs numpy.

        The members' tensors are fetched and merged here, in a temporary folder, and the result is uploaded
        with its parents and recipe. Task and licence, if left out of the `publication`, are those of the
        members where these agree; its `base_model` may be left empty.

        Args:
            adapter: what to call it.
            merge: what to merge and how.
            publication: what to say of it.
            validate_only: everything but publishing.
            progress: hears of bytes, on their way here and back.
            on_module: hears how many modules are merged, and of how many, from another thread.
        """
        # Only here: the client itself does without numpy.
        from adaptermesh.client.merging import Merger

        merger = Merger(self, progress, on_module)
        return await merger.merge(adapter, merge, publication or Publication(""), validate_only=validate_only)

    async def fetch(
        self,
        digest: str,
        place: Path | str,
        *,
        include_unusable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> bytes:
        """Brings the canonical tensor file of a version to `place`, verified chunk by chunk; needs numpy.

        Returns its manifest: canonical JSON, whose sha256 is the digest. A version that must not be used,
        revoked or unsigned, is refused unless `include_unusable`: to look at it, never to serve it.
        """
        from adaptermesh.client.canonical_form import receive_canonical

        request = store_pb2.FetchAdapterRequest(digest=digest, include_unusable=include_unusable)
        try:
            stream = self._stub.FetchAdapter(request, timeout=self.deadlines.transfer_seconds)
            return await receive_canonical(stream, digest, Path(place), progress)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def card(self, version: Version) -> str:
        """The version's card, README.md as it was uploaded; empty if there is none."""
        file = next((file for file in version.source_files if file.path == CARD), None)
        if file is None:
            return ""
        data = b"".join([piece async for piece in self._file_bytes(version.digest, CARD, 0)])
        if digest_bytes(data) != file.digest:
            raise MeshError(
                Code.DATA_LOSS, Reason.DATA_CORRUPT, f"the card of '{version.ref}' has another digest"
            )
        return data.decode(errors="replace")

    async def diff(self, a: str, b: str, *, progress: ProgressCallback | None = None) -> VersionDifference:
        """Compares the versions that two refs mean: fields, modules, metrics and tensors; needs numpy.

        The tensors of both are fetched into a temporary folder and compared block by block. Those of a
        version that is revoked can't be had: then `tensors` is None.
        """
        # Only here: the client itself does without numpy.
        from adaptermesh.client.comparing import compare

        return await compare(self, a, b, progress)

    async def verify(self, ref: str, *, progress: ProgressCallback | None = None) -> Verification:
        """Downloads everything of a version and compares it with its digests; needs numpy.

        That is the manifest, every chunk of the tensors and every uploaded file. The store reads its copies
        again, too. Nothing is kept; what is wrong is in the result, not raised.
        """
        from adaptermesh.client.verifying import Verifier

        return await Verifier(self, self.file_stream, progress).verify(ref)

    def file_stream(self, digest: str, path: str) -> FileStream:
        """The bytes of one uploaded file, from any offset."""
        return functools.partial(self._file_bytes, digest, path)

    async def verify_stored(self, digest: str = "") -> list[BlobCheck]:
        """Has the store read the blobs of a version again, or, without a digest, those of all versions."""
        request = store_pb2.VerifyBlobsRequest(digest=digest)
        try:
            stream = self._stub.VerifyBlobs(request, timeout=self.deadlines.transfer_seconds)
            return [BlobCheck(one.blob_digest, one.size_bytes, one.problem) async for one in stream]
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def collect_garbage(
        self, *, grace: datetime.timedelta | None = None, dry_run: bool = False
    ) -> GarbageReport:
        """Removes stored bytes that no version needs and are older than the grace (24 hours)."""
        request = store_pb2.CollectGarbageRequest(dry_run=dry_run)
        if grace is not None:
            request.grace.FromTimedelta(grace)
        found = await self._call(self._stub.CollectGarbage, request, self.deadlines.transfer_seconds)
        return GarbageReport(
            dry_run,
            found.removed_blobs,
            found.removed_bytes,
            found.needed_blobs,
            found.young_blobs,
            found.unfinished_uploads,
            found.expired_uploads,
        )

    async def list_versions(self, adapter: str) -> list[Version]:
        """Every version of `namespace/name`, newest first."""
        name = AdapterName.parse(adapter)

        async def page(token: str) -> tuple[list[Version], str]:
            request = store_pb2.ListVersionsRequest(
                namespace=name.namespace, name=name.name, page_size=PAGE_SIZE, page_token=token
            )
            response = await self._call(self._stub.ListVersions, request)
            return [wire.version_of(version) for version in response.versions], response.next_page_token

        return await all_pages(page)

    async def list_adapters(
        self,
        query: str = "",
        *,
        namespace: str = "",
        task: str = "",
        base_model: str = "",
        tags: Sequence[str] = (),
    ) -> list[Adapter]:
        """Adapters by name; every given condition must hold. `query` is a part of `namespace/name`."""

        async def page(token: str) -> tuple[list[Adapter], str]:
            request = store_pb2.ListAdaptersRequest(
                query=query,
                namespace=namespace,
                task=task,
                base_model=base_model,
                tags=tags,
                page_size=PAGE_SIZE,
                page_token=token,
            )
            response = await self._call(self._stub.ListAdapters, request)
            return [wire.adapter_of(adapter) for adapter in response.adapters], response.next_page_token

        return await all_pages(page)

    async def search(self, query: Search, *, limit: int = 100) -> Found:
        """The first `limit` adapters that match, in the order that is asked for; with facets if asked for.

        In order of relevance, downloads or score there are at most 1,000.
        """
        adapters: list[Adapter] = []
        request = wire.search_request(query)
        facets: dict[str, tuple[tuple[str, int], ...]] = {}
        while len(adapters) < limit:
            request.page_size = min(PAGE_SIZE, limit - len(adapters))
            response = await self._call(self._stub.SearchAdapters, request)
            adapters.extend(wire.adapter_of(adapter) for adapter in response.adapters)
            if request.with_facets:
                facets = wire.facets_of(response)
                request.with_facets = False
            request.page_token = response.next_page_token
            if not request.page_token:
                break
        more = bool(request.page_token) or len(adapters) > limit
        return Found(tuple(adapters[:limit]), facets, more=more)

    async def set_route(
        self,
        task: str,
        targets: str | Sequence[RouteTarget],
        *,
        tenant: str = EVERY_TENANT,
        expected_generation: int | None = None,
    ) -> RouteChange:
        """Sends a tenant's requests for a task to a ref, or to several by weight."""
        chosen = (RouteTarget(targets),) if isinstance(targets, str) else targets
        request = store_pb2.SetRouteRequest(
            route=adapter_pb2.Route(
                tenant=tenant,
                task=task,
                targets=[
                    adapter_pb2.RouteTarget(ref=target.ref, weight=target.weight, cohort=target.cohort)
                    for target in chosen
                ],
            ),
            expected_generation=expected_generation,
        )
        response = await self._call(self._stub.SetRoute, request)
        return RouteChange(wire.route_of(response.route), response.feed_position)

    async def delete_route(self, task: str, *, tenant: str = EVERY_TENANT) -> int:
        """Removes a route; returns the feed position of the change."""
        request = store_pb2.DeleteRouteRequest(tenant=tenant, task=task)
        return (await self._call(self._stub.DeleteRoute, request)).feed_position

    async def list_routes(self, *, tenant: str = "") -> list[Route]:
        """Routes by tenant and task; an empty tenant lists all of them."""

        async def page(token: str) -> tuple[list[Route], str]:
            request = store_pb2.ListRoutesRequest(tenant=tenant, page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._stub.ListRoutes, request)
            return [wire.route_of(route) for route in response.routes], response.next_page_token

        return await all_pages(page)

    async def list_base_models(self) -> list[BaseModel]:
        """The base models that the store knows, by name."""
        return [wire.base_model_of(base) for base in await self._base_models()]

    async def base_facts(self, digest: str) -> BaseFacts:
        """A base model with its config, from which the places where adapters act follow.

        Raises:
            MeshError: NOT_FOUND (BASE_NOT_FOUND).
        """
        for base in await self._base_models():
            if base.digest == digest:
                return BaseFacts.from_config(base.model_id, json.loads(base.config_json), base.weights_digest)
        raise not_found(Reason.BASE_NOT_FOUND, "base model", digest)

    async def copy_base_model(self, source: "StoreClient", digest: str) -> bool:
        """Makes a base model known that another store knows; False if it was known before."""
        for base in await source._base_models():
            if base.digest == digest:
                request = store_pb2.RegisterBaseModelRequest(base_model=base)
                return (await self._call(self._stub.RegisterBaseModel, request)).created
        raise not_found(Reason.BASE_NOT_FOUND, "base model", digest)

    async def _base_models(self) -> list[adapter_pb2.BaseModel]:
        async def page(token: str) -> tuple[Sequence[adapter_pb2.BaseModel], str]:
            request = store_pb2.ListBaseModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._stub.ListBaseModels, request)
            return response.base_models, response.next_page_token

        return await all_pages(page)

    async def _file_bytes(self, digest: str, path: str, offset: int) -> AsyncIterator[bytes]:
        request = store_pb2.DownloadFileRequest(digest=digest, path=path, offset=offset)
        try:
            async for message in self._stub.DownloadFile(request, timeout=self.deadlines.transfer_seconds):
                yield message.data
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
