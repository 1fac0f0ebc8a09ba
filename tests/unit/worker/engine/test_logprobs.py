"""Log probabilities against a plain log-softmax of the reference's logits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.logprobs import score, token_logprobs

PROMPT = [(11 * place) % 250 for place in range(40)]


def assert_scored(
    lab: Any, adapter: Any, prompt: Sequence[int], found: Sequence[TokenLogprobs], top: int
) -> None:
    """What was heard of a prompt is the reference's log-softmax."""
    expected = lab.logits(adapter, prompt)[:-1].log_softmax(-1)
    assert [one.token_id for one in found] == list(prompt[1:])
    for row, one in zip(expected, found, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
        assert [float(row[token]) for token, _ in one.top] == pytest.approx(
            [value for _, value in one.top], abs=1e-3
        )


def test_each_row_gets_what_it_asks_for() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 10)
    params = [SamplingParams(logprobs=2), SamplingParams(), SamplingParams(logprobs=0)]
    two, none, zero = token_logprobs(logits, [4, 5, 6], params)
    expected = logits.log_softmax(-1)
    assert none is None
    assert zero is not None
    assert (zero.token_id, zero.top) == (6, ())
    assert zero.logprob == pytest.approx(float(expected[2, 6]))
    assert two is not None
    assert two.token_id == 4
    assert two.logprob == pytest.approx(float(expected[0, 4]))
    best = expected[0].topk(2)
    assert [token for token, _ in two.top] == best.indices.tolist()
    assert [value for _, value in two.top] == pytest.approx(best.values.tolist())


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    [found] = token_logprobs(torch.zeros(1, 4), [1], [SamplingParams(logprobs=20)])
    assert found is not None
    assert {token for token, _ in found.top} == {0, 1, 2, 3}


def test_they_are_the_models_whatever_penalties_and_temperature_do(lab: Any, make_bench: Any) -> None:
    bench, prompt = make_bench(), [5, 6, 7]
    heard = bench.submit(
        lab.adapter(1), prompt, 10, logprobs=3, temperature=1.3, seed=4, repetition_penalty=1.5, top_k=9
    )
    other = bench.submit(None, [8], 10)
    bench.run(heard, other)
    assert [found.token_id for found in heard.logprobs] == heard.tokens
    assert other.logprobs == []
    expected = lab.logits(lab.adapter(1), prompt + heard.tokens)[len(prompt) - 1 : -1].log_softmax(-1)
    for row, found in zip(expected, heard.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-3)
        assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_the_end_token_has_its_log_probability_too(lab: Any, make_bench: Any) -> None:
    ending = lab.continuation(None, [5, 6, 7], 12)[4]
    bench = make_bench()
    heard = bench.submit(None, [5, 6, 7], 12, stop_token_ids=(ending,), logprobs=1)
    bench.run(heard)
    assert [found.token_id for found in heard.logprobs] == heard.tokens
    assert heard.logprobs[-1].top[0][0] == ending


def test_many_rows_are_scored_in_slices_as_in_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(150, 12)
    tokens, counts = [row % 12 for row in range(150)], [row % 4 for row in range(150)]
    expected = logits.log_softmax(-1)
    for row, found in enumerate(score(logits, tokens, counts)):
        assert found.token_id == tokens[row]
        assert found.logprob == pytest.approx(float(expected[row, tokens[row]]))
        assert [token for token, _ in found.top] == expected[row].topk(counts[row]).indices.tolist()


@pytest.mark.parametrize("step_tokens", [16, 64, 128])
def test_prompts_of_base_and_adapter_rows_are_scored_beside_rows_that_do_not_ask(
    lab: Any, make_bench: Any, step_tokens: int
) -> None:
    bench = make_bench(step_tokens=step_tokens)
    adapters = [None, lab.adapter(1), lab.adapter(2, 8, ("q_proj", "v_proj"))]
    asked = [
        bench.submit(adapter, PROMPT[index:], 6, prompt_logprobs=3) for index, adapter in enumerate(adapters)
    ]
    others = [bench.submit(adapter, PROMPT[5:20], 6, logprobs=1) for adapter in adapters]
    bench.run(*asked, *others)
    for index, adapter in enumerate(adapters):
        assert_scored(lab, adapter, PROMPT[index:], asked[index].prompt_logprobs, 3)
        assert asked[index].tokens == lab.continuation(adapter, PROMPT[index:], 6)
        assert asked[index].logprobs == []
        assert others[index].tokens == lab.continuation(adapter, PROMPT[5:20], 6)
        assert len(others[index].logprobs) == 6
        assert others[index].prompt_logprobs == []
    bench.assert_empty()


