"""Protobuf messages to records. Protobuf stops here."""

import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.client.integrity_records import NamespacePolicy, Signature, SigningKey
from adaptermesh.client.mesh_records import Budgets, Load, Model, Residency, RouterStatus, Worker
from adaptermesh.client.records import (
    Adapter,
    Alias,
    BaseModel,
    DeletedVersion,
    Route,
    RouteTarget,
    Search,
    SourceFile,
    Version,
    VersionStatus,
)
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.tiers import Tier
from adaptermesh.rpc.alias_action import action_of
from adaptermesh.rpc.signature_policy import policy_of
from adaptermesh.rpc.version_state import state_of

_STATES = {worker_pb2.WORKER_STATE_READY: "ready", worker_pb2.WORKER_STATE_DRAINING: "draining"}


def time_of(message: Timestamp) -> datetime.datetime:
    return message.ToDatetime(tzinfo=datetime.UTC)


def tier_name(tier: int) -> str:
    """`store`, `disk`, `host` or `device`; empty if it does not apply."""
    return Tier(tier).name.lower() if tier else ""


def version_of(message: adapter_pb2.Version) -> Version:
    return Version(
        namespace=message.namespace,
        name=message.name,
        number=message.number,
        digest=message.digest,
        base_digest=message.base_digest,
        base_model_id=message.base_model_id,
        task=message.task,
        description=message.description,
        tags=tuple(message.tags),
        license=message.license,
        kind=message.kind,
        op_kinds=tuple(message.op_kinds),
        max_rank=message.max_rank,
        size_bytes=message.size_bytes,
        servable=message.servable,
        unservable_reason=message.unservable_reason,
        warnings=tuple(message.warnings),
        create_time=time_of(message.create_time),
        source_files=tuple(SourceFile(f.path, f.size_bytes, f.digest) for f in message.source_files),
        status=status_of(message.status),
        signing_key_ids=tuple(message.signing_key_ids),
    )


def signature_of(message: adapter_pb2.Signature) -> Signature:
    return Signature(
        key_id=message.key_id,
        signature=message.signature.hex(),
        actor=message.actor,
        create_time=time_of(message.create_time),
        trusted=message.trusted,
    )


def policy_record_of(message: adapter_pb2.NamespacePolicy) -> NamespacePolicy:
    return NamespacePolicy(
        namespace=message.namespace,
        signatures=policy_of(message.signatures),
        keys=tuple(
            SigningKey(key.key_id, key.public_key.hex(), key.comment, key.actor, time_of(key.create_time))
            for key in message.keys
        ),
        generation=message.generation,
        update_time=time_of(message.update_time) if message.generation else None,
        actor=message.actor,
    )


def status_of(message: adapter_pb2.VersionStatus) -> VersionStatus:
    return VersionStatus(
        state=state_of(message.state),
        reason=message.reason,
        replacement=message.replacement,
        generation=message.generation,
        update_time=time_of(message.update_time) if message.generation else None,
        actor=message.actor,
    )


def deleted_of(message: adapter_pb2.DeletedVersion) -> DeletedVersion:
    return DeletedVersion(
        namespace=message.namespace,
        name=message.name,
        number=message.number,
        digest=message.digest,
        delete_time=time_of(message.delete_time),
        actor=message.actor,
        reason=message.reason,
    )


def alias_of(message: adapter_pb2.Alias) -> Alias:
    return Alias(
        namespace=message.namespace,
        name=message.name,
        alias=message.alias,
        version_number=message.version_number,
        digest=message.digest,
        generation=message.generation,
        update_time=time_of(message.update_time),
        actor=message.actor,
        comment=message.comment,
        protected=message.protected,
        action=action_of(message.action),
    )


def adapter_of(message: store_pb2.AdapterSummary) -> Adapter:
    return Adapter(
        version_of(message.newest),
        message.version_count,
        tuple(alias_of(alias) for alias in message.aliases),
        tuple(message.unusable_numbers),
        message.download_count,
    )


def route_of(message: adapter_pb2.Route) -> Route:
    return Route(
        tenant=message.tenant,
        task=message.task,
        targets=tuple(RouteTarget(t.ref, t.weight, t.cohort) for t in message.targets),
        generation=message.generation,
        update_time=time_of(message.update_time),
    )


