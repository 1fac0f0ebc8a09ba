"""Kronecker products and rotations of many slots, against the plain twin."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, site_map
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.engine.ops import structured
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.ops.structured import Structured, butterfly
from adaptermesh.worker.engine.ops.structured_plain import PlainStructured
from tests.unit.worker.engine.ops.loading import NoWeights, Twins, load

LAYERS, SLOTS = 2, 7
CPU = torch.device("cpu")
FACTS = BaseFacts.from_config(
    "tiny",
    {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 9,
    },
    "sha256:" + "0" * 64,
)
SITES = site_map(FACTS)
# What a slot holds: how w2's rows split the outputs, or the factors, the block and whether one is shared.
KINDS = ("kron 2", "kron 8", "turn 4", "turn 4 shared", "turn 8 scaled", "turn 2 of 3", "turn 4 of 2 scaled")


class Biases(NoWeights):
    """A base whose modules have biases."""

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        if layer:
            return None
        return torch.randn(site.out_features, generator=torch.Generator().manual_seed(len(site.name)))


def tensors_of(kind: str, site: Site, generator: torch.Generator) -> dict[str, torch.Tensor]:
    words = kind.split()
    shapes: dict[str, tuple[int, ...]]
    if words[0] == "kron":
        o2 = int(words[1])
        first, end = site.out_offset // o2, -(-(site.out_offset + site.out_features) // o2)
        shapes = {"w1": (end - first, 4), "w2": (o2, site.in_features // 4)}
    else:
        block = int(words[1])
        count = 1 if "shared" in words else site.in_features // block
        factors = int(words[words.index("of") + 1]) if "of" in words else 1
        shapes = {"R": (factors, count, block, block)}
        if "scaled" in words:
            shapes["row_scale"] = (site.out_features,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def modules(kind: str, seed: int) -> tuple[list[ModuleOp], Mapping[str, torch.Tensor]]:
    """An adapter of a kind at most sites of most layers."""
    generator = torch.Generator().manual_seed(seed)
    found: list[ModuleOp] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, site in enumerate(SITES.sites):
        for layer in range(LAYERS):
            if (number + layer + seed) % 4 == 0:
                continue
            given_tensors = tensors_of(kind, site, generator)
            names = {name: f"L{layer}.{site.name}.{name}" for name in given_tensors}
            tensors |= {names[name]: values for name, values in given_tensors.items()}
            scale = 1.5 if "w1" in names else 1.0
            found.append(ModuleOp(site.name, layer, "structured", 0, scale, names))
    return found, tensors


class Pair(Twins):
    """The op and its twin, with the same adapters."""

    def __init__(self) -> None:
        self.fast = Structured(SITES, torch.float32, CPU, Biases())
        self.plain = PlainStructured(SITES, Biases())
        super().__init__(self.fast, self.plain, LAYERS)

    def load(self, slot: int, kind: str, seed: int) -> None:
        self.hold(slot, *modules(kind, seed))

    def check(self) -> None:
        """One to seven tokens of each slot, and of the base before and after, in columns of wider buffers."""
        segments, end = [Segment(-1, 0, 2)], 2
        for slot in sorted(self.held):
            segments.append(Segment(slot, end, end + 1 + slot))
            end += 1 + slot
        tokens = StepTokens((*segments, Segment(-1, end, end + 1)))
        bases = [0, 1, end]
        generator = torch.Generator().manual_seed(1)
        for site in SITES.sites:
            x = torch.randn(end + 1, site.in_features + 3, generator=generator)[:, 2:-1]
            y = torch.randn(end + 1, site.out_features + 5, generator=generator)
            for layer in range(LAYERS):
                ins, outs = [], []
                for op in (self.fast, self.plain):
                    whole, before = y.clone(), x.clone()
                    changed = whole[:, 1:-4]
                    plan, inputs = op.plan(tokens).get(site.name), op.plan_inputs(tokens).get(site.name)
                    if plan is not None:
                        plan.apply(layer, x, changed)
                    ins.append(x if inputs is None else inputs.change(layer, x))
                    outs.append(changed)
                    assert torch.equal(x, before)
                    assert torch.equal(whole[:, :1], y[:, :1])
                    assert torch.equal(whole[:, -4:], y[:, -4:])
                torch.testing.assert_close(*ins, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-4)
                # Nothing of anybody reaches the base.
                assert torch.equal(outs[0][bases], y[:, 1:-4][bases])
                assert torch.equal(ins[0][bases], x[bases])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.none() | st.sampled_from(KINDS), st.integers(0, 99)),
        max_size=8,
    )
)
def test_slots_that_come_and_go_equal_the_plain_twin(events: list[tuple[int, str | None, int]]) -> None:
    pair = Pair()
    for slot, kind, seed in events:
        if kind is None:
            pair.unload(slot)
        else:
            pair.load(slot, kind, seed)
    pair.check()


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_too_large_to_copy_for_each_token_are_used_where_they_are(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair()
    for slot in range(SLOTS):
        pair.load(slot, kind, slot)
    pair.check()
    monkeypatch.setattr(structured, "MAX_GATHERED", 0)
    pair.check()


def test_memory_is_given_back() -> None:
    pair = Pair()
    pair.load(3, "turn 4", 1)
    pair.load(5, "kron 2", 1)
    whole = pair.fast.size_bytes
    pair.unload(3)
    assert 0 < pair.fast.size_bytes < whole
    pair.unload(5)
    assert pair.fast.size_bytes == 0


@pytest.mark.parametrize("slots", [[], [-1, -1], [2]])
def test_a_step_without_such_adapters_has_no_part(slots: list[int]) -> None:
    pair = Pair()
    pair.load(0, "kron 2", 1)
    load(pair.fast, 2, [], modules("kron 2", 1)[1].__getitem__, LAYERS)
    tokens = StepTokens(tuple(Segment(slot, place, place + 1) for place, slot in enumerate(slots)))
    assert not pair.fast.plan(tokens)
    assert not pair.fast.plan_inputs(tokens)


def test_a_step_knows_its_sites_before_their_layers_are_there() -> None:
    pair = Pair()
    found, tensors = modules("turn 8 scaled", 1)
    pair.fast.reserve(4, found)
    tokens = StepTokens((Segment(4, 0, 3),))
    plan, inputs = pair.fast.plan(tokens), pair.fast.plan_inputs(tokens)
    pair.fast.unload(5)
    for layer in range(LAYERS):
        here = [module for module in found if module.layer == layer]
        pair.fast.load_layer(4, layer, here, tensors.__getitem__)
    x, y = torch.randn(3, 16), torch.randn(3, 16)
    before = y.clone()
    assert not torch.equal(inputs["o"].change(1, x), x)
    plan["o"].apply(1, x, y)
    assert not torch.equal(y, before)


def test_a_row_scale_needs_the_bases_biases() -> None:
    op = Structured(SITES, torch.float32, CPU)
    found, _ = modules("turn 8 scaled", 1)
    with pytest.raises(MeshError, match="a BOFT needs the base's own weights") as caught:
        op.reserve(0, found)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


def test_a_factor_of_a_butterfly_brings_halves_of_blocks_together_that_were_apart() -> None:
    assert butterfly(8, 4, 0).tolist() == list(range(8))
    assert butterfly(8, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert butterfly(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
