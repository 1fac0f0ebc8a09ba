"""Replaced modules of many slots, against the formulas."""

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.core.errors import MeshError
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.ops.replaced import Replaced
from tests.unit.worker.engine.ops.loading import NoWeights, load
from tests.unit.worker.engine.ops.test_affine import CPU, LAYERS, SITES

GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {
    site.name: torch.randn(site.out_features, site.in_features, generator=GENERATOR) for site in SITES.sites
}
BIAS = {site.name: torch.randn(site.out_features, generator=GENERATOR) for site in SITES.sites}
NORMS = {
    norm: torch.rand(SITES.hidden_size, generator=GENERATOR) + 0.5 for norm in ("attention_norm", "ffn_norm")
}
NORM_BIAS = torch.randn(SITES.hidden_size, generator=GENERATOR)
SLOTS = [-1, 0, 1, -1, 0]
TOKENS = StepTokens(tuple(Segment(slot, 2 * place, 2 * place + 2) for place, slot in enumerate(SLOTS)))


class Weights(NoWeights):
    """A base whose products have biases in the first layer, and so do its norms."""

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        return None if layer else BIAS[site.name]

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return NORMS[site], None if layer else NORM_BIAS


def module(
    site: str, layer: int, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> tuple[ModuleOp, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    names = {slot: f"L{layer}.{site}.{slot}" for slot in shapes}
    tensors = {names[slot]: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
    return ModuleOp(site, layer, "replace", 0, 1.0, names), tensors


@pytest.mark.parametrize("site", SITES.sites, ids=lambda site: site.name)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("slots", [("weight",), ("bias",), ("weight", "bias")])
def test_a_product_is_the_adapters_own_for_its_rows_alone(
    site: Site, layer: int, slots: tuple[str, ...]
) -> None:
    op = Replaced(SITES, torch.float32, CPU, Weights())
    shapes = {"weight": (site.out_features, site.in_features), "bias": (site.out_features,)}
    own, tensors = module(site.name, layer, {slot: shapes[slot] for slot in slots}, 3)
    load(op, 0, [own], tensors.__getitem__, LAYERS)
    base_bias = Weights().bias(site, layer)
    x = torch.randn(2 * len(SLOTS), site.in_features, generator=torch.Generator().manual_seed(1))
    before = f.linear(x, WEIGHTS[site.name], base_bias)
    y = before.clone()
    plans = op.plan(TOKENS)
    assert set(plans) == {site.name}
    plans[site.name].apply(layer, x, y)
    expected = f.linear(
        x,
        tensors.get(f"L{layer}.{site.name}.weight", WEIGHTS[site.name]),
        tensors.get(f"L{layer}.{site.name}.bias", base_bias),
    )
    rows = [2, 3, 8, 9]
    others = [row for row in range(len(y)) if row not in rows]
    torch.testing.assert_close(y[rows], expected[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(y[others], before[others])
    other = y.clone()
    plans[site.name].apply(1 - layer, x, other)
    assert torch.equal(other, y)
    op.unload(0)
    assert op.size_bytes == 0


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("slots", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize(
    ("norm", "sites"), [("attention_norm", {"q", "k", "v"}), ("ffn_norm", {"gate", "up"})]
)
def test_a_norm_is_the_adapters_own_for_what_reads_it(
    norm: str, sites: set[str], layer: int, slots: tuple[str, ...]
) -> None:
    op = Replaced(SITES, torch.float32, CPU, Weights())
    own, tensors = module(norm, layer, dict.fromkeys(slots, (SITES.hidden_size,)), 4)
    load(op, 0, [own], tensors.__getitem__, LAYERS)
    weight, bias = Weights().norm(norm, layer)
    assert weight is not None
    n = torch.randn(2 * len(SLOTS), SITES.hidden_size, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(SITES.hidden_size)
    x = n * weight + (zero if bias is None else bias)
    expected = n * tensors.get(f"L{layer}.{norm}.weight", weight) + tensors.get(
        f"L{layer}.{norm}.bias", zero if bias is None else bias
    )
    plans = op.plan_inputs(TOKENS)
    assert set(plans) == sites
    assert not op.plan(TOKENS)
    before = x.clone()
    for plan in plans.values():
        found = plan.change(layer, x)
        rows = [2, 3, 8, 9]
        others = [row for row in range(len(x)) if row not in rows]
        torch.testing.assert_close(found[rows], expected[rows], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[others], x[others])
    assert torch.equal(x, before)


def test_a_base_in_8_bits_refuses_modules_of_an_adapters_own() -> None:
    op = Replaced(SITES, torch.float32, CPU, None)
    own, tensors = module("q", 0, {"bias": (SITES.sites[0].out_features,)}, 3)
    with pytest.raises(MeshError, match="an adapter with modules of its own needs the base's own weights"):
        load(op, 0, [own], tensors.__getitem__, LAYERS)
