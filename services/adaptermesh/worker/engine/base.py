"""The frozen base model: its weights, its tokenizer and what the engine needs to know about it."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptermesh.artifact.base_copies import rounded_digest
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.sites import SiteMap, site_map
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.config import EngineConfig

log = logging.getLogger(__name__)

_DIGEST_ROWS = 8192
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Base:
    """One base model on one device.

    `eos_ids` end a generation. `max_context_tokens` is the model's own limit.
    """

    facts: BaseFacts
    sites: SiteMap
    tokenizer: Any
    model: Any
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]
    max_context_tokens: int
    kv_heads: int
    head_dim: int
    _digests: dict[str, str] = field(default_factory=dict)

    def edge_digest(self, site: str) -> str:
        """The `rounded_digest` of the weight of the embeddings or the head; computed once."""
        if site not in self._digests:
            weight = self.model.get_submodule(self.sites.edges[site].module).weight.detach()
            rows = (part.float().cpu().numpy() for part in weight.split(_DIGEST_ROWS))
            self._digests[site] = rounded_digest(rows)
        return self._digests[site]

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, those that are tied once."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones left out; nothing is tidied, so that pieces add up."""
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def load_base(folder: Path, config: EngineConfig) -> Base:
    """Loads a model of the model cache: config.json, model.safetensors, the tokenizer and base_model.json.

    With `load_format` "dummy" only config.json and the tokenizer are read: the weights are random, the same
    ones at each load, and the base has an identity of its own, so that it never passes for the real one.

    Raises:
        MeshError: NOT_FOUND (BASE_NOT_FOUND) if the folder holds no model; FAILED_PRECONDITION for an
            architecture without a module map.
    """
    dummy = config.load_format == "dummy"
    try:
        facts = _dummy_facts(folder) if dummy else _read_facts(folder)
    except FileNotFoundError:
        raise MeshError(
            Code.NOT_FOUND,
            Reason.BASE_NOT_FOUND,
            f"{folder} holds no base model",
            metadata={"name": folder.name},
        ) from None
    # Its progress bar is for terminals; this goes to a log.
    transformers.utils.logging.disable_progress_bar()
    if dummy:
        log.warning(
            "the base has random weights: its answers mean nothing", extra={"base_model": facts.model_id}
        )
        model = _dummy_model(folder, compute_dtype(config), torch.device(config.device))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=compute_dtype(config), attn_implementation="eager", local_files_only=True
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return make_base(facts, model, tokenizer, config)


def _read_facts(folder: Path) -> BaseFacts:
    return BaseFacts.from_json(json.loads((folder / "base_model.json").read_text()))


def _dummy_facts(folder: Path) -> BaseFacts:
    config = json.loads((folder / "config.json").read_text())
    return BaseFacts.from_config(f"{folder.name}-dummy", config, digest_bytes(b"dummy"))


def _dummy_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Made where it is computed: a CPU takes minutes for the random numbers of a large model."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def make_base(facts: BaseFacts, model: Any, tokenizer: Any, config: EngineConfig) -> Base:
    """A base from a transformers model that is already in memory; moves it to the device."""
    device = torch.device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    dtype = compute_dtype(config)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return Base(
        facts=facts,
        sites=site_map(facts),
        tokenizer=tokenizer,
        model=model,
        device=device,
        dtype=dtype,
        eos_ids=_eos_ids(model, tokenizer),
        max_context_tokens=text.max_position_embeddings,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of the weights and of the computation."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if torch.device(config.device).type == "cuda" else torch.float32


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All ids that any of generation config, model config and tokenizer names as the end."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list | tuple):
            found.update(value)
    return frozenset(found)
