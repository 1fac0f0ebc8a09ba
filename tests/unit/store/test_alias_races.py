"""Two stores that change one alias at once, against a plain twin: one order explains every answer.

The changes that were made have an order, that of their feed positions. One after the other they must do to
the twin what the stores say they did; and what was refused must be refused by the twin too, for the same
reason, at some point of that order.
"""

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
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

from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.core.refs import AdapterName, parse_ref
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.records import AliasRecord
from adaptermesh.store.statuses import StatusRequest
from adaptermesh.store.stores import StoreConfig, Stores
from tests.contract.store.test_catalogue import BASE, TENSORS, changes, version
from tests.postgres import MIGRATED

ADAPTER = AdapterName("acme", "ner")
PROD = AliasName(ADAPTER, "prod")
VERSIONS = 3


@dataclass(frozen=True)
class Operation:
    """One change that is asked for."""

    kind: str
    """point, roll back, protect, unprotect, delete."""
    expects: int | None
    """The generation on which it rests, counted from the one before the race; None: any."""
    number: int
    acknowledge: bool
    store: int


@dataclass(frozen=True)
class Twin:
    """An alias in plain form. `history` has what each change did, and the version it left."""

    history: tuple[tuple[AliasAction, int], ...] = ()
    there: bool = False
    protected: bool = False
    revoked: frozenset[int] = frozenset()

    @property
    def generation(self) -> int:
        return len(self.history) if self.there else 0

    @property
    def number(self) -> int:
        return self.history[-1][1] if self.there else 0

    def after(self, operation: Operation, expected: int | None) -> "Twin | Reason":
        """The twin after the change, or why it is refused."""
        if operation.kind != "point" and not self.there:
            return Reason.ALIAS_NOT_FOUND
        if expected not in (None, self.generation):
            return Reason.ALIAS_CONFLICT
        if operation.kind in ("protect", "unprotect"):
            return self._with(PROTECTION[operation.kind], self.number, operation.kind == "protect")
        if self.protected and not operation.acknowledge:
            return Reason.ALIAS_PROTECTED
        if operation.kind == "delete":
            deleted = self._with(AliasAction.DELETED, self.number, self.protected)
            return dataclasses.replace(deleted, there=False, protected=False)
        return self._moved(operation)

    def _moved(self, operation: Operation) -> "Twin | Reason":
        number = operation.number
        if operation.kind == "roll back":
            earlier = [number for _, number in self.history if number != self.number]
            if not earlier:
                return Reason.ALIAS_NO_PREVIOUS
            number = earlier[-1]
        if number > VERSIONS:
            return Reason.VERSION_NOT_FOUND
        if number in self.revoked:
            return Reason.VERSION_REVOKED
        return self._with(AliasAction.SET, number, self.protected)

    def _with(self, action: AliasAction, number: int, protected: bool) -> "Twin":
        history = (*self.history, (action, number))
        return dataclasses.replace(self, history=history, there=True, protected=protected)


PROTECTION = {"protect": AliasAction.PROTECTED, "unprotect": AliasAction.UNPROTECTED}

operations = st.builds(
    Operation,
    kind=st.sampled_from(["point", "point", "roll back", "protect", "unprotect", "delete"]),
    expects=st.sampled_from([0, 0, 0, None, 1, 2]),
    number=st.integers(1, VERSIONS + 1),
    acknowledge=st.booleans(),
    store=st.integers(0, 1),
)
Outcome = tuple[AliasRecord, int] | MeshError


