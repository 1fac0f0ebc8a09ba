"""What peft saves beside a method's own tensors: modules, biases, rows of the vocabulary, copies."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, LlamaConfig, Phi3Config, Qwen2Config

from adaptermesh.artifact.base_copies import rounded_digest
from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.problems import Rejection
from tests.unit.artifact.test_peft_written import SMALL, ingested, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word:UserWarning"),
]

GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64)
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2,
}
Values = dict[str, Any]


def lora(targets: list[str], **changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **changes)


CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "embeddings": ("llama", lora(["embed_tokens", "q_proj"])),
    "tied embeddings": ("tied", lora(["embed_tokens"], ensure_weight_tying=True)),
    "head": ("llama", lora(["lm_head", "q_proj"])),
    "both ends": ("llama", lora(["embed_tokens", "lm_head"])),
    "tokens": ("llama", lora(["q_proj"], trainable_token_indices=[9, 3])),
    "tied tokens": ("tied", lora(["q_proj"], trainable_token_indices=[9, 3])),
    "tokens of both": (
        "llama",
        lora(["q_proj"], trainable_token_indices={"embed_tokens": [9], "lm_head": [3]}),
    ),
    "tokens alone": ("tied", peft.TrainableTokensConfig(token_indices=[9, 3], task_type="CAUSAL_LM")),
    "saved ends": ("llama", lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "saved norms": ("llama", lora(["q_proj"], modules_to_save=["norm"])),
    "saved fused": ("phi3", lora(["o_proj"], modules_to_save=["qkv_proj"])),
    "saved turned": ("gpt2", lora(["c_fc"], modules_to_save=["c_attn"], fan_in_fan_out=True)),
    "biases": ("qwen2", lora(["q_proj"], bias="all")),
    "own biases": ("qwen2", lora(["q_proj"], bias="lora_only")),
    "every bias": ("gpt2", lora(["c_attn"], bias="all", fan_in_fan_out=True)),
    "saved with biases": ("qwen2", lora(["q_proj"], modules_to_save=["v_proj"], bias="all")),
    "plain": ("llama", lora(["q_proj"], bias="all", modules_to_save=["score"])),
}


def read(folder: Path, facts: Any) -> tuple[Manifest, Values]:
    """The manifest, and every canonical tensor by its name."""
    manifest = ingested(folder, facts).manifest
    assert manifest.servable, manifest.unservable_reason
    with open_buffer(folder.with_suffix(".canonical")) as buffer:
        values = {
            entry.name: to_float32(entry, tensor_view(entry, buffer)).copy() for entry in manifest.tensors
        }
    return manifest, values


def made(case: str, tmp_path: Path) -> tuple[Path, Any]:
    base, config = CASES[case]
    facts, _ = write(BASES[base], copy.deepcopy(config), tmp_path / "a")
    return tmp_path / "a", facts


def uploaded(folder: Path) -> Values:
    found = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): values for name, values in found.items()}


def places(manifest: Manifest, op: str) -> list[tuple[str, int]]:
    return [(module.site, module.layer) for module in manifest.modules if module.op == op]


def change(folder: Path, config: Values, tensors: Values) -> None:
    """Changes the config; None takes a tensor away."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    found = load_file(weights)
    for name, values in tensors.items():
        found.pop(f"base_model.model.{name}", None)
        if values is not None:
            found[f"base_model.model.{name}"] = values
    save_file(found, weights)


def test_a_lora_of_the_embeddings_is_one_of_one_hot_rows(tmp_path: Path) -> None:
    folder, facts = made("embeddings", tmp_path)
    manifest, values = read(folder, facts)
    source = uploaded(folder)
    assert places(manifest, "lowrank") == [("embed", 0), ("q", 0), ("q", 1)]
    for slot in "AB":
        expected = source[f"model.embed_tokens.lora_embedding_{slot}"]
        np.testing.assert_array_equal(values[f"L0.embed.{slot}"], expected)
    assert values["L0.embed.A"].shape == (2, 64)
    # What peft saves beside it is the base's own: only what it is remains.
    copied = source["model.embed_tokens.base_layer.weight"]
    assert manifest.same_as_base == {"embed": rounded_digest([copied])}
    assert manifest.size_bytes < copied.nbytes + 8192


def test_a_lora_of_the_head_is_of_the_last_layer(tmp_path: Path) -> None:
    manifest, values = read(*made("head", tmp_path))
    assert places(manifest, "lowrank") == [("q", 0), ("q", 1), ("lm_head", 1)]
    assert values["L1.lm_head.B"].shape == (64, 2)
    assert set(manifest.same_as_base) == {"lm_head"}


