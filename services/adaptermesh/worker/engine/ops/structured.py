"""Kronecker products that adapters add, and block rotations of what goes into a site.

Each slot keeps its small matrices; nothing of the size of the base's is ever made. The tokens of short
segments are computed together, each with its own adapter's matrices in one batch of products; a long segment
is a product by itself. Tokens of the base, and of adapters of other kinds, are not touched.

Sources of the formulas: LoKr (arXiv:2309.14859), OFT (arXiv:2306.07280), BOFT (arXiv:2311.06243).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, Segment, SitePlan, StepTokens, TensorReader

SHORT_TOKENS = 4
"""Up to this many tokens of a segment are computed with those of other segments."""
MAX_GATHERED = 2**16
"""Numbers of matrices that a token may copy for that."""

_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Kron:
    """kron(w1, w2) at one site, scaled. w1: [o1, i1]. w2: [o2, i2]. It begins `skip` rows before the site."""

    w1: torch.Tensor
    w2: torch.Tensor
    skip: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.w1, self.w2


@dataclass(frozen=True, slots=True)
class _Turn:
    """A rotation of a site's input. blocks: [factors, count, b, b], `count` 1 for one that all share."""

    blocks: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.blocks,)


@dataclass(frozen=True, slots=True)
class _RowScale:
    """y = factors * y + shifts, which leaves the base's bias alone. Both: [out]."""

    factors: torch.Tensor
    shifts: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.factors, self.shifts


_Part = TypeVar("_Part", _Kron, _Turn, _RowScale)
_Parts = dict[tuple[int, str, int], _Part]
"""By slot, site and layer."""


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Tokens that are computed together, and the slot of each. tokens: [n] int64."""

    tokens: torch.Tensor
    slots: tuple[int, ...]


class Structured:
    """The Kronecker products, rotations and row scales of all slots."""

    input_place = 2

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None = None
    ) -> None:
        """`weights`: the base's; None: adapters with a row scale are refused."""
        self._sites = {site.name: site for site in sites.sites}
        self._dtype = dtype
        self._device = device
        self._weights = weights
        self._slots: dict[int, tuple[frozenset[str], frozenset[str]]] = {}
        self._krons: _Parts[_Kron] = {}
        self._turns: _Parts[_Turn] = {}
        self._row_scales: _Parts[_RowScale] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """Takes no room yet: how much there has to be is in the tensors."""
        if any("row_scale" in module.tensors for module in modules):
            need_weights(self._weights, "a BOFT")
        outputs = frozenset(module.site for module in modules if module.tensors.keys() & {"w1", "row_scale"})
        inputs = frozenset(module.site for module in modules if "R" in module.tensors)
        if outputs or inputs:
            self._slots[slot] = outputs, inputs

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            site, key = self._sites[module.site], (slot, module.site, layer)
            given = {name: read(tensor) for name, tensor in module.tensors.items()}
            if "w1" in given:
                w2 = self._held(given["w2"])
                w1 = self._held(module.scale * given["w1"].float())
                self._krons[key] = _Kron(w1, w2, site.out_offset % len(w2))
            if "R" in given:
                self._turns[key] = _Turn(self._held(given["R"]))
            if "row_scale" in given:
                factors = given["row_scale"].to(self._device).float()
                bias = need_weights(self._weights, "a BOFT").bias(site, layer)
                shifts = torch.zeros_like(factors) if bias is None else (1.0 - factors) * bias
                self._row_scales[key] = _RowScale(self._held(factors), self._held(shifts))

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)
        # In place: a step under way looks its parts up in these.
        _forget(self._krons, slot)
        _forget(self._turns, slot)
        _forget(self._row_scales, slot)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        step = _Step(self._acting(tokens), {})
        sites = {site for segment in step.segments for site in self._slots[segment.slot][0]}
        return {site: _OutputPlan(site, self._krons, self._row_scales, step) for site in sites}

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        step = _Step(self._acting(tokens), {})
        sites = {site for segment in step.segments for site in self._slots[segment.slot][1]}
        return {site: _TurnedInput(site, self._turns, step) for site in sites}

    @property
    def size_bytes(self) -> int:
        parts: tuple[_Kron | _Turn | _RowScale, ...] = (
            *self._krons.values(),
            *self._turns.values(),
            *self._row_scales.values(),
        )
        return sum(tensor.nbytes for part in parts for tensor in part.tensors)

    def _acting(self, tokens: StepTokens) -> tuple[Segment, ...]:
        return tuple(segment for segment in tokens.segments if segment.slot in self._slots)

    def _held(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._device, self._dtype, copy=True)


