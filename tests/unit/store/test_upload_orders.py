"""Parts in any order, some of them again, with the store closed and opened in between: one outcome."""

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.stores import Stores
from adaptermesh.store.upload_progress import missing_ranges, received_ranges
from adaptermesh.store.wire import header_from
from tests.unit.store.conftest import make_files, make_header, store_config
from tests.unit.store.upload_sender import opened, send

FILES = make_files(rank=4)
HEADER = header_from(make_header(FILES))
PATHS = tuple(FILES)
GRID = 700
CUTS = [
    (path, start, min(start + GRID, len(data)))
    for path, data in FILES.items()
    for start in range(0, len(data), GRID)
]
NUMBERS = count()

OPEN_AGAIN, COLLECT, COMPLETE = "open again", "collect", "complete"
EVENTS = st.lists(
    st.one_of(
        st.sampled_from(CUTS),
        st.sampled_from(CUTS),
        st.sampled_from([OPEN_AGAIN, COLLECT, COMPLETE]),
        # Ranges that may overlap others.
        st.tuples(st.just(PATHS[1]), st.integers(0, 900), st.integers(901, 1500)),
    ),
    max_size=12,
)


def overlaps(cut: Any, others: set[Any]) -> bool:
    path, start, end = cut
    return any(path == other and start < stop and begin < end for other, begin, stop in others)


async def check(stores: Stores, key: str, received: set[Any]) -> None:
    session = await stores.sessions.get(key)
    for index, path in enumerate(PATHS):
        told = {
            at for start, size in received_ranges(session.parts, index) for at in range(start, start + size)
        }
        assert told == {at for name, start, end in received if name == path for at in range(start, end)}


@given(events=EVENTS, order=st.permutations(CUTS))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_events_ends_in_the_same_version(
    tmp_path: Path, events: list[Any], order: list[Any]
) -> None:
    async def run() -> None:
        config = store_config(tmp_path / str(next(NUMBERS)))
        stores = await opened(config, SystemClock())
        try:
            key, _ = await stores.sessions.begin(HEADER)
            received: set[Any] = set()
            for event in (*events, *order):
                if event == OPEN_AGAIN:
                    await stores.close()
                    stores = await opened(config, SystemClock())
                elif event == COLLECT:
                    await stores.garbage.collect(-3600)
                elif event == COMPLETE:
                    await incomplete(stores, key)
                elif event in received or not overlaps(event, received):
                    assert await send(stores, key, FILES, *event) == (event not in received)
                    received.add(event)
                else:
                    await conflicting(stores, key, event)
                await check(stores, key, received)
            for path, (start, size) in missing_ranges(HEADER, (await stores.sessions.get(key)).parts):
                assert await send(stores, key, FILES, path, start, start + size)
            first, second = [await stores.sessions.complete(key) for _ in range(2)]
            assert (first.created, first) == (True, second)
            sources = {file.path: file.digest for file in first.version.source_files}
            assert sources == {path: digest_bytes(data) for path, data in FILES.items()}
            assert [blob async for blob in stores.parts._blobs.scan()] == []
        finally:
            await stores.close()

    asyncio.run(run())


async def incomplete(stores: Stores, key: str) -> None:
    if not list(missing_ranges(HEADER, (await stores.sessions.get(key)).parts)):
        return
    with pytest.raises(MeshError) as caught:
        await stores.sessions.complete(key)
    assert caught.value.reason is Reason.UPLOAD_INCOMPLETE


async def conflicting(stores: Stores, key: str, cut: Any) -> None:
    with pytest.raises(MeshError) as caught:
        await send(stores, key, FILES, *cut)
    assert caught.value.reason is Reason.UPLOAD_CONFLICT