def test_a_head_that_follows_the_embeddings_has_tensors_of_its_own(tmp_path: Path) -> None:
    manifest, _ = read(*made("tied embeddings", tmp_path))
    assert places(manifest, "lowrank") == [("embed", 0), ("lm_head", 1)]
    assert set(manifest.same_as_base) == {"embed", "lm_head"}


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        ("tokens", {"embed": (9, 3)}),
        ("tied tokens", {"embed": (9, 3), "lm_head": (9, 3)}),
        ("tokens of both", {"embed": (9,), "lm_head": (3,)}),
        ("tokens alone", {"embed": (9, 3), "lm_head": (9, 3)}),
    ],
)
def test_trained_rows_stand_by_their_tokens(tmp_path: Path, case: str, tokens: Values) -> None:
    folder, facts = made(case, tmp_path)
    manifest, values = read(folder, facts)
    rows = [module for module in manifest.modules if module.op == "token_rows"]
    assert {module.site: module.tokens for module in rows} == tokens
    source = {
        name: value for name, value in uploaded(folder).items() if name.endswith("trainable_tokens_delta")
    }
    for module in rows:
        path = "model.embed_tokens" if module.site == "embed" or len(source) == 1 else "lm_head"
        [expected] = [value for name, value in source.items() if name.startswith(path)]
        np.testing.assert_array_equal(values[module.tensors["rows"]], expected)


def test_a_saved_module_is_one_op_for_each_site_in_it(tmp_path: Path) -> None:
    folder, facts = made("saved fused", tmp_path)
    manifest, values = read(folder, facts)
    assert places(manifest, "replace") == [(site, layer) for layer in (0, 1) for site in "qkv"]
    whole = uploaded(folder)["model.layers.1.self_attn.qkv_proj.weight"]
    parts = np.concatenate([values[f"L1.{site}.weight"] for site in "qkv"])
    np.testing.assert_array_equal(parts, whole)


def test_a_saved_conv1d_is_turned(tmp_path: Path) -> None:
    folder, facts = made("saved turned", tmp_path)
    manifest, values = read(folder, facts)
    source = uploaded(folder)
    assert ("k", 1) in places(manifest, "replace")
    weight = np.concatenate([values[f"L1.{site}.weight"] for site in "qkv"])
    bias = np.concatenate([values[f"L1.{site}.bias"] for site in "qkv"])
    np.testing.assert_array_equal(weight.T, source["transformer.h.1.attn.c_attn.weight"])
    np.testing.assert_array_equal(bias, source["transformer.h.1.attn.c_attn.bias"])


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("saved ends", [("embed", 0), ("lm_head", 1)]),
        (
            "saved norms",
            [
                ("attention_norm", 0),
                ("ffn_norm", 0),
                ("attention_norm", 1),
                ("ffn_norm", 1),
                ("final_norm", 1),
            ],
        ),
        ("biases", [(site, layer) for layer in (0, 1) for site in ("k", "q", "v")]),
        ("own biases", [("q", 0), ("q", 1)]),
        ("saved with biases", [(site, layer) for layer in (0, 1) for site in ("k", "q", "v")]),
        ("plain", []),
    ],
)
def test_what_is_replaced_stands_in_the_order_of_the_layers(
    tmp_path: Path, case: str, expected: list[tuple[str, int]]
) -> None:
    folder, facts = made(case, tmp_path)
    manifest, values = read(folder, facts)
    found = places(manifest, "replace")
    assert sorted(found) == sorted(expected)
    assert [layer for _, layer in found] == sorted(layer for _, layer in found)
    assert [module.layer for module in manifest.modules] == sorted(
        module.layer for module in manifest.modules
    )
    if case == "own biases":
        expected_bias = uploaded(folder)["model.layers.1.self_attn.q_proj.base_layer.bias"]
        np.testing.assert_array_equal(values["L1.q.bias"], expected_bias)


def test_every_bias_of_a_gpt2_is_read(tmp_path: Path) -> None:
    manifest, _ = read(*made("every bias", tmp_path))
    sites = ["q", "k", "v", "o", "up", "down", "attention_norm", "ffn_norm"]
    expected = {(site, layer) for site in sites for layer in (0, 1)} | {("final_norm", 1)}
    assert set(places(manifest, "replace")) == expected
    assert all(set(module.tensors) == {"bias"} for module in manifest.modules if module.op == "replace")


