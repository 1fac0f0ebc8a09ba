"""Greedy tokens and logits equal those of transformers (base) and of peft (each adapter)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

Prompts = Callable[[int, int], list[list[int]]]


def every_shape(lab: Any) -> list[Any]:
    """Adapters of different ranks, sites, layers and scales, base rows, and one adapter twice."""
    return [
        lab.adapter(1, 4),
        lab.adapter(2, 8, ("q_proj", "v_proj")),
        lab.adapter(3, 1, ("down_proj",), alpha=2),
        None,
        lab.adapter(4, 2, rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 3}),
        lab.adapter(5, 3, ("o_proj", "gate_proj"), layers=[1]),
        None,
        lab.adapter(1, 4),
    ]


def record_logits(bench: Any) -> dict[tuple[str, int], torch.Tensor]:
    """Collects the logits of each (request, position) that the engine computes."""
    runner, found = bench.engine._runner, {}
    inner = runner._forward.run
    plans: list[Any] = []
    pack = runner.pack

    def packing(plan: Any) -> Any:
        plans.append(plan)
        return pack(plan)

    def running(batch: Any, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = inner(batch, cache)
        sampling = [row.sequence for row in plans[-1].rows if row.samples]
        for sequence, row in zip(sampling, logits, strict=True):
            found[sequence.request.request_id, len(sequence.tokens)] = row.clone()
        return logits

    runner.pack, runner._forward.run = packing, running
    return found


@pytest.mark.parametrize("forward", ["auto", "plain"])
def test_base_rows_equal_transformers(lab: Any, make_bench: Any, prompts: Prompts, forward: str) -> None:
    bench = make_bench(forward=forward)
    inputs = prompts(6, 1)
    heard = [bench.submit(None, prompt, 10) for prompt in inputs]
    bench.run(*heard)
    for one, prompt in zip(heard, inputs, strict=True):
        assert one.tokens == lab.continuation(None, prompt, 10)
    bench.assert_empty()


@pytest.mark.parametrize("forward", ["auto", "plain"])
def test_adapters_of_all_shapes_mixed_with_base_rows_equal_peft(
    lab: Any, make_bench: Any, prompts: Prompts, forward: str
) -> None:
    bench = make_bench(forward=forward)
    logits = record_logits(bench)
    adapters = every_shape(lab)
    inputs = prompts(len(adapters), 2)
    heard = [
        bench.submit(adapter, prompt, 8, request_id=f"row{row}")
        for row, (adapter, prompt) in enumerate(zip(adapters, inputs, strict=True))
    ]
    bench.run(*heard)
    for row, (one, adapter, prompt) in enumerate(zip(heard, adapters, inputs, strict=True)):
        assert one.tokens == lab.continuation(adapter, prompt, 8)
        expected = lab.logits(adapter, prompt + one.tokens)
        for length in range(len(prompt), len(prompt) + 8):
            torch.testing.assert_close(logits[f"row{row}", length], expected[length - 1], rtol=0.0, atol=1e-4)
    bench.assert_empty()


def test_an_adapter_changes_the_answer(lab: Any) -> None:
    prompt = [10, 20, 30]
    continuations = {tuple(lab.continuation(adapter, prompt, 8)) for adapter in every_shape(lab)}
    assert len(continuations) == 6, "the other tests would prove nothing"


def test_an_adapter_alone_equals_peft(lab: Any, make_bench: Any, prompts: Prompts) -> None:
    for adapter in every_shape(lab):
        bench = make_bench()
        [prompt] = prompts(1, 3)
        heard = bench.submit(adapter, prompt, 8)
        bench.run(heard)
        assert heard.tokens == lab.continuation(adapter, prompt, 8)


def test_a_prompt_in_chunks_equals_a_whole_one(lab: Any, make_bench: Any, prompts: Prompts) -> None:
    bench = make_bench(step_tokens=16, max_batch_rows=4)
    adapters = every_shape(lab)
    inputs = [prompt + [7] * 50 for prompt in prompts(len(adapters), 4)]
    heard = [bench.submit(adapter, prompt, 6) for adapter, prompt in zip(adapters, inputs, strict=True)]
    bench.run(*heard)
    for one, adapter, prompt in zip(heard, adapters, inputs, strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 6)


def test_preemption_by_recompute_gives_the_same_tokens(lab: Any, make_bench: Any, prompts: Prompts) -> None:
    bench = make_bench(kv_tokens=96, max_context_tokens=96)
    preempted: list[Any] = []
    inner = bench.engine._scheduler._preempt

    def preempt(sequence: Any) -> None:
        preempted.append(sequence)
        inner(sequence)

    bench.engine._scheduler._preempt = preempt
    adapters = [lab.adapter(1, 4), None, lab.adapter(2, 8, ("q_proj", "v_proj")), lab.adapter(1, 4)]
    inputs = [[3, 1, 4], [1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7]]
    heard = [bench.submit(adapter, prompt, 40) for adapter, prompt in zip(adapters, inputs, strict=True)]
    bench.run(*heard)
    assert preempted
    for one, adapter, prompt in zip(heard, adapters, inputs, strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 40)
    bench.assert_empty()


def test_rows_of_very_different_lengths_attend_in_groups(lab: Any, make_bench: Any) -> None:
    bench = make_bench(step_tokens=256)
    adapters = [lab.adapter(1, 4), None, None, lab.adapter(2, 8, ("q_proj", "v_proj"))]
    inputs = [[token % 250 for token in range(length)] for length in (3, 230, 90, 5)]
    heard = [bench.submit(adapter, prompt, 6) for adapter, prompt in zip(adapters, inputs, strict=True)]
    bench.run(*heard)
    for one, adapter, prompt in zip(heard, adapters, inputs, strict=True):
        assert one.tokens == lab.continuation(adapter, prompt, 6)
