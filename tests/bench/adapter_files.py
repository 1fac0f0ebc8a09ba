"""Random but seeded adapters: written once as peft or `adapters` does, and ingested as our store does."""

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

KINDS = ("lora", "dora", "ia3", "bottleneck", "oft", "ends")
"""Kinds that are measured beside each other; `ends` are LoRA of the embeddings and the head alone."""

_SEED = 20260701
# Large enough to change most answers, small enough to leave them finite.
_UP_STD = 0.02
# How far factors are from one.
_FACTOR_STD = 0.02
# Where peft puts IA3 in a Llama, and which of these scale their input.
_IA3_SITES, _IA3_INPUTS = ("k", "v", "down"), ("down",)
# The library's default for seq_bn.
_REDUCTION = 16
_PER_KIND = 8
# peft's default for OFT.
_BLOCK = 32

_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def adapter_name(index: int) -> str:
    return f"a{index:03d}"


def kind_name(kind: str, index: int) -> str:
    """Adapters of the standard workload are LoRA."""
    return adapter_name(index) if kind == "lora" else f"{kind}{index:03d}"


def ensure_adapters(cache: Path, model: Path, count: int) -> Path:
    """A folder with at least `count` LoRA of this base: `a000/peft`, `a000/canonical.safetensors`, ...

    And a few of each other kind: `dora000`, ...
    """
    facts = BaseFacts.from_json(json.loads((model / "base_model.json").read_text()))
    folder = cache / "adapters" / f"{facts.digest.removeprefix('sha256:')[:12]}-r{RANK}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [("lora", index) for index in range(count)]
    wanted += [(kind, index) for kind in KINDS if kind != "lora" for index in range(_PER_KIND)]
    for kind, index in wanted:
        if not (folder / kind_name(kind, index)).is_dir():
            _write(folder, kind, index, facts)
    return folder


def _write(folder: Path, kind: str, index: int, facts: BaseFacts) -> None:
    """Writes one adapter under a temporary name: a folder that is there is complete."""
    name = kind_name(kind, index)
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    peft = part / "peft"
    peft.mkdir(parents=True)
    sites = site_map(facts).sites
    weights_file = "adapter_model.safetensors"
    if kind == "bottleneck":
        weights, config = _bottlenecks(index, name, facts), _bottleneck_config(name, facts)
        weights_file = "adapter.safetensors"
    elif kind == "ia3":
        weights, config = _factors(index, facts.num_layers, sites), _ia3_config(sites)
    elif kind == "oft":
        weights, config = _rotations(index, facts.num_layers, sites), _oft_config(sites)
    elif kind == "ends":
        weights, config = (
            _ends(index, facts),
            {**_config(sites), "target_modules": ["embed_tokens", "lm_head"]},
        )
    else:
        weights, config = _weights(index, facts.num_layers, sites), _config(sites)
    if kind == "dora":
        weights |= _magnitudes(index, facts.num_layers, sites)
        config |= {"use_dora": True}
    save_file(weights, peft / weights_file)
    (peft / "adapter_config.json").write_text(json.dumps(config, indent=2))
    files = {file: peft / file for file in ("adapter_config.json", weights_file)}
    result = ingest(SourceBundle(files, "bench", name), facts, part / CANONICAL_FILE)
    (part / MANIFEST_FILE).write_bytes(result.manifest.to_bytes())
    part.rename(folder / name)


def _bottlenecks(index: int, name: str, facts: BaseFacts) -> dict[str, _Floats]:
    """Behind each feed-forward part: adapter_down [width, hidden], adapter_up [hidden, width], biases."""
    rng = np.random.default_rng([_SEED, index, 3])
    hidden = facts.hidden_size
    width = hidden // _REDUCTION
    found = {}
    for layer in range(facts.num_layers):
        module = f"model.layers.{layer}.output_adapters.adapters.{name}"
        for part, shape in (("adapter_down.0", (width, hidden)), ("adapter_up", (hidden, width))):
            found[f"{module}.{part}.weight"] = rng.normal(0.0, _UP_STD, shape).astype(np.float32)
            found[f"{module}.{part}.bias"] = rng.normal(0.0, _UP_STD, shape[:1]).astype(np.float32)
    return found


