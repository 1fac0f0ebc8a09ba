"""Deadlines and priorities of requests, and what a refusal says about the queue."""

import threading
from typing import Any

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.deadlines import Deadlines
from adaptermesh.worker.engine.pace import Pace


def soon(bench: Any, seconds: float) -> int:
    return int((bench.clock.wall() + seconds) * 1e9)


@pytest.mark.parametrize("state", ["fetching", "waiting", "prefilling", "decoding"])
def test_a_deadline_in_every_state_frees_everything(lab: Any, make_bench: Any, state: str) -> None:
    bench = make_bench(max_batch_rows=1 if state == "waiting" else 4, step_tokens=4, device_slots=1)
    bench.source.held = state == "fetching"
    other = bench.submit(None, [1], 30) if state == "waiting" else None
    late = bench.submit(lab.adapter(1, 4), [1] * 20, 30, deadline_ns=soon(bench, 5))
    for _ in range({"fetching": 2, "waiting": 3, "prefilling": 2, "decoding": 9}[state]):
        bench.engine.step()
    assert bool(late.tokens) == (state == "decoding")
    bench.clock.now += 4.9
    bench.engine.step()
    assert not late.ended.is_set()
    said = len(late.tokens)
    bench.clock.now += 0.2
    bench.engine.step()
    assert (late.error.code, late.error.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
    assert len(late.tokens) == said
    if other is not None:
        bench.run(other)
        assert other.outcome
    bench.assert_empty()
    # The slot is free for another adapter, and the rows for others.
    bench.source.held = False
    again = bench.submit(lab.adapter(2, 8, ("q_proj", "v_proj")), [1], 2)
    bench.run(again)
    assert again.outcome


def test_a_deadline_that_has_passed_is_refused_at_once(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    with pytest.raises(MeshError) as caught:
        bench.submit(lab.adapter(1, 4), [1], 2, deadline_ns=soon(bench, 0))
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert bench.source.fetches == []
    bench.assert_empty()


def test_the_thread_wakes_for_the_deadline_of_a_waiting_request(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    late = bench.submit(lab.adapter(1, 4), [1], 2, deadline_ns=soon(bench, 5))
    bench.engine.start()
    # The thread has nothing to compute; nobody but its own bounded wait tells it that time has passed.
    bench.clock.now += 6
    assert late.ended.wait(60.0)
    assert late.error.code is Code.DEADLINE_EXCEEDED
    bench.assert_empty()


def test_the_wait_is_no_longer_than_the_next_deadline(make_bench: Any) -> None:
    bench = make_bench()
    now = soon(bench, 0)
    deadlines: Deadlines = bench.engine._deadlines
    assert deadlines.seconds_left(now, 0.5) == 0.5
    bench.submit(None, [1], 2, deadline_ns=now + 200_000_000)
    bench.submit(None, [1], 2, deadline_ns=now + 100_000_000)
    assert deadlines.seconds_left(now, 0.5) == pytest.approx(0.1)
    assert deadlines.seconds_left(now, 0.05) == 0.05
    assert deadlines.seconds_left(now + 10**9, 0.5) == 0.0


def test_far_deadlines_of_ended_requests_are_not_kept(make_bench: Any) -> None:
    bench = make_bench()
    for _ in range(300):
        bench.submit(None, [1], 1, request_id="x", deadline_ns=soon(bench, 1e6))
        bench.engine.cancel("x")
        bench.engine.step()
    assert len(bench.engine._deadlines) <= 65


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"priority": 101}, "priority"), ({"priority": -101}, "priority"), ({"deadline_ns": -1}, "deadline_ns")],
)
def test_values_out_of_range_are_refused(make_bench: Any, settings: dict[str, int], field: str) -> None:
    with pytest.raises(MeshError) as caught:
        make_bench().submit(None, [1], 2, **settings)
    assert caught.value.metadata == {"field": field}


def test_the_urgent_request_is_answered_first(make_bench: Any) -> None:
    bench = make_bench(max_batch_rows=1)
    order: list[int] = []
    heard = [bench.submit(None, [1], 2, priority=priority) for priority in (-100, 0, 100)]
    for _ in range(20):
        bench.engine.step()
        order += [at for at, one in enumerate(heard) if one.ended.is_set() and at not in order]
    assert order == [2, 1, 0]


def refusal(bench: Any) -> float:
    with pytest.raises(MeshError) as caught:
        bench.submit(None, [1], 2)
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after is not None
    return caught.value.retry_after


def test_a_refusals_delay_follows_the_queue_and_the_pace(make_bench: Any) -> None:
    bench = make_bench(max_waiting=2, max_batch_rows=1, prefix_cache=False)
    run = bench.engine._runner.run

    def slowly(*rest: Any) -> Any:
        bench.clock.now += 1.0
        return run(*rest)

    bench.engine._runner.run = slowly
    first = bench.submit(None, [1] * 10, 1)
    bench.run(first)
    # Ten tokens took a second.
    waiting = [bench.submit(None, [1] * 30, 2, request_id=name) for name in ("a", "b")]
    assert refusal(bench) == pytest.approx(6.0)
    bench.engine.cancel("a")
    bench.engine.step()
    # "b" runs now.
    bench.submit(None, [1], 2, request_id="c")
    bench.submit(None, [1], 2, request_id="d")
    assert refusal(bench) == pytest.approx(0.1)
    for name in ("b", "c", "d"):
        bench.engine.cancel(name)
    bench.run(*waiting)


def test_the_pace_is_clamped_and_prefers_the_recent() -> None:
    pace = Pace()
    assert pace.seconds_for(10**6) == 1.0
    pace.note(100, 1.0)
    assert pace.seconds_for(0) == 0.1
    assert pace.seconds_for(10**9) == 30.0
    for _ in range(100):
        pace.note(1000, 1.0)
    assert pace.seconds_for(2000) == pytest.approx(2.0, rel=0.01)


def test_requests_with_deadlines_from_many_threads_all_end(make_bench: Any) -> None:
    bench = make_bench(max_batch_rows=2)
    heard = []
    lock = threading.Lock()

    def ask(number: int) -> None:
        one = bench.submit(
            None,
            [number],
            4,
            request_id=f"t{number}",
            tenant=f"tenant-{number % 3}",
            priority=number % 5,
            deadline_ns=soon(bench, 1000),
        )
        with lock:
            heard.append(one)

    bench.engine.start()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in heard:
        assert one.ended.wait(60.0)
        assert one.outcome
    bench.assert_empty()
