"""Where AdapterHub's `adapters` library puts its modules in each architecture that it implements itself.

Source: adapters 1.3.0, `models/<model>/mixin_<model>.py` and `modeling_<model>.py`. Data, not code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Places:
    """One architecture. Paths are relative to a layer.

    `blocks` has the path of the bottlenecks of each block site. `matrices` has the modules of `selfattn_lora`
    by the letter of `attn_matrices`; where they are one `fused` module, its path for each. `intermediate` and
    `output` are the modules of `intermediate_lora` and `output_lora`, whatever their names promise.
    `bias_keys` are keys of the base's config that give these modules biases, "" for always. `post_norm`:
    layer norms follow the sub-layers.
    """

    model_type: str
    blocks: Mapping[str, str]
    matrices: Mapping[str, str]
    intermediate: str
    output: str
    fused: bool = False
    bias_keys: tuple[str, ...] = ()
    post_norm: bool = False


_BLOCKS = MappingProxyType({"attention": "attention_adapters", "ffn": "output_adapters"})
_SELF_ATTN = MappingProxyType({letter: f"self_attn.{letter}_proj" for letter in "qkv"})

PLACES: Mapping[str, Places] = MappingProxyType(
    {
        # Llama's mixin calls down_proj "intermediate" and up_proj "output"; gate_proj has no LoRA at all.
        "LlamaForCausalLM": Places(
            "llama",
            _BLOCKS,
            _SELF_ATTN,
            "mlp.down_proj",
            "mlp.up_proj",
            bias_keys=("attention_bias", "mlp_bias"),
        ),
        "MistralForCausalLM": Places("mistral", _BLOCKS, _SELF_ATTN, "mlp.down_proj", "mlp.up_proj"),
        "GPT2LMHeadModel": Places(
            "gpt2",
            _BLOCKS,
            MappingProxyType(dict.fromkeys("qkv", "attn.c_attn")),
            "mlp.c_fc",
            "mlp.c_proj",
            fused=True,
            bias_keys=("",),
        ),
    }
)
"""By the name of the base's transformers class."""
