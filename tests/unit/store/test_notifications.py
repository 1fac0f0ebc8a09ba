import asyncio
from collections.abc import Callable

from adaptermesh.store.notifications import _until_lost


class Connection:
    """As much of a connection as is listened to."""

    def __init__(self) -> None:
        self.tell: list[Callable[[object], None]] = []

    def add_termination_listener(self, listener: Callable[[object], None]) -> None:
        self.tell.append(listener)

    def is_closed(self) -> bool:
        return False


async def test_a_listener_that_is_cancelled_while_its_connection_is_lost_ends() -> None:
    for pauses in range(6):
        connection = Connection()
        waiting = asyncio.create_task(_until_lost(connection))
        for _ in range(3):
            await asyncio.sleep(0)
        for tell in connection.tell:
            tell(connection)
        for _ in range(pauses):
            await asyncio.sleep(0)
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait([waiting], timeout=5)
            assert waiting.cancelled()
