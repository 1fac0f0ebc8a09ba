"""The part of the store's gRPC face that is about what versions were, and about removing them."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

from typing import Any

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.refs import AdapterName
from adaptermesh.store import wire
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.version_removal import RemovalRequest
from adaptermesh.store.with_stores import WithStores

Context = Any


class RemovalServicer(WithStores, store_pb2_grpc.StoreServiceServicer):
    """The history of statuses, and removal. Errors are raised as `MeshError`."""

    async def ListStatusHistory(
        self, request: store_pb2.ListStatusHistoryRequest, context: Context
    ) -> store_pb2.ListStatusHistoryResponse:
        adapter = AdapterName.checked(request.namespace, request.name)
        asked = PageRequest(request.page_size, request.page_token)
        page, deleted = await self._stores.statuses.history(adapter, request.version_number, asked)
        return store_pb2.ListStatusHistoryResponse(
            statuses=[wire.status_to(status) for status in page.items],
            next_page_token=page.next_token,
            deletion=None if deleted is None else wire.deleted_to(deleted),
        )

    async def DeleteVersion(
        self, request: store_pb2.DeleteVersionRequest, context: Context
    ) -> store_pb2.DeleteVersionResponse:
        removal = RemovalRequest(
            adapter=AdapterName.checked(request.namespace, request.name),
            version_number=request.version_number,
            digest=request.digest,
            actor=request.actor,
            reason=request.reason,
        )
        deleted, position = await self._stores.removals.delete(removal)
        return store_pb2.DeleteVersionResponse(deleted=wire.deleted_to(deleted), feed_position=position)
