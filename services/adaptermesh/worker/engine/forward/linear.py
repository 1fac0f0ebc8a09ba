"""Matrix products with the base's weights."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from adaptermesh.worker.engine.forward.int8 import Int8Linear

PACKED_TOKENS = 48
"""Up to this many tokens the packed copy is faster; measured on two AVX-512 cores without AMX."""
_PACK_FOR = 16


class PackedLinear:
    """`x W^T + b`. Holds W as it is and, on a CPU, once more in the library's own layout for small batches.

    weight: [out, in]. The copy is made once; without it a product of few rows spends its time on repacking.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, pack: bool) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: torch.Tensor | None = None
        if pack and _can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_FOR)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        if self._packed is not None and 1 < x.shape[0] <= PACKED_TOKENS:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
            return y
        return linear(x, self.weight, self.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # The library knows the types of 16 bits on CPUs that do.
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


Linear = PackedLinear | Int8Linear
"""A base's product, whatever it holds its weights in."""


@dataclass(frozen=True, slots=True)
class LinearKind:
    """How the lean path holds the layers' matrices. `int8` wins over `pack`."""

    pack: bool
    int8: bool = False

    def join(self, modules: list[torch.nn.Linear]) -> Linear:
        """One product for modules that read the same input.

        The modules' weights become views of the joint one; with int8 they are given up, for they would be
        four fifths of the memory and nobody reads them.
        """
        weight = torch.cat([module.weight for module in modules])
        biases: list[torch.Tensor] = [module.bias for module in modules if module.bias is not None]
        bias = torch.cat(biases) if len(biases) == len(modules) else None
        start = 0
        for module in modules:
            end = start + module.out_features
            part = weight.new_empty(0) if self.int8 else weight[start:end]
            module.weight = torch.nn.Parameter(part, requires_grad=False)
            if bias is not None:
                module.bias = torch.nn.Parameter(bias[start:end], requires_grad=False)
            start = end
        return Int8Linear(weight, bias) if self.int8 else PackedLinear(weight, bias, pack=self.pack)
