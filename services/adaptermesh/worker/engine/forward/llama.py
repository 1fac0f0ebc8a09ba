"""A lean path for the Llama family: the same weights and formulas with few Python steps a layer.

q, k and v are one product, gate and up are one product; the rotation is in place; keys and values of a layer
are stored by one write. The sites' outputs are column ranges of the joint products, so adapters add in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.forward.linear import Linear, LinearKind, PackedLinear
from adaptermesh.worker.engine.forward.passage import Passage
from adaptermesh.worker.engine.forward.weights import BaseWeights, ModuleWeights
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.slots import AdapterPlan

_LEAN_ARCHITECTURES = frozenset({"LlamaForCausalLM"})


def is_lean(base: Base) -> bool:
    """Whether this path computes the base."""
    return base.facts.architecture in _LEAN_ARCHITECTURES and base.model.config.hidden_act == "silu"


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of one layer."""

    norm_in: torch.Tensor
    qkv: Linear
    o: Linear
    norm_mid: torch.Tensor
    gate_up: Linear
    inner: int
    down: Linear


class LlamaForward:
    """The lean path. `base.model`'s own weights become views of the joint ones: it stays usable.

    Not with int8, where the layers' matrices are given up. The head stays in the computing dtype: it is one
    product in many and the one whose errors reach the tokens directly.
    """

    heads_apart = False

    def __init__(self, base: Base, linears: LinearKind) -> None:
        config = base.model.config
        decoder = base.model.model
        self._layers = [_read_layer(layer, linears) for layer in decoder.layers]
        self._embeddings = decoder.embed_tokens.weight
        self._norm = decoder.norm.weight
        self._head = PackedLinear(base.model.lm_head.weight, base.model.lm_head.bias, pack=linears.pack)
        self._rotary = decoder.rotary_emb
        self._eps = config.rms_norm_eps
        self._hidden = (config.hidden_size,)
        self._heads = config.num_attention_heads
        self._kv_heads = base.kv_heads
        self._dim = base.head_dim
        self._scaling = self._dim**-0.5
        self._weights = None if linears.int8 else ModuleWeights(base)

    @property
    def weights(self) -> BaseWeights | None:
        return self._weights

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        passage = self.start(batch, cache)
        passage.advance(len(self._layers), batch.adapters)
        return passage.logits()

    def start(self, batch: StepBatch, cache: KvCache) -> Passage:
        hidden = batch.adapters.embed(batch.token_ids, self._embeddings[batch.token_ids])
        hidden = batch.adapters.enter(batch.with_virtual(hidden))
        return _LlamaPassage(self, batch, cache, hidden, self._rotation(hidden, batch.positions))

    def layers(
        self,
        part: range,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: StepBatch,
        cache: KvCache,
    ) -> torch.Tensor:
        """hidden: [tokens, hidden] before the layers of `part` -> the same after them."""
        cos, sin = rotation
        for index in part:
            layer = self._layers[index]
            x = rms_norm(hidden, self._hidden, layer.norm_in, self._eps)
            out = self._attention(index, layer, x, cos, sin, batch, cache)
            hidden = _join(batch.adapters, "attention", index, hidden, out)
            x = rms_norm(hidden, self._hidden, layer.norm_mid, self._eps)
            out = _feed_forward(index, layer, x, batch.adapters)
            hidden = _join(batch.adapters, "ffn", index, hidden, out)
        return hidden

    def head(self, hidden: torch.Tensor, adapters: AdapterPlan) -> torch.Tensor:
        """hidden: [outputs, hidden] -> [outputs, vocabulary] float32."""
        x = rms_norm(hidden, self._hidden, self._norm, self._eps)

        def product(x: torch.Tensor) -> torch.Tensor:
            return self._head(x).float()

        return adapters.head(lambda rows: x[rows], product, product(x))

    def _rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, 1, d] each; the sine's first half is negated, so that a roll does for `rotate_half`."""
        cos, sin = self._rotary(hidden, positions[None])
        sin = sin[0].clone()
        sin[:, : self._dim // 2].neg_()
        return cos[0].unsqueeze(1), sin.unsqueeze(1)

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: StepBatch,
        cache: KvCache,
    ) -> torch.Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        adapters = batch.adapters
        q_end, k_end = heads * dim, (heads + kv_heads) * dim
        parts = {"q": slice(0, q_end), "k": slice(q_end, k_end), "v": slice(k_end, None)}
        qkv = _joint(layer.qkv, parts, index, x, adapters)
        by_head = qkv.view(-1, heads + 2 * kv_heads, dim)
        rotated = by_head[:, : heads + kv_heads]
        half = rotated.roll(dim // 2, -1)
        rotated.mul_(cos).addcmul_(half, sin)
        mixed = batch.attention.attend(cache, index, by_head[:, :heads], by_head[:, heads:], self._scaling)
        mixed = adapters.input_of("o", index, mixed)
        out = layer.o(mixed)
        adapters.apply("o", index, mixed, out)
        return out


class _LlamaPassage:
    """A batch of the lean path between two layers."""

    def __init__(
        self,
        forward: LlamaForward,
        batch: StepBatch,
        cache: KvCache,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._forward = forward
        self._batch = batch
        self._cache = cache
        self._hidden = hidden
        self._rotation = rotation
        self._done = 0
        self._adapters = batch.adapters

    def advance(self, until: int, adapters: AdapterPlan) -> None:
        batch, part = replace(self._batch, adapters=adapters), range(self._done, until)
        self._hidden = self._forward.layers(part, self._hidden, self._rotation, batch, self._cache)
        self._done = max(until, self._done)
        self._adapters = adapters

    def logits(self) -> torch.Tensor:
        return self._forward.head(self._hidden.index_select(0, self._batch.outputs), self._adapters)


def _joint(
    linear: Linear, parts: Mapping[str, slice], index: int, x: torch.Tensor, adapters: AdapterPlan
) -> torch.Tensor:
    """One product of several sites, each with its adapters. x: [tokens, in] -> [tokens, all outputs].

    `parts` has the columns of each site. A site whose input adapters change gets a product of its own, of
    which the other columns are not used.
    """
    y = linear(x)
    for site, columns in parts.items() if adapters.sites or adapters.inputs else ():
        own = x
        if site in adapters.inputs:
            own = adapters.input_of(site, index, x)
            y[:, columns] = linear(own)[:, columns]
        adapters.apply(site, index, own, y[:, columns])
    return y


def _join(
    adapters: AdapterPlan, block: str, index: int, residual: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """The stream after a sub-layer; `output` may be changed. All: [tokens, hidden]."""
    term = adapters.term(block, index, residual, output) if adapters.blocks else None
    stream = output.add_(residual)
    return stream if term is None else stream.add_(term)


def _feed_forward(index: int, layer: _Layer, x: torch.Tensor, adapters: AdapterPlan) -> torch.Tensor:
    """x: [tokens, hidden] -> [tokens, hidden]."""
    width = layer.inner
    parts = {"gate": slice(0, width), "up": slice(width, None)}
    gate_up = _joint(layer.gate_up, parts, index, x, adapters)
    inner = silu(gate_up[:, :width]).mul_(gate_up[:, width:])
    inner = adapters.input_of("down", index, inner)
    out = layer.down(inner)
    adapters.apply("down", index, inner, out)
    return out


def _read_layer(layer: Any, linears: LinearKind) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        norm_in=layer.input_layernorm.weight,
        qkv=linears.join([attention.q_proj, attention.k_proj, attention.v_proj]),
        o=linears.join([attention.o_proj]),
        norm_mid=layer.post_attention_layernorm.weight,
        gate_up=linears.join([mlp.gate_proj, mlp.up_proj]),
        inner=mlp.gate_proj.out_features,
        down=linears.join([mlp.down_proj]),
    )
