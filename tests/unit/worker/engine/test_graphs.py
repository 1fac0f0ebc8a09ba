"""Recorded steps, on the CPU: the recorder runs the recorded function again over its static buffers.

It remembers what it recorded and replayed, so a step that should not have gone through a graph, or through
one that is too small, is seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from adaptermesh.worker.engine.graphs import DecodeGraphs, GraphKey, Replay, row_buckets
from adaptermesh.worker.engine.ops.lowrank_spans import SpanProduct, plain_product


class CpuRecorder:
    """Replays by running the function again: right only if it reads nothing but static buffers."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: list[int] = []

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        number = self.recorded
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed.append(number)
            return run()

        return replay


class Graphed:
    """An engine over pages whose decodes are recorded."""

    def __init__(self, make_bench: Callable[..., Any], product: SpanProduct = plain_product, **config: Any):
        self.bench = make_bench(attention="plain", **{"forward": "lean", **config})
        self.recorder = CpuRecorder()
        runner = self.bench.engine._runner
        lowrank = self.bench.engine._slots._ops["lowrank"]
        lowrank._product = product
        runner.record_with(self.recorder, self.bench.config)
        self.graphs: DecodeGraphs = runner._graphs

    @property
    def keys(self) -> set[GraphKey]:
        return set(self.graphs._graphs)

    def load(self, lab: Any, *adapters: Any) -> None:
        """Lets the arenas grow as far as they will, by answers of one token, which need no graph."""
        for adapter in adapters:
            self.run(lab, [(adapter, [1, 2, 3])], 1)

    def run(self, lab: Any, asked: Sequence[tuple[Any, list[int]]], count: int = 4) -> None:
        """Answers are those of transformers and peft, alone."""
        heard = [self.bench.submit(adapter, prompt, max_tokens=count) for adapter, prompt in asked]
        self.bench.run(*heard)
        for (adapter, prompt), answer in zip(asked, heard, strict=True):
            assert answer.error is None
            assert answer.tokens == lab.continuation(adapter, prompt, count)


def test_buckets() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(6) == (1, 2, 4, 6)
    assert row_buckets(32) == (1, 2, 4, 8, 16, 24, 32)
    assert row_buckets(64)[-3:] == (48, 56, 64)


def test_every_bucket_gives_the_eager_tokens(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench, max_batch_rows=10, step_tokens=512)
    adapters = [None, lab.adapter(1), lab.adapter(2, rank=9), lab.adapter(3, rank=2, sites=("q_proj",))]
    graphed.load(lab, *adapters)
    for rows in range(1, 11):
        asked = [
            (adapters[(row + rows) % 4], prompt) for row, prompt in enumerate(prompts(rows, seed=rows % 2))
        ]
        graphed.run(lab, asked, 3)
    assert {key.rows for key in graphed.keys} == {1, 2, 4, 8, 10}


def test_base_steps_and_adapter_steps_have_graphs_of_their_own(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench)
    one, two = prompts(2)
    graphed.run(lab, [(None, one), (None, two)])
    assert graphed.keys == {GraphKey(2, 0)}
    graphed.run(lab, [(lab.adapter(1), one), (None, two)])
    assert graphed.keys == {GraphKey(2, 0), GraphKey(2, 16)}
    recorded = graphed.recorder.recorded
    graphed.run(lab, [(None, two), (None, one)])
    graphed.run(lab, [(None, one), (lab.adapter(1), two)])
    assert graphed.recorder.recorded == recorded


def test_prefills_never_go_through_a_graph(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)
    graphed.run(lab, [(None, prompts(1)[0])], 1)
    assert graphed.recorder.replayed == []
    graphed.run(lab, [(None, prompts(1)[0])], 3)
    assert len(graphed.recorder.replayed) == 2


def test_more_adapters_than_were_recorded_never_replay_the_smaller_graph(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench, max_batch_rows=8, step_tokens=512)
    asked = prompts(4, seed=5)
    graphed.load(lab, *(lab.adapter(seed) for seed in range(1, 5)), lab.adapter(9, rank=40))
    graphed.run(lab, [(lab.adapter(1), asked[0]), (lab.adapter(1), asked[1])])
    small = set(range(graphed.recorder.recorded))
    graphed.recorder.replayed.clear()
    # More rows and more adapters; then the same rows at a rank beyond the recorded one.
    graphed.run(lab, [(lab.adapter(seed), prompt) for seed, prompt in enumerate(asked, 1)])
    graphed.run(lab, [(lab.adapter(1), asked[0]), (lab.adapter(9, rank=40), asked[1])])
    assert GraphKey(2, 64) in graphed.keys
    assert small.isdisjoint(graphed.recorder.replayed)


def test_a_larger_rank_has_a_graph_that_serves_smaller_ones_too(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench)
    graphed.load(lab, lab.adapter(1), lab.adapter(9, rank=40))
    graphed.run(lab, [(lab.adapter(9, rank=40), prompts(1)[0])])
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    graphed.run(lab, [(lab.adapter(9, rank=40), prompts(1)[0])])
    assert {key.rank for key in graphed.keys} == {64}


