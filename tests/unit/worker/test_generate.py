import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.tiers import Tier
from adaptermesh.rpc.metadata import first_values
from adaptermesh.rpc.sampling import read_logprobs
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.worker.engine.request import Timeline
from adaptermesh.worker.wire import MAX_DELTA_LOGPROBS
from tests.unit.worker.conftest import MAX_CONTEXT, Worker, read_all
from tests.unit.worker.fake_peers import until

DIGEST = digest_bytes(b"adapter")


async def begin(worker: Worker, request: worker_pb2.GenerateRequest, **options: Any) -> Any:
    """Opens a stream and waits until the engine has the request."""
    call = worker.stub.Generate(request, **options)
    reading = asyncio.create_task(call.initial_metadata())
    await until(lambda: request.request_id in worker.engine.requests)
    await reading
    return call


async def refused(worker: Worker, request: worker_pb2.GenerateRequest) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(worker.stub.Generate(request))
    return mesh_error_from(caught.value)


async def test_a_stream_is_started_deltas_finished(worker: Worker) -> None:
    worker.engine.tiers[DIGEST] = Tier.DEVICE
    call = await begin(worker, worker.request(adapter_digest=DIGEST, adapter_version="acme/ner:v3"))
    started = await call.read()
    worker.engine.tokens("r1", "Hel", 7)
    first = await call.read()
    worker.engine.tokens("r1", "lo", 8, 9)
    worker.engine.finish(
        "r1",
        Timeline(
            *(1_000, 2_000, 5_000, 6_000, 7_000, 8_000, 9_000, 12_000),
            verify_ns=500,
            fetched_bytes=64,
            cached_tokens=2,
            overlapped_ns=700,
        ),
    )
    rest = [message async for message in call]
    assert started.started.prompt_tokens == 3
    assert started.started.tier == adapter_pb2.TIER_DEVICE
    assert started.started.switch_kind == adapter_pb2.SWITCH_KIND_WARM
    assert (first.delta.text, list(first.delta.token_ids)) == ("Hel", [7])
    assert "".join(message.delta.text for message in rest) == "lo"
    finished = rest[-1].finished
    assert finished.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert (finished.prompt_tokens, finished.cached_tokens, finished.output_tokens) == (3, 2, 2)
    assert finished.timings.time_to_first_token.ToNanoseconds() == 8_000
    assert finished.timings.queue.ToNanoseconds() == 7_000
    assert finished.timings.fetch.ToNanoseconds() == 3_000
    assert finished.timings.verify.ToNanoseconds() == 500
    assert finished.timings.h2d.ToNanoseconds() == 1_000
    assert finished.timings.prefill.ToNanoseconds() == 1_000
    assert finished.timings.decode.ToNanoseconds() == 3_000
    assert finished.timings.fetched_bytes == 64
    assert finished.timings.overlap.ToNanoseconds() == 700
    assert worker.engine.cancelled == []


async def test_a_step_that_did_not_happen_has_no_duration(worker: Worker) -> None:
    call = await begin(worker, worker.request())
    worker.engine.finish("r1")
    finished = (await read_all(call))[-1].finished
    assert not finished.timings.HasField("fetch")
    assert not finished.timings.HasField("verify")
    assert not finished.timings.HasField("h2d")
    assert finished.timings.HasField("prefill")


@pytest.mark.parametrize(
    ("tier", "kind"),
    [
        (Tier.STORE, adapter_pb2.SWITCH_KIND_COLD),
        (Tier.DISK, adapter_pb2.SWITCH_KIND_COOL),
        (Tier.HOST, adapter_pb2.SWITCH_KIND_COOL),
        (Tier.DEVICE, adapter_pb2.SWITCH_KIND_WARM),
    ],
)
async def test_the_tier_at_admission_says_what_the_switch_takes(
    worker: Worker, tier: Tier, kind: adapter_pb2.SwitchKind.ValueType
) -> None:
    worker.engine.tiers[DIGEST] = tier
    call = await begin(worker, worker.request(adapter_digest=DIGEST))
    started = (await call.read()).started
    assert (started.tier, started.switch_kind) == (int(tier), kind)
    call.cancel()


