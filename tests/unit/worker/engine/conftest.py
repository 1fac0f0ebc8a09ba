"""A tiny Llama, random adapters made by peft and brought into the canonical form, and an engine over them."""

import copy
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import Base, make_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.native.build import NoKernels
from adaptermesh.worker.engine.native.library import Kernels, load_kernels
from adaptermesh.worker.engine.request import Outcome, Request
from adaptermesh.worker.engine.source import AdapterSink

LAYERS = 3
VOCAB = 260
EOS = 259
ALL_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ManualClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now


@dataclass(frozen=True)
class Adapter:
    """A canonical adapter and the peft folder it came from."""

    digest: str
    manifest: Manifest
    data: bytes
    folder: Path


@dataclass
class Heard:
    """A listener that remembers."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    outcome: Outcome | None = None
    error: MeshError | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def on_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        assert not self.ended.is_set()
        assert not self.tokens
        self.prompt_logprobs.extend(logprobs)
        self.pieces.append(len(logprobs))

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        assert not self.ended.is_set()
        self.tokens.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.text += text

    def on_finish(self, outcome: Outcome) -> None:
        assert not self.ended.is_set()
        self.outcome = outcome
        self.ended.set()

    def on_error(self, error: MeshError) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()


class MemorySource:
    """Adapters in memory. `held` keeps fetches until `release`; `spoil` changes the bytes on their way."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.fetches: list[str] = []
        self.cancels: list[str] = []
        self.contexts: list[object | None] = []
        self.held = False
        self.waiting: list[tuple[str, AdapterSink]] = []
        self.spoil: Callable[[bytes], bytes] | None = None

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        self.fetches.append(digest)
        self.contexts.append(context)
        if self.held:
            self.waiting.append((digest, sink))
        else:
            self.send(digest, sink)

    def cancel(self, digest: str) -> None:
        self.cancels.append(digest)

    def release(self) -> None:
        waiting, self.waiting = self.waiting, []
        for digest, sink in waiting:
            self.send(digest, sink)

    def send(self, digest: str, sink: AdapterSink, piece: int = 1000) -> None:
        found = self.adapters.get(digest)
        if found is None:
            sink.fail(MeshError(Code.NOT_FOUND, Reason.VERSION_NOT_FOUND, f"{digest} does not exist"))
            return
        data = found.data if self.spoil is None else self.spoil(found.data)
        try:
            sink.begin(found.manifest.to_bytes())
            for start in range(0, len(data), piece):
                sink.write(data[start : start + piece])
            sink.finish()
        except MeshError:
            return


class Courier:
    """Delivers one adapter's bytes when told."""

    def __init__(self, adapter: Adapter, sink: AdapterSink) -> None:
        self.adapter = adapter
        self._sink = sink
        self._data = adapter.data
        self._sent = 0
        self._begun = False
        self.layers = 0

    def spoil_layer(self, layer: int) -> None:
        """Changes a byte in what is sent of a layer, or of the next one that the adapter touches."""
        chunks = self.adapter.manifest.chunks
        offset = next((chunk.offset for chunk in chunks if chunk.layer >= layer), len(self._data) - 1)
        data = bytearray(self._data)
        data[offset] ^= 1
        self._data = bytes(data)

    def send_layers(self, until: int) -> None:
        """The bytes of the layers before `until` that were not sent yet."""
        self.layers = until
        chunks = self.adapter.manifest.chunks
        self.send_to(max(chunk.offset + chunk.size for chunk in chunks if chunk.layer < until))

    def send_to(self, end: int) -> None:
        if not self._begun:
            self._begun = True
            self._sink.begin(self.adapter.manifest.to_bytes())
        if end > self._sent:
            start, self._sent = self._sent, end
            self._sink.write(self._data[start:end])

    def finish(self) -> None:
        self.send_to(len(self._data))
        self._sink.finish()

    def fail(self, error: MeshError) -> None:
        self._sink.fail(error)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without merges: one token a byte, so characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    fast.add_special_tokens({"eos_token": "<eos>"})
    return fast


