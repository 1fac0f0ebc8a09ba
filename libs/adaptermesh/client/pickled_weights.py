"""Pickled weights of the `adapters` library, made safetensors before they are uploaded.

That library pickles unless it is told otherwise, and some of its methods it can save in no other way. The
server opens no pickle; here, on the machine of the one who trusts the file, torch reads it with
`weights_only`, which builds tensors and nothing else.
"""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adaptermesh.core.errors import Code, MeshError, Reason

CONVERTED: Mapping[str, str] = MappingProxyType(
    {
        "pytorch_adapter.bin": "adapter.safetensors",
        "pytorch_model_head.bin": "model_head.safetensors",
        "pytorch_model_adapter_fusion.bin": "model_adapter_fusion.safetensors",
    }
)
"""What each of that library's pickles is called as safetensors."""

# What torch's unpickler raises, on purpose or by stumbling over a file that is none.
_NOT_READ = (
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def convert(pickled: Path, target: Path) -> None:
    """Writes the tensors of a pickle as safetensors. The same tensors give the same bytes. Blocks.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD): torch is not installed, or the file holds anything else.
    """
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError:
        raise _invalid(
            pickled,
            "are a pickle, and torch and safetensors, which would convert it, are not installed here; "
            "install both, or save the adapter again with save_adapter(..., use_safetensors=True)",
        ) from None
    try:
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    except _NOT_READ as error:
        first = str(error).strip().partition("\n")[0]
        raise _invalid(pickled, f"can't be read as tensors and nothing else: {first[:200]}") from None
    if not _is_tensors(found, torch.Tensor):
        raise _invalid(pickled, "hold something else than tensors by their names")
    # A module that is in the model twice has its tensors twice, in one memory: safetensors wants two.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, target)


def _is_tensors(found: Any, kind: type) -> bool:
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, kind) for name, tensor in found.items()
    )


def _invalid(pickled: Path, why: str) -> MeshError:
    return MeshError(
        Code.INVALID_ARGUMENT,
        Reason.INVALID_UPLOAD,
        f"the weights in '{pickled}' {why}",
        metadata={"folder": str(pickled.parent)},
    )
