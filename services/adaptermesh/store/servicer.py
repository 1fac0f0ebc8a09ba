"""The gRPC face of the store: messages in, the store's own nouns, messages out."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.refs import AdapterName, Ref, parse_ref
from adaptermesh.core.roles import Permission
from adaptermesh.rpc.version_state import state_message, state_of
from adaptermesh.store import feed_wire, wire
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.feed_servicer import FeedServicer
from adaptermesh.store.listing import AdapterQuery
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.reading import check_offset, find_file
from adaptermesh.store.removal_servicer import RemovalServicer
from adaptermesh.store.routes import ANY_TENANT
from adaptermesh.store.signing_servicer import SigningServicer
from adaptermesh.store.statuses import StatusRequest
from adaptermesh.store.upload_servicer import UploadServicer

Context = Any

# Well below the largest message that clients take.
_PART_BYTES = 512 * 1024
_PART_ITEMS = 500


class StoreServicer(UploadServicer, RemovalServicer, FeedServicer, SigningServicer):
    """`adaptermesh.api.store.v1.StoreService`. Errors are raised as `MeshError`."""

    async def DownloadFile(  # type: ignore[override]  # large messages are encoded here already
        self, request: store_pb2.DownloadFileRequest, context: Context
    ) -> AsyncIterator[store_pb2.DownloadFileResponse | bytes]:
        version = await self._stores.catalogue.get_digest(request.digest)
        file = find_file(version.record, request.path)
        self._stores.download_counts.note_file(version.record, file, request.offset)
        field = store_pb2.DownloadFileResponse.DATA_FIELD_NUMBER
        async with aclosing(self._stores.downloads.file(file, request.offset, field)) as messages:
            async for message in messages:
                yield message

    async def FetchAdapter(  # type: ignore[override]  # as above
        self, request: store_pb2.FetchAdapterRequest, context: Context
    ) -> AsyncIterator[store_pb2.FetchAdapterResponse | bytes]:
        catalogue = self._stores.catalogue
        find = catalogue.get_digest if request.include_unusable else catalogue.usable_digest
        version = await find(request.digest)
        check_offset(request.offset, version.record.size_bytes)
        manifests = self._stores.manifests
        # Who looks at what must not be served, or verifies it, wants what is kept and not what is in memory.
        read = manifests.read_again if request.include_unusable else manifests.read
        manifest = await read(version.record.digest)
        self._stores.download_counts.note_canonical(version.record, request.offset)
        yield store_pb2.FetchAdapterResponse(manifest=manifest)
        field = store_pb2.FetchAdapterResponse.DATA_FIELD_NUMBER
        tensors = self._stores.downloads.tensors(version, manifest, request.offset, field)
        async with aclosing(tensors) as messages:
            async for message in messages:
                yield message

    async def ResolveRef(
        self, request: store_pb2.ResolveRefRequest, context: Context
    ) -> store_pb2.ResolveRefResponse:
        version, aliases = await self._stores.catalogue.resolve(
            await self._ref(request), include_unusable=request.include_unusable
        )
        manifest = await self._stores.manifests.read(version.record.digest)
        return store_pb2.ResolveRefResponse(
            version=wire.version_to(version.record), aliases=aliases, manifest=manifest
        )

    async def _ref(self, request: store_pb2.ResolveRefRequest) -> Ref:
        if not request.digest:
            return parse_ref(request.ref)
        if request.ref:
            raise invalid_field("digest", "is for a request without a ref")
        found = await self._stores.catalogue.get_digest(request.digest)
        return Ref(found.record.adapter, digest=request.digest)

    async def GetDownloadCounts(
        self, request: store_pb2.GetDownloadCountsRequest, context: Context
    ) -> store_pb2.GetDownloadCountsResponse:
        counts = await self._stores.download_counts.counts(request.digests)
        return store_pb2.GetDownloadCountsResponse(counts=counts)

    async def ListVersions(
        self, request: store_pb2.ListVersionsRequest, context: Context
    ) -> store_pb2.ListVersionsResponse:
        adapter = AdapterName.checked(request.namespace, request.name)
        page = await self._stores.catalogue.list_versions(adapter, _page(request))
        return store_pb2.ListVersionsResponse(
            versions=[wire.version_to(version) for version in page.items], next_page_token=page.next_token
        )

    async def SetVersionStatus(
        self, request: store_pb2.SetVersionStatusRequest, context: Context
    ) -> store_pb2.SetVersionStatusResponse:
        version, position = await self._stores.statuses.set(_status(request))
        return store_pb2.SetVersionStatusResponse(version=wire.version_to(version), feed_position=position)

    async def ListAdapters(
        self, request: store_pb2.ListAdaptersRequest, context: Context
    ) -> store_pb2.ListAdaptersResponse:
        query = AdapterQuery(
            text=request.query,
            namespace=request.namespace,
            task=request.task,
            base_model=request.base_model,
            tags=tuple(request.tags),
        )
        page = await self._stores.listing.list(query, _page(request))
        return store_pb2.ListAdaptersResponse(
            adapters=[wire.summary_to(summary) for summary in page.items], next_page_token=page.next_token
        )

    async def SearchAdapters(
        self, request: store_pb2.SearchAdaptersRequest, context: Context
    ) -> store_pb2.SearchAdaptersResponse:
        query = wire.search_from(request)
        finding = self._stores.search.find(query, _page(request))
        if request.with_facets:
            # Beside each other: the database works on one while the other is put together.
            page, facets = await asyncio.gather(finding, self._stores.search.facets(query))
        else:
            page, facets = await finding, None
        response = store_pb2.SearchAdaptersResponse(
            adapters=[wire.summary_to(summary) for summary in page.items], next_page_token=page.next_token
        )
        if facets is not None:
            response.facets.extend(wire.facets_to(facets))
            response.facets_capped = facets.capped
        return response

    async def SetAlias(
        self, request: store_pb2.SetAliasRequest, context: Context
    ) -> store_pb2.SetAliasResponse:
        alias, position = await self._stores.aliases.point(_move(request), request.version_number)
        return store_pb2.SetAliasResponse(alias=wire.alias_to(alias), feed_position=position)

    async def RollBackAlias(
        self, request: store_pb2.RollBackAliasRequest, context: Context
    ) -> store_pb2.RollBackAliasResponse:
        alias, position = await self._stores.aliases.roll_back(_move(request))
        return store_pb2.RollBackAliasResponse(alias=wire.alias_to(alias), feed_position=position)

    async def SetAliasProtection(
        self, request: store_pb2.SetAliasProtectionRequest, context: Context
    ) -> store_pb2.SetAliasProtectionResponse:
        alias, position = await self._stores.aliases.protect(_move(request), protected=request.protected)
        return store_pb2.SetAliasProtectionResponse(alias=wire.alias_to(alias), feed_position=position)

    async def DeleteAlias(
        self, request: store_pb2.DeleteAliasRequest, context: Context
    ) -> store_pb2.DeleteAliasResponse:
        alias, position = await self._stores.aliases.delete(_move(request))
        return store_pb2.DeleteAliasResponse(alias=wire.alias_to(alias), feed_position=position)

    async def ListAliasHistory(
        self, request: store_pb2.ListAliasHistoryRequest, context: Context
    ) -> store_pb2.ListAliasHistoryResponse:
        name = AliasName(AdapterName.checked(request.namespace, request.name), request.alias)
        page = await self._stores.aliases.history(name, _page(request))
        return store_pb2.ListAliasHistoryResponse(
            moves=[wire.alias_to(move) for move in page.items], next_page_token=page.next_token
        )

    async def SetRoute(
        self, request: store_pb2.SetRouteRequest, context: Context
    ) -> store_pb2.SetRouteResponse:
        expected = request.expected_generation if request.HasField("expected_generation") else None
        route, position = await self._stores.routes.set(wire.route_from(request.route), expected)
        return store_pb2.SetRouteResponse(route=wire.route_to(route), feed_position=position)

    async def DeleteRoute(
        self, request: store_pb2.DeleteRouteRequest, context: Context
    ) -> store_pb2.DeleteRouteResponse:
        position = await self._stores.routes.delete(request.tenant, request.task)
        return store_pb2.DeleteRouteResponse(feed_position=position)

    async def ListRoutes(
        self, request: store_pb2.ListRoutesRequest, context: Context
    ) -> store_pb2.ListRoutesResponse:
        caller = current_caller.get()
        tenant = request.tenant or ("" if caller.is_operator else caller.tenant)
        if tenant != ANY_TENANT or caller.namespaces:
            # Routes lead anywhere: a key of some namespaces is none for them.
            self._stores.authority.require_tenant(Permission.READ, tenant)
        page = await self._stores.routes.list(tenant, _page(request))
        return store_pb2.ListRoutesResponse(
            routes=[wire.route_to(route) for route in page.items], next_page_token=page.next_token
        )

    async def RegisterBaseModel(
        self, request: store_pb2.RegisterBaseModelRequest, context: Context
    ) -> store_pb2.RegisterBaseModelResponse:
        base = wire.base_model_from(request.base_model)
        created, position = await self._stores.catalogue.register_base_model(base)
        return store_pb2.RegisterBaseModelResponse(created=created, feed_position=position)

    async def ListBaseModels(
        self, request: store_pb2.ListBaseModelsRequest, context: Context
    ) -> store_pb2.ListBaseModelsResponse:
        page = await self._stores.catalogue.list_base_models(_page(request))
        return store_pb2.ListBaseModelsResponse(
            base_models=[wire.base_model_to(base) for base in page.items], next_page_token=page.next_token
        )

    async def GetSnapshot(
        self, request: store_pb2.GetSnapshotRequest, context: Context
    ) -> AsyncIterator[store_pb2.GetSnapshotResponse]:
        part, size, count = store_pb2.GetSnapshotResponse(), 0, 0
        async with aclosing(self._stores.snapshots.read()) as items:
            async for item in items:
                if size >= _PART_BYTES or count >= _PART_ITEMS:
                    yield part
                    part, size, count = store_pb2.GetSnapshotResponse(), 0, 0
                size += feed_wire.add_to_part(part, item)
                count += 1
        yield part

    async def CollectGarbage(
        self, request: store_pb2.CollectGarbageRequest, context: Context
    ) -> store_pb2.CollectGarbageResponse:
        grace = wire.grace_from(request)
        return wire.garbage_to(await self._stores.garbage.collect(grace, dry_run=request.dry_run))

    async def VerifyBlobs(
        self, request: store_pb2.VerifyBlobsRequest, context: Context
    ) -> AsyncIterator[store_pb2.VerifyBlobsResponse]:
        async with aclosing(self._stores.scrubber.check(request.digest)) as checks:
            async for check in checks:
                yield store_pb2.VerifyBlobsResponse(
                    blob_digest=check.digest, size_bytes=check.size_bytes, problem=check.problem
                )


def _page(
    request: store_pb2.ListVersionsRequest
    | store_pb2.ListAdaptersRequest
    | store_pb2.SearchAdaptersRequest
    | store_pb2.ListAliasHistoryRequest
    | store_pb2.ListRoutesRequest
    | store_pb2.ListBaseModelsRequest,
) -> PageRequest:
    return PageRequest(request.page_size, request.page_token)


def _move(
    request: store_pb2.SetAliasRequest
    | store_pb2.RollBackAliasRequest
    | store_pb2.SetAliasProtectionRequest
    | store_pb2.DeleteAliasRequest,
) -> MoveRequest:
    acknowledged = (
        not isinstance(request, store_pb2.SetAliasProtectionRequest) and request.acknowledge_protection
    )
    return MoveRequest(
        alias=AliasName(AdapterName.checked(request.namespace, request.name), request.alias),
        expected_generation=request.expected_generation if request.HasField("expected_generation") else None,
        actor=request.actor,
        comment=request.comment,
        acknowledge_protection=acknowledged,
    )


def _status(request: store_pb2.SetVersionStatusRequest) -> StatusRequest:
    state = state_of(request.state)
    if state_message(state) != request.state:
        raise invalid_field("state", "must be active, deprecated or revoked")
    return StatusRequest(
        adapter=AdapterName.checked(request.namespace, request.name),
        version_number=request.version_number,
        state=state,
        reason=request.reason,
        replacement=request.replacement,
        expected_generation=request.expected_generation if request.HasField("expected_generation") else None,
        actor=request.actor,
    )
