from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from adaptermesh.artifact.architectures import ARCHITECTURES, ENCODERS
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.sites import EMBED, HEAD, SiteMap, site_map
from adaptermesh.core.errors import MeshError, Reason

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", SMALL),
    "MistralForCausalLM": ("mistral", SMALL | {"head_dim": 10}),
    "Qwen2ForCausalLM": ("qwen2", SMALL),
    "Qwen3ForCausalLM": ("qwen3", SMALL | {"head_dim": 8}),
    "Gemma2ForCausalLM": ("gemma2", SMALL | {"head_dim": 8}),
    "Gemma3ForCausalLM": ("gemma3_text", SMALL | {"head_dim": 8}),
    "Phi3ForCausalLM": ("phi3", SMALL),
    "GPT2LMHeadModel": ("gpt2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
}


ENCODER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("bert", SMALL),
    "RobertaForMaskedLM": ("roberta", SMALL),
    "DistilBertForMaskedLM": (
        "distilbert",
        {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
    ),
    "ModernBertForMaskedLM": ("modernbert", SMALL | {"cls_token_id": 1, "sep_token_id": 2}),
}


def test_every_architecture_is_compared_with_its_real_model() -> None:
    assert CONFIGS.keys() == ARCHITECTURES.keys()
    assert ENCODER_CONFIGS.keys() == ENCODERS.keys()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_every_site_is_where_and_as_wide_as_in_the_real_model(architecture: str) -> None:
    model_type, values = {**CONFIGS, **ENCODER_CONFIGS}[architecture]
    config = AutoConfig.for_model(model_type, **values)
    make: Any = AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model = make.from_config(config)
    assert type(model).__name__ == architecture
    facts = BaseFacts.from_config(
        "x", {**config.to_dict(), "architectures": [architecture]}, "sha256:" + "0" * 64
    )
    sites = site_map(facts, encoders=True)
    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name not in sites.other_modules
    }
    ends = {site.module: site for site in sites.edges.values()}
    assert set(sites.module_paths()) == set(linear) - set(ends)
    check_around_the_layers(sites, model)
    for path, module in linear.items():
        found = sites.parts(path)
        assert found is not None
        parts, _ = found
        shape = tuple(module.weight.shape)
        width_out, width_in = shape[::-1] if type(module).__name__ == "Conv1D" else shape
        assert {part.in_features for part in parts} == {width_in}
        assert sum(part.out_features for part in parts) == width_out
        assert [part.out_offset for part in parts] == [
            sum(before.out_features for before in parts[:i]) for i in range(len(parts))
        ]
        assert all(part.transposed == (type(module).__name__ == "Conv1D") for part in parts)
        assert all(part.fused == (len(parts) > 1) for part in parts)
        assert sites.has_bias(path) == (module.bias is not None) or architecture in ENCODERS
    for name in sites.other_modules:
        model.get_submodule(name)


def check_around_the_layers(sites: SiteMap, model: Any) -> None:
    """Embeddings, head and norms are where the model has them; an encoder has none as a site."""
    if not sites.edges:
        assert not sites.norms
        return
    assert model.get_submodule(sites.edges[EMBED].module) is model.get_input_embeddings()
    head = model.get_submodule(sites.edges[HEAD].module)
    assert head is model.get_output_embeddings()
    assert tuple(head.weight.shape) == (sites.edges[HEAD].out_features, sites.edges[HEAD].in_features)
    assert sites.tied == bool(model.config.tie_word_embeddings)
    for path in sites.norm_paths():
        norm = model.get_submodule(path)
        assert tuple(norm.weight.shape) == (sites.hidden_size,)
        assert sites.has_bias(path) == (getattr(norm, "bias", None) is not None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_norm_multiplies_by_its_weight_and_what_is_added_to_it(architecture: str) -> None:
    model_type, values = CONFIGS[architecture]
    config = AutoConfig.for_model(model_type, **values)
    model: Any = AutoModelForCausalLM.from_config(config)
    facts = BaseFacts.from_config(
        "x", {**config.to_dict(), "architectures": [architecture]}, "sha256:" + "0" * 64
    )
    sites = site_map(facts)
    x = torch.randn(3, sites.hidden_size)
    for path in sites.norm_paths():
        norm = model.get_submodule(path)
        with torch.no_grad():
            norm.weight.fill_(-sites.norm_offset)
            assert not norm(x).any()
            norm.weight.fill_(1.0 - sites.norm_offset)
            assert norm(x).any()


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoder_has_sites_only_for_those_who_ask(architecture: str) -> None:
    model_type, values = ENCODER_CONFIGS[architecture]
    config = AutoConfig.for_model(model_type, **values).to_dict()
    facts = BaseFacts.from_config("x", {**config, "architectures": [architecture]}, "sha256:" + "0" * 64)
    with pytest.raises(MeshError) as caught:
        site_map(facts)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


def test_a_path_matches_its_site_and_layer(base: BaseFacts) -> None:
    sites = site_map(base)
    found = sites.parts("model.layers.2.mlp.down_proj")
    assert found is not None
    (site,), layer = found
    assert (site.name, layer, site.in_features, site.out_features) == ("down", 2, 24, 16)
    assert sites.get("down") == site
    assert sites.get("nowhere") is None


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.-1.mlp.down_proj",
        "model.layers.01.mlp.down_proj",
        "model.layers.١.mlp.down_proj",
        "model.layers..mlp.down_proj",
        "model.layers.9999999999.mlp.down_proj",
        "model.layers.{layer}.mlp.down_proj",
        "model.layers.0.mlp",
        "model.layers.0.mlp.down_proj.more",
        "x.model.layers.0.mlp.down_proj",
        "lm_heads",
        "",
    ],
)
def test_a_path_that_is_no_site_does_not_match(base: BaseFacts, path: str) -> None:
    assert site_map(base).parts(path) is None


def test_a_fused_module_is_no_single_site(make_base: Callable[..., BaseFacts]) -> None:
    sites = site_map(make_base(architectures=["Phi3ForCausalLM"]))
    found = sites.parts("model.layers.0.self_attn.qkv_proj")
    assert found is not None
    assert [(part.name, part.out_offset, part.out_features) for part in found[0]] == [
        ("q", 0, 16),
        ("k", 16, 8),
        ("v", 24, 8),
    ]


def test_widths_come_from_the_class_where_the_config_leaves_them_out(
    make_base: Callable[..., BaseFacts],
) -> None:
    qwen = site_map(make_base(architectures=["Qwen3ForCausalLM"]))
    q = qwen.get("q")
    assert q is not None
    assert q.out_features == 4 * 128
    plain = site_map(make_base(num_key_value_heads=None, head_dim=None))
    k = plain.get("k")
    assert k is not None
    assert k.out_features == 16


def test_an_architecture_without_a_module_map_is_refused(make_base: Callable[..., BaseFacts]) -> None:
    with pytest.raises(MeshError) as caught:
        site_map(make_base(architectures=["MambaForCausalLM"]))
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert caught.value.metadata["architecture"] == "MambaForCausalLM"


@pytest.mark.parametrize("value", [0, -1, "4", 4.0, True])
def test_a_width_that_is_no_positive_integer_is_refused(
    make_base: Callable[..., BaseFacts], value: Any
) -> None:
    with pytest.raises(MeshError) as caught:
        site_map(make_base(intermediate_size=value))
    assert caught.value.metadata["field"] == "config.intermediate_size"
