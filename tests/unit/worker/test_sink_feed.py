"""What a sink gets of the messages that are handed to its feed."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.adapter_stream import SinkFeed
from tests.unit.worker.scripted_engine import RecordingSink

MESSAGE = bytes(2**20)


class SlowSink(RecordingSink):
    """Takes a message when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go = threading.Semaphore(0)

    def write(self, data: bytes | memoryview) -> None:
        self.entered.set()
        assert self.go.acquire(timeout=30)
        super().write(data)


@pytest.fixture
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


async def test_receiving_goes_on_while_the_manifest_is_read_until_enough_waits(
    executor: ThreadPoolExecutor,
) -> None:
    sink = SlowSink()
    feed = SinkFeed(sink, executor)
    await feed.begin(b"manifest")
    taken = 0

    async def hand_over() -> None:
        nonlocal taken
        for _ in range(8):
            await feed.write(MESSAGE)
            taken += 1

    task = asyncio.create_task(hand_over())
    await asyncio.sleep(0.05)
    # Two that wait, or one that waits and one that is being written.
    assert taken == 2
    assert feed.written == 0
    sink.go.release(8)
    await task
    await feed.finish()
    assert sink.finished
    assert not sink.overlapped
    assert feed.written == len(sink.data) == 8 * len(MESSAGE)
    assert feed.verify_ns > 0


async def test_who_waits_for_room_hears_what_the_sink_raised(executor: ThreadPoolExecutor) -> None:
    sink = SlowSink()
    sink.refuse_write = MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, "spoiled")
    feed = SinkFeed(sink, executor)
    await feed.begin(b"manifest")
    for _ in range(2):
        await feed.write(MESSAGE)
    waiting = asyncio.create_task(feed.write(MESSAGE))
    await asyncio.sleep(0)
    sink.go.release()
    with pytest.raises(MeshError, match="spoiled"):
        await waiting
    with pytest.raises(MeshError, match="spoiled"):
        await feed.settle()
    assert feed.written == 0


async def test_after_a_fetch_is_given_up_no_thread_touches_the_sink(executor: ThreadPoolExecutor) -> None:
    sink = SlowSink()
    feed = SinkFeed(sink, executor)
    await feed.begin(b"manifest")
    for _ in range(2):
        await feed.write(MESSAGE)
    await asyncio.to_thread(sink.entered.wait, 30)
    ending = asyncio.create_task(feed.quiesce())
    await asyncio.sleep(0.01)
    assert not ending.done()
    sink.go.release(8)
    await ending
    assert len(sink.data) == len(MESSAGE)
