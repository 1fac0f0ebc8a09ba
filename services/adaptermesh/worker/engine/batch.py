"""One step's packed batch, as tensors."""

from dataclasses import dataclass

import torch

from adaptermesh.worker.engine.attention import AttentionPlan
from adaptermesh.worker.engine.slots import AdapterPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tokens of all rows, one after the other: decodes first, then prefill chunks.

    token_ids, positions: [tokens] int64.
    outputs: [outputs] int64, the tokens whose logits are wanted: the last one of each row that samples, in
        the order of the rows, then those that come before a prompt token to score.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor
    attention: AttentionPlan
    adapters: AdapterPlan
