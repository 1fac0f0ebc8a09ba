import asyncio
from dataclasses import replace
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason
from adaptermesh.store import feed_servicer
from adaptermesh.store.feed import FeedPage
from adaptermesh.store.records import BaseModelRecord


def base_route(task: str) -> store_pb2.SetRouteRequest:
    target = adapter_pb2.RouteTarget(ref="base", weight=1)
    return store_pb2.SetRouteRequest(route=adapter_pb2.Route(tenant="*", task=task, targets=[target]))


class Watcher:
    """Follows the feed and may be cut off at any time."""

    def __init__(self, store: Any, feed_id: str, position: int = 0) -> None:
        self._store = store
        self._feed_id = feed_id
        self.position = position
        self.changes: list[store_pb2.Change] = []

    async def follow(self, until: int, at_most: int = 10**6) -> None:
        """Reads up to a position, or so many changes; then hangs up."""
        request = store_pb2.WatchChangesRequest(feed_id=self._feed_id, after_position=self.position)
        call = self._store.stub.WatchChanges(request)
        async with asyncio.timeout(30):
            while self.position < until and at_most:
                message = await call.read()
                assert message.head_position >= self.position
                if message.HasField("change"):
                    self.changes.append(message.change)
                    self.position = message.change.position
                    at_most -= 1
        call.cancel()

    @property
    def positions(self) -> list[int]:
        return [change.position for change in self.changes]


async def feed_of(store: Any) -> str:
    feed_id: str = (await store.snapshot()).feed_id
    return feed_id


async def test_every_kind_of_mutation_is_one_change_with_its_record(store: Any, publish: Any) -> None:
    (version,) = await publish()
    alias = await store.stub.SetAlias(
        store_pb2.SetAliasRequest(namespace="acme", name="ner", alias="prod", version_number=1)
    )
    route = await store.stub.SetRoute(base_route("ner"))
    await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="*", task="ner"))
    watcher = Watcher(store, await feed_of(store))
    await watcher.follow(5)
    kinds = [change.WhichOneof("event") for change in watcher.changes]
    assert kinds == [
        "base_model_registered",
        "version_published",
        "alias_set",
        "route_set",
        "route_deleted",
    ]
    assert watcher.positions == [1, 2, 3, 4, 5]
    assert watcher.changes[0].base_model_registered.model_id == "tiny-llama"
    assert watcher.changes[1].version_published == version
    assert watcher.changes[2].alias_set == alias.alias
    assert watcher.changes[3].route_set == route.route
    assert (watcher.changes[4].route_deleted.tenant, watcher.changes[4].route_deleted.task) == ("*", "ner")
    assert all(change.commit_time.ToMicroseconds() > 0 for change in watcher.changes)


async def test_a_batched_watch_has_the_same_changes_in_fewer_messages(store: Any) -> None:
    for number in range(10):
        await store.stub.SetRoute(base_route(f"task-{number % 3}"))
    watcher = Watcher(store, await feed_of(store))
    await watcher.follow(11)
    request = store_pb2.WatchChangesRequest(feed_id=await feed_of(store), batched=True)
    call = store.stub.WatchChanges(request)
    messages = [await call.read() for _ in range(4)]
    assert [len(message.changes) for message in messages] == [4, 4, 3, 0]
    assert not any(message.HasField("change") for message in messages)
    assert [change for message in messages for change in message.changes] == watcher.changes
    assert [message.head_position for message in messages] == [11] * 4
    done = await store.stub.SetRoute(base_route("ner"))
    message = await call.read()
    while not message.changes:
        message = await call.read()
    assert [change.route_set for change in message.changes] == [done.route]
    call.cancel()


async def test_a_batch_of_large_changes_is_cut_into_messages_that_fit(store: Any, kit: Any) -> None:
    stub = store.stub
    for number in range(4):
        base = kit.base_model(f"large-{number}", f"w{number}")
        await stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    page = FeedPage(5, tuple([one async for one in changes_of(store, 5)]))
    record = page.changes[1].record
    assert isinstance(record, BaseModelRecord)
    fat = replace(record, config_json="x" * 300_000)
    page = replace(page, changes=tuple(replace(one, record=fat) for one in page.changes[1:]))
    answers = list(feed_servicer._batches(page))
    assert [len(answer.changes) for answer in answers] == [2, 2]
    assert [change.position for answer in answers for change in answer.changes] == [2, 3, 4, 5]


async def changes_of(store: Any, count: int) -> Any:
    watch = store.stores.feed.watch(store.stores.database, await feed_of(store), 0)
    for _ in range(count):
        yield (await anext(watch)).change
    await watch.aclose()


async def test_a_live_watcher_hears_of_a_change_after_its_commit(store: Any) -> None:
    watcher = Watcher(store, await feed_of(store), position=1)
    following = asyncio.ensure_future(watcher.follow(2))
    done = await store.stub.SetRoute(base_route("ner"))
    await following
    assert watcher.changes[0].route_set == done.route
    assert watcher.positions == [done.feed_position]


async def test_changes_come_exactly_once_in_order_over_reconnects_and_concurrent_writers(
    store: Any,
) -> None:
    feed_id = await feed_of(store)
    watchers = [Watcher(store, feed_id) for _ in range(3)]

    async def write(writer: int) -> None:
        for number in range(8):
            await store.stub.SetRoute(base_route(f"task-{writer}-{number % 3}"))

    async def watch(watcher: Watcher, burst: int) -> None:
        while watcher.position < 33:
            await watcher.follow(33, at_most=burst)

    async with asyncio.TaskGroup() as group:
        for burst, watcher in enumerate(watchers, start=2):
            group.create_task(watch(watcher, burst))
        for writer in range(4):
            group.create_task(write(writer))
    for watcher in watchers:
        assert watcher.positions == list(range(1, 34))
        assert watcher.changes == watchers[0].changes


