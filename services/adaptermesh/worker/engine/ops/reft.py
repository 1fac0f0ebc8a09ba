"""Interventions on the stream after a layer, at the ends of a prompt.

One adapter after the other: most steps have none, since they act on no generated token. Positions count on
the prompt, so a prompt that is computed in pieces or found in the prefix cache comes out the same.

Source of the formula: LoReFT and DiReFT (arXiv:2404.03592), section 3.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.bottleneck import ACTIVATIONS
from adaptermesh.worker.engine.ops.op import BlockPlan, SitePlan, StepTokens, TensorReader


@dataclass(frozen=True, slots=True)
class _Unit:
    """r, w: [rank, hidden]. b: [rank]."""

    r: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    activation: str
    subtract: bool

    def term(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden] -> the same shape."""
        found = ACTIVATIONS[self.activation](f.linear(x, self.w, self.b))
        if self.subtract:
            found = found - x @ self.r.T
        return found @ self.r


@dataclass(frozen=True, slots=True)
class _Adapter:
    """`prefix` and `suffix` count tokens; `units` by layer are for these ends, and may be the same."""

    prefix: int
    suffix: int
    units: dict[int, tuple[_Unit | None, _Unit | None]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some tokens of one adapter: their places in the step, and which end of the prompt they are at."""

    slot: int
    end: int
    places: torch.Tensor


class Reft:
    """The interventions of all slots."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, _Adapter] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        if modules:
            options = modules[0].options or {}
            self._slots[slot] = _Adapter(int(options["prefix"]), int(options["suffix"]), {})

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            first, last = self._unit(module, "", read), self._unit(module, "_suffix", read)
            self._slots[slot].units[layer] = first, last or first

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (it has no part at a site)
        return {}

    def plan_blocks(self, tokens: StepTokens) -> Mapping[str, BlockPlan]:
        parts = list(self._parts(tokens))
        return {"ffn": _Plan(parts, self._slots)} if parts else {}

    @property
    def size_bytes(self) -> int:
        found = 0
        for adapter in self._slots.values():
            for pair in adapter.units.values():
                units = {id(unit): unit for unit in pair if unit is not None}
                tensors = (part for unit in units.values() for part in (unit.r, unit.w, unit.b))
                found += sum(part.numel() * part.element_size() for part in tensors)
        return found

    def _unit(self, module: ModuleOp, end: str, read: TensorReader) -> _Unit | None:
        if f"R{end}" not in module.tensors:
            return None
        r, w, b = (
            read(module.tensors[f"{slot}{end}"]).to(self._device, self._dtype, copy=True) for slot in "RWb"
        )
        options = module.options or {}
        return _Unit(r, w, b, options["activation"], options["subtract"] == "yes")

    def _parts(self, tokens: StepTokens) -> Iterator[_Part]:
        for segment in tokens.segments:
            adapter = self._slots.get(segment.slot)
            if adapter is None:
                continue
            ends: tuple[list[int], list[int]] = ([], [])
            for row in tokens.rows:
                if segment.start <= row.start < segment.end:
                    parts = _places(row.past, row.past + row.end - row.start, row.prompt, adapter)
                    for places, part in zip(ends, parts, strict=True):
                        places.extend(row.start + token - row.past for token in part)
            for end, places in enumerate(ends):
                if places:
                    yield _Part(segment.slot, end, torch.tensor(places, device=self._device))


def _places(first: int, last: int, prompt: int, adapter: _Adapter) -> tuple[range, range]:
    """The tokens of [first, last) at the beginning and the end of a prompt; one at both is at the end."""
    start = max(0, prompt - adapter.suffix)
    return range(first, min(last, adapter.prefix, start)), range(max(first, start), min(last, prompt))


@dataclass(frozen=True, slots=True)
class _Plan:
    parts: Sequence[_Part]
    slots: Mapping[int, _Adapter]

    def term(
        self,
        layer: int,
        residual: torch.Tensor,  # noqa: ARG002 (a BlockPlan's)
        output: torch.Tensor,
        stream: torch.Tensor,
    ) -> torch.Tensor:
        found = torch.zeros_like(output)
        for part in self.parts:
            unit = self.slots[part.slot].units.get(layer, (None, None))[part.end]
            if unit is not None:
                x = stream.index_select(0, part.places)
                found.index_copy_(0, part.places, unit.term(x))
        return found
