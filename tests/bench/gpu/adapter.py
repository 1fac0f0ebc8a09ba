"""One random LoRA adapter in the computing dtype; the engine serves it under as many names as one wants."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.sites import site_map
from tests.bench.adapter_files import CANONICAL_FILE, MANIFEST_FILE, adapter_name

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_adapter(facts: BaseFacts, rank: int, dtype: torch.dtype, folder: Path) -> int:
    """Writes `a000` as `LocalSource` reads it, through the same ingest as an upload; its bytes."""
    place = folder / adapter_name(0)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(facts.num_layers):
        for site in site_map(facts).sites:
            module = f"base_model.model.{site.module.format(layer=layer)}"
            down = torch.rand(rank, site.in_features, generator=generator) * 2 - 1
            up = torch.randn(site.out_features, rank, generator=generator)
            weights[f"{module}.lora_A.weight"] = (down * site.in_features**-0.5).to(dtype)
            weights[f"{module}.lora_B.weight"] = (up * 0.02).to(dtype)
    save_file(weights, place / _FILES[1])
    (place / _FILES[0]).write_text(json.dumps(lora_config(facts, rank)))
    bundle = SourceBundle({name: place / name for name in _FILES}, "bench", "a000")
    manifest = ingest(bundle, facts, place / CANONICAL_FILE).manifest
    (place / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest.size_bytes


def lora_config(facts: BaseFacts, rank: int) -> dict[str, Any]:
    """All seven projections."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts.model_id,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [site.module.rpartition(".")[2] for site in site_map(facts).sites],
        "inference_mode": True,
    }


def name_of(index: int) -> str:
    """The index-th name of the one adapter: another digest, hence a slot and a copy of its own."""
    return f"{adapter_name(0)}#{index}"
