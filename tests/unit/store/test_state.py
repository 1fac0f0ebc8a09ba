"""Random mutations against a plain twin: the state, its history, the feed and snapshots must all agree."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.listing import AdapterQuery
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.records import (
    AliasRecord,
    BaseModelRecord,
    ChangeKind,
    DeletedVersion,
    PolicyRecord,
    Record,
    RouteRecord,
    RouteTarget,
    VersionRecord,
)
from adaptermesh.store.search_query import SearchQuery
from adaptermesh.store.statuses import StatusRequest
from adaptermesh.store.stores import StoreConfig, Stores
from adaptermesh.store.version_removal import RemovalRequest
from tests.postgres import MIGRATED

NAMES = st.sampled_from(["a", "b"])
ALIASES = st.sampled_from(["prod", "canary"])
TASKS = st.sampled_from(["x", "y"])
EXPECTED = st.one_of(st.none(), st.integers(0, 4))

State = dict[tuple[str, ...], Record]


def key_of(record: Record) -> tuple[str, ...]:
    if isinstance(record, BaseModelRecord):
        return ("base", record.digest)
    if isinstance(record, VersionRecord):
        return ("version", record.digest)
    if isinstance(record, DeletedVersion):
        return ("deleted", record.ref)
    if isinstance(record, AliasRecord):
        return ("alias", record.namespace, record.name, record.alias)
    if isinstance(record, PolicyRecord):
        return ("policy", record.namespace)
    if isinstance(record, RouteRecord):
        return ("route", record.tenant, record.task)
    raise AssertionError(f"{record} is of no kind that is made here")


class Follower:
    """What a router does: a snapshot, then the feed from its position."""

    def __init__(self) -> None:
        self.state: State = {}
        self.feed_id = ""
        self.position = -1

    async def take_snapshot(self, stores: Stores) -> None:
        self.state = {}
        async for item in stores.snapshots.read():
            self.feed_id, self.position = item.feed_id, item.feed_position
            if item.record is not None:
                self.state[key_of(item.record)] = item.record

    async def catch_up(self, stores: Stores) -> None:
        watch = stores.feed.watch(stores.database, self.feed_id, self.position)
        async for message in watch:
            change = message.change
            if change is None:
                break
            assert change.position == self.position + 1
            self.position = change.position
            if change.kind in {ChangeKind.ROUTE_DELETED, ChangeKind.ALIAS_DELETED}:
                del self.state[key_of(change.record)]
            else:
                if isinstance(change.record, DeletedVersion):
                    del self.state["version", change.record.digest]
                self.state[key_of(change.record)] = change.record
            if self.position == message.head_position:
                break
        await watch.aclose()


class Twin:
    """The plain form of the catalogue's rules."""

    def __init__(self) -> None:
        self.versions: dict[str, list[str]] = {}
        self.moves: dict[tuple[str, str], list[int]] = {}
        self.routes: dict[str, int] = {}
        self.states: dict[tuple[str, int], list[VersionState]] = {}
        self.gone: set[tuple[str, str]] = set()
        self.deleted: set[tuple[str, int]] = set()
        self.protected: set[tuple[str, str]] = set()
        self.position = 0

    def generation(self, name: str, alias: str) -> int:
        return 0 if (name, alias) in self.gone else len(self.moves.get((name, alias), []))

    def there(self, name: str, number: int) -> bool:
        return 0 < number <= len(self.versions.get(name, [])) and (name, number) not in self.deleted

    def pointed(self, name: str, number: int) -> bool:
        return any(
            moves[-1] == number and self.generation(*key) > 0
            for key, moves in self.moves.items()
            if key[0] == name
        )

    def revoked(self, name: str, number: int) -> bool:
        return self.states.get((name, number), [VersionState.ACTIVE])[-1] is VersionState.REVOKED


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, databases: Callable[[Path], AbstractContextManager[str]]) -> None:
        super().__init__()
        self.databases = databases

    @initialize()
    def start(self) -> None:
        self.around = ExitStack()
        self.folder = Path(self.around.enter_context(tempfile.TemporaryDirectory()))
        self.url = self.around.enter_context(self.databases(self.folder))
        self.runner = asyncio.Runner()
        self.twin = Twin()
        self.made = 0
        self.run(self._open())
        base = BaseModelRecord("base", *(digest_bytes(b"base"),) * 3, "Llama", 1, 1, 1, "{}")
        self.base = base
        self.run(self._register(base))
        self.twin.position = 1
        self.follower = Follower()
        self.run(self.follower.take_snapshot(self.stores))

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def _open(self) -> None:
        self.stores = Stores(StoreConfig(self.folder, DatabaseConfig(self.url)), SystemClock())
        await self.stores.open()

    async def _register(self, base: BaseModelRecord) -> None:
        from sqlalchemy import insert

        from adaptermesh.store.feed import append_change
        from adaptermesh.store.schema import base_models

        async def work(connection: Any) -> None:
            position = await append_change(connection, ChangeKind.BASE_MODEL_REGISTERED, base, 1)
            fields = {name: getattr(base, name) for name in BaseModelRecord.__dataclass_fields__}
            await connection.execute(insert(base_models).values(feed_position=position, **fields))

        await self.stores.database.write(work)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.stores.close())
            self.runner.close()
            self.around.close()

    @rule(name=NAMES, repeat=st.booleans())
    def publish(self, name: str, repeat: bool) -> None:
        versions = self.twin.versions.setdefault(name, [])
        again = repeat and bool(versions)
        digest = versions[0] if again else digest_bytes(f"{name}{self.made}".encode())
        known = any(self.twin.there(name, number) for number, one in enumerate(versions, 1) if one == digest)
        self.made += 1
        wanted = VersionRecord(
            namespace="acme",
            name=name,
            number=0,
            digest=digest,
            base_digest=self.base.digest,
            base_model_id="base",
            task="",
            description="",
            tags=("t",),
            license="",
            kind="lora",
            op_kinds=("lowrank",),
            max_rank=1,
            size_bytes=1,
            servable=True,
            unservable_reason="",
            warnings=(),
            create_time_us=0,
            source_files=(),
        )
        done = self.run(self.stores.catalogue.publish(wanted, digest_bytes(b"tensors")))
        assert done.created is not known
        if not known:
            versions.append(digest)
            self.twin.position += 1
            assert done.version.record.number == len(versions)
            assert done.version.feed_position == self.twin.position

    @rule(name=NAMES, alias=ALIASES, number=st.integers(1, 4), expected=EXPECTED)
    def point(self, name: str, alias: str, number: int, expected: int | None) -> None:
        generation = self.twin.generation(name, alias)
        legal = self.twin.there(name, number) and expected in (None, generation)
        legal = legal and not self.twin.revoked(name, number)
        legal = legal and (name, alias) not in self.twin.protected
        request = MoveRequest(AliasName(AdapterName("acme", name), alias), expected)
        self._move(legal, name, alias, number, self.stores.aliases.point(request, number))

    @rule(name=NAMES, alias=ALIASES, expected=EXPECTED)
    def roll_back(self, name: str, alias: str, expected: int | None) -> None:
        moves = self.twin.moves.get((name, alias), [])
        earlier = [number for number in moves if number != moves[-1]]
        generation = self.twin.generation(name, alias)
        legal = bool(earlier) and generation > 0 and expected in (None, generation)
        legal = legal and (name, alias) not in self.twin.protected
        request = MoveRequest(AliasName(AdapterName("acme", name), alias), expected)
        number = earlier[-1] if earlier else 0
        legal = legal and self.twin.there(name, number) and not self.twin.revoked(name, number)
        self._move(legal, name, alias, number, self.stores.aliases.roll_back(request))

    @rule(name=NAMES, alias=ALIASES, protected=st.booleans())
    def protect(self, name: str, alias: str, protected: bool) -> None:
        legal = self.twin.generation(name, alias) > 0
        request = MoveRequest(AliasName(AdapterName("acme", name), alias))
        number = self.twin.moves[name, alias][-1] if legal else 0
        self._move(legal, name, alias, number, self.stores.aliases.protect(request, protected=protected))
        if legal:
            (self.twin.protected.add if protected else self.twin.protected.discard)((name, alias))

    @rule(name=NAMES, alias=ALIASES, acknowledge=st.booleans())
    def delete_alias(self, name: str, alias: str, acknowledge: bool) -> None:
        key = (name, alias)
        legal = self.twin.generation(name, alias) > 0 and (acknowledge or key not in self.twin.protected)
        request = MoveRequest(AliasName(AdapterName("acme", name), alias), acknowledge_protection=acknowledge)
        number = self.twin.moves[key][-1] if legal else 0
        self._move(legal, name, alias, number, self.stores.aliases.delete(request))
        if legal:
            self.twin.gone.add(key)
            self.twin.protected.discard(key)

    def _move(self, legal: bool, name: str, alias: str, number: int, work: Any) -> None:
        if not legal:
            with pytest.raises(MeshError):
                self.run(work)
            return
        record, position = self.run(work)
        moves = self.twin.moves.setdefault((name, alias), [])
        moves.append(number)
        self.twin.gone.discard((name, alias))
        self.twin.position += 1
        assert (record.version_number, record.generation) == (number, len(moves))
        assert record.digest == self.twin.versions[name][number - 1]
        assert position == self.twin.position

    @rule(name=NAMES, number=st.integers(1, 3), state=st.sampled_from(VersionState), expected=EXPECTED)
    def set_status(self, name: str, number: int, state: VersionState, expected: int | None) -> None:
        states = self.twin.states.get((name, number), [])
        legal = self.twin.there(name, number) and expected in (None, len(states))
        request = StatusRequest(AdapterName("acme", name), number, state, "because", "", expected)
        if not legal:
            with pytest.raises(MeshError):
                self.run(self.stores.statuses.set(request))
            return
        version, position = self.run(self.stores.statuses.set(request))
        self.twin.states[name, number] = [*states, state]
        self.twin.position += 1
        assert (version.status.state, version.status.generation) == (state, len(states) + 1)
        assert position == self.twin.position

    @rule(name=NAMES, number=st.integers(1, 4), right=st.booleans())
    def delete_version(self, name: str, number: int, right: bool) -> None:
        legal = self.twin.there(name, number) and not self.twin.pointed(name, number) and right
        digest = self.twin.versions[name][number - 1] if legal else digest_bytes(b"another")
        work = self.stores.removals.delete(RemovalRequest(AdapterName("acme", name), number, digest))
        if not legal:
            with pytest.raises(MeshError):
                self.run(work)
            return
        deleted, position = self.run(work)
        self.twin.deleted.add((name, number))
        self.twin.position += 1
        assert (deleted.number, deleted.digest, position) == (number, digest, self.twin.position)

    @rule(task=TASKS, weight=st.integers(1, 3))
    def set_route(self, task: str, weight: int) -> None:
        wanted = RouteRecord("*", task, (RouteTarget("base", weight, ""),), 0, 0)
        _, position = self.run(self.stores.routes.set(wanted, None))
        self.twin.routes[task] = weight
        self.twin.position += 1
        assert position == self.twin.position

    @rule(task=TASKS)
    def delete_route(self, task: str) -> None:
        if task not in self.twin.routes:
            with pytest.raises(MeshError):
                self.run(self.stores.routes.delete("*", task))
            return
        self.run(self.stores.routes.delete("*", task))
        del self.twin.routes[task]
        self.twin.position += 1

    @rule()
    def restart(self) -> None:
        self.run(self.stores.close())
        self.run(self._open())

    @rule()
    def follow(self) -> None:
        self.run(self.follower.catch_up(self.stores))

    @invariant()
    def a_snapshot_is_the_state_and_so_is_an_older_snapshot_with_the_feed(self) -> None:
        if not hasattr(self, "follower"):
            return
        fresh = Follower()
        self.run(fresh.take_snapshot(self.stores))
        assert fresh.position == self.twin.position
        routes = {
            record.task: record.targets[0].weight
            for record in fresh.state.values()
            if isinstance(record, RouteRecord)
        }
        assert routes == self.twin.routes
        late = Follower()
        late.state, late.feed_id = dict(self.follower.state), self.follower.feed_id
        late.position = self.follower.position
        self.run(late.catch_up(self.stores))
        assert late.state == fresh.state

    @invariant()
    def an_adapter_is_listed_and_found_by_the_newest_version_that_is_there(self) -> None:
        if not hasattr(self, "follower"):
            return
        wanted = {}
        for name, versions in self.twin.versions.items():
            there = [number for number in range(1, len(versions) + 1) if self.twin.there(name, number)]
            if there:
                wanted[name] = (there[-1], len(there))
        listed = self.run(self.stores.listing.list(AdapterQuery(), PageRequest())).items
        found = self.run(self.stores.search.find(SearchQuery("acme", tags=("t",)), PageRequest())).items
        for summaries in (listed, found):
            assert {one.newest.name: (one.newest.number, one.version_count) for one in summaries} == wanted

    @invariant()
    def the_history_has_every_move(self) -> None:
        if not hasattr(self, "follower"):
            return
        for (name, alias), moves in self.twin.moves.items():
            wanted = AliasName(AdapterName("acme", name), alias)
            page = self.run(self.stores.aliases.history(wanted, PageRequest()))
            assert [move.version_number for move in reversed(page.items)] == moves


@contextmanager
def sqlite_file(folder: Path) -> Iterator[str]:
    yield f"sqlite+aiosqlite:///{folder}/catalogue.db"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_any_mutations_leave_state_history_feed_and_snapshots_in_agreement(
    kind: str, request: pytest.FixtureRequest
) -> None:
    def machine() -> StoreMachine:
        if kind == "sqlite":
            return StoreMachine(sqlite_file)
        server = request.getfixturevalue("postgres_server")
        return StoreMachine(lambda _: server.database(MIGRATED))

    limits = settings(
        max_examples=15,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(cast("type[StoreMachine]", machine), settings=limits)
