"""One supervised service: started, watched, restarted with a growing delay, given up after the last one."""

import asyncio
import enum
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adaptermesh.client import Code, HealthClient, MeshError
from adaptermesh.core.clock import Clock
from adaptermesh.local.config import LocalMeshConfig
from adaptermesh.local.errors import LocalMeshError
from adaptermesh.local.plan import ServicePlan
from adaptermesh.local.process import ChildProcess, exit_text, log_tail

_POLL_SECONDS = 0.1
_HEALTH_SECONDS = 2.0


class EventKind(enum.StrEnum):
    """What happened to a service."""

    STARTING = "starting"
    SERVING = "serving"
    CRASHED = "crashed"
    GIVEN_UP = "given up"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class MeshEvent:
    """One event, for whoever watches the mesh."""

    kind: EventKind
    service: str
    address: str
    pid: int
    message: str = ""


EventSink = Callable[[MeshEvent], None]
Sleep = Callable[[float], Awaitable[None]]


class Supervisor:
    """Keeps one service running."""

    def __init__(
        self, plan: ServicePlan, config: LocalMeshConfig, clock: Clock, sleep: Sleep, on_event: EventSink
    ) -> None:
        self.plan = plan
        self.log_file = config.logs / f"{plan.name}.log"
        self.given_up = asyncio.Event()
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._on_event = on_event
        self._process: ChildProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._has_served = False
        self._stopping = False
        self._announced_pid = 0
        self._announcement: asyncio.Task[None] | None = None
        self._delay: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int:
        """The running process, or 0."""
        process = self._process
        return process.pid if process is not None and process.exit_code is None else 0

    async def start(self) -> None:
        """Starts the process and whatever follows when it ends."""
        self._stopping = False
        self._has_served = False
        self.given_up.clear()
        await self._spawn()
        self._task = asyncio.create_task(self._watch(), name=f"supervise {self.plan.name}")

    async def stop(self) -> None:
        """Stops the process for good, with a bound; nothing happens if it does not run."""
        self._stopping = True
        await self._drop(self._delay)
        await self._stop_process()
        if self._task is not None:
            await self._task
        # It may have been about to restart the service.
        await self._stop_process()
        await self._drop(self._announcement)

    async def _stop_process(self) -> None:
        if self._process is not None and self.pid:
            self._emit(EventKind.STOPPING)
            # What has not served yet has nothing to drain.
            drain_seconds = self._config.drain_seconds if self._has_served else 0.0
            in_time = await self._process.stop(drain_seconds + self._config.kill_seconds)
            self._emit(EventKind.STOPPED, "" if in_time else "it had to be killed")

    async def kill(self) -> None:
        """Kill -9; the restart that follows is that of a crash."""
        process = self._process
        if process is not None:
            process.signal(signal.SIGKILL)
            await process.wait()

    def kill_now(self) -> None:
        """Kill -9 for good, without waiting."""
        self._stopping = True
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    async def wait_until_serving(self) -> None:
        """Waits for the health check.

        Raises:
            LocalMeshError: the process ended before it ever served, was given up, or took too long.
        """
        try:
            async with asyncio.timeout(self._config.start_seconds):
                async with HealthClient(self.plan.address) as health:
                    while not await self._serves(health):
                        await self._check_alive()
                        await self._sleep(_POLL_SECONDS)
        except TimeoutError:
            raise await self._failure(
                f"the {self.plan.name} did not serve within {self._config.start_seconds:g} s"
            ) from None
        self._has_served = True
        if self._announced_pid != self.pid:
            self._announced_pid = self.pid
            self._emit(EventKind.SERVING)

    async def _serves(self, health: HealthClient) -> bool:
        try:
            return bool(self.pid) and await health.is_serving(self.plan.health_service, _HEALTH_SECONDS)
        except MeshError as error:
            if error.code is Code.NOT_FOUND and self.pid:
                raise await self._failure(f"another service answers at {self.plan.address}") from error
            return False

    async def _check_alive(self) -> None:
        process = self._process
        if self.given_up.is_set() and process is not None and process.exit_code is not None:
            raise await self._failure(f"the {self.plan.name} ended with {exit_text(process.exit_code)}")

    async def _watch(self) -> None:
        """Restarts the process whenever it ends, until there is no delay left."""
        crashes = 0
        while self._process is not None:
            started = self._clock.monotonic()
            code = await self._process.wait()
            await self._drop(self._announcement)
            if self._stopping:
                return
            if self._clock.monotonic() - started >= self._config.stable_seconds:
                crashes = 0
            delays = self._config.restart_delays
            # What never served has a cause that a restart won't mend.
            if not self._has_served or crashes >= len(delays):
                self._emit(EventKind.GIVEN_UP, f"{exit_text(code)}; its log is {self.log_file}")
                self.given_up.set()
                return
            self._emit(EventKind.CRASHED, f"{exit_text(code)}; restart in {delays[crashes]:g} s")
            self._delay = asyncio.ensure_future(self._sleep(delays[crashes]))
            await asyncio.wait((self._delay,))
            if self._stopping:
                return
            crashes += 1
            await self._spawn()
            # Its events say that it serves again, whether or not anybody waits for it.
            self._announcement = asyncio.create_task(self.wait_until_serving())

    async def _drop(self, task: "asyncio.Future[None] | None") -> None:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _spawn(self) -> None:
        self._process = await ChildProcess.start(self.plan.arguments, self.plan.environment, self.log_file)
        self._emit(EventKind.STARTING)

    async def _failure(self, message: str) -> LocalMeshError:
        tail = await asyncio.to_thread(log_tail, self.log_file)
        return LocalMeshError(message, f"its log, {self.log_file}, ends with:\n{tail}" if tail else "")

    def _emit(self, kind: EventKind, message: str = "") -> None:
        pid = self._process.pid if self._process is not None else 0
        self._on_event(MeshEvent(kind, self.plan.name, self.plan.address, pid, message))
