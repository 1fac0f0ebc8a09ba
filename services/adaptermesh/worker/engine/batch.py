"""One step's packed batch: as the host writes it, and as tensors."""

from dataclasses import dataclass

import torch

from adaptermesh.worker.engine.attention import Span, StepAttention
from adaptermesh.worker.engine.ops.op import StepTokens
from adaptermesh.worker.engine.slots import AdapterPlan
from adaptermesh.worker.engine.virtual import VirtualRows, VirtualSpan


@dataclass(frozen=True, slots=True)
class HostStep:
    """Tokens of all rows, one after the other: decodes first, then prefill chunks.

    `slots` has that of each row's last token, -1 for the base. `outputs` are the tokens whose logits are
    wanted. The `virtual` tokens have ids without meaning.
    """

    token_ids: list[int]
    positions: list[int]
    outputs: list[int]
    spans: tuple[Span, ...]
    slots: tuple[int, ...]
    decodes: int
    tokens: StepTokens
    virtual: tuple[VirtualSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The same on the device.

    token_ids, positions: [tokens] int64.
    spans: the sequences' tokens, in order, for who attends by himself; none in a recorded step.
    outputs: [outputs] int64, the tokens whose logits are wanted: the last one of each row that samples, in
        the order of the rows, then those that come before a prompt token to score.
    virtual: the embeddings of adapters' virtual tokens; None without any.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor
    attention: StepAttention
    adapters: AdapterPlan
    spans: tuple[Span, ...] = ()
    virtual: VirtualRows | None = None

    def with_virtual(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [tokens, hidden], the embeddings of the tokens -> the same with those of virtual tokens."""
        if self.virtual is not None:
            self.virtual.put(hidden)
        return hidden
