"""What adapters put in front of prompts: embeddings of virtual tokens, or their keys and values.

Neither acts at a site of a layer: the first takes the place of rows of the embedding, the second is written
into the KV cache. Both are needed only until the virtual tokens are in the cache.
"""

from collections.abc import Mapping, Sequence

import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.ops import KV_PREFIX, PROMPT
from adaptermesh.worker.engine.ops.op import SitePlan, StepTokens, TensorReader

WITHOUT_SITES = frozenset({PROMPT, KV_PREFIX})
"""The kinds of op that are here: no product of a layer knows of them."""


class PromptRows:
    """The embeddings of all slots."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, torch.Tensor] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """The room is taken when its size is known, with the first layer."""

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:  # noqa: ARG002 (its one module is of the first layer)
        for module in modules:
            self._slots[slot] = read(module.tensors["E"]).to(self._device, self._dtype, copy=True)

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (an Op's)
        return {}

    @property
    def size_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._slots.values())

    def rows(self, slot: int, start: int, end: int) -> torch.Tensor:
        """[end - start, hidden]: the embeddings of some virtual tokens."""
        return self._slots[slot][start:end]


class PrefixRows:
    """The keys and values of all slots, by layer as the cache has them: [tokens, 2 * kv_heads, head_dim]."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, dict[int, torch.Tensor]] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """The room is taken when its size is known, layer by layer."""
        if modules:
            self._slots[slot] = {}

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        for module in modules:
            parts = [
                read(module.tensors[name]).to(self._device, self._dtype, copy=True) for name in ("k", "v")
            ]
            self._slots[slot][layer] = torch.cat(parts).transpose(0, 1).contiguous()

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (an Op's)
        return {}

    @property
    def size_bytes(self) -> int:
        return sum(rows.nbytes for layers in self._slots.values() for rows in layers.values())

    def rows(self, slot: int, layer: int, start: int, end: int) -> torch.Tensor:
        """[end - start, 2 * kv_heads, head_dim]: the keys and values of some virtual tokens."""
        return self._slots[slot][layer][start:end]
