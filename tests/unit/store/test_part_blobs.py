"""The bytes of parts: how long they stay."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.stores import StoreConfig
from adaptermesh.store.wire import header_from
from tests.unit.store.upload_sender import (
    HOUR,
    WEIGHTS,
    FastClock,
    Sender,
    cuts,
    kept_parts,
    opened,
    send,
)


@pytest.fixture
def config(both_forms: StoreConfig) -> StoreConfig:
    return both_forms


async def test_parts_that_two_uploads_share_stay_until_both_end(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    one = await Sender(files).begin(store, kit)
    two = await Sender(files).begin(store, kit, name="other")
    for sender in (one, two):
        await sender.parts(store, cuts(files))
    await one.abandon(store)
    assert (await two.complete(store)).version.name == "other"
    assert await kept_parts(store.stores) == set()


async def test_garbage_collection_leaves_the_parts_of_an_upload_in_progress(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit)
    wanted = cuts(files)
    await sender.parts(store, wanted[:4])
    source = store.config.folder / "lost"
    source.write_bytes(b"lost")
    await store.stores.parts.put(digest_bytes(b"lost"), source)
    kept = await kept_parts(store.stores)
    everything = store_pb2.CollectGarbageRequest(grace=Duration())
    looked = await store.stub.CollectGarbage(store_pb2.CollectGarbageRequest(dry_run=True, grace=Duration()))
    assert await kept_parts(store.stores) == kept
    done = await store.stub.CollectGarbage(everything)
    assert (done.removed_blobs, done.removed_bytes, done.needed_blobs) == (1, 4, 4)
    assert (looked.removed_blobs, looked.removed_bytes, looked.needed_blobs) == (1, 4, 4)
    await sender.parts(store, wanted[4:])
    assert (await sender.complete(store)).created


async def test_an_upload_to_which_nothing_comes_expires(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await opened(config, clock)
    try:
        key, _ = await stores.sessions.begin(header)
        clock.ahead = 23 * HOUR
        await send(stores, key, files, WEIGHTS)
        clock.ahead = 46 * HOUR
        assert len((await stores.sessions.get(key)).parts) == 1
        clock.ahead = 48 * HOUR
        with pytest.raises(MeshError) as caught:
            await send(stores, key, files, "README.md")
        assert caught.value.reason is Reason.UPLOAD_NOT_FOUND
        looked = await stores.garbage.collect(24 * HOUR, dry_run=True)
        assert (looked.expired_uploads, looked.removed_blobs) == (1, 1)
        done = await stores.garbage.collect(24 * HOUR)
        assert (done.expired_uploads, done.removed_blobs, done.young_blobs) == (1, 0, 0)
        assert await kept_parts(stores) == set()
        assert (await stores.garbage.collect(0)).expired_uploads == 0
    finally:
        await stores.close()


async def test_the_next_upload_clears_away_what_has_expired(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await opened(config, clock)
    try:
        key, _ = await stores.sessions.begin(header)
        await send(stores, key, files, WEIGHTS)
        clock.ahead = 25 * HOUR
        await stores.sessions.begin(header)
        assert await kept_parts(stores) == set()
    finally:
        await stores.close()
