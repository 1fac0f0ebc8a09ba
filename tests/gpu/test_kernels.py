"""The kernels, compiled, at the widths of a real model, against their plain twins."""

import pytest
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.attention import ScoreRule, Span
from adaptermesh.worker.engine.attention_choice import AttentionFacts, choose_attention, trial, ways
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.ops.lowrank import LowRank
from adaptermesh.worker.engine.ops.lowrank_plain import PlainLowRank
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.paged_attention import plain_paged, plan_paged, tile_tokens
from tests.gpu.waiting import no_waiting
from tests.unit.worker.engine.ops.loading import load

CUDA = torch.device("cuda")
SITE = Site("gate", "l.{layer}.gate", 4096, 14336)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def load_gate(op: LowRank | PlainLowRank, slot: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(slot)
    a = (torch.randn(rank, SITE.in_features, generator=generator) * SITE.in_features**-0.5).to(dtype)
    b = (torch.randn(SITE.out_features, rank, generator=generator) * rank**-0.5).to(dtype)
    module = ModuleOp("gate", 0, "lowrank", rank, 1.5, {"A": "A", "B": "B"})
    load(op, slot, [module], {"A": a, "B": b}.__getitem__, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_ranks_equal_the_plain_twin(dtype: torch.dtype) -> None:
    fast, plain = LowRank((SITE,), 1, dtype, CUDA), PlainLowRank(torch.float32, CUDA)
    assert fast._product is not None
    ranks = [1, 4, 8, 16, 63, 64, 256, 16]
    for slot, rank in enumerate(ranks):
        load_gate(fast, slot, rank, dtype)
        load_gate(plain, slot, rank, dtype)
    segments, start = [], 0
    for slot, count in [(-1, 2), *((slot, 1) for slot in range(8)), (0, 3), (6, 40), (-1, 5), (3, 500)]:
        segments.append(Segment(slot, start, start + count))
        start += count
    tokens = StepTokens(tuple(segments))
    x = torch.randn(start, SITE.in_features, device=CUDA).to(dtype)
    y = torch.randn(start, SITE.out_features, device=CUDA).to(dtype)
    expected = y.float()
    plain.plan(tokens)["gate"].apply(0, x.float(), expected)
    fast.plan(tokens)["gate"].apply(0, x, y)
    tolerance = 1e-3 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    base = [*range(2), *range(53, 58)]
    assert torch.equal(y[base].float(), expected[base])


def test_a_plan_and_its_products_wait_for_nothing() -> None:
    op = LowRank((SITE,), 1, torch.bfloat16, CUDA)
    load_gate(op, 0, 16, torch.bfloat16)
    x = torch.randn(33, SITE.in_features, device=CUDA).bfloat16()
    y = torch.zeros(33, SITE.out_features, device=CUDA).bfloat16()
    tokens = StepTokens((Segment(0, 0, 1), Segment(-1, 1, 2), Segment(0, 2, 33)))
    op.plan(tokens)["gate"].apply(0, x, y)
    with no_waiting():
        op.plan(tokens)["gate"].apply(0, x, y)


def facts(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int = 16) -> AttentionFacts:
    return AttentionFacts(KvShape(1, kv_heads, dim, 300, page), heads, dtype, CUDA, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (8, 8, 256)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 30.0)])
def test_attention_over_pages_equals_the_twin(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None
) -> None:
    from adaptermesh.worker.engine.paged_triton import triton_paged

    shape = KvShape(1, kv_heads, dim, 300, 16)
    cache = KvCache(shape, dtype, CUDA)
    cache.data.normal_()
    cache.data[:, 299:] = torch.nan
    blocks = torch.randperm(298).add(1).tolist()
    spans = [
        Span(0, 1, tuple(blocks[:1])),
        Span(-1, 1, (300,)),
        Span(1000, 1, tuple(blocks[1:64])),
        Span(0, 200, tuple(blocks[64:77])),
        Span(777, 130, tuple(blocks[77:134])),
    ]
    rows = plan_paged(spans, 3, triton_paged, 16, tile_tokens(heads, kv_heads), CUDA).rows
    q = torch.randn(333, heads, dim, device=CUDA).to(dtype)
    step = (q, cache.keys(0), cache.values(0), rows, ScoreRule(dim**-0.5, softcap), window)
    tolerance = 2e-3 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(triton_paged(*step), plain_paged(*step), rtol=tolerance, atol=tolerance)


def test_the_choice_takes_a_way_over_pages_and_says_what_it_passed_by() -> None:
    wanted = facts(torch.bfloat16, 32, 8, 128)
    assert choose_attention("auto", wanted).way is not None
    reasons: list[str] = []
    for name, way in ways(wanted, reasons).items():
        print(f"{name}: {trial(way, wanted) or 'runs'}")
    print(reasons)
