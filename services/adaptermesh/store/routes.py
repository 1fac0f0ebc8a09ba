"""Routes: which refs serve a tenant's task."""

import dataclasses
import logging

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.composition import is_composition, leaves, parse_composition
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.core.refs import BASE, Ref, check_name, parse_ref
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import check_generation, check_line
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import ChangeKind, RouteRecord, RouteTarget
from adaptermesh.store.rows import route_record
from adaptermesh.store.schema import routes
from adaptermesh.store.usability import find_usable

log = logging.getLogger(__name__)

ANY_TENANT = "*"
MAX_TARGETS = 64
MAX_WEIGHT = 1_000_000
MAX_COHORT = 64
MAX_TENANT = 256


class Routes:
    """The rules (tenant, task) -> refs."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def set(self, route: RouteRecord, expected_generation: int | None) -> tuple[RouteRecord, int]:
        """Sets or replaces a route; returns it and the feed position.

        Args:
            route: its generation and time are set here.
            expected_generation: the one it has now, 0 if it must not exist yet, None for whatever it is.

        Raises:
            MeshError: ROUTE_CONFLICT if it has changed since; NOT_FOUND, VERSION_REVOKED or VERSION_UNSIGNED
                for a target.
        """
        _check_key(route.tenant, route.task)
        _check_targets(route.targets)
        check_generation(expected_generation)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[RouteRecord, int]:
            live, generation = await _generation(connection, route.tenant, route.task)
            _compare(route, expected_generation, generation if live else 0)
            for target in route.targets:
                for ref in _refs(target):
                    await find_usable(connection, ref)
            changed = dataclasses.replace(route, generation=generation + 1, update_time_us=now_us)
            await _save(connection, changed, deleted=False, known=generation > 0)
            return changed, await append_change(connection, ChangeKind.ROUTE_SET, changed, now_us)

        changed, position = await self._database.write(work)
        log.info(
            "route set",
            extra={
                "tenant": changed.tenant,
                "task": changed.task,
                "targets": [f"{target.ref}*{target.weight}" for target in changed.targets],
                "generation": changed.generation,
                "feed_position": position,
            },
        )
        return changed, position

    async def delete(self, tenant: str, task: str) -> int:
        """Removes a route; returns the feed position. Raises MeshError ROUTE_NOT_FOUND."""
        _check_key(tenant, task)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> int:
            live, generation = await _generation(connection, tenant, task)
            if not live:
                raise not_found(Reason.ROUTE_NOT_FOUND, "route", f"{tenant}/{task}")
            gone = RouteRecord(tenant, task, (), generation + 1, now_us)
            await _save(connection, gone, deleted=True, known=True)
            return await append_change(connection, ChangeKind.ROUTE_DELETED, gone, now_us)

        position = await self._database.write(work)
        log.info("route deleted", extra={"tenant": tenant, "task": task, "feed_position": position})
        return position

    async def list(self, tenant: str, request: PageRequest) -> Page[RouteRecord]:
        """Routes by tenant and task; an empty tenant means all of them."""
        check_line("tenant", tenant, MAX_TENANT)

        def key(route: RouteRecord) -> Key:
            return route.tenant, route.task

        pager = Pager(request, ["routes", tenant], key, (str, str))
        query = select(routes).where(routes.c.deleted.is_(False)).order_by(routes.c.tenant, routes.c.task)
        if tenant:
            query = query.where(routes.c.tenant == tenant)
        if pager.after is not None:
            last_tenant, last_task = pager.after
            same = (routes.c.tenant == last_tenant) & (routes.c.task > last_task)
            query = query.where((routes.c.tenant > last_tenant) | same)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.limit(pager.limit))
            return pager.page([route_record(row) for row in rows])


async def routes_to(connection: AsyncConnection, *refs: Ref) -> list[str]:
    """The routes, as `tenant/task`, of which a target or a part of one is one of these very refs.

    Of others than the caller's tenant only those for everybody: it neither hears of nor waits for the rest.
    """
    query = select(routes).where(routes.c.deleted.is_(False)).order_by(routes.c.tenant, routes.c.task)
    caller = current_caller.get()
    if not caller.is_operator:
        query = query.where(routes.c.tenant.in_((caller.tenant, ANY_TENANT)))
    found = []
    async for row in await connection.stream(query):
        route = route_record(row)
        if any(ref in refs for target in route.targets for ref in _refs(target)):
            found.append(f"{route.tenant}/{route.task}")
    return found


async def _generation(connection: AsyncConnection, tenant: str, task: str) -> tuple[bool, int]:
    """Whether there is such a route, and the last generation that one ever had; 0 if there never was one."""
    query = select(routes).where((routes.c.tenant == tenant) & (routes.c.task == task))
    row = (await connection.execute(query)).first()
    return (False, 0) if row is None else (not row.deleted, row.generation)


async def _save(connection: AsyncConnection, route: RouteRecord, *, deleted: bool, known: bool) -> None:
    row = {**dataclasses.asdict(route), "deleted": deleted}
    if known:
        same = (routes.c.tenant == route.tenant) & (routes.c.task == route.task)
        await connection.execute(update(routes).where(same).values(row))
    else:
        await connection.execute(insert(routes).values(row))


def _check_key(tenant: str, task: str) -> None:
    if tenant != ANY_TENANT:
        check_name(tenant, "tenant")
    check_name(task, "task")


def _refs(target: RouteTarget) -> list[Ref]:
    """The refs that a target names, or its composition does; raises MeshError INVALID_ARGUMENT."""
    if target.ref == BASE:
        return []
    if is_composition(target.ref):
        return [parse_ref(leaf.name) for leaf in leaves(parse_composition(target.ref))]
    return [parse_ref(target.ref)]


def _check_targets(targets: tuple[RouteTarget, ...]) -> None:
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise invalid_field("targets", f"must be 1 to {MAX_TARGETS}")
    for index, target in enumerate(targets):
        _refs(target)
        if not 0 <= target.weight <= MAX_WEIGHT:
            raise invalid_field(f"targets[{index}].weight", f"must be in [0, {MAX_WEIGHT}]")
        check_line(f"targets[{index}].cohort", target.cohort, MAX_COHORT)
    if sum(target.weight for target in targets) < 1:
        raise invalid_field("targets", "the sum of the weights must be at least 1")


def _compare(route: RouteRecord, expected: int | None, generation: int) -> None:
    if expected in (None, generation):
        return
    raise MeshError(
        Code.ABORTED,
        Reason.ROUTE_CONFLICT,
        f"route '{route.tenant}/{route.task}' is at generation {generation}, not {expected}",
        metadata={"name": f"{route.tenant}/{route.task}", "generation": str(generation)},
    )
