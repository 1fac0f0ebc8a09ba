import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from adaptermesh.client import ROUTER_SERVICE, HealthClient
from adaptermesh.local import EventKind, LocalMesh, LocalMeshConfig, LocalMeshError, MeshEvent
from tests.unit.local.conftest import MakePlanner
from tests.unit.local.test_process import is_running


class Watch:
    """Events as they come, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[MeshEvent] = []
        self._news = asyncio.Event()

    def __call__(self, event: MeshEvent) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, condition: Callable[[list[MeshEvent]], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition(self.events):
                self._news.clear()
                await self._news.wait()

    def kinds(self, service: str) -> list[EventKind]:
        return [event.kind for event in self.events if event.service == service]


async def test_a_mesh_starts_store_first_serves_and_stops_in_the_other_order(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    watch = Watch()
    planner = plan_fakes("store", "router", "worker-0", "gateway")
    async with LocalMesh(config, planner=planner, on_event=watch) as mesh:
        pids = [mesh.pid(service) for service in mesh.services]
        assert all(is_running(pid) for pid in pids)
        async with HealthClient(mesh.endpoints.router) as health:
            assert await health.is_serving(ROUTER_SERVICE)
        assert "fake gateway" in mesh.log_file("gateway").read_text()
    assert not any(is_running(pid) for pid in pids)
    order = [(event.service, event.kind) for event in watch.events]
    assert order[:3] == [
        ("store", EventKind.STARTING),
        ("store", EventKind.SERVING),
        ("router", EventKind.STARTING),
    ]
    stopped = [service for service, kind in order if kind is EventKind.STOPPED]
    assert stopped == ["gateway", "worker-0", "router", "store"]


async def test_a_killed_service_is_restarted_on_its_port(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    watch = Watch()
    async with LocalMesh(
        dataclasses.replace(config, workers=0), planner=plan_fakes("store", "router"), on_event=watch
    ) as mesh:
        before = mesh.pid("store")
        await mesh.kill("store")
        assert not is_running(before)
        await mesh.wait_until_serving("store")
        assert mesh.pid("store") not in {0, before}
        await watch.until(lambda events: watch.kinds("store").count(EventKind.SERVING) == 2)
    assert watch.kinds("store")[:5] == [
        EventKind.STARTING,
        EventKind.SERVING,
        EventKind.CRASHED,
        EventKind.STARTING,
        EventKind.SERVING,
    ]
    crash = next(event for event in watch.events if event.kind is EventKind.CRASHED)
    assert "SIGKILL" in crash.message


async def test_a_restart_by_hand_is_no_crash(config: LocalMeshConfig, plan_fakes: MakePlanner) -> None:
    watch = Watch()
    async with LocalMesh(
        dataclasses.replace(config, workers=0), planner=plan_fakes("router"), on_event=watch
    ) as mesh:
        before = mesh.pid("router")
        await mesh.restart("router")
        assert mesh.pid("router") not in {0, before}
        await mesh.wait_until_ready()
    assert EventKind.CRASHED not in watch.kinds("router")


async def test_a_service_that_keeps_crashing_is_given_up(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    watch = Watch()
    once = dataclasses.replace(config, workers=0, restart_delays=(0.0,))
    async with LocalMesh(once, planner=plan_fakes("router"), on_event=watch) as mesh:
        for _ in range(2):
            await mesh.wait_until_serving("router")
            await mesh.kill("router")
        with pytest.raises(LocalMeshError, match="router keeps crashing and was given up"):
            await mesh.wait_until_given_up()
    assert watch.kinds("router")[-1] is EventKind.GIVEN_UP


async def test_without_restart_delays_a_killed_service_stays_down_until_it_is_restarted(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    never = dataclasses.replace(config, workers=0, restart_delays=())
    async with LocalMesh(never, planner=plan_fakes("router")) as mesh:
        await mesh.kill("router")
        assert mesh.pid("router") == 0
        await mesh.restart("router")
        assert mesh.pid("router")


async def test_a_service_that_can_not_start_ends_the_start_with_its_last_words(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    watch = Watch()
    planner = plan_fakes("store", "router", behaviour={"router": "broken"})
    mesh = LocalMesh(dataclasses.replace(config, workers=0), planner=planner, on_event=watch)
    with pytest.raises(LocalMeshError, match="the router ended with exit code 3") as caught:
        await mesh.__aenter__()
    assert "the disk is full" in caught.value.hint
    assert mesh.pid("store") == 0
    assert watch.kinds("router").count(EventKind.STARTING) == 1


async def test_a_service_that_never_serves_ends_the_start_in_time(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    brief = dataclasses.replace(config, workers=0, start_seconds=3.0)
    mesh = LocalMesh(brief, planner=plan_fakes("router", behaviour={"router": "mute"}))
    with pytest.raises(LocalMeshError, match="the router did not serve within 3 s"):
        await mesh.__aenter__()


async def test_a_service_that_will_not_end_is_killed(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    watch = Watch()
    hasty = dataclasses.replace(config, workers=0, drain_seconds=0.2, kill_seconds=0.2)
    planner = plan_fakes("router", behaviour={"router": "stubborn"})
    async with LocalMesh(hasty, planner=planner, on_event=watch) as mesh:
        pid = mesh.pid("router")
    assert not is_running(pid)
    assert watch.events[-1].message == "it had to be killed"


async def test_two_meshes_can_not_share_a_home(config: LocalMeshConfig, plan_fakes: MakePlanner) -> None:
    alone = dataclasses.replace(config, workers=0)
    async with LocalMesh(alone, planner=plan_fakes("router")):
        with pytest.raises(LocalMeshError, match="a mesh already runs on"):
            await LocalMesh(alone, planner=plan_fakes("router")).__aenter__()


async def test_an_unknown_service_is_named_with_those_there_are(
    config: LocalMeshConfig, plan_fakes: MakePlanner
) -> None:
    async with LocalMesh(dataclasses.replace(config, workers=0), planner=plan_fakes("router")) as mesh:
        with pytest.raises(LocalMeshError, match="no service 'worker'") as caught:
            await mesh.kill("worker")
        assert caught.value.hint == "there are router"


def test_a_mesh_that_was_not_started_has_no_endpoints(config: LocalMeshConfig) -> None:
    with pytest.raises(LocalMeshError, match="has not been started"):
        _ = LocalMesh(config).endpoints
