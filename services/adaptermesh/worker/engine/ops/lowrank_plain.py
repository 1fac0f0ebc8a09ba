"""The plain twin of `lowrank`: one adapter after the other, straight from the formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentOp


@dataclass(frozen=True, slots=True)
class _Module:
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.a, self.b


class PlainLowRank(SegmentOp[_Module]):
    """`y += s * B (A x)` for each segment. Keeps each tensor as it came, in the computing dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._dtype = dtype
        self._device = device

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            a, b = (
                read(module.tensors[name]).to(self._device, self._dtype, copy=True) for name in ("A", "B")
            )
            self.hold(slot, module.site, layer, _Module(a, b, module.scale))

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return {site: _PlainSitePlan(self, site, tokens) for site in self.sites(tokens)}


@dataclass(frozen=True, slots=True)
class _PlainSitePlan:
    op: PlainLowRank
    site: str
    tokens: StepTokens

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for rows, module in self.op.parts(self.tokens, self.site, layer):
            y[rows] += module.scale * ((x[rows] @ module.a.T) @ module.b.T)
