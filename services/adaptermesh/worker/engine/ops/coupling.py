"""An invertible change of what goes into the first layer, one adapter after the other.

Source: NICE (arXiv:1410.8516), section 3.2, as Pfeiffer et al. use it (arXiv:2005.00052, section 3.3).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.bottleneck import ACTIVATIONS
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.segment_op import CopyingSegmentOp


@dataclass(frozen=True, slots=True)
class _Coupling:
    """Two nets between the halves of the stream. down: [width, half]. up: [other half, width]."""

    parts: Mapping[str, torch.Tensor]
    activation: str

    def change(self, hidden: torch.Tensor) -> None:
        """hidden: [tokens, hidden], in place: the first half by the second, then the second by that."""
        half = hidden.shape[1] // 2
        first, second = hidden[:, :half], hidden[:, half:]
        first.add_(self._net("F", second))
        second.add_(self._net("G", first))

    def _net(self, net: str, x: torch.Tensor) -> torch.Tensor:
        down, down_bias, up, up_bias = (
            self.parts[f"{net}_{slot}"] for slot in ("down", "down_bias", "up", "up_bias")
        )
        return f.linear(ACTIVATIONS[self.activation](f.linear(x, down, down_bias)), up, up_bias)

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        return self.parts.values()


class Coupling(CopyingSegmentOp[_Coupling]):
    """The couplings of all slots."""

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        copy = self.copier(read)
        for module in modules:
            parts = {name: copy(tensor) for name, tensor in module.tensors.items()}
            self.hold(slot, module.site, layer, _Coupling(parts, (module.options or {})["activation"]))

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (it has no part at a site)
        return {}

    def enters(self, tokens: StepTokens) -> bool:
        return bool(self.sites(tokens))

    def enter(self, tokens: StepTokens, hidden: torch.Tensor) -> None:
        for site in self.sites(tokens):
            for rows, held in self.parts(tokens, site, 0):
                held.change(hidden[rows])
