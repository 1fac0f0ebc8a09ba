"""The base's matrices in the layout of the kernels, in one piece of memory on large pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaptermesh.worker.engine.native.library import BFLOAT16, FLOAT32, Kernels, Matrix
from adaptermesh.worker.engine.native.memory import page_memory

_ALIGNMENT = 64
_LOW_BITS = 0xFFFF


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix of the base: [out, in], and its bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, module: torch.nn.Linear) -> "Weight":
        return cls(module.weight, module.bias)


class Panels:
    """Packs matrices; must live as long as they are used.

    A matrix whose values are all bfloat16 numbers, as those of most published models are, is stored as such:
    half the bytes to read in every step. The products widen them again, so nothing is lost.
    """

    def __init__(self, kernels: Kernels, weights: Sequence[Weight]) -> None:
        self._kernels = kernels
        self.biases = [one.bias for one in weights]
        self._padded: list[torch.Tensor] = []
        kinds = [FLOAT32 if _needs_float32(one.weight) else BFLOAT16 for one in weights]
        sizes = [self._size(one.weight, kind) for one, kind in zip(weights, kinds, strict=True)]
        self._memory = page_memory(sum(sizes))
        start = 0
        self._parts: list[torch.Tensor] = []
        self.matrices: list[Matrix] = []
        for one, kind, size in zip(weights, kinds, sizes, strict=True):
            self._parts.append(self._memory[start : start + size])
            self.matrices.append(self._pack(one, kind, self._parts[-1]))
            start += size

    @property
    def size_bytes(self) -> int:
        return len(self._memory)

    def values(self, place: int) -> torch.Tensor:
        """A matrix in float32: [panels, in, outputs of a panel]; the last panel is filled up with zeros."""
        matrix, panel = self.matrices[place], self._kernels.panel
        dtype = torch.float32 if matrix.kind == FLOAT32 else torch.bfloat16
        shape = (matrix.panel_count, matrix.inputs, panel)
        values = self._parts[place][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        if matrix.kind == FLOAT32:
            return values
        # There the two halves of a panel's outputs are in pairs.
        return values.view(*shape[:2], panel // 2, 2).transpose(2, 3).float().reshape(shape)

    def _size(self, weight: torch.Tensor, kind: int) -> int:
        count = self._kernels.panels(weight.shape[0]) * self._kernels.panel * weight.shape[1]
        return -(-count * (4 if kind == FLOAT32 else 2) // _ALIGNMENT) * _ALIGNMENT

    def _pack(self, one: Weight, kind: int, to: torch.Tensor) -> Matrix:
        outputs, inputs = one.weight.shape
        self._kernels.pack(one.weight, kind, to)
        panels = self._kernels.panels(outputs)
        bias = None
        if one.bias is not None:
            bias = one.bias.new_zeros(panels * self._kernels.panel)
            bias[:outputs] = one.bias
            self._padded.append(bias)
        return Matrix(to.data_ptr(), None if bias is None else bias.data_ptr(), kind, inputs, panels)


def _needs_float32(weight: torch.Tensor) -> bool:
    return bool((weight.contiguous().view(torch.int32) & _LOW_BITS).any())
