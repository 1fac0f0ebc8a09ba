"""Through the modules of transformers: right for any decoder with a module map, the twin of the lean path.

Attention is ours by transformers' attention interface: the model hands each layer's queries, keys and values
to `paged_attention`, with the step as a keyword argument that travels through the model untouched. Adapters
act through a hook on each module that holds sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from adaptermesh.artifact.sites import Site
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.kv import KvCache

ATTENTION_NAME = "adaptermesh_paged"


@dataclass(slots=True)
class _Step:
    """The step that runs; the hooks of the sites read it."""

    batch: StepBatch | None = None


class PlainForward:
    """Runs a packed batch as one sequence of [1, tokens] through the model."""

    def __init__(self, base: Base, max_context_tokens: int) -> None:
        self._base = base
        _check_attention(base, max_context_tokens)
        self._model = base.model
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._step = _Step()
        for pattern, sites in base.sites.modules.items():
            for layer in range(base.sites.num_layers):
                module = base.model.get_submodule(pattern.replace("{layer}", str(layer)))
                module.register_forward_hook(_site_hook(self._step, sites, layer))

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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, heads, tokens, d]. key, value: [1, kv_heads, tokens, d]. Returns [1, tokens, heads * d]."""
    out = adaptermesh_batch.attention.attend(
        adaptermesh_cache,
        module.layer_idx,
        query[0].transpose(0, 1),
        torch.cat((key[0], value[0])).transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


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


def _check_attention(base: Base, max_context_tokens: int) -> None:
    """Refuses a model whose attention is not the plain causal one: it would be computed wrong."""
    config = base.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < max_context_tokens:
        problem = f"attends over {window} tokens only: set max_context_tokens to at most that"
    elif getattr(config, "attn_logit_softcapping", None):
        problem = "caps its attention scores"
    else:
        return
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.ADAPTER_UNSUPPORTED,
        f"base model '{base.facts.model_id}' {problem}",
        metadata={"name": base.facts.model_id},
    )
