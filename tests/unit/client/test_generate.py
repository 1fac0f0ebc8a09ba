import pytest

from adaptermesh.client import (
    Ask,
    Code,
    Deadlines,
    Delta,
    Event,
    Finished,
    MeshClient,
    MeshError,
    Message,
    Prompt,
    PromptLogprobs,
    Reason,
    SamplingParams,
    Started,
    SwitchKind,
    TokenLogprobs,
)
from adaptermesh.rpc.sampling import read_sampling
from tests.unit.client.fake_services import FakeGateway, serve


class Ticks:
    """A clock that goes on by one second with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def wall(self) -> float:
        return self.now


async def test_events_come_in_order_with_their_contents(mesh: MeshClient) -> None:
    events = [event async for event in mesh.generate("Hello", task="pirate")]
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert (started.adapter_version, started.tier, started.switch_kind) == (
        "demo/pirate:v1",
        "store",
        SwitchKind.COLD,
    )
    assert (started.cohort, started.route_generation, started.worker_id) == ("canary", 3, "w-1")
    assert deltas == [Delta("Aye, ", (0,)), Delta("aye", (1,)), Delta("!", (2,))]
    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.timings.fetch, finished.timings.fetched_bytes) == (
        "stop",
        0.01,
        4096,
    )
    assert (finished.timings.h2d, finished.timings.overlap) == (0.0, 0.002)


async def test_a_collected_answer_names_what_served_it(gateway: FakeGateway) -> None:
    async with serve(gateway) as address, MeshClient(address, clock=Ticks(), new_id=lambda: "r-1") as mesh:
        answer = await mesh.complete("Hello", adapter="acme/ner:v2")
    assert answer.text == "Aye, aye!"
    assert answer.token_ids == (0, 1, 2)
    assert (answer.version, answer.request_id) == ("acme/ner:v2", "r-1")
    assert answer.digest == "sha256:" + "a" * 64
    assert answer.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert (answer.ttft, answer.duration) == (1.0, 2.0)


async def test_the_base_model_has_no_tier_and_no_digest(mesh: MeshClient) -> None:
    answer = await mesh.complete("Hello", adapter="base")
    assert (answer.version, answer.digest) == ("base", "")
    assert (answer.started.tier, answer.started.switch_kind) == ("", SwitchKind.NONE)


async def test_what_is_asked_for_travels_as_metadata(mesh: MeshClient, gateway: FakeGateway) -> None:
    ask = Ask(tenant="acme", cohort_key="user-7", base_model="tiny", request_id="r-9", min_feed_position=12)
    await mesh.complete("Hello", task="ner", ask=ask)
    sent = gateway.metadata[0]
    assert sent["x-model-task"] == "ner"
    assert (sent["x-tenant-id"], sent["x-cohort-key"]) == ("acme", "user-7")
    assert (sent["x-request-id"], sent["x-feed-position"]) == ("r-9", "12")
    assert "x-adapter-id" not in sent
    assert gateway.requests[0].base_model == "tiny"


async def test_requests_without_an_id_get_a_fresh_one(mesh: MeshClient, gateway: FakeGateway) -> None:
    await mesh.complete("Hello")
    await mesh.complete("Hello")
    first, second = (sent["x-request-id"] for sent in gateway.metadata)
    assert first != second
    assert "x-feed-position" not in gateway.metadata[0]


async def test_each_kind_of_prompt_arrives_as_what_it_is(mesh: MeshClient, gateway: FakeGateway) -> None:
    await mesh.complete("Hello")
    await mesh.complete(Prompt.chat("Hello", system="Be brief."))
    await mesh.complete(Prompt.raw("Once"))
    await mesh.complete(Prompt(token_ids=(3, 4)))
    await mesh.complete(Prompt(messages=(Message("user", "a"), Message("assistant", "b"))))
    plain, chat, raw, tokens, messages = gateway.requests
    assert [(m.role, m.content) for m in plain.chat.messages] == [("user", "Hello")]
    assert [(m.role, m.content) for m in chat.chat.messages] == [("system", "Be brief."), ("user", "Hello")]
    assert raw.text == "Once"
    assert list(tokens.token_ids.ids) == [3, 4]
    assert [m.role for m in messages.chat.messages] == ["user", "assistant"]


async def test_sampling_is_greedy_unless_it_is_given(mesh: MeshClient, gateway: FakeGateway) -> None:
    await mesh.complete("Hello")
    params = SamplingParams(5, 0.7, 0.9, 40, 11, ("\n",), ignore_eos=True)
    await mesh.complete("Hello", sampling=params)
    default, given = (request.sampling for request in gateway.requests)
    assert (default.temperature, default.max_tokens, default.HasField("seed")) == (0.0, 256, False)
    assert (given.max_tokens, given.temperature, given.top_p, given.top_k) == (5, 0.7, 0.9, 40)
    assert (given.seed, list(given.stop), given.ignore_eos) == (11, ["\n"], True)


async def test_penalties_stop_tokens_and_priority_are_sent(mesh: MeshClient, gateway: FakeGateway) -> None:
    params = SamplingParams(
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        stop_token_ids=(2, 3),
        logprobs=0,
        prompt_logprobs=0,
    )
    await mesh.complete("Hello", sampling=params, ask=Ask(priority=7))
    [request] = gateway.requests
    assert read_sampling(request.sampling) == params
    assert request.priority == 7
    with pytest.raises(MeshError) as caught:
        mesh.generate("Hello", ask=Ask(priority=101))
    assert caught.value.metadata["field"] == "priority"


async def test_log_probabilities_come_with_the_deltas_and_with_the_whole(mesh: MeshClient) -> None:
    events: list[Event] = []
    answer = await mesh.generate("Hello", sampling=SamplingParams(logprobs=1)).collect(events.append)
    assert [token.token_id for token in answer.logprobs] == list(answer.token_ids)
    assert answer.logprobs[1] == TokenLogprobs(1, -1.0, ((1, -1.0),))
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [len(delta.logprobs) for delta in deltas] == [1, 1, 1]
    assert (await mesh.complete("Hello")).logprobs == ()


async def test_log_probabilities_of_the_prompt_come_as_events_and_with_the_whole(mesh: MeshClient) -> None:
    events: list[Event] = []
    answer = await mesh.generate("Hello", sampling=SamplingParams(prompt_logprobs=1)).collect(events.append)
    assert answer.prompt_logprobs == tuple(TokenLogprobs(token, -2.0, ((token, -2.0),)) for token in (4, 5))
    pieces = [event for event in events if isinstance(event, PromptLogprobs)]
    assert [len(piece.logprobs) for piece in pieces] == [1, 1]
    assert answer.text == "Aye, aye!"
    assert (await mesh.complete("Hello")).prompt_logprobs == ()


async def test_several_answers_are_put_together_each_from_its_own_deltas(
    mesh: MeshClient, gateway: FakeGateway
) -> None:
    answer = await mesh.complete("Hello", n=3)
    assert [choice.text for choice in answer.choices] == ["Aye, aye!"] * 3
    assert [choice.token_ids for choice in answer.choices] == [(0, 1, 2)] * 3
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length", "length"]
    assert answer.text == answer.choices[0].text
    assert gateway.requests[0].n == 3
    assert len((await mesh.complete("Hello")).choices) == 1
    with pytest.raises(MeshError) as caught:
        mesh.generate("Hello", n=9)
    assert caught.value.metadata["field"] == "n"


async def test_a_bad_sampling_value_is_refused_before_it_is_sent(
    mesh: MeshClient, gateway: FakeGateway
) -> None:
    with pytest.raises(MeshError) as caught:
        mesh.generate("Hello", sampling=SamplingParams(top_p=0))
    assert caught.value.metadata["field"] == "sampling.top_p"
    assert gateway.requests == []


async def test_a_refusal_keeps_its_reason_and_has_the_request_id(
    mesh: MeshClient, gateway: FakeGateway
) -> None:
    gateway.refuse = MeshError(
        Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "the queue is full", retry_after=2.0
    )
    with pytest.raises(MeshError, match="the queue is full") as caught:
        await mesh.complete("Hello", ask=Ask(request_id="r-3"))
    assert (caught.value.reason, caught.value.retry_after) == (Reason.OVERLOADED, 2.0)
    assert caught.value.metadata["request_id"] == "r-3"


async def test_a_lost_worker_ends_the_stream_with_unavailable_and_the_request_id(
    mesh: MeshClient, gateway: FakeGateway
) -> None:
    gateway.fail_after = 2
    seen: list[Event] = []
    stream = mesh.generate("Hello")
    with pytest.raises(MeshError) as caught:
        await stream.collect(seen.append)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.WORKER_LOST)
    assert caught.value.metadata["request_id"] == stream.request_id
    assert caught.value.metadata["worker_id"] == "w-1"
    assert len(seen) == 3


async def test_a_stream_without_an_end_is_an_error_not_an_answer(
    mesh: MeshClient, gateway: FakeGateway
) -> None:
    gateway.finish = False
    with pytest.raises(MeshError, match="without a finish reason"):
        await mesh.complete("Hello")


async def test_leaving_the_stream_cancels_the_request(mesh: MeshClient, gateway: FakeGateway) -> None:
    gateway.hang = True
    async with mesh.generate("Hello") as stream:
        async for event in stream:
            if isinstance(event, Delta):
                break
    await gateway.cancelled.wait()


async def test_a_deadline_ends_a_hanging_answer(gateway: FakeGateway) -> None:
    gateway.hang = True
    deadlines = Deadlines(generate_seconds=0.2)
    async with serve(gateway) as address, MeshClient(address, deadlines=deadlines) as mesh:
        with pytest.raises(MeshError) as caught:
            await mesh.complete("Hello")
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert caught.value.metadata["request_id"]


async def test_a_gateway_that_is_not_there_is_named() -> None:
    async with MeshClient("127.0.0.1:1") as mesh:
        with pytest.raises(MeshError, match=r"nothing answers at 127\.0\.0\.1:1"):
            await mesh.complete("Hello")


async def test_every_page_of_models_is_listed(mesh: MeshClient) -> None:
    models = await mesh.list_models()
    assert [model.id for model in models] == ["base", *(f"demo/a{n}:v1" for n in range(4))]
    assert models[1].aliases == ("prod",)
