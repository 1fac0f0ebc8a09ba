"""The path of the Llama family through the kernels in C++: one call a step, whatever the adapters.

A token's result does not depend on what else is in its batch, to the last bit: sums go in one order
everywhere.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import rms_norm

from adaptermesh.artifact.sites import Site
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.forward.panels import Panels, Weight
from adaptermesh.worker.engine.forward.passage import Passage
from adaptermesh.worker.engine.forward.stages import StagedLayers
from adaptermesh.worker.engine.forward.weights import BaseWeights, norm_weights
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.native.build import NoKernels
from adaptermesh.worker.engine.native.library import (
    SITES,
    STAGES,
    Adapters,
    Bottlenecks,
    Kernels,
    Layer,
    Matrix,
    Model,
    Scales,
    Step,
)
from adaptermesh.worker.engine.ops.affine import Affine
from adaptermesh.worker.engine.ops.bottleneck_native import NativeBottleneck
from adaptermesh.worker.engine.ops.lowrank_native import NativeLowRank
from adaptermesh.worker.engine.slots import AdapterPlan

NATIVE_ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)

# Of attention.h.
_MAX_HEAD_DIM = 256
_REACH = 512
_WIDTH = 8
# The ops that the kernels know.
_KINDS = ("lowrank", "affine", "bottleneck")
_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


class NativeForward:
    """Holds the packed weights; `base.model` gives its layers' matrices up, for they would be there twice.

    Raises:
        NoKernels: The kernels can't compute this base; the message says why.
    """

    heads_apart = True

    def __init__(self, base: Base, kernels: Kernels | None, block_tokens: int) -> None:
        kernels = _check(base, kernels, block_tokens)
        self._kernels = kernels
        self._base = base
        self._decoder = base.model.model
        self._embeddings = self._decoder.embed_tokens.weight
        self._layers = (Layer * base.sites.num_layers)()
        self._keep: list[torch.Tensor] = []
        self._model = self._read_model(block_tokens)
        self._scratch = torch.empty(0)
        self._cache: KvCache | None = None
        self._threads = torch.get_num_threads()
        # What is left to torch is small, and its waiting threads would take the cores from the kernels' own.
        torch.set_num_threads(1)

    @property
    def weights(self) -> BaseWeights:
        return _PanelWeights(self._base, self._panels, self._kernels, self._threads)

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        passage = self.start(batch, cache)
        passage.advance(len(self._layers), batch.adapters)
        return passage.logits()

    def start(self, batch: StepBatch, cache: KvCache) -> Passage:
        self._use_cache(cache)
        hidden = batch.adapters.embed(batch.token_ids, self._embeddings[batch.token_ids])
        hidden = batch.adapters.enter(batch.with_virtual(hidden))
        cos, sin = self._decoder.rotary_emb(hidden, batch.positions[None])
        outputs = batch.outputs.to(torch.int32)
        logits = torch.empty(len(outputs), self._model.vocabulary)
        spans, tables = _pack_spans(batch)
        step = Step(
            hidden=hidden.data_ptr(),
            cosines=cos.data_ptr(),
            sines=sin.data_ptr(),
            spans=spans.ctypes.data,
            tables=tables.ctypes.data,
            outputs=outputs.data_ptr(),
            logits=logits.data_ptr(),
            tokens=len(hidden),
            span_count=len(spans),
            output_count=len(outputs),
            threads=self._threads,
        )
        return _NativePassage(self, batch, step, hidden, logits, (cos, sin, spans, tables, outputs))

    def compute(self, step: Step, hidden: torch.Tensor, until: int, adapters: AdapterPlan) -> None:
        """The layers of a step from its last one up to `until`, and the head after all of them."""
        scratch = self._scratch_for(step.tokens)
        step.scratch = scratch.data_ptr()
        held = _pack_adapters(adapters, step)
        others = _others(adapters)
        if others is None:
            step.first_layer, step.last_layer = step.last_layer, until
            step.first_stage, step.last_stage, step.moved, step.apart = 0, len(STAGES), 0, 0
            step.head = until == len(self._layers)
            self._kernels.run(self._model, step)
        else:
            layers = range(step.last_layer, until)
            StagedLayers(self._kernels, self._model, step, hidden, scratch, others).run(layers)
            if until == len(self._layers):
                step.first_layer = step.last_layer
                step.head = True
                self._kernels.run(self._model, step)
        # What the step points to must outlive it.
        del held

    def head(self, batch: StepBatch, hidden: torch.Tensor, logits: torch.Tensor, plan: AdapterPlan) -> None:
        """What adapters do to the logits of the kernels. hidden: [tokens, hidden], after all layers."""
        weight, epsilon = self._decoder.norm.weight, self._base.model.config.rms_norm_eps
        head, vocabulary = self._panels.matrices[-1], self._model.vocabulary
        bias = self._panels.biases[-1]

        def normed(rows: torch.Tensor) -> torch.Tensor:
            return rms_norm(hidden[batch.outputs[rows]], weight.shape, weight, epsilon)

        def product(x: torch.Tensor) -> torch.Tensor:
            found = self._kernels.project(head, x, vocabulary, self._threads)
            return found if bias is None else found.add_(bias)

        plan.head(normed, product, logits)

    def _use_cache(self, cache: KvCache) -> None:
        if self._cache is not cache:
            for layer, data in zip(self._layers, cache.data, strict=True):
                layer.cache = data.data_ptr()
            self._cache = cache

    def _scratch_for(self, tokens: int) -> torch.Tensor:
        need = self._kernels.scratch_floats(self._model, tokens)
        if need > len(self._scratch):
            self._scratch = torch.empty(need)
        return self._scratch

    def _read_model(self, block_tokens: int) -> Model:
        config, model = self._base.model.config, self._base.model
        matrices = [Weight.of(module) for layer in self._decoder.layers for module in _matrices_of(layer)]
        self._panels = Panels(self._kernels, [*matrices, Weight.of(model.lm_head)])
        found = iter(self._panels.matrices)
        for layer, held in zip(self._decoder.layers, self._layers, strict=True):
            self._read_layer(layer, held, found)
        return Model(
            layers=self._layers,
            norm_out=self._pointer(self._decoder.norm.weight),
            head=next(found),
            layer_count=len(self._layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=self._base.kv_heads,
            dim=self._base.head_dim,
            inner=config.intermediate_size,
            vocabulary=model.lm_head.weight.shape[0],
            block=block_tokens,
            sites=_site_places(self._base),
            window=_window(self._base),
            epsilon=config.rms_norm_eps,
            scaling=self._base.head_dim**-0.5,
        )

    def _read_layer(self, layer: Any, held: Layer, found: Iterator[Matrix]) -> None:
        attention = layer.self_attn
        held.norm_in = self._pointer(layer.input_layernorm.weight)
        held.norm_mid = self._pointer(layer.post_attention_layernorm.weight)
        if hasattr(attention, "q_norm"):
            held.q_norm = self._pointer(attention.q_norm.weight)
            held.k_norm = self._pointer(attention.k_norm.weight)
        for site, module in zip(SITES, _matrices_of(layer), strict=True):
            setattr(held, site, next(found))
            module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)

    def _pointer(self, weight: torch.Tensor) -> int:
        weight = weight.contiguous()
        self._keep.append(weight)
        return weight.data_ptr()


class _PanelWeights:
    """The base's weights out of the panels; those of one layer are in the order of SITES."""

    def __init__(self, base: Base, panels: Panels, kernels: Kernels, threads: int) -> None:
        self._base = base
        self._panels = panels
        self._kernels = kernels
        self._threads = threads

    def squares(self, site: Site, layer: int) -> torch.Tensor:
        return self._panels.values(_place(site, layer)).square().sum(1).flatten()[: site.out_features]

    def project(self, site: Site, layer: int, a: torch.Tensor) -> torch.Tensor:
        matrix = self._panels.matrices[_place(site, layer)]
        return self._kernels.project(matrix, a, site.out_features, self._threads).T

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        return self._panels.biases[_place(site, layer)]

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return norm_weights(self._base, site, layer)


