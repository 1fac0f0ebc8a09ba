import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptermesh.worker.models.cache import ModelCache
from adaptermesh.worker.models.gguf import convert

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 32, 2, 2, 64


def write_gguf(file: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer, as GGUF in float32."""
    tokens = [*SPECIAL, *"abcdefgh0123456789", "Ġ", "ab", "12"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(gguf_file, folder)
    return folder


def test_the_converted_model_computes_what_the_gguf_computes(gguf_file: Path, converted: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original(ids).logits)


def test_the_config_is_plain(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.keys().isdisjoint({"quantization_config", "transformers_version", "_name_or_path"})


def test_end_and_padding_survive(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert tokenizer.model_max_length == 128


def test_the_chat_template_survives(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[0] == "<|im_start|>"
    assert tokenizer.decode(encoded["input_ids"]) == "<|im_start|>ab<|im_end|>"


def test_digits_are_split_one_by_one_in_spite_of_a_merge(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]


def test_two_conversions_give_the_same_model(
    gguf_file: Path, converted: Path, cache: ModelCache, tmp_path: Path
) -> None:
    one = cache.publish("one", lambda folder: convert(gguf_file, folder))
    two = cache.publish("two", lambda folder: convert(gguf_file, folder))
    assert one.facts.digest == two.facts.digest
