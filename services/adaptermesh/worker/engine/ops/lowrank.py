"""Low-rank ops of many adapters in one step.

Each site has an arena of rank rows. An adapter of rank r owns r consecutive rows of each site that it
touches, so memory follows the true rank and a switch is a change of row numbers, never a copy:

    A: [layers, rows, in]      B: [layers, rows, out] (transposed, so that a rank row is contiguous)

Short segments (decodes) that follow one another are computed together. On a CPU each token meets its own rows
only, read where they lie (`lowrank_gather`). On CUDA so do kernels, for prefills too (`lowrank_spans`).
Elsewhere: one product with all rows between the first and the
last one in use, a mask that keeps each token's own rows, a second product that adds to y. Long segments
(prefills) take their own rows only. Source of the formula: LoRA (arXiv:2106.09685); of the grouping:
Punica (arXiv:2310.18547), section 4.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.arrivals import too_large
from adaptermesh.worker.engine.ops.lowrank_gather import GatheredProduct, TokenRows, can_gather
from adaptermesh.worker.engine.ops.lowrank_spans import CapturedSpans, Rows, plan_spans, span_product
from adaptermesh.worker.engine.ops.op import CapturedOp, Segment, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ranges import RangeAllocator
from adaptermesh.worker.engine.upload import to_device

SHORT_TOKENS = 16
"""A segment up to this long is computed together with its neighbours."""
MAX_JOINT_WORK = 64 * 256
"""Tokens times rows of a joint product; beyond it the products with masked rows cost more than they save."""
_MAX_VIEWS = 64
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Span:
    """The rank rows [start, end) of a slot at a site. `scale` is None if it differs between layers."""

    start: int
    end: int
    scale: float | None


@dataclass(frozen=True, slots=True)
class RowViews:
    """Rows [start, end) of every layer: `a` is [in, rows], `b` is [rows, out], `scales` is [rows]."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]


class SiteArena:
    """The rank rows of all adapters at one site."""

    def __init__(
        self, site: Site, layers: int, dtype: torch.dtype, device: torch.device, *, isolated: bool = False
    ) -> None:
        """`isolated`: no product of a token reads another adapter's rows, whatever they hold."""
        self.site = site
        self.layers = layers
        self._checked = dtype in _NARROW and not isolated
        self._rows = RangeAllocator()
        self._a = torch.zeros((layers, 0, site.in_features), dtype=dtype, device=device)
        self._b = torch.zeros((layers, 0, site.out_features), dtype=dtype, device=device)
        # One scale for each row, kept apart from B so that a request's weights stay exact.
        # In float32 in any case: rounded to bfloat16 it would be off by up to 0.4 %.
        self._scale = torch.zeros((layers, 0), dtype=torch.float32, device=device)
        self._views: dict[tuple[int, int], RowViews] = {}
        self.spans: dict[int, Span] = {}

        self.gathers = can_gather(dtype, device)

    @property
    def size_bytes(self) -> int:
        return self._a.nbytes + self._b.nbytes + self._scale.nbytes

    @property
    def capacity(self) -> int:
        """Rank rows; it never shrinks."""
        return self._rows.capacity

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """Takes the rows of one adapter's modules of this site, at most one a layer."""
        rank = max(module.rank for module in modules)
        start = self._take(rank)
        scales = {module.scale for module in modules}
        self.spans[slot] = Span(start, start + rank, scales.pop() if len(scales) == 1 else None)
        by_row = torch.zeros((self.layers, rank), dtype=torch.float32)
        for module in modules:
            by_row[module.layer, : module.rank] = module.scale
        self._scale[:, start : start + rank] = to_device(by_row, self._scale.device)

    def load_layer(self, slot: int, layer: int, module: ModuleOp | None, read: TensorReader) -> None:
        """Fills the rows of one layer; with zeros where no module is."""
        start, end = self.spans[slot].start, self.spans[slot].end
        used = start if module is None else start + module.rank
        if module is not None:
            self._copy(self._a[layer, start:used], read(module.tensors["A"]))
            self._copy(self._b[layer, start:used], read(module.tensors["B"]).T)
        if used < end:
            self._a[layer, used:end] = 0.0
            self._b[layer, used:end] = 0.0

    def unload(self, slot: int) -> None:
        span = self.spans.pop(slot, None)
        if span is not None:
            # Rows outside every span still take part in joint products: they must stay finite.
            self._rows.give(span.start, span.end - span.start)

    def views(self, start: int, end: int) -> RowViews:
        """The rows of every layer, cached: slicing them anew would cost more than the products."""
        found = self._views.get((start, end))
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = RowViews(
                tuple(self._a[layer, start:end].t() for layer in range(self.layers)),
                tuple(self._b[layer, start:end] for layer in range(self.layers)),
                tuple(self._scale[layer, start:end] for layer in range(self.layers)),
            )
            self._views[start, end] = found
        return found

    def all_rows(self) -> RowViews:
        """The whole arena."""
        return self.views(0, self._rows.capacity)

    def rows_of(self, slot: int) -> Rows | None:
        """The rank rows of a slot here."""
        span = self.spans.get(slot)
        return None if span is None else (span.start, span.end)

    def _take(self, rank: int) -> int:
        start = self._rows.take(rank)
        while start is None:
            capacity = max(8, rank, self._rows.capacity)
            added = min(capacity, 512) if capacity > rank else rank
            self._grow(self._rows.capacity + added)
            start = self._rows.take(rank)
        return start

    def _grow(self, rows: int) -> None:
        self._views.clear()
        kept = self._rows.capacity
        # Copies and steps may be under way on streams of their own: this is rare, so all are waited for.
        _settle(self._a.device)
        self._a = _with_rows(self._a, kept, rows)
        self._b = _with_rows(self._b, kept, rows)
        self._scale = _with_rows(self._scale, kept, rows)
        _settle(self._a.device)
        self._rows.grow(rows)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        if self._checked and not bool(torch.isfinite(target).all()):
            # Zero times infinity in a joint product would spread to other adapters' tokens.
            target.zero_()
            raise too_large(target.dtype)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_rows(old: torch.Tensor, kept: int, rows: int) -> torch.Tensor:
    new = old.new_zeros((old.shape[0], rows, *old.shape[2:]))
    new[:, :kept] = old
    return new


