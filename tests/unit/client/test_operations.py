import pytest

from adaptermesh.client import (
    ROUTER_SERVICE,
    WORKER_SERVICE,
    Budgets,
    Code,
    HealthClient,
    MeshError,
    RouterClient,
    Tier,
    WorkerClient,
)
from tests.unit.client.fake_services import MIB, fake_router, fake_worker, serve

DIGEST = "sha256:" + "c" * 64


async def test_health_tells_serving_from_not_yet_and_from_another_service() -> None:
    async with serve(fake_worker()) as ready, serve(fake_worker(), serving=False) as starting:
        async with HealthClient(ready) as health:
            assert await health.is_serving(WORKER_SERVICE)
            with pytest.raises(MeshError) as caught:
                await health.is_serving(ROUTER_SERVICE)
            assert caught.value.code is Code.NOT_FOUND
        async with HealthClient(starting) as health:
            assert not await health.is_serving(WORKER_SERVICE)


async def test_the_routers_view_shows_workers_load_and_residency() -> None:
    async with serve(fake_router(["127.0.0.1:1", "127.0.0.1:2"])) as address, RouterClient(address) as router:
        status = await router.status()
        workers = await router.list_workers()
    assert (status.feed_position, status.feed_connected, status.versions) == (7, True, 4)
    assert [worker.address for worker in workers] == ["127.0.0.1:1", "127.0.0.1:2"]
    worker = workers[0]
    assert (worker.state, worker.device, worker.base_model_id) == ("ready", "cpu", "tiny")
    assert (worker.load.running_requests, worker.booked_requests) == (2, 1)
    assert worker.residencies[0].tier == "device"
    assert worker.load.budgets == Budgets(
        3 * MIB, 1, 256 * MIB, 1024 * MIB, 5 * MIB, 10 * MIB, MIB, 2 * MIB, 8 * MIB
    )


async def test_adapters_are_loaded_and_evicted_by_hand() -> None:
    fake = fake_worker()
    async with serve(fake) as address, WorkerClient(address) as worker:
        residency = await worker.load(DIGEST, Tier.HOST, pin=True)
        assert (residency.digest, residency.tier, residency.pinned) == (DIGEST, "host", True)
        assert fake.pinned == {DIGEST}
        status = await worker.status()
        assert (status.state, status.load.budgets) == ("draining", None)
        assert [held.tier for held in status.residencies] == ["host"]
        residency = await worker.unpin(DIGEST)
        assert (residency.digest, residency.tier, residency.pinned) == (DIGEST, "host", False)
        assert fake.pinned == set()
        await worker.evict(DIGEST)
        assert (await worker.status()).residencies == ()


async def test_the_store_is_no_tier_of_a_worker() -> None:
    async with WorkerClient("127.0.0.1:1") as worker:
        with pytest.raises(MeshError, match="no tier 'store'"):
            await worker.load(DIGEST, Tier.STORE)


async def test_a_worker_that_is_not_there_is_named() -> None:
    async with WorkerClient("127.0.0.1:1") as worker:
        with pytest.raises(MeshError, match=r"nothing answers at 127\.0\.0\.1:1"):
            await worker.status()
