"""The low-rank op of the native kernels against its plain twin."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.worker.engine.native.library import Kernels
from adaptermesh.worker.engine.ops.lowrank_native import NativeLowRank
from adaptermesh.worker.engine.ops.lowrank_plain import PlainLowRank
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import load

LAYERS = 2
# Outputs and inputs that fill no panel and no vector, that fill them exactly, and that are fewer than one.
SITES = (
    Site("q", "l.{layer}.q", 40, 70),
    Site("k", "l.{layer}.k", 67, 64),
    Site("v", "l.{layer}.v", 3, 5),
    Site("down", "l.{layer}.d", 130, 33),
)
BY_NAME = {site.name: site for site in SITES}

Modules = Sequence[tuple[str, int, int, float]]
"""(site, layer, rank, scale)."""


def make_tokens(segments: Sequence[tuple[int, int]]) -> StepTokens:
    """segments: (slot, tokens)."""
    packed: list[Segment] = []
    for slot, count in segments:
        start = packed[-1].end if packed else 0
        packed.append(Segment(slot, start, start + count))
    return StepTokens(tuple(packed))


class Pair:
    """The op and its twin, loaded alike."""

    def __init__(self, kernels: Kernels) -> None:
        self.fast = NativeLowRank(SiteMap(SITES, {}, LAYERS, (), "l.{layer}", {}, 0), kernels)
        self.plain = PlainLowRank(torch.float32, torch.device("cpu"))

    def load(self, slot: int, modules: Modules, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed * 1000 + slot)
        tensors: dict[str, torch.Tensor] = {}
        found = []
        for name, layer, rank, scale in modules:
            site, a, b = BY_NAME[name], f"{name}.{layer}.A", f"{name}.{layer}.B"
            tensors[a] = torch.randn(rank, site.in_features, generator=generator).to(dtype)
            tensors[b] = torch.randn(site.out_features, rank, generator=generator).to(dtype) / rank**0.5
            found.append(ModuleOp(name, layer, "lowrank", rank, scale, {"A": a, "B": b}))
        for op in (self.fast, self.plain):
            load(op, slot, found, tensors.__getitem__, LAYERS)

    def unload(self, slot: int) -> None:
        self.fast.unload(slot)
        self.plain.unload(slot)

    def check(self, segments: Sequence[tuple[int, int]]) -> None:
        """Both give the same at every site and layer; x and y are columns of wider tensors."""
        tokens = make_tokens(segments)
        count = tokens.segments[-1].end
        fast, plain = self.fast.plan(tokens), self.plain.plan(tokens)
        assert fast.keys() == plain.keys()
        for name in plain:
            site = BY_NAME[name]
            for layer in range(LAYERS):
                x = torch.randn(count, site.in_features + 3)[:, 2:-1]
                around = torch.randn(count, site.out_features + 7)
                expected, found = around.clone(), around.clone()
                plain[name].apply(layer, x, expected[:, 5:-2])
                fast[name].apply(layer, x, found[:, 5:-2])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
                assert torch.equal(found[:, :5], around[:, :5])
                assert torch.equal(found[:, -2:], around[:, -2:])


modules = st.lists(
    st.tuples(
        st.sampled_from(sorted(BY_NAME)),
        st.integers(0, LAYERS - 1),
        st.one_of(st.integers(1, 9), st.integers(1, 256)),
        st.sampled_from([0.5, 2.0]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda module: module[:2],
)
segments = st.lists(
    st.tuples(st.integers(-1, 4), st.one_of(st.integers(1, 6), st.integers(1, 40))), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.none() | modules, segments), min_size=1, max_size=6))
def test_slots_used_again_and_again_equal_the_plain_twin(
    kernels: Kernels,
    actions: list[tuple[int, list[tuple[str, int, int, float]] | None, list[tuple[int, int]]]],
) -> None:
    pair, full = Pair(kernels), set[int]()
    for seed, (slot, found, batch) in enumerate(actions):
        pair.unload(slot)
        full.discard(slot)
        if found is not None:
            pair.load(slot, found, seed)
            full.add(slot)
        pair.check([(other if other in full else -1, count) for other, count in batch])


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 16, 64, 255, 256])
def test_ranks_from_1_to_256_share_a_batch(kernels: Kernels, rank: int) -> None:
    pair = Pair(kernels)
    pair.load(0, [(site.name, layer, rank, 0.25) for site in SITES for layer in range(LAYERS)])
    pair.load(1, [("q", 0, 8, 1.0)])
    pair.check([(-1, 2), (0, 1), (1, 3), (1, 40), (0, 17), (-1, 1)])


def test_ranks_may_differ_by_layer_and_a_layer_may_have_none(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 6, 1.0), ("q", 1, 2, 1.0)])
    pair.load(1, [("q", 1, 9, 0.5)])
    pair.load(2, [("down", 0, 3, 2.0)])
    pair.check([(0, 3), (1, 5), (2, 2), (-1, 1), (1, 1), (0, 1)])


def test_64_tokens_of_64_adapters(kernels: Kernels) -> None:
    pair = Pair(kernels)
    for slot in range(64):
        name = "down" if slot % 5 == 0 else "q"
        found = [(name, 0, 1 + slot % 11, 0.25 + slot % 8 / 4), (name, 1, 1 + slot % 7, 0.5)]
        pair.load(slot, found[: 1 + slot % 2])
    pair.check([(slot, 1) for slot in range(64)])
    pair.check([(slot, 1) for slot in reversed(range(0, 64, 2))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_taken_as_they_are(kernels: Kernels, dtype: torch.dtype) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 4, 1.0), ("down", 1, 7, 1.0)], dtype=dtype)
    pair.check([(0, 5)])


def test_a_base_only_batch_has_no_plan(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 4, 1.0)])
    assert pair.fast.plan(make_tokens([(-1, 5)])) == {}


def test_a_site_that_no_active_adapter_touches_is_absent(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 4, 1.0)])
    pair.load(1, [("down", 0, 4, 1.0)])
    assert set(pair.fast.plan(make_tokens([(0, 2)]))) == {"q"}


def test_an_adapter_without_modules_of_this_kind_adds_nothing(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [])
    pair.load(1, [("q", 0, 4, 1.0)])
    pair.check([(0, 3), (1, 2)])


@pytest.mark.parametrize("foreign", [torch.inf, torch.nan, 3e38])
def test_a_token_does_not_feel_another_adapters_numbers(kernels: Kernels, foreign: float) -> None:
    pair = Pair(kernels)
    for slot in range(3):
        pair.load(slot, [("q", 0, 4, 1.0)])
    x, batch = torch.randn(9, 40), [(0, 3), (1, 2), (2, 1), (-1, 1), (1, 1), (0, 1)]
    expected, found = torch.randn(9, 70).repeat(2, 1, 1).unbind()
    pair.fast.plan(make_tokens(batch))["q"].apply(0, x, expected)
    pair.fast._slots[1].memory.fill_(foreign)
    pair.fast.plan(make_tokens(batch))["q"].apply(0, x, found)
    own = torch.tensor([0, 1, 2, 5, 6, 8])
    assert torch.equal(found[own], expected[own])
    assert not torch.isfinite(found[[3, 4, 7]]).all()


def test_a_token_does_not_feel_another_tokens_numbers(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 4, 1.0)])
    plan = pair.fast.plan(make_tokens([(0, 4)]))["q"]
    x, y = torch.randn(4, 40), torch.randn(4, 70)
    expected, found = y.clone(), y.clone()
    plan.apply(0, x, expected)
    x[1] = torch.nan
    plan.apply(0, x, found)
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_an_unloaded_adapter_leaves_nothing_to_a_smaller_or_larger_one(kernels: Kernels) -> None:
    pair = Pair(kernels)
    for seed, rank in enumerate((8, 3, 8, 8, 20)):
        pair.load(0, [("q", 0, rank, 1.0), ("k", 1, rank, 1.0)], seed)
        pair.check([(0, 3)])
        pair.fast._slots[0].memory.fill_(torch.nan)
        pair.unload(0)


def test_memory_follows_the_true_rank_and_is_given_back(kernels: Kernels) -> None:
    small, large = Pair(kernels), Pair(kernels)
    for slot in range(8):
        small.load(slot, [("q", 0, 2, 1.0)])
        large.load(slot, [("q", 0, 64, 1.0)])
    assert large.fast.size_bytes >= 16 * small.fast.size_bytes
    for slot in range(8):
        large.unload(slot)
    assert large.fast.size_bytes == 0


@settings(max_examples=40, deadline=None)
@given(segments, st.data())
def test_a_token_gets_the_same_to_the_last_bit_in_every_batch(
    kernels: Kernels, batch: list[tuple[int, int]], data: st.DataObject
) -> None:
    pair = Pair(kernels)
    for slot, rank in enumerate((1, 4, 7, 30, 4)):
        pair.load(slot, [("q", 1, rank, 0.5)])
    tokens = make_tokens([*batch, (0, 1)])
    count = tokens.segments[-1].end
    x, y = torch.randn(count, 40), torch.randn(count, 70)
    mixed = y.clone()
    pair.fast.plan(tokens)["q"].apply(1, x, mixed)
    segment = data.draw(st.sampled_from(tokens.segments))
    token = data.draw(st.integers(segment.start, segment.end - 1))
    alone = y[token : token + 1].clone()
    for plan in pair.fast.plan(make_tokens([(segment.slot, 1)])).values():
        plan.apply(1, x[token : token + 1], alone)
    assert torch.equal(mixed[token], alone[0])


def test_columns_that_lie_apart_are_refused(kernels: Kernels) -> None:
    pair = Pair(kernels)
    pair.load(0, [("q", 0, 4, 1.0)])
    plan = pair.fast.plan(make_tokens([(0, 2)]))["q"]
    with pytest.raises(ValueError, match="lie together"):
        plan.apply(0, torch.randn(40, 2).t(), torch.randn(2, 70))
