"""Writes the golden files beside it: what the `adapters` library saves, and what it computes.

    python -m venv env && env/bin/pip install torch==2.13.0 adapters==1.3.0
    env/bin/python tests/parity/adapters/make_goldens.py

The library pins a transformers that nothing else here can use, so it lives in an environment of its own and
this script imports nothing of the project. References are taken one prompt at a time, with eager attention
and without a cache: the library never fills it on Llama.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    AdapterFusionConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MTLLoRAConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)
from adapters.composition import Fuse, Stack
from safetensors.torch import save_file

ROOT = Path(__file__).parent / "goldens"
NAME = "task_1"
PROMPTS = [[5, 17, 42, 9, 33], [61, 2, 2, 30, 11, 7, 50, 23]]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    # transformers 4 reads the one, transformers 5 the other.
    "rope_theta": 20000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")},
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": None,
}
BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
BASES = {"llama": LLAMA, "gpt2": GPT2, "mistral": MISTRAL}
# Its library's code is a copy of Llama's: a few methods show that.
ON_MISTRAL = ("seq_bn", "double_seq_bn", "par_bn", "lora_everywhere", "ia3")

PHM = {"phm_dim": 4, "reduction_factor": 4}
EVERYWHERE = {"selfattn_lora": True, "intermediate_lora": True, "output_lora": True}
PLUS = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}

SERVED: dict[str, Callable[[], Any]] = {
    "seq_bn": lambda: SeqBnConfig(reduction_factor=4),
    "seq_bn_by_layer": lambda: SeqBnConfig(reduction_factor={"1": 2.5, "default": 64}, non_linearity="tanh"),
    "seq_bn_left_out": lambda: SeqBnConfig(reduction_factor=4, leave_out=[0], non_linearity="leakyrelu"),
    "adapter_plus": lambda: SeqBnConfig(reduction_factor=4, scaling="channel", non_linearity="gelu", **PLUS),
    "seq_bn_inv": lambda: SeqBnInvConfig(reduction_factor=4),
    "double_seq_bn": lambda: DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": lambda: ParBnConfig(reduction_factor=2),
    "scaled_par_bn": lambda: ParBnConfig(reduction_factor=4, scaling="learned"),
    "negative_par_bn": lambda: ParBnConfig(
        reduction_factor=4, scaling="learned", mh_adapter=True, non_linearity="gelu_new"
    ),
    "compacter": lambda: CompacterConfig(**PHM),
    "compacter_pp": lambda: CompacterPlusPlusConfig(**PHM, phm_rank=2),
    "compacter_own_rules": lambda: CompacterConfig(
        **PHM, shared_phm_rule=False, factorized_phm_rule=True, factorized_phm_W=False, phm_bias=False
    ),
    "compacter_shared": lambda: CompacterConfig(**PHM, shared_W_phm=True, factorized_phm_rule=True),
    "lora": lambda: LoRAConfig(r=4, alpha=10),
    "lora_everywhere": lambda: LoRAConfig(r=3, alpha=3, attn_matrices=["v", "q", "k"], **EVERYWHERE),
    "prefix_tuning": lambda: PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    "prefix_tuning_flat": lambda: PrefixTuningConfig(flat=True, prefix_length=11),
    "mam": lambda: ConfigUnion(
        PrefixTuningConfig(prefix_length=3, bottleneck_size=8), ParBnConfig(reduction_factor=4)
    ),
    "union": lambda: ConfigUnion(LoRAConfig(r=2, alpha=4), CompacterConfig(**PHM), LoReftConfig(r=2)),
    "loreft": lambda: LoReftConfig(),
    "loreft_both_ends": lambda: LoReftConfig(r=3, prefix_positions=2, suffix_positions=4),
    "loreft_tied": lambda: LoReftConfig(r=2, suffix_positions=2, tied_weights=True, non_linearity="gelu"),
    "loreft_last": lambda: LoReftConfig(prefix_positions=0, suffix_positions=1, layers=[1]),
    "noreft_told": lambda: NoReftConfig(r=2, suffix_positions=1),
    "direft_told": lambda: DiReftConfig(r=2, suffix_positions=1),
    "ia3": lambda: IA3Config(),
    "ia3_everywhere": lambda: IA3Config(attn_matrices=["q", "v"], output_lora=True, leave_out=[1]),
}
VERA = {"r": 4, "alpha": 6, "vera_d": 0.1, "vera_b": 0.0, "init_weights": "vera"}
SERVED_ON: dict[str, dict[str, Callable[[], Any]]] = {
    "llama": {
        "vera": lambda: LoRAConfig(**VERA, attn_matrices=["q"]),
        "dora": lambda: LoRAConfig(r=4, alpha=4, use_dora=True),
        "dora_scaled": lambda: LoRAConfig(r=4, alpha=10, use_dora=True),
        "dvora": lambda: LoRAConfig(**{**VERA, "alpha": 4}, attn_matrices=["q"], use_dora=True),
    },
    "gpt2": {"vera": lambda: LoRAConfig(**VERA, selfattn_lora=False, intermediate_lora=True)},
    "mistral": {},
}
STORED: dict[str, Callable[[], Any]] = {
    "seq_bn_glow": lambda: SeqBnInvConfig(reduction_factor=4, inv_adapter="glow"),
    "seq_bn_gated": lambda: SeqBnConfig(reduction_factor=4, use_gating=True),
    "seq_bn_ln_before": lambda: SeqBnConfig(reduction_factor=4, ln_before=True),
    "seq_bn_ln_after": lambda: SeqBnConfig(reduction_factor=4, ln_after=True),
    "seq_bn_twice_residual": lambda: SeqBnConfig(reduction_factor=4, residual_before_ln=False),
    "bn_without_residual": lambda: BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="relu",
        original_ln_after=False,
    ),
    "seq_bn_mish": lambda: SeqBnConfig(reduction_factor=4, non_linearity="mish"),
    "lora_gated": lambda: LoRAConfig(r=4, use_gating=True),
    "mtl_lora": lambda: MTLLoRAConfig(r=4),
    "noreft": lambda: NoReftConfig(),
    "direft": lambda: DiReftConfig(),
    "unipelt": lambda: ConfigUnion(
        *(
            config.replace(use_gating=True)
            for config in (
                PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
                SeqBnConfig(reduction_factor=4),
                LoRAConfig(r=4, alpha=2),
            )
        )
    ),
}
SEQ = {
    "a": SeqBnConfig(reduction_factor=8, leave_out=[0]),
    "b": SeqBnConfig(reduction_factor=4, non_linearity="gelu", scaling=0.7),
    "c": SeqBnConfig(reduction_factor=16, non_linearity="tanh", scaling="learned"),
}
DOUBLE = {
    "a": DoubleSeqBnConfig(reduction_factor=8),
    "b": DoubleSeqBnConfig(reduction_factor=4, non_linearity="tanh"),
}
# What is together, its members, the fusion's config, and which parts of the latter are told otherwise.
SETS: dict[str, tuple[Callable[[], Any], dict[str, Any], str, dict[str, Any]]] = {
    "fuse_dynamic": (lambda: Fuse("a", "b", "c"), SEQ, "dynamic", {}),
    "fuse_static": (lambda: Fuse("a", "b"), DOUBLE, "static", {"query_before_ln": True}),
    "fuse_late_value": (lambda: Fuse("b", "c"), SEQ, "dynamic", {"value_before_softmax": False}),
    "stack_seq_bn": (lambda: Stack("a", "b", "c"), SEQ, "", {}),
    "stack_double_seq_bn": (lambda: Stack("a", "b"), DOUBLE, "", {}),
    "stack_on_fuse": (lambda: Stack("c", Fuse("a", "b")), SEQ, "dynamic", {}),
}


def write_base(kind: str, folder: Path) -> None:
    """A base of seeded weights that are large enough for its logits to move."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**BASES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(BASES[kind], indent=2, sort_keys=True) + "\n")
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(kind: str) -> Any:
    """The base with the library's layers in it."""
    # The library writes the path it was given into its configs.
    with contextlib.chdir(ROOT / kind):
        model = transformers.AutoModelForCausalLM.from_pretrained("base", attn_implementation="eager")
    adapters.init(model)
    return model.eval()


