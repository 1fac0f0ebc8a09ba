"""Small tensors on their way to the device: page-locked, so that nobody waits for the copy."""

from collections.abc import Sequence

import torch


def to_device(
    values: torch.Tensor | Sequence[object], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Values of the host as a tensor on the device; a CUDA copy is queued and not waited for.

    The host's buffer may be let go at once: torch gives page-locked memory out again only when the copy is
    done.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
