"""Compositions in the engine: as peft's own weighted sums, and as themselves in a mixed batch."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.artifact.composing import Member, compose
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.composition import composition_digest, leaves, parse_resolved
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Request
from tests.parity.engine.test_families import (
    COUNT,
    Heard,
    Memory,
    generate,
    load_reference,
    make_adapters,
    make_config,
    make_prompts,
    save_base,
    step_to_the_end,
)

LLAMA = "LlamaForCausalLM"
EXPRESSIONS = {
    "stack({0},{1})": [1.0, 1.0],
    "stack({0},-0.5*{1})": [1.0, -0.5],
    "average(3*{0},{1})": [0.75, 0.25],
    "0.5*{0}": [0.5, 0.0],
    "0.4*stack(average({0},{1}),{1})": [0.2, 0.6],
    "0*{1}": [0.0, 0.0],
}


class World:
    """A tiny base, peft's model with two LoRAs, and an engine that is stepped by hand."""

    def __init__(self, folder: Path, forward: str) -> None:
        facts = save_base(folder, LLAMA, head_dim=16)
        self.source = Memory()
        self.model, self.digests = make_adapters(
            folder / "adapters", load_reference(folder), facts, self.source
        )
        config = make_config(folder, forward=forward, device_slots=8, max_batch_rows=8, block_tokens=8)
        self.engine = Engine(config, load_base(folder, config), self.source, SystemClock())
        self.count = 0

    def compose(self, expression: str) -> str:
        """Its digest; the engine can have it from now on."""
        tree = parse_resolved(expression.format(*self.digests))
        members = {leaf.name: Member(*self.source.adapters[leaf.name]) for leaf in leaves(tree)}
        composed = compose(tree, members)
        digest = composition_digest(tree)
        self.source.adapters[digest] = (composed.manifest, composed.data.tobytes())
        return digest

    def ask(self, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        answers = []
        for digest, prompt in asked:
            heard, self.count = Heard(), self.count + 1
            params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
            self.engine.submit(Request(f"r{self.count}", "t", digest, tuple(prompt), params), heard)
            answers.append(heard)
        step_to_the_end(self.engine, answers)
        return [heard.tokens for heard in answers]


@pytest.fixture(params=["native", "plain"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    world = World(tmp_path, request.param)
    yield world
    world.engine.stop()


def weighted(model: Any, name: str, weights: list[float]) -> None:
    """peft's adapter of that name is the sum of its two, by concatenating their ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a0", "a1"], weights, name, combination_type="cat")
    model.set_adapter(name)


def test_each_composition_equals_pefts_weighted_sum_alone_and_all_of_them_in_one_batch(world: World) -> None:
    prompts = make_prompts([5, 23, 37, 12, 30, 9])
    expected: list[list[int]] = []
    for (text, weights), prompt in zip(EXPRESSIONS.items(), prompts, strict=True):
        if any(weights):
            # It has no sum with a weight of zero that it does not take for a mistake.
            weighted(world.model, f"s{len(expected)}", [weight or 1e-20 for weight in weights])
            answer = generate(world.model, prompt)
        else:
            with world.model.disable_adapter():
                answer = generate(world.model, prompt)
        [found] = world.ask([(world.compose(text), prompt)])
        assert found == answer, text
        expected.append(answer)
    mixed = [(world.compose(text), prompt) for text, prompt in zip(EXPRESSIONS, prompts, strict=True)]
    world.model.set_adapter("a0")
    asked = [*mixed, (world.digests[0], prompts[1]), (None, prompts[2])]
    with world.model.disable_adapter():
        base = generate(world.model, prompts[2])
    assert world.ask(asked) == [*expected, generate(world.model, prompts[1]), base]


def test_its_own_prefix_cache_is_apart_from_its_members(world: World) -> None:
    [prompt] = make_prompts([40])
    alone, half = (
        world.ask([(digest, prompt)])[0] for digest in (world.digests[0], world.compose("0.3*{0}"))
    )
    assert alone != half
    assert world.ask([(world.compose("0.3*{0}"), prompt), (world.digests[0], prompt)]) == [half, alone]
