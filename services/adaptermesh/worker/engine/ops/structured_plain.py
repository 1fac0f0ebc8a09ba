"""The plain twin of `structured`: one adapter after the other, with whole matrices, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentOp


@dataclass(frozen=True, slots=True)
class _Module:
    """One site and layer: added [out, in], turn [in, in], factors and shift [out]; None: nothing of that."""

    added: torch.Tensor | None = None
    turn: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [one for one in (self.added, self.turn, self.factors, self.shift) if one is not None]


class PlainStructured(SegmentOp[_Module]):
    """`y = row_scale * W (x R) + b + scale * kron(w1, w2) x` for each segment; see `Structured`."""

    input_place = 2

    def __init__(self, sites: SiteMap, weights: BaseWeights | None = None) -> None:
        super().__init__()
        self._by_name = {site.name: site for site in sites.sites}
        self._weights = weights

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            site = self._by_name[module.site]
            given = {name: read(tensor).double() for name, tensor in module.tensors.items()}
            self.hold(slot, site.name, layer, self._module(site, layer, module.scale, given))

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        acting = self.sites(tokens, lambda module: module.added is not None or module.factors is not None)
        return {site: _PlainPlan(self, site, tokens) for site in acting}

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        acting = self.sites(tokens, lambda module: module.turn is not None)
        return {site: _PlainPlan(self, site, tokens) for site in acting}

    def _module(self, site: Site, layer: int, scale: float, given: Mapping[str, torch.Tensor]) -> _Module:
        if "w1" in given:
            whole = torch.kron(given["w1"], given["w2"])
            skip = site.out_offset % len(given["w2"])
            return _Module(added=scale * whole[skip : skip + site.out_features])
        factors, shift = given.get("row_scale"), None
        if factors is not None:
            bias = need_weights(self._weights, "a BOFT").bias(site, layer)
            shift = None if bias is None else (1.0 - factors) * bias.double()
        return _Module(turn=_dense(given["R"], site.in_features), factors=factors, shift=shift)


@dataclass(frozen=True, slots=True)
class _PlainPlan:
    op: PlainStructured
    site: str
    tokens: StepTokens

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for rows, module in self.op.parts(self.tokens, self.site, layer):
            out = y[rows]
            if module.factors is not None:
                out.copy_(out.double() * module.factors)
            if module.shift is not None:
                out.copy_(out.double() + module.shift)
            if module.added is not None:
                out.copy_(out.double() + x[rows].double() @ module.added.T)

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        turned = x.clone()
        for rows, module in self.op.parts(self.tokens, self.site, layer):
            if module.turn is not None:
                turned[rows] = (x[rows].double() @ module.turn).to(x.dtype)
        return turned


def _dense(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """The product of all factors as one matrix: [width, width]. blocks: [factors, count or 1, b, b]."""
    factors, count, block, _ = blocks.shape
    total = torch.eye(width, dtype=blocks.dtype)
    for factor in reversed(range(factors)):
        matrix = torch.block_diag(*(blocks[factor, place % count] for place in range(width // block)))
        total = total @ (_moved(matrix, block, 2**factor) if factor else matrix)
    return total


def _moved(matrix: torch.Tensor, block: int, group: int) -> torch.Tensor:
    """The matrix for inputs of which, in each group of blocks, it sees the even halves of blocks first."""
    half = block // 2
    places: list[int] = []
    for start in range(0, len(matrix), group * block):
        for parity in (0, 1):
            for pair in range(group):
                first = start + (2 * pair + parity) * half
                places.extend(range(first, first + half))
    swap = torch.zeros_like(matrix)
    swap[torch.arange(len(matrix)), torch.tensor(places)] = 1.0
    return swap @ matrix @ swap.T
