"""Low-rank ops of many adapters in the layout of the native kernels.

Each site has an arena of rank rows; an adapter of rank r owns r consecutive ones at each site that it
touches, so memory follows the true rank and a switch is a change of row numbers, never a copy:

    A: [layers, rows, in]
    B: [layers, rows * padded out]; an adapter's rows together, as [panels, rank, panel]

Source of the formula: LoRA (arXiv:2106.09685); of the gather by token: Punica (arXiv:2310.18547), section 4.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.native.library import Kernels
from adaptermesh.worker.engine.native.library import Site as KernelSite
from adaptermesh.worker.engine.native.memory import page_memory
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ranges import RangeAllocator

_FIRST_ROWS = 8
_MOST_NEW_ROWS = 512


@dataclass(frozen=True, slots=True)
class Span:
    """The rank rows [start, start + rank) of a slot at a site."""

    start: int
    rank: int


class NativeArena:
    """The rank rows of all adapters at one site."""

    def __init__(self, site: Site, layers: int, kernels: Kernels) -> None:
        self.site = site
        self.panels = kernels.panels(site.out_features)
        self._panel = kernels.panel
        self._layers = layers
        self._padded = self.panels * kernels.panel
        self._rows = RangeAllocator()
        self.spans: dict[int, Span] = {}
        self.a = torch.zeros(layers, 0, site.in_features)
        self.b = torch.zeros(layers, 0)
        # One scale for each row, kept apart from B so that a request's weights stay exact.
        self.scales = torch.zeros(layers, 0)

    @property
    def size_bytes(self) -> int:
        return (self.a.numel() + self.b.numel() + self.scales.numel()) * 4

    def load(self, slot: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        """Copies one adapter's modules of this site, at most one a layer."""
        rank = max(module.rank for module in modules)
        span = self.spans[slot] = Span(self._take(rank), rank)
        by_layer = {module.layer: module for module in modules}
        for layer in range(self._layers):
            self._load_layer(layer, span, by_layer.get(layer), read)

    def unload(self, slot: int) -> None:
        span = self.spans.pop(slot, None)
        if span is not None:
            self._rows.give(span.start, span.rank)

    def _load_layer(self, layer: int, span: Span, module: ModuleOp | None, read: TensorReader) -> None:
        a, b, scales = self._views(layer, span)
        if module is None or module.rank < span.rank:
            a.zero_()
            b.zero_()
            scales.zero_()
        if module is None:
            return
        rank, out = module.rank, self.site.out_features
        a[:rank] = read(module.tensors["A"])
        scales[:rank] = module.scale
        whole = out // self._panel
        from_b = read(module.tensors["B"]).float()
        b[:whole, :rank] = from_b[: whole * self._panel].view(whole, self._panel, rank).transpose(1, 2)
        if whole < self.panels:
            b[whole].zero_()
            b[whole, :rank, : out - whole * self._panel] = from_b[whole * self._panel :].t()

    def _views(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[rank, in], [panels, rank, panel] and [rank]."""
        end = span.start + span.rank
        b = self.b[layer, span.start * self._padded : end * self._padded]
        return (
            self.a[layer, span.start : end],
            b.view(self.panels, span.rank, self._panel),
            self.scales[layer, span.start : end],
        )

    def _take(self, rank: int) -> int:
        start = self._rows.take(rank)
        while start is None:
            capacity = max(_FIRST_ROWS, rank, self._rows.capacity)
            self._grow(self._rows.capacity + (min(capacity, _MOST_NEW_ROWS) if capacity > rank else rank))
            start = self._rows.take(rank)
        return start

    def _grow(self, rows: int) -> None:
        self.a = _grown(self.a, (self._layers, rows, self.site.in_features))
        self.b = _grown(self.b, (self._layers, rows * self._padded))
        self.scales = _grown(self.scales, (self._layers, rows))
        self._rows.grow(rows)


def _grown(old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    new = page_memory(int(np.prod(shape)) * 4).view(torch.float32).view(shape)
    new[:, : old.shape[1]] = old
    return new


@dataclass(frozen=True, slots=True)
class SiteRows:
    """One site's share of a step, as the kernels take it, and the memory that it points to."""

    rows: KernelSite
    held: tuple[object, ...]
    kernels: Kernels
    threads: int

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' part at a site outside of the kernels' own forward."""
        self.kernels.add_lowrank(self.rows, layer, x, y, self.threads)


class NativeLowRank:
    """The low-rank ops of all slots."""

    def __init__(self, sites: Iterable[Site], layers: int, kernels: Kernels) -> None:
        self._kernels = kernels
        self._arenas = {site.name: NativeArena(site, layers, kernels) for site in sites}

    def load(self, slot: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        by_site: dict[str, list[ModuleOp]] = {}
        for module in modules:
            by_site.setdefault(module.site, []).append(module)
        for name, found in by_site.items():
            self._arenas[name].load(slot, found, read)

    def unload(self, slot: int) -> None:
        for arena in self._arenas.values():
            arena.unload(slot)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        return self.rows_of(tokens)

    def rows_of(self, tokens: StepTokens) -> Mapping[str, SiteRows]:
        """Which rows each token meets, by site; a site that no active adapter touches is absent."""
        active, threads = tokens.active_slots, torch.get_num_threads()
        return {
            name: _site_rows(arena, tokens, self._kernels, threads)
            for name, arena in self._arenas.items()
            if not active.isdisjoint(arena.spans)
        }

    @property
    def size_bytes(self) -> int:
        return sum(arena.size_bytes for arena in self._arenas.values())


def _site_rows(arena: NativeArena, tokens: StepTokens, kernels: Kernels, threads: int) -> SiteRows:
    count = tokens.segments[-1].end
    # By token: where its rows start, how many they are; 0 for a token without an adapter here.
    rows = np.zeros((2, count), np.int32)
    most = 0
    for segment in tokens.segments:
        span = arena.spans.get(segment.slot)
        if span is not None:
            rows[0, segment.start : segment.end] = span.start
            rows[1, segment.start : segment.end] = span.rank
            most = max(most, span.rank)
    inner = torch.empty(count, most)
    site = KernelSite(
        a=arena.a.data_ptr(),
        b=arena.b.data_ptr(),
        scales=arena.scales.data_ptr(),
        a_stride=arena.a.stride(0),
        b_stride=arena.b.stride(0),
        scale_stride=arena.scales.stride(0),
        starts=rows.ctypes.data,
        ranks=rows.ctypes.data + rows.strides[0],
        inner=inner.data_ptr(),
        max_rank=most,
        inputs=arena.site.in_features,
        panel_count=arena.panels,
    )
    return SiteRows(site, (rows, inner, arena.a, arena.b, arena.scales), kernels, threads)
