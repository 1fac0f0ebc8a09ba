"""Every family of the module map: tiny random models and LoRA by peft, against transformers' generation."""

import json
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from adaptermesh.artifact.architectures import ARCHITECTURES
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.sites import site_map
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Outcome, Request
from adaptermesh.worker.engine.source import AdapterSink

VOCAB, COUNT, WINDOW = 120, 12, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Tied ones would make a random model repeat its last token.
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}


@dataclass(frozen=True)
class Family:
    """A tiny model, and changes of its config that must not go unnoticed: what they leave out matters."""

    config: Any
    values: dict[str, Any]
    without: list[dict[str, Any]] = field(default_factory=list)


UNWINDOWED = {"sliding_window": 256}
FAMILIES = {
    "LlamaForCausalLM": Family(LlamaConfig, SHAPE),
    "MistralForCausalLM": Family(MistralConfig, {**SHAPE, "sliding_window": WINDOW}, [UNWINDOWED]),
    "Qwen2ForCausalLM": Family(
        Qwen2Config,
        {**SHAPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        [UNWINDOWED],
    ),
    "Qwen3ForCausalLM": Family(Qwen3Config, {**SHAPE, "head_dim": 16}),
    "Gemma2ForCausalLM": Family(
        Gemma2Config,
        {**SHAPE, **GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 6.0},
        [UNWINDOWED, {"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 1}],
    ),
    "Gemma3ForCausalLM": Family(
        Gemma3TextConfig, {**SHAPE, **GEMMA, "sliding_window_pattern": 2}, [UNWINDOWED]
    ),
    "Phi3ForCausalLM": Family(Phi3Config, {**SHAPE, "sliding_window": WINDOW}, [UNWINDOWED]),
    "GPT2LMHeadModel": Family(
        GPT2Config,
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        [{"scale_attn_by_inverse_layer_idx": False}],
    ),
}


class Heard:
    """Remembers one answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: MeshError | None = None
        self.outcome: Outcome | None = None
        self.ended = threading.Event()

    def on_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None: ...

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        self.tokens.extend(token_ids)

    def on_finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ended.set()

    def on_error(self, error: MeshError) -> None:
        self.error = error
        self.ended.set()


def step_to_the_end(engine: Engine, asked: Sequence[Heard]) -> None:
    """By hand, until every answer has ended; none with an error."""
    for _ in range(400):
        engine.step()
        if all(heard.ended.is_set() for heard in asked):
            break
    assert [heard.error for heard in asked] == [None] * len(asked)


class Memory:
    """The adapters of one test."""

    def __init__(self) -> None:
        self.adapters: dict[str, tuple[Manifest, bytes]] = {}

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        manifest, data = self.adapters[digest]
        sink.begin(manifest.to_bytes())
        sink.write(data)
        sink.finish()

    def cancel(self, digest: str) -> None:
        return


def save_base(folder: Path, family: str, **changes: Any) -> BaseFacts:
    """A folder as the model cache has it, of a tiny model with random weights, norms and biases."""
    made = FAMILIES[family]
    torch.manual_seed(11)
    config = made.config(**{**made.values, **changes, "architectures": [family]})
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    facts = BaseFacts.from_config(
        "tiny", json.loads((folder / "config.json").read_text()), "sha256:" + "b" * 64
    )
    (folder / "base_model.json").write_text(json.dumps(facts.to_json()))
    return facts


def load_reference(folder: Path, **changes: Any) -> Any:
    config = AutoConfig.from_pretrained(folder, **changes)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def generate(model: Any, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens; no token ends them."""
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=COUNT, do_sample=False
        )
    return [int(token) for token in out[0, len(prompt) :]]


def make_adapters(folder: Path, model: Any, facts: BaseFacts, source: Memory) -> tuple[Any, list[str]]:
    """Rank 4 on all modules and rank 2 on those of attention: the peft model with both, and their digests."""
    modules = site_map(facts).modules
    every = sorted({path.rsplit(".", 1)[1] for path in modules})
    some = sorted({path.rsplit(".", 1)[1] for path in modules if "attn" in path})
    conv1d = ARCHITECTURES[facts.architecture].conv1d
    configs = [
        LoraConfig(r=rank, lora_alpha=8, target_modules=names, fan_in_fan_out=conv1d, task_type="CAUSAL_LM")
        for rank, names in ((4, every), (2, some))
    ]
    with warnings.catch_warnings():
        # peft still reads a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, configs[0], adapter_name="a0")
        model.add_adapter("a1", configs[1])
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder, selected_adapters=["a0", "a1"])
    digests = []
    for name in ("a0", "a1"):
        files = {file: folder / name / file for file in ("adapter_config.json", "adapter_model.safetensors")}
        out = folder / f"{name}.safetensors"
        manifest = ingest(SourceBundle(files, "tests", name), facts, out).manifest
        source.adapters[manifest.digest] = (manifest, out.read_bytes())
        digests.append(manifest.digest)
    return model, digests


def make_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def make_config(folder: Path, **changes: Any) -> EngineConfig:
    """Blocks and steps so small that prompts need several of both, and forward by the modules."""
    values = {
        "disk_dir": folder / "disk",
        "threads": 1,
        "forward": "plain",
        "max_batch_rows": 8,
        "step_tokens": 16,
        "block_tokens": 4,
        "kv_tokens": 1024,
        "max_context_tokens": 128,
        "device_slots": 4,
        "host_bytes": 2**24,
        "disk_bytes": 2**24,
    }
    return EngineConfig(**{**values, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_of_a_family_equal_what_transformers_and_peft_generate(
    tmp_path: Path, family: str
) -> None:
    facts, source = save_base(tmp_path, family), Memory()
    model, digests = make_adapters(tmp_path / "adapters", load_reference(tmp_path), facts, source)
    config = make_config(tmp_path)
    engine = Engine(config, load_base(tmp_path, config), source, SystemClock())
    asked: list[tuple[int | None, list[int], Heard]] = []
    for number, prompt in enumerate(make_prompts([5, 37, 50, 1, 20, 41])):
        adapter, heard = (0, None, 1)[number % 3], Heard()
        params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
        digest = None if adapter is None else digests[adapter]
        engine.submit(Request(f"r{number}", "t", digest, tuple(prompt), params), heard)
        asked.append((adapter, prompt, heard))
    step_to_the_end(engine, [heard for *_, heard in asked])
    engine.stop()
    for adapter, prompt, heard in asked:
        assert heard.error is None
        if adapter is None:
            with model.disable_adapter():
                assert heard.tokens == generate(model, prompt)
        else:
            model.set_adapter(f"a{adapter}")
            assert heard.tokens == generate(model, prompt)
            with model.disable_adapter():
                assert heard.tokens != generate(model, prompt), "the adapter would prove nothing"


def test_a_dummy_base_of_the_config_alone_serves_adapters_as_its_own_random_weights_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, source = tmp_path / "tiny", Memory()
    real = save_base(folder, "Gemma2ForCausalLM")
    for name in ("model.safetensors", "base_model.json"):
        (folder / name).unlink()
    config = make_config(tmp_path, load_format="dummy")
    random_before = torch.get_rng_state()
    base, again = load_base(folder, config), load_base(folder, config)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert "random weights" in caplog.text
    assert (base.facts.model_id, base.facts.config_digest) == ("tiny-dummy", real.config_digest)
    assert base.facts.digest == again.facts.digest != real.digest
    model, [digest, _] = make_adapters(tmp_path / "adapters", again.model, base.facts, source)
    engine = Engine(config, base, source, SystemClock())
    [prompt], heard = make_prompts([30]), Heard()
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
    engine.submit(Request("r", "t", digest, tuple(prompt), params), heard)
    step_to_the_end(engine, [heard])
    engine.stop()
    model.set_adapter("a0")
    assert heard.tokens == generate(model, prompt)


def test_every_architecture_of_the_module_map_is_a_family_here() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "change"),
    [(name, change) for name, family in FAMILIES.items() for change in family.without],
)
def test_a_family_without_its_window_cap_or_scaling_would_answer_otherwise(
    tmp_path: Path, family: str, change: dict[str, Any]
) -> None:
    save_base(tmp_path, family)
    whole, changed = load_reference(tmp_path), load_reference(tmp_path, **change)
    prompts = make_prompts([5, 37, 50])
    assert [generate(whole, one) for one in prompts] != [generate(changed, one) for one in prompts]


@pytest.mark.parametrize("family", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_attention_that_is_not_causal_is_refused_at_the_start(tmp_path: Path, family: str) -> None:
    save_base(tmp_path, family, use_bidirectional_attention=True)
    config = make_config(tmp_path)
    base = load_base(tmp_path, config)
    with pytest.raises(MeshError, match="is not causal") as caught:
        Engine(config, base, Memory(), SystemClock())
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_rotation_that_follows_the_longest_row_is_refused_unless_the_context_is_short(
    tmp_path: Path,
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 64,
    }
    save_base(tmp_path, "Phi3ForCausalLM", rope_parameters=rope, original_max_position_embeddings=64)
    config = make_config(tmp_path)
    with pytest.raises(MeshError, match="longrope"):
        Engine(config, load_base(tmp_path, config), Memory(), SystemClock())
    short = make_config(tmp_path, max_context_tokens=64)
    Engine(short, load_base(tmp_path, short), Memory(), SystemClock()).stop()
