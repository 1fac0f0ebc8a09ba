"""Factors of many slots, against the plain twin."""

from collections.abc import Mapping
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import site_map
from adaptermesh.worker.engine.ops.affine import Affine
from adaptermesh.worker.engine.ops.affine_plain import PlainAffine
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import Twins

LAYERS, SLOTS = 2, 7
CPU = torch.device("cpu")
FACTS = BaseFacts.from_config(
    "tiny",
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": 9,
    },
    "sha256:" + "0" * 64,
)
SITES = site_map(FACTS)
Places: TypeAlias = frozenset[tuple[str, str]]
PLACES = [(site.name, slot) for site in SITES.sites for slot in ("in_scale", "out_scale")]


def modules(places: Places, seed: int) -> tuple[list[ModuleOp], Mapping[str, torch.Tensor]]:
    """An adapter with factors at some places of some layers."""
    generator = torch.Generator().manual_seed(seed)
    found: list[ModuleOp] = []
    tensors: dict[str, torch.Tensor] = {}
    for site in SITES.sites:
        for layer in range(LAYERS):
            names = [name for place, name in sorted(places) if place == site.name and (layer or seed % 2)]
            for name in names:
                width = site.in_features if name == "in_scale" else site.out_features
                tensors[f"{site.name}.{layer}.{name}"] = torch.randn(width, generator=generator)
            if names:
                slots = {name: f"{site.name}.{layer}.{name}" for name in names}
                found.append(ModuleOp(site.name, layer, "affine", 0, 1.0, slots))
    return found, tensors


class Pair(Twins):
    """The op and its twin, with the same adapters."""

    def __init__(self) -> None:
        self.fast = Affine(SITES, torch.float32, CPU)
        self.plain = PlainAffine(SITES, torch.float32, CPU)
        super().__init__(self.fast, self.plain, LAYERS)

    def load(self, slot: int, places: Places, seed: int) -> None:
        self.hold(slot, *modules(places, seed))

    def check(self) -> None:
        """A token of each slot, and of the base before, between and after."""
        slots = [-1, *sorted(self.held), -1]
        tokens = StepTokens(tuple(Segment(slot, place, place + 1) for place, slot in enumerate(slots)))
        generator = torch.Generator().manual_seed(1)
        for site in SITES.sites:
            x = torch.randn(len(slots), site.in_features, generator=generator)
            y = torch.randn(len(slots), site.out_features, generator=generator)
            for layer in range(LAYERS):
                ins, outs = [], []
                for op in (self.fast, self.plain):
                    changed, before = y.clone(), x.clone()
                    plan, inputs = op.plan(tokens).get(site.name), op.plan_inputs(tokens).get(site.name)
                    if plan is not None:
                        plan.apply(layer, x, changed)
                    ins.append(x if inputs is None else inputs.change(layer, x))
                    outs.append(changed)
                    assert torch.equal(x, before)
                assert torch.equal(*ins)
                assert torch.equal(*outs)
                # Nothing of anybody reaches the base.
                assert torch.equal(outs[0][[0, -1]], y[[0, -1]])


PLACE_SETS = st.frozensets(st.sampled_from(PLACES), max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.none() | PLACE_SETS, st.integers(0, 99)), max_size=8))
def test_slots_that_come_and_go_equal_the_plain_twin(
    events: list[tuple[int, Places | None, int]],
) -> None:
    pair = Pair()
    for slot, places, seed in events:
        if places is None:
            pair.unload(slot)
        else:
            pair.load(slot, places, seed)
        pair.check()


def test_memory_is_given_back_with_the_last_adapter() -> None:
    pair = Pair()
    pair.load(3, frozenset(PLACES), 1)
    pair.load(5, frozenset(PLACES[:2]), 1)
    whole = pair.fast.size_bytes
    pair.unload(3)
    assert 0 < pair.fast.size_bytes < whole
    pair.unload(5)
    assert pair.fast.size_bytes == 0


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_a_step_of_the_base_has_no_part(slots: list[int]) -> None:
    pair = Pair()
    pair.load(0, frozenset(PLACES), 1)
    tokens = StepTokens(tuple(Segment(slot, place, place + 1) for place, slot in enumerate(slots)))
    assert not pair.fast.plan(tokens)
    assert not pair.fast.plan_inputs(tokens)
    assert pair.fast.scales_of(tokens) is None