def _place(site: Site, layer: int) -> int:
    return layer * len(SITES) + SITES.index(site.name)


class _NativePassage:
    """A step between two layers. `held` is what it points to."""

    def __init__(
        self,
        forward: NativeForward,
        batch: StepBatch,
        step: Step,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        held: object,
    ) -> None:
        self._forward = forward
        self._batch = batch
        self._step = step
        self._hidden = hidden
        self._logits = logits
        self._held = held
        self._adapters = batch.adapters

    def advance(self, until: int, adapters: AdapterPlan) -> None:
        if until > self._step.last_layer:
            self._forward.compute(self._step, self._hidden, until, adapters)
        self._adapters = adapters

    def logits(self) -> torch.Tensor:
        self._forward.head(self._batch, self._hidden, self._logits, self._adapters)
        return self._logits


def _check(base: Base, kernels: Kernels | None, block_tokens: int) -> Kernels:
    config = base.model.config
    if base.device.type != "cpu" or base.dtype != torch.float32:
        raise NoKernels(f"they compute on a CPU in float32, not on {base.device.type} in {base.dtype}")
    if kernels is None:
        raise NoKernels("there are none here")
    if base.facts.architecture not in NATIVE_ARCHITECTURES:
        raise NoKernels(f"they don't compute {base.facts.architecture}")
    if config.hidden_act != "silu":
        raise NoKernels(f"they compute silu, the model wants {config.hidden_act}")
    if base.head_dim % _WIDTH or base.head_dim > _MAX_HEAD_DIM:
        raise NoKernels(f"heads of {base.head_dim} are no multiple of {_WIDTH} up to {_MAX_HEAD_DIM}")
    if block_tokens % _WIDTH or _REACH % block_tokens:
        raise NoKernels(f"blocks of {block_tokens} tokens are no multiple of {_WIDTH} that divides {_REACH}")
    if config.num_attention_heads % base.kv_heads:
        raise NoKernels(f"{config.num_attention_heads} heads don't share {base.kv_heads} key heads evenly")
    if 2 * base.model.model.rotary_emb.inv_freq.numel() != base.head_dim:
        raise NoKernels("its heads are turned in part only")
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        raise NoKernels("its layers differ in what they see")
    return kernels


