"""Bottlenecks beside a sub-layer, one adapter after the other, straight from the formula.

What torch computes them with, and the twin of the kernels'. Sources: Houlsby et al. (arXiv:1902.00751),
section 2.1; Pfeiffer et al. (arXiv:2005.00052), section 3.1; He et al. (arXiv:2110.04366), table 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import BlockPlan, SitePlan, StepTokens, TensorReader

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": f.relu,
    "gelu": f.gelu,
    "gelu_new": lambda x: f.gelu(x, approximate="tanh"),
    "silu": f.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": f.leaky_relu,
}


def options_of(module: ModuleOp) -> tuple[str, str]:
    """The activation and the input of a bottleneck."""
    options = module.options or {}
    return options["activation"], options["input"]


def read_by(kind: str, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What a bottleneck of that input reads. residual, output: [tokens, hidden]."""
    if kind == "sum":
        return residual + output
    return residual if kind == "residual" else output


@dataclass(frozen=True, slots=True)
class _Module:
    """down: [width, hidden]. up: [hidden, width]. The biases of their widths."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    scale: float
    activation: str
    input: str

    def term(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        inner = f.linear(read_by(self.input, residual, output), self.down, self.down_bias)
        return self.scale * f.linear(ACTIVATIONS[self.activation](inner), self.up, self.up_bias)

    @property
    def size_bytes(self) -> int:
        parts = (self.down, self.down_bias, self.up, self.up_bias)
        return sum(part.numel() * part.element_size() for part in parts)


class Bottleneck:
    """`stream += s (up act(down v + b) + c)` for each segment."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, dict[tuple[str, int], _Module]] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        if modules:
            self._slots[slot] = {}

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            parts = {
                name: read(tensor).to(self._device, self._dtype, copy=True)
                for name, tensor in module.tensors.items()
            }
            activation, source = options_of(module)
            self._slots[slot][module.site, layer] = _Module(
                **parts, scale=module.scale, activation=activation, input=source
            )

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (it has no part at a site)
        return {}

    def plan_blocks(self, tokens: StepTokens) -> Mapping[str, BlockPlan]:
        blocks = {block for slot in tokens.active_slots for block, _ in self._slots.get(slot, ())}
        return {block: _Plan(block, tokens, self._slots) for block in blocks}

    @property
    def size_bytes(self) -> int:
        return sum(module.size_bytes for modules in self._slots.values() for module in modules.values())


@dataclass(frozen=True, slots=True)
class _Plan:
    block: str
    tokens: StepTokens
    slots: Mapping[int, Mapping[tuple[str, int], _Module]]

    def term(
        self,
        layer: int,
        residual: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor,  # noqa: ARG002 (a BlockPlan's)
    ) -> torch.Tensor:
        found = torch.zeros_like(output)
        for segment in self.tokens.segments:
            module = self.slots.get(segment.slot, {}).get((self.block, layer))
            if module is not None:
                rows = slice(segment.start, segment.end)
                found[rows] = module.term(residual[rows], output[rows])
        return found
