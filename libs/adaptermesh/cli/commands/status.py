"""`adaptermesh status`."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import FAILED, execute
from adaptermesh.cli.options import GatewayOption, JsonOption, RouterOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, short_digest, size, table
from adaptermesh.client import (
    GATEWAY_SERVICE,
    ROUTER_SERVICE,
    STORE_SERVICE,
    WORKER_SERVICE,
    FeedStatus,
    HealthClient,
    MeshError,
    RouterClient,
    RouterStatus,
    Worker,
)


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """One service as its health check describes it."""

    service: str
    address: str
    serving: bool
    problem: str = ""


def status(
    gateway: GatewayOption = "",
    router: RouterOption = "",
    store: StoreOption = "",
    adapters: Annotated[
        bool, typer.Option("--adapters", help="List the adapters that each worker holds, and what they take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows which services answer, and what each worker holds. Exit code 1 if one of them does not serve.

    Examples:
    adaptermesh status

    adaptermesh status --adapters
    """

    async def work(output: Output) -> None:
        settings = output.settings
        router_address = router or settings.router
        healths = list(
            await asyncio.gather(
                health_of("gateway", gateway or settings.gateway, GATEWAY_SERVICE),
                health_of("router", router_address, ROUTER_SERVICE),
                health_of("store", store or settings.store, STORE_SERVICE),
            )
        )
        feed = await _feed_status(output, store)
        router_status, workers = await _router_view(router_address)
        healths += await asyncio.gather(
            *(health_of("worker", worker.address, WORKER_SERVICE) for worker in workers)
        )
        document = {"services": healths, "feed": feed, "router": router_status, "workers": workers}
        parts = _report(healths, feed, router_status, workers)
        if adapters and workers:
            parts += [Text(""), _adapters(workers, await _names(output, store))]
        output.result(document, *parts)
        if not workers or not all(health.serving for health in healths):
            raise typer.Exit(FAILED)

    execute(as_json, work)


async def health_of(service: str, address: str, name: str) -> ServiceHealth:
    """What one service's health check says; a service that does not answer is no error here."""
    try:
        async with HealthClient(address) as client:
            serving = await client.is_serving(name)
    except MeshError as error:
        return ServiceHealth(service, address, serving=False, problem=error.message)
    return ServiceHealth(service, address, serving, "" if serving else "answers, but does not serve")


async def _names(output: Output, address: str) -> dict[str, str]:
    """Versions by their digests, as far as the store answers."""
    try:
        async with store_client(output, address) as client:
            found = [await client.list_versions(adapter.name) for adapter in await client.list_adapters()]
    except MeshError:
        return {}
    return {version.digest: version.ref for versions in found for version in versions}


async def _feed_status(output: Output, address: str) -> FeedStatus | None:
    try:
        async with store_client(output, address) as client:
            return await client.feed_status()
    except MeshError:
        # Its health check says so already, unless it is a store of before there was such a call.
        return None


async def _router_view(address: str) -> tuple[RouterStatus | None, list[Worker]]:
    try:
        async with RouterClient(address) as client:
            return await client.status(), await client.list_workers()
    except MeshError:
        # Its health check says so already.
        return None, []


def _report(
    healths: list[ServiceHealth],
    feed: FeedStatus | None,
    router: RouterStatus | None,
    workers: list[Worker],
) -> list[RenderableType]:
    services = table("service", "address", "state")
    for health in healths:
        state = Text("serving", "green") if health.serving else Text(health.problem, "red")
        services.add_row(health.service, health.address, state)
    parts: list[RenderableType] = [services]
    if not any(health.serving for health in healths):
        parts.append(Text("\nno mesh here; start one with `adaptermesh up`"))
        return parts
    if feed is not None:
        parts.append(Text(f"\nstore: change feed at {feed.head_position}, {_kept(feed)}"))
    if router is not None:
        behind = router.feed_head - router.feed_position
        lag = f"{behind} behind" if behind else "up to date"
        connected = lag if router.feed_connected else "not connected to the store"
        parts.append(Text(f"router: {router.versions} versions, {router.routes} routes, {connected}"))
    if not workers:
        return [*parts, Text("no workers report to the router", "red")]
    parts.append(_workers(workers))
    if any(worker.load.budgets for worker in workers):
        parts += [Text(""), _budgets(workers)]
    return parts


def _kept(feed: FeedStatus) -> str:
    """Which of the feed's changes are there."""
    if feed.oldest_commit_time is None:
        return "no changes kept"
    return f"kept from {feed.trimmed_position + 1} on ({moment(feed.oldest_commit_time)})"


def _workers(workers: list[Worker]) -> RenderableType:
    rows = table(
        *("worker", "device", "base", "state", "running", "waiting", "kv", "adapters: device/host/disk"),
        right=("running", "waiting", "kv"),
    )
    for worker in workers:
        load = worker.load
        counts = [sum(r.tier == tier for r in worker.residencies) for tier in ("device", "host", "disk")]
        held = sum(residency.size_bytes for residency in worker.residencies)
        pinned = sum(residency.pinned for residency in worker.residencies)
        pins = f", {pinned} pinned" if pinned else ""
        rows.add_row(
            worker.worker_id,
            worker.device,
            worker.base_model_id,
            worker.state,
            str(load.running_requests),
            str(load.waiting_requests + worker.booked_requests),
            f"{load.kv_used_tokens}/{load.kv_total_tokens}",
            f"{'/'.join(map(str, counts))} of {worker.device_slots} slots, {size(held)}{pins}",
        )
    return rows


def _adapters(workers: list[Worker], names: dict[str, str]) -> RenderableType:
    """A line for each adapter that a worker holds: what its weights take, beside the base's."""
    rows = table(
        *("worker", "adapter", "tier", "requests", "memory", "of the base"),
        right=("requests", "memory", "of the base"),
    )
    for worker in workers:
        held = sorted(worker.residencies, key=lambda one: (-one.device_bytes, one.digest))
        for index, one in enumerate(held):
            known = one.device_bytes and worker.base_bytes
            rows.add_row(
                worker.worker_id if index == 0 else "",
                names.get(one.digest, short_digest(one.digest)),
                f"{one.tier}, pinned" if one.pinned else one.tier,
                str(one.requests),
                size(one.device_bytes or one.size_bytes),
                f"{one.device_bytes / worker.base_bytes:.2%}" if known else "",
            )
    return rows


def _budgets(workers: list[Worker]) -> RenderableType:
    """A line for each tier and for the KV cache: what a worker holds there, of what it may hold."""
    rows = table("worker", "holds", "used", "of", "share", "", right=("used", "of", "share"))
    for worker in workers:
        budgets = worker.load.budgets
        if budgets is None:
            rows.add_row(worker.worker_id, "?")
            continue
        slots = f"{budgets.device_used_slots} of {worker.device_slots} slots"
        cached = f"+ {size(budgets.kv_cached_bytes)} cached" if budgets.kv_cached_bytes else ""
        held = (
            ("device", budgets.device_used_bytes, budgets.device_budget_bytes, slots),
            ("host", budgets.host_used_bytes, budgets.host_budget_bytes, ""),
            ("disk", budgets.disk_used_bytes, budgets.disk_budget_bytes, ""),
            ("kv cache", budgets.kv_used_bytes, budgets.kv_total_bytes, cached),
        )
        for index, (name, used, total, note) in enumerate(held):
            bound, share = (size(total), f"{used / total:.0%}") if total else ("", "")
            rows.add_row(worker.worker_id if index == 0 else "", name, size(used), bound, share, note)
    return rows