def _magnitudes(index: int, layers: int, sites: tuple[Site, ...]) -> dict[str, _Floats]:
    """[out] each; not near the norms of the base's rows, which costs the same."""
    rng = np.random.default_rng([_SEED, index, 1])
    return {
        f"base_model.model.{site.module.format(layer=layer)}.lora_magnitude_vector": rng.normal(
            1.0, _FACTOR_STD, site.out_features
        ).astype(np.float32)
        for layer in range(layers)
        for site in sites
    }


def _factors(index: int, layers: int, sites: tuple[Site, ...]) -> dict[str, _Floats]:
    """ia3_l: [out, 1], or [1, in] of a feed-forward module."""
    rng = np.random.default_rng([_SEED, index, 2])
    found = {}
    for layer in range(layers):
        for site in (site for site in sites if site.name in _IA3_SITES):
            shape = (1, site.in_features) if site.name in _IA3_INPUTS else (site.out_features, 1)
            name = f"base_model.model.{site.module.format(layer=layer)}.ia3_l"
            found[name] = rng.normal(1.0, _FACTOR_STD, shape).astype(np.float32)
    return found


def _rotations(index: int, layers: int, sites: tuple[Site, ...]) -> dict[str, _Floats]:
    """oft_R: what is above the diagonal of each block, [blocks, b (b - 1) / 2]."""
    rng = np.random.default_rng([_SEED, index, 4])
    return {
        f"base_model.model.{site.module.format(layer=layer)}.oft_R.weight": rng.normal(
            0.0, _FACTOR_STD, (site.in_features // _BLOCK, _BLOCK * (_BLOCK - 1) // 2)
        ).astype(np.float32)
        for layer in range(layers)
        for site in sites
    }


def _ends(index: int, facts: BaseFacts) -> dict[str, _Floats]:
    """lora_embedding_A: [rank, vocabulary], lora_A: [rank, hidden]; B: [hidden or vocabulary, rank]."""
    rng = np.random.default_rng([_SEED, index, 5])
    hidden, vocabulary = facts.hidden_size, facts.vocab_size
    shapes = {
        "model.embed_tokens.lora_embedding_A": (RANK, vocabulary),
        "model.embed_tokens.lora_embedding_B": (hidden, RANK),
        "lm_head.lora_A.weight": (RANK, hidden),
        "lm_head.lora_B.weight": (vocabulary, RANK),
    }
    return {
        f"base_model.model.{name}": rng.normal(0.0, _UP_STD, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _weights(index: int, layers: int, sites: tuple[Site, ...]) -> dict[str, _Floats]:
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


def _bottleneck_config(name: str, facts: BaseFacts) -> dict[str, object]:
    """The library's seq_bn."""
    return {
        "config": {
            "mh_adapter": False,
            "output_adapter": True,
            "reduction_factor": _REDUCTION,
            "non_linearity": "relu",
            "original_ln_before": True,
            "original_ln_after": True,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "ln_before": False,
            "ln_after": False,
            "is_parallel": False,
            "scaling": 1.0,
        },
        "hidden_size": facts.hidden_size,
        "model_class": facts.architecture,
        "model_name": facts.model_id,
        "model_type": "llama",
        "name": name,
        "version": "adapters.1.3.0",
    }


def _oft_config(sites: tuple[Site, ...]) -> dict[str, object]:
    return {
        "peft_type": "OFT",
        "peft_version": "0.21.2",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m-instruct",
        "r": 0,
        "oft_block_size": _BLOCK,
        "target_modules": [site.module.rpartition(".")[2] for site in sites],
        "inference_mode": True,
    }


def _ia3_config(sites: tuple[Site, ...]) -> dict[str, object]:
    def modules(names: tuple[str, ...]) -> list[str]:
        return [site.module.rpartition(".")[2] for site in sites if site.name in names]

    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m-instruct",
        "target_modules": modules(_IA3_SITES),
        "feedforward_modules": modules(_IA3_INPUTS),
        "inference_mode": True,
    }