async def test_the_base_model_has_neither_tier_nor_switch(worker: Worker) -> None:
    call = await begin(worker, worker.request())
    started = (await call.read()).started
    assert started.tier == adapter_pb2.TIER_UNSPECIFIED
    assert started.switch_kind == adapter_pb2.SWITCH_KIND_UNSPECIFIED
    assert worker.engine.requests["r1"].digest is None
    call.cancel()


async def test_identities_are_in_the_initial_metadata_at_admission(worker: Worker) -> None:
    worker.engine.tiers[DIGEST] = Tier.HOST
    call = await begin(worker, worker.request(adapter_digest=DIGEST, adapter_version="acme/ner:v3"))
    metadata = first_values(await call.initial_metadata())
    assert metadata["x-request-id"] == "r1"
    assert metadata["x-adapter-version"] == "acme/ner:v3"
    assert metadata["x-adapter-digest"] == DIGEST
    assert metadata["x-adapter-tier"] == "host"
    status = await worker.stub.GetStatus(worker_pb2.GetStatusRequest())
    assert metadata["x-worker-id"] == status.info.worker_id
    call.cancel()


async def test_the_engine_gets_ids_tenant_and_sampling(worker: Worker) -> None:
    sampling = inference_pb2.SamplingParams(max_tokens=5, temperature=0, seed=0, stop=["."])
    call = await begin(
        worker, worker.request(sampling=sampling, token_ids=inference_pb2.TokenIds(ids=[4, 5]))
    )
    request = worker.engine.requests["r1"]
    assert (request.tenant, request.prompt_ids) == ("acme", (4, 5))
    assert (request.sampling.max_tokens, request.sampling.temperature) == (5, 0)
    assert (request.sampling.seed, request.sampling.top_p, request.sampling.stop) == (0, 1.0, (".",))
    call.cancel()


async def test_the_engine_gets_priority_and_deadline_on_its_own_clock(worker: Worker) -> None:
    before = time.time()
    call = await begin(worker, worker.request(priority=-7), timeout=100)
    request = worker.engine.requests["r1"]
    assert request.priority == -7
    # gRPC rounds timeouts up on their way; this is about the clock and the unit.
    assert before < request.deadline_ns / 1e9 < before + 1000
    call.cancel()
    call = await begin(worker, worker.request(request_id="r2"))
    assert (worker.engine.requests["r2"].priority, worker.engine.requests["r2"].deadline_ns) == (0, 0)
    call.cancel()


async def test_log_probabilities_come_with_their_tokens_in_messages_of_bounded_size(worker: Worker) -> None:
    call = await begin(worker, worker.request(sampling=inference_pb2.SamplingParams(logprobs=1)))
    await call.read()
    token_ids = range(MAX_DELTA_LOGPROBS + 5)
    logprobs = [TokenLogprobs(token, -0.5, ((token + 1, -0.25),)) for token in token_ids]
    worker.engine.tokens("r1", "text", *token_ids, logprobs=logprobs)
    worker.engine.finish("r1")
    deltas = [message.delta async for message in call if message.HasField("delta")]
    assert [len(delta.token_ids) for delta in deltas] == [MAX_DELTA_LOGPROBS, 5]
    assert [delta.text for delta in deltas] == ["", "text"]
    found = [token for delta in deltas for token in read_logprobs(delta.logprobs)]
    assert found == logprobs


async def test_a_long_prompt_is_told_of_in_messages_of_bounded_size_before_the_output(worker: Worker) -> None:
    call = await begin(worker, worker.request(sampling=inference_pb2.SamplingParams(prompt_logprobs=1)))
    await call.read()
    logprobs = [TokenLogprobs(token, -0.5, ((token + 1, -0.25),)) for token in range(MAX_DELTA_LOGPROBS + 5)]
    worker.engine.prompt("r1", logprobs[:3])
    first = await call.read()
    worker.engine.prompt("r1", logprobs[3:])
    worker.engine.tokens("r1", "text", 1)
    worker.engine.finish("r1")
    rest = [message async for message in call]
    assert rest[-1].HasField("finished")
    assert [message.WhichOneof("event") for message in rest if message.HasField("delta")] == ["delta"]
    pieces = [first, *rest[:-2]]
    assert all(len(message.prompt_logprobs.logprobs) <= MAX_DELTA_LOGPROBS for message in pieces)
    found = [token for message in pieces for token in read_logprobs(message.prompt_logprobs.logprobs)]
    assert found == logprobs


