"""The native forward against the lean and the plain one, and each row against itself alone."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import BLOCKS, Site
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.worker.engine.attention import Span, plan_attention
from adaptermesh.worker.engine.base import make_base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward import forward as forwards
from adaptermesh.worker.engine.forward import panels
from adaptermesh.worker.engine.forward.forward import ResumableForward, make_forward
from adaptermesh.worker.engine.forward.llama import LlamaForward
from adaptermesh.worker.engine.forward.native import NativeForward
from adaptermesh.worker.engine.forward.plain import PlainForward
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.native.build import NoKernels
from adaptermesh.worker.engine.native.library import ACTIVATIONS, INPUTS, Kernels
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.ops.registry import fast_ops, plain_ops
from adaptermesh.worker.engine.slots import AdapterPlan
from tests.unit.worker.engine.ops.loading import load

VOCAB = 260
CONTEXT = 1024
SLOTS = 6
FACTORS_ONLY = 3
BESIDE = 4
EVERYTHING = 5
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ODD: dict[str, Any] = {
    "hidden_size": 45,
    "intermediate_size": 67,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
GROUPED: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 24}
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, tied, odd sizes": lambda: LlamaConfig(
        **{**SHAPE, **ODD, "head_dim": 8, "tie_word_embeddings": True}
    ),
    "llama, biases": lambda: LlamaConfig(**{**SHAPE, **BIASED}),
    "llama, heads of 256": lambda: LlamaConfig(**{**SHAPE, "head_dim": 256, "num_key_value_heads": 1}),
    "llama, a window that means nothing": lambda: LlamaConfig(**{**SHAPE, "sliding_window": 9}),
    "mistral": lambda: MistralConfig(**{**SHAPE, **GROUPED}, sliding_window=None),
    "mistral, window": lambda: MistralConfig(**{**SHAPE, "sliding_window": 24, "use_sliding_window": False}),
    "mistral, long window": lambda: MistralConfig(**SHAPE, sliding_window=530),
    "qwen2": lambda: Qwen2Config(**{**SHAPE, "hidden_size": 64}, sliding_window=9),
    "qwen2, window": lambda: Qwen2Config(**{**SHAPE, "hidden_size": 64}, **SLIDING),
    "qwen3": lambda: Qwen3Config(**{**SHAPE, **GROUPED, "num_key_value_heads": 1}),
}


def make_config(**changes: Any) -> EngineConfig:
    values = {"disk_dir": Path("unused"), "threads": 1, "block_tokens": 16, "max_context_tokens": CONTEXT}
    return EngineConfig(**{**values, **changes})


def make_model(config: Any) -> Any:
    """The same weights at each call; norms and biases are random too."""
    torch.manual_seed(11)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(requires_grad=False)


def bfloat16_model(config: Any) -> Any:
    return make_model(config).bfloat16().float()


class Foreign:
    """An op that the kernels don't know: it turns the inputs of one slot, changes outputs and the stream."""

    size_bytes = 0
    input_place = 3

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = [site.name for site in sites]

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None: ...

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: Any) -> None: ...

    def unload(self, slot: int) -> None: ...

    def plan(self, tokens: StepTokens) -> dict[str, Any]:
        return self._plans(self._sites, tokens)

    def plan_inputs(self, tokens: StepTokens) -> dict[str, Any]:
        return self._plans(self._sites, tokens)

    def plan_blocks(self, tokens: StepTokens) -> dict[str, Any]:
        return self._plans(["attention", "ffn"], tokens)

    def _plans(self, sites: Sequence[str], tokens: StepTokens) -> dict[str, Any]:
        rows = [
            slice(segment.start, segment.end) for segment in tokens.segments if segment.slot == EVERYTHING
        ]
        return {site: ForeignPlan(site, rows) for site in sites} if rows else {}


