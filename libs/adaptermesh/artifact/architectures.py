"""The module map of each architecture: where its sites are and how wide. Adding one is one entry here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One linear module of a layer.

    `path` is relative to the layer. `parts` lists the sites in it in the order of its output rows, each with
    the dimension it is wide; more than one part means a fused projection. Dimensions are `hidden`, `q`, `kv`
    and `ffn`.
    """

    path: str
    in_dim: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A block site, by modules of the layer: one that reads the stream, one whose output joins it."""

    reads: str
    joins: str


_PRE_NORM: Mapping[str, Block] = MappingProxyType(
    {
        "attention": Block("input_layernorm", "self_attn"),
        "ffn": Block("post_attention_layernorm", "mlp"),
    }
)
_BOTH_NORMS: Mapping[str, Block] = MappingProxyType(
    {
        "attention": Block("input_layernorm", "post_attention_layernorm"),
        "ffn": Block("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    }
)
_GPT2_BLOCKS: Mapping[str, Block] = MappingProxyType(
    {"attention": Block("ln_1", "attn"), "ffn": Block("ln_2", "mlp")}
)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: its layers' path, their linear modules, and the config defaults of its class.

    `conv1d` modules hold their weight as (in, out). Without `grouped_heads` the config's head_dim and
    num_key_value_heads mean nothing. `other_modules` are modules outside of the layers that an adapter may
    name but that are no site yet. `blocks` has the place of each block site.
    """

    layer_path: str
    modules: tuple[ModuleRow, ...]
    other_modules: tuple[str, ...]
    defaults: Mapping[str, int | None] = field(default_factory=dict)
    conv1d: bool = False
    grouped_heads: bool = True
    blocks: Mapping[str, Block] = field(default_factory=lambda: _PRE_NORM)


_ATTENTION = (
    ModuleRow("self_attn.q_proj", "hidden", (("q", "q"),)),
    ModuleRow("self_attn.k_proj", "hidden", (("k", "kv"),)),
    ModuleRow("self_attn.v_proj", "hidden", (("v", "kv"),)),
)
_OUT = (ModuleRow("self_attn.o_proj", "q", (("o", "hidden"),)),)
_GATED = (
    ModuleRow("mlp.gate_proj", "hidden", (("gate", "ffn"),)),
    ModuleRow("mlp.up_proj", "hidden", (("up", "ffn"),)),
)
_DOWN = (ModuleRow("mlp.down_proj", "ffn", (("down", "hidden"),)),)
_FUSED_ATTENTION = (ModuleRow("self_attn.qkv_proj", "hidden", (("q", "q"), ("k", "kv"), ("v", "kv"))),)
_FUSED_GATED = (ModuleRow("mlp.gate_up_proj", "hidden", (("gate", "ffn"), ("up", "ffn"))),)
_GPT2 = (
    ModuleRow("attn.c_attn", "hidden", (("q", "q"), ("k", "kv"), ("v", "kv"))),
    ModuleRow("attn.c_proj", "q", (("o", "hidden"),)),
    ModuleRow("mlp.c_fc", "hidden", (("up", "ffn"),)),
    ModuleRow("mlp.c_proj", "ffn", (("down", "hidden"),)),
)

_LAYERS = "model.layers.{layer}"
_OTHER = ("model.embed_tokens", "lm_head")
_PLAIN = _ATTENTION + _OUT + _GATED + _DOWN

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(_LAYERS, _PLAIN, _OTHER),
        "MistralForCausalLM": Family(_LAYERS, _PLAIN, _OTHER, {"num_key_value_heads": 8}),
        "Qwen2ForCausalLM": Family(_LAYERS, _PLAIN, _OTHER, {"num_key_value_heads": 32}),
        "Qwen3ForCausalLM": Family(_LAYERS, _PLAIN, _OTHER, {"num_key_value_heads": 32, "head_dim": 128}),
        "Gemma2ForCausalLM": Family(
            _LAYERS, _PLAIN, _OTHER, {"num_key_value_heads": 4, "head_dim": 256}, blocks=_BOTH_NORMS
        ),
        "Gemma3ForCausalLM": Family(
            _LAYERS, _PLAIN, _OTHER, {"num_key_value_heads": 4, "head_dim": 256}, blocks=_BOTH_NORMS
        ),
        "Phi3ForCausalLM": Family(_LAYERS, _FUSED_ATTENTION + _OUT + _FUSED_GATED + _DOWN, _OTHER),
        "GPT2LMHeadModel": Family(
            "transformer.h.{layer}",
            _GPT2,
            ("transformer.wte", "transformer.wpe", "lm_head"),
            {"n_inner": None},
            conv1d=True,
            grouped_heads=False,
            blocks=_GPT2_BLOCKS,
        ),
    }
)
"""The families by the name of their transformers class."""
