"""The model that is measured: a shape with random weights, written as config.json and a trivial tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked of a model of which size. Tokens are those of one request."""

    name: str
    config: dict[str, Any]
    rows: int = 64
    prompt_tokens: int = 128
    output_tokens: int = 96
    adapters: int = 64
    rank: int = 16
    long_prompt: int = 1024
    peft_tokens: int = 8
    copy_bytes: int = 4 * 2**30

    @property
    def context_tokens(self) -> int:
        return max(self.prompt_tokens + self.output_tokens, self.long_prompt) + 16


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }


LLAMA_8B = Shape(
    "llama-3.1-8b-shape",
    # Source: the published config.json of Llama 3.1 8B.
    _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    ),
)

TINY = Shape(
    "tiny-shape",
    _llama(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    rows=3,
    prompt_tokens=8,
    output_tokens=6,
    adapters=3,
    rank=4,
    long_prompt=24,
    peft_tokens=3,
    copy_bytes=2**20,
)
"""For trying the harness; its figures mean nothing."""


def write_shape(shape: Shape, cache: Path) -> Path:
    """A folder that `load_format` "dummy" loads."""
    folder = cache / shape.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1))
    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(folder))
    return folder
