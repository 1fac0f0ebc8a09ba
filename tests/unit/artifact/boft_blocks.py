"""peft's BOFT makes more than one factor only with its CUDA extension, which is tried for once a process."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.boft import layer


@contextmanager
def stand_in() -> Iterator[None]:
    """What the extension does, in torch: blocks [factors, count, n, n] -> [factors, count n, count n]."""
    extension = SimpleNamespace(
        forward=lambda blocks: [torch.stack([torch.block_diag(*factor) for factor in blocks])]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_FBD_CUDA", extension)
        yield
