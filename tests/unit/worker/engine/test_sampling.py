"""Drawing tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper

from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.penalties import TokenHistory
from adaptermesh.worker.engine.sampling import Draw, sample, uniform


def draws(params: SamplingParams, count: int, seed: int = 1) -> list[Draw]:
    return [Draw(params, seed, position) for position in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, draws(SamplingParams(temperature=0.0), 2)) == [1, 0]


def test_the_shares_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    logits = probabilities.log().expand(20000, 4)
    found = torch.tensor(sample(logits, draws(SamplingParams(temperature=1.0), 20000))).bincount(minlength=4)
    torch.testing.assert_close(found / 20000, probabilities, atol=0.015, rtol=0.0)
    assert found[1] == 0


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0]).expand(5000, 2)
    found = torch.tensor(sample(logits, draws(SamplingParams(temperature=0.5), 5000))).float().mean()
    assert abs(float(found) - float(torch.softmax(torch.tensor([2.0, 0.0]), 0)[1])) < 0.02


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_k=1), {0}),
        (SamplingParams(temperature=1.0, top_p=0.5), {0}),
        (SamplingParams(temperature=1.0, top_p=0.51), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.81), {0, 1, 2}),
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.99), {0, 1}),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.6), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=1e-9), {0}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(params: SamplingParams, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    assert set(sample(logits, draws(params, 2000))) == kept


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 2
    warper: Any = MinPLogitsWarper(min_p)
    kept = set(warper(None, logits / 0.8)[0].isfinite().nonzero()[:, 0].tolist())
    params = SamplingParams(temperature=0.8, min_p=min_p)
    found = set(sample(logits.expand(20000, 12), draws(params, 20000)))
    assert found <= kept
    assert len(kept - found) <= (min_p == 0.0), "only the unlikeliest may be missed"


def test_min_p_comes_after_temperature_and_before_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    # 0.15 / 0.5 = 0.3, at temperature 2 its root: 0.55.
    assert set(sample(logits, draws(SamplingParams(temperature=2.0, min_p=0.5), 2000))) == {0, 1, 2}
    assert set(sample(logits, draws(SamplingParams(temperature=1.0, min_p=0.5), 2000))) == {0, 1}
    # Of the 0.8 that min-p leaves, 0.62 lie in the first token.
    both = SamplingParams(temperature=1.0, min_p=0.5, top_p=0.6)
    assert set(sample(logits, draws(both, 2000))) == {0}


def test_a_flat_distribution_over_many_tokens_is_cut_right() -> None:
    logits = torch.zeros(3000, 5000)
    found = set(sample(logits, draws(SamplingParams(temperature=1.0, top_p=0.5), 3000)))
    assert len(found) > 1024 * 0.9, "half the mass is more than the first candidates"


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_the_uniform_number_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    found = uniform(seed, position)
    assert 0.0 <= found < 1.0
    assert found == uniform(seed, position)
    assert found != uniform(seed, position + 1)


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 50)

    def penalised(params: SamplingParams) -> Draw:
        return Draw(params, 7, 5, TokenHistory(params, [1]).catch_up([1, 3, 3]))

    rows = [
        Draw(SamplingParams(temperature=0.0), 1, 5),
        Draw(SamplingParams(temperature=1.0), 2, 5),
        Draw(SamplingParams(temperature=0.7, top_k=5), 3, 5),
        Draw(SamplingParams(temperature=1.3, top_p=0.8), 4, 5),
        Draw(SamplingParams(temperature=1.3, min_p=0.1), 5, 5),
        Draw(SamplingParams(temperature=1.3, min_p=0.2, top_p=0.9), 6, 5),
        penalised(SamplingParams(temperature=1.0, frequency_penalty=2.0)),
        penalised(SamplingParams(temperature=0.0, presence_penalty=2.0)),
    ]
    alone = [sample(logits[row : row + 1], [draw])[0] for row, draw in enumerate(rows)]
    assert sample(logits, rows) == alone


def test_the_same_seed_gives_the_same_tokens_in_any_batch(lab: Any, make_bench: Any) -> None:
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 42}
    alone = make_bench()
    adapter = lab.adapter(1, 4)
    first = alone.submit(adapter, [1, 2, 3], 20, **settings)
    alone.run(first)
    crowded = make_bench(kv_tokens=96, max_context_tokens=96)
    others = [crowded.submit(None, [9, index], 30, temperature=1.0, seed=index) for index in range(4)]
    second = crowded.submit(adapter, [1, 2, 3], 20, **settings)
    crowded.run(second, *others)
    assert first.tokens == second.tokens
    assert len({tuple(other.tokens) for other in others}) == 4


def test_without_a_seed_each_request_draws_its_own(make_bench: Any) -> None:
    bench = make_bench()
    heard = [bench.submit(None, [1, 2, 3], 20, temperature=1.0) for _ in range(2)]
    bench.run(*heard)
    assert heard[0].tokens != heard[1].tokens