def make_model() -> Any:
    torch.manual_seed(7)
    config: Any = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=EOS,
        pad_token_id=257,
        tie_word_embeddings=True,
        initializer_range=0.12,
        architectures=["LlamaForCausalLM"],
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval()


class Lab:
    """One base model, its adapters and their references, for a whole test session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference_model = make_model()
        facts = self.reference_model.config.to_dict()
        self.facts = BaseFacts.from_config("tiny", facts, "sha256:" + "a" * 64)
        self.adapters: dict[Hashable, Adapter] = {}
        self._continuations: dict[Any, list[int]] = {}
        self._peft: dict[str, Any] = {}

    def base(self, config: EngineConfig) -> Base:
        return make_base(self.facts, copy.deepcopy(self.reference_model), make_tokenizer(), config)

    def adapter(
        self,
        seed: int,
        rank: int = 4,
        sites: Sequence[str] = ALL_SITES,
        alpha: int = 16,
        rank_pattern: dict[str, int] | None = None,
        layers: list[int] | None = None,
    ) -> Adapter:
        pattern = tuple(sorted((rank_pattern or {}).items()))
        key = (seed, rank, tuple(sites), alpha, pattern, tuple(layers or ()))
        if key in self.adapters:
            return self.adapters[key]
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(sites),
            rank_pattern=rank_pattern or {},
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
        return self._make(key, config, seed)

    def alora(self, seed: int, invocation: Sequence[int], rank: int = 4) -> Adapter:
        """A LoRA that acts from the last occurrence of these tokens on."""
        key = ("alora", seed, tuple(invocation), rank)
        config = LoraConfig(
            r=rank,
            target_modules=list(ALL_SITES),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=list(invocation),
        )
        return self.adapters.get(key) or self._make(key, config, seed)

    def virtual(self, kind: str, seed: int, tokens: int) -> Adapter:
        """A "prompt" or a "prefix" of that many virtual tokens."""
        key = (kind, seed, tokens)
        config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind](
            num_virtual_tokens=tokens, task_type="CAUSAL_LM"
        )
        return self.adapters.get(key) or self._make(key, config, seed)

    def ia3(self, seed: int) -> Adapter:
        """Factors at k, v and down."""
        key = ("ia3", seed)
        return self.adapters.get(key) or self._make(key, IA3Config(task_type="CAUSAL_LM"), seed)

    def _make(self, key: Hashable, config: PeftConfig, seed: int) -> Adapter:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # peft still reads a property that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(copy.deepcopy(self.reference_model), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.12)
            elif "prompt_encoder" in name:
                torch.nn.init.normal_(parameter)
            elif "ia3_" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
        folder = self.folder / f"adapter-{len(self.adapters)}"
        model.save_pretrained(str(folder))
        out = folder / "canonical.safetensors"
        names = ("adapter_config.json", "adapter_model.safetensors")
        bundle = SourceBundle({name: folder / name for name in names}, "tests", f"adapter-{seed}")
        manifest = ingest(bundle, self.facts, out).manifest
        adapter = Adapter(manifest.digest, manifest, out.read_bytes(), folder)
        self.adapters[key] = adapter
        self._peft[adapter.digest] = model
        return adapter

    def model(self, adapter: Adapter | None) -> Any:
        """transformers alone, or transformers with peft: the reference."""
        return self.reference_model if adapter is None else self._peft[adapter.digest]

    def logits(self, adapter: Adapter | None, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(adapter)(input_ids=torch.tensor([list(tokens)])).logits[0]
        # peft gives those of virtual tokens too, in front.
        return logits[-len(tokens) :]

    def continuation(self, adapter: Adapter | None, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens, computed anew for each token, without a cache."""
        key = (adapter.digest if adapter else None, tuple(prompt), count)
        if key not in self._continuations:
            tokens = list(prompt)
            for _ in range(count):
                tokens.append(int(self.logits(adapter, tokens)[-1].argmax()))
            self._continuations[key] = tokens[len(prompt) :]
        return self._continuations[key]


