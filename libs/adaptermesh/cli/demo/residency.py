"""Moves an adapter between the tiers of every worker by hand, so that the next switch is of a known kind."""

import asyncio
from collections.abc import Sequence

from adaptermesh.client import Code, MeshError, Tier, WorkerClient

_ATTEMPTS = 100
_PAUSE_SECONDS = 0.1


async def evict(workers: Sequence[str], digest: str) -> None:
    """Drops a version from every worker, once the request that just ended has let go of it."""
    for address in workers:
        async with WorkerClient(address) as worker:
            for attempt in range(_ATTEMPTS):
                try:
                    await worker.evict(digest)
                    break
                except MeshError as error:
                    if error.code is not Code.FAILED_PRECONDITION or attempt == _ATTEMPTS - 1:
                        raise
                await asyncio.sleep(_PAUSE_SECONDS)


async def load_to_host(workers: Sequence[str], digest: str) -> None:
    """Brings a version to the host memory of every worker, and no nearer."""
    for address in workers:
        async with WorkerClient(address) as worker:
            await worker.load(digest, Tier.HOST)
