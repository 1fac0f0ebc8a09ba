"""What becomes of a request: endings, refusals, cancellation, failures."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.request import FinishReason


def until(condition: Callable[[], bool]) -> None:
    """Polls, at most a minute."""
    for _ in range(60_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not come to that")


def test_max_tokens_end_with_length(make_bench: Any) -> None:
    bench = make_bench()
    heard = bench.submit(None, [1, 2, 3], 5)
    bench.run(heard)
    assert heard.outcome.finish_reason is FinishReason.LENGTH
    assert (heard.outcome.prompt_tokens, heard.outcome.output_tokens, len(heard.tokens)) == (3, 5, 5)
    assert heard.text == bench.base.decode(heard.tokens)


def test_the_context_ends_with_length(make_bench: Any) -> None:
    bench = make_bench(max_context_tokens=16)
    heard = bench.submit(None, [1] * 12, 100)
    bench.run(heard)
    assert heard.outcome.finish_reason is FinishReason.LENGTH
    assert heard.outcome.output_tokens == 4


def test_an_end_token_ends_with_stop_and_has_no_text(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    expected = lab.continuation(None, [5, 6, 7], 12)
    ending = expected[4]
    first = expected.index(ending)
    object.__setattr__(bench.base, "eos_ids", frozenset({ending, 999}))
    heard = bench.submit(None, [5, 6, 7], 12, ignore_eos=False)
    ignoring = bench.submit(None, [5, 6, 7], 12)
    bench.run(heard, ignoring)
    assert heard.tokens == expected[: first + 1]
    assert heard.outcome.finish_reason is FinishReason.STOP
    assert heard.text == bench.base.decode(expected[:first])
    assert ignoring.tokens == expected


def test_a_stop_token_ends_as_the_end_token_does_even_where_that_is_ignored(
    lab: Any, make_bench: Any
) -> None:
    bench = make_bench()
    expected = lab.continuation(None, [5, 6, 7], 12)
    first = expected.index(expected[4])
    heard = bench.submit(None, [5, 6, 7], 12, ignore_eos=True, stop_token_ids=(200, expected[4]))
    bench.run(heard)
    assert heard.tokens == expected[: first + 1]
    assert heard.outcome.output_tokens == first + 1
    assert heard.outcome.finish_reason is FinishReason.STOP
    assert heard.text == bench.base.decode(expected[:first])
    bench.assert_empty()


def test_a_stop_string_ends_the_text_before_it(make_bench: Any) -> None:
    bench = make_bench()
    whole = bench.submit(None, [8, 8, 8], 30, temperature=1.0, seed=3)
    bench.run(whole)
    stop = next(
        whole.text[at : at + 3] for at in range(5, len(whole.text)) if "�" not in whole.text[at : at + 3]
    )
    heard = bench.submit(None, [8, 8, 8], 30, temperature=1.0, seed=3, stop=(stop,))
    bench.run(heard)
    assert heard.outcome.finish_reason is FinishReason.STOP
    assert heard.text == whole.text[: whole.text.index(stop)]
    bench.assert_empty()


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        ([], {}, Reason.INVALID_FIELD),
        ([260], {}, Reason.INVALID_FIELD),
        ([-1], {}, Reason.INVALID_FIELD),
        ([1] * 256, {}, Reason.PROMPT_TOO_LONG),
        ([1], {"temperature": -1.0}, Reason.INVALID_FIELD),
    ],
)
def test_a_bad_request_is_refused(
    make_bench: Any, prompt: list[int], settings: dict[str, Any], reason: Reason
) -> None:
    bench = make_bench()
    with pytest.raises(MeshError) as caught:
        bench.submit(None, prompt, **settings)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.reason is reason
    bench.assert_empty()


def test_a_full_queue_refuses_with_a_delay(make_bench: Any) -> None:
    bench = make_bench(max_waiting=2)
    heard = [bench.submit(None, [1], 2) for _ in range(2)]
    with pytest.raises(MeshError) as caught:
        bench.submit(None, [1], 2)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after
    bench.run(*heard)
    bench.run(bench.submit(None, [1], 2))


def test_the_same_request_id_twice_is_refused(make_bench: Any) -> None:
    bench = make_bench()
    bench.submit(None, [1], 2, request_id="x")
    with pytest.raises(MeshError) as caught:
        bench.submit(None, [1], 2, request_id="x")
    assert caught.value.metadata == {"field": "request_id"}


@pytest.mark.parametrize("state", ["fetching", "waiting", "prefilling", "decoding"])
def test_cancellation_in_every_state_frees_everything(lab: Any, make_bench: Any, state: str) -> None:
    bench = make_bench(max_batch_rows=1 if state == "waiting" else 4, step_tokens=4)
    adapter = lab.adapter(1, 4)
    bench.source.held = state == "fetching"
    blocker = bench.submit(None, [1], 30, request_id="blocker")
    if state != "waiting":
        bench.engine.cancel("blocker")
    heard = bench.submit(adapter, [1] * 20, 30, request_id="x")
    for _ in range({"fetching": 2, "waiting": 3, "prefilling": 2, "decoding": 9}[state]):
        bench.engine.step()
    assert bool(heard.tokens) == (state == "decoding")
    assert bench.engine.status().running == (0 if state == "fetching" else 1)
    bench.engine.cancel("x")
    bench.engine.step()
    assert heard.error.code is Code.CANCELLED
    assert bench.source.cancels == ([adapter.digest] if state == "fetching" else [])
    bench.engine.cancel("blocker")
    bench.run(blocker)
    bench.assert_empty()
    bench.source.release()
    bench.engine.cancel("x")
    bench.engine.cancel("never seen")
    bench.engine.step()
    bench.assert_empty()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(make_bench: Any) -> None:
    bench = make_bench(unhealthy_after=2)
    run = bench.engine._runner.run

    def broken(*_: Any) -> list[int]:
        raise RuntimeError("out of luck")

    for failures in (1, 2):
        bench.engine._runner.run = broken
        heard = bench.submit(None, [1, 2], 4)
        bench.run(heard)
        assert (heard.error.code, heard.error.reason) == (Code.INTERNAL, Reason.INTERNAL)
        assert bench.engine.healthy == (failures < 2)
    bench.assert_empty()
    bench.engine._runner.run = run
    heard = bench.submit(None, [1, 2], 4)
    bench.run(heard)
    assert heard.outcome
    assert bench.engine.healthy


def test_a_slot_that_holds_another_digest_is_an_error_and_never_an_answer(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapter, other = lab.adapter(1, 4), lab.adapter(2, 8, ("q_proj", "v_proj"))
    heard = bench.submit(adapter, [1, 2, 3], 20)
    for _ in range(3):
        bench.engine.step()
    said = len(heard.tokens)
    slot = bench.engine._residency._table.get(adapter.digest).slot
    for wrong in (other.digest, None):
        bench.engine._slots._digests[slot] = wrong
        bench.engine.step()
        assert heard.error.code is Code.INTERNAL
        assert len(heard.tokens) == said


def test_no_slot_is_never_the_base(make_bench: Any) -> None:
    bench = make_bench()
    with pytest.raises(MeshError):
        bench.engine._slots.check([(-1, "sha256:" + "0" * 64)])
    with pytest.raises(MeshError):
        bench.engine._slots.check([(0, None)])
    bench.engine._slots.check([(-1, None)])


def test_draining_refuses_new_requests_and_finishes_the_old(make_bench: Any) -> None:
    bench = make_bench()
    heard = bench.submit(None, [1, 2], 10)
    bench.engine.start()
    assert bench.engine.drain(60.0)
    assert heard.outcome
    with pytest.raises(MeshError) as caught:
        bench.submit(None, [1, 2], 10)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.DRAINING)


def test_stopping_ends_what_has_not_ended(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    heard = bench.submit(lab.adapter(1, 4), [1, 2], 10)
    bench.engine.start()
    bench.engine.stop()
    assert heard.error.code is Code.UNAVAILABLE


def test_the_thread_serves_requests_from_many_threads(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapters = [lab.adapter(1, 4), None, lab.adapter(2, 8, ("q_proj", "v_proj"))]
    bench.engine.start()
    heard: dict[int, Any] = {}

    def ask(number: int) -> None:
        heard[number] = bench.submit(adapters[number % 3], [number, 2, 3], 6, request_id=f"t{number}")
        assert heard[number].ended.wait(60.0)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in heard.items():
        assert one.tokens == lab.continuation(adapters[number % 3], [number, 2, 3], 6)


def test_the_timeline_of_a_cold_and_of_a_warm_request(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    adapter = lab.adapter(1, 4)
    bench.source.held = True
    cold, shared = (bench.submit(adapter, [1, 2], 4) for _ in range(2))
    bench.clock.now += 1
    bench.source.release()
    bench.run(cold, shared)
    warm = bench.submit(adapter, [1, 2], 4)
    bench.run(warm)
    for one, is_shared in ((cold, False), (shared, True)):
        line = one.outcome.timeline
        assert line.tier_at_admission is Tier.STORE
        assert line.fetch_end_ns - line.fetch_start_ns == pytest.approx(1e9)
        assert line.fetched_bytes == len(adapter.data)
        assert line.verify_ns > 0
        assert line.shared_fetch is is_shared
        assert line.submitted_ns <= line.h2d_start_ns <= line.h2d_end_ns <= line.scheduled_ns
        assert line.scheduled_ns <= line.first_token_ns <= line.finished_ns
    line = warm.outcome.timeline
    assert line.tier_at_admission is Tier.DEVICE
    assert (line.fetch_start_ns, line.h2d_start_ns, line.fetched_bytes) == (0, 0, 0)
    assert line.scheduled_ns > 0


def test_changes_are_told(make_bench: Any, lab: Any) -> None:
    bench = make_bench()
    seen: list[tuple[int, int]] = []

    def look() -> None:
        status = bench.engine.status()
        seen.append((status.running, status.waiting))

    bench.engine.set_change_callback(look)
    bench.run(bench.submit(None, [1, 2], 2))
    assert seen[0] == (0, 1)
    assert (1, 0) in seen
    assert seen[-1] == (0, 0)


def test_a_listener_may_cancel_another_request(make_bench: Any) -> None:
    bench = make_bench()
    first = bench.submit(None, [1], 10, request_id="a")
    second = bench.submit(None, [1], 10, request_id="b")
    heard: Callable[[str, list[int]], None] = first.on_tokens

    def cancel(text: str, tokens: list[int], logprobs: Sequence[TokenLogprobs]) -> None:
        heard(text, tokens)
        bench.engine.cancel("b")

    first.on_tokens = cancel
    bench.run(first, second)
    assert second.error.code is Code.CANCELLED
    assert first.outcome
    bench.assert_empty()


def test_the_thread_survives_what_goes_wrong_between_steps(make_bench: Any) -> None:
    bench = make_bench(unhealthy_after=1)
    plan = bench.engine._scheduler.plan
    broken = threading.Event()

    def fail_once() -> Any:
        if broken.is_set():
            return plan()
        broken.set()
        raise RuntimeError("a fault of ours")

    bench.engine._scheduler.plan = fail_once
    first = bench.submit(None, [1, 2], 4)
    bench.engine.start()
    assert first.ended.wait(60.0)
    assert first.error.reason is Reason.INTERNAL
    second = bench.submit(None, [1, 2], 4)
    assert second.ended.wait(60.0)
    assert second.outcome
    bench.engine.drain(60.0)
    bench.assert_empty()


def test_a_notice_between_a_step_and_the_wait_is_not_lost(make_bench: Any) -> None:
    bench = make_bench()
    step, wait = bench.engine.step, bench.engine._lock.wait
    heard: list[Any] = []
    missed: list[int] = []

    def submit_after_the_last_look() -> bool:
        worked: bool = step()
        if not worked and not heard:
            heard.append(bench.submit(None, [1, 2], 2))
        return worked

    def watch(timeout: float | None = None) -> bool:
        missed.append(bench.engine.status().waiting)
        found: bool = wait(timeout)
        return found

    bench.engine.step, bench.engine._lock.wait = submit_after_the_last_look, watch
    bench.engine.start()
    until(lambda: bool(heard) and heard[0].ended.is_set())
    assert sum(missed) == 0


def test_stopping_ends_loads_too(lab: Any, make_bench: Any) -> None:
    bench = make_bench()
    bench.source.held = True
    errors: list[Any] = []
    bench.engine.load(lab.adapter(1, 4).digest, Tier.DEVICE, False, errors.append)
    bench.engine.stop()
    assert [error.code for error in errors] == [Code.UNAVAILABLE]
