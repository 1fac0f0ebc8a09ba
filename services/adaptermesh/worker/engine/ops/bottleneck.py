"""Bottlenecks beside a sub-layer, one adapter after the other, straight from the formula.

What torch computes them with, and the twin of the kernels'. Sources: Houlsby et al. (arXiv:1902.00751),
section 2.1; Pfeiffer et al. (arXiv:2005.00052), section 3.1; He et al. (arXiv:2110.04366), table 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import TensorReader
from adaptermesh.worker.engine.ops.segment_op import SegmentBlockOp

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


_SLOTS = ("down", "down_bias", "up", "up_bias")


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
class LoadedBottleneck:
    """down: [width, hidden]. up: [hidden, width]. The biases of their widths."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    scale: float
    activation: str
    input: str

    @classmethod
    def load(cls, module: ModuleOp, copy: TensorReader) -> "LoadedBottleneck":
        """Takes the tensors that every bottleneck has."""
        parts = {slot: copy(module.tensors[slot]) for slot in _SLOTS}
        activation, source = options_of(module)
        return cls(**parts, scale=module.scale, activation=activation, input=source)

    def term(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        inner = f.linear(read_by(self.input, residual, output), self.down, self.down_bias)
        return self.scale * f.linear(ACTIVATIONS[self.activation](inner), self.up, self.up_bias)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.down, self.down_bias, self.up, self.up_bias


class Bottleneck(SegmentBlockOp[LoadedBottleneck]):
    """`stream += s (up act(down v + b) + c)` for each segment."""

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        copy = self.copier(read)
        for module in modules:
            self.hold(slot, module.site, layer, LoadedBottleneck.load(module, copy))
