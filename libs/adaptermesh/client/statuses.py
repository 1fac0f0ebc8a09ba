"""The calls about a version's status, and about removing it."""

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.calls import PAGE_SIZE, all_pages
from adaptermesh.client.records import (
    DeletedVersion,
    Removal,
    StatusChange,
    StatusHistory,
    Version,
    VersionStatus,
)
from adaptermesh.client.store_connection import StoreConnection
from adaptermesh.core.refs import parse_ref
from adaptermesh.core.version_state import VersionState
from adaptermesh.rpc.version_state import state_message


class StatusCalls(StoreConnection):
    """The part of the store's client that says whether versions should be used."""

    async def set_status(
        self,
        ref: str,
        state: VersionState,
        *,
        reason: str = "",
        replacement: str = "",
        expected_generation: int | None = None,
        actor: str = "",
    ) -> StatusChange:
        """Deprecates the version that a ref means now, revokes it, or makes it active again.

        A deprecated version is served with a warning that names the `replacement` (a ref); a revoked one is
        refused everywhere with the `reason`, which it must have. With `expected_generation` it is set only if
        nobody set it meanwhile; otherwise ABORTED (STATUS_CONFLICT).
        """
        version = (await self.resolve(ref, include_unusable=True)).version
        response = await self._call(
            self._stub.SetVersionStatus,
            store_pb2.SetVersionStatusRequest(
                namespace=version.namespace,
                name=version.name,
                version_number=version.number,
                state=state_message(state),
                reason=reason,
                replacement=replacement,
                expected_generation=expected_generation,
                actor=actor,
            ),
        )
        return StatusChange(wire.version_of(response.version), response.feed_position)

    async def status_history(self, ref: str) -> StatusHistory:
        """Every status of the version that a ref means now, newest first.

        One that was removed is found by its number, `namespace/name:v3`.
        """
        named = parse_ref(ref)
        number = named.version or (await self.resolve(ref, include_unusable=True)).version.number
        adapter = named.adapter
        deletion: DeletedVersion | None = None

        async def page(token: str) -> tuple[list[VersionStatus], str]:
            nonlocal deletion
            request = store_pb2.ListStatusHistoryRequest(
                namespace=adapter.namespace,
                name=adapter.name,
                version_number=number,
                page_size=PAGE_SIZE,
                page_token=token,
            )
            response = await self._call(self._stub.ListStatusHistory, request)
            if response.HasField("deletion"):
                deletion = wire.deleted_of(response.deletion)
            return [wire.status_of(status) for status in response.statuses], response.next_page_token

        statuses = tuple(await all_pages(page))
        return StatusHistory(f"{adapter}:v{number}", statuses, deletion)

    async def delete_version(self, version: Version, *, actor: str = "", reason: str = "") -> Removal:
        """Removes a version for good, if it still is the one that the caller has looked at.

        What an alias points at, a route names or another version was made from stays: FAILED_PRECONDITION
        (VERSION_IN_USE) says what uses it. Its number is never given again.
        """
        response = await self._call(
            self._stub.DeleteVersion,
            store_pb2.DeleteVersionRequest(
                namespace=version.namespace,
                name=version.name,
                version_number=version.number,
                digest=version.digest,
                actor=actor,
                reason=reason,
            ),
        )
        return Removal(wire.deleted_of(response.deleted), response.feed_position)
