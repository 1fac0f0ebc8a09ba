"""Log probabilities against a plain log-softmax of the reference's logits."""

from typing import Any

import pytest
import torch

from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.logprobs import token_logprobs


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
