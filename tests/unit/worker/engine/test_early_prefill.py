"""Prompts that are computed layer by layer while their adapter arrives."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.host_arena import Landing
from adaptermesh.worker.engine.step_plan import Advance
from tests.unit.worker.engine.conftest import LAYERS, Courier

Prompts = Callable[[int, int], list[list[int]]]

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Watch:
    """Remembers which layers of which adapter were computed in which step. Each advance takes a second."""

    def __init__(self, bench: Any) -> None:
        self.seen: list[tuple[str, int, bool]] = []
        self.most_tokens = 0
        inner = bench.engine._runner.advance

        def advance(one: Advance, fresh: list[int]) -> Any:
            self.seen.append((one.early.digest, one.until, one.finishes))
            opened = bench.engine._scheduler._early.opened
            self.most_tokens = max(self.most_tokens, sum(early.tokens for early in opened))
            bench.clock.now += 1.0
            return inner(one, fresh)

        bench.engine._runner.advance = advance

    def layers(self, adapter: Any) -> list[int]:
        return [until for digest, until, _ in self.seen if digest == adapter.digest]


def held(make_bench: Any, **config: Any) -> Any:
    bench = make_bench(**config)
    bench.source.held = True
    return bench


def resident(bench: Any, adapter: Any) -> None:
    """Brings an adapter to a slot and leaves it idle there."""
    bench.source.held = False
    bench.run(bench.submit(adapter, [1], 1))
    bench.source.held = True


def steps(bench: Any, count: int) -> None:
    for _ in range(count):
        bench.engine.step()


def in_slots(bench: Any) -> set[str]:
    """After a step, so that what was dropped is unloaded."""
    bench.engine.step()
    return {digest for digest in bench.engine._slots._digests if digest is not None}


# The way.


@pytest.mark.parametrize("forward", ["auto", "lean"])
def test_the_first_layers_are_computed_before_the_last_byte_is_here(
    lab: Any, make_bench: Any, forward: str
) -> None:
    bench = held(make_bench, forward=forward)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    heard = bench.submit(adapter, PROMPT, 6)
    courier = bench.courier(adapter)
    assert not bench.engine.step()
    for layer in range(1, LAYERS + 1):
        courier.send_layers(layer)
        assert bench.engine.step()
        # Nothing to do until more arrives.
        assert not bench.engine.step()
        assert watch.layers(adapter) == list(range(1, layer + 1))
    assert heard.tokens == []
    assert bench.engine.status().residencies == ()
    courier.finish()
    bench.engine.step()
    assert watch.seen[-1] == (adapter.digest, LAYERS, True)
    assert len(heard.tokens) == 1
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, PROMPT, 6)
    assert heard.outcome.timeline.tier_at_admission is Tier.STORE
    bench.assert_empty()


def test_the_timeline_of_an_early_prefill_says_what_overlapped(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    Watch(bench)
    early, late = bench.submit(adapter, PROMPT, 4), None
    courier = bench.courier(adapter)
    bench.clock.now += 1
    courier.send_layers(1)
    bench.engine.step()
    bench.clock.now += 1
    courier.send_layers(2)
    bench.engine.step()
    late = bench.submit(adapter, PROMPT, 4)
    bench.clock.now += 1
    courier.finish()
    bench.run(early, late)
    line = early.outcome.timeline
    second = 10**9
    start = line.submitted_ns
    assert line.fetch_start_ns - start == 0
    assert line.h2d_start_ns - start == line.scheduled_ns - start == pytest.approx(second)
    assert line.fetch_end_ns - start == line.h2d_end_ns - start == pytest.approx(5 * second)
    assert line.first_token_ns - start == pytest.approx(6 * second)
    # Two layers before the last byte, the third one after it.
    assert line.overlapped_ns == pytest.approx(2 * second)
    other = late.outcome.timeline
    assert (other.overlapped_ns, other.shared_fetch) == (0, True)
    assert other.submitted_ns <= other.h2d_start_ns <= other.h2d_end_ns <= other.scheduled_ns


def test_the_thread_wakes_for_each_layer(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    bench.engine.start()
    heard = bench.submit(adapter, PROMPT, 6)
    courier = bench.courier(adapter)
    for layer in range(1, LAYERS + 1):
        courier.send_layers(layer)
        for _ in range(60_000):
            if layer in watch.layers(adapter):
                break
            threading.Event().wait(0.001)
    courier.finish()
    assert heard.ended.wait(60.0)
    assert heard.tokens == lab.continuation(adapter, PROMPT, 6)
    assert watch.layers(adapter)[:LAYERS] == list(range(1, LAYERS + 1))


def test_an_adapter_that_is_whole_when_the_step_is_planned_takes_the_usual_way(
    lab: Any, make_bench: Any
) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    heard = bench.submit(adapter, PROMPT, 4)
    courier = bench.courier(adapter)
    courier.send_layers(2)
    courier.finish()
    bench.run(heard)
    assert watch.seen == []
    assert heard.tokens == lab.continuation(adapter, PROMPT, 4)
    assert heard.outcome.timeline.overlapped_ns == 0


@pytest.mark.parametrize("config", [{"forward": "plain"}, {"early_tokens": 0}])
def test_where_a_forward_cannot_stop_or_must_not_the_whole_adapter_is_awaited(
    lab: Any, make_bench: Any, config: dict[str, Any]
) -> None:
    bench = held(make_bench, **config)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    heard = bench.submit(adapter, PROMPT, 4)
    courier = bench.courier(adapter)
    courier.send_layers(LAYERS)
    assert not bench.engine.step()
    courier.finish()
    bench.run(heard)
    assert watch.seen == []
    assert heard.tokens == lab.continuation(adapter, PROMPT, 4)


def test_layers_that_an_adapter_leaves_alone_need_no_bytes(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(5, 3, ("o_proj", "gate_proj"), layers=[1])
    watch = Watch(bench)
    heard = bench.submit(adapter, PROMPT, 4)
    courier = bench.courier(adapter)
    courier.send_to(1)
    bench.engine.step()
    assert watch.layers(adapter) == [1]
    courier.finish()
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, PROMPT, 4)


def test_a_landing_counts_leading_layers_by_verified_chunks(lab: Any) -> None:
    adapter = lab.adapter(1, 4)
    landing = Landing("x", adapter.manifest, torch.empty(len(adapter.data), dtype=torch.uint8), LAYERS)
    ends = {chunk.layer: chunk.offset + chunk.size for chunk in adapter.manifest.chunks}
    assert landing.layers_ready == 0
    for layer in range(LAYERS):
        landing.write(adapter.data[landing.position : ends[layer] - 1])
        assert landing.layers_ready == layer
        landing.write(adapter.data[landing.position : ends[layer]])
        assert landing.layers_ready == layer + 1


def test_waiting_rows_of_one_adapter_go_together_and_long_prompts_end_in_chunks(
    lab: Any, make_bench: Any, prompts: Prompts
) -> None:
    bench = held(make_bench, early_tokens=40)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    inputs = [[7] * 9, list(range(90)), [5], [1, 2, 3]]
    heard = [bench.submit(adapter, prompt, 5) for prompt in inputs]
    courier = bench.courier(adapter)
    courier.send_layers(1)
    steps(bench, 2)
    assert bench.engine.status().running == 2
    courier.send_layers(2)
    steps(bench, 2)
    courier.finish()
    bench.run(*heard)
    assert watch.layers(adapter) == [1, 2, 3]
    assert watch.most_tokens == 40
    for one, prompt in zip(heard, inputs, strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 5)
    bench.assert_empty()


def test_a_prompt_of_one_token_is_no_decode_before_its_adapter_is_whole(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    heard = bench.submit(adapter, [9], 4)
    courier = bench.courier(adapter)
    courier.send_layers(2)
    steps(bench, 3)
    assert heard.tokens == []
    courier.finish()
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, [9], 4)


def test_other_rows_decode_meanwhile_and_answer_as_if_alone(
    lab: Any, make_bench: Any, prompts: Prompts
) -> None:
    bench = held(make_bench)
    arriving, here = lab.adapter(1, 4), lab.adapter(2, 8, ("q_proj", "v_proj"))
    resident(bench, here)
    others = [
        bench.submit(adapter, prompt, 30) for adapter, prompt in zip([here, None], prompts(2, 5), strict=True)
    ]
    bench.engine.step()
    heard = bench.submit(arriving, PROMPT, 6)
    courier = bench.courier(arriving)
    for layer in range(1, LAYERS + 1):
        courier.send_layers(layer)
        for _ in range(4):
            before = [len(one.tokens) for one in others]
            bench.engine.step()
            assert [len(one.tokens) for one in others] == [count + 1 for count in before]
    assert heard.tokens == []
    courier.finish()
    bench.run(heard, *others)
    assert heard.tokens == lab.continuation(arriving, PROMPT, 6)
    for one, adapter, prompt in zip(others, [here, None], prompts(2, 5), strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 30)


def test_an_early_prefill_shares_the_steps_budget(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, step_tokens=16, max_batch_rows=16)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    others = [bench.submit(None, [number], 40) for number in range(11)]
    bench.engine.step()
    heard = bench.submit(adapter, [8] * 15, 4)
    courier = bench.courier(adapter)
    courier.send_layers(3)
    # Five tokens are left: one layer of fifteen.
    steps(bench, 2)
    assert watch.layers(adapter) == [1, 2]
    courier.finish()
    bench.run(heard, *others)
    assert heard.tokens == lab.continuation(adapter, [8] * 15, 4)


def test_two_adapters_arrive_at_once_each_at_its_own_pace(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapters = [lab.adapter(1, 4), lab.adapter(2, 8, ("q_proj", "v_proj"))]
    watch = Watch(bench)
    heard = [bench.submit(adapter, PROMPT, 6) for adapter in adapters]
    couriers = [bench.courier(adapter) for adapter in adapters]
    couriers[0].send_layers(1)
    bench.engine.step()
    couriers[1].send_layers(2)
    bench.engine.step()
    couriers[1].finish()
    bench.run(heard[1])
    assert not heard[0].ended.is_set()
    couriers[0].finish()
    bench.run(heard[0])
    assert [watch.layers(adapter) for adapter in adapters] == [[1, 3], [2, 3]]
    for one, adapter in zip(heard, adapters, strict=True):
        assert one.tokens == lab.continuation(adapter, PROMPT, 6)
    bench.assert_empty()


def test_slots_that_move_between_two_layers_change_nothing(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, forward="lean")
    adapter, large = lab.adapter(1, 4), lab.adapter(6, 64)
    heard = bench.submit(adapter, PROMPT, 6)
    courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    arenas = bench.engine._slots._ops["lowrank"]._arenas
    before = arenas["q"]._a.data_ptr()
    resident(bench, large)
    assert arenas["q"]._a.data_ptr() != before
    courier.finish()
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, PROMPT, 6)


def test_a_shared_prefix_is_not_computed_again_by_an_early_prefill(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, device_slots=1, host_bytes=2 * len(lab.adapter(1, 4).data), disk_bytes=0)
    adapter, other = lab.adapter(1, 4), lab.adapter(2, 8, ("q_proj", "v_proj"))
    prompt = [(5 * place) % 250 for place in range(30)]
    bench.source.held = False
    bench.run(bench.submit(adapter, prompt, 2))
    bench.engine.evict(adapter.digest)
    resident(bench, other)
    heard = bench.submit(adapter, prompt, 6)
    courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    assert [early.tokens for early in bench.engine._scheduler._early.opened] == [30 - 24]
    courier.finish()
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, prompt, 6)
    assert heard.outcome.timeline.cached_tokens == 24


def test_a_tenant_is_charged_as_for_an_adapter_that_was_whole(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    heard = [bench.submit(adapter, PROMPT, 5), bench.submit(adapter, PROMPT, 5, request_id="leaves")]
    courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    # The other one starts anew, which costs it nothing.
    bench.engine.cancel("leaves")
    courier.send_layers(2)
    bench.engine.step()
    courier.finish()
    bench.run(*heard)
    served = bench.engine._scheduler._counters.served("tenant")
    assert served == 2 * len(PROMPT) * 1.0 + 5 * 2.0


def test_a_prompt_that_is_scored_waits_for_the_whole_adapter(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    heard = bench.submit(adapter, PROMPT, 4, prompt_logprobs=0)
    courier = bench.courier(adapter)
    courier.send_layers(LAYERS)
    assert not bench.engine.step()
    courier.finish()
    bench.run(heard)
    assert watch.seen == []
    assert heard.tokens == lab.continuation(adapter, PROMPT, 4)


# Ends in the middle.


def end(bench: Any, courier: Any, how: str) -> None:
    if how == "failed":
        courier.fail(MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "no store", retry_after=1.0))
    elif how == "corrupt":
        courier.spoil_layer(LAYERS - 1)
        with pytest.raises(MeshError):
            courier.finish()
    elif how == "cancelled":
        bench.engine.cancel("x")
    else:
        bench.clock.now += 10.0


@pytest.mark.parametrize("layers", [1, LAYERS - 1])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("failed", Reason.STORE_UNREACHABLE),
        ("corrupt", Reason.DATA_CORRUPT),
        ("cancelled", Reason.CANCELLED),
        ("late", Reason.DEADLINE_EXCEEDED),
    ],
)
def test_an_end_in_the_middle_is_typed_and_frees_everything(
    lab: Any, make_bench: Any, how: str, reason: Reason, layers: int
) -> None:
    bench = held(make_bench, device_slots=1)
    adapter = lab.adapter(1, 4)
    bystander = bench.submit(None, PROMPT, 30)
    deadline = int((bench.clock.wall() + 5) * 1e9)
    heard = bench.submit(adapter, PROMPT, 6, request_id="x", deadline_ns=deadline)
    courier = bench.courier(adapter)
    courier.send_layers(layers)
    steps(bench, 2)
    assert in_slots(bench) == {adapter.digest}
    end(bench, courier, how)
    bench.engine.step()
    assert heard.error.reason is reason
    assert heard.tokens == []
    assert in_slots(bench) == set()
    assert bench.source.cancels == ([adapter.digest] if how in ("cancelled", "late") else [])
    bench.run(bystander)
    assert bystander.tokens == lab.continuation(None, PROMPT, 30)
    bench.assert_empty()
    assert bench.engine._residency._table.host_used == 0
    bench.source.held = False
    again = bench.submit(adapter, PROMPT, 6)
    bench.run(again)
    assert again.tokens == lab.continuation(adapter, PROMPT, 6)


@pytest.mark.parametrize("wrong", ["too long", "too short"])
def test_no_token_is_sent_before_the_whole_file_is_verified(lab: Any, make_bench: Any, wrong: str) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(5, 3, ("o_proj", "gate_proj"), layers=[1])
    heard = bench.submit(adapter, PROMPT, 6)
    [(_, sink)] = bench.source.waiting
    sink.begin(adapter.manifest.to_bytes())
    sink.write(adapter.data)
    steps(bench, 3)
    [early] = bench.engine._scheduler._early.opened
    assert (early.done, heard.tokens) == (LAYERS, [])
    if wrong == "too long":
        with pytest.raises(MeshError):
            sink.write(b"x")
    else:
        sink.fail(MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, "the store says so"))
    bench.run(heard)
    assert heard.error.code is Code.DATA_LOSS
    assert heard.tokens == []
    bench.assert_empty()


def test_a_failure_between_two_steps_meets_a_new_request_for_the_same_adapter(
    lab: Any, make_bench: Any
) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    first = bench.submit(adapter, PROMPT, 6)
    courier = bench.courier(adapter)
    courier.send_layers(2)
    bench.engine.step()
    courier.fail(MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "no store"))
    # The failed one still holds the slot; the new one starts a transfer of its own.
    second = bench.submit(adapter, PROMPT, 6)
    other = bench.courier(adapter)
    other.send_layers(1)
    steps(bench, 2)
    assert first.error.reason is Reason.STORE_UNREACHABLE
    other.finish()
    bench.run(second)
    assert second.tokens == lab.continuation(adapter, PROMPT, 6)
    bench.assert_empty()


def test_a_row_that_leaves_makes_the_others_of_its_adapter_start_anew(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    watch = Watch(bench)
    stays = bench.submit(adapter, PROMPT, 6)
    leaves = bench.submit(adapter, [4] * 20, 6, request_id="leaves")
    courier = bench.courier(adapter)
    courier.send_layers(2)
    bench.engine.step()
    bench.engine.cancel("leaves")
    bench.engine.step()
    assert watch.layers(adapter) == [2, 2]
    assert leaves.error.code is Code.CANCELLED
    courier.finish()
    bench.run(stays)
    assert stays.tokens == lab.continuation(adapter, PROMPT, 6)
    # Only what was of use counts.
    assert stays.outcome.timeline.overlapped_ns == pytest.approx(10**9)
    bench.assert_empty()


def test_a_copy_that_fails_in_the_middle_ends_the_rows_and_the_transfer(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    heard = bench.submit(adapter, PROMPT, 6)
    loads: list[Any] = []
    bench.engine.load(adapter.digest, Tier.DEVICE, False, loads.append)
    courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    load_layer = bench.engine._slots._ops["lowrank"].load_layer

    def refuse(*_: Any) -> None:
        raise MeshError(Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED, "too large")

    bench.engine._slots._ops["lowrank"].load_layer = refuse
    courier.send_layers(2)
    bench.engine.step()
    assert heard.error.reason is Reason.ADAPTER_UNSUPPORTED
    assert [error.reason for error in loads] == [Reason.ADAPTER_UNSUPPORTED]
    assert bench.source.cancels == [adapter.digest]
    assert in_slots(bench) == set()
    bench.assert_empty()
    bench.engine._slots._ops["lowrank"].load_layer = load_layer


def test_a_failing_advance_fails_its_own_rows_only(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    other = bench.submit(None, PROMPT, 10)
    heard = bench.submit(adapter, PROMPT, 6)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    bench.engine._runner.advance = broken
    bench.courier(adapter).send_layers(1)
    bench.run(heard, other)
    assert heard.error.code is Code.INTERNAL
    assert other.tokens == lab.continuation(None, PROMPT, 10)
    bench.assert_empty()


def test_layers_that_are_not_loaded_are_never_computed(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench)
    adapter = lab.adapter(1, 4)
    heard = bench.submit(adapter, PROMPT, 6)
    courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    slots = bench.engine._slots
    rows = [(0, adapter.digest)]
    slots.check(rows, 1)
    for layers in (2, None):
        with pytest.raises(MeshError, match="holds 1 of the") as caught:
            slots.check(rows, layers)
        assert caught.value.code is Code.INTERNAL
    # Whatever a plan says: here the table believes that two layers came.
    bench.engine._residency._stage_rest = lambda entry: None
    courier.send_layers(2)
    bench.engine.step()
    assert heard.error.code is Code.INTERNAL
    assert heard.tokens == []


# Giving way.


def test_preemption_in_the_middle_costs_time_only(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, kv_tokens=64, max_context_tokens=64)
    adapter = lab.adapter(1, 4)
    gone: list[Any] = []
    preempt = bench.engine._scheduler._preempt

    def remember(sequence: Any) -> None:
        gone.append(sequence.request.request_id)
        preempt(sequence)

    bench.engine._scheduler._preempt = remember
    other = bench.submit(None, [2, 7], 50)
    bench.engine.step()
    heard = bench.submit(adapter, PROMPT * 2, 6, request_id="x")
    courier = bench.courier(adapter)
    courier.send_layers(1)
    for _ in range(60):
        if gone:
            break
        bench.engine.step()
    assert gone == ["x"]
    courier.finish()
    bench.run(heard, other)
    assert heard.tokens == lab.continuation(adapter, PROMPT * 2, 6)
    assert other.tokens == lab.continuation(None, [2, 7], 50)
    bench.assert_empty()


@pytest.mark.parametrize(
    "config",
    [
        {"device_slots": 1},
        {"max_batch_rows": 1},
        {"kv_tokens": 32, "max_context_tokens": 32},
        {"max_step_adapters": 1},
    ],
)
def test_a_slow_transfer_stalls_nobody_who_could_start(
    lab: Any, make_bench: Any, config: dict[str, int]
) -> None:
    bench = held(make_bench, **config)
    slow, ready = lab.adapter(1, 4), lab.adapter(2, 8, ("q_proj", "v_proj"))
    bench.source.adapters[ready.digest] = ready
    bench.source.held = False
    bench.engine.load(ready.digest, Tier.HOST, False, lambda error: None)
    bench.source.held = True
    waits = bench.submit(slow, PROMPT * 2, 4)
    courier = bench.courier(slow)
    courier.send_layers(1)
    bench.engine.step()
    assert len(bench.engine._scheduler._early) == 1
    fast = bench.submit(ready, PROMPT, 4)
    bench.run(fast, steps=20)
    assert fast.tokens == lab.continuation(ready, PROMPT, 4)
    assert not waits.ended.is_set()
    # Nobody else wants what it needs: on it goes.
    courier.send_layers(2)
    steps(bench, 2)
    assert len(bench.engine._scheduler._early) == 1
    courier.finish()
    bench.run(waits)
    assert waits.tokens == lab.continuation(slow, PROMPT * 2, 4)
    bench.assert_empty()


def test_early_prefills_hold_a_bounded_number_of_tokens(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, early_tokens=20)
    adapters = [lab.adapter(100 + number, 1 + number % 4, ("q_proj", "v_proj")) for number in range(4)]
    watch = Watch(bench)
    heard = [bench.submit(adapter, [7] * 8, 4) for adapter in adapters]
    couriers = [bench.courier(adapter) for adapter in adapters]
    for courier in couriers:
        courier.send_layers(1)
    steps(bench, 3)
    assert [early.tokens for early in bench.engine._scheduler._early.opened] == [8, 8, 4]
    for courier in reversed(couriers):
        courier.finish()
    bench.run(*heard)
    assert watch.most_tokens == 20
    for one, adapter in zip(heard, adapters, strict=True):
        assert one.tokens == lab.continuation(adapter, [7] * 8, 4)
    bench.assert_empty()


def test_a_waiting_adapter_on_the_host_is_staged_ahead_into_an_empty_slot(lab: Any, make_bench: Any) -> None:
    bench = make_bench(max_batch_rows=1, device_slots=3)
    adapters = [lab.adapter(100 + number, 1 + number % 4, ("q_proj", "v_proj")) for number in range(4)]
    heard = [bench.submit(None, [1, 2], 10), *(bench.submit(adapter, [1, 2], 3) for adapter in adapters)]
    bench.engine.step()
    # One a step, in the order of the queue, as long as a slot is empty.
    for count in (1, 2, 3, 3):
        found = [adapter.digest in bench.engine._slots._digests for adapter in adapters]
        assert found == [number < count for number in range(4)]
        bench.engine.step()
    bench.run(*heard)
    for one, adapter in zip(heard[1:], adapters, strict=True):
        assert one.tokens == lab.continuation(adapter, [1, 2], 3)
    bench.assert_empty()


# Any order of events.

KINDS = (
    *["submit"] * 4,
    *["deliver"] * 6,
    *["step"] * 5,
    *["finish", "fail", "corrupt", "cancel", "evict"],
)
events = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 4), st.integers(0, 3)), min_size=30, max_size=100
)


class Story:
    """Plays events on an engine with four adapters whose bytes come when told."""

    def __init__(self, lab: Any, bench: Any) -> None:
        self.lab = lab
        self.bench = bench
        self.adapters = [
            lab.adapter(1, 4),
            lab.adapter(2, 8, ("q_proj", "v_proj")),
            lab.adapter(4, 2, rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 3}),
            lab.adapter(5, 3, ("o_proj", "gate_proj"), layers=[1]),
        ]
        self.inputs = [[9], [3, 1, 4, 1, 5], [7] * 11, [(3 * place) % 250 for place in range(26)]]
        self.asked: list[tuple[Any, list[int], Any]] = []
        self.couriers: dict[str, Any] = {}

    def play(self, event: str, first: int, second: int) -> None:
        if event == "submit":
            adapter = [*self.adapters, None][first]
            heard = self.bench.submit(adapter, self.inputs[second], 5, request_id=f"s{len(self.asked)}")
            self.asked.append((adapter, self.inputs[second], heard))
        elif event == "cancel":
            self.bench.engine.cancel(f"s{4 * first + second}")
        elif event == "step":
            self.bench.engine.step()
        elif event == "evict":
            try:
                self.bench.engine.evict(self.adapters[first % 4].digest)
            except MeshError as error:
                assert error.code is Code.FAILED_PRECONDITION
        else:
            self.transfer(event, self.adapters[first % 4], second)

    def transfer(self, event: str, adapter: Any, layer: int = 0) -> None:
        courier = self.courier(adapter)
        if courier is None:
            return
        # A transfer that has ended refuses, and so does one that what is sent here ends.
        with contextlib.suppress(MeshError):
            if event == "fail":
                courier.fail(MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "no store"))
            elif event == "corrupt":
                courier.spoil_layer(layer)
            elif event == "finish":
                courier.finish()
            else:
                courier.send_layers(courier.layers + 1)

    def courier(self, adapter: Any) -> Any:
        """That of the adapter's last transfer; those before it have ended."""
        waiting = self.bench.source.waiting
        sinks = [sink for digest, sink in waiting if digest == adapter.digest]
        if sinks:
            waiting[:] = [item for item in waiting if item[0] != adapter.digest]
            self.couriers[adapter.digest] = Courier(adapter, sinks[-1])
        return self.couriers.get(adapter.digest)

    def finish(self) -> None:
        """Whatever comes is delivered, until all have ended."""
        for _ in range(400):
            if all(heard.ended.is_set() for *_, heard in self.asked):
                return
            for adapter in self.adapters:
                self.transfer("finish", adapter)
            self.bench.engine.step()
        raise AssertionError("some requests never end")

    def check(self) -> None:
        for adapter, prompt, heard in self.asked:
            if heard.outcome is not None:
                assert heard.tokens == self.lab.continuation(adapter, prompt, 5)
            else:
                assert heard.error.reason in {Reason.CANCELLED, Reason.STORE_UNREACHABLE, Reason.DATA_CORRUPT}
                expected = self.lab.continuation(adapter, prompt, 5)
                assert heard.tokens == expected[: len(heard.tokens)]
        self.bench.engine.step()
        self.bench.assert_empty()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=events,
    slots=st.integers(1, 3),
    rows=st.integers(1, 4),
    kv_tokens=st.sampled_from([40, 80, 400]),
    early_tokens=st.sampled_from([4, 64]),
    step_tokens=st.sampled_from([8, 64]),
    forward=st.sampled_from(["auto", "lean"]),
)
def test_every_request_ends_with_its_own_tokens_or_a_typed_error(
    lab: Any,
    make_bench: Any,
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, int, int]],
    slots: int,
    rows: int,
    kv_tokens: int,
    early_tokens: int,
    step_tokens: int,
    forward: str,
) -> None:
    bench = held(
        make_bench,
        disk_dir=tmp_path_factory.mktemp("disk"),
        disk_bytes=0,
        device_slots=slots,
        max_batch_rows=rows,
        kv_tokens=kv_tokens,
        max_context_tokens=40,
        early_tokens=early_tokens,
        step_tokens=step_tokens,
        forward=forward,
        max_overtakes=3,
    )
    story = Story(lab, bench)
    for event in events:
        story.play(*event)
    story.finish()
    story.check()
    bench.engine.stop()


