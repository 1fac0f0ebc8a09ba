"""The Triton kernels against the plain twin: compiled on a card, in Triton's interpreter without one."""

from collections.abc import Sequence

import pytest
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.ops import lowrank_spans
from adaptermesh.worker.engine.ops.lowrank import LowRank
from adaptermesh.worker.engine.ops.lowrank_plain import PlainLowRank
from adaptermesh.worker.engine.ops.lowrank_spans import SpanProduct, TokenSpans, plain_product, trial
from adaptermesh.worker.engine.ops.op import Segment, StepTokens

pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux on x86-64)")

from adaptermesh.worker.engine.ops.lowrank_triton import triton_product
from tests.unit.worker.engine.ops.loading import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Widths that no block size divides, and one below all of them.
SITES = (Site("q", "l.{layer}.q", 144, 200), Site("down", "l.{layer}.d", 700, 24))
LAYERS = 2
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


class Pair:
    """The op with a product over spans, and the plain twin in float32, loaded alike."""

    def __init__(self, product: SpanProduct = triton_product, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.fast = LowRank(SITES, LAYERS, dtype, DEVICE)
        self.fast._product = product
        self.plain = PlainLowRank(torch.float32, DEVICE)

    def load(self, slot: int, modules: Sequence[tuple[str, int, int, float]]) -> None:
        """modules: (site, layer, rank, scale)."""
        generator = torch.Generator().manual_seed(slot)
        tensors: dict[str, torch.Tensor] = {}
        found = []
        for name, layer, rank, scale in modules:
            site = next(site for site in SITES if site.name == name)
            a, b = f"{name}.{layer}.A", f"{name}.{layer}.B"
            tensors[a] = torch.randn(rank, site.in_features, generator=generator) * site.in_features**-0.5
            tensors[b] = torch.randn(site.out_features, rank, generator=generator) * rank**-0.5
            # What the arena holds, so that only the products differ.
            tensors = {key: tensor.to(self.dtype) for key, tensor in tensors.items()}
            found.append(ModuleOp(name, layer, "lowrank", rank, scale, {"A": a, "B": b}))
        for op in (self.fast, self.plain):
            load(op, slot, found, tensors.__getitem__, LAYERS)

    def check(self, segments: Sequence[tuple[int, int]]) -> None:
        """segments: (slot, tokens)."""
        tokens = step_tokens(segments)
        count = tokens.segments[-1].end
        fast, plain = self.fast.plan(tokens), self.plain.plan(tokens)
        assert fast.keys() == plain.keys()
        for site in SITES:
            for layer in range(LAYERS):
                x = torch.randn(count, site.in_features, device=DEVICE).to(self.dtype)
                # A column range, as the joint product of q, k and v gives it.
                y = torch.randn(count, site.out_features + 7, device=DEVICE).to(self.dtype)
                expected, found = y.float(), y.clone()
                if site.name in plain:
                    plain[site.name].apply(layer, x.float(), expected[:, 3:-4])
                    fast[site.name].apply(layer, x, found[:, 3:-4])
                tolerance = TOLERANCE[self.dtype]
                torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def step_tokens(segments: Sequence[tuple[int, int]]) -> StepTokens:
    packed: list[Segment] = []
    for slot, count in segments:
        start = packed[-1].end if packed else 0
        packed.append(Segment(slot, start, start + count))
    return StepTokens(tuple(packed))


RANKS = (1, 4, 8, 16, 63, 64, 256)


@pytest.mark.parametrize("product", [triton_product, plain_product])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ranks_from_1_to_256_share_a_launch_of_decodes_and_prefills(
    dtype: torch.dtype, product: SpanProduct
) -> None:
    pair = Pair(product, dtype)
    for slot, rank in enumerate(RANKS):
        pair.load(slot, [("q", 0, rank, 0.25 * (slot + 1))])
    decodes = [(-1, 3), *((slot, 1) for slot in range(len(RANKS)))]
    pair.check([*decodes, (-1, 20), (2, 17), (6, 33)])


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_alone(rank: int) -> None:
    pair = Pair()
    pair.load(0, [("down", 0, rank, 1.0)])
    pair.check([(0, 1)])
    pair.check([(0, 16)])


def test_layers_and_sites_may_differ_in_rank_and_scale() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 8, 0.5), ("q", 1, 3, 2.0), ("down", 1, 5, 1.0)])
    pair.load(1, [("down", 0, 2, 0.3)])
    pair.load(2, [("q", 1, 4, 0.7)])
    pair.check([(0, 2), (-1, 1), (1, 1), (2, 3), (0, 21), (1, 18)])


