"""Makes sure that the catalogue shows all that the store has, now.

A name that is not in the catalogue may have been published a moment ago, by a change that the feed has not
brought yet. So before a name is said to be unknown, the store is read once from the catalogue's own
position, past the feed that is followed (which may be between two attempts). All who ask while a read is
under way share the next one: the store sees at most one at a time, however many ask.
"""

import asyncio
from contextlib import aclosing

from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.router.catalogue import Catalogue, FeedBrokenError
from adaptermesh.router.feed import StoreFeed
from adaptermesh.router.settings import RouterSettings


class CatchUp:
    """`run` has one owner; `wait` is for everybody."""

    def __init__(self, feed: StoreFeed, catalogue: Catalogue, settings: RouterSettings) -> None:
        self._feed = feed
        self._catalogue = catalogue
        self._timeout = settings.catch_up_seconds
        self._askers: list[asyncio.Future[None]] = []
        self._asked = asyncio.Event()

    async def wait(self, timeout: float) -> None:
        """Returns when the catalogue shows all that the store had when this was called.

        Raises:
            MeshError: the store can't be read.
            TimeoutError: it did not answer within `timeout` seconds.
        """
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._askers.append(answer)
        self._asked.set()
        async with asyncio.timeout(timeout):
            await answer

    async def run(self) -> None:
        """Reads whenever somebody asks."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            askers, self._askers = self._askers, []
            error = await self._attempt()
            for asker in askers:
                if asker.done():
                    continue
                if error is None:
                    asker.set_result(None)
                else:
                    asker.set_exception(error)

    async def _attempt(self) -> MeshError | None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._read_to_head()
        except MeshError as error:
            return error
        except TimeoutError:
            return unavailable(Reason.STORE_UNREACHABLE, "the store does not answer", 1.0)
        except FeedBrokenError as error:
            return unavailable(Reason.CATALOGUE_STALE, str(error), 1.0)
        except Exception as error:  # noqa: BLE001  # the top of the task: whoever asked is told, the task lives on
            return MeshError(Code.INTERNAL, Reason.INTERNAL, f"the store's changes can't be read: {error!r}")
        return None

    async def _read_to_head(self) -> None:
        image = self._catalogue.image
        if image is None:
            raise FeedBrokenError("there is no catalogue yet")
        target: int | None = None
        async with aclosing(self._feed.watch(image.feed_id, image.position)) as messages:
            async for message in messages:
                if self._catalogue.image is not image:
                    # The positions of what was replaced mean nothing in its successor.
                    raise FeedBrokenError("the catalogue was replaced by a new snapshot")
                target = message.head if target is None else target
                if message.change is not None:
                    # The feed may have brought it in the meantime; then this changes nothing.
                    self._catalogue.apply(message.change)
                if image.position >= target:
                    return
        raise FeedBrokenError("the store ended its changes")