NORM = "model.layers.1.input_layernorm.weight"
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"
COPY = "model.embed_tokens.base_layer.weight"
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SEVENTH = "model.layers.7.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("case", "config", "tensors", "why"),
    [
        ("saved norms", {}, {NORM: None}, f"'{NORM[:-7]}' is in modules_to_save, but the file has no weight"),
        ("saved norms", {}, {NORM: np.ones(8)}, "expected [16]: the shape that"),
        ("saved norms", {}, {NORM[:-6] + "bias": np.ones(16)}, "which has none in the base"),
        (
            "saved norms",
            {"modules_to_save": ["post_attention_layernorm"]},
            {},
            "names no such module",
        ),
        ("saved ends", {}, {"lm_head.weight": None}, "'lm_head' is in modules_to_save"),
        (
            "saved ends",
            {},
            {"lm_head.weight": np.ones((63, 16))},
            "expected [64, 16]: the shape that",
        ),
        (
            "saved ends",
            {},
            {"model.layers.7.mlp.up_proj.weight": np.ones((24, 16))},
            "names no such",
        ),
        (
            "saved fused",
            {},
            {SEVENTH: np.ones((32, 16))},
            "in layer 7, but",
        ),
        ("saved turned", {}, {"transformer.h.1.attn.c_attn.weight": np.ones((48, 16))}, "expected [16, 48]"),
        ("saved turned", {}, {"transformer.h.1.attn.c_attn.bias": None}, "is trained by the config, but"),
        ("embeddings", {}, {COPY: np.ones((65, 16))}, "whose vocabulary must not be changed"),
        ("embeddings", {}, {"model.embed_tokens.lora_embedding_A": None}, "but no lora_embedding_A"),
        ("embeddings", {}, {"model.embed_tokens.lora_embedding_A": np.ones((2, 63))}, "expected [2, 64]"),
        ("embeddings", {}, {"model.embed_tokens.lora_A.weight": np.ones((2, 64))}, "is not expected"),
        ("head", {}, {"lm_head.lora_B.weight": np.ones((63, 2))}, "expected [64, 2]"),
        ("head", {"target_modules": ["q_proj"]}, {}, "the config does not target it"),
        ("tokens", {}, {DELTA: None}, "the file has no rows"),
        ("tokens", {}, {DELTA: np.ones((3, 16))}, "expected [2, 16]: 2 trained tokens from the config"),
        ("tokens", {"trainable_token_indices": [9, 9]}, {}, "one of them is there twice"),
        (
            "tokens",
            {"trainable_token_indices": [9, 64]},
            {},
            "token 64 is trained, the base has",
        ),
        ("tokens", {"trainable_token_indices": [9, -1]}, {}, "greater than or equal to 0"),
        ("tokens", {"trainable_token_indices": None}, {}, "the config trains no tokens there"),
        ("tokens", {"trainable_token_indices": {"score": [9, 3]}}, {}, "names 'score', which is neither"),
        ("tokens alone", {"token_indices": []}, {}, "the trained tokens are none"),
        (
            "tokens alone",
            {},
            {f"{Q0}.lora_A.weight": np.ones((2, 16))},
            "only rows of",
        ),
        ("biases", {}, {f"{V1}.bias": None}, f"the bias of '{V1}' is trained by the config"),
        ("biases", {}, {f"{V1}.bias": np.ones(9)}, "expected [8]"),
        ("biases", {"bias": "none"}, {}, "is not expected"),
        ("biases", {"bias": "some"}, {}, "bias: String should match pattern"),
        (
            "own biases",
            {},
            {f"{Q0}.base_layer.bias": None},
            "is trained by the config",
        ),
    ],
)
def test_a_file_that_disagrees_with_its_config_is_rejected(
    tmp_path: Path, case: str, config: Values, tensors: Values, why: str
) -> None:
    folder, facts = made(case, tmp_path)
    given = {name: None if one is None else one.astype(np.float32) for name, one in tensors.items()}
    change(folder, config, given)
    with pytest.raises(Rejection) as caught:
        ingested(folder, facts)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("base", "config", "why"),
    [
        ("llama", lora(["embed_tokens"], use_dora=True), "a DoRA of model.embed_tokens"),
        ("llama", lora(["lm_head"], use_dora=True), "a DoRA of lm_head"),
        ("llama", peft.LoKrConfig(target_modules=["lm_head"]), "a LoKr of lm_head"),
        ("gpt2", lora(["wpe", "c_attn"], fan_in_fan_out=True), "transformer.wpe, which is no site"),
        (
            "gpt2",
            lora(["c_attn"], fan_in_fan_out=True, modules_to_save=["wpe"]),
            "it replaces transformer.wpe",
        ),
        (
            "llama",
            lora(["q_proj"], alora_invocation_tokens=[3], modules_to_save=["lm_head"]),
            "an activated LoRA beside modules",
        ),
    ],
)
def test_what_can_not_be_computed_is_stored_with_the_reason(
    tmp_path: Path, base: str, config: peft.PeftConfig, why: str
) -> None:
    facts, _ = write(BASES[base], copy.deepcopy(config), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason
    assert not manifest.same_as_base


@pytest.mark.parametrize(
    ("case", "config", "why"),
    [
        ("embeddings", {"alora_invocation_tokens": [3]}, "an activated LoRA of the embeddings"),
        ("tokens", {"alora_invocation_tokens": [3]}, "an activated LoRA beside modules, biases or tokens"),
    ],
)
def test_what_peft_does_not_have_is_stored_with_the_reason(
    tmp_path: Path, case: str, config: Values, why: str
) -> None:
    folder, facts = made(case, tmp_path)
    change(folder, config, {})
    manifest = ingested(folder, facts).manifest
    assert not manifest.servable
    assert why in manifest.unservable_reason
