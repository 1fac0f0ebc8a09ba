"""The protos' messages as the router's own types, and back; for the servicer and the store's client."""

import datetime
from collections.abc import Iterator

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.tiers import Tier
from adaptermesh.router.catalogue import (
    Alias,
    AliasRemoved,
    BaseModel,
    Change,
    Event,
    FeedBrokenError,
    Grant,
    GrantRemoved,
    Namespace,
    NothingHere,
    Policy,
    Reach,
    Route,
    RouteRemoved,
    RouteTarget,
    Version,
    VersionRemoved,
)
from adaptermesh.router.dispatch import Decision, Request
from adaptermesh.router.feed import FeedMessage, SnapshotPart
from adaptermesh.router.resolution import ComposedVersion, Question
from adaptermesh.router.workers import (
    Delta,
    Load,
    Residency,
    Snapshot,
    Worker,
    WorkerInfo,
    WorkerState,
)
from adaptermesh.rpc.signature_policy import policy_of
from adaptermesh.rpc.version_state import state_of


def snapshot_part(message: store_pb2.GetSnapshotResponse) -> SnapshotPart:
    return SnapshotPart(
        message.feed_id,
        message.feed_position,
        (
            *map(base_model, message.base_models),
            *map(version, message.versions),
            *map(version_removed, message.deleted_versions),
            *map(alias, message.aliases),
            *map(route, message.routes),
            *map(policy, message.policies),
            *map(namespace, message.namespaces),
            *map(grant, message.grants),
        ),
    )


def feed_messages(message: store_pb2.WatchChangesResponse) -> Iterator[FeedMessage]:
    """A message for each change, also from a store that does not know of batches; or a heartbeat."""
    changes = [message.change] if message.HasField("change") else message.changes
    for change in changes:
        head = max(message.head_position, change.position)
        yield FeedMessage(head, Change(change.position, _event(change)))
    if not changes:
        yield FeedMessage(message.head_position)


def _event(message: store_pb2.Change) -> Event:
    match message.WhichOneof("event"):
        case "base_model_registered":
            return base_model(message.base_model_registered)
        case "version_published":
            return version(message.version_published)
        case "version_status_set":
            return version(message.version_status_set)
        case "version_signed":
            return version(message.version_signed)
        case "version_deleted":
            return version_removed(message.version_deleted)
        case "namespace_policy_set":
            return policy(message.namespace_policy_set)
        case "alias_set":
            return alias(message.alias_set)
        case "alias_deleted":
            gone = message.alias_deleted
            return AliasRemoved(AdapterName(gone.namespace, gone.name), gone.alias)
        case "route_set":
            return route(message.route_set)
        case "route_deleted":
            return RouteRemoved(message.route_deleted.tenant, message.route_deleted.task)
        case "namespace_set":
            return namespace(message.namespace_set)
        case "grant_set":
            return grant(message.grant_set)
        case "grant_deleted":
            return GrantRemoved(grant(message.grant_deleted))
        case "tenant_set" | "api_key_set":
            return NothingHere()
        case _:
            # From a newer store. Going on without it would make us answer from half a catalogue.
            raise FeedBrokenError(f"change {message.position} is of a kind that this router does not know")


def base_model(message: adapter_pb2.BaseModel) -> BaseModel:
    return BaseModel(message.model_id, message.digest)


def version(message: adapter_pb2.Version) -> Version:
    return Version(
        adapter=AdapterName(message.namespace, message.name),
        number=message.number,
        digest=message.digest,
        base_digest=message.base_digest,
        base_model_id=message.base_model_id,
        op_kinds=tuple(message.op_kinds),
        size_bytes=message.size_bytes,
        servable=message.servable,
        unservable_reason=message.unservable_reason,
        state=state_of(message.status.state),
        state_reason=message.status.reason,
        replacement=message.status.replacement,
        signing_key_ids=tuple(message.signing_key_ids),
        published=message.SerializeToString(),
    )


def version_removed(message: adapter_pb2.DeletedVersion) -> VersionRemoved:
    return VersionRemoved(
        adapter=AdapterName(message.namespace, message.name),
        number=message.number,
        digest=message.digest,
        time=message.delete_time.ToDatetime(datetime.UTC).isoformat(timespec="seconds"),
        actor=message.actor,
        reason=message.reason,
    )


def policy(message: adapter_pb2.NamespacePolicy) -> Policy:
    key_ids = frozenset(key.key_id for key in message.keys)
    return Policy(message.namespace, policy_of(message.signatures), key_ids)


def namespace(message: access_pb2.Namespace) -> Namespace:
    return Namespace(message.name, message.tenant)


def grant(message: access_pb2.Grant) -> Grant:
    """Every role may use what it is granted for."""
    return Grant(message.namespace, message.name, message.grantee)


def alias(message: adapter_pb2.Alias) -> Alias:
    return Alias(
        AdapterName(message.namespace, message.name), message.alias, message.digest, message.generation
    )


