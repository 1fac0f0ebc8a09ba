"""Processes that a test kills and starts again: stores, and the servers behind them."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from tests.integration.store_process import Place, StoreProcess


class Fragile(Protocol):
    """A process that can be killed and started again."""

    name: str

    async def kill(self) -> None: ...

    async def start(self) -> None: ...


class Server:
    """A PostgreSQL or an S3 server."""

    def __init__(self, name: str, kill: Callable[[], None], start: Callable[[], None]) -> None:
        self.name = name
        self._kill = kill
        self._start = start

    async def kill(self) -> None:
        await asyncio.to_thread(self._kill)

    async def start(self) -> None:
        # Here, not in a thread: PostgreSQL ends with the thread that started it.
        self._start()


class Replica:
    """A store process and those that come after it over the same place."""

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self._place = place
        self._all: list[StoreProcess] = []

    @property
    def process(self) -> StoreProcess:
        """The newest; a call to one that is killed fails."""
        return self._all[-1]

    async def start(self) -> None:
        self._all.append(await StoreProcess.start(self._place))

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.process.wait, 30)

    async def end(self) -> None:
        """Kills it for good; only now the connections are closed, which would cancel calls that wait."""
        for process in self._all:
            process.kill()
            await process.gone()