class LowRank:
    """The low-rank ops of all slots."""

    def __init__(self, sites: Iterable[Site], layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._layers = layers
        self._product = span_product(dtype, device)
        isolated = self._product is not None
        self._arenas = {
            site.name: SiteArena(site, layers, dtype, device, isolated=isolated) for site in sites
        }
        self._ranks: dict[int, int] = {}
        self._changes = 0

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        by_site: dict[str, list[ModuleOp]] = {}
        for module in modules:
            by_site.setdefault(module.site, []).append(module)
        for name, found in by_site.items():
            self._arenas[name].reserve(slot, found)
        self._ranks[slot] = max((module.rank for module in modules), default=0)
        self._changes += 1

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        by_site = {module.site: module for module in modules}
        for name, arena in self._arenas.items():
            if slot in arena.spans:
                arena.load_layer(slot, layer, by_site.get(name), read)

    @property
    def layout(self) -> int:
        return sum(arena.capacity for arena in self._arenas.values())

    def rank_of(self, slots: Sequence[int]) -> int:
        return max((self._ranks.get(slot, 0) for slot in slots), default=0)

    def capture(self, rows: int, rank: int) -> CapturedOp | None:
        if self._product is None:
            return None
        arenas = {name: arena for name, arena in self._arenas.items() if arena.capacity}
        return CapturedSpans(arenas, rows, rank, self._product, self._device, lambda: self._changes)

    def unload(self, slot: int) -> None:
        self._ranks.pop(slot, None)
        self._changes += 1
        for arena in self._arenas.values():
            arena.unload(slot)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        active = tokens.active_slots
        if self._product is not None:
            return plan_spans(self._arenas, tokens, self._product, self._device)
        masks, token_rows = _Masks(), _TokenRowsOfStep()
        plans: dict[str, SitePlan] = {}
        for name, arena in self._arenas.items():
            if not active.isdisjoint(arena.spans):
                plans[name] = _plan_site(arena, tokens, masks, token_rows)
        return plans

    @property
    def size_bytes(self) -> int:
        return sum(arena.size_bytes for arena in self._arenas.values())


@dataclass(frozen=True, slots=True)
class _Product:
    """One pair of products: tokens [start, end) with some rows.

    `foreign`: [tokens, rows] bool, True where a row is not the token's own; None if all are. Those are filled
    with zero, not multiplied by it: another adapter's infinity must not become this one's NaN. `scale` None:
    the rows' own scales.
    """

    start: int
    end: int
    rows: RowViews
    foreign: torch.Tensor | None
    scale: float | None

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        inner = x[self.start : self.end] @ self.rows.a[layer]
        if self.foreign is not None:
            inner.masked_fill_(self.foreign, 0.0)
        out = y[self.start : self.end]
        if self.scale is None:
            out.addmm_(inner.mul_(self.rows.scales[layer]), self.rows.b[layer])
        else:
            out.addmm_(inner, self.rows.b[layer], alpha=self.scale)


@dataclass(frozen=True, slots=True)
class _Products:
    products: tuple[_Product | GatheredProduct, ...]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for product in self.products:
            product.apply(layer, x, y)


class _Masks:
    """The masks of one step. Sites where the same adapters own the same rows share one."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[Segment, int, int], ...], torch.Tensor] = {}

    def get(
        self, run: Sequence[tuple[Segment, Span]], low: int, high: int, device: torch.device
    ) -> torch.Tensor:
        """[tokens, high - low] bool: True where the row is not the token's own."""
        key = tuple((segment, span.start, span.end) for segment, span in run)
        mask = self._known.get(key)
        if mask is None:
            first = run[0][0].start
            mask = torch.ones((run[-1][0].end - first, high - low), dtype=torch.bool)
            for segment, span in run:
                own = slice(span.start - low, span.end - low)
                mask[segment.start - first : segment.end - first, own] = False
            mask = self._known[key] = mask.to(device)
        return mask


class _TokenRowsOfStep:
    """The same for gathered products."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], TokenRows] = {}

    def get(self, run: Sequence[tuple[Segment, Span]], capacity: int, dtype: torch.dtype) -> TokenRows:
        key = (*run, capacity)
        found = self._known.get(key)
        if found is None:
            spans = [
                (span.start, span.end, span.scale)
                for segment, span in run
                for _ in range(segment.start, segment.end)
            ]
            found = self._known[key] = TokenRows.of(spans, capacity, dtype)
        return found


def _plan_site(
    arena: SiteArena, tokens: StepTokens, masks: _Masks, token_rows: _TokenRowsOfStep
) -> _Products:
    products: list[_Product | GatheredProduct] = []
    for segments in _runs(tokens.segments, arena.spans):
        run = [(segment, arena.spans[segment.slot]) for segment in segments]
        low, high = min(span.start for _, span in run), max(span.end for _, span in run)
        first, last = segments[0].start, segments[-1].end
        if len(run) > 1 and arena.gathers:
            rows = arena.all_rows()
            own = token_rows.get(run, rows.b[0].shape[0], rows.b[0].dtype)
            products.append(GatheredProduct(first, last, rows.a, rows.b, rows.scales, own))
            continue
        if len(run) == 1 or (last - first) * (high - low) > MAX_JOINT_WORK:
            products.extend(
                _Product(segment.start, segment.end, arena.views(span.start, span.end), None, span.scale)
                for segment, span in run
            )
            continue
        rows = arena.views(low, high)
        scales = {span.scale for _, span in run}
        scale = scales.pop() if len(scales) == 1 else None
        products.append(_Product(first, last, rows, masks.get(run, low, high, rows.b[0].device), scale))
    return _Products(tuple(products))


def _runs(segments: Sequence[Segment], spans: Mapping[int, Span]) -> list[list[Segment]]:
    """Cuts the segments that have rows at a site into runs of consecutive short ones and single long ones."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if segment.slot not in spans:
            continue
        short = segment.end - segment.start <= SHORT_TOKENS
        if (
            short
            and runs
            and runs[-1][-1].end == segment.start
            and runs[-1][-1].end - runs[-1][-1].start <= SHORT_TOKENS
        ):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs
