"""The plain twin of `structured`: one adapter after the other, with whole matrices, in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader


@dataclass(frozen=True, slots=True)
class _Module:
    """One site and layer: added [out, in], turn [in, in], factors and shift [out]; None: nothing of that."""

    added: torch.Tensor | None = None
    turn: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    shift: torch.Tensor | None = None


_Modules = dict[tuple[str, int], _Module]


class PlainStructured:
    """`y = row_scale * W (x R) + b + scale * kron(w1, w2) x` for each segment; see `Structured`."""

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None = None
    ) -> None:
        self._sites = {site.name: site for site in sites.sites}
        self._dtype = dtype
        self._device = device
        self._weights = weights
        self._slots: dict[int, _Modules] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:  # noqa: ARG002 (it has no arena)
        self._slots[slot] = {}

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            site = self._sites[module.site]
            given = {name: read(tensor).double() for name, tensor in module.tensors.items()}
            self._slots[slot][site.name, layer] = self._module(site, layer, module.scale, given)

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return self._plans(tokens, lambda module: module.added is not None or module.factors is not None)

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        return self._plans(tokens, lambda module: module.turn is not None)

    @property
    def size_bytes(self) -> int:
        return sum(
            one.nbytes
            for modules in self._slots.values()
            for module in modules.values()
            for one in (module.added, module.turn, module.factors, module.shift)
            if one is not None
        )

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

    def _plans(self, tokens: StepTokens, acts: Callable[[_Module], bool]) -> dict[str, "_PlainPlan"]:
        modules = [one for slot in tokens.active_slots for one in self._slots.get(slot, {}).items()]
        sites = {site for (site, _), module in modules if acts(module)}
        return {site: _PlainPlan(site, tokens, self._slots) for site in sites}


@dataclass(frozen=True, slots=True)
class _PlainPlan:
    site: str
    tokens: StepTokens
    slots: Mapping[int, _Modules]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for segment in self.tokens.segments:
            module = self.slots.get(segment.slot, {}).get((self.site, layer), _Module())
            out = y[segment.start : segment.end]
            if module.factors is not None:
                out.copy_(out.double() * module.factors)
            if module.shift is not None:
                out.copy_(out.double() + module.shift)
            if module.added is not None:
                out.copy_(out.double() + x[segment.start : segment.end].double() @ module.added.T)

    def scale(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        turned = x.clone()
        for segment in self.tokens.segments:
            module = self.slots.get(segment.slot, {}).get((self.site, layer), _Module())
            if module.turn is not None:
                turned[segment.start : segment.end] = (
                    x[segment.start : segment.end].double() @ module.turn
                ).to(x.dtype)
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
