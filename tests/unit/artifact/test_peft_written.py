"""What peft itself writes and computes, against what ingest makes of it."""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PreTrainedModel

from adaptermesh.artifact import plan
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32
from adaptermesh.artifact.ingest import IngestResult, SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.peft_methods import METHODS
from adaptermesh.artifact.problems import Rejection
from adaptermesh.artifact.sites import site_map
from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import Code, MeshError, Reason
from tests.unit.artifact.boft_blocks import stand_in

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


@pytest.fixture(autouse=True, scope="module")
def butterflies() -> Iterator[None]:
    with stand_in():
        yield


def write(config: Any, lora: peft.PeftConfig, folder: Path) -> tuple[BaseFacts, Any]:
    with warnings.catch_warnings():
        # It has doubts about a bias on lora_B: it can't be merged into a base without one, and has one axis.
        warnings.simplefilter("ignore", peft.utils.warning.PeftWarning)
        return _write(config, lora, folder)


def _write(config: Any, lora: peft.PeftConfig, folder: Path) -> tuple[BaseFacts, Any]:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    facts = BaseFacts.from_config(
        "tiny", {**config.to_dict(), "architectures": [type(model).__name__]}, "sha256:" + "0" * 64
    )
    tuned = peft.get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if any(part in name for part in ("lora_", "vera_", "hada_", "ia3_", "lokr_", "oft_")):
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
    ("kind", "slot", "scale"), [("dora", "magnitude", 4.0), ("lora_bias", "bias_delta", 4.0)]
)
def test_what_a_lora_has_beside_its_matrices_is_a_vector_at_its_site(
    tmp_path: Path, kind: str, slot: str, scale: float
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert manifest.op_kinds == ("affine", "lowrank")
    beside = [module for module in manifest.modules if module.op == "affine"]
    assert [(module.site, module.layer, module.scale) for module in beside] == [
        (site, layer, 4.0) for layer in range(2) for site in ("q", "v")
    ]
    assert [dict(module.tensors) for module in beside[:1]] == [{slot: f"L0.q.{slot}"}]


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


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (peft.LoHaConfig(r=65, target_modules=["q_proj"]), "a LoHa of rank 65 is a LoRA of rank 4225"),
        (peft.VeraConfig(r=60, target_modules=["q_proj", "v_proj"]), "it would have 26880 bytes"),
    ],
)
def test_what_would_become_too_much_is_stored_with_the_reason(
    tmp_path: Path, method: peft.PeftConfig, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_EXPANDED_BYTES", 20_000)
    facts, _ = write(LlamaConfig(**SMALL), method, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
KINDS: dict[str, peft.PeftConfig] = {
    "beside": peft.LoraConfig(
        r=2,
        target_modules=["lm_head", "q_proj"],
        modules_to_save=["norm", "v_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
        bias="all",
    ),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "lora_bias": peft.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj", "v_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "vera": peft.VeraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["v_proj"]),
    "lokr": peft.LoKrConfig(r=1, decompose_both=True, target_modules=["q_proj", "v_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "boft": peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["q_proj", "v_proj"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "alora": peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]
    ),
}


def rewrite(folder: Path, changes: dict[str, np.ndarray[Any, Any] | None]) -> None:
    """Other tensors in the file; None takes one away."""
    file = folder / "adapter_model.safetensors"
    tensors = {**load_file(file), **{name: value for name, value in changes.items() if value is not None}}
    save_file({name: value for name, value in tensors.items() if changes.get(name, 0) is not None}, file)


@pytest.mark.parametrize(
    ("kind", "tensor", "shape", "why"),
    [
        ("dora", f"{Q0}.lora_magnitude_vector", None, "has lora_A and lora_B but no lora_magnitude_vector"),
        ("dora", f"{Q0}.lora_magnitude_vector", (15,), "has shape [15], expected [16]"),
        ("dora", f"{Q0}.lora_B.bias", (16,), "a bias on lora_B needs lora_bias in the config"),
        ("lora_bias", f"{Q0}.lora_magnitude_vector", (16,), "a magnitude belongs to DoRA"),
        ("lora_bias", f"{Q0}.lora_B.bias", None, "has lora_A and lora_B but no lora_B.bias"),
        ("adalora", f"{Q0}.lora_E", None, "has lora_A and lora_B but no lora_E"),
        ("adalora", f"{Q0}.lora_E", (2, 1), "expected [3, 1]: rank at most 3 from the config"),
        ("adalora", f"{Q0}.lora_A", (4, 16), "has shape [4, 16], expected [3, 16]"),
        ("adalora", f"{Q0}.lora_A.weight", (3, 16), "named base_model.model.<module>.lora_A, .lora_B"),
        ("loha", f"{Q0}.hada_w2_b", None, "and hada_w2_a but no hada_w2_b"),
        ("loha", f"{Q0}.hada_w1_a", (17, 2), "expected [16, 2]: rank 2 from the config, 16 in and 16 out"),
        ("loha", f"{Q0}.hada_t1", (2, 2), "hada_t1' is not expected"),
        ("vera", "base_model.vera_A", None, "is absent: save the adapter with save_projection"),
        ("vera", "base_model.vera_A", (3, 15), "at least 16 from the widest module"),
        ("vera", "base_model.vera_B", (16, 2), "expected rank 3 from the config"),
        ("vera", "base_model.vera_B", (48,), "expected rank 3 from the config"),
        ("vera", f"{Q0}.vera_lambda_d", (4,), "expected [3]: rank 3 from the config"),
        ("ia3", f"{Q0}.ia3_l", (1, 16), "expected [16, 1]: it is no feed-forward module in the config"),
        ("ia3", f"{Q0}.ia3_l", None, "the file has no tensors for it"),
        ("ia3", f"{Q0.replace('q_proj', 'v_proj')}.ia3_l", (8, 1), "it is a feed-forward module"),
        ("ia3", f"{Q0}.lora_A.weight", (2, 16), "tensors of a peft IA3 are named"),
        ("prompt", "prompt_embeddings", None, "holds no tensors"),
        ("prompt", "prompt_embeddings", (4, 16), "expected [5, 16]: 5 virtual tokens from the config"),
        ("prompt", "prompt_embeddings", (5, 16, 1), "expected [5, 16]"),
        ("prompt", "score.weight", (5, 16), "'score.weight' is not expected: virtual tokens are in"),
        ("p_tuning", "prompt_embeddings", (5, 15), "expected [5, 16]"),
        ("prefix", "prompt_embeddings", (5, 16), "expected [5, 32]: 5 virtual tokens from the config"),
        ("prefix", f"{Q0}.lora_A.weight", (2, 16), "virtual tokens are in prompt_embeddings alone"),
    ],
)
def test_a_file_that_disagrees_with_its_method_is_rejected(
    tmp_path: Path, kind: str, tensor: str, shape: tuple[int, ...] | None, why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    rewrite(tmp_path / "a", {tensor: None if shape is None else np.ones(shape, np.float32)})
    with pytest.raises(Rejection) as caught:
        ingested(tmp_path / "a", facts)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("vera", {"save_projection": False}, "save_projection"),
        ("adalora", {"use_dora": True}, "DoRA"),
        ("adalora", {"alora_invocation_tokens": [1]}, "activation by tokens"),
        ("ia3", {"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ("prompt", {"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ("p_tuning", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("prefix", {"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    ],
)
def test_a_variant_of_a_method_is_stored_with_the_reason(
    tmp_path: Path, kind: str, changes: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("prompt", {"token_dim": 8}, "token_dim is 8, base model 'tiny' (LlamaForCausalLM) needs 16"),
        (
            "prompt",
            {"num_virtual_tokens": 0},
            "num_virtual_tokens: Input should be greater than or equal to 1",
        ),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens: Field required"),
        ("prompt", {"num_virtual_tokens": 6}, "expected [6, 16]"),
        ("p_tuning", {"num_transformer_submodules": 2}, "num_transformer_submodules: Input should be 1"),
        ("p_tuning", {"task_ids": [1]}, "the key 'task_ids' is unknown"),
        ("prefix", {"token_dim": 16}, "token_dim is 16, base model 'tiny' (LlamaForCausalLM) needs 8"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads is 4"),
        ("prefix", {"num_layers": 3}, "num_layers is 3"),
    ],
)
def test_a_config_of_virtual_tokens_that_does_not_fit_is_rejected(
    tmp_path: Path, kind: str, changes: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(Rejection) as caught:
        ingested(tmp_path / "a", facts)
    assert why in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=9, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(
            num_virtual_tokens=5, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
        ),
    ],
)
@pytest.mark.parametrize("base", [LlamaConfig(**SMALL), GPT2Config(n_embd=16, n_layer=2, n_head=4)])
def test_embeddings_of_virtual_tokens_are_those_that_peft_feeds(
    tmp_path: Path, base: Any, config: peft.PeftConfig
) -> None:
    facts, tuned = write(base, copy.deepcopy(config), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    with open_buffer(tmp_path / "a.canonical") as buffer:
        [entry] = manifest.tensors
        found = to_float32(entry, tensor_view(entry, buffer))
    np.testing.assert_array_equal(found, tuned.get_prompt(1)[0].detach().numpy())
    assert manifest.op_kinds == ("prompt",)
    assert manifest.cost.max_rank == 0


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("base", [LlamaConfig(**SMALL), GPT2Config(n_embd=16, n_layer=2, n_head=4)])
def test_keys_and_values_of_virtual_tokens_are_those_that_peft_puts_into_its_cache(
    tmp_path: Path, base: Any, projected: bool
) -> None:
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=9, task_type="CAUSAL_LM"
    )
    facts, tuned = write(base, config, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    cache = tuned.get_prompt(1)
    entries = {entry.name: entry for entry in manifest.tensors}
    assert len(manifest.modules) == len(cache.layers) == 2
    with open_buffer(tmp_path / "a.canonical") as buffer:
        for module, layer in zip(manifest.modules, cache.layers, strict=True):
            for slot, expected in (("k", layer.keys), ("v", layer.values)):
                entry = entries[module.tensors[slot]]
                found = to_float32(entry, tensor_view(entry, buffer))
                np.testing.assert_array_equal(found, expected[0].detach().numpy())


@pytest.mark.parametrize(("kind", "dtype"), [("prompt", torch.bfloat16), ("prefix", torch.float16)])
def test_virtual_tokens_keep_their_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    values = torch.from_numpy(load_file(file)["prompt_embeddings"]).to(dtype)
    save_torch_file({"prompt_embeddings": values}, file)
    manifest = ingested(tmp_path / "a", facts).manifest
    parts = []
    with open_buffer(tmp_path / "a.canonical") as buffer:
        for entry in manifest.tensors:
            part = torch.from_numpy(to_float32(entry, tensor_view(entry, buffer)).copy())
            parts.append(part if kind == "prompt" else part.transpose(0, 1).flatten(1))
    assert torch.equal(torch.cat(parts, 1), values.float())


def test_too_many_virtual_tokens_are_stored_with_the_reason(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=4097, task_type="CAUSAL_LM")
    facts, _ = write(LlamaConfig(**SMALL), config, tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert "4097 virtual tokens, the most is 4096" in manifest.unservable_reason


@pytest.mark.parametrize(
    ("kind", "place", "change", "why"),
    [
        ("prompt", 0, {"site": "q"}, "not at the embeddings"),
        ("prompt", 0, {"layer": 1}, "in chunks of layer 0"),
        ("prompt", 0, {"rank": 1}, "has rank 1"),
        ("prompt", 0, {"scale": 2.0}, "has scale 2.0 for nothing"),
        ("prompt", 0, {"expert": 0}, "has an expert"),
        ("prefix", 0, {"site": "ffn"}, "not at the attention"),
        ("prefix", 1, {"scale": 0.5}, "has scale 0.5 for nothing"),
        ("prefix", 0, {"tensors": {"k": "L0.attention.k", "v": "L0.attention.k"}}, "used twice"),
        ("prefix", 1, {"layer": 0}, "listed twice"),
        ("prefix", 1, {"options": {"positions": "before"}}, "has positions 'before'"),
        ("prompt", 0, {"options": {"end": "front"}}, "has options"),
    ],
)
def test_a_manifest_whose_virtual_tokens_are_wrong_is_corrupt(
    tmp_path: Path, kind: str, place: int, change: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS[kind]), tmp_path / "a")
    value = json.loads(ingested(tmp_path / "a", facts).manifest.to_bytes())
    value["modules"][place] |= change
    with pytest.raises(MeshError, match=why) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_a_prefix_of_one_layer_and_an_activated_prefix_are_corrupt(tmp_path: Path) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS["prefix"]), tmp_path / "a")
    whole = json.loads(ingested(tmp_path / "a", facts).manifest.to_bytes())
    activated = {**whole, "activation": {"invocation_tokens": [1]}}
    with pytest.raises(MeshError, match="virtual tokens come before any activation"):
        Manifest.from_bytes(canonical_json(activated))
    whole["base"]["num_layers"] = 3
    with pytest.raises(MeshError, match="not the same in all layers"):
        Manifest.from_bytes(canonical_json(whole))


def test_a_pruned_adalora_may_lack_a_module(tmp_path: Path) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS["adalora"]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    key = "model.layers.{}.self_attn.{}.lora_E"
    left = {key.format(layer, name): [True] * 3 for layer in range(2) for name in ("q_proj", "v_proj")}
    left[key.format(0, "q_proj")] = [False] * 3
    left[key.format(1, "q_proj")] = [True, False, True]
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": left}))
    q1 = Q0.replace("layers.0", "layers.1")
    shapes = {f"{q1}.lora_A": (2, 16), f"{q1}.lora_B": (16, 2), f"{q1}.lora_E": (2, 1)}
    gone = {f"{Q0}.{name}": None for name in ("lora_A", "lora_B", "lora_E")}
    rewrite(tmp_path / "a", {**gone, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()}})
    modules = ingested(tmp_path / "a", facts).manifest.modules
    assert [(module.site, module.layer, module.rank) for module in modules] == [
        ("v", 0, 3),
        ("q", 1, 2),
        ("v", 1, 3),
    ]
    assert {round(module.scale, 6) for module in modules} == {round(8 / (3 + 1e-5), 6)}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_mangled_files_and_configs_are_rejected_or_stored_and_never_crash(
    written: dict[str, tuple[Path, BaseFacts]], kind: str, data: st.DataObject
) -> None:
    folder, facts = written[kind]
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = st.sampled_from([None, 0, -1, 3, 2**40, 0.5, True, "", "q_proj", [], ["q_proj"], {}, {"q_proj": 2}])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        config[key] = data.draw(odd)
    raw = bytearray((folder / "adapter_model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        mangled = Path(name) / "a"
        mangled.mkdir()
        (mangled / "adapter_config.json").write_text(json.dumps(config))
        (mangled / "adapter_model.safetensors").write_bytes(raw)
        try:
            manifest = ingested(mangled, facts).manifest
        except MeshError as error:
            assert error.code in {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION}
        else:
            assert manifest.servable == bool(manifest.modules)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, BaseFacts]]:
    found = {}
    for kind, config in KINDS.items():
        folder = tmp_path_factory.mktemp(kind) / "a"
        facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(config), folder)
        found[kind] = (folder, facts)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_tables_of_defaults_are_those_of_the_installed_peft(name: str) -> None:
    kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    # A schedule is checked when the config is made: it has no default that passes.
    config = kind(total_step=1) if name == "ADALORA" else kind()
    expected = {**config.to_dict(), "peft_type": name, "peft_version": None}
    if name == "TRAINABLE_TOKENS":
        expected["modules_to_save"] = None
    if name == "ADALORA":
        expected["total_step"] = None
    assert dict(METHODS[name].defaults) == expected


@pytest.mark.parametrize(
    ("place", "change", "why"),
    [
        (1, {"rank": 2}, "has rank 2"),
        (1, {"site": "k"}, "not its low-rank part"),
        (1, {"tensors": {"magnitude": "L0.q.A"}}, "needs tensor"),
        (1, {"tensors": {}}, "has no tensors"),
        (1, {"tensors": {"out_scale": "L0.q.magnitude"}, "scale": 1.5}, "for nothing"),
        (0, {"tensors": {"A": "L0.q.A", "B": "L0.q.B", "bias_delta": "L0.q.magnitude"}}, "has slots"),
    ],
)
def test_a_manifest_whose_magnitude_hangs_in_the_air_is_corrupt(
    tmp_path: Path, place: int, change: dict[str, Any], why: str
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), copy.deepcopy(KINDS["dora"]), tmp_path / "a")
    value = json.loads(ingested(tmp_path / "a", facts).manifest.to_bytes())
    value["modules"][place] |= change
    with pytest.raises(MeshError, match=why) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert caught.value.reason is Reason.DATA_CORRUPT
