"""One step's packed batch, as tensors."""

from dataclasses import dataclass

import torch

from adaptermesh.worker.engine.attention import StepAttention
from adaptermesh.worker.engine.slots import AdapterPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tokens of all rows, one after the other: decodes first, then prefill chunks.

    token_ids, positions: [tokens] int64.
    outputs: [rows that sample] int64, the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor
    attention: StepAttention
    adapters: AdapterPlan
