"""A running mesh with the demo adapters published."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.cli.demo.plan import DemoAdapter, load_plan
from adaptermesh.cli.demo.publish import publish
from adaptermesh.client import Ask, Generation, MeshClient, Prompt, RouterClient, SamplingParams, StoreClient
from adaptermesh.local import LocalMesh, LocalMeshConfig

_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Rig:
    """The mesh's processes and clients of them; `position` is the feed's once the adapters were published."""

    mesh: LocalMesh
    client: MeshClient
    store: StoreClient
    router: RouterClient
    adapters: dict[str, DemoAdapter]
    base_model: str
    position: int

    async def generate(
        self,
        prompt: Prompt | str,
        *,
        task: str = "",
        adapter: str = "",
        max_tokens: int = 32,
        position: int | None = None,
    ) -> Generation:
        """One greedy answer that sees everything up to `position`; a plain string is one user message."""
        return await self.client.complete(
            prompt,
            task=task,
            adapter=adapter,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            ask=Ask(min_feed_position=self.position if position is None else position),
            timeout=_TIMEOUT_SECONDS,
        )


@asynccontextmanager
async def run_rig(config: LocalMeshConfig, demo: Path, api_key: str = "") -> AsyncIterator[Rig]:
    """Starts a mesh, publishes the adapters of the plan `demo` (a demo.json), and stops it again.

    With an API key the clients show it; that the services ask for it is up to `config`.
    """
    plan = load_plan(demo)
    async with LocalMesh(config) as mesh:
        ends = mesh.endpoints
        async with (
            StoreClient(ends.store, api_key=api_key) as store,
            MeshClient(ends.gateway, api_key=api_key) as client,
            RouterClient(ends.router) as router,
        ):
            published = await publish(store, plan, demo.parent)
            adapters = {adapter.task: adapter for adapter in plan.adapters}
            yield Rig(mesh, client, store, router, adapters, plan.base_model, published.feed_position)
