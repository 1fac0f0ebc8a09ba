"""The whole mesh as child processes of this one."""

import asyncio
import contextlib
import random
from pathlib import Path
from types import TracebackType
from typing import Self

from adaptermesh.client import MeshError, RouterClient
from adaptermesh.core.clock import Clock, SystemClock
from adaptermesh.local.config import LocalMeshConfig
from adaptermesh.local.errors import LocalMeshError
from adaptermesh.local.lock import HomeLock
from adaptermesh.local.plan import Endpoints, Planner, endpoints_of, plan_services
from adaptermesh.local.ports import choose_ports
from adaptermesh.local.supervisor import EventSink, Sleep, Supervisor

_POLL_SECONDS = 0.1
_STOP_ORDER = ("gateway", "worker", "router", "store")


class LocalMesh:
    """Store, router, workers and gateway as supervised child processes; an async context manager.

    ```python
    async with LocalMesh(LocalMeshConfig(home, ephemeral_ports=True)) as mesh:
        async with MeshClient(mesh.endpoints.gateway) as client:
            ...
        await mesh.kill("worker-0")          # kill -9; the supervisor restarts it
        await mesh.wait_until_ready()
    ```

    The children end with this process, however it ends.
    """

    def __init__(
        self,
        config: LocalMeshConfig,
        *,
        on_event: EventSink = lambda event: None,  # noqa: ARG005
        planner: Planner = plan_services,
        clock: Clock | None = None,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            config: homes, ports, supervision.
            on_event: is told what happens to each service.
            planner: says which processes are run.
            clock: tells a crash after long service from one at the start.
            sleep: waits between polls and before restarts.
            rng: picks ephemeral ports.
        """
        self.config = config
        self._on_event = on_event
        self._planner = planner
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311  # ports, not secrets
        self._services: dict[str, Supervisor] = {}
        self._endpoints: Endpoints | None = None
        self._resources = contextlib.ExitStack()

    @property
    def endpoints(self) -> Endpoints:
        """Where the services listen; valid once the mesh has started."""
        if self._endpoints is None:
            raise LocalMeshError("the mesh has not been started")
        return self._endpoints

    @property
    def services(self) -> tuple[str, ...]:
        """The names for kill() and restart(), in the order in which they start."""
        return tuple(self._services)

    def pid(self, service: str) -> int:
        """The service's process, or 0 if it does not run."""
        return self._service(service).pid

    def log_file(self, service: str) -> Path:
        """Where the service's output goes."""
        return self._service(service).log_file

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts everything and waits until requests can be served.

        Raises:
            LocalMeshError: a port is in use, another mesh runs on this home, the base model is missing, or a
                service does not come up. Call stop() then.
        """
        await asyncio.to_thread(self._resources.enter_context, HomeLock(self.config.home))
        self._endpoints = endpoints_of(await asyncio.to_thread(choose_ports, self.config, self._rng))
        plans = self._planner(self.config, self._endpoints)
        await asyncio.to_thread(_prepare_logs, self.config.logs, [plan.name for plan in plans])
        self._services = {
            plan.name: Supervisor(plan, self.config, self._clock, self._sleep, self._on_event)
            for plan in plans
        }
        # The others need the store at once; their own starts may overlap.
        stores = [service for service in self._services.values() if service.plan.role == "store"]
        others = [service for service in self._services.values() if service.plan.role != "store"]
        for group in (stores, others):
            for service in group:
                await service.start()
            await self._all_serving(group)
        await self.wait_until_ready()

    async def stop(self) -> None:
        """Stops everything, with a bound: first who takes requests, last who keeps the data."""
        for role in _STOP_ORDER:
            stopping = [service.stop() for service in self._services.values() if service.plan.role == role]
            await asyncio.gather(*stopping)
        await asyncio.to_thread(self._resources.close)

    def kill_all(self) -> None:
        """Kill -9 for every service; stop() then has nothing to wait for."""
        for service in self._services.values():
            service.kill_now()

    async def kill(self, service: str) -> None:
        """Kill -9 of one service; returns when it is dead. Its supervisor restarts it as after any crash."""
        await self._service(service).kill()

    async def restart(self, service: str) -> None:
        """Stops one service gracefully, starts it again on the same port and waits until it serves."""
        supervisor = self._service(service)
        await supervisor.stop()
        await supervisor.start()
        await supervisor.wait_until_serving()

    async def wait_until_serving(self, service: str) -> None:
        """Waits for one service's health check, e.g. after kill(); raises LocalMeshError."""
        await self._service(service).wait_until_serving()

    async def wait_until_ready(self) -> None:
        """Waits until the router follows the store and every worker has reported to it.

        Raises:
            LocalMeshError: that took longer than a start may take.
        """
        problem = "the router does not answer"
        try:
            async with asyncio.timeout(self.config.start_seconds):
                async with RouterClient(self.endpoints.router) as router:
                    while problem := await self._missing(router):
                        await self._sleep(_POLL_SECONDS)
        except TimeoutError:
            raise LocalMeshError(
                f"the mesh is not ready after {self.config.start_seconds:g} s: {problem}",
                f"the logs are in {self.config.logs}",
            ) from None

    async def wait_until_given_up(self) -> None:
        """Waits for as long as the mesh runs; raises LocalMeshError when a service can't be kept running."""
        waits: dict[asyncio.Task[bool], str] = {
            asyncio.create_task(service.given_up.wait()): name for name, service in self._services.items()
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        names = ", ".join(sorted(waits[task] for task in done))
        raise LocalMeshError(
            f"{names} keeps crashing and was given up", f"the logs are in {self.config.logs}"
        )

    async def _missing(self, router: RouterClient) -> str:
        """What still keeps requests from being served, or ""."""
        try:
            status = await router.status()
            workers = await router.list_workers()
        except MeshError as error:
            return error.message
        if not status.feed_connected or status.feed_position < status.feed_head:
            return "the router does not follow the store yet"
        present = {worker.address for worker in workers if worker.state == "ready"}
        absent = [address for address in self.endpoints.workers if address not in present]
        return f"the router does not know the worker at {', '.join(absent)} yet" if absent else ""

    async def _all_serving(self, services: list[Supervisor]) -> None:
        """Waits for several health checks; the first failure ends the wait."""
        try:
            async with asyncio.TaskGroup() as group:
                for service in services:
                    group.create_task(service.wait_until_serving())
        except* LocalMeshError as errors:
            raise _first(errors) from None

    def _service(self, name: str) -> Supervisor:
        if name not in self._services:
            raise LocalMeshError(
                f"there is no service '{name}' here", f"there are {', '.join(self._services)}"
            )
        return self._services[name]


def _first(errors: BaseExceptionGroup[LocalMeshError]) -> LocalMeshError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, LocalMeshError) else LocalMeshError(str(error))


def _prepare_logs(logs: Path, services: list[str]) -> None:
    """The last run's logs are kept beside the new ones."""
    logs.mkdir(parents=True, exist_ok=True)
    for service in services:
        log = logs / f"{service}.log"
        if log.exists():
            log.replace(logs / f"{service}.log.1")
