"""Every kind of adapter that is served: alone against peft, and all in one batch against themselves."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Request
from tests.parity.engine.test_families import (
    COUNT,
    FAMILIES,
    Heard,
    Memory,
    generate,
    load_reference,
    make_config,
    make_prompts,
    save_base,
    step_to_the_end,
)
from tests.unit.artifact.boft_blocks import stand_in

LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"
# One has fused modules, the other biases.
PHI3, QWEN2 = "Phi3ForCausalLM", "Qwen2ForCausalLM"
SOME = ["q_proj", "v_proj", "down_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
INVOCATION = [7, 11, 7]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ACTIVATED: dict[str, Any] = {**CAUSAL, "alora_invocation_tokens": INVOCATION}
INVOKED = {
    "alora": (9,),
    "alora at once": (0,),
    "alora at the end": (21,),
    "alora twice": (4, 17),
    "alora with a bias": (1, 3, 14),
    "alora that is not invoked": (),
    "activated head": (4,),
}
"""Where prompts get the invocation; that at 1 and 3 share a token."""
_LENGTHS = "5 37 21 30 12 44 9 26 33 18 29 7 16 23 35 11 28 31 24 24 40 27 22 6 25 17 1 30 9"
LENGTHS = [int(length) for length in _LENGTHS.split()]
"""Of the prompts, in the order of the kinds."""
NO_EFFECT = {"base", "alora that is not invoked"}
ADALORA: dict[str, Any] = {"target_r": 2, "total_step": 9, "lora_alpha": 7}

KINDS: dict[str, dict[str, peft.PeftConfig]] = {
    LLAMA: {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=EVERY),
        "rslora": peft.LoraConfig(r=6, lora_alpha=4, use_rslora=True, target_modules=SOME),
        "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=EVERY),
        "lora_bias": peft.LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=SOME),
        "adalora": peft.AdaLoraConfig(init_r=5, target_modules=SOME, **ADALORA),
        "loha": peft.LoHaConfig(r=3, alpha=4, target_modules=EVERY),
        "vera": peft.VeraConfig(r=9, target_modules=SOME),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
        "ia3 of inputs": peft.IA3Config(target_modules=EVERY, feedforward_modules=EVERY),
        "ia3 of outputs": peft.IA3Config(target_modules=EVERY, feedforward_modules=[]),
        "lokr": peft.LoKrConfig(r=3, alpha=2, target_modules=EVERY),
        "lokr of two products": peft.LoKrConfig(
            r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=SOME
        ),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=EVERY),
        "oft, exact and shared": peft.OFTConfig(
            oft_block_size=4, block_share=True, use_cayley_neumann=False, target_modules=SOME
        ),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=EVERY),
        "boft of two factors": peft.BOFTConfig(
            boft_block_size=4, boft_n_butterfly_factor=2, target_modules=SOME
        ),
        "alora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=EVERY, **ACTIVATED),
        "alora at once": peft.LoraConfig(r=2, target_modules=SOME, **ACTIVATED),
        "alora at the end": peft.LoraConfig(r=8, target_modules=EVERY, **ACTIVATED),
        "alora twice": peft.LoraConfig(r=3, target_modules=SOME, **ACTIVATED),
        "alora with a bias": peft.LoraConfig(r=3, lora_bias=True, target_modules=SOME, **ACTIVATED),
        "alora that is not invoked": peft.LoraConfig(r=4, target_modules=EVERY, **ACTIVATED),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=7, **CAUSAL),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=16, encoder_hidden_size=24, **CAUSAL),
        "p-tuning by an LSTM": peft.PromptEncoderConfig(
            num_virtual_tokens=21, encoder_reparameterization_type="LSTM", **CAUSAL
        ),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=13, **CAUSAL),
        "prefix of one block": peft.PrefixTuningConfig(num_virtual_tokens=8, **CAUSAL),
        "projected prefix": peft.PrefixTuningConfig(
            num_virtual_tokens=18, prefix_projection=True, encoder_hidden_size=24, **CAUSAL
        ),
    },
    PHI3: {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=FUSED),
        "lokr": peft.LoKrConfig(r=3, alpha=2, decompose_factor=5, target_modules=FUSED),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=FUSED),
        "boft": peft.BOFTConfig(boft_n_butterfly_factor=3, target_modules=FUSED),
    },
    QWEN2: {
        "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=SOME),
        "lokr": peft.LoKrConfig(r=3, alpha=2, target_modules=SOME),
        "boft": peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=SOME),
    },
    GPT2: {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "dora": peft.LoraConfig(
            r=4, use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        ),
        "lora_bias": peft.LoraConfig(r=3, lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True),
        "adalora": peft.AdaLoraConfig(init_r=5, target_modules=["c_attn"], fan_in_fan_out=True, **ADALORA),
        "vera": peft.VeraConfig(r=9, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True),
        "alora twice": peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **ACTIVATED
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=9, **CAUSAL),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, **CAUSAL),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=11, **CAUSAL),
    },
}
FAMILY_KINDS: dict[str, peft.PeftConfig] = {
    "alora": peft.LoraConfig(r=4, target_modules="all-linear", **ACTIVATED),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=11, **CAUSAL),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=11, **CAUSAL),
}
"""What depends on how a family embeds its tokens, and on how far they see: more than the windows of some."""
FORWARDS = [(LLAMA, "native"), (LLAMA, "lean"), (LLAMA, "plain"), (GPT2, "plain")]
FORWARDS += [(PHI3, "plain"), (QWEN2, "native"), (QWEN2, "plain")]


class HeardLogprobs(Heard):
    """Remembers the log probabilities too."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[TokenLogprobs] = []

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        super().on_tokens(text, token_ids, logprobs)
        self.logprobs.extend(logprobs)

    def values(self) -> torch.Tensor:
        """[tokens, 1 + likeliest]."""
        return torch.tensor([[one.logprob, *(logprob for _, logprob in one.top)] for one in self.logprobs])


