"""Attention over pages: every way against the plain twin, the twin against gathering, and the choice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaptermesh.core.errors import MeshError
from adaptermesh.worker.engine import attention_choice, paged_varlen
from adaptermesh.worker.engine.attention import ScoreRule, Span, plan_attention
from adaptermesh.worker.engine.attention_choice import AttentionFacts, choose_attention, trial
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.paged_attention import PagedRows, PagedWay, plain_paged, plan_paged

CPU = torch.device("cpu")
# Where the kernel runs: compiled on a card, in Triton's interpreter without one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 4
SPANS = [
    Span(0, 1, (1,)),
    Span(9, 1, (7, 3, 2)),
    Span(0, 6, (4, 5)),
    Span(5, 9, (6, 8, 9, 10)),
]


def make_facts(heads: int = 6, kv_heads: int = 2, dim: int = 24, **changes: Any) -> AttentionFacts:
    shape = KvShape(1, kv_heads, dim, 12, PAGE)
    return replace(AttentionFacts(shape, heads, torch.float32, CPU, False), **changes)


def make_cache(facts: AttentionFacts) -> KvCache:
    """Filled; block 11 and what lies behind each row's keys hold infinities."""
    cache = KvCache(facts.shape, facts.dtype, facts.device)
    cache.data[:, 1:] = torch.randn(cache.data[:, 1:].shape).to(facts.dtype)
    cache.data[:, 11] = torch.inf
    for span in SPANS:
        end = span.past + span.count
        if end % PAGE:
            cache.data[:, span.blocks[end // PAGE], end % PAGE :] = torch.inf
    return cache


def triton_way(device: torch.device = CPU) -> PagedWay:
    pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux on x86-64)")
    if device.type != DEVICE.type:
        pytest.skip("needs Triton's interpreter, which is off where there is a card: see tests/gpu")
    from adaptermesh.worker.engine.paged_triton import triton_paged

    return triton_paged


RULES = [(None, None), (3, None), (None, 5.0), (2, 5.0)]


@pytest.mark.parametrize(("window", "softcap"), RULES)
def test_the_twin_equals_gathering(window: int | None, softcap: float | None) -> None:
    facts = make_facts()
    cache, other = KvCache(facts.shape, facts.dtype, CPU), KvCache(facts.shape, facts.dtype, CPU)
    cache.data[:, 1:] = torch.randn(cache.data[:, 1:].shape)
    other.data.copy_(cache.data)
    tokens = sum(span.count for span in SPANS)
    q, kv = torch.randn(tokens, 6, 24), torch.randn(tokens, 4, 24)
    paged = plan_paged(SPANS, 2, plain_paged, PAGE, 4, CPU).attend(
        cache, 0, q, kv, 0.2, window=window, softcap=softcap
    )
    gathered = plan_attention(SPANS, 2, PAGE, torch.float32, CPU).attend(
        other, 0, q, kv, 0.2, window=window, softcap=softcap
    )
    torch.testing.assert_close(paged, gathered, rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.data, other.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 24), (8, 1, 64)])