async def test_a_failure_in_the_middle_of_a_prompt_comes_after_what_is_known_of_it(worker: Worker) -> None:
    call = await begin(worker, worker.request(sampling=inference_pb2.SamplingParams(prompt_logprobs=0)))
    await call.read()
    worker.engine.prompt("r1", [TokenLogprobs(1, -0.5)])
    worker.engine.fail("r1", MeshError(Code.INTERNAL, Reason.INTERNAL, "broken"))
    assert (await call.read()).HasField("prompt_logprobs")
    with pytest.raises(grpc.aio.AioRpcError, match="broken"):
        await call.read()


async def test_all_answers_are_taken_or_none(worker: Worker) -> None:
    worker.engine.refusal = MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "full", retry_after=1.0)
    worker.engine.refuse_after = 2
    error = await refused(worker, worker.request(n=3))
    assert error.reason is Reason.OVERLOADED
    assert worker.engine.cancelled == ["r1", "r1"]


async def test_an_error_of_one_answer_ends_all(worker: Worker) -> None:
    call = await begin(worker, worker.request(n=2))
    await call.read()
    # The scripted engine knows the last answer under the request's id.
    worker.engine.fail("r1", MeshError(Code.INTERNAL, Reason.INTERNAL, "broken"))
    with pytest.raises(grpc.aio.AioRpcError, match="broken"):
        await read_all(call)
    assert worker.engine.cancelled == ["r1"]


async def test_a_chat_reaches_the_engine_through_the_template(worker: Worker) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    call = await begin(worker, worker.request(chat=chat))
    assert "".join(map(chr, worker.engine.requests["r1"].prompt_ids)) == "<user>hi<assistant>"
    assert worker.engine.requests["r1"].sampling.seed is None
    call.cancel()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"tenant": ""}, "tenant"),
        ({"adapter_digest": "ner"}, "adapter_digest"),
        ({"text": ""}, "text"),
        ({"token_ids": inference_pb2.TokenIds(ids=[9999])}, "token_ids.ids[0]"),
        ({"sampling": inference_pb2.SamplingParams(temperature=3)}, "sampling.temperature"),
        ({"sampling": inference_pb2.SamplingParams(max_tokens=0)}, "sampling.max_tokens"),
        ({"sampling": inference_pb2.SamplingParams(top_p=float("nan"))}, "sampling.top_p"),
        ({"sampling": inference_pb2.SamplingParams(min_p=2)}, "sampling.min_p"),
        ({"sampling": inference_pb2.SamplingParams(repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": inference_pb2.SamplingParams(presence_penalty=3)}, "sampling.presence_penalty"),
        ({"sampling": inference_pb2.SamplingParams(frequency_penalty=-3)}, "sampling.frequency_penalty"),
        ({"sampling": inference_pb2.SamplingParams(stop_token_ids=[-1])}, "sampling.stop_token_ids"),
        ({"sampling": inference_pb2.SamplingParams(logprobs=21)}, "sampling.logprobs"),
        ({"sampling": inference_pb2.SamplingParams(prompt_logprobs=21)}, "sampling.prompt_logprobs"),
        ({"priority": 101}, "priority"),
        ({"n": 9}, "n"),
        ({"n": -1}, "n"),
    ],
)
async def test_a_bad_field_is_named(worker: Worker, fields: dict[str, Any], field: str) -> None:
    error = await refused(worker, worker.request(**{"request_id": "r1", **fields}))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert error.metadata["field"] == field
    assert worker.engine.requests == {}


async def test_a_request_without_input_is_refused(worker: Worker) -> None:
    request = worker.request()
    request.ClearField("text")
    assert (await refused(worker, request)).metadata["field"] == "input"


async def test_a_long_prompt_is_refused(worker: Worker) -> None:
    error = await refused(worker, worker.request(text="x" * MAX_CONTEXT))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG)


