"""The operator's client: health, routers, workers and what they hold."""

from collections.abc import Awaitable, Callable

from grpc_health.v1 import health_pb2, health_pb2_grpc

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.client import wire
from adaptermesh.client.calls import DEFAULT_ROUTER, Connection, Deadlines
from adaptermesh.client.mesh_records import Residency, RouterStatus, Worker
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier

GATEWAY_SERVICE = "adaptermesh.api.inference.v1.InferenceService"
ROUTER_SERVICE = "adaptermesh.api.router.v1.RouterService"
STORE_SERVICE = "adaptermesh.api.store.v1.StoreService"
WORKER_SERVICE = "adaptermesh.api.worker.v1.WorkerService"

_TIERS = {
    Tier.DISK: adapter_pb2.TIER_DISK,
    Tier.HOST: adapter_pb2.TIER_HOST,
    Tier.DEVICE: adapter_pb2.TIER_DEVICE,
}


class HealthClient(Connection):
    """Asks any service of the mesh whether it serves."""

    def __init__(self, target: str, *, deadlines: Deadlines | None = None) -> None:
        super().__init__(target, deadlines or Deadlines(call_seconds=2.0), Reason.WORKER_LOST)
        # The stub's types leave its methods out.
        self._check: Callable[..., Awaitable[health_pb2.HealthCheckResponse]] = health_pb2_grpc.HealthStub(
            self._channel
        ).Check  # type: ignore[attr-defined]

    async def is_serving(self, service: str = "", timeout: float | None = None) -> bool:
        """False if it answers that it does not serve (yet, or any more).

        Raises:
            MeshError: UNAVAILABLE: nothing answers. NOT_FOUND: another service answers.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        response = await self._call(self._check, request, timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class RouterClient(Connection):
    """What one router knows. Every method raises `MeshError`."""

    def __init__(self, target: str = DEFAULT_ROUTER, *, deadlines: Deadlines | None = None) -> None:
        """Connects on the first call; `target` is host:port."""
        super().__init__(target, deadlines or Deadlines(), Reason.ROUTER_UNREACHABLE)
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)

    async def list_workers(self) -> list[Worker]:
        """The workers that report to this router, in order of their ids."""
        response = await self._call(self._stub.ListWorkers, router_pb2.ListWorkersRequest())
        return [wire.worker_of(view) for view in response.workers]

    async def status(self) -> RouterStatus:
        """How far the router has followed the store's change feed."""
        response = await self._call(self._stub.GetRouterStatus, router_pb2.GetRouterStatusRequest())
        return wire.router_status_of(response)


class WorkerClient(Connection):
    """One worker's state, and its adapters moved by hand. Every method raises `MeshError`."""

    def __init__(self, target: str, *, deadlines: Deadlines | None = None) -> None:
        """Connects on the first call; `target` is host:port."""
        super().__init__(target, deadlines or Deadlines(), Reason.WORKER_LOST)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)

    async def status(self) -> Worker:
        """What the worker is and holds."""
        return wire.worker_of(await self._call(self._stub.GetStatus, worker_pb2.GetStatusRequest()))

    async def load(self, digest: str, tier: Tier = Tier.DEVICE, *, pin: bool = False) -> Residency:
        """Brings a version to a tier ahead of its first request; returns when it is there.

        With `pin` it stays there, or nearer, until `unpin` or `evict`.
        """
        if tier not in _TIERS:
            raise MeshError(
                Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, f"a worker has no tier '{tier.name.lower()}'"
            )
        request = worker_pb2.LoadAdapterRequest(digest=digest, tier=_TIERS[tier], pin=pin)
        response = await self._call(self._stub.LoadAdapter, request, self.deadlines.load_seconds)
        return wire.residency_of(response.residency)

    async def unpin(self, digest: str) -> Residency:
        """Lets a version go like any other; nothing happens if it is not pinned. `tier` says where it is."""
        response = await self._call(self._stub.UnpinAdapter, worker_pb2.UnpinAdapterRequest(digest=digest))
        return wire.residency_of(response.residency)

    async def evict(self, digest: str) -> None:
        """Drops a version from device, host and disk; FAILED_PRECONDITION while requests use it."""
        await self._call(self._stub.EvictAdapter, worker_pb2.EvictAdapterRequest(digest=digest))