# Loads ahead of any request use early slots too.


class Ended:
    """What a load was told."""

    def __init__(self) -> None:
        self.errors: list[MeshError | None] = []

    def __call__(self, error: MeshError | None) -> None:
        self.errors.append(error)


def early_load(lab: Any, bench: Any, adapter: Any) -> tuple[Any, Ended]:
    """A load into a slot whose layers are all staged, but not verified to the last byte."""
    bench.source.adapters[adapter.digest] = adapter
    ended = Ended()
    bench.engine.load(adapter.digest, Tier.DEVICE, True, ended)
    courier = bench.courier(adapter)
    for layer in range(1, lab.facts.num_layers + 1):
        courier.send_layers(layer)
        bench.engine.step()
    return courier, ended


def test_a_load_is_staged_as_it_arrives_and_done_with_its_last_byte(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, device_slots=1)
    adapter = lab.adapter(1, 4)
    courier, ended = early_load(lab, bench, adapter)
    assert bench.engine._slots.is_whole(0, adapter.digest)
    assert ended.errors == []
    courier.finish()
    assert ended.errors == [None]
    [view] = bench.engine.status().residencies
    assert (view.tier, view.pinned, view.requests) == (Tier.DEVICE, True, 0)
    heard = bench.submit(adapter, [1, 2], 4)
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, [1, 2], 4)
    bench.engine.evict(adapter.digest)
    bench.assert_empty()


def test_a_load_that_fails_midway_gives_its_slot_back(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, device_slots=1)
    adapter, other = lab.adapter(1, 4), lab.adapter(2, 4)
    courier, ended = early_load(lab, bench, adapter)
    courier.fail(MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "gone"))
    assert [error.reason for error in ended.errors if error] == [Reason.STORE_UNREACHABLE]
    assert bench.engine.status().tiers.device_used_slots == 0
    resident(bench, other)
    heard = bench.submit(other, [1, 2], 4)
    bench.run(heard)
    assert heard.tokens == lab.continuation(other, [1, 2], 4)
    bench.assert_empty()


def test_a_request_shares_the_early_slot_of_a_load(lab: Any, make_bench: Any) -> None:
    bench = held(make_bench, device_slots=1)
    adapter = lab.adapter(1, 4)
    courier, ended = early_load(lab, bench, adapter)
    heard = bench.submit(adapter, [1, 2], 4)
    bench.engine.step()
    courier.finish()
    bench.run(heard)
    assert ended.errors == [None]
    assert heard.tokens == lab.continuation(adapter, [1, 2], 4)
    bench.assert_empty()