@dataclass
class Kind:
    """One adapter: its digest, and peft's model with it alone."""

    model: Any
    digest: str | None


@dataclass
class World:
    """A tiny base with an adapter of every kind, and an engine over it that is stepped by hand."""

    engine: Engine
    kinds: dict[str, Kind]
    source: Memory
    count: int = 0
    prompts: list[list[int]] = field(default_factory=lambda: make_prompts(LENGTHS))

    def ask(self, names: Sequence[str]) -> list[HeardLogprobs]:
        """All at once, greedily; each kind has a prompt of its own."""
        asked = [self.submit(name) for name in names]
        step_to_the_end(self.engine, asked)
        return asked

    def submit(self, name: str) -> HeardLogprobs:
        params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, logprobs=4)
        heard, self.count = HeardLogprobs(), self.count + 1
        request = Request(f"r{self.count}", "t", self.kinds[name].digest, tuple(self.prompt(name)), params)
        self.engine.submit(request, heard)
        return heard

    def prompt(self, name: str) -> list[int]:
        prompt = list(self.prompts[list(self.kinds).index(name)])
        for start in INVOKED.get(name, ()):
            prompt[start : start + len(INVOCATION)] = INVOCATION
        return prompt


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """[virtual tokens, if they are computed, and tokens, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def answer(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens; with virtual tokens each from all before it anew."""
    if not getattr(model, "_is_prompt_learning", False):
        return generate(model, prompt)
    tokens = list(prompt)
    for _ in range(COUNT):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(autouse=True, scope="module")
def butterflies() -> Iterator[None]:
    with stand_in():
        yield


