"""Low-rank ops of many adapters in the layout of the native kernels.

An adapter has one piece of memory, as large as its true ranks need: layer by layer, site by site A
[rank, in], B [panels, rank, panel] and the scales [rank]. A table [sites, layers] says where each of them is.
A step has one table for each token, so a switch is a pointer and never a copy, and nothing is shared between
slots.

Source of the formula: LoRA (arXiv:2106.09685); of the gather by token: Punica (arXiv:2310.18547), section 4.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.worker.engine.native.library import LOAD, Adapters, Kernels, Loads
from adaptermesh.worker.engine.native.memory import page_memory
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.token_tables import TokenTables, token_tables

_LINE = 16
"""Floats of a cache line: where each tensor begins."""

_Longs = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter: its memory, and the table of the kernels' `Rows`, [sites, layers, 4].

    The table has no rows for a layer that is not loaded. `modules`, by layer, and their `loads` are in one
    order; `layer_ends` says where in it each layer ends.
    """

    memory: torch.Tensor
    table: _Longs
    widest: int
    used: int
    modules: Sequence[ModuleOp]
    loads: Loads
    layer_ends: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The adapters of one step: what the kernels take, and the memory that it points to."""

    adapters: Adapters
    held: TokenTables


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
        loads = np.zeros(len(ordered), LOAD)
        sites = [self._sites[module.site][1] for module in ordered]
        loads["inputs"] = [site.in_features for site in sites]
        loads["outputs"] = [site.out_features for site in sites]
        loads["rank"] = [module.rank for module in ordered]
        # Kept apart from B, so that a request's weights stay exact.
        loads["scale"] = [module.scale for module in ordered]
        memory = self._lay_out(loads)
        table = np.zeros((len(self._sites), self._layers, 4), np.int64)
        used = sum(1 << place for place in {self._sites[module.site][0] for module in modules})
        layers = [module.layer for module in ordered]
        ends = [bisect_right(layers, layer) for layer in range(self._layers)]
        most = int(loads["rank"].max())
        self._slots[slot] = AdapterRows(memory, table, most, used, ordered, loads, ends)

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        if not modules:
            return
        rows = self._slots[slot]
        start, end = rows.layer_ends[layer - 1] if layer else 0, rows.layer_ends[layer]
        loads, ordered = rows.loads[start:end], rows.modules[start:end]
        # Held until they are copied: what is not float32 is another tensor.
        a = [read(module.tensors["A"]).float() for module in ordered]
        b = [read(module.tensors["B"]).float() for module in ordered]
        loads["from_a"] = [tensor.data_ptr() for tensor in a]
        loads["from_b"] = [tensor.data_ptr() for tensor in b]
        self._kernels.load(loads)
        places = [self._sites[module.site][0] for module in ordered]
        for column, field in enumerate(("a", "b", "scales", "rank")):
            rows.table[places, layer, column] = loads[field]

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
        found = token_tables(tokens, self._slots, len(self._sites))
        adapters = Adapters(tables=found.tables, inner=found.inner, max_rank=found.widest, used=found.used)
        return StepRows(adapters, found)

    @property
    def size_bytes(self) -> int:
        return sum(rows.memory.numel() * 4 for rows in self._slots.values())

    def _take(self, floats: int) -> torch.Tensor:
        spare, self._spare = self._spare, None
        if spare is not None and len(spare) == floats:
            return spare
        return page_memory(floats * 4).view(torch.float32)

    def _lay_out(self, loads: Loads) -> torch.Tensor:
        """Gives each module its place in the memory of an adapter: A, B, the scales, one after the other."""
        rank, panel = loads["rank"].astype(np.int64), self._kernels.panel
        sizes = np.empty((len(loads), 3), np.int64)
        sizes[:, 0] = rank * loads["inputs"]
        sizes[:, 1] = rank * (-(-loads["outputs"] // panel) * panel)
        sizes[:, 2] = rank
        # Each begins with a cache line of its own.
        ends = np.cumsum(-(-sizes // _LINE) * _LINE)
        memory = self._take(int(ends[-1]))
        starts = np.concatenate(((0,), ends[:-1])).reshape(sizes.shape)
        for column, field in enumerate(("a", "b", "scales")):
            loads[field] = memory.data_ptr() + 4 * starts[:, column]
        return memory