@dataclass
class ForeignPlan:
    site: str
    rows: Sequence[slice]

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for rows in self.rows:
            y[rows] = 0.9 * y[rows] + 0.1 * (layer + 1) * x[rows].mean(-1, keepdim=True)

    def change(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        found = x.clone()
        for rows in self.rows:
            found[rows] = 0.7 * x[rows] + 0.3 * x[rows].roll(len(self.site) + layer, -1)
        return found

    def term(
        self, layer: int, residual: torch.Tensor, output: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:
        found = torch.zeros_like(output)
        for rows in self.rows:
            found[rows] = 0.1 * torch.tanh(residual[rows]) + 0.05 * (layer + 1) * output[rows]
            found[rows] += 0.1 * torch.sin(stream[rows])
        return found


@dataclass
class Row:
    """Tokens of one sequence, and the logits of those that were computed."""

    tokens: list[int]
    slot: int = -1
    blocks: tuple[int, ...] = ()
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.tokens) - len(self.logits)


class Way:
    """A forward, its cache and ops with three random adapters; steps are packed by hand."""

    def __init__(self, model: Any, kernels: Kernels | None, **changes: Any) -> None:
        config = make_config(**changes)
        facts = BaseFacts.from_config("tiny", model.config.to_dict(), "sha256:" + "a" * 64)
        self.base = base = make_base(facts, model, None, config)
        self.size = config.block_tokens
        native = kernels if config.forward in ("auto", "native") else None
        self.forward = make_forward(base, config, native)
        weights = self.forward.weights
        self.ops = (
            plain_ops(base.sites, base.dtype, base.device, weights)
            if config.forward == "plain"
            else fast_ops(base.sites, base.dtype, base.device, native, weights)
        )
        self.ops = {**self.ops, "foreign": Foreign(base.sites.sites)}
        for slot in range(SLOTS):
            self._load(slot)
        self.blocks = 4096 // self.size
        shape = KvShape(base.sites.num_layers, base.kv_heads, base.head_dim, self.blocks, self.size)
        self.cache = KvCache(shape, base.dtype, base.device)
        # What was there before is nobody's: only the forwards of torch need their blocks zeroed.
        if isinstance(self.forward, NativeForward):
            self.cache.data.fill_(torch.nan)

    def _load(self, slot: int) -> None:
        """Slot 0: low-rank at every site, with magnitudes in layer 1. 1: at some, of many ranks, with factors
        and shifts beside some. 2: at one site of one layer. 3: factors and shifts at every site. 4:
        bottlenecks of every input, of all but one block. 5: all of that, and an op that is not the kernels'.
        """
        generator = torch.Generator().manual_seed(slot)
        modules: list[ModuleOp] = []
        tensors: dict[str, torch.Tensor] = {}

        def add(site: Site, layer: int, op: str, rank: int, **values: torch.Tensor) -> None:
            names = {name: f"L{layer}.{site.name}.{name}" for name in values}
            tensors.update({names[name]: value for name, value in values.items()})
            scaled = op == "lowrank" or not {"bias_delta", "magnitude"}.isdisjoint(values)
            modules.append(ModuleOp(site.name, layer, op, rank, 2.0 if scaled else 1.0, names))

        for place, site in enumerate(self.base.sites.sites):
            for layer in range(self.base.sites.num_layers):
                rank = (4, 1 + (5 * place + layer) % 13, 33, 0, 0, 3)[slot]
                left_out = (slot == 1 and (place + layer) % 3 == 0) or (
                    slot == 2 and (place, layer) != (6, 1)
                )
                if rank and not left_out:
                    a = torch.randn(rank, site.in_features, generator=generator) * 0.1
                    b = torch.randn(site.out_features, rank, generator=generator) * 0.1
                    add(site, layer, "lowrank", rank, A=a, B=b)
                vectors = {
                    "in_scale": 1 + 0.3 * torch.randn(site.in_features, generator=generator),
                    "out_scale": 1 + 0.3 * torch.randn(site.out_features, generator=generator),
                    "bias_delta": 0.2 * torch.randn(site.out_features, generator=generator),
                }
                if slot == 0 and layer == 1:
                    add(site, layer, "affine", 0, magnitude=1 + vectors["out_scale"].abs())
                chosen = list(vectors)[place % 3 :] if slot == 1 and layer == 1 else list(vectors)
                if slot in (FACTORS_ONLY, EVERYTHING) or (slot == 1 and layer == 1):
                    add(site, layer, "affine", 0, **{name: vectors[name] for name in chosen})
        for place, (block, layer) in enumerate(itertools.product(BLOCKS, range(2))):
            if slot not in (BESIDE, EVERYTHING) or (slot == BESIDE and place == 0):
                continue
            hidden, width = self.base.facts.hidden_size, 3 + 7 * place
            shapes = {
                "down": (width, hidden),
                "down_bias": (width,),
                "up": (hidden, width),
                "up_bias": (hidden,),
            }
            names = {name: f"L{layer}.{block}.{name}" for name in shapes}
            for name, shape in shapes.items():
                tensors[names[name]] = 0.2 * torch.randn(shape, generator=generator)
            options = {"activation": ACTIVATIONS[(place + slot) % 8], "input": INPUTS[(place + slot) % 3]}
            modules.append(ModuleOp(block, layer, "bottleneck", 0, 0.5 + place, names, options=options))
        for kind, op in self.ops.items():
            own = [module for module in modules if module.op == kind]
            load(op, slot, own, tensors.__getitem__, self.base.sites.num_layers)

    def place(self, rows: Sequence[Row]) -> None:
        """Gives the rows blocks, scattered over the cache."""
        order = torch.randperm(self.blocks, generator=torch.Generator().manual_seed(len(rows))) + 1
        free = order.tolist()
        for row in rows:
            need = -(-len(row.tokens) // self.size)
            row.blocks, free = tuple(free[:need]), free[need:]

    def step(self, work: Sequence[tuple[Row, int]]) -> None:
        """Computes the next tokens of some rows; decodes go first."""
        work = sorted(work, key=lambda one: one[1] > 1)
        spans, segments = list[Span](), list[Segment]()
        ids, positions = list[int](), list[int]()
        for row, count in work:
            past = len(row.logits)
            spans.append(Span(past, count, row.blocks[: -(-(past + count) // self.size)]))
            segments.append(Segment(row.slot, len(ids), len(ids) + count))
            ids.extend(row.tokens[past : past + count])
            positions.extend(range(past, past + count))
        cpu = torch.device("cpu")
        decodes = sum(count == 1 for _, count in work)
        batch = StepBatch(
            torch.tensor(ids),
            torch.tensor(positions),
            torch.arange(len(ids)),
            plan_attention(spans, decodes, self.size, torch.float32, cpu),
            AdapterPlan(StepTokens(tuple(segments)), self.ops),
            tuple(spans),
        )
        with torch.inference_mode():
            logits = iter(self.forward.run(batch, self.cache))
        for row, count in work:
            row.logits.extend(next(logits) for _ in range(count))

    def whole(self, tokens: list[int], slot: int, chunk: int = CONTEXT) -> torch.Tensor:
        """[tokens, vocabulary]: of a row alone, in chunks."""
        row = Row(tokens, slot)
        self.place([row])
        while row.left:
            self.step([(row, min(chunk, row.left))])
        return torch.stack(row.logits)


def make_tokens(count: int, seed: int = 0) -> list[int]:
    found: list[int] = torch.randint(
        3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_rows_equal_the_other_forwards_and_transformers(
    kernels: Kernels, name: str, block: int
) -> None:
    native = Way(make_model(CONFIGS[name]()), kernels, forward="native", block_tokens=block)
    rows = [
        Row(make_tokens(count, count), slot)
        for count, slot in ((50, 0), (1, -1), (37, 1), (9, 2), (20, -1), (23, 3), (31, 4), (26, 5))
    ]
    if block == 16:
        rows.append(Row(make_tokens(570), 0))
    native.place(rows)
    native.step([(row, max(1, row.left * 2 // 3)) for row in rows])
    native.step([(row, row.left - 1) for row in rows if row.left > 1])
    native.step([(row, row.left) for row in rows if row.left])
    others = [Way(make_model(CONFIGS[name]()), None, forward="plain")]
    if name.startswith("llama"):
        others.append(Way(make_model(CONFIGS[name]()), None, forward="lean"))
    reference = make_model(CONFIGS[name]())
    for row in rows:
        found = torch.stack(row.logits)
        for other in others:
            torch.testing.assert_close(found, other.whole(row.tokens, row.slot), rtol=1e-4, atol=1e-4)
        if row.slot < 0:
            expected = reference(input_ids=torch.tensor([row.tokens])).logits[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral, window", "qwen2, window"])
def test_without_its_window_a_model_would_answer_otherwise(kernels: Kernels, name: str) -> None:
    config = CONFIGS[name]()
    config.sliding_window = CONTEXT
    changed, tokens = Way(make_model(config), kernels, forward="native"), make_tokens(60)
    windowed = Way(make_model(CONFIGS[name]()), kernels, forward="native")
    assert not torch.allclose(changed.whole(tokens, -1)[-1], windowed.whole(tokens, -1)[-1], atol=1e-2)


class Alone:
    """Rows to mix, and what each of them gives alone, token by token, on one thread."""

    ROWS = (
        (1, -1),
        (5, 0),
        (40, -1),
        (33, 1),
        (17, 2),
        (23, 0),
        (600, -1),
        (530, 1),
        (29, 3),
        (27, 4),
        (22, 5),
    )

    def __init__(self, name: str, make: Callable[[Any], Any], kernels: Kernels) -> None:
        self.ways = {
            threads: Way(make(CONFIGS[name]()), kernels, forward="native", threads=threads)
            for threads in (1, 2)
        }
        self.expected = [
            self.ways[1].whole(make_tokens(count, seed), slot, chunk=1 if count < 100 else 7)
            for seed, (count, slot) in enumerate(self.ROWS)
        ]

    def rows(self, chosen: Sequence[int]) -> list[Row]:
        return [Row(make_tokens(self.ROWS[seed][0], seed), self.ROWS[seed][1]) for seed in chosen]


@pytest.fixture(scope="module", params=["llama", "mistral, long window", "qwen3"])
def alone(request: pytest.FixtureRequest, kernels: Kernels) -> Alone:
    make = bfloat16_model if request.param == "qwen3" else make_model
    return Alone(request.param, make, kernels)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, len(Alone.ROWS) - 1), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(1, 260), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
)
def test_a_row_is_the_same_to_the_last_bit_in_every_batch(
    alone: Alone, chosen: list[int], chunks: list[list[int]], threads: int
) -> None:
    rows, way = alone.rows(chosen), alone.ways[threads]
    way.place(rows)
    turn = 0
    while any(row.left for row in rows):
        sizes = chunks[turn % len(chunks)]
        # Prompts that are long end in one chunk, so that an example does not take for ever.
        if turn > 3:
            sizes = [CONTEXT] * len(sizes)
        way.step([(row, min(size, row.left)) for row, size in zip(rows, sizes, strict=False) if row.left])
        turn += 1
    for row, seed in zip(rows, chosen, strict=True):
        assert torch.equal(torch.stack(row.logits), alone.expected[seed])


class Stopping:
    """Runs a batch layer by layer, with another one between two layers."""

    def __init__(self, way: Way) -> None:
        assert isinstance(way.forward, ResumableForward)
        self._way = way
        self._forward = way.forward
        self.between: Callable[[], object] = lambda: None

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        passage = self._forward.start(batch, cache)
        for layer in range(self._way.base.sites.num_layers):
            self._way.forward = self._forward
            self.between()
            passage.advance(layer + 1, AdapterPlan(batch.adapters.tokens, self._way.ops))
            self._way.forward = self  # type: ignore[assignment]
        return passage.logits()


@pytest.mark.parametrize("forward", ["native", "lean"])
def test_a_batch_that_stops_between_layers_is_the_same_to_the_last_bit(
    kernels: Kernels, forward: str
) -> None:
    way = Way(make_model(CONFIGS["llama"]()), kernels, forward=forward)
    shapes = ((21, 0), (9, -1), (30, 1))
    expected = [Row(make_tokens(count, count), slot) for count, slot in shapes]
    rows = [Row(make_tokens(count, count), slot) for count, slot in shapes]
    other, alone = (Row(make_tokens(40, 5), 2) for _ in range(2))
    way.place([*expected, *rows, other, alone])
    way.step([(alone, 20)])
    for _ in range(2):
        way.step([(alone, 1)])
    way.step([(row, row.left) for row in expected])
    way.step([(other, 20)])
    stopping = Stopping(way)
    stopping.between = lambda: way.step([(other, 1)])
    way.forward = stopping  # type: ignore[assignment]
    way.step([(row, row.left) for row in rows])
    for row, same in zip(rows, expected, strict=True):
        assert torch.equal(torch.stack(row.logits), torch.stack(same.logits))
    assert torch.equal(torch.stack(other.logits), torch.stack(alone.logits))


def test_a_row_that_overflows_changes_no_other(kernels: Kernels) -> None:
    way = Way(make_model(CONFIGS["llama"]()), kernels, forward="native", threads=2)
    expected = way.whole(make_tokens(30), 1)
    native = way.ops["lowrank"]
    native._slots[0].memory.fill_(3e38)  # type: ignore[attr-defined]
    rows = [Row(make_tokens(9, 1), 0), Row(make_tokens(30), 1), Row(make_tokens(4, 2), 0)]
    way.place(rows)
    way.step([(row, 3) for row in rows])
    way.step([(row, 1) for row in rows])
    way.step([(rows[1], rows[1].left)])
    assert not torch.isfinite(torch.stack(rows[0].logits)).any()
    assert torch.equal(torch.stack(rows[1].logits), expected)


def test_what_a_former_step_left_behind_is_never_read(kernels: Kernels) -> None:
    way = Way(make_model(CONFIGS["llama, biases"]()), kernels, forward="native")
    expected = way.whole(make_tokens(40), 0)
    assert isinstance(way.forward, NativeForward)
    with torch.inference_mode():
        way.forward._scratch.fill_(torch.nan)
        way.cache.data.fill_(torch.nan)
    assert torch.equal(way.whole(make_tokens(40), 0), expected)


def test_a_step_without_outputs_fills_the_cache(kernels: Kernels) -> None:
    way = Way(make_model(CONFIGS["llama"]()), kernels, forward="native")
    row, cpu = Row(make_tokens(20), -1), torch.device("cpu")
    way.place([row])
    spans = [Span(0, 19, row.blocks)]
    batch = StepBatch(
        torch.tensor(row.tokens[:19]),
        torch.arange(19),
        torch.zeros(0, dtype=torch.int64),
        plan_attention(spans, 0, way.size, torch.float32, cpu),
        AdapterPlan(),
        tuple(spans),
    )
    with torch.inference_mode():
        assert way.forward.run(batch, way.cache).shape == (0, VOCAB)
    row.logits = [torch.zeros(VOCAB)] * 19
    way.step([(row, 1)])
    last = row.logits[-1]
    assert torch.equal(last, way.whole(row.tokens, -1)[-1])


@pytest.mark.parametrize("name", ["llama, tied, odd sizes", "qwen2"])
def test_weights_that_are_bfloat16_numbers_are_stored_as_such_and_lose_nothing(
    kernels: Kernels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = []
    for _ in range(2):
        ways.append(Way(bfloat16_model(CONFIGS[name]()), kernels, forward="native"))
        monkeypatch.setattr(panels, "_needs_float32", lambda _: True)
    narrow, wide = (way.forward for way in ways)
    assert isinstance(narrow, NativeForward)
    assert isinstance(wide, NativeForward)
    assert narrow._panels.size_bytes < 0.6 * wide._panels.size_bytes
    for chunk in (1, 5, 50, CONTEXT):
        first, second = (way.whole(make_tokens(120), 1, chunk) for way in ways)
        assert torch.equal(first, second)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "activation": (lambda: LlamaConfig(**SHAPE, hidden_act="gelu"), {}, "the model wants gelu"),
    "odd heads": (lambda: LlamaConfig(**{**SHAPE, "head_dim": 12}), {}, "heads of 12"),
    "large heads": (lambda: LlamaConfig(**{**SHAPE, "head_dim": 264}), {}, "heads of 264"),
    "small blocks": (lambda: LlamaConfig(**SHAPE), {"block_tokens": 4}, "blocks of 4 tokens"),
    "odd blocks": (lambda: LlamaConfig(**SHAPE), {"block_tokens": 24}, "blocks of 24 tokens"),
    "layers that differ": (
        lambda: Qwen2Config(**{**SHAPE, "hidden_size": 64}, **{**SLIDING, "max_window_layers": 1}),
        {},
        "its layers differ",
    ),
    "architecture": (lambda: Gemma2Config(**SHAPE), {}, "Gemma2ForCausalLM"),
    "dtype": (lambda: LlamaConfig(**SHAPE), {"dtype": "bfloat16"}, "in torch.bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_cannot_compute_is_refused_or_left_to_torch(kernels: Kernels, case: str) -> None:
    config, changes, why = REFUSED[case]
    with pytest.raises(MeshError, match=why) as caught:
        Way(make_model(config()), kernels, forward="native", **changes)
    assert (caught.value.code, caught.value.metadata["field"]) == (Code.INVALID_ARGUMENT, "forward")
    way = Way(make_model(config()), None, **changes)
    assert isinstance(way.forward, LlamaForward | PlainForward)
    assert torch.isfinite(way.whole(make_tokens(10), -1)).all()


def test_key_heads_that_are_shared_unevenly_are_refused(kernels: Kernels) -> None:
    model = make_model(LlamaConfig(**SHAPE))
    model.config.num_attention_heads = 5
    with pytest.raises(MeshError, match="5 heads don't share 2 key heads evenly"):
        Way(model, kernels, forward="native")


def test_heads_that_are_turned_in_part_are_refused(kernels: Kernels) -> None:
    model = make_model(LlamaConfig(**SHAPE))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
    with pytest.raises(MeshError, match="turned in part"):
        Way(model, kernels, forward="native")


@pytest.mark.parametrize("forward", ["native", "lean", "plain"])
def test_a_rotation_that_follows_the_longest_row_is_refused_by_every_forward(
    kernels: Kernels, forward: str
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 64}, rope_parameters=rope)
    model = make_model(config)
    model.config.rope_parameters["original_max_position_embeddings"] = 32
    with pytest.raises(MeshError, match="dynamic") as caught:
        Way(model, kernels, forward=forward, max_context_tokens=64)
    assert caught.value.code is Code.FAILED_PRECONDITION
    Way(model, kernels, forward=forward, max_context_tokens=32)


def test_an_op_that_the_kernels_do_not_know_is_not_passed_over(kernels: Kernels) -> None:
    way = Way(make_model(CONFIGS["llama"]()), kernels, forward="native")
    way.ops = plain_ops(way.base.sites, torch.float32, torch.device("cpu"))
    with pytest.raises(MeshError, match="does not compute affine, bottleneck, lowrank"):
        way.whole([1, 2, 3], 0)


def no_kernels(_: Path) -> Kernels:
    raise NoKernels("there is no C++ compiler: install g++")


def test_without_a_compiler_an_engine_serves_more_slowly_and_says_so(
    lab: Any, make_bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forwards, "load_kernels", no_kernels)
    with caplog.at_level(logging.WARNING, forwards.__name__):
        bench = make_bench()
    [record] = [record for record in caplog.records if record.name == forwards.__name__]
    assert record.reason == "there is no C++ compiler: install g++"  # type: ignore[attr-defined]
    assert isinstance(bench.engine._runner._forward, LlamaForward)
    adapter = lab.adapter(1, 4)
    heard = bench.submit(adapter, [5, 6, 7], 8)
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, [5, 6, 7], 8)


def test_without_a_compiler_an_engine_that_must_be_native_does_not_start(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwards, "load_kernels", no_kernels)
    with pytest.raises(MeshError, match=r"install g\+\+") as caught:
        make_bench(forward="native")
    assert (caught.value.code, caught.value.metadata["field"]) == (Code.INVALID_ARGUMENT, "forward")


def test_an_engine_on_two_threads_gives_the_tokens_of_one_on_one(
    lab: Any, make_bench: Any, prompts: Callable[[int, int], list[list[int]]], kernels: Kernels
) -> None:
    assert kernels.panel
    adapters = [lab.adapter(1, 4), None, lab.adapter(2, 8, ("q_proj", "v_proj")), lab.adapter(1, 4), None]
    found = []
    for threads in (1, 2):
        bench = make_bench(forward="native", threads=threads)
        heard = [bench.submit(a, prompt, 12) for a, prompt in zip(adapters, prompts(5, 3), strict=True)]
        bench.run(*heard)
        found.append([one.tokens for one in heard])
    assert found[0] == found[1]
