"""What our engine does on the card: decodes at many rows, and the first token of a long prompt."""

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from tests.bench.gpu.adapter import name_of, write_adapter
from tests.bench.gpu.shape import Shape
from tests.bench.peers.local_source import LocalSource
from tests.bench.peers.rows import Heard, make_request

_WARM_TURNS = 2


class EngineLanes:
    """One engine on one device, stepped by hand."""

    def __init__(self, shape: Shape, folder: Path, cache: Path, device: str, attention: str) -> None:
        self._shape = shape
        self._cold = 0
        self._count = 0
        self._random = random.Random(7)
        # Slots for the mixed batch, and one in which adapters come and go.
        config = EngineConfig(
            disk_dir=cache / "disk",
            device=device,
            load_format="dummy",
            attention=attention,
            max_batch_rows=shape.rows,
            max_context_tokens=shape.context_tokens,
            step_tokens=max(2048, shape.rows),
            kv_tokens=shape.rows * shape.context_tokens,
            prefix_cache=False,
            device_slots=shape.adapters + 1,
            host_bytes=64 * 2**30 if device != "cpu" else 2**30,
            disk_bytes=0,
        )
        self.base = load_base(folder, config)
        self.adapter_bytes = write_adapter(self.base.facts, shape.rank, self.base.dtype, cache / "adapters")
        self._source = LocalSource(cache / "adapters")
        self._engine = Engine(config, self.base, self._source, SystemClock())

    @property
    def attention(self) -> str:
        """What computes attention."""
        way = self._engine._runner._plan_attention.way
        return "gather" if way is None else str(getattr(way, "__name__", way))

    def close(self) -> None:
        self._engine.stop()
        self._source.close()

    def warm(self) -> None:
        """Loads the adapters, compiles what is compiled, records the graphs."""
        for index in range(self._shape.adapters):
            self._load(name_of(index), Tier.DEVICE)
        # First of all: the arenas grow for one more adapter, which drops the graphs.
        self.first_token_after_copy()
        for _ in range(_WARM_TURNS):
            self.decode(mixed=False)
            self.decode(mixed=True)
            self.first_token(None)
            self.first_token(name_of(0))

    def decode(self, *, mixed: bool) -> float:
        """Output tokens a second while all rows decode; mixed: as many adapters as there are, in turn."""
        shape = self._shape
        names = [name_of(row % shape.adapters) if mixed else None for row in range(shape.rows)]
        heard = self._run(names, shape.prompt_tokens, shape.output_tokens)
        start = max(row.times[0] for row in heard)
        end = min(row.times[-1] for row in heard)
        return sum(start < at <= end for row in heard for at in row.times) / (end - start)

    def first_token(self, name: str | None) -> float:
        """Milliseconds to the first token of a long prompt, alone."""
        heard = self._run([name], self._shape.long_prompt, 1)[0]
        return (heard.times[0] - heard.submitted) * 1e3

    def first_token_after_copy(self) -> float:
        """The same with an adapter that is in host memory and has to be copied to the device."""
        self._cold += 1
        name = name_of(self._shape.adapters + self._cold)
        self._load(name, Tier.HOST)
        milliseconds = self.first_token(name)
        self._engine.evict(self._source.digest(name))
        return milliseconds

    def decode_bytes(self, *, mixed: bool) -> float:
        """Bytes that a decode step reads at least: the base's matrices, the adapters, half-full contexts."""
        shape, base = self._shape, self.base
        parameters: int = sum(weight.nbytes for weight in base.model.parameters())
        embeddings: int = base.model.get_input_embeddings().weight.nbytes
        if base.model.config.tie_word_embeddings:
            embeddings = 0
        token = 2 * base.sites.num_layers * base.kv_heads * base.head_dim * base.dtype.itemsize
        context = shape.rows * (shape.prompt_tokens + shape.output_tokens / 2) * token
        adapters = self.adapter_bytes * min(shape.adapters, shape.rows) if mixed else 0
        return parameters - embeddings + context + adapters

    def _run(self, names: Sequence[str | None], prompt_tokens: int, count: int) -> list[Heard]:
        heard = []
        for name in names:
            self._count += 1
            digest = None if name is None else self._source.digest(name)
            prompt = [
                self._random.randrange(3, self._shape.config["vocab_size"]) for _ in range(prompt_tokens)
            ]
            one = Heard(time.perf_counter())
            self._engine.submit(make_request(f"r{self._count}", digest, prompt, count), one)
            heard.append(one)
        while not all(one.ended.is_set() for one in heard):
            self._engine.step()
        for one in heard:
            if one.error is not None:
                raise one.error
        return heard

    def _load(self, name: str, tier: Tier) -> None:
        done = threading.Event()
        errors: list[MeshError | None] = []

        def on_done(error: MeshError | None) -> None:
            errors.append(error)
            done.set()

        self._engine.load(self._source.digest(name), tier, False, on_done)
        while not done.is_set():
            self._engine.step()
            done.wait(0.001)
        if errors[0] is not None:
            raise errors[0]


def copied_bytes_per_second(device: str, size: int) -> float:
    """What a copy within the device's memory moves, bytes read and bytes written together."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        _settle(device)
        start = time.perf_counter()
        target.copy_(source)
        _settle(device)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
