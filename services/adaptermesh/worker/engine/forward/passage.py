"""A batch on its way through the layers."""

from typing import Protocol

import torch

from adaptermesh.worker.engine.slots import AdapterPlan


class Passage(Protocol):
    """Keeps its tokens' hidden states between two calls; other batches may pass in between."""

    def advance(self, until: int, adapters: AdapterPlan) -> None:
        """Computes the layers up to `until`, the first one not included, that are not computed yet.

        `adapters` is the batch's plan as of now: its views of the slots may have moved since the last call.
        """
        ...

    def logits(self) -> torch.Tensor:
        """The logits of the batch's outputs, after all layers: [outputs, vocabulary] float32."""
        ...
