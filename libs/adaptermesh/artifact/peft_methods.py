"""The methods of peft that are read: the keys of each config, and those that make another method of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from adaptermesh.artifact.peft_models import (
    AdaLoraConfig,
    BoftConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    PrefixConfig,
    PromptConfig,
    TargetConfig,
    TokensConfig,
    VeraConfig,
    VirtualConfig,
)


@dataclass(frozen=True, slots=True)
class Method:
    """How a method's config is read.

    `defaults` has every key that peft 0.21 writes. `no_effect` are keys that changed the training but not
    what the adapter computes; `others` are keys that make another method of it when set, and its name.
    """

    model: type[TargetConfig] | type[VirtualConfig]
    defaults: Mapping[str, Any]
    no_effect: frozenset[str]
    others: Mapping[str, str]


_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": False,
        "modules_to_save": None,
        "peft_version": None,
        "revision": None,
        "target_modules": None,
        "task_type": None,
    }
)
_COMMON_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
    }
)
_LAYERS: Mapping[str, Any] = MappingProxyType({"layers_pattern": None, "layers_to_transform": None})
_NO_OTHERS: Mapping[str, str] = MappingProxyType({})
_SAVED: Mapping[str, str] = MappingProxyType(
    {"modules_to_save": "whole modules saved in place of the base's beside virtual tokens"}
)

# Every key of peft 0.21's LoraConfig and its default.
LORA_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "revision": None,
        "target_modules": None,
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
)

_LORA_NO_EFFECT = _COMMON_NO_EFFECT | {
    "corda_config",
    "eva_config",
    "init_lora_weights",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
}
_LORA_OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "arrow_config": "Arrow routing",
        "kasa_config": "KaSA",
        "layer_replication": "layer replication",
        "megatron_config": "Megatron parallel layers",
        "monteclora_config": "MonteCLoRA",
        "target_parameters": "LoRA on parameters of experts",
        "use_bdlora": "block-diagonal LoRA",
        "use_qalora": "QALoRA",
        "velora_config": "VeLoRA",
    }
)

_VIRTUAL: Mapping[str, Any] = MappingProxyType(
    {
        **{key: value for key, value in _COMMON.items() if key != "target_modules"},
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": None,
        "num_virtual_tokens": None,
        "token_dim": None,
    }
)
_ENCODERS_NO_EFFECT = _COMMON_NO_EFFECT | {
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "init_weights",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "LORA": Method(LoraConfig, LORA_DEFAULTS, _LORA_NO_EFFECT, _LORA_OTHERS),
        "ADALORA": Method(
            AdaLoraConfig,
            {
                **LORA_DEFAULTS,
                "peft_type": "ADALORA",
                "beta1": 0.85,
                "beta2": 0.85,
                "deltaT": 1,
                "init_r": 12,
                "orth_reg_weight": 0.5,
                "rank_pattern": None,
                "target_r": 8,
                "tfinal": 0,
                "tinit": 0,
                "total_step": None,
            },
            _LORA_NO_EFFECT
            | {
                "beta1",
                "beta2",
                "deltaT",
                "orth_reg_weight",
                "r",
                "target_r",
                "tfinal",
                "tinit",
                "total_step",
            },
            {
                **_LORA_OTHERS,
                "alora_invocation_tokens": "activation by tokens, which AdaLoRA does not have",
                "lora_bias": "a bias on lora_B, which AdaLoRA does not have",
                "use_dora": "DoRA, which AdaLoRA does not have",
                "alpha_pattern": "an alpha for each module, which AdaLoRA does not have",
                "use_rslora": "the scale of rsLoRA, which AdaLoRA does not have",
            },
        ),
        "LOHA": Method(
            LohaConfig,
            {
                **_COMMON,
                **_LAYERS,
                "peft_type": "LOHA",
                "alpha": 8,
                "alpha_pattern": {},
                "exclude_modules": None,
                "init_weights": True,
                "module_dropout": 0.0,
                "r": 8,
                "rank_dropout": 0.0,
                "rank_pattern": {},
                "use_effective_conv2d": False,
            },
            _COMMON_NO_EFFECT | {"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"},
            _NO_OTHERS,
        ),
        "VERA": Method(
            VeraConfig,
            {
                **_COMMON,
                **_LAYERS,
                "peft_type": "VERA",
                "bias": "none",
                "d_initial": 0.1,
                "fan_in_fan_out": False,
                "init_weights": True,
                "projection_prng_key": 0,
                "r": 256,
                "save_projection": True,
                "vera_dropout": 0.0,
            },
            _COMMON_NO_EFFECT | {"d_initial", "init_weights", "projection_prng_key", "vera_dropout"},
            {
                "save_projection": "projections that are not in the file: save it again with save_projection",
            },
        ),
        "IA3": Method(
            Ia3Config,
            {
                **_COMMON,
                "peft_type": "IA3",
                "exclude_modules": None,
                "fan_in_fan_out": False,
                "feedforward_modules": None,
                "init_ia3_weights": True,
            },
            _COMMON_NO_EFFECT | {"init_ia3_weights"},
            _NO_OTHERS,
        ),
        "LOKR": Method(
            LokrConfig,
            {
                **_COMMON,
                **_LAYERS,
                "peft_type": "LOKR",
                "alpha": 8,
                "alpha_pattern": {},
                "decompose_both": False,
                "decompose_factor": -1,
                "exclude_modules": None,
                "init_weights": True,
                "module_dropout": 0.0,
                "r": 8,
                "rank_dropout": 0.0,
                "rank_dropout_scale": False,
                "rank_pattern": {},
                "use_effective_conv2d": False,
            },
            _COMMON_NO_EFFECT
            | {
                "init_weights",
                "module_dropout",
                "rank_dropout",
                "rank_dropout_scale",
                "use_effective_conv2d",
            },
            _NO_OTHERS,
        ),
        "OFT": Method(
            OftConfig,
            {
                **_COMMON,
                **_LAYERS,
                "peft_type": "OFT",
                "bias": "none",
                "block_share": False,
                "coft": False,
                "eps": 6e-5,
                "exclude_modules": None,
                "fan_in_fan_out": False,
                "init_weights": True,
                "module_dropout": 0.0,
                "num_cayley_neumann_terms": 5,
                "oft_block_size": 32,
                "r": 0,
                "use_cayley_neumann": True,
            },
            _COMMON_NO_EFFECT | {"init_weights", "module_dropout"},
            _NO_OTHERS,
        ),
        "BOFT": Method(
            BoftConfig,
            {
                **_COMMON,
                **_LAYERS,
                "peft_type": "BOFT",
                "bias": "none",
                "boft_block_num": 0,
                "boft_block_size": 4,
                "boft_dropout": 0.0,
                "boft_n_butterfly_factor": 1,
                "exclude_modules": None,
                "fan_in_fan_out": False,
                "init_weights": True,
            },
            _COMMON_NO_EFFECT | {"boft_dropout", "init_weights"},
            _NO_OTHERS,
        ),
        "TRAINABLE_TOKENS": Method(
            TokensConfig,
            {
                **_COMMON,
                "peft_type": "TRAINABLE_TOKENS",
                "init_weights": True,
                "token_indices": [],
            },
            _COMMON_NO_EFFECT | {"init_weights"},
            _NO_OTHERS,
        ),
        "PROMPT_TUNING": Method(
            PromptConfig,
            {
                **_VIRTUAL,
                "peft_type": "PROMPT_TUNING",
                "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_text": None,
                "tokenizer_kwargs": None,
                "tokenizer_name_or_path": None,
            },
            _ENCODERS_NO_EFFECT,
            _SAVED,
        ),
        "P_TUNING": Method(
            PromptConfig,
            {
                **_VIRTUAL,
                "peft_type": "P_TUNING",
                "encoder_dropout": 0.0,
                "encoder_hidden_size": None,
                "encoder_num_layers": 2,
                "encoder_reparameterization_type": "MLP",
            },
            _ENCODERS_NO_EFFECT,
            _SAVED,
        ),
        "PREFIX_TUNING": Method(
            PrefixConfig,
            {
                **_VIRTUAL,
                "peft_type": "PREFIX_TUNING",
                "encoder_hidden_size": None,
                "init_weights": None,
                "prefix_projection": False,
            },
            _ENCODERS_NO_EFFECT,
            _SAVED,
        ),
    }
)
"""By peft's name of each method."""
