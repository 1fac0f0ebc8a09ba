"""The main job: many adapters over one base, chosen per request, swapped while requests stream."""

import asyncio
import itertools

import pytest

from adaptermesh.client import (
    Ask,
    Delta,
    MeshError,
    Prompt,
    SamplingParams,
    Started,
    SwitchKind,
    WorkerClient,
)
from adaptermesh.telemetry.trace_reader import SpanRecord, load_trace
from adaptermesh.testing import Rig, eventually

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

SWITCH_PATH = {
    "gateway.request",
    "router.resolve",
    "router.pick",
    "worker.admit",
    "adapter.fetch",
    "adapter.h2d",
    "engine.prefill",
    "engine.decode",
}


async def whole_trace(rig: Rig, trace_id: str, names: set[str]) -> list[SpanRecord]:
    """The trace's spans, once every service has written its own."""

    async def look() -> list[SpanRecord] | None:
        try:
            spans = await asyncio.to_thread(load_trace, rig.mesh.config.traces, trace_id)
        except MeshError:
            return None
        return spans if names <= {span.name for span in spans} else None

    return await eventually(look)


async def evict_everywhere(rig: Rig, digest: str) -> None:
    for address in rig.mesh.endpoints.workers:
        async with WorkerClient(address) as worker:
            await worker.evict(digest)


async def test_interleaved_requests_name_a_task_a_ref_or_the_base_and_each_gets_its_own(rig: Rig) -> None:
    asked = [
        *((task, {"task": task}, f"{adapter.ref}:v1") for task, adapter in rig.adapters.items()),
        ("v2", {"adapter": "demo/financial-ner:v2"}, "demo/financial-ner:v2"),
        ("base", {"adapter": "base"}, "base"),
    ]
    rounds = list(itertools.chain.from_iterable(itertools.repeat(asked, 3)))
    prompt = "List the entities: Acme sold Initech for $3 million in May."
    answers = await asyncio.gather(
        *(rig.generate(prompt, max_tokens=16, **choice) for _, choice, _ in rounds)  # type: ignore[arg-type]
    )
    by_choice: dict[str, set[tuple[int, ...]]] = {}
    for (name, _, version), answer in zip(rounds, answers, strict=True):
        assert answer.version == version
        assert bool(answer.digest) == (version != "base")
        by_choice.setdefault(name, set()).add(answer.token_ids)
    assert all(len(tokens) == 1 for tokens in by_choice.values()), "the batch changed somebody's answer"
    assert len(set.union(*by_choice.values())) == len(asked), "two of them answered alike"


async def test_the_response_metadata_say_what_served_it(rig: Rig) -> None:
    answer = await rig.generate("How are you?", task="pirate", max_tokens=4)
    resolved = (await rig.store.resolve("demo/pirate@prod")).version
    started = answer.started
    assert (answer.version, answer.digest) == ("demo/pirate:v1", resolved.digest)
    assert started.ref == "demo/pirate@prod"
    assert started.base_digest == resolved.base_digest
    assert started.worker_id == (await rig.router.list_workers())[0].worker_id
    assert started.route_generation >= 1
    assert len(answer.trace_id) == 32


async def test_the_first_switch_is_cold_and_the_next_one_warm(rig: Rig) -> None:
    version = (await rig.store.resolve("demo/pirate:v1")).version
    await evict_everywhere(rig, version.digest)
    cold = await rig.generate("Hello", adapter="demo/pirate:v1", max_tokens=4)
    warm = await rig.generate("Hello", adapter="demo/pirate:v1", max_tokens=4)
    assert (cold.started.switch_kind, warm.started.switch_kind) == (SwitchKind.COLD, SwitchKind.WARM)
    assert cold.finished.timings.fetched_bytes == version.size_bytes
    assert warm.finished.timings.fetched_bytes == 0
    assert cold.token_ids == warm.token_ids


async def test_one_trace_of_a_cold_switch_runs_through_all_four_services(rig: Rig) -> None:
    version = (await rig.store.resolve("demo/text-to-sql:v1")).version
    await evict_everywhere(rig, version.digest)
    answer = await rig.generate("Write SQL: How many people work in Legal?", task="text-to-sql")
    spans = await whole_trace(rig, answer.trace_id, SWITCH_PATH)
    assert {span.service for span in spans} == {"gateway", "router", "store", "worker"}
    assert {span.trace_id for span in spans} == {answer.trace_id}
    ids = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in ids]
    assert [root.name for root in roots] == ["gateway.request"]
    by_name = {span.name: span for span in spans}
    root = by_name["gateway.request"]
    assert root.attributes["gen_ai.request.model"] == "text-to-sql"
    assert root.attributes["gen_ai.response.model"] == "demo/text-to-sql:v1"
    assert root.attributes["adaptermesh.adapter.digest"] == version.digest
    assert root.attributes["adaptermesh.switch.kind"] == "cold"
    # The path's steps come in its order.
    steps = [
        "router.resolve",
        "router.pick",
        "worker.admit",
        "adapter.h2d",
        "engine.prefill",
        "engine.decode",
    ]
    starts = [by_name[name].start_ns for name in steps]
    assert by_name["adapter.fetch"].start_ns >= by_name["router.pick"].end_ns
    assert starts[:3] == sorted(starts[:3])
    assert by_name["engine.prefill"].end_ns <= by_name["engine.decode"].end_ns
    for span in spans:
        assert root.start_ns <= span.start_ns <= span.end_ns
        assert span.status != "error"