async def test_a_request_for_another_base_is_refused_with_both_digests(worker: Worker) -> None:
    other = digest_bytes(b"another base")
    error = await refused(worker, worker.request(base_digest=other))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert error.metadata["base_digest"] == other
    assert error.metadata["worker_base_digest"] == worker.base.digest


async def test_what_the_engine_refuses_with_reaches_the_caller(worker: Worker) -> None:
    worker.engine.refusal = MeshError(
        Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "the queue is full", retry_after=0.5
    )
    error = await refused(worker, worker.request())
    assert (error.code, error.reason, error.retry_after) == (
        Code.RESOURCE_EXHAUSTED,
        Reason.OVERLOADED,
        0.5,
    )
    assert (await worker.stub.GetStatus(worker_pb2.GetStatusRequest())).state == worker_pb2.WORKER_STATE_READY


async def test_a_failure_in_the_middle_ends_the_stream_with_its_status_after_the_output(
    worker: Worker,
) -> None:
    call = await begin(worker, worker.request())
    worker.engine.tokens("r1", "some", 1)
    worker.engine.fail("r1", MeshError(Code.NOT_FOUND, Reason.VERSION_NOT_FOUND, "no such digest"))
    messages = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            messages.append(await call.read())
    error = mesh_error_from(caught.value)
    assert error.reason is Reason.VERSION_NOT_FOUND
    assert error.metadata["request_id"] == "r1"
    assert [message.WhichOneof("event") for message in messages] == ["started", "delta"]
    assert worker.engine.cancelled == []


async def test_a_client_that_cancels_frees_the_request(worker: Worker) -> None:
    call = await begin(worker, worker.request())
    await call.read()
    call.cancel()
    await until(lambda: worker.engine.cancelled == ["r1"])


async def test_a_deadline_frees_the_request(worker: Worker) -> None:
    call = await begin(worker, worker.request(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: worker.engine.cancelled == ["r1"])


async def test_a_slow_reader_gets_fewer_larger_deltas_and_never_holds_the_engine(worker: Worker) -> None:
    call = await begin(worker, worker.request())
    # The client's window is full long before: the engine's thread goes on all the same.
    for number in range(2000):
        worker.engine.tokens("r1", "x" * 500, number)
    worker.engine.finish("r1")
    messages = await read_all(call)
    deltas = [message.delta for message in messages if message.HasField("delta")]
    assert sum(len(delta.text) for delta in deltas) == 2000 * 500
    assert [token for delta in deltas for token in delta.token_ids] == list(range(2000))
    assert len(deltas) < 2000
    assert messages[-1].HasField("finished")


async def test_a_slow_reader_that_cancels_frees_the_request_though_output_waits(worker: Worker) -> None:
    call = await begin(worker, worker.request())
    for number in range(2000):
        worker.engine.tokens("r1", "x" * 500, number)
    call.cancel()
    await until(lambda: worker.engine.cancelled == ["r1"])


async def test_two_requests_of_one_id_are_two_requests(worker: Worker) -> None:
    one = await begin(worker, worker.request("same"))
    first = worker.engine.requests["same"]
    other = worker.stub.Generate(worker.request("same"))
    await until(lambda: worker.engine.requests["same"] is not first)
    assert worker.engine.requests["same"].request_id != first.request_id
    one.cancel()
    other.cancel()
    await until(lambda: worker.engine.cancelled == ["same", "same"])


async def test_many_streams_do_not_mix(worker: Worker) -> None:
    calls = {name: await begin(worker, worker.request(name)) for name in ("a", "b", "c")}
    for number in range(20):
        for name in calls:
            worker.engine.tokens(name, name, number)
    for name in calls:
        worker.engine.finish(name)
    for name, call in calls.items():
        text = "".join([message.delta.text async for message in call])
        assert text == name * 20
