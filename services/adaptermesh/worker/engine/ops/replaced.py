"""Modules of a layer that an adapter has instead of the base's: products, their biases, and norms.

One adapter after the other, by torch. The base's own product is computed for all tokens as ever, so that rows
without such an adapter pay nothing. A norm in front of a sub-layer is `n * w`, or `n * w + b`, of what it
normalises: another w and b are a factor and a shift of what the sites behind it read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import LAYER_NORMS, SiteMap
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import InputPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentOp


@dataclass(frozen=True, slots=True)
class NormChange:
    """What becomes of a norm's output: factor [hidden], shift [hidden] or None."""

    factor: torch.Tensor
    shift: torch.Tensor | None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden], what the base's norm puts out -> what the adapter's does."""
        return x * self.factor if self.shift is None else x * self.factor + self.shift

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.factor,) if self.shift is None else (self.factor, self.shift)


def norm_change(
    weights: BaseWeights,
    module: ModuleOp,
    read: TensorReader,
    offset: float,
    dtype: torch.dtype,
) -> NormChange:
    """The change from the base's norm to a module's; `offset`: what norms add to their weight.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) where the base's weight is zero somewhere: what
            the norm put out there is gone.
    """
    weight, bias = (
        None if part is None else part.float() for part in weights.norm(module.site, module.layer)
    )
    if weight is None or not (weight + offset).all():
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ADAPTER_UNSUPPORTED,
            f"the base's {module.site} of layer {module.layer} has a weight of zero, which can't be replaced",
        )
    own = {slot: read(name).to(weight.device, torch.float32) for slot, name in module.tensors.items()}
    factor = (own["weight"] + offset) / (weight + offset) if "weight" in own else torch.ones_like(weight)
    if bias is None and "bias" not in own:
        return NormChange(factor.to(dtype), None)
    before = torch.zeros_like(factor) if bias is None else bias
    return NormChange(factor.to(dtype), (own.get("bias", before) - before * factor).to(dtype))


@dataclass(frozen=True, slots=True)
class _Linear:
    """weight: [out, in], or None where only the bias differs: then `bias` [out] is the difference."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def put(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y: [tokens, out], changed in place."""
        if self.weight is not None:
            y.copy_(f.linear(x, self.weight, self.bias))
        elif self.bias is not None:
            y.add_(self.bias)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(part for part in (self.weight, self.bias) if part is not None)


class Replaced(SegmentOp[_Linear | NormChange]):
    """The replaced modules of all slots."""

    # A norm comes before whatever else is done to its output.
    input_place = 0

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None
    ) -> None:
        super().__init__()
        self._sites = sites
        self._dtype = dtype
        self._device = device
        self._weights = weights

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            weights = need_weights(self._weights, "an adapter with modules of its own")
            held: _Linear | NormChange
            if module.site in LAYER_NORMS:
                held = norm_change(weights, module, read, self._sites.norm_offset, self._dtype)
            else:
                held = self._linear(weights, module, read)
            self.hold(slot, module.site, layer, held)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:
        sites = self.sites(tokens, lambda held: isinstance(held, _Linear))
        return {site: _OutputPlan(self, site, tokens) for site in sites}

    def plan_inputs(self, tokens: StepTokens) -> Mapping[str, InputPlan]:
        norms = self.sites(tokens, lambda held: isinstance(held, NormChange))
        return {
            site: _InputPlan(self, norm, tokens)
            for norm in norms
            for site in LAYER_NORMS[norm]
            if self._sites.get(site) is not None
        }

    def _linear(self, weights: BaseWeights, module: ModuleOp, read: TensorReader) -> _Linear:
        own = {
            slot: read(name).to(self._device, self._dtype, copy=True) for slot, name in module.tensors.items()
        }
        site = self._sites.get(module.site)
        base = None if site is None else weights.bias(site, module.layer)
        if "weight" in own:
            return _Linear(own["weight"], own.get("bias", base))
        return _Linear(None, own["bias"] if base is None else own["bias"] - base)


@dataclass(frozen=True, slots=True)
class _OutputPlan:
    op: Replaced
    site: str
    tokens: StepTokens

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for rows, held in self.op.parts(self.tokens, self.site, layer):
            if isinstance(held, _Linear):
                held.put(x[rows], y[rows])


@dataclass(frozen=True, slots=True)
class _InputPlan:
    op: Replaced
    norm: str
    tokens: StepTokens

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        found = x.clone()
        for rows, held in self.op.parts(self.tokens, self.norm, layer):
            if isinstance(held, NormChange):
                found[rows] = held.of(x[rows])
        return found
