"""The batched low-rank op against its plain twin."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.ops import lowrank
from adaptermesh.worker.engine.ops.lowrank import LowRank
from adaptermesh.worker.engine.ops.lowrank_plain import PlainLowRank
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import load

CPU = torch.device("cpu")
SITES = (Site("q", "l.{layer}.q", 16, 24), Site("down", "l.{layer}.d", 40, 16))
LAYERS = 2


class Pair:
    """The op and its twin, loaded alike. `gathers` chooses how short segments are computed."""

    def __init__(self, *, gathers: bool = True) -> None:
        self.fast = LowRank(SITES, LAYERS, torch.float32, CPU)
        for arena in self.fast._arenas.values():
            arena.gathers = gathers
        self.plain = PlainLowRank(torch.float32, CPU)

    def load(self, slot: int, modules: Sequence[tuple[str, int, int, float]], seed: int = 0) -> None:
        """modules: (site, layer, rank, scale)."""
        generator = torch.Generator().manual_seed(seed * 1000 + slot)
        tensors: dict[str, torch.Tensor] = {}
        found = []
        for name, layer, rank, scale in modules:
            site = next(site for site in SITES if site.name == name)
            a, b = f"{name}.{layer}.A", f"{name}.{layer}.B"
            tensors[a] = torch.randn(rank, site.in_features, generator=generator)
            tensors[b] = torch.randn(site.out_features, rank, generator=generator)
            found.append(ModuleOp(name, layer, "lowrank", rank, scale, {"A": a, "B": b}))
        for op in (self.fast, self.plain):
            load(op, slot, found, tensors.__getitem__, LAYERS)

    def unload(self, slot: int) -> None:
        self.fast.unload(slot)
        self.plain.unload(slot)

    def check(self, segments: Sequence[tuple[int, int]]) -> None:
        """segments: (slot, tokens)."""
        packed: list[Segment] = []
        start = 0
        for slot, count in segments:
            packed.append(Segment(slot, start, start + count))
            start += count
        tokens = StepTokens(tuple(packed))
        fast, plain = self.fast.plan(tokens), self.plain.plan(tokens)
        assert fast.keys() == plain.keys()
        for site in SITES:
            for layer in range(LAYERS):
                x, y = torch.randn(start, site.in_features), torch.randn(start, site.out_features)
                expected, found = y.clone(), y.clone()
                if site.name in plain:
                    plain[site.name].apply(layer, x, expected)
                    fast[site.name].apply(layer, x, found)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


modules = st.lists(
    st.tuples(
        st.sampled_from(["q", "down"]), st.integers(0, 1), st.integers(1, 9), st.sampled_from([0.5, 2.0])
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda module: module[:2],
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(modules, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 20)), min_size=1, max_size=8),
    st.sets(st.integers(0, 4)),
    st.booleans(),
)
def test_ragged_batches_equal_the_plain_twin(
    adapters: list[list[tuple[str, int, int, float]]],
    segments: list[tuple[int, int]],
    replaced: set[int],
    gathers: bool,
) -> None:
    pair = Pair(gathers=gathers)
    for slot, found in enumerate(adapters):
        pair.load(slot, found)
    for slot in replaced & set(range(len(adapters))):
        pair.unload(slot)
        pair.load(slot, adapters[-1 - slot], seed=1)
    pair.check([(slot if slot < len(adapters) else -1, count) for slot, count in segments])


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 64, 256])
def test_ranks_from_1_to_256_share_a_batch(rank: int, gathers: bool) -> None:
    pair = Pair(gathers=gathers)
    pair.load(0, [("q", 0, rank, 0.25), ("q", 1, rank, 0.25)])
    pair.load(1, [("q", 0, 8, 1.0)])
    pair.check([(-1, 2), (0, 1), (1, 3), (1, 40), (0, 17)])


def test_64_tokens_of_64_adapters_of_many_ranks_and_scales() -> None:
    pair = Pair()
    for slot in range(64):
        site = "down" if slot % 5 == 0 else "q"
        found = [(site, 0, 1 + slot % 11, 0.25 + slot % 8 / 4), (site, 1, 1 + slot % 7, 0.5 + slot % 3 / 2)]
        pair.load(slot, found[: 1 + slot % 2])
    pair.check([(slot, 1) for slot in range(64)])
    pair.check([(slot, 1) for slot in reversed(range(0, 64, 2))])


def test_a_step_can_be_applied_again_after_a_nan() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 4, 1.0)])
    pair.load(1, [("q", 0, 4, 1.0)])
    plan = pair.fast.plan(StepTokens((Segment(0, 0, 1), Segment(1, 1, 2))))["q"]
    plan.apply(0, torch.full((2, 16), torch.nan), torch.zeros(2, 24))
    x, y = torch.randn(2, 16), torch.zeros(2, 24)
    plan.apply(0, x, y)
    assert torch.isfinite(y).all()


def test_a_base_only_batch_has_no_plan() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 4, 1.0)])
    assert pair.fast.plan(StepTokens((Segment(-1, 0, 5),))) == {}


def test_a_site_that_no_active_adapter_touches_is_absent() -> None:
    pair = Pair()
    pair.load(0, [("q", 0, 4, 1.0)])
    pair.load(1, [("down", 0, 4, 1.0)])
    assert set(pair.fast.plan(StepTokens((Segment(0, 0, 2),)))) == {"q"}


def test_memory_follows_the_true_rank_and_is_used_again() -> None:
    small, large = Pair(), Pair()
    for slot in range(8):
        small.load(slot, [("q", 0, 2, 1.0)])
        large.load(slot, [("q", 0, 64, 1.0)])
    assert large.fast.size_bytes >= 16 * small.fast.size_bytes
    before = large.fast.size_bytes
    for turn in range(20):
        large.unload(turn % 8)
        large.load(turn % 8, [("q", 0, 64, 1.0)])
    assert large.fast.size_bytes == before


@pytest.mark.parametrize("gathers", [True, False])
def test_another_adapters_infinity_stays_its_own(gathers: bool) -> None:
    pair = Pair(gathers=gathers)
    pair.load(0, [("q", 0, 4, 1.0)])
    pair.load(1, [("q", 0, 4, 1.0)])
    pair.load(2, [("q", 0, 4, 1.0)])
    span = pair.fast._arenas["q"].spans[1]
    pair.fast._arenas["q"]._a[:, span.start : span.end] = 3e38
    x, y = torch.full((3, 16), 100.0), torch.zeros(3, 24)
    tokens = StepTokens((Segment(0, 0, 1), Segment(1, 1, 2), Segment(2, 2, 3)))
    pair.fast.plan(tokens)["q"].apply(0, x, y)
    assert not torch.isfinite(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


def test_a_joint_product_that_would_be_too_large_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "MAX_JOINT_WORK", 0)
    pair = Pair(gathers=False)
    for slot in range(4):
        pair.load(slot, [("q", 0, 4, 1.0), ("down", 1, 3, 0.5)])
    pair.check([(-1, 1), (0, 1), (1, 2), (2, 1), (3, 5)])


def test_a_weight_too_large_for_the_device_is_refused() -> None:
    op = LowRank(SITES, LAYERS, torch.float16, CPU)
    tensors = {"A": torch.full((2, 16), 1e6), "B": torch.ones(24, 2)}
    with pytest.raises(Exception, match="too large"):
        load(op, 0, [ModuleOp("q", 0, "lowrank", 2, 1.0, {"A": "A", "B": "B"})], tensors.__getitem__, LAYERS)