def test_a_step_that_needs_more_than_the_bound_runs_without_a_graph(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench, max_graphs=1)
    graphed.load(lab, lab.adapter(1), lab.adapter(9, rank=40))
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    assert graphed.keys == {GraphKey(1, 16)}
    graphed.recorder.replayed.clear()
    graphed.run(lab, [(lab.adapter(9, rank=40), prompts(1)[0])])
    graphed.run(lab, [(None, prompts(1)[0])])
    assert graphed.recorder.replayed == []


def test_an_arena_that_has_moved_takes_its_graphs_along(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    before = graphed.recorder.recorded
    graphed.load(lab, lab.adapter(9, rank=40))
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    assert graphed.recorder.recorded == before + 1


def test_an_adapter_at_a_site_that_had_none_never_replays_the_graph_without_it(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench)
    prompt = prompts(1)[0]
    graphed.run(lab, [(lab.adapter(3, sites=("q_proj",)), prompt)])
    before = graphed.recorder.recorded
    graphed.run(lab, [(lab.adapter(4, sites=("down_proj",)), prompt)])
    assert graphed.recorder.recorded == before + 1
    graphed.run(lab, [(lab.adapter(3, sites=("q_proj",)), prompt)])


def test_a_slot_that_was_given_to_another_adapter_gives_its_result(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench, device_slots=1)
    prompt = prompts(1)[0]
    graphed.run(lab, [(lab.adapter(1), prompt)])
    recorded = graphed.recorder.recorded
    graphed.run(lab, [(lab.adapter(2), prompt)])
    graphed.run(lab, [(lab.adapter(1), prompt)])
    assert graphed.recorder.recorded == recorded
    assert len(graphed.recorder.replayed) == 9


def test_rows_that_come_and_go_leave_nothing_behind(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench, kv_tokens=512, block_tokens=4)
    for turn in range(4):
        asked = [(lab.adapter(1 + (turn + row) % 3), prompt) for row, prompt in enumerate(prompts(5, turn))]
        heard = [
            graphed.bench.submit(adapter, prompt, max_tokens=2 + row)
            for row, (adapter, prompt) in enumerate(asked)
        ]
        graphed.bench.run(*heard)
        for row, ((adapter, prompt), answer) in enumerate(zip(asked, heard, strict=True)):
            assert answer.tokens == lab.continuation(adapter, prompt, 2 + row)
    cache = graphed.bench.engine._runner._cache
    assert not cache.data[:, 0].any(), "the padding block stays zero"
    assert cache.data[:, cache.scratch_block].any(), "rows that fill up wrote into the scratch block"
    graphed.bench.assert_empty()


def test_what_the_scratch_block_holds_reaches_nobody(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)
    cache = graphed.bench.engine._runner._cache
    cache.data[:, cache.scratch_block] = torch.nan
    graphed.run(lab, [(lab.adapter(1), prompt) for prompt in prompts(3)])


def test_a_step_that_can_not_be_recorded_runs_all_the_same(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)

    class Refuses:
        def record(self, run: Callable[[], torch.Tensor]) -> Replay:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphed.graphs._recorder = Refuses()
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    assert graphed.keys == set()


def test_ops_that_can_not_be_recorded_run_without_graphs(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)
    graphed.bench.engine._slots._capturable.clear()
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    assert graphed.keys == set()
    graphed.run(lab, [(None, prompts(1)[0])])
    assert graphed.keys == {GraphKey(1, 0)}


def test_a_step_with_factors_runs_without_graphs_and_others_with_them(
    lab: Any, make_bench: Any, prompts: Any
) -> None:
    graphed = Graphed(make_bench)
    graphed.run(lab, [(lab.ia3(1), prompts(1)[0]), (lab.adapter(1), prompts(2)[1])])
    assert graphed.keys == set()
    graphed.run(lab, [(lab.adapter(1), prompts(1)[0])])
    assert graphed.keys == {GraphKey(1, 16)}


def test_a_fill_beyond_the_recorded_rank_is_refused(lab: Any, make_bench: Any, prompts: Any) -> None:
    graphed = Graphed(make_bench)
    graphed.run(lab, [(lab.adapter(9, rank=40), prompts(1)[0])])
    slots = graphed.bench.engine._slots
    captured = slots.capture(4, 16)
    assert captured is not None
    with pytest.raises(ValueError, match="above the 16"):
        captured.fill([0], 1)


def test_the_kernels_give_the_same_through_graphs(lab: Any, make_bench: Any, prompts: Any) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux on x86-64)")
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter, which is off where there is a card: see tests/gpu")
    from adaptermesh.worker.engine.ops.lowrank_triton import triton_product
    from adaptermesh.worker.engine.paged_triton import triton_paged

    graphed = Graphed(make_bench, triton_product)
    graphed.graphs._static._way = triton_paged
    one, two = prompts(2)
    graphed.run(lab, [(lab.adapter(1), one), (lab.adapter(2, rank=9), two), (None, one)], 3)
    assert graphed.recorder.replayed