def test_segments_of_every_length_around_a_tile() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 5, 1.0)])
    pair.load(1, [("q", 0, 2, 1.0)])
    for count in (1, 15, 16, 17, 31, 32, 33):
        pair.check([(0, count), (-1, 1), (1, 16)])


def test_rows_are_right_after_slots_were_emptied_and_filled_again() -> None:
    pair = Pair()
    for slot in range(4):
        pair.load(slot, [("q", 0, 4 + slot, 1.0)])
    for op in (pair.fast, pair.plain):
        op.unload(1)
        op.unload(2)
    pair.load(5, [("q", 0, 7, 1.0), ("q", 1, 7, 1.0)])
    pair.check([(0, 1), (3, 1), (5, 2), (5, 16)])


def test_base_tokens_are_not_touched_and_a_base_batch_has_no_plan() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 4, 1.0)])
    plan = pair.fast.plan(step_tokens([(-1, 2), (0, 1), (-1, 30)]))["q"]
    x, y = torch.randn(33, 144, device=DEVICE), torch.randn(33, 200, device=DEVICE)
    before = y.clone()
    plan.apply(0, x, y)
    base = [0, 1, *range(3, 33)]
    assert torch.equal(y[base], before[base])
    assert not torch.equal(y[2], before[2])
    assert pair.fast.plan(step_tokens([(-1, 5)])) == {}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_other_rows_hold_never_leaks(value: float) -> None:
    pair = Pair()
    for slot in range(3):
        pair.load(slot, [("q", 0, 3, 1.0)])
    arena = pair.fast._arenas["q"]
    pair.fast.unload(1)
    own = [row for slot in (0, 2) for row in range(arena.spans[slot].start, arena.spans[slot].end)]
    foreign = sorted(set(range(arena._a.shape[1])) - set(own))
    arena._a[:, foreign], arena._b[:, foreign] = value, value
    x, y = torch.randn(19, 144, device=DEVICE), torch.zeros(19, 200, device=DEVICE)
    pair.fast.plan(step_tokens([(0, 1), (2, 1), (-1, 1), (2, 16)]))["q"].apply(0, x, y)
    assert torch.isfinite(y).all()


def test_a_tokens_own_nan_stays_its_own() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 3, 1.0)])
    x, y = torch.randn(18, 144, device=DEVICE), torch.zeros(18, 200, device=DEVICE)
    x[5] = torch.nan
    pair.fast.plan(step_tokens([(0, 17), (-1, 1)]))["q"].apply(0, x, y)
    assert torch.isnan(y[5]).all()
    assert torch.isfinite(y[[*range(5), *range(6, 18)]]).all()


def test_sites_with_equal_rows_share_one_tensor() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 4, 1.0), ("down", 0, 4, 1.0)])
    plan = pair.fast.plan(step_tokens([(0, 3)]))
    assert plan["q"].tokens is plan["down"].tokens  # type: ignore[attr-defined]


def wrong(
    tokens: TokenSpans,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    plain_product(tokens, a, b, 1.2 * scales, x, y)


def refusing(
    tokens: TokenSpans,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_product_is_tried_before_it_is_taken(dtype: torch.dtype) -> None:
    assert trial(triton_product, dtype, DEVICE) == ""
    assert trial(wrong, dtype, DEVICE) == "its result is wrong"
    assert "no kernel image" in trial(refusing, dtype, DEVICE)


def test_the_kernels_are_chosen_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank_spans, "trial", lambda product, dtype, device: "")
    assert lowrank_spans.span_product(torch.float32, torch.device("cpu")) is None
    assert lowrank_spans.span_product(torch.bfloat16, torch.device("cuda")) is triton_product
    assert lowrank_spans.span_product(torch.float64, torch.device("cuda")) is None
    monkeypatch.setattr(lowrank_spans, "trial", lambda product, dtype, device: "its result is wrong")
    assert lowrank_spans.span_product(torch.bfloat16, torch.device("cuda")) is None


def test_without_triton_the_dense_products_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank_spans, "find_spec", lambda name: None)
    assert lowrank_spans.span_product(torch.bfloat16, torch.device("cuda")) is None
