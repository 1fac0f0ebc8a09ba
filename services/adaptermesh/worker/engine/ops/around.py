"""What adapters do around the layers: at the embeddings, at the last norm and at the head.

One adapter after the other, by torch: a step has few outputs, and rows without such an adapter pay nothing.
The embeddings are the product of one-hot rows with their weight, so that a low-rank change of them is a row
of A^T times B^T. Sources: LoRA (arXiv:2106.09685); trainable tokens of peft 0.21.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.ops import AFFINE, LOWRANK, TOKEN_ROWS
from adaptermesh.artifact.sites import EMBED, FINAL_NORM, SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.ops.affine import need_weights
from adaptermesh.worker.engine.ops.op import HeadProduct, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.replaced import NormChange, norm_change


@dataclass(slots=True)
class _Weights:
    """An adapter's changes of a weight [outputs, inputs]; for the embeddings [vocabulary, hidden].

    Attributes:
        whole: Another weight in its place, and its bias.
        rows: ids [n] in order, and the rows of the weight that are others, [n, hidden].
        lowrank: a [r, inputs] and b [outputs, r], the scale in it; at the embeddings a is [vocabulary, r].
        vectors: Of affine, by slot; the scale is in bias_delta.
    """

    whole: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rows: tuple[torch.Tensor, torch.Tensor] | None = None
    lowrank: tuple[torch.Tensor, torch.Tensor] | None = None
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    def embed(self, ids: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
        """ids: [tokens]. hidden: [tokens, hidden], changed in place; `scale`: of the base's embeddings."""
        if self.whole is not None:
            hidden.copy_(self.whole[ids] * scale)
        if self.rows is not None:
            known, rows = self.rows
            places = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
            own = (known[places] == ids).nonzero().squeeze(1)
            hidden.index_copy_(0, own, rows[places[own]] * scale)
        if self.lowrank is not None:
            a, b = self.lowrank
            hidden.add_(f.linear(a[ids], b), alpha=scale)

    def head(self, x: torch.Tensor, logits: torch.Tensor, product: HeadProduct) -> torch.Tensor:
        """x: [n, hidden], what the head reads. logits: [n, vocabulary], the base's of it -> the adapter's."""
        if "in_scale" in self.vectors:
            x = x * self.vectors["in_scale"]
            logits = product(x)
        if self.whole is not None:
            logits = f.linear(x, self.whole, self.bias).float()
        elif self.bias is not None:
            logits = logits + self.bias
        if self.rows is not None:
            known, rows = self.rows
            logits = logits.index_copy(1, known, f.linear(x, rows).float())
        if self.lowrank is not None:
            a, b = self.lowrank
            logits = logits + f.linear(f.linear(x, a), b)
        if "out_scale" in self.vectors:
            logits = logits * self.vectors["out_scale"]
        return logits + self.vectors["bias_delta"] if "bias_delta" in self.vectors else logits

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (part for part in (self.whole, self.bias) if part is not None)
        yield from (*(self.rows or ()), *(self.lowrank or ()), *self.vectors.values())


@dataclass(slots=True)
class _Adapter:
    embeddings: _Weights = field(default_factory=_Weights)
    head: _Weights = field(default_factory=_Weights)
    norm: NormChange | None = None

    @property
    def has_embeddings(self) -> bool:
        return any(True for _ in self.embeddings.tensors)

    @property
    def has_head(self) -> bool:
        return self.norm is not None or any(True for _ in self.head.tensors)

    def logits(self, x: torch.Tensor, logits: torch.Tensor, product: HeadProduct) -> torch.Tensor:
        if self.norm is not None:
            x = self.norm.of(x)
            logits = product(x)
        return self.head.head(x, logits, product)


class Around:
    """What the adapters of all slots have there."""

    def __init__(
        self, sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None
    ) -> None:
        self._sites = sites
        self._dtype = dtype
        self._device = device
        self._weights = weights
        self._slots: dict[int, _Adapter] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        """The room is taken when its size is known, with the layer that it is counted to."""
        if modules:
            self._slots[slot] = _Adapter()

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:  # noqa: ARG002 (its modules have their own)
        for module in modules:
            held = self._slots[slot]
            if module.site == FINAL_NORM:
                weights = need_weights(self._weights, "an adapter with a norm of its own")
                held.norm = norm_change(weights, module, read, self._sites.norm_offset, self._dtype)
            else:
                self._load(held.embeddings if module.site == EMBED else held.head, module, read)

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (an Op's)
        return {}

    def embeds(self, tokens: StepTokens) -> bool:
        found = (self._slots.get(slot) for slot in tokens.active_slots)
        return any(held is not None and held.has_embeddings for held in found)

    def embed(self, tokens: StepTokens, ids: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
        for segment in tokens.segments:
            held = self._slots.get(segment.slot)
            if held is not None and held.has_embeddings:
                own = slice(segment.start, segment.end)
                held.embeddings.embed(ids[own], hidden[own], scale)

    def head(
        self,
        tokens: StepTokens,
        normed: Callable[[torch.Tensor], torch.Tensor],
        product: HeadProduct,
        logits: torch.Tensor,
    ) -> None:
        for slot in tokens.active_slots:
            held = self._slots.get(slot)
            rows = tokens.outputs_of(slot) if held is not None and held.has_head else ()
            if held is not None and rows:
                own = torch.tensor(rows, device=logits.device)
                changed = held.logits(normed(own), logits[own].float(), product)
                logits[own] = changed.to(logits.dtype)

    @property
    def size_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for held in self._slots.values()
            for tensor in (
                *held.embeddings.tensors,
                *held.head.tensors,
                *(held.norm.tensors if held.norm else ()),
            )
        )

    def _load(self, held: _Weights, module: ModuleOp, read: TensorReader) -> None:
        own = {
            slot: read(name).to(self._device, self._dtype, copy=True) for slot, name in module.tensors.items()
        }
        if module.op == LOWRANK:
            a = own["A"].T.contiguous() if module.site == EMBED else own["A"]
            held.lowrank = a, own["B"] * module.scale
        elif module.op == AFFINE:
            if "bias_delta" in own:
                own["bias_delta"] = own["bias_delta"] * module.scale
            held.vectors = own
        elif module.op == TOKEN_ROWS:
            ids = torch.tensor(module.tokens, device=self._device)
            known, order = ids.sort()
            held.rows = known, own["rows"][order]
        else:
            held.whole, held.bias = own.get("weight"), own.get("bias")
