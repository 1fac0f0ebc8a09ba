from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.core.composition import composition_digest, parse_composition, parse_resolved, renamed
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.rpc.sampling import read_sampling, sampling_message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.gateway.conftest import Fakes, FakeWorker, Mesh


async def test_a_stream_starts_with_identities_and_ends_with_the_finish_reason(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    seen = await mesh.generate(x_model_task="financial-ner", x_request_id="req-1")
    assert seen.error is None
    assert seen.order == ["started", "delta", "delta", "finished"]
    assert seen.text == "Hello you"
    assert seen.token_ids == [1, 2]
    assert seen.started is not None
    assert seen.started.request_id == "req-1"
    assert seen.started.adapter_version == "acme/ner:v3"
    assert seen.started.ref == "acme/ner@prod"
    assert seen.started.cohort == "control"
    assert seen.started.route_generation == 4
    assert seen.started.worker_id == "w1"
    assert seen.started.prompt_tokens == 5
    assert seen.finished is not None
    assert seen.finished.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert (seen.finished.output_tokens, seen.finished.cached_tokens) == (2, 4)


async def test_initial_metadata_says_what_served_the_request(mesh: Mesh, fakes: Fakes) -> None:
    await mesh.add_worker("w1")
    seen = await mesh.generate(x_model_task="financial-ner", x_request_id="req-1")
    served = {key: value for key, value in seen.initial.items() if key.startswith("x-")}
    assert len(served.pop("x-trace-id")) == 32
    assert served == {
        "x-request-id": "req-1",
        "x-adapter-version": "acme/ner:v3",
        "x-adapter-digest": fakes.version().digest,
        "x-adapter-tier": "host",
        "x-cohort": "control",
        "x-worker-id": "w1",
        "x-route-generation": "4",
    }


async def test_without_task_and_ref_the_bare_base_model_answers(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    seen = await mesh.generate()
    assert seen.initial["x-adapter-version"] == "base"
    assert seen.initial["x-adapter-digest"] == ""
    assert seen.initial["x-adapter-tier"] == ""
    assert mesh.router.requests[0].WhichOneof("target") is None
    assert worker.requests[0].adapter_digest == ""
    assert worker.requests[0].adapter_version == "base"


async def test_an_explicit_ref_overrides_the_task(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    seen = await mesh.generate(x_model_task="financial-ner", x_adapter_id="acme/ner:v3")
    assert mesh.router.requests[0].ref == "acme/ner:v3"
    assert mesh.router.requests[0].task == ""
    assert seen.initial["x-cohort"] == ""
    assert seen.initial["x-route-generation"] == "0"


async def test_the_callers_metadata_reaches_router_and_worker(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    await mesh.generate(
        inference_pb2.GenerateRequest(text="Say hello", base_model="tiny"),
        x_model_task="financial-ner",
        x_request_id="req-1",
        x_tenant_id="acme",
        x_cohort_key="user 7",
        x_feed_position="12",
    )
    (asked,) = mesh.router.requests
    assert (asked.request_id, asked.tenant, asked.task) == ("req-1", "acme", "financial-ner")
    assert (asked.cohort_key, asked.min_feed_position, asked.base_model) == ("user 7", 12, "tiny")
    assert asked.prompt_tokens > 0
    assert worker.requests[0].request_id == "req-1"
    assert worker.requests[0].tenant == "acme"


async def test_every_sampling_value_and_the_priority_are_handed_on(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    params = SamplingParams(9, 0.5, 0.9, 3, 4, ("x",), True, 0.1, 1.5, -1.0, 1.0, (7,), 2, 3)
    await mesh.generate(
        inference_pb2.GenerateRequest(text="x", sampling=sampling_message(params), priority=-100)
    )
    assert read_sampling(worker.requests[0].sampling) == params
    assert worker.requests[0].priority == -100


async def test_the_ends_of_several_answers_are_handed_on(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    seen = await mesh.generate(inference_pb2.GenerateRequest(text="x", n=2))
    assert seen.order == ["started", "delta", "delta", "choice_finished", "choice_finished", "finished"]
    assert worker.requests[0].n == 2


async def test_log_probabilities_are_handed_on(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    sampling = inference_pb2.SamplingParams(logprobs=1)
    seen = await mesh.generate(inference_pb2.GenerateRequest(text="x", sampling=sampling))
    assert seen.logprobs == [TokenLogprobs(1, -0.5, ((2, -0.25),))]
    assert (await mesh.generate()).logprobs == []


async def test_log_probabilities_of_the_prompt_are_handed_on_before_the_output(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    sampling = inference_pb2.SamplingParams(prompt_logprobs=0)
    seen = await mesh.generate(inference_pb2.GenerateRequest(text="x", sampling=sampling))
    assert seen.order == ["started", "prompt_logprobs", "prompt_logprobs", "delta", "delta", "finished"]
    assert seen.prompt_logprobs == [TokenLogprobs(7, -1.5), TokenLogprobs(8, -1.5)]
    assert (seen.text, seen.logprobs) == ("Hello you", [])


async def test_tenant_and_request_id_have_defaults(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    first, second = await mesh.generate(), await mesh.generate()
    assert len(first.initial["x-request-id"]) == 32
    assert first.initial["x-request-id"] != second.initial["x-request-id"]
    assert worker.requests[0].tenant == "default"
    assert worker.requests[0].request_id == first.initial["x-request-id"]


async def test_the_worker_gets_digests_and_every_sampling_value(mesh: Mesh, fakes: Fakes) -> None:
    worker = await mesh.add_worker("w1")
    await mesh.generate(x_model_task="financial-ner")
    (request,) = worker.requests
    assert request.adapter_digest == fakes.version().digest
    assert request.base_digest == fakes.base_digest
    assert request.text == "Say hello"
    assert request.sampling.max_tokens == 256
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1.0
    assert not request.sampling.HasField("seed")


async def test_chat_and_sampling_travel_as_they_came(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Grüezi")])
    sampling = inference_pb2.SamplingParams(
        max_tokens=7, temperature=0.0, top_p=0.5, top_k=3, seed=9, stop=["\n"], ignore_eos=True
    )
    await mesh.generate(inference_pb2.GenerateRequest(chat=chat, sampling=sampling))
    assert worker.requests[0].chat == chat
    assert read_sampling(worker.requests[0].sampling) == read_sampling(sampling)


async def test_token_ids_travel_as_they_came(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[3, 1, 2]))
    await mesh.generate(request)
    assert list(worker.requests[0].token_ids.ids) == [3, 1, 2]
    assert mesh.router.requests[0].prompt_tokens == 3


async def test_a_cohort_that_no_header_can_hold_is_encoded(mesh: Mesh) -> None:
    await mesh.add_worker("w1")

    def decide(request: object) -> object:
        response = mesh.router.first_worker(mesh.router.requests[-1])
        response.cohort = "größe 50%"
        return response

    mesh.router.decide = decide  # type: ignore[assignment]
    seen = await mesh.generate(x_model_task="financial-ner")
    assert seen.initial["x-cohort"] == "gr%C3%B6%C3%9Fe 50%25"
    assert seen.started is not None
    assert seen.started.cohort == "größe 50%"


async def test_the_trace_context_reaches_the_worker(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    seen = await mesh.generate(traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    assert seen.initial["x-trace-id"] == trace_id
    assert worker.metadata[0]["traceparent"].startswith(f"00-{trace_id}-")


async def test_the_clients_deadline_reaches_the_worker(mesh: Mesh) -> None:
    worker = await mesh.add_worker("w1")
    await mesh.generate(timeout=30.0)
    await mesh.generate(timeout=None)
    with_deadline, without = worker.time_remaining
    assert with_deadline is not None
    assert with_deadline < 60.0
    assert without is not None
    assert without > 60.0


@pytest.mark.parametrize("request_id", ["has space", "-starts-wrong", "x" * 129, "semi;colon"])
async def test_an_illegal_request_id_is_refused_under_a_fresh_one(mesh: Mesh, request_id: str) -> None:
    seen = await mesh.generate(x_request_id=request_id)
    assert seen.failure.code is Code.INVALID_ARGUMENT
    assert seen.failure.metadata["field"] == "x-request-id"
    assert len(seen.failure.metadata["request_id"]) == 32
    assert seen.trailing["x-request-id"] == seen.failure.metadata["request_id"]


async def test_a_bad_field_is_refused_before_the_router_is_asked(mesh: Mesh) -> None:
    request = inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.SamplingParams(temperature=3.0))
    seen = await mesh.generate(request, x_request_id="req-1")
    assert seen.failure.code is Code.INVALID_ARGUMENT
    assert seen.failure.reason is Reason.INVALID_FIELD
    assert seen.failure.metadata == {"field": "sampling.temperature", "request_id": "req-1"}
    assert seen.trailing["x-request-id"] == "req-1"
    assert mesh.router.requests == []


async def test_many_requests_at_once_keep_their_answers_apart(mesh: Mesh) -> None:
    await mesh.add_worker("w1")
    ids = [f"req-{number}" for number in range(50)]
    answers = await asyncio.gather(*(mesh.generate(x_request_id=request_id) for request_id in ids))
    assert [seen.started.request_id for seen in answers if seen.started] == ids
    assert all(seen.order[-1] == "finished" for seen in answers)


async def test_what_the_router_warns_of_reaches_the_caller(mesh: Mesh) -> None:
    await mesh.add_worker("w1")

    def decide(request: router_pb2.DispatchRequest) -> router_pb2.DispatchResponse:
        response = mesh.router.first_worker(request)
        response.warnings.append("acme/ner:v3 is deprecated")
        return response

    mesh.router.decide = decide
    seen = await mesh.generate()
    assert seen.started is not None
    assert list(seen.started.warnings) == ["acme/ner:v3 is deprecated"]


def composed(asked: str, **changes: str) -> Callable[[router_pb2.DispatchResponse], None]:
    """What the router answers with for a composition, and what of it is changed."""

    def change(response: router_pb2.DispatchResponse) -> None:
        resolved = renamed(parse_composition(asked), lambda name: digest_bytes(name.encode()))
        fields: dict[str, Any] = {
            "expression": str(renamed(parse_composition(asked), lambda name: name.replace("@prod", ":v3"))),
            "resolved": str(resolved),
            "digest": composition_digest(resolved),
        }
        response.ClearField("version")
        response.composition.CopyFrom(router_pb2.Composition(**(fields | changes)))

    return change


async def compose(mesh: Mesh, asked: str, **changes: str) -> tuple[Any, FakeWorker]:
    worker = await mesh.add_worker("w1")
    change = composed(asked, **changes)

    def decide(request: router_pb2.DispatchRequest) -> router_pb2.DispatchResponse:
        response = mesh.router.first_worker(request)
        change(response)
        return response

    mesh.router.decide = decide
    return await mesh.generate(x_adapter_id=asked), worker


ASKED = "average(acme/ner@prod,0.5*acme/tone:v1)"


async def test_a_composition_is_handed_to_the_worker_over_digests(mesh: Mesh) -> None:
    seen, worker = await compose(mesh, ASKED)
    [request] = worker.requests
    assert seen.error is None
    assert seen.initial["x-adapter-version"] == "average(acme/ner:v3,0.5*acme/tone:v1)"
    assert seen.initial["x-adapter-digest"] == request.adapter_digest
    assert composition_digest(parse_resolved(request.composition)) == request.adapter_digest
    assert mesh.router.requests[0].ref == ASKED


@pytest.mark.parametrize(
    "changes",
    [
        {"expression": "stack(acme/ner:v3,0.5*acme/tone:v1)"},
        {"expression": "average(acme/ner:v3,acme/tone:v1)"},
        {"expression": "average(acme/ner:v3,0.5*acme/other:v1)"},
        {"digest": digest_bytes(b"other")},
    ],
)
async def test_a_router_that_answers_with_another_composition_is_not_believed(
    mesh: Mesh, changes: dict[str, str]
) -> None:
    seen, _ = await compose(mesh, ASKED, **changes)
    assert seen.failure.code is Code.INTERNAL
