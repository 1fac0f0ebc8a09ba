"""Real processes, killed with signal 9: nobody waits in silence, nothing acknowledged is lost."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from adaptermesh.client import Ask, Code, Delta, MeshError, Publication, Reason, SamplingParams
from adaptermesh.testing import Rig, eventually

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

PIRATE = Path(__file__).parents[2] / "deploy" / "demo" / "adapters" / "pirate-v1"
LONG = SamplingParams(temperature=0.0, max_tokens=1024, ignore_eos=True)


def others(rig: Rig, killed: str) -> dict[str, int]:
    return {name: rig.mesh.pid(name) for name in rig.mesh.services if name != killed}


async def serves(rig: Rig) -> str:
    """Asks until an answer comes; the version that gave it."""

    async def look() -> str | None:
        try:
            return (await rig.generate("Hi", task="pirate", max_tokens=4)).version
        except MeshError as error:
            assert error.code is Code.UNAVAILABLE, error
            return None

    return await eventually(look, within=90)


async def test_kill_9_of_the_worker_mid_stream_ends_the_stream_at_once_and_a_new_worker_serves(
    fragile_rig: Rig,
) -> None:
    rig = fragile_rig
    before = others(rig, "worker-0")
    stream = rig.client.generate(
        "Tell me a long story.",
        task="pirate",
        sampling=LONG,
        ask=Ask(request_id="doomed-1", min_feed_position=rig.position),
    )
    with pytest.raises(MeshError) as raised:
        async for event in stream:
            if isinstance(event, Delta):
                await rig.mesh.kill("worker-0")
    error = raised.value
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.WORKER_LOST)
    assert error.metadata["request_id"] == "doomed-1"
    assert error.retry_after is not None
    assert await serves(rig) == "demo/pirate:v1"
    assert others(rig, "worker-0") == before, "something else was restarted too"


async def test_requests_that_wait_for_the_killed_worker_get_a_typed_status(fragile_rig: Rig) -> None:
    rig = fragile_rig
    calls = [
        asyncio.create_task(rig.client.complete(f"Story {n}", task="pirate", sampling=LONG, timeout=120))
        for n in range(40)
    ]

    async def busy() -> bool:
        workers = await rig.router.list_workers()
        return bool(workers) and workers[0].load.running_requests > 0

    await eventually(busy)
    await rig.mesh.kill("worker-0")
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, MeshError), outcome
        assert outcome.code is Code.UNAVAILABLE
        assert outcome.metadata["request_id"]
    assert await serves(rig) == "demo/pirate:v1"


async def reached(rig: Rig, namespace: str) -> list[object]:
    """What the store lists, once this client's own connection to it is back.

    It tries again at most 2 s apart, and a mutation, which nobody repeats by himself, fails until then.
    """

    async def listed() -> list[object] | None:
        try:
            return [await rig.store.list_adapters(namespace=namespace)]
        except MeshError as error:
            assert error.code is Code.UNAVAILABLE
            return None

    return await eventually(listed)


async def test_kill_9_of_the_store_in_an_upload_leaves_no_half_version_and_the_repeat_works(
    fragile_rig: Rig, tmp_path: Path
) -> None:
    rig = fragile_rig
    folder = tmp_path / "adapter"
    shutil.copytree(PIRATE, folder)
    (folder / "README.md").write_bytes(os.urandom(32 * 1024).hex().encode() * 24)
    killed: list[asyncio.Task[None]] = []

    def kill_once(progress: object) -> None:
        if not killed:
            killed.append(asyncio.get_running_loop().create_task(rig.mesh.kill("store")))

    with pytest.raises(MeshError) as raised:
        await rig.store.upload(folder, "killed/pirate", Publication(rig.base_model), progress=kill_once)
    assert raised.value.code is Code.UNAVAILABLE
    await asyncio.gather(*killed)
    await rig.mesh.wait_until_serving("store")
    assert await reached(rig, "killed") == [[]]
    again = await rig.store.upload(folder, "killed/pirate", Publication(rig.base_model))
    assert (again.created, again.version.number) == (True, 1)
    answer = await rig.generate("Hi", adapter="killed/pirate:v1", max_tokens=4, position=again.feed_position)
    assert answer.version == "killed/pirate:v1"


@pytest.mark.parametrize("service", ["store", "router", "gateway", "worker-0"])
async def test_after_kill_9_of_any_service_the_rest_recovers_by_itself(
    fragile_rig: Rig, service: str
) -> None:
    rig = fragile_rig
    before = others(rig, service)
    await rig.mesh.kill(service)
    await rig.mesh.wait_until_serving(service)
    assert await serves(rig) == "demo/pirate:v1"
    await reached(rig, "demo")
    move = await rig.store.set_alias("demo/pirate@canary", "v1")
    answer = await rig.generate("Hi", adapter="demo/pirate@canary", max_tokens=2, position=move.feed_position)
    assert answer.version == "demo/pirate:v1"
    assert others(rig, service) == before


async def test_resident_adapters_are_served_while_the_store_is_away(fragile_rig: Rig) -> None:
    rig = fragile_rig
    await serves(rig)
    stream = rig.client.generate("Go on.", task="pirate", sampling=LONG, timeout=120)
    async for event in stream:
        if isinstance(event, Delta):
            break
    await rig.mesh.kill("store")
    answer = await rig.generate("Hi", task="pirate", max_tokens=2)
    assert answer.version == "demo/pirate:v1"
    stream.cancel()
    await rig.mesh.wait_until_serving("store")


async def test_sigterm_lets_a_running_stream_finish(fragile_rig: Rig) -> None:
    rig = fragile_rig
    await serves(rig)
    sampling = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    stream = rig.client.generate("Count.", task="pirate", sampling=sampling, timeout=120)
    restart: asyncio.Task[None] | None = None
    tokens = 0
    async for event in stream:
        if isinstance(event, Delta):
            tokens += len(event.token_ids)
            if restart is None:
                restart = asyncio.create_task(rig.mesh.restart("worker-0"))
    assert tokens == 96
    assert restart is not None
    await restart
    assert await serves(rig) == "demo/pirate:v1"


async def test_cancelling_a_request_frees_what_it_held(fragile_rig: Rig) -> None:
    rig = fragile_rig
    await serves(rig)
    stream = rig.client.generate("Go on.", task="pirate", sampling=LONG, timeout=120)
    async for event in stream:
        if isinstance(event, Delta):
            break
    stream.cancel()

    async def idle() -> bool:
        workers = await rig.router.list_workers()
        return bool(workers) and all(
            worker.load.running_requests == 0
            and worker.load.kv_used_tokens == 0
            and all(residency.requests == 0 for residency in worker.residencies)
            for worker in workers
        )

    await eventually(idle)