class AliasMachine(RuleBasedStateMachine):
    def __init__(self, databases: Callable[[], AbstractContextManager[str]]) -> None:
        super().__init__()
        self.databases = databases

    @initialize()
    def start(self) -> None:
        self.around = ExitStack()
        folder = Path(self.around.enter_context(tempfile.TemporaryDirectory()))
        database = DatabaseConfig(self.around.enter_context(self.databases()))
        self.runner = self.around.enter_context(asyncio.Runner())
        self.stores = [Stores(StoreConfig(folder / str(n), database), SystemClock()) for n in range(2)]
        self.twin = Twin()
        self.run(self._prepare())
        self.position = 1 + VERSIONS

    async def _prepare(self) -> None:
        for stores in self.stores:
            await stores.open()
        await self.stores[0].catalogue.register_base_model(BASE)
        for seed in range(VERSIONS):
            await self.stores[0].catalogue.publish(version(seed, name="ner"), TENSORS)

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "twin"):
            for stores in self.stores:
                self.run(stores.close())
            self.around.close()

    @rule(wanted=st.lists(operations, min_size=2, max_size=6))
    def race(self, wanted: list[Operation]) -> None:
        """All of them at once."""
        expected = [None if one.expects is None else self.twin.generation + one.expects for one in wanted]
        outcomes = self.run(self._race(wanted, expected))
        asked = list(zip(wanted, expected, strict=True))
        made = [(asked[n], done) for n, done in enumerate(outcomes) if not isinstance(done, MeshError)]
        made.sort(key=lambda one: one[1][1])
        states = [self.twin]
        for (operation, generation), (record, position) in made:
            self.position += 1
            assert position == self.position
            after = states[-1].after(operation, generation)
            assert isinstance(after, Twin), (operation, after)
            assert_says(record, after)
            states.append(after)
        for (operation, generation), done in zip(asked, outcomes, strict=True):
            if isinstance(done, MeshError):
                assert done.reason in [state.after(operation, generation) for state in states], operation
        self.twin = states[-1]

    @rule(number=st.integers(1, VERSIONS), acknowledge=st.booleans())
    def compare_and_set(self, number: int, acknowledge: bool) -> None:
        """All rest on the same state: exactly one wins, unless none may."""
        one = Operation("point", 0, number, acknowledge, 0)
        legal = isinstance(self.twin.after(one, self.twin.generation), Twin)
        before = self.position
        self.race([dataclasses.replace(one, store=n % 2) for n in range(4)])
        assert self.position - before == legal

    @rule(number=st.integers(1, VERSIONS), revoked=st.booleans())
    def revoke(self, number: int, revoked: bool) -> None:
        state = VersionState.REVOKED if revoked else VersionState.ACTIVE
        request = StatusRequest(ADAPTER, number, state, "because", "", None)
        self.run(self.stores[number % 2].statuses.set(request))
        self.position += 1
        change = frozenset.union if revoked else frozenset.difference
        self.twin = dataclasses.replace(self.twin, revoked=change(self.twin.revoked, {number}))

    async def _race(self, wanted: list[Operation], expected: list[int | None]) -> list[Outcome]:
        calls = (self._call(one, generation) for one, generation in zip(wanted, expected, strict=True))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, MeshError):
                raise outcome
        return cast("list[Outcome]", outcomes)

    async def _call(self, one: Operation, expected: int | None) -> tuple[AliasRecord, int]:
        aliases = self.stores[one.store].aliases
        request = MoveRequest(PROD, expected, one.kind, acknowledge_protection=one.acknowledge)
        if one.kind == "point":
            return await aliases.point(request, one.number)
        if one.kind == "roll back":
            return await aliases.roll_back(request)
        if one.kind == "delete":
            return await aliases.delete(request)
        return await aliases.protect(request, protected=one.kind == "protect")

    @invariant()
    def both_stores_say_what_the_twin_says(self) -> None:
        if hasattr(self, "twin"):
            for stores in self.stores:
                self.run(self._assert_same(stores))

    async def _assert_same(self, stores: Stores) -> None:
        history = []
        if self.twin.history:
            page = await stores.aliases.history(PROD, PageRequest(1000))
            history = [(move.action, move.version_number) for move in reversed(page.items)]
        assert history == list(self.twin.history)
        try:
            found, names = await stores.catalogue.resolve(parse_ref(str(PROD)), include_unusable=True)
            assert (found.record.number, names) == (self.twin.number, ("prod",))
        except MeshError as error:
            assert error.reason is Reason.ALIAS_NOT_FOUND
            assert not self.twin.there
        async for item in stores.snapshots.read():
            feed_id = item.feed_id
        positions = [change.position for change in await changes(stores, feed_id)]
        assert positions == list(range(1, self.position + 1))


def assert_says(record: AliasRecord, after: Twin) -> None:
    action, number = after.history[-1]
    assert (record.action, record.version_number) == (action, number)
    assert record.generation == len(after.history)
    assert record.digest == version(number - 1, name="ner").digest
    # Of a removal: as it was before.
    assert record.protected == after.protected or action is AliasAction.DELETED


def test_of_any_changes_that_race_at_two_stores_each_is_made_or_refused_as_if_they_had_come_one_by_one(
    request: pytest.FixtureRequest,
) -> None:
    server = request.getfixturevalue("postgres_server")

    def machine() -> AliasMachine:
        return AliasMachine(lambda: server.database(MIGRATED))

    limits = settings(
        max_examples=8,
        stateful_step_count=10,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(cast("type[AliasMachine]", machine), settings=limits)
