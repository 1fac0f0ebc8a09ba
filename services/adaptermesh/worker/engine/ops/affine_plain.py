"""The plain twin of `affine`: one adapter after the other, straight from the formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentOp


@dataclass(frozen=True, slots=True)
class _Module:
    """Vectors of one site and layer: [in], [out], [out]; None where nothing changes."""

    inputs: torch.Tensor | None
    outputs: torch.Tensor | None
    shift: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [one for one in (self.inputs, self.outputs, self.shift) if one is not None]


class PlainAffine(SegmentOp[_Module]):
    """`y = out (W (in * x) + b + low rank) + shift` for each segment; see `Affine`."""

    input_place = 1

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None = None
    ) -> None:
        super().__init__()
        self._by_name = {site.name: site for site in sites.sites}
        self._dtype = dtype
        self._device = device
        self._weights = weights

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            given = {name: read(tensor) for name, tensor in module.tensors.items()}
            outputs, shift = given.get("out_scale"), given.get("bias_delta")
            if shift is not None:
                shift = module.scale * shift.float()
            if "magnitude" in given:
                outputs, shift = self._direction(module, layer, given["magnitude"], read)
            found = (given.get("in_scale"), outputs, shift)
            held = (None if one is None else one.to(self._device, self._dtype, copy=True) for one in found)
            self.hold(slot, module.site, layer, _Module(*held))

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        acting = self.sites(tokens, lambda module: module.outputs is not None or module.shift is not None)
        return {site: _PlainPlan(self, site, tokens) for site in acting}

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        acting = self.sites(tokens, lambda module: module.inputs is not None)
        return {site: _PlainPlan(self, site, tokens) for site in acting}

    def _direction(
        self, module: ModuleOp, layer: int, magnitude: torch.Tensor, read: TensorReader
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """G = m / |W + s B A|, and what keeps it off the bias."""
        site, weights = self._by_name[module.site], need_weights(self._weights)
        a, b = (read(f"L{layer}.{site.name}.{slot}").float() for slot in ("A", "B"))
        matrix = weights.project(site, layer, torch.eye(site.in_features)).double()
        norms = (matrix + module.scale * b.double() @ a.double()).norm(dim=1)
        factors = (magnitude.double() / norms).float()
        bias = weights.bias(site, layer)
        return factors, None if bias is None else (1.0 - factors) * bias


@dataclass(frozen=True, slots=True)
class _PlainPlan:
    op: PlainAffine
    site: str
    tokens: StepTokens

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: ARG002 (a SitePlan's)
        for rows, module in self.op.parts(self.tokens, self.site, layer):
            if module.outputs is not None:
                y[rows] *= module.outputs
            if module.shift is not None:
                y[rows] += module.shift

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        scaled = x.clone()
        for rows, module in self.op.parts(self.tokens, self.site, layer):
            if module.inputs is not None:
                scaled[rows] *= module.inputs
        return scaled
