"""The call about a version's status."""

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.records import StatusChange
from adaptermesh.client.store_connection import StoreConnection
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