async def test_an_idle_watcher_gets_heartbeats_with_the_head(store: Any) -> None:
    call = store.stub.WatchChanges(
        store_pb2.WatchChangesRequest(feed_id=await feed_of(store), after_position=1)
    )
    for _ in range(3):
        message = await call.read()
        assert not message.HasField("change")
        assert message.head_position == 1
    call.cancel()


async def test_what_another_process_wrote_is_found_without_a_wake_up(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(store, await feed_of(store), position=1)
    monkeypatch.setattr(store.stores.database, "_on_commit", lambda: None)
    following = asyncio.ensure_future(watcher.follow(2))
    await store.stub.SetRoute(base_route("ner"))
    await following
    assert watcher.positions == [2]


@pytest.mark.parametrize(
    ("feed", "position"), [("", 0), ("another", 0), ("another", 1), (None, 2), (None, 10**12)]
)
async def test_a_position_that_is_not_of_this_feed_asks_for_a_snapshot(
    store: Any, kit: Any, feed: str | None, position: int
) -> None:
    feed_id = await feed_of(store) if feed is None else feed
    request = store_pb2.WatchChangesRequest(feed_id=feed_id, after_position=position)
    async with kit.refused() as errors:
        await store.stub.WatchChanges(request).read()
    assert (errors[0].code, errors[0].reason) == (Code.OUT_OF_RANGE, Reason.FEED_POSITION_EXPIRED)


async def test_a_position_before_what_the_feed_has_asks_for_a_snapshot(store: Any, kit: Any) -> None:
    from sqlalchemy import update

    from adaptermesh.store.schema import feed

    await store.stub.SetRoute(base_route("ner"))
    await store.stores.database.write(
        lambda connection: connection.execute(update(feed).values(trimmed_position=1))
    )
    feed_id = await feed_of(store)
    async with kit.refused() as errors:
        await store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=feed_id)).read()
    assert errors[0].reason is Reason.FEED_POSITION_EXPIRED
    watcher = Watcher(store, feed_id, position=1)
    await watcher.follow(2)
    assert watcher.positions == [2]


async def test_a_negative_position_is_refused(store: Any, kit: Any) -> None:
    request = store_pb2.WatchChangesRequest(feed_id=await feed_of(store), after_position=-1)
    async with kit.refused() as errors:
        await store.stub.WatchChanges(request).read()
    assert errors[0].code is Code.INVALID_ARGUMENT


async def test_a_draining_store_ends_its_watches_with_a_reason(store: Any, kit: Any) -> None:
    call = store.stub.WatchChanges(
        store_pb2.WatchChangesRequest(feed_id=await feed_of(store), after_position=1)
    )
    await call.read()
    store.stores.drain()
    async with kit.refused() as errors:
        while True:
            await call.read()
    assert (errors[0].code, errors[0].reason) == (Code.UNAVAILABLE, Reason.DRAINING)


async def test_a_watcher_that_hangs_up_is_forgotten(store: Any, kit: Any) -> None:
    feed_id = await feed_of(store)
    calls = [store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=feed_id)) for _ in range(3)]
    for call in calls:
        await call.read()
    assert store.stores.feed.watchers == 3
    for call in calls:
        call.cancel()
    await kit.until(lambda: not store.stores.feed.watchers)


async def test_a_watcher_that_stops_reading_holds_up_no_writer(store: Any) -> None:
    feed_id = await feed_of(store)
    stuck = store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=feed_id))
    await stuck.read()
    for number in range(20):
        await store.stub.SetRoute(base_route(f"task-{number}"))
    seen: list[int] = []
    while len(seen) < 20:
        message = await stuck.read()
        if message.HasField("change"):
            seen.append(message.change.position)
    assert seen == list(range(2, 22))
    stuck.cancel()


async def test_a_watch_that_is_cancelled_while_it_is_woken_ends(store: Any) -> None:
    feed, database = store.stores.feed, store.stores.database
    feed_id = await feed_of(store)
    for pauses in range(8):
        watch = feed.watch(database, feed_id, 1)
        await anext(watch)
        watching = asyncio.ensure_future(anext(watch))
        for _ in range(3):
            await asyncio.sleep(0)
        feed.announce()
        for _ in range(pauses):
            await asyncio.sleep(0)
        watching.cancel()
        await asyncio.wait([watching], timeout=30)
        assert watching.cancelled()
        await watch.aclose()


async def test_a_watcher_hears_in_time_beside_commits_that_are_no_changes(store: Any) -> None:
    feed = store.stores.feed

    async def commit_all_the_time() -> None:
        while True:
            feed.announce()
            await asyncio.sleep(0.02)

    busy = asyncio.create_task(commit_all_the_time())
    place = await store.stub.GetFeedStatus(store_pb2.GetFeedStatusRequest())
    request = store_pb2.WatchChangesRequest(feed_id=place.feed_id, after_position=place.head_position)
    call = store.stub.WatchChanges(request)
    async with asyncio.timeout(20):
        beats = [await call.read() for _ in range(3)]
    call.cancel()
    busy.cancel()
    assert not any(beat.HasField("change") for beat in beats)
