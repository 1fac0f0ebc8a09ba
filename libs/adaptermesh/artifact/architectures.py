"""The module map of each architecture: where its sites are and how wide. Adding one is one entry here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One linear module of a layer.

    `path` is relative to the layer. `parts` lists the sites in it in the order of its output rows, each with
    the dimension it is wide; more than one part means a fused projection. Dimensions are `hidden`, `q`, `kv`
    and `ffn`. `bias` is the key of the config that gives it a bias, "" where it always has one, None where it
    never has.
    """

    path: str
    in_dim: str
    parts: tuple[tuple[str, str], ...]
    bias: str | None = None


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
    name but that are no site. `blocks` has the place of each block site. `embeddings`, `head` and
    `final_norm` are the modules around the layers, "" where they are no sites; `tied` says that head and
    embeddings share their weight unless the config says otherwise. A norm multiplies by its weight plus
    `norm_offset`, and `norm_bias` says whether it adds one.
    """

    layer_path: str
    modules: tuple[ModuleRow, ...]
    other_modules: tuple[str, ...] = ()
    defaults: Mapping[str, int | None] = field(default_factory=dict)
    conv1d: bool = False
    grouped_heads: bool = True
    blocks: Mapping[str, Block] = field(default_factory=lambda: _PRE_NORM)
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    tied: bool = False
    norm_offset: float = 0.0
    norm_bias: bool = False


def _biased(rows: tuple[ModuleRow, ...], key: str) -> tuple[ModuleRow, ...]:
    return tuple(replace(row, bias=key) for row in rows)


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
_PLAIN = _ATTENTION + _OUT + _GATED + _DOWN
_SOME_BIASES = _biased(_ATTENTION + _OUT, "attention_bias") + _GATED + _DOWN
_GEMMA = Family(
    _LAYERS,
    _SOME_BIASES,
    defaults={"num_key_value_heads": 4, "head_dim": 256},
    blocks=_BOTH_NORMS,
    tied=True,
    norm_offset=1.0,
)

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            _LAYERS, _biased(_ATTENTION + _OUT, "attention_bias") + _biased(_GATED + _DOWN, "mlp_bias")
        ),
        "MistralForCausalLM": Family(_LAYERS, _PLAIN, defaults={"num_key_value_heads": 8}),
        "Qwen2ForCausalLM": Family(
            _LAYERS, _biased(_ATTENTION, "") + _OUT + _GATED + _DOWN, defaults={"num_key_value_heads": 32}
        ),
        "Qwen3ForCausalLM": Family(
            _LAYERS, _SOME_BIASES, defaults={"num_key_value_heads": 32, "head_dim": 128}
        ),
        "Gemma2ForCausalLM": _GEMMA,
        "Gemma3ForCausalLM": _GEMMA,
        "Phi3ForCausalLM": Family(_LAYERS, _FUSED_ATTENTION + _OUT + _FUSED_GATED + _DOWN),
        "GPT2LMHeadModel": Family(
            "transformer.h.{layer}",
            _biased(_GPT2, ""),
            ("transformer.wpe",),
            {"n_inner": None},
            conv1d=True,
            grouped_heads=False,
            blocks=_GPT2_BLOCKS,
            embeddings="transformer.wte",
            final_norm="transformer.ln_f",
            tied=True,
            norm_bias=True,
        ),
    }
)
"""The decoders by the name of their transformers class."""

# Their layer norms follow the sub-layers: nothing joins the stream as the block sites' ops do.
_NO_BLOCKS: Mapping[str, Block] = MappingProxyType({})
_ENCODER_LAYERS = "encoder.layer.{layer}"
_BERT = (
    ModuleRow("attention.self.query", "hidden", (("q", "q"),)),
    ModuleRow("attention.self.key", "hidden", (("k", "kv"),)),
    ModuleRow("attention.self.value", "hidden", (("v", "kv"),)),
    ModuleRow("attention.output.dense", "q", (("o", "hidden"),)),
    ModuleRow("intermediate.dense", "hidden", (("up", "ffn"),)),
    ModuleRow("output.dense", "ffn", (("down", "hidden"),)),
)
_DISTILBERT = (
    ModuleRow("attention.q_lin", "hidden", (("q", "q"),)),
    ModuleRow("attention.k_lin", "hidden", (("k", "kv"),)),
    ModuleRow("attention.v_lin", "hidden", (("v", "kv"),)),
    ModuleRow("attention.out_lin", "q", (("o", "hidden"),)),
    ModuleRow("ffn.lin1", "hidden", (("up", "ffn"),)),
    ModuleRow("ffn.lin2", "ffn", (("down", "hidden"),)),
)
_MODERNBERT = (
    ModuleRow("attn.Wqkv", "hidden", (("q", "q"), ("k", "kv"), ("v", "kv"))),
    ModuleRow("attn.Wo", "q", (("o", "hidden"),)),
    # The first half goes through the activation, as a gate_proj's output does.
    ModuleRow("mlp.Wi", "hidden", (("gate", "ffn"), ("up", "ffn"))),
    ModuleRow("mlp.Wo", "ffn", (("down", "hidden"),)),
)


def _embeddings(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}.embeddings.{name}_embeddings" for name in ("word", "position"))


ENCODERS: Mapping[str, Family] = MappingProxyType(
    {
        "BertForMaskedLM": Family(
            f"bert.{_ENCODER_LAYERS}",
            _BERT,
            (*_embeddings("bert"), "cls.predictions.transform.dense", "cls.predictions.decoder"),
            grouped_heads=False,
            blocks=_NO_BLOCKS,
            embeddings="",
            head="",
            final_norm="",
        ),
        "RobertaForMaskedLM": Family(
            f"roberta.{_ENCODER_LAYERS}",
            _BERT,
            (*_embeddings("roberta"), "lm_head.dense", "lm_head.decoder"),
            grouped_heads=False,
            blocks=_NO_BLOCKS,
            embeddings="",
            head="",
            final_norm="",
        ),
        "DistilBertForMaskedLM": Family(
            "distilbert.transformer.layer.{layer}",
            _DISTILBERT,
            (*_embeddings("distilbert"), "vocab_transform", "vocab_projector"),
            grouped_heads=False,
            blocks=_NO_BLOCKS,
            embeddings="",
            head="",
            final_norm="",
        ),
        "ModernBertForMaskedLM": Family(
            _LAYERS,
            _MODERNBERT,
            ("model.embeddings.tok_embeddings", "head.dense", "decoder"),
            grouped_heads=False,
            blocks=_NO_BLOCKS,
            embeddings="",
            head="",
            final_norm="",
        ),
    }
)
"""The encoders likewise. Their adapters can be read; no engine runs them yet."""
