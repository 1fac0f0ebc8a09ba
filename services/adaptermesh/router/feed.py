"""Follows the store: one snapshot, then its changes; resumes where it was after any loss.

The catalogue is left as it is while the store is away, so that requests are answered from what is known.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from adaptermesh.core.backoff import Backoff
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.router.catalogue import Catalogue, CatalogueImage, Change, Entry, FeedBrokenError
from adaptermesh.router.settings import RouterSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """One part of a snapshot; feed and position are the same in every part."""

    feed_id: str
    position: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """A change, or a heartbeat without one, and how far the store is."""

    head: int
    change: Change | None = None


class StoreFeed(Protocol):
    """The store as the router reads it. A failed call raises MeshError."""

    def snapshot(self) -> AsyncGenerator[SnapshotPart, None]:
        """The whole catalogue as of one position."""
        ...

    def watch(self, feed_id: str, after: int) -> AsyncGenerator[FeedMessage, None]:
        """Every change after a position, then live. OUT_OF_RANGE: take a snapshot."""
        ...


class FeedLostError(Exception):
    """The feed ended without an error; open it again."""


class FeedFollower:
    """Keeps a catalogue at the store's head. `run` has one owner and lasts until it is cancelled."""

    def __init__(
        self,
        feed: StoreFeed,
        catalogue: Catalogue,
        settings: RouterSettings,
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._feed = feed
        self._catalogue = catalogue
        self._settings = settings
        self._sleep = sleep
        self._backoff = Backoff(settings.feed_backoff_initial_seconds, settings.feed_backoff_max_seconds, rng)
        self._snapshot_wanted = True
        self._loss_told = False
        self.connected = False
        """True from a feed's first message until it is lost."""

    async def run(self) -> None:
        """Follows for ever."""
        while True:
            try:
                await self._follow()
            except asyncio.CancelledError:
                raise
            except (MeshError, FeedLostError, TimeoutError) as error:
                self._snapshot_wanted |= isinstance(error, MeshError) and error.code is Code.OUT_OF_RANGE
                self._note_loss(error)
            except FeedBrokenError as error:
                self._snapshot_wanted = True
                self._note_loss(error)
            except Exception:
                # The top of the task: one odd message must not leave the router deaf for good.
                self._snapshot_wanted = True
                log.exception("change feed failed unexpectedly")
            finally:
                self.connected = False
            await self._sleep(self._backoff.next_delay())

    async def _follow(self) -> None:
        """Takes a snapshot if one is wanted, then changes until the feed is lost."""
        image = self._catalogue.image
        if image is None or self._snapshot_wanted:
            image = await self._take_snapshot()
        async with aclosing(self._feed.watch(image.feed_id, image.position)) as messages:
            while True:
                # The stream has no deadline, each message has: heartbeats come even when nothing changes.
                async with asyncio.timeout(self._settings.feed_heartbeat_timeout_seconds):
                    message = await anext(messages, None)
                if message is None:
                    raise FeedLostError("the store ended the feed")
                self._take(message)

    async def _take_snapshot(self) -> CatalogueImage:
        """Builds an image beside the one in use and puts it in its place when it is whole."""
        image: CatalogueImage | None = None
        async with (
            asyncio.timeout(self._settings.snapshot_timeout_seconds),
            aclosing(self._feed.snapshot()) as parts,
        ):
            async for part in parts:
                if image is None:
                    image = CatalogueImage(part.feed_id, part.position)
                elif (part.feed_id, part.position) != (image.feed_id, image.position):
                    raise FeedBrokenError("the parts of the snapshot are of different positions")
                for entry in part.entries:
                    image.add(entry)
        if image is None:
            raise FeedBrokenError("the snapshot has no parts")
        self._catalogue.replace(image)
        self._snapshot_wanted = False
        log.info(
            "catalogue snapshot taken",
            extra={
                "feed_id": image.feed_id,
                "feed_position": image.position,
                "versions": len(image.by_digest),
                "routes": len(image.routes),
            },
        )
        return image

    def _take(self, message: FeedMessage) -> None:
        if not self.connected:
            self.connected = True
            self._loss_told = False
            self._backoff.reset()
            log.info("change feed connected", extra={"feed_position": self._catalogue.position})
        if message.change is not None:
            self._catalogue.apply(message.change)
        self._catalogue.heard_head(message.head)

    def _note_loss(self, error: Exception) -> None:
        """One warning an outage; its further attempts are of interest to nobody but a developer."""
        log.log(
            logging.DEBUG if self._loss_told else logging.WARNING,
            "change feed lost",
            extra={
                "reason": str(error) or type(error).__name__,
                "feed_position": self._catalogue.position,
                "snapshot_wanted": self._snapshot_wanted,
            },
        )
        self._loss_told = True
