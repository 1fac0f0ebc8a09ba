"""Through the modules of transformers: right for any decoder with a module map, the twin of the lean path.

Attention is ours by transformers' attention interface: the model hands each layer's queries, keys and values
to `paged_attention`, with the step as a keyword argument that travels through the model untouched. Adapters
act through a hook on each module that holds sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AttentionInterface

from adaptermesh.artifact.sites import Site
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.attention import Span, plan_attention
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.forward.weights import BaseWeights, ModuleWeights
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.slots import AdapterPlan

ATTENTION_NAME = "adaptermesh_paged"

# What models pass on to attention without meaning for it: no dropout is left after `eval`, and the batch has
# its own positions and cache.
_WITHOUT_MEANING = frozenset({"dropout", "position_ids", "use_cache"})


@dataclass(slots=True)
class _Step:
    """The step that runs; the hooks of the sites read it."""

    batch: StepBatch | None = None


class PlainForward:
    """Runs a packed batch as one sequence of [1, tokens] through the model, whose loop can't stop.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for a model that would be computed wrong.
    """

    heads_apart = False

    def __init__(self, base: Base) -> None:
        self._base = base
        self._model = base.model
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._step = _Step()
        self._model.get_input_embeddings().register_forward_hook(_embedding_hook(self._step))
        self._model.get_output_embeddings().register_forward_hook(_head_hook(self._step))
        first = base.model.get_submodule(base.sites.layer_path.replace("{layer}", "0"))
        first.register_forward_pre_hook(_stream_hook(self._step))
        for pattern, sites in base.sites.modules.items():
            for layer in range(base.sites.num_layers):
                module = base.model.get_submodule(pattern.replace("{layer}", str(layer)))
                module.register_forward_pre_hook(_input_hook(self._step, sites[0], layer))
                module.register_forward_hook(_site_hook(self._step, sites, layer))
        for layer in range(base.sites.num_layers):
            path = base.sites.layer_path.replace("{layer}", str(layer))
            for name, block in base.sites.blocks.items():
                site = _BlockSite(self._step, name, layer)
                base.model.get_submodule(f"{path}.{block.reads}").register_forward_pre_hook(site.reads)
                base.model.get_submodule(f"{path}.{block.joins}").register_forward_hook(site.joins)
        self._try()

    @property
    def weights(self) -> BaseWeights:
        return ModuleWeights(self._base)

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        self._step.batch = batch
        try:
            logits: torch.Tensor = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.outputs,
                adaptermesh_batch=batch,
                adaptermesh_cache=cache,
            ).logits
        finally:
            self._step.batch = None
        return logits[0].float()

    def _try(self) -> None:
        """One small step, so that a model that asks attention for what it lacks is refused at the start."""
        base, device = self._base, self._base.device
        shape = KvShape(base.sites.num_layers, base.kv_heads, base.head_dim, blocks=1, block_tokens=2)
        tokens = torch.arange(2, device=device)
        plan = plan_attention([Span(0, 2, (1,))], 0, shape.block_tokens, base.dtype, device)
        batch = StepBatch(tokens, tokens, tokens[1:], plan, AdapterPlan())
        with torch.inference_mode():
            self.run(batch, KvCache(shape, base.dtype, device))


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (the interface gives it; the batch has its own)
    *,
    adaptermesh_batch: StepBatch,
    adaptermesh_cache: KvCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, heads, tokens, d]. key, value: [1, kv_heads, tokens, d]. Returns [1, tokens, heads, d].

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for attention that is not causal, and for
            arguments that mean something else, e.g. sinks: without them the result would be wrong.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _unsupported(type(module).__name__, "is not causal")
    if sliding_window is not None and sliding_window < 1:
        raise _unsupported(type(module).__name__, f"has a window of {sliding_window} tokens")
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_MEANING]
    if unknown:
        raise _unsupported(type(module).__name__, f"asks for {', '.join(sorted(unknown))}")
    out = adaptermesh_batch.attention.attend(
        adaptermesh_cache,
        module.layer_idx,
        query[0].transpose(0, 1),
        torch.cat((key[0], value[0])).transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.view(1, query.shape[2], query.shape[1], -1), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _embedding_hook(step: _Step) -> Any:
    def hook(module: Any, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        batch = step.batch
        if batch is not None:
            scale = float(getattr(module, "embed_scale", 1.0))
            batch.adapters.embed(batch.token_ids, output[0], scale)
            batch.with_virtual(output[0])
        return output

    return hook


def _stream_hook(step: _Step) -> Any:
    def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if step.batch is not None:
            step.batch.adapters.enter(args[0][0])

    return hook


def _head_hook(step: _Step) -> Any:
    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        batch = step.batch
        if batch is None:
            return output
        x = args[0][0]

        def product(x: torch.Tensor) -> torch.Tensor:
            return linear(x, module.weight, module.bias).float()

        batch.adapters.head(lambda rows: x[rows], product, output[0])
        return output

    return hook


def _input_hook(step: _Step, site: Site, layer: int) -> Any:
    """The parts of a fused module have one input; `site` is the first of them."""

    def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        batch = step.batch
        if batch is None or site.name not in batch.adapters.inputs:
            return None
        return (batch.adapters.input_of(site.name, layer, args[0][0])[None], *args[1:])

    return hook


def _site_hook(step: _Step, sites: Sequence[Site], layer: int) -> Any:
    def hook(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        batch = step.batch
        if batch is not None and batch.adapters.sites:
            x, y = args[0][0], output[0]
            for site in sites:
                part = y[:, site.out_offset : site.out_offset + site.out_features]
                batch.adapters.apply(site.name, layer, x, part)
        return output

    return hook


@dataclass(slots=True)
class _BlockSite:
    """The hooks of a block site of one layer; `residual` is the stream while its sub-layer computes."""

    step: _Step
    name: str
    layer: int
    residual: torch.Tensor | None = None

    def reads(self, _module: Any, args: tuple[torch.Tensor, ...]) -> None:
        batch = self.step.batch
        self.residual = args[0][0] if batch is not None and self.name in batch.adapters.blocks else None

    def joins(self, _module: Any, _args: Any, output: Any) -> Any:
        batch, residual = self.step.batch, self.residual
        self.residual = None
        if batch is None or residual is None:
            return output
        # Attention returns its weights too, or nothing in their place.
        out, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        term = batch.adapters.term(self.name, self.layer, residual, out[0])
        out = out if term is None else out + term
        return out if rest is None else (out, *rest)


def _unsupported(name: str, problem: str) -> MeshError:
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.ADAPTER_UNSUPPORTED,
        f"the engine can't compute {name}: it {problem}",
        metadata={"name": name},
    )
