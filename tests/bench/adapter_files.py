"""Random but seeded LoRA adapters: written once as peft does, and ingested as our store does."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.sites import Site, site_map

RANK = 8
ALPHA = 16
CANONICAL_FILE = "canonical.safetensors"
MANIFEST_FILE = "manifest.json"

_SEED = 20260701
# Large enough to change most answers, small enough to leave them finite.
_UP_STD = 0.02


def adapter_name(index: int) -> str:
    return f"a{index:03d}"


def ensure_adapters(cache: Path, model: Path, count: int) -> Path:
    """A folder with at least `count` adapters of this base: `a000/peft`, `a000/canonical.safetensors`, ..."""
    facts = BaseFacts.from_json(json.loads((model / "base_model.json").read_text()))
    folder = cache / "adapters" / f"{facts.digest.removeprefix('sha256:')[:12]}-r{RANK}"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        if not (folder / adapter_name(index)).is_dir():
            _write(folder, index, facts)
    return folder


def _write(folder: Path, index: int, facts: BaseFacts) -> None:
    """Writes one adapter under a temporary name: a folder that is there is complete."""
    name = adapter_name(index)
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    peft = part / "peft"
    peft.mkdir(parents=True)
    sites = site_map(facts).sites
    save_file(_weights(index, facts.num_layers, sites), peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps(_config(sites), indent=2))
    files = {file: peft / file for file in ("adapter_config.json", "adapter_model.safetensors")}
    result = ingest(SourceBundle(files, "bench", name), facts, part / CANONICAL_FILE)
    (part / MANIFEST_FILE).write_bytes(result.manifest.to_bytes())
    part.rename(folder / name)


def _weights(
    index: int, layers: int, sites: tuple[Site, ...]
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """lora_A: [rank, in], uniform as peft starts it. lora_B: [out, rank], normal instead of zero."""
    rng = np.random.default_rng([_SEED, index])
    weights = {}
    for layer in range(layers):
        for site in sites:
            module = f"base_model.model.{site.module.format(layer=layer)}"
            bound = site.in_features**-0.5
            down = rng.uniform(-bound, bound, (RANK, site.in_features))
            up = rng.normal(0.0, _UP_STD, (site.out_features, RANK))
            weights[f"{module}.lora_A.weight"] = down.astype(np.float32)
            weights[f"{module}.lora_B.weight"] = up.astype(np.float32)
    return weights


def _config(sites: tuple[Site, ...]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m-instruct",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [site.module.rpartition(".")[2] for site in sites],
        "inference_mode": True,
    }
