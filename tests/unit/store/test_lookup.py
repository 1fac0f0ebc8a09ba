"""Refs are looked up in one query; what one store changes, another one's next lookup sees."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy import text

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.core.refs import AdapterName, parse_ref
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.lookup import Lookup
from adaptermesh.store.statuses import StatusRequest
from adaptermesh.store.stores import StoreConfig, Stores
from tests.contract.store.test_catalogue import BASE, TENSORS, version

NER = AdapterName("acme", "ner")


@pytest.fixture
async def both(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Stores, Stores]]:
    async with AsyncExitStack() as around:
        opened = []
        for number in range(2):
            config = StoreConfig(tmp_path / str(number), DatabaseConfig(database_url))
            stores = Stores(config, SystemClock())
            around.push_async_callback(stores.close)
            await stores.open()
            opened.append(stores)
        await opened[0].catalogue.register_base_model(BASE)
        for seed in range(3):
            await opened[0].catalogue.publish(version(seed), TENSORS)
        yield opened[0], opened[1]


def move(alias: str) -> MoveRequest:
    return MoveRequest(AliasName(NER, alias), None, "me", "why")


async def number(stores: Stores, ref: str) -> int:
    found, _ = await stores.catalogue.resolve(parse_ref(ref))
    return found.record.number


async def test_an_alias_that_another_store_moved_is_followed_at_once(both: tuple[Stores, Stores]) -> None:
    one, other = both
    for target in (1, 3, 2):
        await one.aliases.point(move("prod"), target)
        assert await number(other, "acme/ner@prod") == target


async def test_a_version_that_another_store_revoked_is_refused_at_once_and_comes_back(
    both: tuple[Stores, Stores],
) -> None:
    one, other = both
    assert await number(other, "acme/ner:v2") == 2
    await one.statuses.set(StatusRequest(NER, 2, VersionState.REVOKED, "bad"))
    with pytest.raises(MeshError) as caught:
        await number(other, "acme/ner:v2")
    assert caught.value.reason is Reason.VERSION_REVOKED
    found, _ = await other.catalogue.resolve(parse_ref("acme/ner:v2"), include_unusable=True)
    assert found.record.status.reason == "bad"
    await one.statuses.set(StatusRequest(NER, 2, VersionState.ACTIVE))
    assert await number(other, "acme/ner:v2") == 2


async def test_only_aliases_that_hold_now_are_named_in_order(both: tuple[Stores, Stores]) -> None:
    one, other = both
    for alias, target in (("prod", 1), ("canary", 2), ("beta", 2), ("prod", 2), ("beta", 3)):
        await one.aliases.point(move(alias), target)
    await one.aliases.point(move("gone"), 2)
    await one.aliases.delete(move("gone"))
    assert (await other.catalogue.resolve(parse_ref("acme/ner:v2")))[1] == ("canary", "prod")
    assert (await other.catalogue.resolve(parse_ref("acme/ner:v1")))[1] == ()


async def test_a_digest_means_a_version_only_under_its_own_name(both: tuple[Stores, Stores]) -> None:
    one, _ = both
    await one.catalogue.publish(version(9, name="sql"), TENSORS)
    digest = version(1).digest
    assert await number(one, f"acme/ner@{digest}") == 2
    with pytest.raises(MeshError) as caught:
        await number(one, f"acme/sql@{digest}")
    assert caught.value.reason is Reason.VERSION_NOT_FOUND


async def test_no_table_of_the_large_ones_is_read_from_end_to_end(tmp_path: Path) -> None:
    """Whatever the planner knows of the tables: nothing, here."""
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    stores = Stores(StoreConfig(tmp_path, DatabaseConfig(url)), SystemClock())
    await stores.open()
    plans = []
    async with stores.database.reading() as connection:
        for sql in Lookup(stores.database).statements:
            words = text(f"EXPLAIN QUERY PLAN {sql.replace('?', 'NULL')}")
            plans += [row.detail for row in await connection.execute(words)]
    await stores.close()
    assert plans
    assert [step for step in plans if step.startswith("SCAN")] == []
    # The history of an alias has no bound.
    assert [step for step in plans if "alias_moves" in step and "generation=?" not in step] == []