def make_kind(
    folder: Path, reference: Any, config: peft.PeftConfig, facts: Any, source: Any, spread: float = 0.5
) -> Kind:
    """Weights are normal with that deviation, factors around one."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        # peft still reads a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        # It has doubts about a bias on lora_B: it can't be merged into a base without one, and has one axis.
        warnings.simplefilter("ignore", peft.utils.warning.PeftWarning)
        # It notes in the config what it was used with.
        model = peft.get_peft_model(reference, copy.deepcopy(config))
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                # As it was, row by row more or less.
                parameter.data.mul_(torch.empty_like(parameter).uniform_(1.0 - spread, 1.0 + spread))
            elif "ia3_" in name or "boft_s" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=spread)
            elif "prompt_encoder" in name:
                # As large as it is in the base, for embeddings; larger for keys that are to be noticed.
                torch.nn.init.normal_(parameter, std=2 * spread)
            elif any(part in name for part in ("lora_", "hada_", "vera_lambda", "lokr_")):
                torch.nn.init.normal_(parameter, std=spread)
            elif "oft_R" in name:
                # Turned by some of a right angle.
                torch.nn.init.normal_(parameter, std=spread / 2)
            elif parameter.requires_grad:
                # Modules, biases and rows that are trained from what the base has.
                parameter.data.add_(torch.randn_like(parameter), alpha=spread / 3)
        model.eval().save_pretrained(str(folder))
    files = {name: folder / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    out = folder / "canonical.safetensors"
    manifest = ingest(SourceBundle(files, "tests", "x"), facts, out).manifest
    assert manifest.servable, manifest.unservable_reason
    source.adapters[manifest.digest] = (manifest, out.read_bytes())
    return Kind(model, manifest.digest)


@pytest.fixture(params=FORWARDS, ids=lambda param: f"{param[0]}-{param[1]}")
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    family, forward = request.param
    yield from make_world(tmp_path, family, forward, KINDS[family])


def make_world(
    tmp_path: Path, family: str, forward: str, configs: Mapping[str, peft.PeftConfig], **changes: Any
) -> Iterator[World]:
    # The native kernels take heads of multiples of 8, no smaller blocks, and layers that are alike.
    alike = {"hidden_size": 64, "use_sliding_window": False, "max_window_layers": 9}
    needed: dict[str, Any] = {LLAMA: {"head_dim": 16}, QWEN2: alike}.get(family, {})
    facts, source = save_base(tmp_path, family, **{**needed, **changes}), Memory()
    kinds = {"base": Kind(load_reference(tmp_path), None)}
    for number, (name, config) in enumerate(configs.items()):
        folder = tmp_path / f"adapter-{number}"
        kinds[name] = make_kind(folder, load_reference(tmp_path), config, facts, source)
    rows = {"device_slots": len(kinds), "max_batch_rows": len(kinds), "step_tokens": len(kinds) + 8}
    engine_config = make_config(tmp_path, forward=forward, block_tokens=8, **rows)
    engine = Engine(engine_config, load_base(tmp_path, engine_config), source, SystemClock())
    yield World(engine, kinds, source)
    engine.stop()


def test_each_kind_alone_equals_peft(world: World) -> None:
    check_each_alone(world)


def check_each_alone(world: World) -> None:
    plain = world.kinds["base"].model
    for name, kind in world.kinds.items():
        [heard] = world.ask([name])
        prompt = world.prompt(name)
        expected = answer(kind.model, prompt)
        assert heard.tokens == expected, name
        # From the end: before the prompt there may be virtual tokens.
        likeliest = logits_of(kind.model, prompt + expected)[-COUNT - 1 : -1].log_softmax(-1).topk(4).values
        torch.testing.assert_close(heard.values()[:, 1:], likeliest, rtol=0.0, atol=1e-3)
        assert (expected == generate(plain, prompt)) == (name in NO_EFFECT), "it would prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_and_activation_of_every_family_equal_peft(tmp_path: Path, family: str) -> None:
    facts, source = save_base(tmp_path, family), Memory()
    kinds = {"base": Kind(load_reference(tmp_path), None)}
    for name, given in FAMILY_KINDS.items():
        config: Any = copy.deepcopy(given)
        if name == "alora":
            config.fan_in_fan_out = family == GPT2
        kinds[name] = make_kind(tmp_path / name, load_reference(tmp_path), config, facts, source)
    engine_config = make_config(tmp_path)
    engine = Engine(engine_config, load_base(tmp_path, engine_config), source, SystemClock())
    world = World(engine, kinds, source)
    for name, heard in zip(kinds, world.ask(list(kinds)), strict=True):
        prompt, model = world.prompt(name), kinds[name].model
        expected = answer(model, prompt)
        assert heard.tokens == expected, name
        likeliest = logits_of(model, prompt + expected)[-COUNT - 1 : -1].log_softmax(-1).topk(4).values
        torch.testing.assert_close(heard.values()[:, 1:], likeliest, rtol=0.0, atol=1e-3)
    engine.stop()


def test_all_kinds_in_one_batch_answer_as_each_of_them_alone(world: World) -> None:
    check_all_together(world)


def check_all_together(world: World) -> None:
    names = list(world.kinds)
    alone = [heard for name in names for heard in world.ask([name])]
    for order in (names, names[::-1]):
        for name, heard in zip(order, world.ask(order), strict=True):
            expected = alone[names.index(name)]
            assert heard.tokens == expected.tokens, name
            close = torch.allclose(heard.values(), expected.values(), rtol=1e-5, atol=1e-5)
            assert close, (name, (heard.values() - expected.values()).abs().max())
