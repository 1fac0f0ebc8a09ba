from typing import cast

import grpc.aio
import pytest

from adaptermesh.gateway.channels import WorkerChannels


class OpenChannel:
    """As much of a channel as the cache touches."""

    def __init__(self) -> None:
        self.is_closed = False

    async def close(self) -> None:
        self.is_closed = True


class Opened:
    """Opens channels and remembers them."""

    def __init__(self) -> None:
        self.channels: dict[str, list[OpenChannel]] = {}

    def __call__(self, address: str) -> grpc.aio.Channel:
        channel = OpenChannel()
        self.channels.setdefault(address, []).append(channel)
        return cast("grpc.aio.Channel", channel)


def is_closed(channel: object) -> bool:
    assert isinstance(channel, OpenChannel)
    return channel.is_closed


@pytest.fixture
def opened() -> Opened:
    return Opened()


async def test_calls_to_one_address_share_a_channel(opened: Opened) -> None:
    channels = WorkerChannels(opened, limit=2)
    first, second = await channels.acquire("a:1"), await channels.acquire("a:1")
    assert first.channel is second.channel
    await channels.release(first)
    await channels.release(second)
    assert (await channels.acquire("a:1")).channel is first.channel
    await channels.close()
    assert is_closed(first.channel)


async def test_a_channel_that_failed_gets_no_new_calls_and_closes_after_its_last(opened: Opened) -> None:
    channels = WorkerChannels(opened, limit=2)
    first, second = await channels.acquire("a:1"), await channels.acquire("a:1")
    await channels.release(first, failed=True)
    fresh = await channels.acquire("a:1")
    assert fresh.channel is not first.channel
    assert not is_closed(second.channel)
    await channels.release(second, failed=True)
    assert is_closed(second.channel)
    assert not is_closed(fresh.channel)
    assert len(channels) == 1
    await channels.close()


async def test_the_least_recently_used_idle_channel_gives_way(opened: Opened) -> None:
    channels = WorkerChannels(opened, limit=2)
    for address in ("a:1", "b:1", "a:1", "c:1"):
        await channels.release(await channels.acquire(address))
    assert len(channels) == 2
    assert is_closed(opened.channels["b:1"][0])
    assert not is_closed(opened.channels["a:1"][0])
    await channels.close()


async def test_a_channel_in_use_is_never_closed_for_room(opened: Opened) -> None:
    channels = WorkerChannels(opened, limit=1)
    held = [await channels.acquire(f"host-{number}:1") for number in range(3)]
    assert not any(is_closed(connection.channel) for connection in held)
    for connection in held:
        await channels.release(connection)
    assert len(channels) == 1
    await channels.close()
