"""Connections to workers: one per address, kept while in use, a bounded number of them when not."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio


@dataclass(slots=True, eq=False)
class Connection:
    """A channel and how many calls are on it."""

    address: str
    channel: grpc.aio.Channel
    users: int = 0
    kept: bool = True
    """False once new calls get another one; it is closed by its last user."""


class WorkerChannels:
    """A cache of channels by address, least recently used first.

    A channel that failed is dropped: a worker that comes back at the same address is called over a fresh one
    at once and does not wait for the old one's reconnection delay.
    """

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel], limit: int) -> None:
        self._open = open_channel
        self._limit = limit
        self._kept: OrderedDict[str, Connection] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    async def acquire(self, address: str) -> Connection:
        """A connection to the address, to be given back with `release`."""
        found = self._kept.get(address)
        if found is None:
            found = Connection(address, self._open(address))
            self._kept[address] = found
        self._kept.move_to_end(address)
        found.users += 1
        await self._shrink()
        return found

    async def release(self, connection: Connection, *, failed: bool = False) -> None:
        """Ends one use; `failed` makes it the last one of this channel."""
        connection.users -= 1
        if failed and connection.kept:
            connection.kept = False
            del self._kept[connection.address]
        if not connection.kept and not connection.users:
            await connection.channel.close()
        await self._shrink()

    async def close(self) -> None:
        """Closes all of them, with the calls on them."""
        while self._kept:
            _, connection = self._kept.popitem()
            connection.kept = False
            await connection.channel.close()

    async def _shrink(self) -> None:
        spare = len(self._kept) - self._limit
        idle = [connection for connection in self._kept.values() if not connection.users]
        for connection in idle[: max(0, spare)]:
            connection.kept = False
            del self._kept[connection.address]
        for connection in idle[: max(0, spare)]:
            await connection.channel.close()
