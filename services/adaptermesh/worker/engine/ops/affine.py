"""Factors of many adapters for what goes into a site and what comes out of it.

All factors of one site are one tensor [rows, layers, width]: a token finds its adapter's row by its
slot, and row 0 holds ones, for tokens that have none. So a step is one gather and one product a site,
whatever the adapters, and the kernels get there by an address and a stride.

Source of the formula: IA3 (arXiv:2205.05638), section 3.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.worker.engine.native.library import SITES, Factors, Scales
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.upload import to_device

_Key = tuple[str, str]
"""A site, and `in_scale` or `out_scale`."""


class Affine:
    """`y = out_scale * (W (in_scale * x) + b)`: the factors of all slots."""

    def __init__(self, sites: SiteMap, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = sites.num_layers
        self._widths: dict[_Key, int] = {}
        for site in sites.sites:
            self._widths[site.name, "in_scale"] = site.in_features
            self._widths[site.name, "out_scale"] = site.out_features
        self._dtype = dtype
        self._device = device
        self._arenas: dict[_Key, torch.Tensor] = {}
        self._held_rows = 0
        self._slots: dict[int, frozenset[_Key]] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        keys = frozenset((module.site, name) for module in modules for name in module.tensors)
        if not keys:
            return
        self._make_room(slot, keys)
        self._slots[slot] = keys

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            for name, tensor in module.tensors.items():
                self._arenas[module.site, name][slot + 1, layer].copy_(read(tensor), non_blocking=True)

    def unload(self, slot: int) -> None:
        for key in self._slots.pop(slot, ()):
            if any(key in keys for keys in self._slots.values()):
                self._arenas[key][slot + 1].fill_(1.0)
            else:
                del self._arenas[key]

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return self._plans(tokens, "out_scale")

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        return self._plans(tokens, "in_scale")

    def scales_of(self, tokens: StepTokens) -> tuple[Scales, object] | None:
        """The step as the kernels take it, and what that points to; None if no token has factors."""
        keys = self._keys(tokens)
        if not keys:
            return None
        rows = self._rows(tokens)
        found = Scales(rows=rows.ctypes.data)
        for place, site in enumerate(SITES):
            for name, factors in (("in_scale", found.inputs), ("out_scale", found.outputs)):
                if (site, name) in keys:
                    arena = self._arenas[site, name]
                    factors[place] = Factors(arena.data_ptr(), arena.stride(0), arena.stride(1))
        return found, (rows, *self._arenas.values())

    @property
    def size_bytes(self) -> int:
        return sum(arena.numel() * arena.element_size() for arena in self._arenas.values())

    def _plans(self, tokens: StepTokens, name: str) -> dict[str, "_AffinePlan"]:
        sites = [site for site, found in self._keys(tokens) if found == name]
        if not sites:
            return {}
        rows = to_device(torch.from_numpy(self._rows(tokens)), self._device)
        return {site: _AffinePlan(self._arenas[site, name], rows) for site in sites}

    def _keys(self, tokens: StepTokens) -> set[_Key]:
        return {key for slot in tokens.active_slots for key in self._slots.get(slot, ())}

    def _rows(self, tokens: StepTokens) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """[tokens]: the row of each one's factors."""
        rows = np.zeros(tokens.segments[-1].end, np.int32)
        for segment in tokens.segments:
            if segment.slot in self._slots:
                rows[segment.start : segment.end] = segment.slot + 1
        return rows

    def _make_room(self, slot: int, keys: frozenset[_Key]) -> None:
        """Grows by doubling, so that slots that are never used cost little.

        All arenas have the same rows: a token has one row, whichever sites its adapter has factors for.
        """
        if slot + 1 >= self._held_rows:
            self._held_rows = max(slot + 2, 2 * self._held_rows)
        for key in keys | self._arenas.keys():
            arena = self._arenas.get(key)
            if arena is not None and len(arena) == self._held_rows:
                continue
            shape = (self._held_rows, self._layers, self._widths[key])
            larger = torch.ones(shape, dtype=self._dtype, device=self._device)
            if arena is not None:
                larger[: len(arena)] = arena
            self._arenas[key] = larger


@dataclass(frozen=True, slots=True)
class _AffinePlan:
    """One site's part of a step. arena: [rows, layers, width]. rows: [tokens]."""

    arena: torch.Tensor
    rows: torch.Tensor

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: ARG002 (a SitePlan's)
        y.mul_(self._factors(layer))

    def scale(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return x * self._factors(layer)

    def _factors(self, layer: int) -> torch.Tensor:
        return self.arena[:, layer].index_select(0, self.rows)
