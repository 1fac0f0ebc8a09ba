"""Protocol buffers to the store's values and back."""

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.refs import AdapterName
from adaptermesh.rpc.alias_action import action_message
from adaptermesh.rpc.signature_policy import policy_message
from adaptermesh.rpc.version_state import state_message
from adaptermesh.store.access.records import GrantRecord, NamespaceRecord
from adaptermesh.store.access.wire import access_record_to, grant_to, namespace_to
from adaptermesh.store.facets import Facets
from adaptermesh.store.feed import FeedStatus
from adaptermesh.store.garbage import DEFAULT_GRACE_SECONDS, MAX_GRACE_SECONDS, GarbageReport
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.records import (
    AdapterSummary,
    AliasRecord,
    BaseModelRecord,
    Change,
    DeletedVersion,
    PolicyRecord,
    Record,
    RouteRecord,
    RouteTarget,
    Signature,
    SourceFile,
    VersionRecord,
    VersionStatus,
)
from adaptermesh.store.search_query import Order, SearchQuery
from adaptermesh.store.snapshot import SnapshotItem


def header_from(message: store_pb2.UploadHeader) -> UploadHeader:
    return UploadHeader(
        adapter=AdapterName(message.namespace, message.name),
        base_model=message.base_model,
        task=message.task,
        description=message.description,
        tags=tuple(message.tags),
        license=message.license,
        author=message.author,
        files=tuple(SourceFile(file.path, file.size_bytes, file.digest) for file in message.files),
        validate_only=message.validate_only,
        parents=tuple(message.parents),
        merge_recipe_json=message.merge_recipe_json,
        expected_digest=message.expected_digest,
    )


_ORDERS = {
    store_pb2.SEARCH_ORDER_UNSPECIFIED: None,
    store_pb2.SEARCH_ORDER_RELEVANCE: Order.RELEVANCE,
    store_pb2.SEARCH_ORDER_NEWEST: Order.NEWEST,
    store_pb2.SEARCH_ORDER_NAME: Order.NAME,
    store_pb2.SEARCH_ORDER_DOWNLOADS: Order.DOWNLOADS,
    store_pb2.SEARCH_ORDER_SCORE: Order.SCORE,
}


def search_from(message: store_pb2.SearchAdaptersRequest) -> SearchQuery:
    """Raises MeshError INVALID_FIELD for an order that is none."""
    if message.order not in _ORDERS:
        raise invalid_field("order", f"{message.order} is none of the orders")
    return SearchQuery(
        text=message.text,
        namespace=message.namespace,
        base_model=message.base_model,
        task=message.task,
        kind=message.kind,
        license=message.license,
        tags=tuple(message.tags),
        order=_ORDERS[message.order],
        language=message.language,
        tenant=message.tenant,
        score_metric=message.score_metric,
        lowest_score_first=message.lowest_score_first,
    )


def facets_to(facets: Facets) -> list[store_pb2.Facet]:
    return [
        store_pb2.Facet(
            field=field,
            values=[store_pb2.FacetValue(value=value, count=count) for value, count in values],
        )
        for field, values in facets.counts.items()
    ]


def base_model_from(message: adapter_pb2.BaseModel) -> BaseModelRecord:
    return BaseModelRecord(
        model_id=message.model_id,
        digest=message.digest,
        config_digest=message.config_digest,
        weights_digest=message.weights_digest,
        architecture=message.architecture,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        vocab_size=message.vocab_size,
        config_json=message.config_json,
    )


def base_model_to(record: BaseModelRecord) -> adapter_pb2.BaseModel:
    return adapter_pb2.BaseModel(
        model_id=record.model_id,
        digest=record.digest,
        config_digest=record.config_digest,
        weights_digest=record.weights_digest,
        architecture=record.architecture,
        hidden_size=record.hidden_size,
        num_layers=record.num_layers,
        vocab_size=record.vocab_size,
        config_json=record.config_json,
    )


def version_to(record: VersionRecord) -> adapter_pb2.Version:
    files = (
        adapter_pb2.SourceFile(path=file.path, size_bytes=file.size_bytes, digest=file.digest)
        for file in record.source_files
    )
    return adapter_pb2.Version(
        namespace=record.namespace,
        name=record.name,
        number=record.number,
        digest=record.digest,
        base_digest=record.base_digest,
        base_model_id=record.base_model_id,
        task=record.task,
        description=record.description,
        tags=record.tags,
        license=record.license,
        kind=record.kind,
        op_kinds=record.op_kinds,
        max_rank=record.max_rank,
        size_bytes=record.size_bytes,
        servable=record.servable,
        unservable_reason=record.unservable_reason,
        warnings=record.warnings,
        create_time=_time(record.create_time_us) if record.number else None,
        source_files=files,
        status=status_to(record.status),
        signing_key_ids=[signature.key_id for signature in record.signatures],
    )


def status_to(status: VersionStatus) -> adapter_pb2.VersionStatus:
    return adapter_pb2.VersionStatus(
        state=state_message(status.state),
        reason=status.reason,
        replacement=status.replacement,
        generation=status.generation,
        update_time=_time(status.update_time_us) if status.generation else None,
        actor=status.actor,
    )


def deleted_to(record: DeletedVersion) -> adapter_pb2.DeletedVersion:
    return adapter_pb2.DeletedVersion(
        namespace=record.namespace,
        name=record.name,
        number=record.number,
        digest=record.digest,
        delete_time=_time(record.delete_time_us),
        actor=record.actor,
        reason=record.reason,
    )