@dataclass(frozen=True, slots=True)
class _Step:
    """The segments with an adapter of this kind, and tensors of places that sites and layers share."""

    segments: tuple[Segment, ...]
    known: dict[tuple[Segment, ...], _Gathered]

    def split(
        self, site: str, layer: int, parts: _Parts[_Part]
    ) -> tuple[list[tuple[_Gathered, list[_Part]]], list[tuple[Segment, _Part]]]:
        """What to compute together, by the shapes of the matrices, and what by itself."""
        together: dict[tuple[object, ...], list[Segment]] = {}
        alone: list[tuple[Segment, _Part]] = []
        device: torch.device | None = None
        for segment in self.segments:
            part = parts.get((segment.slot, site, layer))
            if part is None:
                continue
            device = part.tensors[0].device
            size = sum(tensor.numel() for tensor in part.tensors)
            if segment.end - segment.start > SHORT_TOKENS or size > MAX_GATHERED:
                alone.append((segment, part))
            else:
                shapes = tuple(tensor.shape for tensor in part.tensors)
                together.setdefault(shapes, []).append(segment)
        groups = []
        for segments in together.values():
            gathered = self._gathered(tuple(segments), device)
            groups.append((gathered, [parts[slot, site, layer] for slot in gathered.slots]))
        return groups, alone

    def _gathered(self, segments: tuple[Segment, ...], device: torch.device | None) -> _Gathered:
        found = self.known.get(segments)
        if found is None:
            places = [place for segment in segments for place in range(segment.start, segment.end)]
            slots = tuple(segment.slot for segment in segments for _ in range(segment.start, segment.end))
            found = self.known[segments] = _Gathered(torch.tensor(places, device=device), slots)
        return found


@dataclass(frozen=True, slots=True)
class _OutputPlan:
    """One site's part of a step: first what scales rows of the base's product, then what is added."""

    site: str
    krons: _Parts[_Kron]
    row_scales: _Parts[_RowScale]
    step: _Step

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        scaled, long_scaled = self.step.split(self.site, layer, self.row_scales)
        for group, scales in scaled:
            rows = y.index_select(0, group.tokens)
            rows.mul_(torch.stack([scale.factors for scale in scales]))
            rows.add_(torch.stack([scale.shifts for scale in scales]))
            y.index_copy_(0, group.tokens, rows)
        for segment, scale in long_scaled:
            y[segment.start : segment.end].mul_(scale.factors).add_(scale.shifts)
        added, long_added = self.step.split(self.site, layer, self.krons)
        for group, krons in added:
            y.index_add_(0, group.tokens, _kron_each(x.index_select(0, group.tokens), krons, y.shape[1]))
        for segment, kron in long_added:
            y[segment.start : segment.end].add_(_kron_all(x[segment.start : segment.end], kron, y.shape[1]))


@dataclass(frozen=True, slots=True)
class _TurnedInput:
    """What goes into one site in a step."""

    site: str
    turns: _Parts[_Turn]
    step: _Step

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        turned = x.clone()
        groups, alone = self.step.split(self.site, layer, self.turns)
        for group, turns in groups:
            blocks = torch.stack([turn.blocks for turn in turns], 1)
            turned.index_copy_(0, group.tokens, _turn(x.index_select(0, group.tokens), blocks, _blocks_each))
        for segment, turn in alone:
            own = slice(segment.start, segment.end)
            turned[own] = _turn(x[own], turn.blocks, _blocks_all)
        return turned


def butterfly(width: int, block: int, factor: int) -> torch.Tensor:
    """The input that stands at each place for one factor of a product of rotations: [width].

    A factor sees the inputs in groups of 2^factor blocks; in each, the even halves of blocks come first and
    then the odd ones, so that what it mixes was apart for the factors before. The first changes nothing.
    """
    halves = torch.arange(width).view(-1, 1 << factor, 2, block // 2)
    return halves.transpose(1, 2).reshape(width)


def _kron_each(x: torch.Tensor, krons: Sequence[_Kron], width: int) -> torch.Tensor:
    """A product for each token, all of the same shapes. x: [n, in] -> [n, width]."""
    w1 = torch.stack([kron.w1 for kron in krons])
    w2 = torch.stack([kron.w2 for kron in krons])
    inner = torch.bmm(x.reshape(len(x), w1.shape[2], w2.shape[2]), w2.transpose(1, 2))
    return torch.bmm(w1, inner).flatten(1)[:, krons[0].skip : krons[0].skip + width]


def _kron_all(x: torch.Tensor, kron: _Kron, width: int) -> torch.Tensor:
    """One product for all tokens. x: [n, in] -> [n, width]."""
    inner = x.reshape(len(x), kron.w1.shape[1], kron.w2.shape[1]) @ kron.w2.T
    outer = inner.transpose(1, 2) @ kron.w1.T
    return outer.transpose(1, 2).flatten(1)[:, kron.skip : kron.skip + width]


def _turn(x: torch.Tensor, blocks: torch.Tensor, product: _Product) -> torch.Tensor:
    """The factors of a rotation, the last one first. x: [n, width], as the result. blocks: [factors, ...]."""
    block = blocks.shape[-1]
    for factor in range(len(blocks) - 1, -1, -1):
        # The first factor's order is that of the inputs.
        order = butterfly(x.shape[1], block, factor).to(x.device) if factor else None
        if order is not None:
            x = x.index_select(1, order.argsort())
        x = product(x.reshape(len(x), -1, block), blocks[factor]).reshape(len(x), -1)
        if order is not None:
            x = x.index_select(1, order)
    return x


def _blocks_each(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x: [n, count, b], as the result. blocks: [n, count or 1, b, b]."""
    if blocks.shape[1] == 1:
        return torch.bmm(x, blocks[:, 0])
    return torch.matmul(x.unsqueeze(2), blocks).squeeze(2)


def _blocks_all(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x: [n, count, b], as the result. blocks: [count or 1, b, b]."""
    if len(blocks) == 1:
        return x @ blocks[0]
    return torch.bmm(x.transpose(0, 1), blocks).transpose(0, 1)


def _forget(parts: _Parts[_Part], slot: int) -> None:
    for key in [key for key in parts if key[0] == slot]:
        del parts[key]
