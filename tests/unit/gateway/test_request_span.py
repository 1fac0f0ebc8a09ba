from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import StatusCode

from adaptermesh.core.errors import Reason, not_found, unavailable

if TYPE_CHECKING:
    from tests.unit.gateway.conftest import Fakes, Mesh


async def test_the_span_says_what_was_asked_what_served_it_and_what_it_took(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1")
    await mesh.generate(x_model_task="financial-ner", x_tenant_id="acme", x_request_id="req-1")
    span = await mesh.span()
    attributes = dict(span.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0  # type: ignore[operator]
    assert attributes == {
        "gen_ai.provider.name": "adaptermesh",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "financial-ner",
        "gen_ai.request.max_tokens": 256,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.response.model": "acme/ner:v3",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 2,
        "adaptermesh.request.id": "req-1",
        "adaptermesh.tenant.id": "acme",
        "adaptermesh.adapter.ref": "acme/ner@prod",
        "adaptermesh.adapter.version": "acme/ner:v3",
        "adaptermesh.adapter.digest": fakes.version().digest,
        "adaptermesh.adapter.op_kinds": ("lowrank",),
        "adaptermesh.adapter.bytes": 1234,
        "adaptermesh.route.name": "financial-ner",
        "adaptermesh.route.generation": 4,
        "adaptermesh.route.cohort": "control",
        "adaptermesh.worker.id": "w1",
        "adaptermesh.gateway.attempts": 1,
        "adaptermesh.switch.kind": "cool",
        "adaptermesh.switch.tier": "host",
        "adaptermesh.switch.queue_ms": 7.0,
        "adaptermesh.switch.h2d_ms": 2.0,
        "adaptermesh.switch.shared_fetch": False,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_a_base_request_has_no_adapter_and_no_route(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    await mesh.generate()
    attributes = dict((await mesh.span()).attributes or {})
    assert attributes["gen_ai.request.model"] == "base"
    assert attributes["gen_ai.response.model"] == "base"
    absent = ("adaptermesh.route", "adaptermesh.adapter.digest", "adaptermesh.switch.kind")
    assert not [name for name in attributes if name.startswith(absent)]


async def test_the_worker_that_served_after_a_retry_is_the_spans(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1", fakes.refusing(unavailable(Reason.DRAINING, "shutting down", 1.0)))
    await mesh.add_worker("w2")
    await mesh.generate()
    attributes = (await mesh.span()).attributes or {}
    assert attributes["adaptermesh.worker.id"] == "w2"
    assert attributes["adaptermesh.gateway.attempts"] == 2


async def test_an_error_is_the_spans_status(mesh: Mesh) -> None:
    def decide(request: Any) -> Any:
        raise not_found(Reason.TASK_NOT_FOUND, "task", "unknown")

    mesh.router.decide = decide
    await mesh.generate(x_model_task="unknown")
    span = await mesh.span()
    assert (span.attributes or {})["error.type"] == "TASK_NOT_FOUND"
    assert span.status.status_code is StatusCode.ERROR


async def test_a_lost_worker_is_named_in_the_span(mesh: Mesh, fakes: Fakes) -> None:
    async def end(context: Any) -> None:
        return

    await mesh.add_worker("w1", fakes.starting_then(end))
    await mesh.generate()
    attributes = (await mesh.span()).attributes or {}
    assert attributes["error.type"] == "WORKER_LOST"
    assert attributes["adaptermesh.worker.id"] == "w1"


async def test_a_client_that_goes_away_is_in_the_span(mesh: Mesh, fakes: Fakes) -> None:
    worker = await mesh.add_worker("w1", fakes.hanging)
    call = mesh.call()
    await fakes.until(lambda: bool(worker.requests))
    call.cancel()
    await asyncio.wait_for(worker.cancelled.wait(), 10)
    span = await mesh.span()
    assert (span.attributes or {})["error.type"] == "CANCELLED"


async def test_the_span_belongs_to_the_callers_trace(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await mesh.generate(traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    span = await mesh.span()
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.parent is not None
