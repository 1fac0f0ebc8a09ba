import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.router.booking import Bookings
from adaptermesh.router.catalogue import Catalogue, Event, VersionRemoved
from adaptermesh.router.catch_up import CatchUp
from adaptermesh.router.dispatch import Decision, Dispatcher, Request
from adaptermesh.router.resolution import Question
from adaptermesh.router.settings import RouterSettings
from adaptermesh.router.workers import Load, ReportStream, Residency, WorkerRegistry
from adaptermesh.telemetry.tracing import trace_into
from adaptermesh.testing.clock import ManualClock
from tests.unit.router.fakes import (
    BASE,
    OTHER_BASE,
    MemoryStore,
    alias,
    image,
    route,
    until,
    version,
    worker_delta,
    worker_snapshot,
)

V1, V2 = version(number=1), version(number=2)
ELSEWHERE = version("acme/sql", base=OTHER_BASE)
SETTINGS = RouterSettings(
    catch_up_seconds=30,
    feed_wait_seconds=30,
    startup_grace_seconds=0,
    base_return_seconds=60,
    retry_after_seconds=1.5,
)


class Router:
    """A dispatcher whose catalogue only moves when the test or a catch-up moves it."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.catalogue = Catalogue()
        self.clock = ManualClock()
        self.bookings = Bookings(self.clock, 10)
        self.registry = WorkerRegistry(self.bookings, self.clock, SETTINGS)
        self.catch_up = CatchUp(self.store, self.catalogue, SETTINGS)
        self.spans = InMemorySpanExporter()
        self.dispatcher = Dispatcher(
            self.catalogue,
            self.catch_up,
            self.registry,
            self.bookings,
            SystemClock(),
            trace_into(self.spans),
            SETTINGS,
        )

    def publish(self, *events: Event) -> None:
        """The store commits and the catalogue has it."""
        self.store.commit(*events)
        self.catalogue.replace(image(*self.store.log))

    def join(self, worker_id: str = "w1", **fields: object) -> ReportStream:
        stream = self.registry.open_stream()
        stream.take(1, worker_snapshot(worker_id, **fields))  # type: ignore[arg-type]
        return stream

    async def ask(
        self,
        ref: str | None = None,
        task: str | None = None,
        request_id: str = "r1",
        base_model: str = "",
        excluded: tuple[str, ...] = (),
        min_feed_position: int = 0,
        remaining: float | None = None,
    ) -> Decision:
        question = Question("default", "k", task, ref, base_model)
        request = Request(request_id, question, frozenset(excluded), min_feed_position)
        return await self.dispatcher.dispatch(request, remaining)

    async def refusal(self, ref: str | None = None, **fields: object) -> MeshError:
        with pytest.raises(MeshError) as caught:
            await self.ask(ref, **fields)  # type: ignore[arg-type]
        return caught.value

    def span(self, name: str) -> ReadableSpan:
        return [span for span in self.spans.get_finished_spans() if span.name == name][-1]


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    made = Router()
    async with AsyncExitStack() as stack:
        task = asyncio.create_task(made.catch_up.run())
        stack.push_async_callback(lambda: asyncio.wait((task,)))
        stack.callback(task.cancel)
        yield made


async def test_a_decision_names_the_version_the_worker_and_where_the_adapter_is(router: Router) -> None:
    router.publish(BASE, V1, alias(V1), route("ner", ("acme/ner@prod", 1, "stable"), generation=7))
    router.join("w1")
    router.join("w2", load=Load(1), residencies=[Residency(V1.digest, Tier.HOST)])
    decision = await router.ask(task="ner")
    assert decision.resolution.version == V1
    assert decision.resolution.cohort == "stable"
    assert decision.pick.worker.info.worker_id == "w2"
    assert decision.pick.tier is Tier.HOST
    assert decision.feed_position == 4


async def test_nothing_is_awaited_when_nothing_is_missing(router: Router) -> None:
    router.publish(BASE, V1)
    router.join()
    coroutine = router.ask("acme/ner:v1")
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert router.store.watches == []


async def test_load_is_booked_at_dispatch_so_that_a_burst_spreads(router: Router) -> None:
    router.publish(BASE, V1)
    for worker_id in ("w1", "w2", "w3"):
        router.join(worker_id)
    for number in range(6):
        await router.ask("base", request_id=f"r{number}")
    assert [router.bookings.counts.get(worker_id, 0) for worker_id in ("w1", "w2", "w3")] == [2, 2, 2]


async def test_concurrent_first_requests_of_an_adapter_go_to_one_worker(router: Router) -> None:
    router.publish(BASE, V1)
    streams = {worker_id: router.join(worker_id) for worker_id in ("w1", "w2", "w3")}
    first = await router.ask("acme/ner:v1", request_id="r0")
    home = first.pick.worker.info.worker_id
    assert first.pick.tier is Tier.STORE
    # Admitted and being fetched: not resident yet, but that is where it will be.
    streams[home].take(2, worker_delta(waiting=1, admitted=["r0"]))
    second = await router.ask("acme/ner:v1", request_id="r1")
    assert second.pick.worker.info.worker_id == home


async def test_a_refused_request_is_not_booked(router: Router) -> None:
    router.publish(BASE, V1)
    assert (await router.refusal("acme/ner:v1")).reason is Reason.NO_WORKER
    assert len(router.bookings) == 0


async def test_a_request_sent_again_after_a_failure_moves_its_booking(router: Router) -> None:
    router.publish(BASE, V1)
    router.join("w1")
    router.join("w2")
    first = (await router.ask("acme/ner:v1")).pick.worker.info.worker_id
    second = (await router.ask("acme/ner:v1", excluded=(first,))).pick.worker.info.worker_id
    assert first != second
    assert (router.bookings.counts.get(first, 0), router.bookings.counts.get(second, 0)) == (0, 1)
    error = await router.refusal("acme/ner:v1", excluded=("w1", "w2"))
    assert (error.code, error.reason, error.retry_after) == (Code.UNAVAILABLE, Reason.NO_WORKER, 1.5)


async def test_an_alias_flip_is_seen_by_later_requests_only(router: Router) -> None:
    router.publish(BASE, V1, V2, alias(V1))
    router.join()
    before = await router.ask("acme/ner@prod")
    router.publish(alias(V2, generation=2))
    after = await router.ask("acme/ner@prod", request_id="r2")
    assert before.resolution.version == V1
    assert after.resolution.version == V2
    assert after.feed_position == before.feed_position + 1


async def test_before_the_first_snapshot_the_answer_is_to_try_again(router: Router) -> None:
    router.join()
    for ref in ("acme/ner:v1", "base"):
        error = await router.refusal(ref)
        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.CATALOGUE_STALE)
        assert error.retry_after == 1.5


async def test_a_name_that_was_published_a_moment_ago_is_found(router: Router) -> None:
    router.publish(BASE)
    router.join()
    router.store.commit(V1, route("ner", ("acme/ner:v1", 1, "a")))
    assert (await router.ask(task="ner")).resolution.version == V1


async def test_a_name_that_the_store_does_not_know_either_is_not_found(router: Router) -> None:
    router.publish(BASE, V1)
    router.join()
    for fields, reason in (
        ({"task": "x"}, Reason.TASK_NOT_FOUND),
        ({"ref": "acme/x"}, Reason.ADAPTER_NOT_FOUND),
        ({"ref": "acme/ner:v9"}, Reason.VERSION_NOT_FOUND),
        ({"ref": "acme/ner@x"}, Reason.ALIAS_NOT_FOUND),
        ({"base_model": "x"}, Reason.BASE_NOT_FOUND),
    ):
        error = await router.refusal(**fields)
        assert (error.code, error.reason) == (Code.NOT_FOUND, reason)


async def test_an_unknown_name_is_not_denied_while_the_store_is_away(router: Router) -> None:
    router.publish(BASE, V1)
    router.join()
    router.store.available = False
    error = await router.refusal("acme/x:v1")
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.CATALOGUE_STALE)
    assert (await router.ask("acme/ner:v1")).resolution.version == V1


async def test_a_removed_number_is_refused_for_good_and_a_removed_digest_only_by_the_store(
    router: Router,
) -> None:
    removed = VersionRemoved(V2.adapter, 2, V2.digest, "2026-11-30T19:00:00+00:00")
    router.publish(BASE, V1, V2, removed)
    router.join()
    router.store.available = False
    assert (await router.refusal("acme/ner:v2")).reason is Reason.VERSION_DELETED
    assert (await router.refusal(f"acme/ner@{V2.digest}")).reason is Reason.CATALOGUE_STALE
    router.store.available = True
    assert (await router.refusal(f"acme/ner@{V2.digest}")).reason is Reason.VERSION_DELETED


async def test_an_unknown_name_is_not_denied_when_there_is_no_time_to_ask(router: Router) -> None:
    router.publish(BASE)
    router.store.silent = True
    assert (await router.refusal("acme/x:v1", remaining=0.01)).reason is Reason.CATALOGUE_STALE


async def test_a_position_of_the_future_is_waited_for(router: Router) -> None:
    router.publish(BASE, V1, V2, alias(V1))
    router.join()
    waiting = asyncio.create_task(router.ask("acme/ner@prod", min_feed_position=5))
    await until(lambda: bool(router.store.watches))
    assert not waiting.done()
    router.publish(alias(V2, generation=2))
    decision = await waiting
    assert decision.resolution.version == V2
    assert decision.feed_position == 5


async def test_a_position_that_the_store_has_is_there_without_waiting_for_the_feed(router: Router) -> None:
    router.publish(BASE, V1, V2, alias(V1))
    router.join()
    router.store.commit(alias(V2, generation=2))
    assert (await router.ask("acme/ner@prod", min_feed_position=5)).resolution.version == V2


async def test_a_position_that_does_not_come_in_time_is_a_stale_catalogue(router: Router) -> None:
    router.publish(BASE, V1)
    router.join()
    error = await router.refusal("acme/ner:v1", min_feed_position=9, remaining=0.06)
    assert (error.code, error.reason, error.retry_after) == (Code.UNAVAILABLE, Reason.CATALOGUE_STALE, 1.5)


async def test_an_adapter_on_a_base_that_no_worker_serves_is_refused_with_both_digests(
    router: Router,
) -> None:
    router.publish(BASE, OTHER_BASE, ELSEWHERE)
    router.join()
    error = await router.refusal("acme/sql:v1")
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert error.metadata["adapter_base_digest"] == OTHER_BASE.digest
    assert error.metadata["base_digest"] == BASE.digest


async def test_while_a_base_is_between_two_workers_its_requests_may_be_sent_again(router: Router) -> None:
    router.publish(BASE, OTHER_BASE, ELSEWHERE)
    router.join("w1")
    router.join("w2", base=OTHER_BASE).close()
    assert (await router.refusal("acme/sql:v1")).reason is Reason.NO_WORKER
    router.join("w3", base=OTHER_BASE)
    assert (await router.ask("acme/sql:v1")).pick.worker.info.worker_id == "w3"


async def test_the_bare_base_is_served_by_its_only_base_or_by_the_one_that_was_named(router: Router) -> None:
    router.publish(BASE, OTHER_BASE)
    router.join("w1")
    assert (await router.ask()).pick.worker.info.base_digest == BASE.digest
    router.join("w2", base=OTHER_BASE)
    assert (await router.refusal()).code is Code.INVALID_ARGUMENT
    assert (await router.ask("base", base_model="other")).pick.worker.info.worker_id == "w2"


async def test_a_request_without_an_id_is_refused(router: Router) -> None:
    assert (await router.refusal(request_id="")).metadata["field"] == "request_id"


async def test_the_spans_say_what_was_resolved_and_where_it_goes(router: Router) -> None:
    router.publish(
        BASE, V1, alias(V1), route("ner", ("acme/ner@prod", 1, "stable"), tenant="*", generation=7)
    )
    router.join("w1", residencies=[Residency(V1.digest, Tier.DEVICE)])
    router.join("w2")
    await router.ask(task="ner")
    assert dict(router.span("router.resolve").attributes or {}) == {
        "adaptermesh.tenant.id": "default",
        "adaptermesh.catalogue.position": 4,
        "adaptermesh.adapter.ref": "acme/ner@prod",
        "adaptermesh.adapter.version": "acme/ner:v1",
        "adaptermesh.adapter.digest": V1.digest,
        "adaptermesh.adapter.op_kinds": ("lowrank",),
        "adaptermesh.adapter.bytes": 1234,
        "adaptermesh.route.name": "*/ner",
        "adaptermesh.route.generation": 7,
        "adaptermesh.route.cohort": "stable",
        "adaptermesh.route.variant": "acme/ner@prod",
    }
    assert dict(router.span("router.pick").attributes or {}) == {
        "adaptermesh.worker.id": "w1",
        "adaptermesh.switch.tier": "device",
        "adaptermesh.pick.candidates": 2,
        "adaptermesh.pick.excluded": 0,
    }


async def test_a_refusal_is_an_error_in_its_span(router: Router) -> None:
    router.publish(BASE, V1)
    await router.refusal("acme/ner:v1")
    assert router.span("router.resolve").status.status_code is StatusCode.UNSET
    assert router.span("router.pick").status.status_code is StatusCode.ERROR
