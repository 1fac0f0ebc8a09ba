"""A connection to the adapter store, and what every call to it needs: what a ref means."""

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.client import wire
from adaptermesh.client.calls import Connection, Deadlines
from adaptermesh.client.records import ResolvedRef
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName, parse_ref


class StoreConnection(Connection):
    """One channel to a store, and its stub."""

    def __init__(self, target: str, deadlines: Deadlines, api_key: str = "") -> None:
        super().__init__(target, deadlines, Reason.STORE_UNREACHABLE, api_key)
        self._stub = store_pb2_grpc.StoreServiceStub(self._channel)

    async def resolve(self, ref: str, *, include_unusable: bool = False) -> ResolvedRef:
        """The version that a ref means now, its aliases and its manifest.

        A version that is revoked is refused with the reason, unless `include_unusable`: to look at it.
        """
        return await self._resolve(store_pb2.ResolveRefRequest(ref=ref, include_unusable=include_unusable))

    async def resolve_digest(self, digest: str) -> ResolvedRef:
        """The version with a digest, whatever its name and status: to look at it."""
        return await self._resolve(store_pb2.ResolveRefRequest(digest=digest, include_unusable=True))

    async def _resolve(self, request: store_pb2.ResolveRefRequest) -> ResolvedRef:
        response = await self._call(self._stub.ResolveRef, request)
        return ResolvedRef(wire.version_of(response.version), tuple(response.aliases), response.manifest)

    async def _version_number(self, adapter: AdapterName, version: str | int) -> int:
        if isinstance(version, int):
            return version
        if version.startswith("v") and version[1:].isdecimal():
            return int(version[1:])
        ref = parse_ref(version)
        if ref.adapter != adapter:
            raise invalid_ref(f"'{version}' is a version of another adapter than '{adapter}'", version)
        return ref.version or (await self.resolve(version)).version.number


def invalid_ref(message: str, ref: str) -> MeshError:
    """INVALID_ARGUMENT (INVALID_REF)."""
    return MeshError(Code.INVALID_ARGUMENT, Reason.INVALID_REF, message, metadata={"ref": ref})
