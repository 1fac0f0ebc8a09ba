"""Adapters that act around the layers or bring modules of their own, against peft: alone and in one batch."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adaptermesh.core.clock import SystemClock
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.source import AdapterSink
from tests.parity.engine.test_families import FAMILIES, Memory, make_config, step_to_the_end
from tests.parity.engine.test_kinds import (
    ACTIVATED,
    CAUSAL,
    GPT2,
    LLAMA,
    PHI3,
    QWEN2,
    World,
    butterflies,
    check_all_together,
    check_each_alone,
    make_world,
)

__all__ = ["butterflies"]

GEMMA3 = "Gemma3ForCausalLM"
SOME = ["q_proj", "v_proj", "down_proj"]
ATTENTION = {LLAMA: ["q_proj"], GPT2: ["c_attn"], PHI3: ["qkv_proj"]}
# It says that it saves the embeddings too, and asks for what it can't know of a tied head.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def lora(targets: list[str], **changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **CAUSAL, **changes})


KINDS: dict[str, dict[str, peft.PeftConfig]] = {
    LLAMA: {
        "lora": lora(SOME),
        "ia3": peft.IA3Config(**CAUSAL),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=7, **CAUSAL),
        "embeddings": lora(["embed_tokens", "q_proj"]),
        "head": lora(["lm_head", "v_proj"]),
        "both ends": lora(["embed_tokens", "lm_head"], use_rslora=True, lora_alpha=1),
        "head with a bias": lora(["lm_head"], lora_bias=True),
        "activated head": lora(
            ["lm_head", "q_proj"], alora_invocation_tokens=ACTIVATED["alora_invocation_tokens"]
        ),
        "loha of the head": peft.LoHaConfig(r=3, alpha=1, target_modules=["lm_head", "q_proj"], **CAUSAL),
        "vera of the head": peft.VeraConfig(r=9, target_modules=["lm_head", "q_proj"], **CAUSAL),
        "ia3 of the head": peft.IA3Config(
            target_modules=["lm_head", "k_proj"], feedforward_modules=["k_proj"], **CAUSAL
        ),
        "ia3 of what the head reads": peft.IA3Config(
            target_modules=["lm_head"], feedforward_modules=["lm_head"], **CAUSAL
        ),
        "tokens": lora(SOME, trainable_token_indices=[119, 3, 50]),
        "tokens of both": lora(SOME, trainable_token_indices={"embed_tokens": [7, 11], "lm_head": [4, 9, 2]}),
        "tokens alone": peft.TrainableTokensConfig(
            token_indices=list(range(3, 63)), target_modules=["embed_tokens"], **CAUSAL
        ),
        "saved ends": lora(SOME, modules_to_save=["embed_tokens", "lm_head"]),
        "saved norms": lora(SOME, modules_to_save=["norm"]),
        "saved last norm": lora(["lm_head"], modules_to_save=["model.norm"]),
        "saved products": lora(["q_proj", "v_proj"], modules_to_save=["v_proj", "o_proj", "gate_proj"]),
        "saved block": peft.IA3Config(
            target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["mlp"], **CAUSAL
        ),
        "saved beside oft": peft.OFTConfig(
            oft_block_size=8, target_modules=["q_proj"], modules_to_save=["input_layernorm"], **CAUSAL
        ),
    },
    QWEN2: {
        "lora": lora(SOME),
        "biases": lora(["q_proj"], bias="all"),
        "own biases": lora(["q_proj", "o_proj"], bias="lora_only"),
        "biases of dora": lora(["q_proj", "v_proj"], bias="lora_only", use_dora=True),
        "biases of oft": peft.OFTConfig(
            oft_block_size=8, bias="oft_only", target_modules=["k_proj"], **CAUSAL
        ),
        "biases of boft": peft.BOFTConfig(bias="boft_only", target_modules=["k_proj"], **CAUSAL),
        "biases of vera": peft.VeraConfig(r=5, bias="all", target_modules=["k_proj"], **CAUSAL),
        "saved with biases": lora(["q_proj"], modules_to_save=["k_proj", "v_proj"], bias="all"),
    },
    GPT2: {
        "lora": lora(["c_attn"], fan_in_fan_out=True),
        "embeddings": lora(["wte", "c_attn"], fan_in_fan_out=True),
        "head": lora(["lm_head", "c_fc"], fan_in_fan_out=True),
        "tokens": lora(["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": [5, 4]}),
        "biases": lora(["c_attn"], fan_in_fan_out=True, bias="all"),
        "saved": lora(["c_attn"], fan_in_fan_out=True, modules_to_save=["c_proj", "ln_1", "ln_f"]),
        "ia3 of a saved norm": peft.IA3Config(
            target_modules=["c_attn"],
            feedforward_modules=["c_attn"],
            fan_in_fan_out=True,
            modules_to_save=["ln_1"],
            **CAUSAL,
        ),
        "saved fused": lora(
            ["c_fc"], fan_in_fan_out=True, modules_to_save=["c_attn", "ln_2", "lm_head", "wte"]
        ),
    },
    PHI3: {
        "lora": lora(["qkv_proj", "gate_up_proj"]),
        "saved": lora(["down_proj"], modules_to_save=["qkv_proj", "gate_up_proj", "norm"]),
    },
}
FORWARDS = [(LLAMA, "native"), (LLAMA, "lean"), (LLAMA, "plain"), (QWEN2, "native"), (QWEN2, "plain")]
FORWARDS += [(GPT2, "plain"), (PHI3, "plain")]
TIED: dict[str, peft.PeftConfig] = {
    "embeddings": lora(["embed_tokens", "q_proj"]),
    "tied embeddings": lora(["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "head": lora(["lm_head", "q_proj"]),
    "tokens": lora(["q_proj"], trainable_token_indices=[5, 77]),
    "tokens alone": peft.TrainableTokensConfig(token_indices=[7, 3], **CAUSAL),
    "saved embeddings": lora(["q_proj"], modules_to_save=["embed_tokens"]),
    "saved and tied": lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "saved head": lora(["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(params=FORWARDS, ids=lambda param: f"{param[0]}-{param[1]}")
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    family, forward = request.param
    yield from make_world(tmp_path, family, forward, KINDS[family])


def test_each_kind_alone_equals_peft(world: World) -> None:
    check_each_alone(world)


def test_all_kinds_in_one_batch_answer_as_each_of_them_alone(world: World) -> None:
    check_all_together(world)


@pytest.mark.parametrize("forward", ["native", "lean", "plain"])
def test_what_is_tied_in_the_base_is_as_in_peft(tmp_path: Path, forward: str) -> None:
    for world in make_world(tmp_path, LLAMA, forward, TIED, tie_word_embeddings=True):
        check_each_alone(world)
        check_all_together(world)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in KINDS])
def test_around_the_layers_of_every_family_it_is_as_in_peft(tmp_path: Path, family: str) -> None:
    saved = {"Qwen3ForCausalLM": ["model.norm", "input_layernorm"]}.get(
        family, ["input_layernorm", "model.norm"]
    )
    configs: dict[str, peft.PeftConfig] = {
        "ends": lora(["embed_tokens", "lm_head"]),
        "tokens": lora(["q_proj"], trainable_token_indices=[5, 77]),
        "saved": lora(["q_proj"], modules_to_save=saved),
        "saved ends": lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    }
    for world in make_world(tmp_path, family, "plain", configs):
        check_each_alone(world)
        check_all_together(world)


class Dripping(Memory):
    """Adapters that come chunk by chunk, while the engine goes on."""

    def __init__(self, known: Memory) -> None:
        super().__init__()
        self.adapters = known.adapters
        self.sinks: dict[str, AdapterSink] = {}

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        self.sinks[digest] = sink

    def deliver(self, digest: str, engine: Engine) -> None:
        manifest, data = self.adapters[digest]
        sink = self.sinks.pop(digest)
        sink.begin(manifest.to_bytes())
        for chunk in manifest.chunks:
            sink.write(data[chunk.offset : chunk.offset + chunk.size])
            engine.step()
        sink.finish()


@pytest.mark.parametrize("forward", ["native", "lean"])
def test_a_prompt_that_is_computed_while_they_arrive_is_answered_alike(tmp_path: Path, forward: str) -> None:
    names = ("both ends", "tokens of both", "saved ends", "saved norms", "saved last norm", "saved block")
    configs = {name: KINDS[LLAMA][name] for name in names}
    for world in make_world(tmp_path, LLAMA, forward, configs):
        source = Dripping(world.source)
        config = make_config(tmp_path, forward=forward, block_tokens=8, device_slots=len(names))
        engine = Engine(config, load_base(tmp_path, config), source, SystemClock())
        late = dataclasses.replace(world, engine=engine)
        for name in names:
            [expected] = world.ask([name])
            digest = world.kinds[name].digest
            assert digest is not None
            heard = late.submit(name)
            engine.step()
            source.deliver(digest, engine)
            step_to_the_end(engine, [heard])
            assert heard.tokens == expected.tokens, name
            torch.testing.assert_close(heard.values(), expected.values(), rtol=1e-5, atol=1e-5)
            assert heard.outcome is not None
            assert heard.outcome.timeline.overlapped_ns > 0, name
        engine.stop()