def alias_to(record: AliasRecord) -> adapter_pb2.Alias:
    return adapter_pb2.Alias(
        namespace=record.namespace,
        name=record.name,
        alias=record.alias,
        version_number=record.version_number,
        digest=record.digest,
        generation=record.generation,
        update_time=_time(record.update_time_us),
        actor=record.actor,
        comment=record.comment,
        protected=record.protected,
        action=action_message(record.action),
    )


def policy_to(record: PolicyRecord) -> adapter_pb2.NamespacePolicy:
    keys = (
        adapter_pb2.SigningKey(
            key_id=key.key_id,
            public_key=bytes.fromhex(key.public_key),
            comment=key.comment,
            actor=key.actor,
            create_time=_time(key.create_time_us),
        )
        for key in record.keys
    )
    return adapter_pb2.NamespacePolicy(
        namespace=record.namespace,
        signatures=policy_message(record.signatures),
        keys=keys,
        generation=record.generation,
        update_time=_time(record.update_time_us) if record.generation else None,
        actor=record.actor,
    )


def signature_to(signature: Signature, *, trusted: bool) -> adapter_pb2.Signature:
    return adapter_pb2.Signature(
        key_id=signature.key_id,
        signature=bytes.fromhex(signature.signature),
        actor=signature.actor,
        create_time=_time(signature.create_time_us),
        trusted=trusted,
    )


def route_from(message: adapter_pb2.Route) -> RouteRecord:
    targets = tuple(RouteTarget(target.ref, target.weight, target.cohort) for target in message.targets)
    return RouteRecord(message.tenant, message.task, targets, generation=0, update_time_us=0)


def route_to(record: RouteRecord) -> adapter_pb2.Route:
    targets = (
        adapter_pb2.RouteTarget(ref=target.ref, weight=target.weight, cohort=target.cohort)
        for target in record.targets
    )
    return adapter_pb2.Route(
        tenant=record.tenant,
        task=record.task,
        targets=targets,
        generation=record.generation,
        update_time=_time(record.update_time_us),
    )


def summary_to(summary: AdapterSummary) -> store_pb2.AdapterSummary:
    return store_pb2.AdapterSummary(
        newest=version_to(summary.newest),
        version_count=summary.version_count,
        aliases=[alias_to(alias) for alias in summary.aliases],
        unusable_numbers=summary.unusable_numbers,
        download_count=summary.download_count,
    )


def grace_from(request: store_pb2.CollectGarbageRequest) -> float:
    """In seconds; raises MeshError INVALID_FIELD."""
    if not request.HasField("grace"):
        return DEFAULT_GRACE_SECONDS
    seconds = request.grace.seconds + request.grace.nanos / 1e9
    if not 0 <= seconds <= MAX_GRACE_SECONDS:
        raise invalid_field("grace", "must be between 0 and 10 years")
    return seconds


def garbage_to(report: GarbageReport) -> store_pb2.CollectGarbageResponse:
    return store_pb2.CollectGarbageResponse(
        removed_blobs=report.removed_blobs,
        removed_bytes=report.removed_bytes,
        needed_blobs=report.needed_blobs,
        young_blobs=report.young_blobs,
        unfinished_uploads=report.unfinished_uploads,
        expired_uploads=report.expired_uploads,
    )


def feed_status_to(status: FeedStatus) -> store_pb2.GetFeedStatusResponse:
    oldest_us = status.oldest_commit_time_us
    return store_pb2.GetFeedStatusResponse(
        feed_id=status.feed_id,
        head_position=status.head_position,
        trimmed_position=status.trimmed_position,
        oldest_commit_time=None if oldest_us is None else _time(oldest_us),
        watchers=status.watchers,
    )


def add_to_part(part: store_pb2.GetSnapshotResponse, item: SnapshotItem) -> int:
    """Adds one record to a part of a snapshot; returns its size in bytes."""
    part.feed_id = item.feed_id
    part.feed_position = item.feed_position
    record = item.record
    if isinstance(record, BaseModelRecord):
        part.base_models.append(base_model_to(record))
        return part.base_models[-1].ByteSize()
    if isinstance(record, VersionRecord):
        part.versions.append(version_to(record))
        return part.versions[-1].ByteSize()
    if isinstance(record, DeletedVersion):
        part.deleted_versions.append(deleted_to(record))
        return part.deleted_versions[-1].ByteSize()
    if isinstance(record, AliasRecord):
        part.aliases.append(alias_to(record))
        return part.aliases[-1].ByteSize()
    if isinstance(record, PolicyRecord):
        part.policies.append(policy_to(record))
        return part.policies[-1].ByteSize()
    if isinstance(record, RouteRecord):
        part.routes.append(route_to(record))
        return part.routes[-1].ByteSize()
    if isinstance(record, NamespaceRecord):
        part.namespaces.append(namespace_to(record))
        return part.namespaces[-1].ByteSize()
    if isinstance(record, GrantRecord):
        part.grants.append(grant_to(record))
        return part.grants[-1].ByteSize()
    return 0


def change_to(change: Change) -> store_pb2.Change:
    message = store_pb2.Change(position=change.position, commit_time=_time(change.commit_time_us))
    # The kinds are named as the fields of the oneof.
    getattr(message, change.kind.value).CopyFrom(_record_to(change.record))
    return message


def _record_to(record: Record) -> Message:
    if isinstance(record, BaseModelRecord):
        return base_model_to(record)
    if isinstance(record, VersionRecord):
        return version_to(record)
    if isinstance(record, DeletedVersion):
        return deleted_to(record)
    if isinstance(record, AliasRecord):
        return alias_to(record)
    if isinstance(record, PolicyRecord):
        return policy_to(record)
    if isinstance(record, RouteRecord):
        return route_to(record)
    return access_record_to(record)


def _time(microseconds: int) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(microseconds)
    return time
