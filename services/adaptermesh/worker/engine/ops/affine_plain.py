"""The plain twin of `affine`: one adapter after the other, straight from the formula."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader


@dataclass(frozen=True, slots=True)
class _Module:
    """Vectors of one site and layer: [in], [out], [out]; None where nothing changes."""

    inputs: torch.Tensor | None
    outputs: torch.Tensor | None
    shift: torch.Tensor | None


_Modules = dict[tuple[str, int], _Module]


class PlainAffine:
    """`y = out (W (in * x) + b + low rank) + shift` for each segment; see `Affine`."""

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
            given = {name: read(tensor) for name, tensor in module.tensors.items()}
            outputs, shift = given.get("out_scale"), given.get("bias_delta")
            if shift is not None:
                shift = module.scale * shift.float()
            if "magnitude" in given:
                outputs, shift = self._direction(module, layer, given["magnitude"], read)
            found = (given.get("in_scale"), outputs, shift)
            self._slots[slot][module.site, layer] = _Module(
                *(None if one is None else one.to(self._device, self._dtype, copy=True) for one in found)
            )

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return self._plans(tokens, lambda module: module.outputs is not None or module.shift is not None)

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        return self._plans(tokens, lambda module: module.inputs is not None)

    @property
    def size_bytes(self) -> int:
        return sum(
            one.numel() * one.element_size()
            for modules in self._slots.values()
            for module in modules.values()
            for one in (module.inputs, module.outputs, module.shift)
            if one is not None
        )

    def _direction(
        self, module: ModuleOp, layer: int, magnitude: torch.Tensor, read: TensorReader
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """G = m / |W + s B A|, and what keeps it off the bias."""
        site, weights = self._sites[module.site], need_weights(self._weights)
        a, b = (read(f"L{layer}.{site.name}.{slot}").float() for slot in ("A", "B"))
        matrix = weights.project(site, layer, torch.eye(site.in_features)).double()
        norms = (matrix + module.scale * b.double() @ a.double()).norm(dim=1)
        factors = (magnitude.double() / norms).float()
        bias = weights.bias(site, layer)
        return factors, None if bias is None else (1.0 - factors) * bias

    def _plans(self, tokens: StepTokens, acts: Callable[[_Module], bool]) -> dict[str, "_PlainPlan"]:
        modules = [one for slot in tokens.active_slots for one in self._slots.get(slot, {}).items()]
        sites = {site for (site, _), module in modules if acts(module)}
        return {site: _PlainPlan(site, tokens, self._slots) for site in sites}


@dataclass(frozen=True, slots=True)
class _PlainPlan:
    site: str
    tokens: StepTokens
    slots: Mapping[int, _Modules]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: ARG002 (a SitePlan's)
        for segment in self.tokens.segments:
            module = self.slots.get(segment.slot, {}).get((self.site, layer))
            if module is None:
                continue
            if module.outputs is not None:
                y[segment.start : segment.end] *= module.outputs
            if module.shift is not None:
                y[segment.start : segment.end] += module.shift

    def scale(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        scaled = x.clone()
        for segment in self.tokens.segments:
            module = self.slots.get(segment.slot, {}).get((self.site, layer))
            if module is not None and module.inputs is not None:
                scaled[segment.start : segment.end] *= module.inputs
        return scaled