def fill(model: Any, name: str) -> None:
    """Trains, so to speak: every parameter of the adapter becomes a random one."""
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if f".{name}." not in key:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if key.endswith("scaling"):
                parameter.copy_(noise if len(noise) > 1 else 0.5 + noise.abs())
            elif key.endswith(".m.weight"):
                parameter.mul_(1 + 0.3 * noise)
            elif key.endswith("parametrizations.weight.original"):
                # Its diagonal holds the signs of an orthogonal matrix.
                signs = torch.tensor([1.0, -1.0]).repeat(len(noise))[: len(noise)]
                parameter.copy_((0.3 * noise).diagonal_scatter(signs))
            elif "phm_rule" in key:
                parameter.copy_(noise)
            else:
                parameter.copy_(0.3 * noise + (0.3 if "lora_B" in key and parameter.shape[-1] == 1 else 0.0))


def logits(model: Any) -> list[list[float]]:
    """Of the last position of each prompt."""
    with torch.no_grad():
        return [
            [round(value, 6) for value in model(torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()]
            for ids in PROMPTS
        ]


def write_adapter(kind: str, method: str, config: Any, *, with_head: bool = False) -> Any:
    """Saves one adapter as the library does; returns the model with it switched on."""
    model = load(kind)
    # What a parametrisation begins with is random too.
    torch.manual_seed(3)
    model.add_adapter(NAME, config=config)
    fill(model, NAME)
    if method == "negative_par_bn":
        with torch.no_grad():
            learned = [value for key, value in model.named_parameters() if key.endswith(".scaling")]
            for parameter, scale in zip(learned, (-0.7, 0.0, 1.3, -0.2), strict=True):
                parameter.fill_(scale)
    model.set_active_adapters(NAME)
    folder = ROOT / kind / method
    try:
        model.save_adapter(str(folder), NAME, with_head=with_head, use_safetensors=True)
    except RuntimeError:
        # Some modules of the library are in the model more than once, which safetensors refuses to save.
        model.save_adapter(str(folder), NAME, with_head=with_head, use_safetensors=False)
        pickled = folder / "pytorch_adapter.bin"
        tensors = torch.load(pickled, weights_only=True)
        pickled.unlink()
        save_file({key: value.clone() for key, value in tensors.items()}, folder / "adapter.safetensors")
    if method.endswith("_told"):
        # What the library leaves out.
        file = folder / "adapter_config.json"
        saved = json.loads(file.read_text())
        saved["config"]["subtract_projection"] = method == "noreft_told"
        file.write_text(json.dumps(saved, indent=2, sort_keys=True))
    return model.eval()


def write_sets(kind: str) -> None:
    """A fusion of two adapters, and a set-up of two."""
    torch.manual_seed(0)
    model = load(kind)
    for name in ("a", "b"):
        model.add_adapter(name, config=SeqBnConfig(reduction_factor=8))
        fill(model, name)
    model.add_adapter_fusion(Fuse("a", "b"))
    model.save_adapter_fusion(str(ROOT / kind / "fusion"), "a,b", use_safetensors=True)
    model.save_adapter_setup(str(ROOT / kind / "stack"), Stack("a", "b"), use_safetensors=True)


def write_set(
    kind: str,
    method: str,
    make: Callable[[], Any],
    members: dict[str, Any],
    config: str,
    told: dict[str, Any],
) -> Any:
    """Saves several adapters that act together as the library does; returns the model with them on."""
    torch.manual_seed(3)
    model = load(kind)
    setup = make()
    for name in sorted(setup.flatten()):
        model.add_adapter(name, config=members[name])
        fill(model, name)
    for fusion in (part for part in (setup, *setup) if isinstance(part, Fuse)):
        model.add_adapter_fusion(fusion, AdapterFusionConfig.load(config, **told))
        fill_fusion(model, fusion.name)
    model.set_active_adapters(setup)
    folder = ROOT / kind / method
    model.save_adapter_setup(str(folder), setup, use_safetensors=True)
    # The library saves the base's own lm head with each member, and can't be told not to.
    for file in (*folder.rglob("head_config.json"), *folder.rglob("model_head.safetensors")):
        file.unlink()
    return model.eval()


def fill_fusion(model: Any, name: str) -> None:
    """Scores of a size at which no adapter gets everything."""
    generator = torch.Generator().manual_seed(11)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_((0.3 if "value" in key else 0.1) * noise)


def write_heads(kind: str) -> None:
    """An lm head of a plain model, and a classification head of one with flexible heads."""
    write_adapter(kind, "with_lm_head", SeqBnConfig(reduction_factor=8), with_head=True)
    with contextlib.chdir(ROOT / kind):
        model = adapters.AutoAdapterModel.from_pretrained("base", attn_implementation="eager")
    model.add_adapter(NAME, config=SeqBnConfig(reduction_factor=8))
    model.add_classification_head(NAME, num_labels=3, id2label={0: "good", 1: "bad", 2: "other"})
    fill(model, NAME)
    model.save_adapter(str(ROOT / kind / "with_class_head"), NAME, use_safetensors=True)


def write_encoder() -> None:
    """Files only: nothing computes with an encoder yet."""
    config = transformers.AutoConfig.for_model(**BERT)
    folder = ROOT / "bert"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(BERT, indent=2, sort_keys=True) + "\n")
    for method in ("double_seq_bn", "lora_everywhere", "ia3", "prompt_tuning"):
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(config)
        adapters.init(model)
        make = SERVED.get(method, lambda: PromptTuningConfig(prompt_length=3))
        model.add_adapter(NAME, config=make())
        fill(model, NAME)
        model.save_adapter(str(folder / method), NAME, with_head=False, use_safetensors=True)


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    for kind in BASES:
        write_base(kind, ROOT / kind / "base")
        expected = {"base": logits(load(kind))}
        for method, make in {**SERVED, **SERVED_ON[kind]}.items():
            if kind == "mistral" and method not in ON_MISTRAL:
                continue
            expected[method] = logits(write_adapter(kind, method, make()))
        for method, parts in SETS.items() if kind != "mistral" else ():
            expected[method] = logits(write_set(kind, method, *parts))
        if kind == "llama":
            for method, make in STORED.items():
                write_adapter(kind, method, make())
            write_sets(kind)
        if kind != "mistral":
            write_heads(kind)
        file = ROOT / kind / "logits.json"
        lines = ",\n".join(f'"{method}": {json.dumps(rows)}' for method, rows in expected.items())
        file.write_text(f'{{"prompts": {json.dumps(PROMPTS)},\n"logits": {{\n{lines}\n}}}}\n')
    write_encoder()


if __name__ == "__main__":
    main()