def route(message: adapter_pb2.Route) -> Route:
    targets = tuple(
        RouteTarget(target.ref, target.weight, target.cohort or target.ref) for target in message.targets
    )
    return Route(message.tenant, message.task, targets, message.generation)


def dispatch_request(message: router_pb2.DispatchRequest) -> Request:
    kind = message.WhichOneof("target")
    return Request(
        request_id=message.request_id,
        question=Question(
            tenant=message.tenant,
            cohort_key=message.cohort_key or message.request_id,
            task=message.task if kind == "task" else None,
            ref=message.ref if kind == "ref" else None,
            base_model=message.base_model,
            reach=Reach(message.tenant, frozenset(message.namespaces)) if message.restricted else None,
        ),
        excluded=frozenset(message.excluded_worker_ids),
        min_feed_position=message.min_feed_position,
    )


def dispatch_response(decision: Decision) -> router_pb2.DispatchResponse:
    resolution, worker = decision.resolution, decision.pick.worker.info
    response = router_pb2.DispatchResponse(
        base_digest=worker.base_digest,
        base_model_id=worker.base_model_id,
        ref=resolution.ref,
        cohort=resolution.cohort,
        route_generation=0 if resolution.route is None else resolution.route.generation,
        worker_id=worker.worker_id,
        worker_address=worker.address,
        tier=adapter_pb2.Tier.ValueType(int(decision.pick.tier)),
        feed_position=decision.feed_position,
        warnings=resolution.warnings,
    )
    version = resolution.version
    if version is None:
        return response
    response.base_model_id = version.base_model_id
    if isinstance(version, ComposedVersion):
        response.composition.CopyFrom(
            router_pb2.Composition(
                expression=str(version),
                resolved=str(version.resolved),
                digest=version.digest,
                op_kinds=version.op_kinds,
                size_bytes=version.size_bytes,
            )
        )
    else:
        response.version.ParseFromString(version.published)
    return response


def worker_report(message: router_pb2.ReportWorkerRequest) -> Snapshot | Delta:
    """A report.

    Raises:
        MeshError: INVALID_ARGUMENT if it is neither a snapshot nor a delta.
    """
    match message.WhichOneof("report"):
        case "snapshot":
            snapshot = message.snapshot
            return Snapshot(
                _worker_info(snapshot.info),
                _state(snapshot.state),
                _load(snapshot.load),
                tuple(map(_residency, snapshot.residencies)),
                tuple(snapshot.request_ids),
            )
        case "delta":
            delta = message.delta
            return Delta(
                _state(delta.state),
                _load(delta.load),
                tuple(map(_residency, delta.residencies)),
                tuple(delta.admitted_request_ids),
            )
        case _:
            raise invalid_field("report", "neither a snapshot nor a delta")


def worker_view(worker: Worker, booked_requests: int) -> router_pb2.WorkerView:
    return router_pb2.WorkerView(
        info=worker_pb2.WorkerInfo.FromString(worker.info.described),
        state=worker_pb2.WorkerState.ValueType(int(worker.state)),
        load=_load_message(worker.load),
        residencies=[
            worker_pb2.Residency(
                digest=residency.digest,
                tier=adapter_pb2.Tier.ValueType(int(residency.tier)),
                pinned=residency.pinned,
                requests=residency.requests,
                size_bytes=residency.size_bytes,
                device_bytes=residency.device_bytes,
            )
            for residency in sorted(worker.residencies.values(), key=lambda residency: residency.digest)
        ],
        booked_requests=booked_requests,
    )


def _load_message(load: Load) -> worker_pb2.Load:
    return worker_pb2.Load(
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        waiting_tokens=load.waiting_tokens,
        kv_used_tokens=load.kv_used_tokens,
        kv_total_tokens=load.kv_total_tokens,
        budgets=worker_pb2.Budgets.FromString(load.budgets) if load.budgets else None,
    )


def _worker_info(message: worker_pb2.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(
        worker_id=message.worker_id,
        address=message.address,
        base_digest=message.base_model.digest,
        base_model_id=message.base_model.model_id,
        max_batch_rows=message.max_batch_rows,
        max_waiting=message.max_waiting,
        described=message.SerializeToString(),
    )


def _state(value: int) -> WorkerState:
    # A state of a newer worker is one in which this router sends it nothing.
    return WorkerState(value) if value in WorkerState._value2member_map_ else WorkerState.UNSPECIFIED


def _load(message: worker_pb2.Load) -> Load:
    return Load(
        message.running_requests,
        message.waiting_requests,
        message.waiting_tokens,
        message.kv_used_tokens,
        message.kv_total_tokens,
        message.budgets.SerializeToString(),
    )


def _residency(message: worker_pb2.Residency) -> Residency:
    tier = Tier(message.tier) if message.tier in Tier._value2member_map_ else Tier.STORE
    return Residency(
        message.digest, tier, message.pinned, message.requests, message.size_bytes, message.device_bytes
    )
