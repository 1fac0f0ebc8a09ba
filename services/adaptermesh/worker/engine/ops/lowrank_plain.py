"""The plain twin of `lowrank`: one adapter after the other, straight from the formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader


@dataclass(frozen=True, slots=True)
class _Module:
    a: torch.Tensor
    b: torch.Tensor
    scale: float


class PlainLowRank:
    """`y += s * B (A x)` for each segment. Keeps each tensor as it came, in the computing dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, dict[tuple[str, int], _Module]] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:  # noqa: ARG002 (it has no arena)
        self._slots[slot] = {}

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            self._slots[slot][module.site, layer] = _Module(
                read(module.tensors["A"]).to(self._device, self._dtype, copy=True),
                read(module.tensors["B"]).to(self._device, self._dtype, copy=True),
                module.scale,
            )

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        sites = {site for slot in tokens.active_slots for site, _ in self._slots[slot]}
        return {site: _PlainSitePlan(site, tokens, self._slots) for site in sites}

    @property
    def size_bytes(self) -> int:
        return sum(
            (module.a.numel() + module.b.numel()) * module.a.element_size()
            for modules in self._slots.values()
            for module in modules.values()
        )


@dataclass(frozen=True, slots=True)
class _PlainSitePlan:
    site: str
    tokens: StepTokens
    slots: Mapping[int, Mapping[tuple[str, int], _Module]]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for segment in self.tokens.segments:
            if segment.slot < 0:
                continue
            module = self.slots[segment.slot].get((self.site, layer))
            if module is not None:
                part = x[segment.start : segment.end]
                y[segment.start : segment.end] += module.scale * ((part @ module.a.T) @ module.b.T)
