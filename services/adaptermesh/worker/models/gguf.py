"""GGUF of a Llama model in, float32 safetensors and tokenizer with chat template out."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

_LLAMA_CLASS = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
_LLAMA_CONFIG = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes config, float32 safetensors, generation config and tokenizer of a GGUF file into a folder."""
    transformers_logging.disable_progress_bar()
    # The reader of GGUF draws a progress bar that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert_model(gguf_file, folder)
    _convert_tokenizer(gguf_file, folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files readable by their owner alone


def _convert_model(gguf_file: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    # A model that came from GGUF counts as quantised and refuses save_pretrained: a fresh one of the same
    # config takes its tensors over.
    plain = _plain_config(loaded.config.to_dict())
    config = LlamaConfig(**plain)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    fresh.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({**plain, **_LLAMA_CLASS}, indent=2, sort_keys=True) + "\n", "utf-8"
    )


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what only GGUF brought in, and without the library's other defaults.

    The digest of a base model is over its config: another transformers version must not give another one.
    """
    plain = {key: config[key] for key in sorted(_LLAMA_CONFIG)}
    # GGUF keeps it in float32: 9.999999747378752e-06 stands for 1e-05.
    plain["rms_norm_eps"] = float(f"{plain['rms_norm_eps']:.6g}")
    return plain


def _convert_tokenizer(gguf_file: Path, folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = loaded.backend_tokenizer
    reader = GGUFReader(gguf_file)
    if _text(reader, "tokenizer.ggml.pre") == "smollm":
        # This family splits digits one by one first; the name of the scheme is all that GGUF keeps of it.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        unk_token=loaded.unk_token,
        pad_token=loaded.pad_token,
        model_max_length=_number(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _text(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _number(reader: GGUFReader, key: str) -> int:
    field = reader.get_field(key)
    return 0 if field is None else int(field.contents())
