"""Namespaces belong to tenants, which have quotas; and what was changed is on record."""

import datetime
from typing import Any

import pytest

from adaptermesh.client import AuditQuery, MeshError, StoreClient
from adaptermesh.core.errors import Code, Reason
from adaptermesh.core.roles import Role


async def test_a_namespace_belongs_to_whose_tenant_uploads_first(
    root: StoreClient, key_for: Any, upload: Any
) -> None:
    first, second = await key_for("acme", Role.PUBLISHER), await key_for("other", Role.PUBLISHER)
    version = (await upload(first)).version
    with pytest.raises(MeshError, match="does not exist"):
        await upload(second, seed=2)
    (namespace,) = await first.list_namespaces()
    uploaded = sum(file.size_bytes for file in version.source_files)
    assert (namespace.name, namespace.tenant) == ("acme-ns", "acme")
    assert (namespace.usage.bytes, namespace.usage.versions) == (uploaded + version.size_bytes, 1)
    assert await second.list_namespaces() == []
    # The same again is the same version, and counted once.
    await upload(first)
    assert (await first.list_namespaces())[0].usage.versions == 1
    await root.set_namespace("acme-ns", "other")
    assert [one.tenant for one in await second.list_namespaces()] == ["other"]
    assert (await upload(second, seed=2)).created
    with pytest.raises(MeshError, match="does not exist"):
        await first.resolve("acme-ns/ner:v1")
    with pytest.raises(MeshError) as caught:
        await root.set_namespace("acme-ns", "nobody")
    assert caught.value.reason is Reason.TENANT_NOT_FOUND


async def test_a_namespace_can_be_given_away_before_there_is_anything_in_it(
    root: StoreClient, key_for: Any, upload: Any
) -> None:
    await root.set_namespace("acme-ns", "acme")
    other = await key_for("other", Role.ADMIN)
    with pytest.raises(MeshError, match="does not exist"):
        await upload(other)


@pytest.mark.parametrize(("quota", "fits"), [("max_versions", 2), ("max_bytes", 1)])
async def test_a_quota_stops_uploads_and_nothing_else(
    root: StoreClient, key_for: Any, upload: Any, quota: str, fits: int, guarded: Any
) -> None:
    publisher = await key_for("acme", Role.PUBLISHER)
    size = (await upload(publisher)).version
    one = size.size_bytes + sum(file.size_bytes for file in size.source_files)
    bounds: dict[str, Any] = {quota: fits if quota == "max_versions" else one * 2 - 1}
    await root.set_tenant("acme", **bounds)
    if quota == "max_versions":
        await upload(publisher, "elsewhere/ner", seed=2)
    left = guarded.left_files()
    with pytest.raises(MeshError) as caught:
        await upload(publisher, seed=3)
    error = caught.value
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED)
    assert error.metadata["tenant"] == "acme"
    assert guarded.left_files() == left
    await publisher.resolve("acme-ns/ner:v1")
    (tenant,) = await publisher.list_tenants()
    assert tenant.usage.versions == (2 if quota == "max_versions" else 1)
    await root.set_tenant("acme")
    assert (await upload(publisher, seed=3)).created


async def test_the_requests_of_a_tenant_are_bounded_each_minute(root: StoreClient, key_for: Any) -> None:
    reader = await key_for("acme", Role.READER)
    await root.set_tenant("acme", max_requests_per_minute=3)
    for _ in range(3):
        await reader.list_adapters()
    with pytest.raises(MeshError) as caught:
        await reader.list_adapters()
    assert (caught.value.reason, caught.value.metadata["limit"]) == (Reason.QUOTA_EXCEEDED, "3")
    assert 0 < (caught.value.retry_after or 0) <= 20
    await root.list_adapters()


async def test_a_tenant_changes_by_compare_and_set(root: StoreClient) -> None:
    tenant = (await root.set_tenant("more", expected_generation=0, actor="ada")).tenant
    assert (tenant.generation, tenant.actor) == (1, "ada")
    with pytest.raises(MeshError) as caught:
        await root.set_tenant("more", expected_generation=0)
    assert (caught.value.code, caught.value.reason) == (Code.ABORTED, Reason.TENANT_CONFLICT)
    assert (await root.set_tenant("more", max_bytes=5, expected_generation=1)).tenant.max_bytes == 5
    wrong: list[dict[str, Any]] = [{"max_bytes": -1}, {"actor": "x" * 300}]
    for refused in wrong:
        with pytest.raises(MeshError):
            await root.set_tenant("more", **refused)
    assert [one.name for one in await root.list_tenants()] == ["acme", "default", "more", "other"]


async def test_the_audit_log_tells_what_was_changed_by_which_key(
    root: StoreClient, key_for: Any, upload: Any
) -> None:
    admin, publisher = await key_for("acme", Role.ADMIN), await key_for("acme", Role.PUBLISHER)
    stranger = await key_for("other", Role.ADMIN)
    publisher_id = (await publisher.caller()).key_id
    await upload(publisher)
    await admin.set_alias("acme-ns/ner@prod", 1, actor="ada", comment="first")
    await admin.set_grant("acme-ns", "other", [Role.READER])
    entries = await admin.audit(AuditQuery(namespace="acme-ns"))
    assert [(entry.action, entry.subject) for entry in entries] == [
        ("grant_set", "acme-ns/* to other"),
        ("alias_set", "acme-ns/ner@prod"),
        ("version_published", "acme-ns/ner:v1"),
        ("namespace_set", "acme-ns"),
    ]
    assert {entry.tenant for entry in entries} == {"acme"}
    assert (entries[1].actor, entries[2].key_id, entries[2].key_tenant) == ("ada", publisher_id, "acme")
    assert [entry.subject for entry in await admin.audit(AuditQuery(subject_prefix="acme-ns/ner:"))] == [
        "acme-ns/ner:v1"
    ]
    assert [e.action for e in await admin.audit(AuditQuery(key_id=publisher_id))] == [
        "version_published",
        "namespace_set",
    ]
    assert len(await admin.audit(limit=2)) == 2
    later = datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(hours=1)
    assert await admin.audit(AuditQuery(from_time=later)) == []
    assert len(await root.audit(AuditQuery(until_time=later))) > len(entries)
    assert [e.action for e in await stranger.audit()] == ["api_key_set", "tenant_set"]
    feed = {entry.feed_position for entry in await root.audit(limit=1000)}
    assert feed == set(range(1, max(feed) + 1)), "every change has its entry"
