"""The real base model: random LoRA on SmolLM2-135M, alone and mixed, against transformers and peft."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Request
from adaptermesh.worker.engine.source import AdapterSink
from tests.parity.engine.test_families import Heard, step_to_the_end
from tests.parity.engine.test_kinds import HeardLogprobs, make_kind

MODEL = Path.home() / ".adaptermesh" / "models" / "smollm2-135m-instruct"
SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNT = 6


class Memory:
    """The adapters of this test."""

    def __init__(self) -> None:
        self.adapters: dict[str, tuple[Manifest, bytes]] = {}

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        manifest, data = self.adapters[digest]
        sink.begin(manifest.to_bytes())
        sink.write(data)
        sink.finish()

    def cancel(self, digest: str) -> None:
        return


def make_adapters(folder: Path, facts: BaseFacts, source: Memory) -> tuple[Any, list[str]]:
    """Two random adapters of different ranks and sites: the peft model that has both, and their digests."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    configs = [
        LoraConfig(r=8, lora_alpha=16, target_modules=SITES, task_type="CAUSAL_LM"),
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ]
    with warnings.catch_warnings():
        # peft still reads a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, configs[0], adapter_name="a0")
        model.add_adapter("a1", configs[1])
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    model.eval().save_pretrained(folder, selected_adapters=["a0", "a1"])
    digests = []
    for name in ("a0", "a1"):
        files = {file: folder / name / file for file in ("adapter_config.json", "adapter_model.safetensors")}
        out = folder / f"{name}.safetensors"
        manifest = ingest(SourceBundle(files, "tests", name), facts, out).manifest
        source.adapters[manifest.digest] = (manifest, out.read_bytes())
        digests.append(manifest.digest)
    return model, digests


def reference(model: Any, adapter: int | None, prompt: list[int], *, disabled: bool = True) -> list[int]:
    """Greedy tokens by recomputation, without a cache. Adapter None: the base alone, if `disabled`."""
    tokens = list(prompt)
    if adapter is not None:
        model.set_adapter(f"a{adapter}")
    for _ in range(COUNT):
        with torch.no_grad():
            if adapter is None and disabled:
                with model.disable_adapter():
                    logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits
            else:
                logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.model
@pytest.mark.parametrize("forward", ["auto", "plain"])
def test_mixed_rows_on_the_default_base_equal_transformers_and_peft(tmp_path: Path, forward: str) -> None:
    facts = BaseFacts.from_json(json.loads((MODEL / "base_model.json").read_text()))
    source = Memory()
    peft_model, digests = make_adapters(tmp_path, facts, source)
    config = EngineConfig(disk_dir=tmp_path / "disk", kv_tokens=2048, forward=forward)
    base = load_base(MODEL, config)
    engine = Engine(config, base, source, SystemClock())
    texts = [
        "The capital of France is",
        "Write a query: SELECT",
        "def add(a, b):",
        "Once upon a time",
        "2 + 2 =",
    ]
    asked: list[tuple[int | None, list[int], Heard]] = []
    for number, text in enumerate(texts):
        adapter = (0, None, 1)[number % 3]
        prompt = base.tokenizer(text).input_ids
        heard = Heard()
        params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
        digest = None if adapter is None else digests[adapter]
        engine.submit(Request(f"r{number}", "t", digest, tuple(prompt), params), heard)
        asked.append((adapter, prompt, heard))
    step_to_the_end(engine, [heard for *_, heard in asked])
    engine.stop()
    for adapter, prompt, heard in asked:
        assert heard.tokens == reference(peft_model, adapter, prompt)


COMMON: dict[str, peft.PeftConfig] = {
    "lora": LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=SITES),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=SITES),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(r=32, target_modules=["q_proj", "v_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=9, target_modules=["q_proj", "up_proj"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=32, target_modules=["q_proj", "v_proj", "o_proj"]),
    # Tied ends: peft saves a copy of both beside it.
    "ends": LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=list(range(0, 49152, 7))),
    "norms": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
}


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_common_kinds_in_one_batch_on_the_default_base_equal_peft(tmp_path: Path) -> None:
    facts, source = BaseFacts.from_json(json.loads((MODEL / "base_model.json").read_text())), Memory()
    config = EngineConfig(disk_dir=tmp_path / "disk", kv_tokens=2048, max_batch_rows=len(COMMON))
    base = load_base(MODEL, config)
    engine = Engine(config, base, source, SystemClock())
    prompt = base.tokenizer("The capital of France is").input_ids
    asked: list[tuple[str, list[int], torch.Tensor, HeardLogprobs]] = []
    for name, method in COMMON.items():
        model: Any = AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, attn_implementation="eager"
        )
        kind = make_kind(tmp_path / name, model, method, facts, source, spread=0.02)
        tokens, heard = reference(kind.model, None, prompt, disabled=False), HeardLogprobs()
        with torch.no_grad():
            logits = kind.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        asked.append((name, tokens, logits.log_softmax(-1).topk(4).values, heard))
        params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, logprobs=4)
        engine.submit(Request(name, "t", kind.digest, tuple(prompt), params), heard)
    step_to_the_end(engine, [heard for *_, heard in asked])
    engine.stop()
    assert len({tuple(tokens) for _, tokens, *_ in asked}) > 1, "the adapters would prove nothing"
    for name, tokens, likeliest, heard in asked:
        assert heard.tokens == tokens, name
        torch.testing.assert_close(heard.values()[:, 1:], likeliest, rtol=0.0, atol=1e-3)
