"""Adapters on their way through the tiers, under requests."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.status import TierBudgets

Prompts = Callable[[int, int], list[list[int]]]


def tiers(bench: Any) -> dict[str, Tier]:
    return {view.digest: view.tier for view in bench.engine.status().residencies}


def some(lab: Any, count: int) -> list[Any]:
    return [lab.adapter(100 + number, 1 + number % 4, ("q_proj", "v_proj")) for number in range(count)]


def test_concurrent_misses_share_one_fetch_with_the_first_context(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    adapter = lab.adapter(1, 4)
    heard = [bench.submit(adapter, [number], 4) for number in range(5)]
    assert bench.source.fetches == [adapter.digest]
    assert bench.source.contexts == ["context"]
    bench.source.release()
    bench.run(*heard)
    assert all(one.tokens == lab.continuation(adapter, [n], 4) for n, one in enumerate(heard))
    assert bench.source.fetches == [adapter.digest]


def test_waiting_for_a_fetch_blocks_nobody_else(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    slow = bench.submit(lab.adapter(1, 4), [1, 2], 4)
    fast = bench.submit(None, [1, 2], 4)
    bench.run(fast)
    assert not slow.ended.is_set()
    bench.source.release()
    bench.run(slow)


def test_a_failed_fetch_fails_exactly_its_waiters_and_a_later_request_retries(
    lab: Any, make_bench: Any
) -> None:
    bench = make_bench()
    bench.source.held = True
    adapter, other = some(lab, 2)
    waiters = [bench.submit(adapter, [1], 4) for _ in range(2)]
    bystander = bench.submit(other, [1], 4)
    [(_, sink), (_, other_sink)] = bench.source.waiting
    sink.fail(MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "no store", retry_after=1.0))
    sink.fail(MeshError(Code.INTERNAL, Reason.INTERNAL, "too late"))
    bench.run(*waiters)
    assert [one.error.reason for one in waiters] == [Reason.STORE_UNREACHABLE] * 2
    bench.source.send(other.digest, other_sink)
    bench.source.waiting.clear()
    bench.run(bystander)
    assert bystander.outcome
    bench.source.held = False
    again = bench.submit(adapter, [1], 4)
    bench.run(again)
    assert again.tokens == lab.continuation(adapter, [1], 4)
    bench.assert_empty()


def spoiled(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("spoil", [spoiled, lambda data: data[:-1], lambda data: data + b"x"])
def test_corrupt_bytes_reach_exactly_the_waiters_as_an_error(
    lab: Any, make_bench: Any, spoil: Callable[[bytes], bytes]
) -> None:
    bench = make_bench()
    adapter, other = some(lab, 2)
    bench.source.spoil = spoil
    waiter = bench.submit(adapter, [1], 4)
    bench.source.spoil = None
    bystander = bench.submit(other, [1], 4)
    bench.run(waiter, bystander)
    assert (waiter.error.code, waiter.error.reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
    assert bystander.outcome
    assert adapter.digest not in tiers(bench)
    again = bench.submit(adapter, [1], 4)
    bench.run(again)
    assert again.tokens == lab.continuation(adapter, [1], 4)


def test_another_manifest_than_the_digests_is_refused(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapter, other = some(lab, 2)
    bench.source.held = True
    waiter = bench.submit(adapter, [1], 4)
    [(_, sink)] = bench.source.waiting
    with pytest.raises(MeshError) as caught:
        sink.begin(other.manifest.to_bytes())
    assert caught.value.reason is Reason.DATA_CORRUPT
    bench.run(waiter)
    assert waiter.error.reason is Reason.DATA_CORRUPT


def test_an_unknown_adapter_is_an_error_and_never_the_base(make_bench: Any, lab: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    adapter = lab.adapter(1, 4)
    heard = bench.submit(adapter, [1], 4)
    del bench.source.adapters[adapter.digest]
    bench.source.release()
    bench.run(heard)
    assert heard.error.code is Code.NOT_FOUND
    assert heard.tokens == []
    assert tiers(bench) == {}


def test_an_adapter_of_another_base_is_refused_with_both_digests(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapter = lab.adapter(1, 4)
    object.__setattr__(bench.base.facts, "digest", "sha256:" + "b" * 64)
    try:
        heard = bench.submit(adapter, [1], 4)
        bench.run(heard)
    finally:
        object.__setattr__(bench.base.facts, "digest", adapter.manifest.base.digest)
    assert heard.error.reason is Reason.BASE_MISMATCH
    assert heard.error.metadata["base_digest"] == "sha256:" + "b" * 64


@pytest.mark.parametrize("max_overtakes", [0, 64])
def test_one_adapter_more_than_slots_all_finish(lab: Any, make_bench: Any, max_overtakes: int) -> None:
    bench = make_bench(device_slots=3, max_batch_rows=8, max_overtakes=max_overtakes)
    adapters = some(lab, 4)
    heard = [(adapters[n % 4], n, bench.submit(adapters[n % 4], [n, 1], 3 + n % 5)) for n in range(24)]
    bench.run(*(one for _, _, one in heard))
    for adapter, number, one in heard:
        assert one.tokens == lab.continuation(adapter, [number, 1], 3 + number % 5)
    bench.assert_empty()


def test_requests_for_resident_adapters_do_not_overtake_for_ever(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1, max_batch_rows=4, max_overtakes=3)
    resident, starving = some(lab, 2)
    running = [bench.submit(resident, [1], 6)]
    bench.engine.step()
    waiting = bench.submit(starving, [2], 2)
    for turn in range(60):
        # Somebody always asks for the resident adapter.
        running.append(bench.submit(resident, [turn], 6))
        bench.engine.step()
        if waiting.ended.is_set():
            break
    assert waiting.outcome, "the request starved"
    bench.run(*running)
    bench.assert_empty()


def test_host_memory_smaller_than_the_demand_costs_time_only(lab: Any, make_bench: Any) -> None:
    adapters = some(lab, 6)
    largest = max(len(adapter.data) for adapter in adapters)
    bench = make_bench(device_slots=2, host_bytes=2 * largest, disk_bytes=largest)
    heard = [(adapter, bench.submit(adapter, [n], 4)) for n, adapter in enumerate(adapters * 2)]
    bench.run(*(one for _, one in heard))
    for number, (adapter, one) in enumerate(heard):
        assert one.tokens == lab.continuation(adapter, [number], 4)
    bench.assert_empty()


def device_bytes(adapter: Any) -> int:
    return int(adapter.manifest.cost.device_bytes)


def test_device_memory_smaller_than_the_demand_costs_time_only(lab: Any, make_bench: Any) -> None:
    adapters = [lab.adapter(seed, rank) for seed, rank in ((1, 4), (2, 16), (3, 2), (4, 8), (5, 4))]
    largest = max(device_bytes(adapter) for adapter in adapters)
    bench = make_bench(device_slots=8, device_bytes=largest)
    heard = [(adapter, bench.submit(adapter, [n], 4)) for n, adapter in enumerate(adapters * 3)]
    most = 0
    for _ in range(3000):
        if all(one.ended.is_set() for _, one in heard):
            break
        if not bench.engine.step():
            threading.Event().wait(0.001)
        most = max(most, bench.engine._residency._table.device_used)
    assert 0 < most <= largest
    for number, (adapter, one) in enumerate(heard):
        assert one.tokens == lab.continuation(adapter, [number], 4)
    assert bench.engine.status().tiers.device_budget_bytes == largest
    bench.assert_empty()


def test_a_large_adapter_does_not_starve_behind_small_ones(lab: Any, make_bench: Any) -> None:
    small = [lab.adapter(seed, 2) for seed in (1, 2, 3, 4)]
    large = lab.adapter(2, 16)
    room = max(device_bytes(large), sum(map(device_bytes, small)))
    bench = make_bench(device_slots=8, device_bytes=room, max_overtakes=2)
    running = [bench.submit(adapter, [n], 6) for n, adapter in enumerate(small)]
    bench.engine.step()
    waiting = bench.submit(large, [7], 3)
    for turn in range(200):
        # Somebody always asks for each of the small ones.
        running.append(bench.submit(small[turn % 4], [turn], 3 + turn % 4))
        if not bench.engine.step():
            threading.Event().wait(0.001)
        if waiting.ended.is_set():
            break
    assert waiting.outcome, "the request starved"
    assert waiting.tokens == lab.continuation(large, [7], 3)
    bench.run(*running)
    bench.assert_empty()


def test_one_staged_ahead_that_gives_way_in_the_same_step_leaves_no_bytes(lab: Any, make_bench: Any) -> None:
    first, small, large = lab.adapter(3, 2), lab.adapter(1, 2), lab.adapter(2, 16)
    bench = make_bench(device_slots=4, device_bytes=device_bytes(large), max_batch_rows=1)
    # Holds the slot that the large one will get.
    bench.run(bench.submit(first, [1], 1))
    running = bench.submit(None, [1], 12)
    bench.engine.step()
    # The row is taken, so that the small one is staged ahead; the load of the large one then takes its room.
    waiting = bench.submit(small, [2], 3)
    loaded = Done()
    bench.source.adapters[large.digest] = large
    bench.engine.load(large.digest, Tier.DEVICE, False, loaded)
    bench.engine.step()
    assert loaded.errors == [None]
    slots = bench.engine._slots
    assert [digest for slot in range(4) if (digest := slots.digest(slot))] == [large.digest]
    bench.run(running, waiting)
    assert waiting.tokens == lab.continuation(small, [2], 3)
    bench.assert_empty()


def test_an_adapter_larger_than_the_device_memory_is_refused(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_bytes=100)
    heard = bench.submit(lab.adapter(1, 4), [1], 4)
    bench.run(heard)
    assert heard.error.code is Code.RESOURCE_EXHAUSTED
    assert "device memory" in heard.error.message
    assert heard.error.retry_after is None
    bench.assert_empty()


def test_an_adapter_larger_than_the_host_memory_is_refused(lab: Any, make_bench: Any) -> None:
    bench = make_bench(host_bytes=1000)
    heard = bench.submit(lab.adapter(1, 4), [1], 4)
    bench.run(heard)
    assert heard.error.code is Code.RESOURCE_EXHAUSTED
    assert heard.error.retry_after is None
    bench.assert_empty()


def test_the_disk_cache_survives_a_restart_and_serves_without_the_store(lab: Any, make_bench: Any) -> None:
    first = make_bench()
    adapter = lab.adapter(1, 4)
    first.run(first.submit(adapter, [1, 2], 4))
    first.engine.stop()
    second = make_bench()
    assert tiers(second) == {adapter.digest: Tier.DISK}
    heard = second.submit(adapter, [1, 2], 4)
    second.run(heard)
    assert heard.tokens == lab.continuation(adapter, [1, 2], 4)
    assert heard.outcome.timeline.tier_at_admission is Tier.DISK
    assert heard.outcome.timeline.fetch_start_ns == 0
    assert second.source.fetches == []


@pytest.mark.parametrize("damaged", ["tensors", "manifest"])
def test_a_damaged_disk_copy_is_dropped_and_fetched_anew(lab: Any, make_bench: Any, damaged: str) -> None:
    bench = make_bench()
    adapter = lab.adapter(1, 4)
    bench.run(bench.submit(adapter, [1, 2], 4))
    bench.wait_for_disk(len(adapter.data))
    other = make_bench()
    folder = bench.config.disk_dir / adapter.digest.replace(":", "-")
    if damaged == "tensors":
        path = folder / "tensors.safetensors"
        path.write_bytes(spoiled(path.read_bytes()))
    else:
        (folder / "manifest.json").write_bytes(b"{}")
    heard = other.submit(adapter, [1, 2], 4)
    other.run(heard)
    assert heard.tokens == lab.continuation(adapter, [1, 2], 4)
    assert other.source.fetches == [adapter.digest]
    other.assert_empty()
    other.wait_for_disk(len(adapter.data))
    assert (folder / "tensors.safetensors").read_bytes() == adapter.data


class Done:
    """Remembers how a load ended."""

    def __init__(self) -> None:
        self.errors: list[MeshError | None] = []
        self.event = threading.Event()

    def __call__(self, error: MeshError | None) -> None:
        self.errors.append(error)
        self.event.set()


def test_a_load_brings_an_adapter_to_its_tier(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    first, second = some(lab, 2)
    bench.source.adapters.update({a.digest: a for a in (first, second)})
    done = [Done(), Done()]
    bench.engine.load(first.digest, Tier.HOST, False, done[0])
    bench.engine.load(second.digest, Tier.DEVICE, True, done[1])
    assert done[0].errors == [None]
    assert done[1].errors == []
    bench.engine.step()
    assert done[1].errors == [None]
    assert tiers(bench) == {first.digest: Tier.HOST, second.digest: Tier.DEVICE}
    warm = bench.submit(second, [1], 2)
    bench.run(warm)
    assert warm.outcome.timeline.tier_at_admission is Tier.DEVICE
    bench.assert_empty()


def test_a_load_without_a_free_slot_is_refused_and_a_pinned_slot_is_kept(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1)
    first, second = some(lab, 2)
    bench.source.adapters.update({a.digest: a for a in (first, second)})
    pinned, refused, later = Done(), Done(), Done()
    bench.engine.load(first.digest, Tier.DEVICE, True, pinned)
    bench.engine.step()
    bench.engine.load(second.digest, Tier.DEVICE, False, refused)
    bench.engine.step()
    assert pinned.errors == [None]
    assert [error.code for error in refused.errors if error] == [Code.RESOURCE_EXHAUSTED]
    bench.engine.evict(first.digest)
    bench.engine.load(second.digest, Tier.DEVICE, False, later)
    bench.engine.step()
    assert later.errors == [None]
    assert first.digest not in tiers(bench)


def test_an_unpinned_adapter_makes_room_for_who_waits(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1)
    first, second = some(lab, 2)
    bench.source.adapters[first.digest] = first
    bench.engine.load(first.digest, Tier.DEVICE, True, Done())
    bench.engine.step()
    waiting = bench.submit(second, [1, 2], 3)
    for _ in range(5):
        bench.engine.step()
    assert waiting.tokens == []
    view = bench.engine.unpin(first.digest)
    assert (view.tier, view.pinned) == (Tier.DEVICE, False)
    bench.run(waiting)
    assert waiting.tokens == lab.continuation(second, [1, 2], 3)
    assert tiers(bench)[first.digest] is Tier.HOST
    gone = bench.engine.unpin("sha256:" + "0" * 64)
    assert (gone.tier, gone.pinned, gone.requests) == (Tier.STORE, False, 0)
    bench.assert_empty()


def test_adapters_pinned_on_the_host_leave_the_slots_to_all(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1)
    adapters = some(lab, 3)
    bench.source.adapters.update({adapter.digest: adapter for adapter in adapters})
    for adapter in adapters[:2]:
        bench.engine.load(adapter.digest, Tier.HOST, True, Done())
    heard = [bench.submit(adapter, [1, 2], 4) for adapter in adapters * 2]
    bench.run(*heard)
    for adapter, one in zip(adapters * 2, heard, strict=True):
        assert one.tokens == lab.continuation(adapter, [1, 2], 4)
    held = {view.digest: view for view in bench.engine.status().residencies}
    assert [held[adapter.digest].pinned for adapter in adapters] == [True, True, False]
    assert all(held[adapter.digest].tier >= Tier.HOST for adapter in adapters[:2])
    bench.assert_empty()


def test_evicting_spares_what_is_in_use_and_leaves_the_others(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    used, idle = some(lab, 2)
    bench.run(bench.submit(idle, [1], 2))
    heard = bench.submit(used, [1, 2], 12)
    for _ in range(3):
        bench.engine.step()
    with pytest.raises(MeshError) as caught:
        bench.engine.evict(used.digest)
    assert caught.value.code is Code.FAILED_PRECONDITION
    bench.engine.evict(idle.digest)
    bench.engine.evict("sha256:" + "0" * 64)
    bench.run(heard)
    assert heard.tokens == lab.continuation(used, [1, 2], 12)
    assert set(tiers(bench)) == {used.digest}


def test_an_idle_resident_adapter_stays_listed(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapter = lab.adapter(1, 4)
    bench.run(bench.submit(adapter, [1], 2))
    [view] = bench.engine.status().residencies
    assert (view.digest, view.tier, view.requests) == (adapter.digest, Tier.DEVICE, 0)
    assert view.size_bytes == len(adapter.data)


def test_the_status_tells_what_each_tier_holds_and_may_hold(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=2, host_bytes=2**22, disk_bytes=2**21)
    assert bench.engine.status().tiers == TierBudgets(0, 0, 0, 2**22, 0, 2**21)
    first, second = some(lab, 2)
    bench.run(bench.submit(first, [1], 2), bench.submit(second, [1], 2))
    held = len(first.data) + len(second.data)
    bench.wait_for_disk(held)
    full = bench.engine.status().tiers
    assert (full.host_used_bytes, full.disk_used_bytes, full.device_used_slots) == (held, held, 2)
    assert full.device_used_bytes == bench.engine._slots.size_bytes > 0
    bench.engine.evict(first.digest)
    left = bench.engine.status().tiers
    assert (left.host_used_bytes, left.disk_used_bytes, left.device_used_slots) == (
        len(second.data),
        len(second.data),
        1,
    )


def test_an_op_that_cannot_be_staged_fails_its_requests_and_frees_the_slot(lab: Any, make_bench: Any) -> None:
    bench = make_bench(device_slots=1)
    bad, good = some(lab, 2)
    reserve = bench.engine._slots.reserve

    def refuse(slot: int, digest: str, manifest: Any) -> None:
        if digest == bad.digest:
            raise MeshError(Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED, "too large")
        reserve(slot, digest, manifest)

    bench.engine._slots.reserve = refuse
    heard = [bench.submit(bad, [1], 4), bench.submit(bad, [2], 4), bench.submit(good, [1], 4)]
    bench.run(*heard)
    assert [one.error.reason for one in heard[:2]] == [Reason.ADAPTER_UNSUPPORTED] * 2
    assert heard[2].tokens == lab.continuation(good, [1], 4)
    bench.assert_empty()


def test_churn_every_answer_is_its_own_adapters(lab: Any, make_bench: Any, prompts: Prompts) -> None:
    """Random arrivals, cancellations, evictions and loads over few slots and little memory."""
    adapters = [*some(lab, 7), lab.adapter(1, 4), lab.adapter(4, 2, rank_pattern={"q_proj": 6})]
    largest = max(len(adapter.data) for adapter in adapters)
    bench = make_bench(
        device_slots=3, host_bytes=3 * largest, disk_bytes=4 * largest, kv_tokens=256, max_overtakes=4
    )
    generator = torch.Generator().manual_seed(11)
    inputs = prompts(5, 9)

    def pick(count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=generator))

    asked: list[tuple[Any, list[int], int, Any, str]] = []
    done: list[Done] = []
    for turn in range(160):
        action = pick(10)
        if action < 6:
            adapter = [*adapters, None][pick(len(adapters) + 1)]
            prompt, count = inputs[pick(len(inputs))], 1 + pick(8)
            heard = bench.submit(adapter, prompt, count, request_id=f"c{turn}")
            asked.append((adapter, prompt, count, heard, f"c{turn}"))
        elif action == 6 and asked:
            bench.engine.cancel(asked[pick(len(asked))][4])
        elif action == 7:
            try:
                bench.engine.evict(adapters[pick(len(adapters))].digest)
            except MeshError as error:
                assert error.code is Code.FAILED_PRECONDITION
        elif action == 8:
            adapter = adapters[pick(len(adapters))]
            bench.source.adapters[adapter.digest] = adapter
            done.append(Done())
            bench.engine.load(adapter.digest, Tier(2 + pick(3)), False, done[-1])
        bench.clock.now += 0.5
        bench.engine.step()
    bench.run(*(heard for *_, heard, _ in asked))
    for adapter, prompt, count, heard, _ in asked:
        if heard.outcome is not None:
            assert heard.tokens == lab.continuation(adapter, prompt, 8)[:count]
        else:
            assert heard.error.code is Code.CANCELLED
    assert sum(heard.outcome is not None for *_, heard, _ in asked) > 60
    for one in done:
        for _ in range(1000):
            if one.errors:
                break
            bench.engine.step()
            one.event.wait(0.001)
        assert len(one.errors) == 1
    bench.assert_empty()
