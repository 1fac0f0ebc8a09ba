"""Puts the demonstration's adapters into a store and routes its tasks to them."""

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.cli.demo.plan import DemoAdapter, DemoPlan
from adaptermesh.client import AliasMove, MeshError, Publication, Reason, RouteChange, StoreClient, Version

ALIAS = "prod"


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter in the store; `prod` points at its first version, the route of its task at `prod`."""

    plan: DemoAdapter
    versions: tuple[Version, ...]

    @property
    def alias(self) -> str:
        """`namespace/name@prod`."""
        return f"{self.plan.ref}@{ALIAS}"


@dataclass(frozen=True, slots=True)
class Published:
    """Everything that was published. Requests from `feed_position` on see all of it."""

    adapters: tuple[PublishedAdapter, ...]
    feed_position: int


async def publish(store: StoreClient, plan: DemoPlan, folder: Path) -> Published:
    """Uploads every version, points `prod` at the first ones and sets the routes.

    Doing it again changes nothing: what is there already stays, wherever it points by now.

    Args:
        store: where to.
        plan: what.
        folder: what the plan's folders are relative to.
    """
    adapters: list[PublishedAdapter] = []
    position = 0
    for adapter in plan.adapters:
        versions: list[Version] = []
        for version in adapter.versions:
            publication = Publication(
                base_model=plan.base_model,
                task=adapter.task,
                description=version.description,
                tags=adapter.tags,
                license=adapter.license,
                author="adaptermesh",
            )
            uploaded = await store.upload(folder / version.dir, adapter.ref, publication)
            versions.append(uploaded.version)
        published = PublishedAdapter(adapter, tuple(versions))
        position = max(position, await _point(store, published))
        adapters.append(published)
    return Published(tuple(adapters), position)


async def _point(store: StoreClient, adapter: PublishedAdapter) -> int:
    """Sets alias and route if they don't exist yet; returns the last position of the feed that is known."""
    first = adapter.versions[0].number
    return max(
        await _unless_there(
            store.set_alias(
                adapter.alias, first, expected_generation=0, actor="demo", comment="first version"
            )
        ),
        await _unless_there(store.set_route(adapter.plan.task, adapter.alias, expected_generation=0)),
    )


async def _unless_there(change: Awaitable[AliasMove | RouteChange]) -> int:
    """The change's position in the feed, or 0 if it was made before."""
    try:
        return (await change).feed_position
    except MeshError as error:
        if error.reason not in {Reason.ALIAS_CONFLICT, Reason.ROUTE_CONFLICT}:
            raise
        return 0
