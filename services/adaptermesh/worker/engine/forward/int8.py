"""Matrix products with the base's weights in 8 bits: a quarter of the bytes, and integer units are faster."""

import platform

import torch

from adaptermesh.core.errors import invalid_field
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.native.build import cpu_features

_LARGEST = 127
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_TINY = 1e-12
"""Keeps the scale of a token of zeros from being zero."""


class Int8Linear:
    """`x W^T + b` with W in int8, one scale for each output, and x in int8, one scale for each token.

    Each token has its own scale, so its result does not depend on what else is in the batch. The product is
    exact in int32, what is lost is in the two roundings. Source: LLM.int8() (arXiv:2208.07339), section 2.1,
    without the part for outliers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out, in] float32; it is not kept."""
        self._scales = weight.abs().amax(1).div_(_LARGEST).clamp_(min=_TINY)
        rounded = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] float32 -> [tokens, out] float32."""
        scales = x.abs().amax(-1, keepdim=True).mul_(1 / _LARGEST).clamp_(min=_TINY)
        rounded = (x / scales).round_().to(torch.int8)
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            0,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        y.mul_(scales)
        return y if self._bias is None else y.add_(self._bias)


def int8_is_exact() -> bool:
    """Whether sums of products of bytes are exact here.

    An x86 CPU without VNNI adds pairs of products in 16 bits, which overflow at a fixed bound: oneDNN's
    results are then wrong wherever weights and inputs are large.
    """
    return platform.machine() != "x86_64" or not _VNNI.isdisjoint(cpu_features())


def check_int8(base: Base, *, lean: bool) -> None:
    """Raises MeshError INVALID_ARGUMENT (INVALID_FIELD) unless this base can be computed in int8 here."""
    if base.device.type != "cpu" or base.dtype != torch.float32:
        problem = f"needs a CPU and float32, not {base.device.type} and {base.dtype}"
    elif not lean:
        problem = f"needs the lean forward, which {base.facts.architecture} does not take"
    elif not torch.backends.mkldnn.is_available():
        problem = "needs a torch that was built with oneDNN"
    elif not int8_is_exact():
        problem = "needs a CPU with VNNI"
    else:
        return
    raise invalid_field("quantization", f"int8 {problem}")
