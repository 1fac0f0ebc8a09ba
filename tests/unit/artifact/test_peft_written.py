"""What peft itself writes and computes, against what ingest makes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PreTrainedModel

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32
from adaptermesh.artifact.ingest import IngestResult, SourceBundle, ingest
from adaptermesh.artifact.peft_methods import METHODS
from adaptermesh.artifact.sites import site_map

# peft 0.21 reads a property that transformers 5.23 has renamed, and warns of a missing model card.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(config: Any, lora: peft.PeftConfig, folder: Path) -> tuple[BaseFacts, Any]:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    facts = BaseFacts.from_config(
        "tiny", {**config.to_dict(), "architectures": [type(model).__name__]}, "sha256:" + "0" * 64
    )
    tuned = peft.get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if any(part in name for part in ("lora_", "vera_", "hada_", "ia3_")):
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(str(folder))
    return facts, tuned


def ingested(folder: Path, facts: BaseFacts) -> IngestResult:
    files = {path.name: path for path in folder.iterdir()}
    return ingest(SourceBundle(files, "acme", "x", license="MIT"), facts, folder.with_suffix(".canonical"))


def check_deltas(folder: Path, facts: BaseFacts, tuned: Any) -> None:
    """Each module's weight change in peft equals the stacked s B A of its sites."""
    manifest = ingested(folder, facts).manifest
    assert manifest.servable, manifest.unservable_reason
    entries = {entry.name: entry for entry in manifest.tensors}
    deltas = {}
    with open_buffer(folder.with_suffix(".canonical")) as buffer:
        for op in manifest.modules:
            a, b = (
                to_float32(entries[op.tensors[slot]], tensor_view(entries[op.tensors[slot]], buffer))
                for slot in ("A", "B")
            )
            deltas[op.site, op.layer] = op.scale * (b @ a)
    sites = site_map(facts)
    seen = 0
    for path, module in tuned.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        found = sites.parts(path)
        assert found is not None
        parts, layer = found
        expected = module.get_delta_weight("default").detach().numpy()
        stacked = np.concatenate([deltas[part.name, layer] for part in parts])
        np.testing.assert_allclose(
            stacked.T if parts[0].transposed else stacked, expected, rtol=1e-5, atol=1e-6
        )
        seen += len(parts)
    assert seen == len(manifest.modules)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.(q|down)_proj"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, r".*\.up_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 5, "up_proj": 3},
        },
    ],
)
def test_a_llama_adapter_written_by_peft_keeps_its_arithmetic(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **changes)
    facts, tuned = write(LlamaConfig(**SMALL), lora, tmp_path / "a")
    check_deltas(tmp_path / "a", facts, tuned)


def test_a_phi3_adapter_written_by_peft_is_split_rightly(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj", "o_proj"], task_type="CAUSAL_LM")
    facts, tuned = write(Phi3Config(**SMALL), lora, tmp_path / "a")
    check_deltas(tmp_path / "a", facts, tuned)


def test_a_gpt2_adapter_written_by_peft_is_split_rightly(tmp_path: Path) -> None:
    lora = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    facts, tuned = write(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64), lora, tmp_path / "a")
    check_deltas(tmp_path / "a", facts, tuned)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_what_peft_writes_for_other_methods_is_stored(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    lora = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    facts, _ = write(LlamaConfig(**SMALL), lora, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason


@pytest.mark.parametrize(
    "method",
    [
        peft.AdaLoraConfig(
            init_r=6, target_r=3, total_step=9, lora_alpha=5, target_modules=["q_proj", "down_proj"]
        ),
        peft.LoHaConfig(r=3, alpha=5, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 2}),
        peft.VeraConfig(r=7, target_modules=["q_proj", "v_proj", "down_proj"]),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_is_exactly_a_lora_becomes_one(tmp_path: Path, method: peft.PeftConfig) -> None:
    facts, tuned = write(LlamaConfig(**SMALL), method, tmp_path / "a")
    check_deltas(tmp_path / "a", facts, tuned)
    assert ingested(tmp_path / "a", facts).manifest.kind == str(method.peft_type).rpartition(".")[2].lower()


@pytest.mark.parametrize(
    "method",
    [
        peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True
        ),
        peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_is_exactly_a_lora_is_split_in_a_fused_module(tmp_path: Path, method: peft.PeftConfig) -> None:
    facts, tuned = write(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64), method, tmp_path / "a")
    check_deltas(tmp_path / "a", facts, tuned)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (LlamaConfig(**SMALL), peft.IA3Config(task_type="CAUSAL_LM")),
        (
            LlamaConfig(**SMALL),
            peft.IA3Config(target_modules=r".*\.(q_proj|up_proj)", feedforward_modules=r".*\.up_proj"),
        ),
        (
            GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64),
            peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True),
        ),
    ],
    ids=["llama", "pattern", "gpt2"],
)
def test_ia3_written_by_peft_keeps_its_factors(tmp_path: Path, config: Any, method: peft.IA3Config) -> None:
    facts, tuned = write(config, method, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert (manifest.kind, manifest.servable, manifest.op_kinds) == ("ia3", True, ("affine",))
    entries = {entry.name: entry for entry in manifest.tensors}
    sites, seen = site_map(facts), 0
    with open_buffer(tmp_path / "a.canonical") as buffer:
        found = {
            (op.site, op.layer): {
                slot: tensor_view(entries[name], buffer).copy() for slot, name in op.tensors.items()
            }
            for op in manifest.modules
        }
    for path, module in tuned.base_model.model.named_modules():
        if not hasattr(module, "ia3_l"):
            continue
        place = sites.parts(path)
        assert place is not None
        expected = module.ia3_l["default"].detach().numpy().flatten()
        for part in place[0]:
            slots = found.pop((part.name, place[1]))
            rows = slice(part.out_offset, part.out_offset + part.out_features)
            slot, values = ("in_scale", expected) if module.is_feedforward else ("out_scale", expected[rows])
            assert list(slots) == [slot]
            np.testing.assert_array_equal(slots[slot], values)
            seen += 1
    assert seen
    assert not found


@pytest.mark.parametrize("name", METHODS)
def test_the_tables_of_defaults_are_those_of_the_installed_peft(name: str) -> None:
    kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    # A schedule is checked when the config is made: it has no default that passes.
    config = kind(total_step=1) if name == "ADALORA" else kind()
    expected = {**config.to_dict(), "peft_type": name, "peft_version": None}
    if name == "ADALORA":
        expected["total_step"] = None
    assert dict(METHODS[name].defaults) == expected
