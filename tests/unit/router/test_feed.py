import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.router.catalogue import Catalogue, CatalogueImage, Event, RouteRemoved
from adaptermesh.router.feed import FeedFollower, StoreFeed
from adaptermesh.router.settings import RouterSettings
from tests.unit.router.fakes import BASE, MemoryStore, alias, route, until, version

SETTINGS = RouterSettings(feed_heartbeat_timeout_seconds=60, snapshot_timeout_seconds=60)
V1, V2 = version(number=1), version(number=2)


async def no_delay(seconds: float) -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def following(
    store: StoreFeed,
    catalogue: Catalogue,
    config: RouterSettings = SETTINGS,
    sleep: Callable[[float], Awaitable[None]] = no_delay,
) -> AsyncIterator[FeedFollower]:
    follower = FeedFollower(store, catalogue, config, random.Random(1), sleep)
    task = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()


def shown(catalogue: Catalogue) -> CatalogueImage:
    assert catalogue.image is not None
    return catalogue.image


async def test_a_snapshot_is_taken_and_then_every_change_is_followed() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE, V1, alias(V1))
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        assert catalogue.position == 3
        store.commit(V2, alias(V2, generation=2))
        await until(lambda: catalogue.position == 5)
        assert shown(catalogue).aliases[V1.adapter, "prod"].digest == V2.digest
        assert store.snapshots_taken == 1
        assert store.watches == [("feed", 3)]


async def test_an_empty_store_is_a_catalogue_too() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        assert catalogue.position == 0
        store.commit(BASE)
        await until(lambda: catalogue.position == 1)


async def test_after_a_loss_it_goes_on_from_its_position_without_a_snapshot() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE, V1)
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        store.cut_all()
        await until(lambda: not follower.connected)
        store.commit(V2)
        assert shown(catalogue).by_digest == {V1.digest: V1}, "what is known stays while the store is away"
        store.available = True
        await until(lambda: catalogue.position == 3)
        assert follower.connected
        assert store.snapshots_taken == 1
        assert store.watches == [("feed", 2), ("feed", 2)]


async def test_delays_grow_while_the_store_is_away_and_start_anew_afterwards() -> None:
    store, catalogue, delays = MemoryStore(), Catalogue(), list[float]()

    async def remember(seconds: float) -> None:
        delays.append(seconds)
        await asyncio.sleep(0)

    store.available = False
    async with following(store, catalogue, sleep=remember) as follower:
        await until(lambda: len(delays) >= 8)
        assert 0.05 <= delays[0] <= 0.1
        assert all(1.0 <= delay <= 2.0 for delay in delays[5:])
        store.available = True
        await until(lambda: follower.connected)
        delays.clear()
        store.cut_all()
        await until(lambda: bool(delays))
        assert 0.05 <= delays[0] <= 0.1


async def test_an_expired_position_means_a_new_snapshot() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE)
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        store.cut_all()
        await until(lambda: not follower.connected)
        store.commit(V1, V2)
        store.trimmed = 3
        store.available = True
        await until(lambda: catalogue.position == 3 and follower.connected)
        assert store.snapshots_taken == 2


async def test_another_catalogue_behind_the_address_means_a_new_snapshot() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE, V1, alias(V1))
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        store.cut_all()
        await until(lambda: not follower.connected)
        store.feed_id, store.log = "another", [BASE, V2]
        store.available = True
        await until(lambda: follower.connected)
        assert shown(catalogue).feed_id == "another"
        assert shown(catalogue).by_digest == {V2.digest: V2}
        assert shown(catalogue).aliases == {}


async def test_a_store_that_fell_back_behind_us_means_a_new_snapshot() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE, V1, V2)
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        del store.log[2:]
        store.cut_all()
        await until(lambda: not follower.connected)
        store.available = True
        await until(lambda: follower.connected)
        assert catalogue.position == 2
        assert shown(catalogue).by_digest == {V1.digest: V1}


async def test_a_gap_in_the_feed_means_a_new_snapshot() -> None:
    class Skipping(MemoryStore):
        async def watch(self, feed_id, after):  # type: ignore[no-untyped-def]
            async for message in super().watch(feed_id, after):
                if message.change is None or message.change.position != 2 or self.snapshots_taken > 1:
                    yield message

    store, catalogue = Skipping(), Catalogue()
    store.commit(BASE)
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        store.commit(V1, V2)
        await until(lambda: catalogue.position == 3)
        assert store.snapshots_taken == 2
        assert shown(catalogue).by_digest == {V1.digest: V1, V2.digest: V2}


async def test_a_feed_without_heartbeats_is_taken_to_be_dead() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE)
    config = RouterSettings(feed_heartbeat_timeout_seconds=0.02)
    reopened = asyncio.Event()

    async def reopen(seconds: float) -> None:
        store.silent = False
        reopened.set()
        await asyncio.sleep(0)

    async with following(store, catalogue, config, reopen) as follower:
        await until(lambda: follower.connected)
        store.silent = True
        store.commit(V1)
        async with asyncio.timeout(30):
            await reopened.wait()
        await until(lambda: catalogue.position == 2)


async def test_half_a_snapshot_is_never_shown() -> None:
    store, catalogue = MemoryStore(), Catalogue()
    store.commit(BASE, V1, V2)
    store.cuts = [2]
    attempts = 0

    async def count(seconds: float) -> None:
        nonlocal attempts
        attempts += 1
        assert catalogue.image is None
        await asyncio.sleep(0)

    async with following(store, catalogue, sleep=count) as follower:
        await until(lambda: follower.connected)
        assert attempts == 1
        assert len(shown(catalogue).by_digest) == 2


async def test_an_unexpected_fault_does_not_leave_the_router_deaf() -> None:
    class Odd(MemoryStore):
        async def watch(self, feed_id, after):  # type: ignore[no-untyped-def]
            if not self.watches:
                self.watches.append((feed_id, after))
                raise ValueError("odd")
            async for message in super().watch(feed_id, after):
                yield message

    store, catalogue = Odd(), Catalogue()
    store.commit(BASE)
    async with following(store, catalogue) as follower:
        await until(lambda: follower.connected)
        assert catalogue.position == 1


EVENTS = st.lists(
    st.one_of(
        st.builds(lambda number: version(number=number), st.integers(1, 5)),
        st.builds(
            lambda number, generation: alias(version(number=number), generation=generation),
            st.integers(1, 5),
            st.integers(1, 9),
        ),
        st.builds(
            lambda task, weight: route(task, ("base", weight, "a")),
            st.sampled_from(["a", "b"]),
            st.integers(1, 9),
        ),
        st.builds(lambda task: RouteRemoved("default", task), st.sampled_from(["a", "b"])),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, EVENTS, st.lists(st.integers(0, 6), max_size=12), st.integers(0, 30))
def test_wherever_streams_break_the_catalogue_ends_as_the_replay_of_all_changes(
    before: list[Event], after: list[Event], cuts: list[int], trimmed: int
) -> None:
    async def scenario() -> None:
        store, catalogue = MemoryStore(), Catalogue()
        store.commit(*before)
        store.cuts = list(cuts)
        async with following(store, catalogue) as follower:
            for event in after:
                store.commit(event)
                store.trimmed = min(trimmed, store.head)
                await asyncio.sleep(0)
            await until(lambda: follower.connected and catalogue.position == store.head)
        replay = CatalogueImage("feed", len(before) + len(after))
        for event in (*before, *after):
            replay.add(event)
        assert catalogue.image == replay

    asyncio.run(scenario())
