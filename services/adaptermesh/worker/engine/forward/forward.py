"""What a way through the base model offers, and which one a model takes."""

from typing import Protocol

import torch

from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward.llama import LEAN_ARCHITECTURES, LlamaForward
from adaptermesh.worker.engine.forward.plain import PlainForward
from adaptermesh.worker.engine.kv import KvCache


class Forward(Protocol):
    """Runs a packed batch through the base model and the adapters."""

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        """Fills the cache and gives the logits of the batch's outputs: [outputs, vocabulary] float32."""
        ...


def make_forward(base: Base, config: EngineConfig) -> Forward:
    """The lean path where the architecture has one and the config allows it, else the modules themselves."""
    if config.forward == "auto" and base.facts.architecture in LEAN_ARCHITECTURES:
        return LlamaForward(base, pack=config.pack_weights)
    return PlainForward(base, config.max_context_tokens)
