"""The change feed and its snapshots as protocol buffers."""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.store import wire
from adaptermesh.store.access import wire as access_wire
from adaptermesh.store.access.records import ApiKeyRecord, GrantRecord, NamespaceRecord, TenantRecord
from adaptermesh.store.feed import FeedStatus
from adaptermesh.store.records import (
    AliasRecord,
    BaseModelRecord,
    Change,
    DeletedVersion,
    PolicyRecord,
    RouteRecord,
    VersionRecord,
)
from adaptermesh.store.snapshot import SnapshotItem

_MESSAGES: Mapping[type, Callable[[Any], Message]] = {
    BaseModelRecord: wire.base_model_to,
    VersionRecord: wire.version_to,
    DeletedVersion: wire.deleted_to,
    AliasRecord: wire.alias_to,
    PolicyRecord: wire.policy_to,
    RouteRecord: wire.route_to,
    TenantRecord: access_wire.tenant_to,
    NamespaceRecord: access_wire.namespace_to,
    GrantRecord: access_wire.grant_to,
    ApiKeyRecord: access_wire.key_to,
}
_SNAPSHOT_FIELDS: Mapping[type, str] = {
    BaseModelRecord: "base_models",
    VersionRecord: "versions",
    DeletedVersion: "deleted_versions",
    AliasRecord: "aliases",
    PolicyRecord: "policies",
    RouteRecord: "routes",
    NamespaceRecord: "namespaces",
    GrantRecord: "grants",
}


def feed_status_to(status: FeedStatus) -> store_pb2.GetFeedStatusResponse:
    oldest_us = status.oldest_commit_time_us
    return store_pb2.GetFeedStatusResponse(
        feed_id=status.feed_id,
        head_position=status.head_position,
        trimmed_position=status.trimmed_position,
        oldest_commit_time=None if oldest_us is None else wire.time_to(oldest_us),
        watchers=status.watchers,
    )


def add_to_part(part: store_pb2.GetSnapshotResponse, item: SnapshotItem) -> int:
    """Adds one record to a part of a snapshot; returns its size in bytes."""
    part.feed_id = item.feed_id
    part.feed_position = item.feed_position
    if item.record is None:
        return 0
    kind = type(item.record)
    message = _MESSAGES[kind](item.record)
    getattr(part, _SNAPSHOT_FIELDS[kind]).append(message)
    return message.ByteSize()


def change_to(change: Change) -> store_pb2.Change:
    message = store_pb2.Change(position=change.position, commit_time=wire.time_to(change.commit_time_us))
    # The kinds are named as the fields of the oneof.
    getattr(message, change.kind.value).CopyFrom(_MESSAGES[type(change.record)](change.record))
    return message
