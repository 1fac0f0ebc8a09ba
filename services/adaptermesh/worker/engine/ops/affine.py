"""What adapters multiply into a site's input and output, and what they add to its output.

All vectors of one kind and site are one tensor [rows, layers, width]: a token finds its adapter's row by its
slot, and row 0 changes nothing, for tokens that have none. So a step is one gather and one product a site,
whatever the adapters, and the kernels get there by an address and a stride.

Sources of the formulas: IA3 (arXiv:2205.05638), section 3.3; DoRA (arXiv:2402.09353), section 4.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import Site, SiteMap
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.native.library import SITES, Factors, Scales
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.upload import to_device

_IN, _OUT, _SHIFT = "in", "out", "shift"
_NEUTRAL = {_IN: 1.0, _OUT: 1.0, _SHIFT: 0.0}
_NAMES = {"in_scale": _IN, "out_scale": _OUT, "magnitude": _OUT, "bias_delta": _SHIFT}
_Key = tuple[str, str]
"""A site, and which of the three."""
_TINY = 1e-30


class Affine:
    """`y = out (W (in * x) + b + low rank) + shift`: the vectors of all slots.

    `in_scale` and `out_scale` are `in` and `out`, `bias_delta` times the module's scale is the shift. With a
    `magnitude` m, `out` is g = m / |W + s B A|, row by row, and the shift (1 - g) b, since it leaves the bias
    alone.
    """

    input_place = 1

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None = None
    ) -> None:
        """`weights`: the base's; None: adapters with a magnitude are refused."""
        self._sites = {site.name: site for site in sites.sites}
        self._layers = sites.num_layers
        self._dtype = dtype
        self._device = device
        self._weights = weights
        self._arenas: dict[_Key, torch.Tensor] = {}
        self._held_rows = 0
        self._slots: dict[int, frozenset[_Key]] = {}
        self._squares: dict[tuple[str, int], torch.Tensor] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        keys = frozenset(key for module in modules for key in self._keys_of(module))
        if not keys:
            return
        self._make_room(slot, keys)
        self._slots[slot] = keys

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            for name, values in self._vectors(module, layer, read).items():
                self._arenas[module.site, name][slot + 1, layer].copy_(values, non_blocking=True)

    def unload(self, slot: int) -> None:
        for key in self._slots.pop(slot, ()):
            if any(key in keys for keys in self._slots.values()):
                self._arenas[key][slot + 1].fill_(_NEUTRAL[key[1]])
            else:
                del self._arenas[key]

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        keys = self._keys(tokens)
        sites = {site for site, name in keys if name != _IN}
        if not sites:
            return {}
        rows = self._device_rows(tokens)
        return {
            site: _OutputPlan(self._arena(site, _OUT, keys), self._arena(site, _SHIFT, keys), rows)
            for site in sites
        }

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        sites = {site for site, name in self._keys(tokens) if name == _IN}
        if not sites:
            return {}
        rows = self._device_rows(tokens)
        return {site: _ScaledInput(self._arenas[site, _IN], rows) for site in sites}

    def scales_of(self, tokens: StepTokens) -> tuple[Scales, object] | None:
        """The step as the kernels take it, and what that points to; None if no token has vectors."""
        keys = self._keys(tokens)
        if not keys:
            return None
        rows = self._rows(tokens)
        found = Scales(rows=rows.ctypes.data)
        for place, site in enumerate(SITES):
            for name, factors in ((_IN, found.inputs), (_OUT, found.outputs), (_SHIFT, found.shifts)):
                arena = self._arena(site, name, keys)
                if arena is not None:
                    factors[place] = Factors(arena.data_ptr(), arena.stride(0), arena.stride(1))
        return found, (rows, *self._arenas.values())

    @property
    def size_bytes(self) -> int:
        return sum(arena.numel() * arena.element_size() for arena in self._arenas.values())

    def _keys_of(self, module: ModuleOp) -> set[_Key]:
        names = {_NAMES[slot] for slot in module.tensors}
        if "magnitude" in module.tensors:
            weights = need_weights(self._weights)
            if weights.bias(self._sites[module.site], module.layer) is not None:
                names.add(_SHIFT)
        return {(module.site, name) for name in names}

    def _vectors(self, module: ModuleOp, layer: int, read: TensorReader) -> dict[str, torch.Tensor]:
        """What a module puts into the arenas, by kind."""
        found = {_NAMES[slot]: read(name) for slot, name in module.tensors.items()}
        if "bias_delta" in module.tensors:
            found[_SHIFT] = module.scale * found[_SHIFT].float()
        if "magnitude" in module.tensors:
            site, weights = self._sites[module.site], need_weights(self._weights)
            a, b = (read(f"L{layer}.{site.name}.{slot}").to(self._device).float() for slot in ("A", "B"))
            norms = self._norms(site, layer, weights, module.scale * b, a)
            found[_OUT] = found[_OUT].to(self._device).float() / norms
            bias = weights.bias(site, layer)
            if bias is not None:
                found[_SHIFT] = (1.0 - found[_OUT]) * bias
        return found

    def _norms(
        self, site: Site, layer: int, weights: BaseWeights, b: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        """The norm of each row of W + b a, without making that matrix: [out]. a: [r, in]. b: [out, r]."""
        squares = self._squares.get((site.name, layer))
        if squares is None:
            squares = self._squares[site.name, layer] = weights.squares(site, layer)
        # |w + b a|^2 = |w|^2 + b . (2 w a^T + b a a^T), row by row.
        crossed = torch.addmm(weights.project(site, layer, a), b, a @ a.T, beta=2.0)
        return (squares + crossed.mul_(b).sum(1)).clamp_(min=_TINY).sqrt_()

    def _arena(self, site: str, name: str, keys: set[_Key]) -> torch.Tensor | None:
        return self._arenas[site, name] if (site, name) in keys else None

    def _keys(self, tokens: StepTokens) -> set[_Key]:
        return {key for slot in tokens.active_slots for key in self._slots.get(slot, ())}

    def _device_rows(self, tokens: StepTokens) -> torch.Tensor:
        return to_device(torch.from_numpy(self._rows(tokens)), self._device)

    def _rows(self, tokens: StepTokens) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """[tokens]: the row of each one's vectors."""
        rows = np.zeros(tokens.segments[-1].end, np.int32)
        for segment in tokens.segments:
            if segment.slot in self._slots:
                rows[segment.start : segment.end] = segment.slot + 1
        return rows

    def _make_room(self, slot: int, keys: frozenset[_Key]) -> None:
        """Grows by doubling, so that slots that are never used cost little.

        All arenas have the same rows: a token has one row, whatever its adapter has.
        """
        if slot + 1 >= self._held_rows:
            self._held_rows = max(slot + 2, 2 * self._held_rows)
        for key in keys | self._arenas.keys():
            arena = self._arenas.get(key)
            if arena is not None and len(arena) == self._held_rows:
                continue
            site, name = self._sites[key[0]], key[1]
            width = site.in_features if name == _IN else site.out_features
            shape = (self._held_rows, self._layers, width)
            larger = torch.full(shape, _NEUTRAL[name], dtype=self._dtype, device=self._device)
            if arena is not None:
                larger[: len(arena)] = arena
            self._arenas[key] = larger


@dataclass(frozen=True, slots=True)
class _OutputPlan:
    """One site's part of a step. factors, shifts: [rows, layers, width] or None. rows: [tokens]."""

    factors: torch.Tensor | None
    shifts: torch.Tensor | None
    rows: torch.Tensor

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: ARG002 (a SitePlan's)
        if self.factors is not None:
            y.mul_(self.factors[:, layer].index_select(0, self.rows))
        if self.shifts is not None:
            y.add_(self.shifts[:, layer].index_select(0, self.rows))


@dataclass(frozen=True, slots=True)
class _ScaledInput:
    """What goes into one site in a step. factors: [rows, layers, width]. rows: [tokens]."""

    factors: torch.Tensor
    rows: torch.Tensor

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors[:, layer].index_select(0, self.rows)


def need_weights(weights: BaseWeights | None, who: str = "a DoRA") -> BaseWeights:
    """Raises MeshError FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) where there are none."""
    if weights is None:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ADAPTER_UNSUPPORTED,
            f"{who} needs the base's own weights, and this worker holds them in 8 bits",
        )
    return weights
