"""Low-rank ops of many adapters in the layout of the native kernels.

An adapter has one piece of memory, as large as its true ranks need: layer by layer, site by site A
[rank, in], B [panels, rank, panel] and the scales [rank]. A table [sites, layers] says where each of them is.
A step has one table for each token, so a switch is a pointer and never a copy, and nothing is shared between
slots.

Source of the formula: LoRA (arXiv:2106.09685); of the gather by token: Punica (arXiv:2310.18547), section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.worker.engine.native.library import Adapters, Kernels
from adaptermesh.worker.engine.native.memory import page_memory
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader

_LINE = 16
"""Floats of a cache line: where each tensor begins."""

_Longs = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter: its memory, and the table of the kernels' `Rows`, [sites, layers, 4].

    The table has no rows for a layer that is not loaded. `starts`: where each site's part of a layer begins.
    """

    memory: torch.Tensor
    table: _Longs
    max_rank: int
    used: int
    starts: Mapping[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The adapters of one step: what the kernels take, and the memory that it points to."""

    adapters: Adapters
    held: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class SiteRows:
    """One site's share of a step, for a forward that is not the kernels' own."""

    site: Site
    place: int
    layers: int
    step: StepRows
    kernels: Kernels

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        self.kernels.add_lowrank(self.step.adapters, self.place * self.layers + layer, x, y)


class NativeLowRank:
    """The low-rank ops of all slots."""

    def __init__(self, sites: SiteMap, kernels: Kernels) -> None:
        self._sites = {site.name: (place, site) for place, site in enumerate(sites.sites)}
        self._layers = sites.num_layers
        self._kernels = kernels
        self._slots: dict[int, AdapterRows] = {}
        self._spare: torch.Tensor | None = None

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        if not modules:
            return
        ordered = sorted(modules, key=lambda module: (module.layer, self._sites[module.site][0]))
        starts: dict[tuple[str, int], int] = {}
        size = 0
        for module in ordered:
            starts[module.site, module.layer] = size
            size += self._size(module)
        table = np.zeros((len(self._sites), self._layers, 4), np.int64)
        used = sum(1 << place for place in {self._sites[module.site][0] for module in modules})
        most = max(module.rank for module in modules)
        self._slots[slot] = AdapterRows(self._take(size), table, most, used, starts)

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            rows = self._slots[slot]
            start = rows.starts[module.site, layer]
            memory = rows.memory[start : start + self._size(module)]
            rows.table[self._sites[module.site][0], layer] = self._fill(memory, module, read)

    def unload(self, slot: int) -> None:
        rows = self._slots.pop(slot, None)
        if rows is not None:
            # The next adapter most often has the same shape: memory that was touched before is filled sooner.
            self._spare = rows.memory

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        step = self.rows_of(tokens)
        return {
            name: SiteRows(site, place, self._layers, step, self._kernels)
            for name, (place, site) in self._sites.items()
            if step.adapters.used >> place & 1
        }

    def rows_of(self, tokens: StepTokens) -> StepRows:
        """Which table each token has. Built once a step, shared by all sites and layers."""
        count = tokens.segments[-1].end
        tables = np.zeros(count, np.int64)
        held: list[object] = [tables]
        most, used = 0, 0
        for segment in tokens.segments:
            rows = self._slots.get(segment.slot)
            if rows is not None:
                tables[segment.start : segment.end] = rows.table.ctypes.data
                held.append(rows)
                most, used = max(most, rows.max_rank), used | rows.used
        inner = torch.empty(len(self._sites) * count * most)
        held.append(inner)
        adapters = Adapters(tables=tables.ctypes.data, inner=inner.data_ptr(), max_rank=most, used=used)
        return StepRows(adapters, tuple(held))

    @property
    def size_bytes(self) -> int:
        return sum(rows.memory.numel() * 4 for rows in self._slots.values())

    def _take(self, floats: int) -> torch.Tensor:
        spare, self._spare = self._spare, None
        if spare is not None and len(spare) == floats:
            return spare
        return page_memory(floats * 4).view(torch.float32)

    def _parts(self, module: ModuleOp) -> tuple[int, int, int]:
        """Floats of A, B and the scales, each filled up to whole cache lines."""
        site, rank = self._sites[module.site][1], module.rank
        padded = self._kernels.panels(site.out_features) * self._kernels.panel
        return _lines(rank * site.in_features), _lines(rank * padded), _lines(rank)

    def _size(self, module: ModuleOp) -> int:
        return sum(self._parts(module))

    def _fill(self, memory: torch.Tensor, module: ModuleOp, read: TensorReader) -> tuple[int, int, int, int]:
        """Copies one module; gives its `Rows`."""
        in_a, in_b, _ = self._parts(module)
        site, rank = self._sites[module.site][1], module.rank
        a, b, scales = memory[:in_a], memory[in_a : in_a + in_b], memory[in_a + in_b :]
        a[: rank * site.in_features].view(rank, -1).copy_(read(module.tensors["A"]))
        self._kernels.pack_b(read(module.tensors["B"]), b)
        # Kept apart from B, so that a request's weights stay exact.
        scales[:rank] = module.scale
        return a.data_ptr(), b.data_ptr(), scales.data_ptr(), rank


def _lines(floats: int) -> int:
    return -(-floats // _LINE) * _LINE
