"""The router as the gateway sees it: one question per request, and whether it is there at all."""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.core.composition import (
    Composition,
    composition_digest,
    is_composition,
    leaves,
    parse_composition,
    parse_resolved,
    renamed,
)
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.core.refs import BASE, Ref, parse_ref
from adaptermesh.gateway.deadline import Deadline
from adaptermesh.gateway.request import GenerateCall, Target
from adaptermesh.rpc.status import mesh_error_from

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decision:
    """Which version on which worker."""

    adapter_version: str
    """`namespace/name:v3`, or "base", or a composition over versions."""
    adapter_digest: str
    """Of a version or a composition; empty for the bare base model."""
    base_digest: str
    ref: str
    cohort: str
    route_generation: int
    worker_id: str
    worker_address: str
    op_kinds: tuple[str, ...] = ()
    size_bytes: int = 0
    composition: str = ""
    """Over digests, where adapter_digest is a composition's."""
    warnings: tuple[str, ...] = ()
    """What the caller should know of the versions."""


@dataclass(frozen=True, slots=True)
class LiveBase:
    """A base model that a live worker serves."""

    model_id: str
    digest: str


class Router:
    """Asks the routers behind one channel."""

    def __init__(self, channel: grpc.aio.Channel, timeout_seconds: float) -> None:
        self._stub = router_pb2_grpc.RouterServiceStub(channel)
        self._timeout = timeout_seconds

    async def dispatch(self, call: GenerateCall, excluded: Sequence[str], deadline: Deadline) -> Decision:
        """Who serves the request, the excluded workers left aside.

        Raises:
            MeshError: the router's refusal, UNAVAILABLE (ROUTER_UNREACHABLE) or DEADLINE_EXCEEDED.
        """
        caller = call.caller
        request = router_pb2.DispatchRequest(
            request_id=caller.request_id,
            tenant=caller.tenant,
            base_model=call.base_model,
            cohort_key=caller.cohort_key or caller.request_id,
            prompt_tokens=call.prompt.estimated_tokens(),
            excluded_worker_ids=excluded,
            min_feed_position=caller.min_feed_position,
            restricted=caller.is_restricted,
            namespaces=caller.identity.namespaces if caller.identity else (),
        )
        if caller.target.ref:
            request.ref = caller.target.ref
        elif caller.target.task:
            request.task = caller.target.task
        timeout = deadline.remaining(self._timeout)
        response = await self._asked(self._stub.Dispatch(request, timeout=timeout), deadline)
        return _read_decision(response, caller.target)

    async def is_ready(self) -> bool:
        """Whether the router follows the catalogue.

        Raises:
            MeshError: the router can't be reached.
        """
        request = router_pb2.GetRouterStatusRequest()
        status = await self._asked(self._stub.GetRouterStatus(request, timeout=self._timeout))
        return status.feed_connected

    async def live_bases(self, deadline: Deadline) -> list[LiveBase]:
        """The base models that live workers serve, in order of name and digest."""
        request = router_pb2.ListWorkersRequest()
        timeout = deadline.remaining(self._timeout)
        response = await self._asked(self._stub.ListWorkers(request, timeout=timeout), deadline)
        found = {
            LiveBase(worker.info.base_model.model_id, worker.info.base_model.digest)
            for worker in response.workers
        }
        return sorted(found, key=lambda base: (base.model_id, base.digest))

    async def _asked(self, call: Awaitable[T], deadline: Deadline | None = None) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            found = mesh_error_from(error, Reason.ROUTER_UNREACHABLE)
        if found.code is Code.DEADLINE_EXCEEDED and found.reason is Reason.DEADLINE_EXCEEDED:
            if deadline is not None:
                # Raises if it is the request's own deadline that has passed.
                deadline.remaining()
            raise unavailable(Reason.ROUTER_UNREACHABLE, "the router does not answer", 1.0)
        raise found


def _read_decision(response: router_pb2.DispatchResponse, target: Target) -> Decision:
    version, composed = response.version, response.composition
    found: adapter_pb2.Version | router_pb2.Composition = version
    if response.HasField("composition"):
        name, digest, found = composed.expression, composed.digest, composed
    elif response.HasField("version"):
        name, digest = f"{version.namespace}/{version.name}:v{version.number}", version.digest
    else:
        name, digest = BASE, ""
    decision = Decision(
        adapter_version=name,
        adapter_digest=digest,
        base_digest=response.base_digest,
        ref=response.ref,
        cohort=response.cohort,
        route_generation=response.route_generation,
        worker_id=response.worker_id,
        worker_address=response.worker_address,
        op_kinds=tuple(found.op_kinds),
        size_bytes=found.size_bytes,
        composition=composed.resolved,
        warnings=tuple(response.warnings),
    )
    if not _answers(decision, target):
        raise MeshError(
            Code.INTERNAL,
            Reason.INTERNAL,
            f"the router answered '{target.asked}' with {decision.adapter_version} on '{decision.worker_id}'",
        )
    return decision


def _answers(decision: Decision, target: Target) -> bool:
    """Whether the decision is complete and for what was asked; a route may lead anywhere, a ref may not."""
    if not (decision.worker_id and decision.worker_address and decision.base_digest):
        return False
    is_base = decision.adapter_version == BASE
    if not is_base and not is_digest(decision.adapter_digest):
        return False
    if target.task:
        return True
    if target.asked == BASE:
        return is_base
    if is_composition(target.ref):
        return _composes(decision, target.ref)
    return not decision.composition and _is_version_of(decision, parse_ref(target.ref))


def _composes(decision: Decision, asked: str) -> bool:
    """Whether it has the asked tree and weights over versions of the asked adapters."""
    wanted, found = parse_composition(asked), parse_composition(decision.adapter_version)
    resolved = parse_resolved(decision.composition)

    def shape(tree: Composition) -> Composition:
        return renamed(tree, lambda _: "")

    return (
        shape(wanted) == shape(found) == shape(resolved)
        and composition_digest(resolved) == decision.adapter_digest
        and all(
            parse_ref(one.name).adapter == parse_ref(other.name).adapter
            for one, other in zip(leaves(wanted), leaves(found), strict=True)
        )
    )


def _is_version_of(decision: Decision, ref: Ref) -> bool:
    name, _, number = decision.adapter_version.rpartition(":v")
    return (
        name == str(ref.adapter)
        and ref.version in (None, int(number))
        and ref.digest in (None, decision.adapter_digest)
    )
