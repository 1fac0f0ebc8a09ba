import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.router.catalogue import Catalogue, Change
from adaptermesh.router.catch_up import CatchUp
from adaptermesh.router.settings import RouterSettings
from tests.unit.router.fakes import BASE, MemoryStore, alias, catalogue, image, until, version

SETTINGS = RouterSettings(catch_up_seconds=30)
V1, V2 = version(number=1), version(number=2)


@asynccontextmanager
async def catching_up(
    store: MemoryStore, known: Catalogue, config: RouterSettings = SETTINGS
) -> AsyncIterator[CatchUp]:
    catch_up = CatchUp(store, known, config)
    task = asyncio.create_task(catch_up.run())
    try:
        yield catch_up
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_brings_what_the_feed_has_not_brought() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE, V1, V2)
    async with catching_up(store, known) as catch_up:
        await catch_up.wait(30)
    assert known.position == 3
    assert known.image is not None
    assert V2.digest in known.image.by_digest


async def test_it_is_quick_when_nothing_is_missing() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    async with catching_up(store, known) as catch_up:
        await catch_up.wait(30)
    assert known.position == 1
    assert store.watches == [("feed", 1)]


async def test_changes_that_the_feed_brings_meanwhile_are_not_applied_twice() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    store.silent = True
    async with catching_up(store, known) as catch_up:
        waiting = asyncio.create_task(catch_up.wait(30))
        await until(lambda: len(store.watches) == 1)
        known.apply(Change(2, alias(V1)))
        known.apply(Change(3, alias(V2)))
        store.silent = False
        store.commit(alias(V1), alias(V2))
        await waiting
    assert known.image == image(BASE, alias(V1), alias(V2))


async def test_all_who_ask_during_one_read_share_the_next() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    store.silent = True
    async with catching_up(store, known) as catch_up:
        first = asyncio.create_task(catch_up.wait(30))
        await until(lambda: len(store.watches) == 1)
        others = [asyncio.create_task(catch_up.wait(30)) for _ in range(20)]
        await asyncio.sleep(0)
        store.silent = False
        store.commit(V1)
        await asyncio.gather(first, *others)
    assert len(store.watches) == 2
    assert known.position == 2


async def refusal(catch_up: CatchUp) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await catch_up.wait(30)
    return caught.value


async def test_a_store_that_is_away_is_said_so_and_the_next_asker_tries_again() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE, V1)
    store.available = False
    async with catching_up(store, known) as catch_up:
        assert (await refusal(catch_up)).reason is Reason.STORE_UNREACHABLE
        store.available = True
        await catch_up.wait(30)
    assert known.position == 2


async def test_a_store_that_does_not_answer_is_not_waited_for_without_bound() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    store.silent = True
    async with catching_up(store, known, RouterSettings(catch_up_seconds=0.02)) as catch_up:
        assert (await refusal(catch_up)).reason is Reason.STORE_UNREACHABLE


async def test_an_asker_with_little_time_does_not_wait_longer() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    store.silent = True
    async with catching_up(store, known) as catch_up:
        with pytest.raises(TimeoutError):
            await catch_up.wait(0)


async def test_a_catalogue_that_is_not_of_the_stores_feed_is_stale() -> None:
    store, known = MemoryStore("another"), catalogue(BASE)
    async with catching_up(store, known) as catch_up:
        assert (await refusal(catch_up)).code is Code.OUT_OF_RANGE
        known = catch_up._catalogue
        known.replace(image(BASE, feed_id="another", position=0))
        await catch_up.wait(30)


async def test_before_the_first_snapshot_there_is_nothing_to_catch_up_from() -> None:
    async with catching_up(MemoryStore(), Catalogue()) as catch_up:
        assert (await refusal(catch_up)).reason is Reason.CATALOGUE_STALE


async def test_changes_of_a_catalogue_that_was_replaced_meanwhile_are_not_mixed_in() -> None:
    store, known = MemoryStore(), catalogue(BASE)
    store.commit(BASE)
    store.silent = True
    async with catching_up(store, known) as catch_up:
        waiting = asyncio.create_task(refusal(catch_up))
        await until(lambda: len(store.watches) == 1)
        known.replace(image(V2, feed_id="another", position=1))
        store.silent = False
        store.commit(V1)
        assert (await waiting).reason is Reason.CATALOGUE_STALE
    assert known.image == image(V2, feed_id="another", position=1)


async def test_an_unexpected_fault_is_told_and_survived() -> None:
    class Odd(MemoryStore):
        odd = True

        async def watch(self, feed_id, after):  # type: ignore[no-untyped-def]
            if self.odd:
                raise ValueError("odd")
            async for message in super().watch(feed_id, after):
                yield message

    store, known = Odd(), catalogue()
    async with catching_up(store, known) as catch_up:
        assert (await refusal(catch_up)).reason is Reason.INTERNAL
        store.odd = False
        await catch_up.wait(30)
