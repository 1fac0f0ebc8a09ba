"""The engine on a card: against transformers and peft, against itself alone, with and without graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from adaptermesh.worker.engine.graphs import DecodeGraphs
from tests.gpu.waiting import no_waiting

TIE = 0.2
"""Two logits of the float32 reference closer than this may change places in bfloat16."""


def run(bench: Any, asked: Sequence[tuple[Any, list[int]]], count: int) -> list[list[int]]:
    heard = [bench.submit(adapter, prompt, max_tokens=count) for adapter, prompt in asked]
    bench.run(*heard)
    assert all(one.error is None for one in heard)
    return [one.tokens for one in heard]


def assert_same_or_tied(
    lab: Any, adapter: Any, prompt: list[int], found: Sequence[int], expected: Sequence[int]
) -> None:
    """Equal up to a token at which the reference hardly prefers one of both."""
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            logits = lab.logits(adapter, [*prompt, *found[:at]])[-1]
            assert abs(float(logits[one] - logits[other])) < TIE, f"token {at}: {one} and {other}"
            return


@pytest.fixture
def mix(lab: Any, prompts: Any) -> list[tuple[Any, list[int]]]:
    adapters = [
        None,
        lab.adapter(1),
        lab.adapter(2, rank=9),
        lab.adapter(3, rank=2, sites=("q_proj", "down_proj")),
        lab.adapter(4, rank=40),
        lab.adapter(5, layers=[1]),
    ]
    return [(adapters[row % len(adapters)], prompt) for row, prompt in enumerate(prompts(12, seed=3))]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("attention", ["auto", "triton", "gather"])
def test_float32_gives_the_reference_tokens(
    lab: Any, make_bench: Callable[..., Any], mix: Any, attention: str, graphs: bool
) -> None:
    bench = make_bench(device="cuda", dtype="float32", attention=attention, cuda_graphs=graphs)
    answers = run(bench, mix, 12)
    for (adapter, prompt), tokens in zip(mix, answers, strict=True):
        assert_same_or_tied(lab, adapter, prompt, tokens, lab.continuation(adapter, prompt, 12))
    bench.assert_empty()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(
    lab: Any, make_bench: Callable[..., Any], mix: Any, dtype: str
) -> None:
    bench = make_bench(device="cuda", dtype=dtype, prefix_cache=False)
    together = run(bench, mix, 12)
    for (adapter, prompt), tokens in zip(mix, together, strict=True):
        alone = run(bench, [(adapter, prompt)], 12)[0]
        assert_same_or_tied(lab, adapter, prompt, tokens, alone)


def test_graphs_give_what_the_same_steps_give_without(
    lab: Any, make_bench: Callable[..., Any], mix: Any
) -> None:
    with_graphs = make_bench(device="cuda", dtype="bfloat16", prefix_cache=False)
    without = make_bench(device="cuda", dtype="bfloat16", prefix_cache=False, cuda_graphs=False)
    for rows in (1, 2, 3, 8, 12, 12):
        found, expected = run(with_graphs, mix[:rows], 10), run(without, mix[:rows], 10)
        for (adapter, prompt), one, other in zip(mix, found, expected, strict=False):
            assert_same_or_tied(lab, adapter, prompt, one, other)
    graphs = with_graphs.engine._runner._graphs
    assert isinstance(graphs, DecodeGraphs)
    assert graphs._graphs
    assert not graphs._broken


def test_one_after_the_other_in_few_slots(lab: Any, make_bench: Callable[..., Any], prompts: Any) -> None:
    """More adapters than slots: copies on the side stream into rows that others have just left."""
    bench = make_bench(device="cuda", dtype="float32", device_slots=2, max_batch_rows=4)
    adapters = [lab.adapter(seed, rank=4 + 3 * (seed % 4)) for seed in range(1, 9)]
    generator = torch.Generator().manual_seed(1)
    for turn in range(6):
        order = torch.randperm(len(adapters), generator=generator).tolist()
        asked = [(adapters[index], prompts(8, seed=turn)[index]) for index in order]
        for (adapter, prompt), tokens in zip(asked, run(bench, asked, 6), strict=True):
            assert_same_or_tied(lab, adapter, prompt, tokens, lab.continuation(adapter, prompt, 6))
    bench.assert_empty()


@pytest.mark.parametrize("graphs", [False, True])
def test_up_to_its_tokens_a_step_waits_for_nothing(
    lab: Any, make_bench: Callable[..., Any], mix: Any, graphs: bool
) -> None:
    bench = make_bench(device="cuda", dtype="bfloat16", cuda_graphs=graphs, prefix_cache=False)
    # Kernels are compiled, graphs recorded, arenas grown.
    run(bench, mix, 6)
    runner = bench.engine._runner
    logits = runner._logits

    def watched(step: Any) -> Any:
        with no_waiting():
            return logits(step)

    runner._logits = watched
    run(bench, mix, 6)


def test_staging_an_adapter_waits_for_nothing(lab: Any, make_bench: Callable[..., Any], prompts: Any) -> None:
    bench = make_bench(device="cuda", dtype="bfloat16", device_slots=2)
    adapters = [lab.adapter(seed) for seed in range(1, 6)]
    run(bench, [(adapter, prompts(1)[0]) for adapter in adapters[:2]], 2)
    slots = bench.engine._slots
    load = slots.load

    def watched(*job: Any) -> Any:
        with no_waiting():
            return load(*job)

    slots.load = watched
    heard = [bench.submit(adapter, prompts(1)[0], max_tokens=3) for adapter in adapters[2:]]
    bench.run(*heard)
    for one in heard:
        assert one.error is None
        assert one.outcome.timeline.h2d_end_ns > one.outcome.timeline.h2d_start_ns


def test_a_weight_too_large_for_half_precision_is_refused(
    lab: Any, make_bench: Callable[..., Any], prompts: Any
) -> None:
    bench = make_bench(device="cuda", dtype="float16")
    adapter = lab.adapter(1)
    heard = bench.submit(adapter, prompts(1)[0])
    load = bench.engine._slots.load

    def spoiled(slot: int, digest: str, manifest: Any, data: torch.Tensor) -> Any:
        entry = manifest.tensors[-1]
        data[entry.offset : entry.offset + entry.size].view(torch.float32)[0] = 1e6
        return load(slot, digest, manifest, data)

    bench.engine._slots.load = spoiled
    bench.run(heard)
    assert heard.error is not None
    assert "too large" in str(heard.error)
