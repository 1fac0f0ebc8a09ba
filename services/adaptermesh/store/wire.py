"""Protocol buffers to the store's values and back."""

from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.refs import AdapterName
from adaptermesh.rpc.alias_action import action_message
from adaptermesh.rpc.signature_policy import policy_message
from adaptermesh.rpc.version_state import state_message
from adaptermesh.store.facets import Facets
from adaptermesh.store.garbage import DEFAULT_GRACE_SECONDS, MAX_GRACE_SECONDS, GarbageReport
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.records import (
    AdapterSummary,
    AliasRecord,
    BaseModelRecord,
    DeletedVersion,
    PolicyRecord,
    RouteRecord,
    RouteTarget,
    Signature,
    SourceFile,
    VersionRecord,
    VersionStatus,
)
from adaptermesh.store.search_query import Order, SearchQuery


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
        create_time=time_to(record.create_time_us) if record.number else None,
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
        update_time=time_to(status.update_time_us) if status.generation else None,
        actor=status.actor,
    )


def deleted_to(record: DeletedVersion) -> adapter_pb2.DeletedVersion:
    return adapter_pb2.DeletedVersion(
        namespace=record.namespace,
        name=record.name,
        number=record.number,
        digest=record.digest,
        delete_time=time_to(record.delete_time_us),
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
        update_time=time_to(record.update_time_us),
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
            create_time=time_to(key.create_time_us),
        )
        for key in record.keys
    )
    return adapter_pb2.NamespacePolicy(
        namespace=record.namespace,
        signatures=policy_message(record.signatures),
        keys=keys,
        generation=record.generation,
        update_time=time_to(record.update_time_us) if record.generation else None,
        actor=record.actor,
    )


def signature_to(signature: Signature, *, trusted: bool) -> adapter_pb2.Signature:
    return adapter_pb2.Signature(
        key_id=signature.key_id,
        signature=bytes.fromhex(signature.signature),
        actor=signature.actor,
        create_time=time_to(signature.create_time_us),
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
        update_time=time_to(record.update_time_us),
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


def time_to(microseconds: int) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(microseconds)
    return time