async def test_the_callers_own_trace_is_joined(rig: Rig) -> None:
    import grpc.aio

    from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc

    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with grpc.aio.insecure_channel(rig.mesh.endpoints.gateway) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="Hi", sampling=inference_pb2.SamplingParams(max_tokens=2)),
            metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),),
            timeout=60,
        )
        assert [message.WhichOneof("event") async for message in call][-1] == "finished"
    spans = await whole_trace(rig, trace_id, {"gateway.request", "engine.decode"})
    assert {span.trace_id for span in spans} == {trace_id}


async def test_alias_flip_never_reaches_a_request_in_flight_and_rollback_is_one_too(rig: Rig) -> None:
    adapter = rig.adapters["financial-ner"]
    prod = f"{adapter.ref}@prod"
    ask = Ask(min_feed_position=rig.position)
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    stream = rig.client.generate(adapter.prompts[0], task=adapter.task, sampling=sampling, ask=ask)
    try:
        events = aiter(stream)
        started = await anext(events)
        assert isinstance(started, Started)
        first = await anext(events)
        assert isinstance(first, Delta)
        flip = await rig.store.set_alias(prod, "v2", comment="hot swap")
        after = await rig.generate(
            adapter.prompts[0], task=adapter.task, max_tokens=64, position=flip.feed_position
        )
        assert after.version == f"{adapter.ref}:v2"
        tokens = list(first.token_ids)
        async for event in events:
            if isinstance(event, Delta):
                tokens += event.token_ids
        assert started.adapter_version == f"{adapter.ref}:v1"
    finally:
        back = await rig.store.roll_back(prod, comment="as it was")
    again = await rig.client.complete(
        adapter.prompts[0],
        task=adapter.task,
        sampling=sampling,
        ask=Ask(min_feed_position=back.feed_position),
    )
    assert again.version == f"{adapter.ref}:v1"
    assert list(again.token_ids) == tokens, "the flip changed a request that was running"
    assert again.token_ids[: len(after.token_ids)] != after.token_ids
    history = await rig.store.alias_history(prod)
    assert [move.version_number for move in history[:2]] == [1, 2]


async def test_a_route_with_shares_keeps_a_cohort_key_on_its_share(rig: Rig) -> None:
    from adaptermesh.client import RouteTarget

    targets = [RouteTarget("demo/pirate:v1", 1, "arr"), RouteTarget("base", 1, "plain")]
    change = await rig.store.set_route("split", targets, tenant="acme")
    asks = [
        Ask(tenant="acme", cohort_key=f"user-{user}", min_feed_position=change.feed_position)
        for user in range(12)
        for _ in range(2)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    answers = await asyncio.gather(
        *(rig.client.complete("Hi", task="split", ask=ask, sampling=sampling) for ask in asks)
    )
    cohorts = [answer.started.cohort for answer in answers]
    assert cohorts[::2] == cohorts[1::2], "a user changed sides"
    assert set(cohorts) == {"arr", "plain"}
    assert all(
        (answer.version == "base") == (cohort == "plain")
        for answer, cohort in zip(answers, cohorts, strict=True)
    )


async def test_the_same_seed_draws_the_same_tokens_whatever_else_is_served(rig: Rig) -> None:
    drawn = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=12, seed=7, ignore_eos=True)
    alone = await rig.client.complete(Prompt.chat("Tell me a story."), adapter="base", sampling=drawn)
    others = [rig.generate(f"Question {n}?", task="pirate", max_tokens=12) for n in range(4)]
    mixed, *_ = await asyncio.gather(
        rig.client.complete(Prompt.chat("Tell me a story."), adapter="base", sampling=drawn), *others
    )
    assert mixed.token_ids == alone.token_ids


async def test_list_models_names_the_base_and_every_adapter(rig: Rig) -> None:
    models = {model.id: model for model in await rig.client.list_models()}
    assert "base" in models
    assert {"demo/pirate:v1", "demo/text-to-sql:v1"} <= models.keys()
