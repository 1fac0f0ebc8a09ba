from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Fakes, Mesh

PIECE = "x" * 2**18
PIECES = 400


async def test_a_client_that_reads_slowly_holds_the_worker_back(mesh: Mesh, fakes: Fakes) -> None:
    sent = 0
    blocked = asyncio.Event()

    async def flood(context: Any) -> None:
        nonlocal sent
        for _ in range(PIECES):
            writing = asyncio.ensure_future(context.write(fakes.delta(PIECE, 1)))
            done, _ = await asyncio.wait({writing}, timeout=0.5)
            if not done:
                blocked.set()
            await writing
            sent += 1
        await context.write(fakes.finished(PIECES))

    await mesh.add_worker("w1", fakes.starting_then(flood))
    call = mesh.call(timeout=60.0)
    await call.read()
    await asyncio.wait_for(blocked.wait(), 30)
    # 100 MiB were to be sent; what is under way is what the transport's windows hold.
    assert sent < PIECES // 4
    received = 0
    finished = False
    while (response := await call.read()) is not grpc.aio.EOF:
        received += response.delta.text == PIECE
        finished = response.HasField("finished")
    assert received == PIECES
    assert finished


async def test_a_client_that_stops_reading_does_not_outlive_its_bound(peers: Mesh, fakes: Fakes) -> None:
    async def flood(context: Any) -> None:
        while True:
            await context.write(fakes.delta(PIECE, 1))

    await peers.start_gateway(default_deadline_seconds=0.5)
    worker = await peers.add_worker("w1", fakes.starting_then(flood))
    call = peers.call(timeout=None)
    await call.read()
    await asyncio.wait_for(worker.cancelled.wait(), 20)
    await fakes.until(lambda: peers.service._gate.inside == 0)
    call.cancel()
