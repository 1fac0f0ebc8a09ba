"""Keys: made once, valid for a while, ended for good."""

import datetime
from typing import Any

import pytest

from adaptermesh.client import MeshError, StoreClient
from adaptermesh.core.errors import Code, Reason
from adaptermesh.core.roles import Role
from adaptermesh.testing.polling import eventually


async def test_a_key_is_told_once_and_listed_without_its_secret(
    root: StoreClient, guarded: Any, key_for: Any
) -> None:
    made = await root.create_api_key(
        [Role.PUBLISHER, Role.DEPLOYER], tenant="acme", comment="CI", actor="ada"
    )
    assert made.secret.startswith(made.key.key_id)
    assert made.secret not in repr(made)
    admin = await key_for("acme", Role.ADMIN)
    listed = {key.key_id: key for key in await admin.list_api_keys()}
    key = listed[made.key.key_id]
    assert (key.roles, key.comment, key.actor) == ((Role.DEPLOYER, Role.PUBLISHER), "CI", "ada")
    assert key.expire_time is key.revoke_time is key.last_use_time is None
    async with guarded.stores.database.reading() as connection:
        kept = (await connection.exec_driver_sql("SELECT * FROM api_keys")).all()
        fed = (await connection.exec_driver_sql("SELECT body FROM changes")).all()
    assert made.secret.rpartition("_")[2] not in f"{kept} {fed}"
    assert "scrypt$" not in f"{fed}"


async def test_the_last_use_of_a_key_is_seen(root: StoreClient, key_for: Any, kit: Any) -> None:
    reader = await key_for("acme", Role.READER)
    caller = await reader.caller()
    assert (caller.tenant, caller.roles) == ("acme", (Role.READER,))

    async def used() -> bool:
        keys = await root.list_api_keys("acme")
        return keys[0].key_id == caller.key_id and keys[0].last_use_time is not None

    await eventually(used, within=20)


async def test_a_revoked_key_ends_at_once_and_for_good(root: StoreClient, key_for: Any) -> None:
    reader = await key_for("acme", Role.READER)
    key_id = (await reader.caller()).key_id
    change = await root.revoke_api_key(key_id)
    assert change.key.revoke_time is not None
    with pytest.raises(MeshError, match=f"{key_id} is revoked") as caught:
        await reader.caller()
    assert (caught.value.code, caught.value.reason) == (Code.UNAUTHENTICATED, Reason.KEY_INVALID)
    assert (await root.revoke_api_key(key_id)).feed_position == 0
    with pytest.raises(MeshError) as caught:
        await root.revoke_api_key("amk_nothere1")
    assert caught.value.reason is Reason.KEY_NOT_FOUND


async def test_a_key_expires(
    root: StoreClient, key_for: Any, guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = await key_for("acme", Role.READER, ttl=datetime.timedelta(hours=1))
    await reader.caller()
    clock = guarded.stores.authentication._clock  # the store's own
    later = clock.wall() + 3601
    monkeypatch.setattr(clock, "wall", lambda: later)
    with pytest.raises(MeshError, match="has expired"):
        await reader.caller()


async def test_a_key_of_another_tenant_is_as_if_it_were_not_there(root: StoreClient, key_for: Any) -> None:
    theirs = await root.create_api_key([Role.READER], tenant="other")
    admin = await key_for("acme", Role.ADMIN)
    with pytest.raises(MeshError) as caught:
        await admin.revoke_api_key(theirs.key.key_id)
    assert caught.value.reason is Reason.KEY_NOT_FOUND
    with pytest.raises(MeshError, match="may not administer"):
        await admin.list_api_keys("other")
    assert {key.tenant for key in await admin.list_api_keys()} == {"acme"}


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"tenant": "nobody"}, Reason.TENANT_NOT_FOUND),
        ({"tenant": "No Name"}, Reason.INVALID_NAME),
        ({"roles": []}, Reason.INVALID_FIELD),
        ({"namespaces": ["a"] * 33}, Reason.INVALID_FIELD),
        ({"namespaces": ["no name"]}, Reason.INVALID_NAME),
        ({"ttl": datetime.timedelta(0)}, Reason.INVALID_FIELD),
        ({"ttl": datetime.timedelta(days=40_000)}, Reason.INVALID_FIELD),
        ({"comment": "x" * 1025}, Reason.INVALID_FIELD),
    ],
)
async def test_a_key_that_makes_no_sense_is_refused(
    root: StoreClient, wanted: dict[str, Any], reason: Reason
) -> None:
    values = {"roles": [Role.READER], "tenant": "acme", **wanted}
    with pytest.raises(MeshError) as caught:
        await root.create_api_key(**values)
    assert caught.value.reason is reason


async def test_a_wrong_secret_of_a_known_key_is_refused_also_after_the_right_one(
    connect: Any, root: StoreClient
) -> None:
    made = await root.create_api_key([Role.READER], tenant="acme")
    right, wrong = made.secret, made.secret[:-2] + ("aa" if made.secret[-2:] != "aa" else "bb")
    assert (await connect(right).caller()).key_id == made.key.key_id
    for _ in range(2):
        with pytest.raises(MeshError, match="none of this store's"):
            await connect(wrong).caller()