def test_a_prompt_is_scored_chunk_by_chunk_within_the_budget_of_the_step(lab: Any, make_bench: Any) -> None:
    bench = make_bench(scored_tokens=7)
    outputs = count_outputs(bench)
    heard = bench.submit(lab.adapter(1), PROMPT, 3, prompt_logprobs=2)
    late = bench.submit(None, PROMPT[::-1], 3, prompt_logprobs=0)
    plain = bench.submit(None, PROMPT, 3)
    bench.engine.step()
    assert (heard.pieces, late.pieces, len(plain.tokens)) == ([7], [], 1), (
        "only who asks waits for the budget"
    )
    bench.run(heard, late, plain)
    assert_scored(lab, lab.adapter(1), PROMPT, heard.prompt_logprobs, 2)
    assert_scored(lab, None, PROMPT[::-1], late.prompt_logprobs, 0)
    assert heard.pieces == [7, 7, 7, 7, 7, 4]
    assert late.pieces == [3, 7, 7, 7, 7, 7, 1]
    assert max(outputs) <= 7 + 3
    bench.assert_empty()


def count_outputs(bench: Any) -> list[int]:
    """Rows of logits of each step from now on."""
    counts: list[int] = []
    run = bench.engine._runner._forward.run

    def counted(batch: Any, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = run(batch, cache)
        counts.append(len(batch.outputs))
        return logits

    bench.engine._runner._forward.run = counted
    return counts


def test_who_does_not_ask_pays_for_one_row_of_logits(bench: Any) -> None:
    outputs = count_outputs(bench)
    bench.run(bench.submit(None, PROMPT, 4, logprobs=2), bench.submit(None, PROMPT[:7], 4))
    assert outputs == [2, 2, 2, 2]


def test_a_cached_prefix_is_computed_again_for_who_asks_and_serves_who_does_not(
    lab: Any, make_bench: Any
) -> None:
    bench = make_bench()
    bench.run(bench.submit(None, PROMPT, 4))
    heard = bench.submit(None, PROMPT, 4, prompt_logprobs=1)
    bench.run(heard)
    assert_scored(lab, None, PROMPT, heard.prompt_logprobs, 1)
    assert heard.outcome.timeline.cached_tokens == 0
    assert bench.engine.status().prefix_query_tokens == 40, "it was not looked up"
    after = bench.submit(None, PROMPT, 4)
    bench.run(after)
    assert after.outcome.timeline.cached_tokens == 32


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_nothing_is_told_twice_or_left_out_after_a_preemption(lab: Any, make_bench: Any, steps: int) -> None:
    bench = make_bench(scored_tokens=9)
    adapter = lab.adapter(1)
    heard = bench.submit(adapter, PROMPT, 8, prompt_logprobs=2)
    for _ in range(steps):
        bench.engine.step()
    [sequence] = bench.engine._scheduler.running
    bench.engine._scheduler._preempt(sequence)
    bench.run(heard)
    assert_scored(lab, adapter, PROMPT, heard.prompt_logprobs, 2)
    assert heard.tokens == lab.continuation(adapter, PROMPT, 8)
    assert heard.outcome.timeline.cached_tokens == 0
    bench.assert_empty()


def test_prompts_that_outgrow_the_cache_are_scored_once_each(lab: Any, make_bench: Any) -> None:
    bench = make_bench(kv_tokens=96, max_context_tokens=64, step_tokens=32, scored_tokens=8)
    halfway: list[int] = []
    inner = bench.engine._scheduler._preempt

    def preempt(sequence: Any) -> None:
        halfway.append(sequence.unscored)
        inner(sequence)

    bench.engine._scheduler._preempt = preempt
    adapters = [None, lab.adapter(1), None, lab.adapter(1), None]
    heard = [
        bench.submit(adapter, PROMPT[number:], 20, prompt_logprobs=number % 3)
        for number, adapter in enumerate(adapters)
    ]
    bench.run(*heard)
    for number, adapter in enumerate(adapters):
        assert_scored(lab, adapter, PROMPT[number:], heard[number].prompt_logprobs, number % 3)
        assert heard[number].tokens == lab.continuation(adapter, PROMPT[number:], 20)
    assert halfway
    bench.assert_empty()


def test_the_first_token_alone_has_nothing_to_tell(lab: Any, bench: Any) -> None:
    heard = bench.submit(None, [5], 3, prompt_logprobs=4)
    two = bench.submit(None, [5, 6], 3, prompt_logprobs=4)
    bench.run(heard, two)
    assert heard.prompt_logprobs == []
    assert heard.tokens == lab.continuation(None, [5], 3)
    assert_scored(lab, None, [5, 6], two.prompt_logprobs, 4)


def test_a_cancelled_prompt_tells_no_more(bench: Any) -> None:
    heard = bench.submit(None, PROMPT * 3, 3, "mine", prompt_logprobs=1)
    bench.engine.step()
    bench.engine.cancel("mine")
    bench.run(heard)
    assert 0 < len(heard.prompt_logprobs) < 119
    bench.assert_empty()
