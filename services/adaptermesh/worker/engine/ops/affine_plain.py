"""The plain twin of `affine`: one adapter after the other, straight from the formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader

_Factors = dict[tuple[str, int, str], torch.Tensor]
"""By site, layer and slot of the op: [width]."""


class PlainAffine:
    """`y = out_scale * (W (in_scale * x) + b)` for each segment."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, _Factors] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:  # noqa: ARG002 (it has no arena)
        self._slots[slot] = {}

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            for name, tensor in module.tensors.items():
                self._slots[slot][module.site, layer, name] = read(tensor).to(
                    self._device, self._dtype, copy=True
                )

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return {
            site: _PlainAffinePlan(site, "out_scale", tokens, self._slots)
            for site in self._sites(tokens, "out_scale")
        }

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        return {
            site: _PlainAffinePlan(site, "in_scale", tokens, self._slots)
            for site in self._sites(tokens, "in_scale")
        }

    @property
    def size_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for factors in self._slots.values()
            for tensor in factors.values()
        )

    def _sites(self, tokens: StepTokens, name: str) -> set[str]:
        return {
            site
            for slot in tokens.active_slots
            for site, _, found in self._slots.get(slot, ())
            if found == name
        }


@dataclass(frozen=True, slots=True)
class _PlainAffinePlan:
    site: str
    name: str
    tokens: StepTokens
    slots: Mapping[int, _Factors]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: ARG002 (a SitePlan's)
        for segment in self.tokens.segments:
            factor = self.slots.get(segment.slot, {}).get((self.site, layer, self.name))
            if factor is not None:
                y[segment.start : segment.end] *= factor

    def scale(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        scaled = x.clone()
        self.apply(layer, x, scaled)
        return scaled
