import asyncio

import pytest

from adaptermesh.router.catalogue import AliasRemoved, Catalogue, Change, Event, FeedBrokenError, RouteRemoved
from tests.unit.router.fakes import BASE, alias, catalogue, image, route, version

V1, V2 = version(number=1), version(number=2)


def test_there_is_no_image_before_the_first_snapshot() -> None:
    empty = Catalogue()
    assert empty.image is None
    assert empty.position == -1
    assert empty.head == 0


def test_changes_are_applied_in_order_and_move_the_position() -> None:
    known = catalogue()
    events: list[Event] = [BASE, V1, V2, alias(V1), route("ner", ("acme/ner@prod", 1, "a"))]
    for position, event in enumerate(events, 1):
        known.apply(Change(position, event))
    assert known.image is not None
    assert known.position == 5
    assert known.image.bases == {BASE.digest: BASE}
    assert known.image.versions[V1.adapter] == {1: V1, 2: V2}
    assert known.image.aliases[V1.adapter, "prod"].digest == V1.digest
    assert ("default", "ner") in known.image.routes


def test_a_change_that_is_there_already_changes_nothing() -> None:
    known = catalogue(V1, V2, alias(V2))
    known.apply(Change(2, alias(V1)))
    assert known.image is not None
    assert known.image.aliases[V1.adapter, "prod"].digest == V2.digest
    assert known.position == 3


def test_a_change_after_a_gap_is_refused_and_leaves_the_catalogue_as_it_was() -> None:
    known = catalogue(V1)
    with pytest.raises(FeedBrokenError):
        known.apply(Change(3, V2))
    assert known.position == 1
    assert known.image is not None
    assert V2.digest not in known.image.by_digest


def test_a_change_before_the_first_snapshot_is_refused() -> None:
    with pytest.raises(FeedBrokenError):
        Catalogue().apply(Change(1, V1))


def test_a_snapshot_replaces_everything_at_once() -> None:
    known = catalogue(V1, alias(V1))
    before = known.image
    known.replace(image(V2, feed_id="another", position=7))
    assert known.image is not before
    assert known.image is not None
    assert known.image.feed_id == "another"
    assert known.position == 7
    assert known.image.aliases == {}
    assert before is not None
    assert before.by_digest == {V1.digest: V1}


def test_a_removed_route_is_gone_and_removing_it_twice_is_harmless() -> None:
    known = catalogue(route("ner", ("base", 1, "a")))
    known.apply(Change(2, RouteRemoved("default", "ner")))
    known.apply(Change(3, RouteRemoved("default", "ner")))
    assert known.image is not None
    assert known.image.routes == {}


def test_a_removed_alias_is_gone_and_removing_it_twice_is_harmless() -> None:
    known = catalogue(V1, alias(V1))
    known.apply(Change(3, AliasRemoved(V1.adapter, "prod")))
    known.apply(Change(4, AliasRemoved(V1.adapter, "prod")))
    assert known.image is not None
    assert known.image.aliases == {}


def test_a_base_goes_by_its_digest_and_by_its_name() -> None:
    known = image(BASE)
    assert known.base_digests(BASE.digest) == {BASE.digest}
    assert known.base_digests("tiny") == {BASE.digest}
    assert known.base_digests("huge") == frozenset()


def test_a_head_behind_our_position_breaks_the_feed() -> None:
    known = catalogue(V1, V2)
    known.heard_head(5)
    assert known.head == 5
    with pytest.raises(FeedBrokenError):
        known.heard_head(1)


async def test_a_waiter_wakes_when_its_position_is_there_and_not_before() -> None:
    known = catalogue()
    second = asyncio.create_task(known.reach(2, timeout=60))
    first = asyncio.create_task(known.reach(1, timeout=60))
    await asyncio.sleep(0)
    known.apply(Change(1, V1))
    assert await first
    assert not second.done()
    known.apply(Change(2, V2))
    assert await second


async def test_a_position_that_is_there_needs_no_wait() -> None:
    assert await catalogue(V1).reach(1, timeout=0)


async def test_a_wait_that_takes_too_long_says_so_and_leaves_nothing_behind() -> None:
    known = catalogue()
    assert not await known.reach(1, timeout=0)
    known.apply(Change(1, V1))
    assert await known.reach(1, timeout=0)


async def test_a_cancelled_waiter_does_not_disturb_the_others() -> None:
    known = catalogue()
    gone = asyncio.create_task(known.reach(1, timeout=60))
    stays = asyncio.create_task(known.reach(1, timeout=60))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    known.apply(Change(1, V1))
    assert await stays
