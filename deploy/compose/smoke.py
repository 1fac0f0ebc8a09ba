"""Sends one request per demo task through a running mesh and says what served each. Exits 1 if any is wrong.

Uploads the demo adapters and sets their routes first; both are idempotent.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from adaptermesh.cli.demo.plan import load_plan
from adaptermesh.cli.demo.publish import publish
from adaptermesh.client import (
    Ask,
    Code,
    MeshClient,
    MeshError,
    Prompt,
    RouterClient,
    SamplingParams,
    StoreClient,
)

DEMO = Path(__file__).parents[1] / "demo"
POLL_SECONDS = 0.5
RECOVERY_SECONDS = 60.0

T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """What a client does with UNAVAILABLE: it asks again after the delay that it was told."""
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            try:
                return await call()
            except MeshError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
                await asyncio.sleep(error.retry_after or POLL_SECONDS)


async def wait_for_workers(router: RouterClient, count: int) -> None:
    """Until the router knows `count` workers."""
    async with asyncio.timeout(RECOVERY_SECONDS):
        # They join over the network: there is no event here to wait on.
        while len(await patiently(router.list_workers)) < count:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)


async def smoke(arguments: argparse.Namespace) -> int:
    plan = load_plan(DEMO / "demo.json")
    failures = 0
    async with (
        StoreClient(arguments.store) as store,
        RouterClient(arguments.router) as router,
        MeshClient(arguments.gateway) as mesh,
    ):
        await wait_for_workers(router, arguments.workers)
        published = await patiently(partial(publish, store, plan, DEMO))
        for adapter in plan.adapters:
            answer = await patiently(
                partial(
                    mesh.complete,
                    Prompt.chat(adapter.prompts[0], system=adapter.system),
                    task=adapter.task,
                    sampling=SamplingParams(temperature=0.0, max_tokens=adapter.max_tokens),
                    ask=Ask(min_feed_position=published.feed_position),
                )
            )
            right = answer.version == f"{adapter.ref}:v1" and bool(answer.text.strip())
            failures += not right
            print(
                f"{'ok' if right else 'WRONG':6} {adapter.task:16} {answer.version:26} "
                f"{answer.started.switch_kind:5} {answer.started.worker_id}  {answer.text.strip()[:60]!r}"
            )
        greedy = SamplingParams(temperature=0.0, max_tokens=8)
        bare = await patiently(partial(mesh.complete, "Hello!", adapter="base", sampling=greedy))
        print(f"{'ok':6} {'(base)':16} {bare.version:26} {'':5} {bare.started.worker_id}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--router", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--workers", type=int, default=1)
    return asyncio.run(smoke(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
