import grpc
import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.tiers import Tier
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.worker.engine.status import ResidencyView, TierBudgets
from tests.unit.worker.conftest import MAX_CONTEXT, Worker
from tests.unit.worker.fake_peers import until

DIGEST = digest_bytes(b"adapter")


async def failed_load(
    worker: Worker, request: worker_pb2.LoadAdapterRequest, timeout: float = 10
) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.LoadAdapter(request, timeout=timeout)
    return mesh_error_from(caught.value)


async def test_the_status_says_who_the_worker_is_and_what_it_holds(worker: Worker) -> None:
    worker.engine.hold(ResidencyView(DIGEST, Tier.HOST, pinned=True, requests=2, size_bytes=99))
    worker.engine.report(running=1, waiting=2, waiting_tokens=3, kv_used_tokens=4)
    worker.engine.report(kv_used_bytes=7, kv_cached_bytes=8, kv_total_bytes=9)
    worker.engine.report(tiers=TierBudgets(1, 2, 3, 4, 5, 6))
    status = await worker.stub.GetStatus(worker_pb2.GetStatusRequest())
    assert status.info.address == f"127.0.0.1:{worker.port}"
    assert status.info.worker_id.startswith(f"127.0.0.1-{worker.port}-")
    assert status.info.base_model.digest == worker.base.digest
    assert status.info.max_context_tokens == MAX_CONTEXT
    assert status.state == worker_pb2.WORKER_STATE_READY
    load = status.load
    assert (load.running_requests, load.waiting_requests, load.waiting_tokens) == (1, 2, 3)
    assert (load.kv_used_tokens, load.kv_total_tokens) == (4, 1024)
    assert load.budgets == worker_pb2.Budgets(
        device_used_bytes=1,
        device_used_slots=2,
        host_used_bytes=3,
        host_budget_bytes=4,
        disk_used_bytes=5,
        disk_budget_bytes=6,
        kv_used_bytes=7,
        kv_cached_bytes=8,
        kv_total_bytes=9,
    )
    await until(lambda: any(delta.load == load for delta in worker.router.deltas()))
    (residency,) = status.residencies
    assert (residency.digest, residency.tier) == (DIGEST, adapter_pb2.TIER_HOST)
    assert (residency.pinned, residency.requests, residency.size_bytes) == (True, 2, 99)


@pytest.mark.parametrize(
    ("asked", "tier"),
    [
        (adapter_pb2.TIER_UNSPECIFIED, Tier.DEVICE),
        (adapter_pb2.TIER_DISK, Tier.DISK),
        (adapter_pb2.TIER_HOST, Tier.HOST),
        (adapter_pb2.TIER_DEVICE, Tier.DEVICE),
    ],
)
async def test_a_load_returns_when_the_version_is_there(
    worker: Worker, asked: adapter_pb2.Tier.ValueType, tier: Tier
) -> None:
    request = worker_pb2.LoadAdapterRequest(digest=DIGEST, tier=asked, pin=True)
    response = await worker.stub.LoadAdapter(request)
    assert worker.engine.loads == [(DIGEST, tier, True)]
    assert response.residency.tier == int(tier)
    assert response.residency.pinned


async def test_a_load_from_nowhere_is_not_found(worker: Worker) -> None:
    worker.engine.load_error = not_found(Reason.VERSION_NOT_FOUND, "adapter version", DIGEST)
    error = await failed_load(worker, worker_pb2.LoadAdapterRequest(digest=DIGEST))
    assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)


async def test_a_load_ends_at_the_callers_deadline(worker: Worker) -> None:
    worker.engine.hold_loads = True
    error = await failed_load(worker, worker_pb2.LoadAdapterRequest(digest=DIGEST), timeout=0.1)
    assert error.code is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (worker_pb2.LoadAdapterRequest(digest="ner"), "digest"),
        (worker_pb2.LoadAdapterRequest(digest=DIGEST, tier=adapter_pb2.TIER_STORE), "tier"),
    ],
)
async def test_a_load_with_a_bad_field_is_refused(
    worker: Worker, request_: worker_pb2.LoadAdapterRequest, field: str
) -> None:
    assert (await failed_load(worker, request_)).metadata["field"] == field


async def test_a_pin_is_taken_off_and_the_router_hears_of_both(worker: Worker) -> None:
    def reported() -> list[bool]:
        return [view.pinned for delta in worker.router.deltas() for view in delta.residencies]

    await worker.stub.LoadAdapter(worker_pb2.LoadAdapterRequest(digest=DIGEST, pin=True))
    await until(lambda: reported() == [True])
    for _ in range(2):
        response = await worker.stub.UnpinAdapter(worker_pb2.UnpinAdapterRequest(digest=DIGEST))
        assert (response.residency.tier, response.residency.pinned) == (adapter_pb2.TIER_DEVICE, False)
    await until(lambda: reported() == [True, False])


async def test_unpinning_what_is_not_here_says_where_it_is(worker: Worker) -> None:
    response = await worker.stub.UnpinAdapter(worker_pb2.UnpinAdapterRequest(digest=DIGEST))
    assert response.residency == worker_pb2.Residency(digest=DIGEST, tier=adapter_pb2.TIER_STORE)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.UnpinAdapter(worker_pb2.UnpinAdapterRequest(digest="ner"))
    assert mesh_error_from(caught.value).metadata["field"] == "digest"


async def test_an_eviction_drops_the_version(worker: Worker) -> None:
    await worker.stub.LoadAdapter(worker_pb2.LoadAdapterRequest(digest=DIGEST))
    await worker.stub.EvictAdapter(worker_pb2.EvictAdapterRequest(digest=DIGEST))
    assert worker.engine.evicted == [DIGEST]
    status = await worker.stub.GetStatus(worker_pb2.GetStatusRequest())
    assert not status.residencies


async def test_a_version_in_use_is_not_evicted(worker: Worker) -> None:
    worker.engine.refusal = MeshError(Code.FAILED_PRECONDITION, Reason.ADAPTER_IN_USE, "in use")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.EvictAdapter(worker_pb2.EvictAdapterRequest(digest=DIGEST))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