def base_model_of(message: adapter_pb2.BaseModel) -> BaseModel:
    return BaseModel(
        model_id=message.model_id,
        digest=message.digest,
        config_digest=message.config_digest,
        weights_digest=message.weights_digest,
        architecture=message.architecture,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        vocab_size=message.vocab_size,
    )


def residency_of(message: worker_pb2.Residency) -> Residency:
    return Residency(
        digest=message.digest,
        tier=tier_name(message.tier),
        pinned=message.pinned,
        requests=message.requests,
        size_bytes=message.size_bytes,
        device_bytes=message.device_bytes,
    )


def _load_of(message: worker_pb2.Load) -> Load:
    return Load(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        waiting_tokens=message.waiting_tokens,
        kv_used_tokens=message.kv_used_tokens,
        kv_total_tokens=message.kv_total_tokens,
        budgets=_budgets_of(message.budgets) if message.HasField("budgets") else None,
    )


def _budgets_of(message: worker_pb2.Budgets) -> Budgets:
    return Budgets(
        device_used_bytes=message.device_used_bytes,
        device_used_slots=message.device_used_slots,
        host_used_bytes=message.host_used_bytes,
        host_budget_bytes=message.host_budget_bytes,
        disk_used_bytes=message.disk_used_bytes,
        disk_budget_bytes=message.disk_budget_bytes,
        kv_used_bytes=message.kv_used_bytes,
        kv_cached_bytes=message.kv_cached_bytes,
        kv_total_bytes=message.kv_total_bytes,
        device_budget_bytes=message.device_budget_bytes,
    )


def worker_of(message: router_pb2.WorkerView | worker_pb2.GetStatusResponse) -> Worker:
    return Worker(
        worker_id=message.info.worker_id,
        address=message.info.address,
        device=message.info.device,
        base_model_id=message.info.base_model.model_id,
        base_digest=message.info.base_model.digest,
        device_slots=message.info.device_slots,
        state=_STATES.get(message.state, "unknown"),
        load=_load_of(message.load),
        residencies=tuple(residency_of(residency) for residency in message.residencies),
        booked_requests=message.booked_requests if isinstance(message, router_pb2.WorkerView) else 0,
        base_bytes=message.info.base_bytes,
    )


def router_status_of(message: router_pb2.GetRouterStatusResponse) -> RouterStatus:
    return RouterStatus(
        feed_position=message.feed_position,
        feed_head=message.feed_head,
        feed_connected=message.feed_connected,
        versions=message.versions,
        routes=message.routes,
    )


def model_of(message: inference_pb2.Model) -> Model:
    return Model(
        id=message.id,
        digest=message.digest,
        base_model_id=message.base_model_id,
        task=message.task,
        aliases=tuple(message.aliases),
    )


_ORDERS = {
    "": store_pb2.SEARCH_ORDER_UNSPECIFIED,
    "relevance": store_pb2.SEARCH_ORDER_RELEVANCE,
    "newest": store_pb2.SEARCH_ORDER_NEWEST,
    "date": store_pb2.SEARCH_ORDER_NEWEST,
    "name": store_pb2.SEARCH_ORDER_NAME,
    "downloads": store_pb2.SEARCH_ORDER_DOWNLOADS,
    "score": store_pb2.SEARCH_ORDER_SCORE,
}


def search_request(query: Search) -> store_pb2.SearchAdaptersRequest:
    """Raises MeshError INVALID_FIELD for an order that is none."""
    if query.order not in _ORDERS:
        raise invalid_field("order", f"{query.order!r} is none of {', '.join(filter(None, _ORDERS))}")
    return store_pb2.SearchAdaptersRequest(
        text=query.text,
        namespace=query.namespace,
        base_model=query.base_model,
        task=query.task,
        kind=query.kind,
        license=query.license,
        tags=query.tags,
        order=_ORDERS[query.order],
        with_facets=query.with_facets,
        language=query.language,
        tenant=query.tenant,
        score_metric=query.score_metric,
        lowest_score_first=query.lowest_score_first,
    )


def facets_of(response: store_pb2.SearchAdaptersResponse) -> dict[str, tuple[tuple[str, int], ...]]:
    return {
        facet.field: tuple((value.value, value.count) for value in facet.values) for facet in response.facets
    }