def _site_places(base: Base) -> Any:
    """Where each of SITES stands in the tables of the low-rank op."""
    names = [site.name for site in base.sites.sites]
    return (ctypes.c_int32 * len(SITES))(*(names.index(name) for name in SITES))


def _window(base: Base) -> int:
    """Positions that a token sees, itself included; 0: all.

    As transformers has it: a Llama has no window, whatever its config says, a Mistral has the one of its
    config, and a Qwen has it in the layers that are called sliding.
    """
    config = base.model.config
    windowed = {
        "LlamaForCausalLM": False,
        "MistralForCausalLM": True,
    }.get(base.facts.architecture, "sliding_attention" in (getattr(config, "layer_types", None) or []))
    return int(config.sliding_window or 0) if windowed else 0


def _matrices_of(layer: Any) -> list[Any]:
    """The modules of a layer in the order of SITES."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def _pack_spans(batch: StepBatch) -> tuple[_Ints, _Ints]:
    """[spans, 4] (first token, count, past, start of its blocks), and all blocks one after the other."""
    rows: list[tuple[int, int, int, int]] = []
    tables: list[int] = []
    first = 0
    for span in batch.spans:
        rows.append((first, span.count, span.past, len(tables)))
        tables.extend(span.blocks)
        first += span.count
    if first != len(batch.token_ids):
        raise ValueError(f"the spans have {first} tokens, the batch {len(batch.token_ids)}")
    return np.array(rows, np.int32).reshape(-1, 4), np.array(tables, np.int32)


def _pack_adapters(plan: AdapterPlan, step: Step) -> object:
    """Writes the adapters' part of the step that the kernels know; returns what it points to."""
    step.adapters, step.scales, step.bottlenecks = Adapters(), Scales(), Bottlenecks()
    if not plan.tokens.active_slots:
        return None
    lowrank, affine, bottleneck = (plan.ops.get(kind) for kind in _KINDS)
    if (
        not isinstance(lowrank, NativeLowRank)
        or not isinstance(affine, Affine)
        or not isinstance(bottleneck, NativeBottleneck)
    ):
        # An op that is passed over would answer with the base.
        kinds = ", ".join(sorted(kind for kind in plan.ops if kind in _KINDS))
        raise MeshError(Code.INTERNAL, Reason.INTERNAL, f"the native forward does not compute {kinds}")
    rows, scales, beside = (
        lowrank.rows_of(plan.tokens),
        affine.scales_of(plan.tokens),
        bottleneck.rows_of(plan.tokens),
    )
    step.adapters, step.bottlenecks = rows.adapters, beside.bottlenecks
    if scales is not None:
        step.scales = scales[0]
    return rows, scales, beside


def _others(plan: AdapterPlan) -> AdapterPlan | None:
    """The part that the kernels don't know; None if they know it all."""
    others = {kind: op for kind, op in plan.ops.items() if kind not in _KINDS}
    found = AdapterPlan(plan.tokens, others, plan.waits)
    return found if others and (found.sites or found.inputs or found.blocks) else None