@pytest.mark.parametrize(("window", "softcap"), RULES)
def test_the_kernel_equals_the_twin(
    window: int | None, softcap: float | None, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    way, facts = triton_way(DEVICE), make_facts(heads, kv_heads, dim, dtype=dtype, device=DEVICE)
    cache, q = make_cache(facts), torch.randn(17, heads, dim).to(DEVICE, dtype)
    rows = plan_paged(SPANS, 2, way, PAGE, 4, DEVICE).rows
    rule = ScoreRule(dim**-0.5, softcap)
    step = (q, cache.keys(0), cache.values(0), rows, rule, window)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(way(*step), plain_paged(*step), rtol=tolerance, atol=tolerance)


def test_contexts_of_many_pages_and_queries_that_are_a_slice() -> None:
    way = triton_way(DEVICE)
    cache = KvCache(KvShape(2, 2, 32, 200, PAGE), torch.float32, DEVICE)
    cache.data.normal_()
    blocks = torch.randperm(200)[:180].add(1).tolist()
    spans = [
        Span(300, 1, tuple(blocks[:80])),
        Span(200, 70, tuple(blocks[80:160])),
        Span(0, 5, (blocks[170],) * 2),
    ]
    rows = plan_paged(spans, 1, way, PAGE, 32, DEVICE).rows
    joint = torch.randn(76, 8, 32, device=DEVICE)
    step = (joint[:, :4], cache.keys(1), cache.values(1), rows, ScoreRule(0.3, None), None)
    torch.testing.assert_close(way(*step), plain_paged(*step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_row_that_sees_nothing_reads_nothing_and_gives_zero(kernel: bool) -> None:
    way = triton_way(DEVICE) if kernel else plain_paged
    facts = make_facts()
    cache = KvCache(facts.shape, torch.float32, DEVICE)
    cache.data.fill_(torch.nan)
    rows = plan_paged([Span(-1, 1, (0,)), Span(-1, 1, (3,))], 2, way, PAGE, 4, DEVICE).rows
    q = torch.randn(2, 6, 24, device=DEVICE)
    out = way(q, cache.keys(0), cache.values(0), rows, ScoreRule(1.0, None), None)
    assert torch.equal(out, torch.zeros_like(q))


class FakeVarlen:
    """What varlen_attn does, by the twin, from its arguments alone."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        self.calls.append({"window_size": window_size, "enable_gqa": enable_gqa, "max": (max_q, max_k)})
        assert scale is not None
        assert cu_seq_k is None
        assert block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
        rows = PagedRows(0, cu_seq_q, seqused_k, block_table, torch.empty(0, 2), 1, max_q, max_k)
        window = None if window_size[0] == -1 else window_size[0] + 1
        return plain_paged(query, key, value, rows, ScoreRule(scale, None), window)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> FakeVarlen:
    fake = FakeVarlen()
    monkeypatch.setattr(paged_varlen, "varlen_attn", fake)
    return fake


@pytest.mark.parametrize("window", [None, 3])
def test_torch_is_asked_for_causal_attention_over_the_block_table(
    varlen: FakeVarlen, window: int | None
) -> None:
    facts = make_facts()
    cache, q = make_cache(facts), torch.randn(17, 6, 24)
    rows = plan_paged(SPANS, 2, paged_varlen.varlen_paged, PAGE, 4, CPU).rows
    step = (q, cache.keys(0), cache.values(0), rows, ScoreRule(0.2, None), window)
    assert torch.equal(paged_varlen.varlen_paged(*step), plain_paged(*step))
    expected = {"window_size": (-1 if window is None else 2, 0), "enable_gqa": True, "max": (9, 14)}
    assert varlen.calls == [expected]


def test_scores_that_are_capped_never_go_to_torch(varlen: FakeVarlen) -> None:
    facts = make_facts(caps=True)
    reasons: list[str] = []
    assert "varlen" not in attention_choice.ways(facts, reasons)
    assert any("cap" in reason for reason in reasons)
    rows = plan_paged(SPANS, 2, paged_varlen.varlen_paged, PAGE, 4, CPU).rows
    with pytest.raises(ValueError, match="cap"):
        paged_varlen.varlen_paged(
            torch.randn(17, 6, 24), torch.empty(0), torch.empty(0), rows, ScoreRule(1.0, 30.0), None
        )


def test_a_torch_without_the_interface_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: torch.Tensor, *, scale: float | None = None) -> None: ...

    monkeypatch.setattr(paged_varlen, "varlen_attn", older)
    assert paged_varlen.reason_without_varlen()
    assert "varlen" not in attention_choice.ways(make_facts(), [])


def test_this_torch_offers_the_interface() -> None:
    assert paged_varlen.reason_without_varlen() == ""


def refuses(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> torch.Tensor:
    raise RuntimeError("Paged KV cache block size must be divisible by 256\nmore")


def is_wrong(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> torch.Tensor:
    return plain_paged(q, keys, values, rows, rule, window) + 0.1


def test_a_way_is_tried_before_it_is_taken() -> None:
    assert trial(plain_paged, make_facts()) == ""
    assert trial(plain_paged, make_facts(dtype=torch.bfloat16)) == ""
    assert "divisible by 256" in trial(refuses, make_facts())
    assert trial(is_wrong, make_facts()) == "its result is wrong"
    assert trial(triton_way(), make_facts(8, 2, 128, dtype=torch.bfloat16)) == ""


def on_cuda(facts: AttentionFacts) -> AttentionFacts:
    """Facts that claim a card, so that the choice is that of a card."""
    return replace(facts, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ({"varlen": plain_paged, "triton": is_wrong}, plain_paged),
        ({"varlen": refuses, "triton": plain_paged}, plain_paged),
        ({"varlen": refuses, "triton": is_wrong}, None),
        ({}, None),
    ],
)
def test_on_cuda_the_first_way_that_works_is_taken(
    monkeypatch: pytest.MonkeyPatch, offered: dict[str, PagedWay], taken: PagedWay | None
) -> None:
    monkeypatch.setattr(attention_choice, "ways", lambda facts, reasons: offered)
    monkeypatch.setattr(attention_choice, "trial", lambda way, facts: trial(way, make_facts()))
    assert choose_attention("auto", on_cuda(make_facts())).way is taken


def test_a_cpu_gathers_unless_it_is_told_otherwise() -> None:
    assert choose_attention("auto", make_facts()).way is None
    assert choose_attention("plain", make_facts()).way is plain_paged
    assert choose_attention("triton", make_facts()).way is triton_way()


def test_a_way_that_is_named_and_does_not_run_is_an_error() -> None:
    # There is no CPU kernel behind varlen_attn.
    with pytest.raises(MeshError, match="varlen"):
        choose_attention("varlen", make_facts())


@pytest.mark.parametrize("attention", ["plain", "triton"])
def test_an_engine_over_pages_gives_the_reference_tokens(
    lab: Any, make_bench: Callable[..., Any], prompts: Any, attention: str
) -> None:
    if attention == "triton":
        triton_way()
    bench, adapter = make_bench(attention=attention, step_tokens=24), lab.adapter(1)
    asked = [(None, prompts(3)[0]), (adapter, prompts(3)[1]), (adapter, prompts(3)[2])]
    heard = [bench.submit(one, prompt, max_tokens=4) for one, prompt in asked]
    bench.run(*heard)
    for (one, prompt), answer in zip(asked, heard, strict=True):
        assert answer.tokens == lab.continuation(one, prompt, 4)
    bench.assert_empty()
