"""What a way through the base model offers, and which one a model takes."""

from typing import Protocol

import torch

from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward.int8 import check_int8
from adaptermesh.worker.engine.forward.linear import LinearKind
from adaptermesh.worker.engine.forward.llama import LEAN_ARCHITECTURES, LlamaForward
from adaptermesh.worker.engine.forward.passage import Passage
from adaptermesh.worker.engine.forward.plain import PlainForward
from adaptermesh.worker.engine.kv import KvCache


class Forward(Protocol):
    """Runs a packed batch through the base model and the adapters.

    `resumable`: it can stop between layers, so `start` may be called.
    """

    resumable: bool

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        """Fills the cache and gives the logits of the batch's outputs: [outputs, vocabulary] float32."""
        ...

    def start(self, batch: StepBatch, cache: KvCache) -> Passage:
        """Begins to run a batch, before its first layer. Its tokens' places in the cache are its own."""
        ...


def make_forward(base: Base, config: EngineConfig) -> Forward:
    """The lean path where the architecture has one and the config allows it, else the modules themselves."""
    lean = config.forward == "auto" and base.facts.architecture in LEAN_ARCHITECTURES
    int8 = config.quantization == "int8"
    if int8:
        check_int8(base, lean=lean)
    if lean:
        return LlamaForward(base, LinearKind(pack=config.pack_weights, int8=int8))
    return PlainForward(base, config.max_context_tokens)