@dataclass
class Bench:
    """An engine over the tiny base that is stepped by hand."""

    engine: Engine
    source: MemorySource
    clock: ManualClock
    config: EngineConfig
    base: Base
    count: int = 0

    def submit(
        self,
        adapter: Adapter | None,
        prompt: Sequence[int],
        max_tokens: int = 8,
        request_id: str = "",
        tenant: str = "tenant",
        priority: int = 0,
        deadline_ns: int = 0,
        **sampling: Any,
    ) -> Heard:
        self.count += 1
        heard = Heard()
        values = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
        params = SamplingParams(**values)
        digest = adapter.digest if adapter else None
        if adapter is not None:
            self.source.adapters.setdefault(adapter.digest, adapter)
        request = Request(
            request_id or f"r{self.count}",
            tenant,
            digest,
            tuple(prompt),
            params,
            "context",
            priority=priority,
            deadline_ns=deadline_ns,
        )
        self.engine.submit(request, heard)
        return heard

    def run(self, *heard: Heard, steps: int = 2000) -> None:
        """Steps until all have ended."""
        for _ in range(steps):
            if all(one.ended.is_set() for one in heard):
                return
            if not self.engine.step():
                # A disk thread may be at work.
                threading.Event().wait(0.001)
        raise AssertionError("the requests did not end")

    def wait_for_disk(self, size_bytes: int) -> None:
        """The disk is written behind the requests: waits until it holds that much."""
        for _ in range(10_000):
            if self.engine.status().tiers.disk_used_bytes == size_bytes:
                return
            threading.Event().wait(0.001)
        raise AssertionError("it was not written to disk")

    def courier(self, adapter: Adapter) -> Courier:
        """Takes over the one held fetch of an adapter."""
        [found] = [item for item in self.source.waiting if item[0] == adapter.digest]
        self.source.waiting.remove(found)
        return Courier(adapter, found[1])

    def assert_empty(self) -> None:
        """Nothing is held by anybody."""
        status = self.engine.status()
        assert (status.running, status.waiting, status.kv_used_tokens) == (0, 0, 0)
        assert all(view.requests == 0 for view in status.residencies)
        assert len(self.engine._residency._holders) == 0
        assert len(self.engine._residency._transfers) == 0
        table = self.engine._residency._table
        assert all(entry.uses == entry.reserved_bytes == entry.arrived == 0 for entry in table)
        assert table.host_used == sum(entry.size_bytes for entry in table if entry.on_host)
        assert len(table.partial) == len(self.engine._scheduler._early) == 0


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The native kernels of this machine, built once."""
    try:
        return load_kernels(EngineConfig(disk_dir=Path("unused")).kernel_dir)
    except NoKernels as error:
        pytest.skip(f"needs native kernels: {error}")


@pytest.fixture
def make_bench(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Builds engines with some settings; stops them after the test."""
    made: list[Bench] = []

    def build(**settings: Any) -> Bench:
        values = {
            "disk_dir": tmp_path / "disk",
            # Tiny products gain nothing from threads, and suffer from neighbours on a busy machine.
            "threads": 1,
            "max_batch_rows": 16,
            "max_context_tokens": 256,
            "step_tokens": 64,
            "block_tokens": 8,
            "kv_tokens": 4096,
            "device_slots": 8,
            "host_bytes": 2**26,
            "disk_bytes": 2**26,
            **settings,
        }
        config = EngineConfig(**values)
        source, clock, base = MemorySource(), ManualClock(), lab.base(config)
        made.append(Bench(Engine(config, base, source, clock), source, clock, config, base))
        return made[-1]

    yield build
    for bench in made:
        bench.engine.stop()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
def prompts() -> Callable[[int, int], list[list[int]]]:
    """`prompts(count, seed)`: prompts of different lengths."""

    def make(count: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]

    return make
