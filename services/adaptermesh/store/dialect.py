"""What differs between the databases that the catalogue can be in."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Trouble(enum.Enum):
    """A failure that passes."""

    BUSY = "busy"
    """Somebody else has what was asked for; the wait was too long."""
    LOST = "lost"
    """The database went away, or isn't there (yet)."""
    RERUN = "rerun"
    """The transaction was undone by the database, and may succeed if it is run again at once."""


@dataclass(frozen=True, slots=True)
class Access:
    """How an engine is made, and what tells its read and its write transactions apart."""

    connect_args: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)
    """What else SQLAlchemy makes the engine with."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """SQLAlchemy's execution options of a read transaction."""
    writing: Mapping[str, Any] = field(default_factory=dict)


class Dialect(Protocol):
    """One kind of database."""

    @property
    def access(self) -> Access:
        """How it is reached."""
        ...

    async def make_room(self) -> None:
        """Runs before the first connection."""
        ...

    def prepare(self, engine: AsyncEngine) -> None:
        """Registers what must happen to each connection."""
        ...

    async def close(self) -> None:
        """Runs after the last connection; returns when nothing of them runs any more."""
        ...

    async def lock_schema(self, connection: AsyncConnection) -> None:
        """Keeps other processes from migrating until the transaction ends."""
        ...

    async def take_turn(self, connection: AsyncConnection) -> None:
        """The first statement of a write transaction: no other writer is between it and the commit."""
        ...

    async def announce(self, connection: AsyncConnection) -> None:
        """The last statement of a write transaction: its commit wakes the other processes."""
        ...

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Calls `on_change` after each commit of another process, and whenever one may have been missed.

        Runs until it is cancelled; returns at once where the database does not tell.
        """
        ...

    async def fetch(self, driver: Any, sql: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Runs one SELECT on a connection of the driver, outside of any transaction.

        Raises:
            sqlalchemy.exc.DBAPIError: what the driver said.
        """
        ...

    def trouble(self, error: Exception) -> Trouble | None:
        """What passing failure an error of the driver stands for; None if it is not one."""
        ...
