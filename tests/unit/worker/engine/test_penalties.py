"""Penalties against transformers' processor and against the formula spelt out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from adaptermesh.core.errors import MeshError
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.penalties import TokenHistory, make_history, penalise
from adaptermesh.worker.engine.sampling import Draw, sample

VOCABULARY = 30


def history_of(params: SamplingParams, prompt: list[int], output: list[int]) -> TokenHistory | None:
    history = make_history(params, prompt)
    return None if history is None else history.catch_up(prompt + output)


def penalised(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """The formulas, one token after the other. logits: [vocabulary]."""
    found = logits.clone()
    for token in range(len(logits)):
        value, count = float(logits[token]), output.count(token)
        if token in prompt or count:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        found[token] = value
    return found


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCABULARY) * 4
    prompt, output = [1, 2, 2, 3], [4, 4, 1, 9]
    processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + output]), logits.clone())
    found = penalise(logits, [history_of(SamplingParams(repetition_penalty=penalty), prompt, output)])
    torch.testing.assert_close(found, expected)


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([-2.0, 0.0, 0.6]),
    st.sampled_from([-1.0, 0.0, 0.3]),
)
def test_all_penalties_together_are_the_formulas(
    rows: list[tuple[list[int], list[int]]], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    found = penalise(logits, [history_of(params, prompt, output) for prompt, output in rows])
    expected = torch.stack(
        [penalised(logits[row], params, prompt, output) for row, (prompt, output) in enumerate(rows)]
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(logits, before), "the raw logits are still needed"


def test_rows_without_penalties_keep_their_logits_and_have_no_history() -> None:
    plain = SamplingParams(temperature=0.5, min_p=0.1)
    logits = torch.randn(2, VOCABULARY)
    assert make_history(plain, [1, 2]) is None
    assert penalise(logits, [history_of(plain, [1], [2])] * 2) is logits
    mixed = penalise(
        logits, [history_of(plain, [1], [2]), history_of(SamplingParams(presence_penalty=1.0), [1], [2])]
    )
    assert torch.equal(mixed[0], logits[0])
    assert not torch.equal(mixed[1], logits[1])


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.integers(1, 3))
def test_counts_that_grow_are_those_of_a_fresh_history(
    prompt: list[int], output: list[int], stride: int
) -> None:
    growing = TokenHistory(SamplingParams(), prompt)
    for length in range(0, len(output) + 1, stride):
        growing.catch_up(prompt + output[:length])
    growing.catch_up(prompt + output)
    assert growing.counts == TokenHistory(SamplingParams(), prompt).catch_up(prompt + output).counts
    assert growing.counts == {token: output.count(token) for token in {*prompt, *output}}


def test_penalties_come_before_the_likeliest_is_taken() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    greedy = SamplingParams(temperature=0.0, presence_penalty=0.5)
    assert sample(logits, [Draw(greedy, 1, 1, history_of(greedy, [1], []))]) == [0]
    assert sample(logits, [Draw(greedy, 1, 2, history_of(greedy, [1], [0]))]) == [1]


PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.4}


@pytest.mark.parametrize("random", [{"temperature": 0.0}, {"temperature": 1.1, "min_p": 0.02, "seed": 5}])
def test_penalised_rows_draw_the_same_in_any_batch_and_after_preemption(
    make_bench: Any, random: dict[str, Any]
) -> None:
    alone = make_bench()
    first = alone.submit(None, [1, 2, 3], 30, **PENALTIES, **random)
    alone.run(first)
    # The cache is too small for all: some rows are preempted and computed anew.
    crowded = make_bench(kv_tokens=96, max_context_tokens=96)
    others = [crowded.submit(None, [9, index], 30, temperature=1.0, seed=index) for index in range(4)]
    second = crowded.submit(None, [1, 2, 3], 30, **PENALTIES, **random)
    crowded.run(second, *others)
    assert first.tokens == second.tokens


def test_greedy_with_penalties_is_a_loop_over_the_references_logits(lab: Any, make_bench: Any) -> None:
    bench, prompt = make_bench(), [5, 6, 7]
    params = SamplingParams(temperature=0.0, **PENALTIES)
    output: list[int] = []
    for _ in range(12):
        logits = lab.logits(None, prompt + output)[-1]
        output.append(int(penalised(logits, params, prompt, output).argmax()))
    heard = bench.submit(None, prompt, 12, **PENALTIES)
    bench.run(heard)
    assert heard.tokens == output
    assert heard.tokens != lab.continuation(None, prompt, 12)


def test_a_stop_token_outside_the_vocabulary_is_refused_with_its_field(make_bench: Any) -> None:
    with pytest.raises(MeshError) as caught:
        make_bench().submit(None, [1], 4, stop_token_ids=(10_000,))
    assert caught.value.metadata["field"] == "sampling.stop_token_ids"
