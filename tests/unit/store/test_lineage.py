"""What an upload says it was made from: checked against the catalogue, kept in the manifest."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason


def recipe_json(*digests: str, **changes: Any) -> str:
    members = [{"digest": digest, "weight": 1} for digest in digests]
    return json.dumps({"method": "linear", "members": members, **changes})


async def test_parents_and_recipe_are_kept_in_the_manifest(store: Any, kit: Any, publish: Any) -> None:
    one, two = [version.digest for version in await publish(seeds=(1, 2))]
    done = await store.upload(
        kit.make_files(3), name="merged", parents=[one, two], merge_recipe_json=recipe_json(one, two)
    )
    resolved = await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref="acme/merged:v1"))
    manifest = Manifest.from_bytes(resolved.manifest)
    assert manifest.digest == done.version.digest
    assert manifest.parents == (one, two)
    assert manifest.merge_recipe == {
        "method": "linear",
        "members": [{"digest": one, "weight": 1.0}, {"digest": two, "weight": 1.0}],
        "rank": None,
        "density": None,
        "seed": None,
    }


async def test_the_same_files_with_other_parents_are_another_version(
    store: Any, kit: Any, publish: Any
) -> None:
    (one,) = await publish(seeds=(1,))
    plain = await store.upload(kit.make_files(3), name="merged")
    child = await store.upload(kit.make_files(3), name="merged", parents=[one.digest])
    again = await store.upload(kit.make_files(3), name="merged", parents=[one.digest])
    assert (child.created, child.version.number, again.created) == (True, 2, False)
    assert child.version.digest != plain.version.digest


async def test_a_parent_that_is_not_there_is_not_found(store: Any, kit: Any) -> None:
    unknown = digest_bytes(b"nobody")
    async with kit.refused() as errors:
        await store.upload(kit.make_files(), parents=[unknown])
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
    assert unknown in errors[0].message
    assert store.left_files() == []


async def test_a_parent_of_another_base_is_refused_with_both_digests(store: Any, kit: Any) -> None:
    other = kit.base_model(name="other", weights="others")
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=other))
    parent = (await store.upload(kit.make_files(1), base_model="other")).version
    kept = store.left_files()
    async with kit.refused() as errors:
        await store.upload(kit.make_files(2), parents=[parent.digest])
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert "acme/ner:v1" in errors[0].message
    assert {other.digest, kit.base_model().digest} <= set(errors[0].metadata.values())
    assert store.left_files() == kept


BAD_LINEAGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "no_digest": lambda one: {"parents": ["acme/ner:v1"]},
    "twice": lambda one: {"parents": [one, one]},
    "too_many": lambda one: {"parents": [digest_bytes(bytes([n])) for n in range(33)]},
    "no_json": lambda one: {"parents": [one], "merge_recipe_json": "{"},
    "no_parent": lambda one: {"merge_recipe_json": recipe_json(one)},
    "unknown_key": lambda one: {"parents": [one], "merge_recipe_json": recipe_json(one, by="me")},
    "rank_for_nothing": lambda one: {"parents": [one], "merge_recipe_json": recipe_json(one, rank=4)},
    "too_long": lambda one: {"parents": [one], "merge_recipe_json": recipe_json(one) + " " * 16384},
}


@pytest.mark.parametrize("kind", BAD_LINEAGES)
async def test_a_lineage_that_can_not_be_is_refused(store: Any, kit: Any, publish: Any, kind: str) -> None:
    (one,) = await publish(seeds=(1,))
    async with kit.refused() as errors:
        await store.upload(kit.make_files(2), **BAD_LINEAGES[kind](one.digest))
    assert (errors[0].code, errors[0].reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert errors[0].metadata["field"] in {"parents", "merge_recipe", "rank"}


async def test_a_parent_is_looked_up_by_its_digest_alone_whatever_its_status(
    store: Any, kit: Any, publish: Any
) -> None:
    (one,) = await publish(seeds=(1,))
    await store.stub.SetVersionStatus(
        store_pb2.SetVersionStatusRequest(
            namespace="acme",
            name="ner",
            version_number=1,
            state=adapter_pb2.VERSION_STATE_REVOKED,
            reason="bad data",
        )
    )
    request = store_pb2.ResolveRefRequest(digest=one.digest, include_unusable=True)
    found = await store.stub.ResolveRef(request)
    assert (found.version.number, found.version.status.reason) == (1, "bad data")
    for wrong, reason in (
        ({"digest": one.digest}, Reason.VERSION_REVOKED),
        ({"digest": one.digest, "ref": "acme/ner:v1"}, Reason.INVALID_FIELD),
        ({"digest": digest_bytes(b"nobody")}, Reason.VERSION_NOT_FOUND),
        ({}, Reason.INVALID_REF),
    ):
        async with kit.refused() as errors:
            await store.stub.ResolveRef(store_pb2.ResolveRefRequest(**wrong))
        assert errors[0].reason is reason
